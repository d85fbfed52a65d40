"""``fastssl bench convert``."""

from __future__ import annotations

from typing import Any

import click

from fastssl.cli.bench.measure import measure
from fastssl.cli.bench.options import options
from fastssl.cli.common import console


@click.command("convert")
@options(
    click.option(
        "--data",
        multiple=True,
        default=("synthetic",),
        show_default=True,
        metavar="SRC",
        help="Folder or tar of photos, as convert-imagenet takes it; 'synthetic' makes JPEGs of ImageNet's usual size. "
        "May be repeated.",
    ),
    click.option(
        "--photos",
        type=click.IntRange(min=1),
        default=512,
        show_default=True,
        help="Number of synthetic photos; of SRC at most so many, evenly spaced.",
    ),
    click.option(
        "--workers", type=click.IntRange(min=1), multiple=True, help="Threads; may be repeated. Default: one a core."
    ),
    "folder",
    "runs",
    click.option("--peers", is_flag=True, help="In turns with ffcv's DatasetWriter, where that is installed."),
    "json",
)
def convert_bench(peers: bool, **chosen: Any) -> None:
    """Whole conversions: JPEGs copied through, and scaled to a short side of 256 px and encoded anew. pair/s are
    photos/s.

    \b
    fastssl bench convert --workers 1 --workers 8 --json out.jsonl
    fastssl bench convert --data photos/ --peers
    """
    from fastssl.benchmarks.suites.convert import run
    from fastssl.pipelines.engines.registry import engine_state

    if peers and (problem := engine_state("ffcv").problem):
        console.print(f"left out: ffcv's DatasetWriter ({problem})", highlight=False, markup=False, soft_wrap=True)
    measure("convert", run, peers=peers, **chosen)
