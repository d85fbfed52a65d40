"""``fastssl bench loader``."""

from __future__ import annotations

from typing import Any

import click

from fastssl.cli.bench.measure import measure
from fastssl.cli.bench.options import options
from fastssl.cli.common import console
from fastssl.errors import counted

#: Eleven contenders in turns: with less than three seconds a turn the rates are those of their queues.
_PEERS_SECONDS = 160.0
#: Parameters of the recipe's loader, which ``--peers`` does not measure, and their options.
_OF_A_RECIPE = {"recipes": "recipe", "overrides": "set", "device": "device", "pipelines": "pipeline"}


@click.command()
@options(
    "recipe",
    "set",
    "data",
    "photos",
    "device",
    "many workers",
    "batch",
    "many engines",
    "seconds",
    "runs",
    click.option(
        "--peers",
        is_flag=True,
        help="Instead: our three engines and other people's loaders, two MoCo-v2 views of 224 px, on the CPU; counted "
        "time 160 s.",
    ),
    "json",
)
@click.pass_context
def loader(ctx: click.Context, peers: bool, **chosen: Any) -> None:
    """Decoding, the host's cost in the number of views, and the whole loader; of the other engines the whole loader.

    \b
    fastssl bench loader --recipe light-moco-mobilenetv3 --seconds 10 --json out.jsonl
    fastssl bench loader --data photos.beton --workers 1 --workers 8
    fastssl bench loader --device cuda --pipeline native --pipeline dali --json engines.jsonl
    fastssl bench loader --peers --json peers.jsonl
    """
    if peers:
        _peers(ctx, chosen)
        return
    from fastssl.benchmarks.suites.loader import run

    measure("loader", run, **chosen)


def _peers(ctx: click.Context, chosen: dict) -> None:
    from fastssl.benchmarks.suites.peers import left_out, run

    for name, option in _OF_A_RECIPE.items():
        chosen.pop(name)
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--peers compares fixed views of all engines on the CPU; leave --{option} out")
    if ctx.get_parameter_source("seconds") is click.core.ParameterSource.DEFAULT:
        chosen["seconds"] = _PEERS_SECONDS
    for missing in left_out():
        console.print(f"left out: {missing}", highlight=False, markup=False, soft_wrap=True)
    settings = len(chosen["data"]) * max(1, len(chosen["workers"]))
    minutes = counted(round(settings * chosen["seconds"] * 1.5 / 60), "minute")
    console.print(f"about {minutes} ...", highlight=False, markup=False)
    measure("loaders", run, **chosen)
