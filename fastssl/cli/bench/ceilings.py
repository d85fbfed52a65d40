"""``fastssl bench ceilings``."""

from __future__ import annotations

from typing import Any

import click

from fastssl.cli.bench.measure import measure
from fastssl.cli.bench.options import options
from fastssl.cli.common import finite


@click.command()
@options(
    "data",
    "photos",
    "device",
    click.option("--workers", type=click.IntRange(min=1), help="Decoding threads, beside one. Default: one a core."),
    click.option(
        "--seconds",
        type=click.FloatRange(min=0, min_open=True),
        callback=finite,
        default=10.0,
        show_default=True,
        help="Counted time of decoding; the other figures take as long as their runs do.",
    ),
    "folder",
    "runs",
    "json",
)
def ceilings(**chosen: Any) -> None:
    """What this machine can do at most: bare JPEG decoding, memory copies, matrix products, and the disk past the page
    cache.

    Each run writes a file of up to 256 MB and reads it.

    \b
    fastssl bench ceilings --json out.jsonl
    fastssl bench ceilings --data photos.beton --folder /mnt/photos --seconds 30
    """
    from fastssl.benchmarks.suites.ceilings import run

    measure("ceilings", run, **chosen)
