"""What ``pretrain``, ``estimate`` and ``views`` make of --data and --recipe."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import click

from fastssl.cli.common import SomePath, console, late_progress_bar, pipeline_option
from fastssl.inputs import Told, Wanted

_photos = functools.partial(click.option, type=SomePath(remote=True), metavar="FOLDER|TAR|FILE.beton|'PATTERN'")
_PHOTOS_AND_RECIPE = (
    click.option(
        "--arch",
        metavar="NAME",
        help="Network: mobilenetv3_large, efficientnet_b0, mobilenetv2, resnet18, resnet34, resnet50, vit_tiny, or any "
        "timm name. Default: the recipe's.",
    ),
    click.option(
        "--init-from",
        metavar="WEIGHTS",
        help="Begin with these in place of random weights: a run's folder, a file that `fastssl import` reads, "
        "hf-hub:USER/NAME, or a network of timm's with a tag (mobilenetv3_large_100.ra_in1k), which in --arch means "
        "the same. Their mean and std become the views' unless the recipe has its own.",
    ),
    _photos(
        "--data",
        help="Photos to learn from; a folder or tar is converted once. Default: the sample set that installs with the "
        "package.",
    ),
    _photos("--val", help="Labelled photos to probe on. Default: val/ in --data, or a held-out fifth."),
    click.option(
        "--recipe",
        "recipe_name",
        metavar="NAME|FILE.yaml",
        help="Default: adapt with weights to begin with; quickstart without --data; with it few-photos, or "
        "light-moco-mobilenetv3 for 20,000 photos and more on a GPU.",
    ),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change one value of the recipe, e.g. --set optim.lr=0.1. May be repeated.",
    ),
)
_LENGTH_AND_MACHINE = (
    click.option(
        "--epochs", type=click.IntRange(min=1), help="Default: the recipe's, or what goes with the number of photos."
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=2),
        help="Default: the recipe's, or fewer where there are few photos. All of the learning rate's schedule follows.",
    ),
    pipeline_option,
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True),
    click.option(
        "--workers", type=click.IntRange(min=1), help="Decoding threads. Default: the cores this process may use."
    ),
)


def input_options(*out: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that say what is trained on what, as one `Wanted`, its first argument; in ``--help``
    those that say where the result goes, ``out``, stand between the recipe and the machine.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def call(**given: Any) -> None:
            wanted = Wanted(**{field.name: given.pop(field.name) for field in dataclasses.fields(Wanted)})
            command(wanted, **given)

        for option in reversed((*_PHOTOS_AND_RECIPE, *out, *_LENGTH_AND_MACHINE)):
            call = option(call)
        return call

    return decorated


#: The console, which is silent in all processes but the first; warnings come also with --quiet.
ON_CONSOLE = Told(
    console.note, lambda line: console.say(f"warning: {line}"), functools.partial(late_progress_bar, "converting")
)
