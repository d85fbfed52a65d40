"""``fastssl bench soak``."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from fastssl.cli.bench.measure import load_recipes, measure
from fastssl.cli.bench.options import (
    arch_option,
    batch_option,
    data_option,
    device_option,
    folder_option,
    photos_option,
    set_option,
)
from fastssl.cli.common import console, finite, json_option

if TYPE_CHECKING:
    from fastssl.benchmarks.harness.records import Record
    from fastssl.config.recipe import Recipe


@click.command()
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.5),
    callback=finite,
    default=60.0,
    show_default=True,
    help="How long each run is watched. The first third is warm-up; what leaks 1 MB a minute shows within 2 minutes.",
)
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    default=("few-photos",),
    show_default=True,
    metavar="NAME|FILE.yaml",
    help="May be repeated.",
)
@arch_option
@set_option
@data_option
@photos_option
@device_option
@click.option("--workers", type=click.IntRange(min=1), help="Decoding threads. Default: one a core.")
@batch_option
@folder_option
@json_option
def soak(minutes, recipes, arch, overrides, data, photos, device, workers, batch_size, folder, json_path) -> None:
    """Watch a real pre-training from outside: does its memory grow, its rate fall, does it leave threads or files
    behind?

    Epochs without end, a probe behind each, forty checkpoints or more; then it is stopped as Ctrl-C does. Each line of
    the judgement has its numbers and its limit; the status is 1 when one fails.

    \b
    fastssl bench soak --minutes 60 --json soak.jsonl
    fastssl bench soak --minutes 2 --arch lcnet_035 --data samples --batch-size 64 --workers 1
    """
    from fastssl.benchmarks.studies.soak import require_steady, run
    from fastssl.benchmarks.suites.loader import default_batch
    from fastssl.distributed.devices import choose_device

    place, found = choose_device(device), []

    def watch(recipe: Recipe, name: str, source: str) -> list[Record]:
        sized = replace(recipe, train=replace(recipe.train, batch_size=default_batch(recipe, place, batch_size)))
        records = run(sized, name, source, place.type, workers, minutes, photos, folder, say)
        for verdict in records[0].details["verdicts"]:
            say(f"{'ok  ' if verdict['passed'] else 'FAIL'}  {verdict['name']}: {verdict['words']}")
        found.extend(records)
        return records

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    measure(
        json_path,
        [
            (f"soak, {name}, {source}", lambda recipe=recipe, name=name, source=source: watch(recipe, name, source))
            for (recipe, name), source in itertools.product(load_recipes(recipes, overrides, arch), data)
        ],
    )
    for record in found:
        require_steady(record)
