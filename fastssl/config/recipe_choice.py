"""The recipe follows the data: which one photos get where none is named, and what of it changes with their number.
Pure functions: processes of one run that ask alike are answered alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from fastssl.config.recipe import Recipe, is_given, with_batch
from fastssl.errors import FastSSLError, counted
from fastssl.methods.base import MethodConfig
from fastssl.models.backbones import resizes_positions, resolve_arch

SAMPLE_RECIPE, FEW_RECIPE, FULL_RECIPE = "quickstart", "few-photos", "light-moco-mobilenetv3"
#: Of a run that begins with weights.
ADAPT_RECIPE = "adapt"
#: From this many photos on the full recipe, which was written for 1.3 million, sees enough different ones.
MANY_PHOTOS = 20_000
#: Half of the full recipe's 224 px: views of smaller photos are mostly pixels that were made up.
SMALL_SIDE = 112
#: Of the published recipes: pixels of their views, and the median short side of ImageNet's photos, which they cut from.
PUBLISHED_VIEW, PUBLISHED_SIDE = 224, 375
#: Bounds of the epochs that follow from the number of photos; below them a schedule that changes once an epoch is none.
FEWEST_EPOCHS, MOST_EPOCHS = 5, 1000

_BATCH = "train.batch_size"


def choose(photos: int | None, short_side: float | None, device: str) -> tuple[str, str]:
    """The recipe for photos where none is named, and why it is this one: the end of a sentence.

    Args:
        photos: how many; None: there are none but the sample set.
        short_side: their shorter side in pixels, the median; None: it is not known.
        device: ``cpu`` or ``cuda``.
    """
    if photos is None:
        return SAMPLE_RECIPE, "without --data, on the sample photos"
    all_of_them = counted(photos, "photo")
    if photos < MANY_PHOTOS:
        why = f"for {all_of_them}, which are fewer than {MANY_PHOTOS:,}"
    elif short_side is not None and short_side < SMALL_SIDE:
        why = f"for {all_of_them} of {short_side:g} px, which are too small for views of 224 px"
    elif device != "cuda":
        why = f"as there is no GPU: 200 epochs of {all_of_them} at 224 px would take a CPU months or years"
    else:
        return FULL_RECIPE, f"for {all_of_them} on a GPU"
    return FEW_RECIPE, f"{why} (--recipe {FULL_RECIPE} is the full one)"


def fit(
    recipe: Recipe, photos: int, *, given: Collection[str] = (), processes: int = 1, where: str = "the data"
) -> tuple[Recipe, list[str]]:
    """The recipe with a batch that the photos fill, numbers of its method that go with it, and its epochs.

    A batch that nobody asked for is lowered until an epoch has two steps, where that goes; then queue, neighbours and
    BatchNorm groups follow. With a batch that was asked for they follow only where they would not go with it.

    Keys of the recipe that were asked for (``given``: ``train.batch_size``, ``moco.queue``) stay as they are;
    ``processes`` share a step; ``where``: the photos, for messages. Returns the recipe, with ``train.samples``
    resolved, and what was changed, in words. Raises as ``require_photos``.
    """
    require_photos(recipe, photos, given=given, processes=processes, where=where)
    wanted = batch = recipe.train.batch_size
    asked = is_given(_BATCH, given)
    if not asked and photos < 2 * wanted:
        lower = _lower_batches(photos, wanted, processes * recipe.train.parts)
        batch = next(_allowed(recipe, lower, photos, given, processes), wanted)
    fitted, lines = recipe, []
    if batch != wanted or not recipe.settings.allows(batch):
        settings = _settings(recipe, batch, None if asked else photos, given, processes)
        if settings.allows(batch):  # otherwise the method says which key it is that was asked for
            fitted = _with_settings(with_batch(recipe, batch, wanted, given=given), settings)
    if changes := _changes(recipe, fitted):
        rate = "; the learning rate follows the batch" if batch != wanted and recipe.optim.lr_batch else ""
        why = f"for {counted(photos, 'photo')}" if batch != wanted else f"to go with a batch of {batch:,}"
        lines.append(f"{why}: {', '.join(changes)}{rate}")
    fitted, more = _with_epochs(fitted, photos, wanted, given)
    return fitted, lines + more


def require_photos(
    recipe: Recipe, photos: int, *, given: Collection[str] = (_BATCH,), processes: int = 1, where: str = "the data"
) -> None:
    """Raise FastSSLError where the photos fill no batch, or not the one that was asked for; the message names the
    largest that works.
    """
    parts, batch = recipe.train.parts, recipe.train.batch_size
    unit = processes * parts  # divides a batch; each share of each process has two samples at least
    asked = is_given(_BATCH, given)
    if photos >= (batch if asked else 2 * batch):
        return
    have = counted(photos, "photo")
    every = range(min(photos, batch) // unit * unit, unit, -unit)
    largest = next(_allowed(recipe, every, photos, given, processes), None)
    if largest is None and photos < 2 * unit:
        shared = f" for {processes} processes" * (processes > 1) + f" in {parts} parts" * (parts > 1)
        raise FastSSLError(f"{where}: {have}, but a batch{shared} has at least {2 * unit}; add photos")
    if largest is None:
        asked_for = f"the {recipe.settings.BATCH_KEY} that was asked for; leave it to the recipe"
        raise FastSSLError(f"{where}: no batch of up to {have} goes with {asked_for}")
    if asked:
        few = f"{'is' if photos == 1 else 'are'} fewer than one batch of {batch:,}"
        raise FastSSLError(f"{where}: {have} {few}; the largest that would do is --batch-size {largest}")


def follow_samples(recipe: Recipe, photos: int) -> Recipe:
    """The recipe with the epochs that ``train.samples`` gives for ``photos``; unchanged where it has none. What is
    counted in epochs follows.
    """
    return _with_epochs(recipe, photos, recipe.train.batch_size, ())[0]


def _lower_batches(photos: int, wanted: int, unit: int) -> Iterator[int]:
    """Below ``wanted``, the best first: two steps an epoch, a power of two; then any with two steps; then one step."""
    for most in (photos // 2, photos):
        parts = min(most, wanted) // unit
        if parts >= 2:
            yield unit * 2 ** (parts.bit_length() - 1)
        yield from range(parts * unit, unit, -unit)


def _allowed(
    recipe: Recipe, batches: Iterable[int], photos: int, given: Collection[str], processes: int
) -> Iterator[int]:
    """Those of ``batches`` that the method's numbers go with, changed as far as nobody asked for them."""
    return (batch for batch in batches if _settings(recipe, batch, photos, given, processes).allows(batch))


def _settings(recipe: Recipe, batch: int, photos: int | None, given: Collection[str], processes: int) -> MethodConfig:
    settings = recipe.settings
    try:
        scaled = settings.scaled(batch, photos=photos, processes=processes)
    except ValueError as error:  # numbers that go with no batch
        raise FastSSLError(f"{recipe.method}: {error}") from error
    kept = [field.name for field in dataclasses.fields(settings) if is_given(f"{recipe.method}.{field.name}", given)]
    return replace(scaled, **{name: getattr(settings, name) for name in kept})


def _with_settings(recipe: Recipe, settings: MethodConfig) -> Recipe:
    section: dict[str, Any] = {recipe.method: settings}
    return replace(recipe, **section)


def _changes(before: Recipe, after: Recipe) -> list[str]:
    """``train.batch_size 128 -> 16``, of all that a batch changes but the rates."""
    found: list[tuple[str, Any, Any]] = [(_BATCH, before.train.batch_size, after.train.batch_size)]
    for name in (field.name for field in dataclasses.fields(before.settings)):
        found.append((f"{before.method}.{name}", getattr(before.settings, name), getattr(after.settings, name)))

    def shown(value: object) -> str:
        return f"{value:,}" if isinstance(value, int) else "its own" if value is None else str(value)

    return [f"{key} {shown(old)} -> {shown(new)}" for key, old, new in found if old != new]


def _with_epochs(recipe: Recipe, photos: int, batch: int, given: Collection[str]) -> tuple[Recipe, list[str]]:
    """``train.samples`` resolved, and a line if that gave other epochs than the recipe's: what is counted in them keeps
    its share of the run. A batch that was lowered for want of photos makes as many steps as ``batch``, not as many
    samples: ten photos would be seen 18,000 times.
    """
    train, optim, settings = recipe.train, recipe.optim, recipe.settings
    if train.samples is None:
        return recipe, []
    steps = max(1, photos // train.batch_size)
    epochs = min(max(round(train.samples / batch / steps), FEWEST_EPOCHS), MOST_EPOCHS)
    if epochs == train.epochs:
        return replace(recipe, train=replace(train, samples=None)), []
    factor = epochs / train.epochs

    def whole(key: str, value: float) -> Any:
        return value if is_given(key, given) else max(1, round(value * factor)) if value else 0

    warmup: float = whole("optim.warmup_epochs", optim.warmup_epochs)
    if not optim.per_epoch and not is_given("optim.warmup_epochs", given):
        warmup = round(optim.warmup_epochs * factor, 2)
    counts = {key: whole(f"{recipe.method}.{key}", getattr(settings, key)) for key in settings.EPOCH_KEYS}
    every = whole("probe.every_epochs", recipe.probe.every_epochs)
    stretched = replace(
        _with_settings(recipe, replace(settings, **counts)),
        optim=replace(optim, warmup_epochs=float(warmup)),
        train=replace(train, samples=None, epochs=epochs),
        probe=replace(recipe.probe, every_epochs=every),
    )
    meant = f"the recipe's {train.epochs:,} are for about {train.samples / train.epochs:,.0f}"
    return stretched, [f"{epochs:,} epochs for {counted(photos, 'photo')}: {meant} (--epochs says otherwise)"]


def warnings_for(recipe: Recipe, own_arch: str, photos: int, short_side: float, shortened: bool = False) -> list[str]:
    """What will run, but seldom as it was meant; a line each. ``own_arch``: the network that the recipe was made for;
    ``short_side``: of the photos, in pixels, the median; ``shortened``: they were scaled down to that.
    """
    found, method, settings = [], recipe.method, recipe.settings
    queue = getattr(settings, "queue", 0)
    fewer = getattr(settings.scaled(recipe.train.batch_size, photos=photos), "queue", 0)
    if queue > max(photos, fewer):
        meets = "each meets those of its own photo from earlier epochs there"
        holds = f"{method}.queue holds {queue:,} features of {counted(photos, 'photo')}"
        found.append(f"{holds}: {meets}; --set {method}.queue={fewer} holds fewer")
    size = max(spec.size for spec in recipe.views)
    if short_side < size:
        enlarged = f"enlarged for views of {size} px: smaller views cost less and show as much"
        found.append(f"half of the photos have a shorter side of {short_side:g} px or less, and are {enlarged}")
    if shortened and size >= PUBLISHED_VIEW and short_side < PUBLISHED_SIDE:
        softer = "crops are softer than in the published runs, which cut them from photos of full size (--keep-size)"
        found.append(f"the photos were scaled down to a short side of {short_side:g} px when converted: {softer}")
    keys = {"optim.warmup_epochs": recipe.optim.warmup_epochs}
    keys |= {f"{method}.{key}": getattr(settings, key) for key in settings.EPOCH_KEYS if key != "queue_epoch"}
    if late := [f"{key} {value:g}" for key, value in keys.items() if value >= recipe.train.epochs]:
        ends = f"{counted(recipe.train.epochs, 'epoch')} ends before its warm-up does ({', '.join(late)})"
        found.append(f"a run of {ends}: give more --epochs, or lower it with --set")
    mine, meant = (resizes_positions(resolve_arch(arch)) for arch in (recipe.arch, own_arch))
    if mine != meant:
        kinds = ("a convolutional network", "a vision transformer")
        made = f"the recipe was made for {kinds[meant]} ({own_arch}): its rates and heads may not suit it"
        found.append(f"{recipe.arch} is {kinds[mine]}, and {made}")
    return found
