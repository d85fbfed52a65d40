"""``fastssl bench views``."""

from __future__ import annotations

import itertools

import click

from fastssl.cli.bench.measure import load_recipes, measure
from fastssl.cli.bench.options import (
    batch_option,
    data_option,
    device_option,
    photos_option,
    recipe_option,
    runs_option,
    set_option,
)
from fastssl.cli.common import json_option


@click.command()
@recipe_option
@set_option
@data_option
@photos_option
@device_option
@batch_option
@runs_option
@json_option
def views(recipes, overrides, data, photos, device, batch_size, runs, json_path) -> None:
    """Crop and colour of decoded pictures that lie on the device.

    \b
    fastssl bench views --recipe light-moco-mobilenetv3 --recipe quickstart --json out.jsonl
    """
    from fastssl.benchmarks.suites.views import run
    from fastssl.distributed.devices import choose_device

    place = choose_device(device)
    measure(
        json_path,
        [
            (
                f"views, {name}, {source}",
                lambda recipe=recipe, name=name, source=source: run(
                    recipe, name, source, place, batch_size, runs, photos
                ),
            )
            for (recipe, name), source in itertools.product(load_recipes(recipes, overrides), data)
        ],
    )
