"""``fastssl bench step``."""

from __future__ import annotations

from typing import Any

import click

from fastssl.cli.bench.measure import measure
from fastssl.cli.bench.options import options


@click.command()
@options(
    "recipe",
    "arch",
    "set",
    "device",
    "batch",
    "many amps",
    "compile",
    "graph",
    "runs",
    click.option("--peers", is_flag=True, help="In turns with a MoCo step as public code writes it, in NCHW memory."),
    "json",
)
def step(**chosen: Any) -> None:
    """The training step on views that are on the device already. A batch that does not fit is halved.

    \b
    fastssl bench step --peers --json out.jsonl
    fastssl bench step --recipe light-moco-mobilenetv3 --amp bf16 --compile --graph --json out.jsonl
    fastssl bench step --arch resnet18 --batch-size 64
    """
    from fastssl.benchmarks.suites.step import run

    measure("step", run, **chosen)
