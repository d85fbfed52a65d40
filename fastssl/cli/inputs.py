"""What ``pretrain``, ``estimate`` and ``views`` make of --data and --recipe."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.common import SomePath, console, late_progress_bar, pipeline_option
from fastssl.utils.addresses import shown

if TYPE_CHECKING:
    from fastssl.config.recipe import Recipe
    from fastssl.data.photo_source import Source
    from fastssl.evaluate.trained import Trained

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
    click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
    click.option(
        "--workers", type=click.IntRange(min=1), help="Decoding threads. Default: the cores this process may use."
    ),
)


@dataclass(frozen=True)
class Wanted:
    """What the options of ``input_options`` say; None: what their help says."""

    arch: str | None
    init_from: str | None
    data: Path | None
    val: Path | None
    recipe_name: str | None
    overrides: Sequence[str]
    epochs: int | None
    batch_size: int | None
    pipeline: str
    device: str
    workers: int | None


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


@dataclass(frozen=True)
class Inputs:
    """The recipe of a run, with a batch and epochs that go with the photos; its name; the ``.beton`` files; the weights
    that it begins with.
    """

    recipe: Recipe
    name: str
    data: Path
    val: Path | None
    init: Trained | None = None


def choose_inputs(wanted: Wanted, processes: int = 1, run: Path | None = None) -> Inputs:
    """Recipe, photos and first weights that the options ask for, of a run whose steps ``processes`` share; ``run``: its
    folder, where it may have begun already. What was chosen, converted
    or changed on the way is said. Raises click.UsageError for an option and a --set of the same value, FastSSLError
    where there is no such recipe, key, network or photos.
    """
    from fastssl.config.recipe import load_recipe, parse_overrides
    from fastssl.config.recipe_choice import ADAPT_RECIPE, choose, fit, warnings_for
    from fastssl.data import sample_set
    from fastssl.data.photo_source import look_at
    from fastssl.distributed.devices import choose_device
    from fastssl.models.backbones import resolve_arch
    from fastssl.weights.source import initial_weights

    changes = parse_overrides(wanted.overrides)
    for option, key in (("--epochs", "train.epochs"), ("--batch-size", "train.batch_size")):
        value = wanted.epochs if option == "--epochs" else wanted.batch_size
        if value is not None and key in changes:
            raise click.UsageError(f"{option} and --set {key} say the same thing; give one")
        if value is not None:
            changes[key] = str(value)
    if "train.epochs" in changes and "train.samples" in changes:
        raise click.UsageError("train.samples says how many epochs there are: give either it or the epochs")
    recipe_name, reason, val = wanted.recipe_name, "", wanted.val
    arch, first = wanted.arch, wanted.init_from
    if arch is not None:
        resolve_arch(arch)  # a mistyped network should fail before photos are looked at
    if recipe_name:  # and so should a mistyped key
        own_arch = load_recipe(recipe_name, changes).arch
        arch = arch or (own_arch if "." in own_arch else None)
    if arch is not None and "." in arch:
        if first is not None:
            raise click.UsageError(f"--init-from and the tag of {arch} both name weights; give one")
        arch, first = None, arch
    init = None if first is None else initial_weights(first, arch, run)
    if init is not None:
        console.note(f"begins with {init.name} ({init.arch}), which saw pictures with {init.normalisation}")
        recipe_name = recipe_name or ADAPT_RECIPE
    source = None if wanted.data is None else look_at(wanted.data)
    if not recipe_name:
        kind = "cpu" if source is None else choose_device(wanted.device).type
        recipe_name, reason = choose(source.photos if source else None, source.short_side if source else None, kind)
    recipe = load_recipe(recipe_name, changes, None if init is None else init.normalisation)
    own_arch = recipe.arch.partition(".")[0]
    recipe = dataclasses.replace(recipe, arch=arch or (init.arch if init else own_arch))
    resolve_arch(recipe.arch)
    if val is None and source and "val" in source.splits:
        val = wanted.data
    val_source = None if val is None else look_at(val, "val")
    for line in (*(source.notes if source else ()), *(val_source.notes if val_source else ())):
        console.note(line)
    if reason:
        console.note(f"recipe {recipe_name} {reason}")
    if source is None:
        samples = sample_set.ensure_sample_set()
        data, val = samples.train, samples.val
    else:
        data = beton_of(source, recipe, wanted.workers)
    if val_source is not None:
        val = beton_of(val_source, recipe, wanted.workers)
    found = look_at(data)  # as they are stored: photos that were rejected are gone, large ones scaled down
    where = shown(source.path if source else data)
    recipe, lines = fit(recipe, found.photos, given=changes.keys(), processes=processes, where=where)
    for line in lines:
        console.note(line)
    assert found.short_side is not None  # a .beton file says it
    for line in warnings_for(recipe, own_arch, found.photos, found.short_side, found.shortened):
        # Through the console, which is silent in all processes but the first; and said also with --quiet.
        console.say(f"warning: {line}")
    return Inputs(recipe, Path(recipe_name).stem, data, val, init)


def beton_of(source: Source, recipe: Recipe, workers: int | None = None) -> Path:
    """The photos as a ``.beton`` file, of which the recipe's views can be made; with a bar where they are converted."""
    from fastssl.data.photo_source import as_beton, side_for

    with late_progress_bar("converting") as progress:
        return as_beton(source, side_for(recipe), workers=workers, say=console.note, progress=progress)
