"""What is trained on what: photos and recipe, asked for on the command line or by `fastssl.pretrain`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastssl.errors import UsageError
from fastssl.utils.addresses import shown

if TYPE_CHECKING:
    from fastssl.config.recipe import Recipe
    from fastssl.data.photo_source import Source
    from fastssl.evaluate.trained import Trained


@dataclass(frozen=True)
class Told:
    """Who is told what was chosen or converted (``note``), what may not be as was meant (``warn``), and in a block of
    ``bar`` how far a conversion is: (done, of how many).
    """

    note: Callable[[str], None]
    warn: Callable[[str], None]
    bar: Callable[[], AbstractContextManager[Callable[[int, int], None]]] = lambda: nullcontext(lambda *done: None)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked for; None: what `fastssl pretrain --help` says. ``overrides``: values of the recipe, as in --set
    (``optim.lr=0.1``), or by key, then also numbers and lists.
    """

    arch: str | None = None
    init_from: str | None = None
    data: Path | None = None
    val: Path | None = None
    recipe_name: str | None = None
    overrides: Sequence[str] | Mapping[str, Any] = ()
    epochs: int | None = None
    batch_size: int | None = None
    pipeline: str = "auto"
    device: str = "auto"
    workers: int | None = None


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

    @property
    def folder(self) -> Path:
        """Where the run goes if nobody says."""
        return Path("runs") / f"{self.name}-{self.recipe.arch}"


def choose_inputs(wanted: Wanted, told: Told, processes: int = 1, run: Path | None = None) -> Inputs:
    """Recipe, photos and first weights that are asked for, of a run whose steps ``processes`` share; ``run``: its
    folder, where it may have begun already. Raises UsageError where one value is given twice, FastSSLError where there
    is no such recipe, key, network, weights or photos.
    """
    from fastssl.config.recipe import load_recipe, parse_overrides
    from fastssl.config.recipe_choice import ADAPT_RECIPE, choose, fit, warnings_for
    from fastssl.data import sample_set
    from fastssl.data.photo_source import look_at
    from fastssl.distributed.devices import choose_device
    from fastssl.models.backbones import resolve_arch
    from fastssl.weights.source import initial_weights

    given = wanted.overrides
    changes = dict(given) if isinstance(given, Mapping) else parse_overrides(given)
    for name in ("epochs", "batch_size"):
        if (value := getattr(wanted, name)) is not None:
            if (key := f"train.{name}") in changes:
                raise UsageError(f"{name} and {key} say the same thing; give one")
            changes[key] = str(value)
    if "train.epochs" in changes and "train.samples" in changes:
        raise UsageError("train.samples says how many epochs there are: give either it or the epochs")
    recipe_name, reason, val = wanted.recipe_name, "", wanted.val
    arch, first = wanted.arch, wanted.init_from
    if arch is not None:
        resolve_arch(arch)  # a mistyped network should fail before photos are looked at
    if recipe_name:  # and so should a mistyped key
        own_arch = load_recipe(recipe_name, changes).arch
        arch = arch or (own_arch if "." in own_arch else None)
    if arch is not None and "." in arch:
        if first is not None:
            raise UsageError(f"--init-from and the tag of {arch} both name weights; give one")
        arch, first = None, arch
    init = None if first is None else initial_weights(first, arch, run)
    if init is not None:
        seen = "mean {} and std {}".format(*init.normalisation)
        told.note(f"begins with {init.name} ({init.arch}), which saw pictures of {seen}")
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
        told.note(line)
    if reason:
        told.note(f"recipe {recipe_name} {reason}")
    if source is None:
        samples = sample_set.ensure_sample_set()
        data, val = samples.train, samples.val
    else:
        data = beton_of(source, recipe, told, wanted.workers)
    if val_source is not None:
        val = beton_of(val_source, recipe, told, wanted.workers)
    found = look_at(data)  # as they are stored: photos that were rejected are gone, large ones scaled down
    where = shown(source.path if source else data)
    recipe, lines = fit(recipe, found.photos, given=changes.keys(), processes=processes, where=where)
    for line in lines:
        told.note(line)
    assert found.short_side is not None  # a .beton file says it
    for line in warnings_for(recipe, own_arch, found.photos, found.short_side, found.shortened):
        told.warn(line)
    return Inputs(recipe, Path(recipe_name).stem, data, val, init)


def beton_of(source: Source, recipe: Recipe, told: Told, workers: int | None = None) -> Path:
    """The photos as a ``.beton`` file, of which the recipe's views can be made."""
    from fastssl.data.photo_source import as_beton, side_for

    with told.bar() as progress:
        return as_beton(source, side_for(recipe), workers=workers, say=told.note, progress=progress)
