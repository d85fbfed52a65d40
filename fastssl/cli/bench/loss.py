"""``fastssl bench loss``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from fastssl.cli.bench.measure import load_recipes, measure
from fastssl.cli.bench.options import device_option, recipe_option, runs_option, set_option
from fastssl.cli.common import json_option
from fastssl.errors import FastSSLError, counted

if TYPE_CHECKING:
    from fastssl.benchmarks.harness.records import Record
    from fastssl.config.recipe import Recipe


@click.command()
@recipe_option
@set_option
@device_option
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    multiple=True,
    help="Queries; may be repeated. Default: the recipe's batch.",
)
@runs_option
@json_option
def loss(recipes, overrides, device, batch_size, runs, json_path) -> None:
    """The loss, forward and backward, in turns with the dense form of it.

    \b
    fastssl bench loss --batch-size 256 --batch-size 512 --json out.jsonl
    fastssl bench loss --set moco.queue=16384 --set moco.weighting=geometric --set moco.neighbors=null
    """
    from fastssl.benchmarks.suites.loss import run
    from fastssl.distributed.devices import choose_device

    place = choose_device(device)

    def one(recipe: Recipe, name: str, queries: int) -> list[Record]:
        if recipe.method != "moco":
            raise FastSSLError(
                f"{name}: bench loss measures smoothed InfoNCE, which {recipe.method} does not use; name a MoCo recipe"
            )
        moco = recipe.moco
        records = run(
            place,
            queries,
            moco.queue,
            moco.projector.out,
            runs,
            temperature=moco.temperature,
            smoothing=moco.smoothing,
            weighting=moco.weighting,
            neighbors=moco.neighbors,
        )
        return [replace(record, recipe=name) for record in records]

    measure(
        json_path,
        [
            (f"loss, {name}, {counted(queries, 'query')}", partial(one, recipe, name, queries))
            for recipe, name in load_recipes(recipes, overrides)
            for queries in batch_size or (recipe.train.batch_size,)
        ],
    )
