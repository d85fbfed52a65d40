"""``fastssl bench train``."""

from __future__ import annotations

import itertools

import click

from fastssl.cli.bench.measure import load_recipes, measure
from fastssl.cli.bench.options import (
    amp_option,
    arch_option,
    batch_option,
    compile_option,
    data_option,
    device_option,
    graph_option,
    photos_option,
    recipe_option,
    runs_option,
    seconds_option,
    set_option,
)
from fastssl.cli.common import json_option


@click.command()
@recipe_option
@arch_option
@set_option
@data_option
@photos_option
@device_option
@click.option("--workers", type=click.IntRange(min=1), help="Decoding threads. Default: one a core.")
@batch_option
@amp_option
@compile_option
@graph_option
@click.option(
    "--pipeline", type=click.Choice(["native", "dali", "ffcv"]), default="native", show_default=True, help="Engine."
)
@seconds_option
@runs_option
@json_option
def train(
    recipes,
    arch,
    overrides,
    data,
    photos,
    device,
    workers,
    batch_size,
    amp,
    compiled,
    graph,
    pipeline,
    seconds,
    runs,
    json_path,
) -> None:
    """Loader and step together, how much faster the same steps are on cached batches, and what would help.

    What would help is tried: the sentence that is printed holds the predicted and the measured gain.

    \b
    fastssl bench train --recipe light-moco-mobilenetv3 --data photos.beton --seconds 30 --json out.jsonl
    """
    from fastssl.benchmarks.suites.train import run
    from fastssl.distributed.devices import choose_device

    place = choose_device(device)
    measure(
        json_path,
        [
            (
                f"train, {name}, {source}",
                lambda recipe=recipe, name=name, source=source: run(
                    recipe,
                    name,
                    source,
                    place,
                    workers,
                    batch_size,
                    amp,
                    compiled,
                    seconds,
                    runs,
                    photos,
                    graph,
                    pipeline,
                ),
            )
            for (recipe, name), source in itertools.product(load_recipes(recipes, overrides, arch), data)
        ],
    )
