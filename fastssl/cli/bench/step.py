"""``fastssl bench step``."""

from __future__ import annotations

import itertools

import click

from fastssl.cli.bench.measure import load_recipes, measure
from fastssl.cli.bench.options import (
    arch_option,
    batch_option,
    compile_option,
    device_option,
    graph_option,
    recipe_option,
    runs_option,
    set_option,
)
from fastssl.cli.common import json_option


@click.command()
@recipe_option
@arch_option
@set_option
@device_option
@batch_option
@click.option(
    "--amp",
    "amps",
    type=click.Choice(["auto", "bf16", "off"]),
    multiple=True,
    default=("auto",),
    show_default=True,
    help="bfloat16 autocast; auto: on a GPU. May be repeated.",
)
@compile_option
@graph_option
@runs_option
@click.option("--peers", is_flag=True, help="In turns with a MoCo step as public code writes it, in NCHW memory.")
@json_option
def step(recipes, arch, overrides, device, batch_size, amps, compiled, graph, runs, peers, json_path) -> None:
    """The training step on views that are on the device already. A batch that does not fit is halved.

    \b
    fastssl bench step --peers --json out.jsonl
    fastssl bench step --recipe light-moco-mobilenetv3 --amp bf16 --compile --graph --json out.jsonl
    fastssl bench step --arch resnet18 --batch-size 64
    """
    from fastssl.benchmarks.suites.step import run
    from fastssl.distributed.devices import choose_device

    place = choose_device(device)
    measure(
        json_path,
        [
            (
                f"step, {name}, amp {amp}",
                lambda recipe=recipe, name=name, amp=amp: run(
                    recipe, name, place, batch_size, amp, compiled, runs, peers, graph
                ),
            )
            for amp, (recipe, name) in itertools.product(amps, load_recipes(recipes, overrides, arch))
        ],
    )
