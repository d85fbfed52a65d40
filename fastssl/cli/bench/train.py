"""``fastssl bench train``."""

from __future__ import annotations

from typing import Any

import click

from fastssl.cli.bench.measure import measure
from fastssl.cli.bench.options import options


@click.command()
@options("recipe", "arch", "set", "data", "photos", "device", "workers", "batch", "amp", "compile", "graph", "engine")
@options("seconds", "runs", "json")
def train(**chosen: Any) -> None:
    """Loader and step together, how much faster the same steps are on cached batches, and what would help.

    What would help is tried: the sentence that is printed holds the predicted and the measured gain.

    \b
    fastssl bench train --recipe light-moco-mobilenetv3 --data photos.beton --seconds 30 --json out.jsonl
    """
    from fastssl.benchmarks.suites.train import run

    measure("train", run, **chosen)
