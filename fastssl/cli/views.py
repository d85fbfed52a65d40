"""``fastssl views``: look at what a recipe makes of your photos before training on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastssl.cli.common import PIPELINES, SomePath, console
from fastssl.cli.inputs import ON_CONSOLE
from fastssl.inputs import beton_of


@click.command(context_settings={"show_default": True})
@click.argument("file", type=SomePath(remote=True), metavar="FOLDER|TAR|FILE.beton|'PATTERN'")
@click.option("--recipe", "recipe_name", required=True, metavar="NAME|FILE.yaml", help="Whose views.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value of the recipe, e.g. --set views.threshold=0.2 or --set views.preset=sslight-cnn. May be "
    "repeated.",
)
@click.option("--out", required=True, type=SomePath(), metavar="FILE.png", help="Where to write the picture.")
@click.option("--samples", type=click.IntRange(1, 64), default=9, help="Photos, spread evenly over the file.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    help="The seed of a run: the picture shows that run's views.",
)
@click.option(
    "--pipeline",
    "pipelines",
    type=click.Choice(PIPELINES),
    multiple=True,
    help="Engine that makes them; given more than once, the first view of each photo by every engine stands side by "
    "side, with the differences. Default: auto.",
)
@click.option("--epoch", type=click.IntRange(min=0), default=0, help="Which epoch's views.")
def views(
    file: Path, recipe_name: str, overrides: tuple[str, ...], out: Path, pipelines: tuple[str, ...], **options: Any
) -> None:
    """Draw photos beside the very views that a run with this recipe and seed would see.

    \b
    fastssl views photos/ --recipe light-moco-mobilenetv3 --out views.png
    fastssl views photos.beton --recipe dino-mobilenetv2-sslight --set views.threshold=0.2 --out views.png
    fastssl views photos.beton --recipe quickstart --pipeline native --pipeline dali --pipeline ffcv --out engines.png
    """
    if out.name.endswith((".beton", ".beton.json")):
        raise click.BadParameter(f"{out}: that name belongs to the photos; name a .png", param_hint="--out")
    if not out.parent.is_dir():
        raise click.BadParameter(f"{out.parent}: no such folder", param_hint="--out")
    import torch

    from fastssl.config.recipe import load_recipe, parse_overrides
    from fastssl.data.photo_source import look_at
    from fastssl.pipelines.engines.registry import choose_engine
    from fastssl.pipelines.plan.multicrop import MultiCrop
    from fastssl.report.pictures import views_picture

    recipe = load_recipe(recipe_name, parse_overrides(overrides))
    file = beton_of(look_at(file), recipe, ON_CONSOLE)
    if isinstance(recipe.views, MultiCrop):
        console.say(recipe.views.describe())
    # `auto` beside what it stands for would be a comparison with itself.
    named = [choose_engine(torch.device("cpu"))[0] if name == "auto" else name for name in pipelines or ("auto",)]
    engines = list(dict.fromkeys(named))
    picture = views_picture(file, recipe.views, out, pipelines=engines, notice=console.say, **options)
    click.echo(f"{out}: {picture.width}x{picture.height} px")
