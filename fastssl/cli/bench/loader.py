"""``fastssl bench loader``."""

from __future__ import annotations

import itertools

import click

from fastssl.cli.bench.measure import in_threads, load_recipes, measure
from fastssl.cli.bench.options import (
    batch_option,
    data_option,
    device_option,
    photos_option,
    recipe_option,
    runs_option,
    seconds_option,
    set_option,
)
from fastssl.cli.common import console, json_option
from fastssl.errors import counted

#: Eleven contenders in turns: with less than three seconds a turn the rates are those of their queues.
_PEERS_SECONDS = 160.0


@click.command()
@recipe_option
@set_option
@data_option
@photos_option
@device_option
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    multiple=True,
    help="Decoding threads; may be repeated. Default: one a core.",
)
@batch_option
@click.option(
    "--pipeline",
    "pipelines",
    type=click.Choice(["native", "dali", "ffcv"]),
    multiple=True,
    default=("native",),
    show_default=True,
    help="Engine; may be repeated.",
)
@seconds_option
@runs_option
@click.option(
    "--peers",
    is_flag=True,
    help="Instead: our three engines and other people's loaders, two MoCo-v2 views of 224 px, on the CPU; counted "
    "time 160 s.",
)
@json_option
@click.pass_context
def loader(
    ctx, recipes, overrides, data, photos, device, workers, batch_size, pipelines, seconds, runs, peers, json_path
) -> None:
    """Decoding, the host's cost in the number of views, and the whole loader; of the other engines the whole loader.

    \b
    fastssl bench loader --recipe light-moco-mobilenetv3 --seconds 10 --json out.jsonl
    fastssl bench loader --data photos.beton --workers 1 --workers 8
    fastssl bench loader --device cuda --pipeline native --pipeline dali --json engines.jsonl
    fastssl bench loader --peers --json peers.jsonl
    """
    if peers:
        _peers(ctx, data, workers or (None,), batch_size, seconds, runs, photos, json_path)
        return
    from fastssl.benchmarks.suites.loader import run
    from fastssl.distributed.devices import choose_device

    place = choose_device(device)
    settings = itertools.product(load_recipes(recipes, overrides), data, workers or (None,), dict.fromkeys(pipelines))
    measure(
        json_path,
        [
            (
                f"loader, {name}, {engine}, {source}{in_threads(threads)}",
                lambda recipe=recipe, name=name, source=source, threads=threads, engine=engine: run(
                    recipe, name, source, place, threads, batch_size, seconds, runs, photos, engine
                ),
            )
            for (recipe, name), source, threads, engine in settings
        ],
    )


def _peers(ctx: click.Context, data, workers, batch_size, seconds, runs, photos, json_path) -> None:
    from fastssl.benchmarks.suites.peers import left_out, run

    option = {"recipes": "recipe", "overrides": "set", "pipelines": "pipeline"}
    for name in ("recipes", "overrides", "device", "pipelines"):
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--peers compares fixed views of all engines on the CPU; leave --{option.get(name, name)} out"
            )
    if ctx.get_parameter_source("seconds") is click.core.ParameterSource.DEFAULT:
        seconds = _PEERS_SECONDS
    for missing in left_out():
        console.print(f"left out: {missing}", highlight=False, markup=False, soft_wrap=True)
    settings = len(data) * len(workers)
    minutes = counted(round(settings * seconds * 1.5 / 60), "minute")
    console.print(f"about {minutes} ...", highlight=False, markup=False)
    options = {
        "seconds": seconds,
        "runs": runs,
        "photos": photos,
        **({} if batch_size is None else {"batch_size": batch_size}),
    }
    measure(
        json_path,
        [
            (
                f"loaders, {source}{in_threads(threads)}",
                lambda source=source, threads=threads: run(source, workers=threads, **options),
            )
            for source, threads in itertools.product(data, workers)
        ],
    )
