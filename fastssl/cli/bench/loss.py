"""``fastssl bench loss``."""

from __future__ import annotations

from typing import Any

import click

from fastssl.cli.bench.measure import measure
from fastssl.cli.bench.options import options


@click.command()
@options(
    "recipe",
    "set",
    "device",
    click.option(
        "--batch-size",
        "batch_sizes",
        type=click.IntRange(min=1),
        multiple=True,
        help="Queries; may be repeated. Default: the recipe's batch.",
    ),
    "runs",
    "json",
)
def loss(**chosen: Any) -> None:
    """The loss, forward and backward, in turns with the dense form of it.

    \b
    fastssl bench loss --batch-size 256 --batch-size 512 --json out.jsonl
    fastssl bench loss --set moco.queue=16384 --set moco.weighting=geometric --set moco.neighbors=null
    """
    from fastssl.benchmarks.suites.loss import run

    measure("loss", run, **chosen)
