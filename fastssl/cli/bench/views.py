"""``fastssl bench views``."""

from __future__ import annotations

from typing import Any

import click

from fastssl.cli.bench.measure import measure
from fastssl.cli.bench.options import options


@click.command()
@options("recipe", "set", "data", "photos", "device", "batch", "runs", "json")
def views(**chosen: Any) -> None:
    """Crop and colour of decoded pictures that lie on the device.

    \b
    fastssl bench views --recipe light-moco-mobilenetv3 --recipe quickstart --json out.jsonl
    """
    from fastssl.benchmarks.suites.views import run

    measure("views", run, **chosen)
