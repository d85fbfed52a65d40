"""The recipe follows the photos: which one, its batch and queue, its epochs, and what is warned of."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from tiny import TinyBackbone

from fastssl.config.recipe import Recipe, build_recipe, load_recipe, recipe_names, recipe_to_dict
from fastssl.config.recipe_choice import (
    FEWEST_EPOCHS,
    MOST_EPOCHS,
    choose,
    fit,
    follow_samples,
    require_photos,
    warnings_for,
)
from fastssl.errors import FastSSLError
from fastssl.methods import METHODS
from fastssl.methods.base import Views
from fastssl.methods.distill import FrozenTeacher
from fastssl.pipelines.plan.draw import IMAGENET

#: Sizes of heads, which have nothing to do with the number of photos.
_LIGHT = {
    "dino": {"dino.out": "16", "dino.projector.hidden": "16", "dino.projector.out": "8"},
    "swav": {"swav.prototypes": "12", "swav.projector.hidden": "16", "swav.projector.out": "8"},
    "moco": {"moco.projector.hidden": "16", "moco.projector.out": "8"},
    "simclr": {"simclr.projector.hidden": "16", "simclr.projector.out": "8"},
    "resa": {"resa.projector.hidden": "16", "resa.projector.out": "8"},
    "empssl": {"empssl.projector.hidden": "16", "empssl.projector.out": "8"},
    "distill": {"distill.head.hidden": "16"},
}
FROZEN = FrozenTeacher(TinyBackbone(), None, given=IMAGENET, seen=IMAGENET, about={})


def light(name: str, **changes: str) -> Recipe:
    """A recipe with small heads; ``moco__queue`` is the key moco.queue."""
    method = load_recipe(name).method
    return load_recipe(name, {**_LIGHT[method], **{key.replace("__", "."): value for key, value in changes.items()}})


def require_buildable(recipe: Recipe, processes: int = 1) -> None:
    """The method itself takes these numbers: it refuses a queue, groups or neighbours that do not go with the batch."""
    batch = recipe.train.batch_size
    assert batch % (processes * recipe.train.accumulate) == 0
    views = Views(batch // processes, recipe.pair_weights, processes)
    more = {"teacher": FROZEN} if recipe.method == "distill" else {}
    METHODS[recipe.method][0](TinyBackbone(), recipe.settings, views=views, **more)


@pytest.mark.parametrize(
    ("photos", "short_side", "device", "name", "why"),
    [
        (None, None, "cpu", "quickstart", "without --data"),
        (1, None, "cpu", "few-photos", "1 photo, which"),
        (19_999, 500.0, "cuda", "few-photos", "19,999 photos, which are fewer than 20,000"),
        (20_000, 500.0, "cuda", "light-moco-mobilenetv3", "on a GPU"),
        (20_000, None, "cuda", "light-moco-mobilenetv3", "on a GPU"),
        (20_000, 111.0, "cuda", "few-photos", "of 111 px, which are too small"),
        (20_000, 112.0, "cuda", "light-moco-mobilenetv3", "on a GPU"),
        (1_281_167, 375.0, "cpu", "few-photos", "no GPU: 200 epochs of 1,281,167 photos"),
    ],
)
def test_number_and_size_of_the_photos_choose(
    photos: int | None, short_side: float | None, device: str, name: str, why: str
) -> None:
    chosen, reason = choose(photos, short_side, device)
    assert chosen == name and why in reason
    assert ("--recipe light-moco-mobilenetv3" in reason) == (name == "few-photos")
    load_recipe(chosen)


# ---------------------------------------------------------------- batch and queue


@pytest.mark.parametrize("photos", [2, 3, 10, 24, 50, 100, 200, 500])
@pytest.mark.parametrize("name", recipe_names())
def test_any_number_of_photos_fills_a_batch_of_every_recipe(name: str, photos: int) -> None:
    recipe, lines = fit(light(name), photos)
    batch = recipe.train.batch_size
    require_buildable(recipe)
    assert 2 <= batch <= photos and (photos < 4 or photos // batch >= 2)
    # A power of two where it is not the recipe's own: memory and kernels like them.
    assert batch & (batch - 1) == 0 or batch == load_recipe(name).train.batch_size
    assert recipe.optim.lr == load_recipe(name).optim.lr  # for 256 photos: it scales by itself
    if batch < load_recipe(name).train.batch_size:
        assert (
            f"train.batch_size {load_recipe(name).train.batch_size:,} -> {batch}" in lines[0]
            and "learning rate follows" in lines[0]
        )
    # A batch that stays as it was leaves the queue, too: a warning says so. That of distill-few-photos is read by none.
    if name != "distill-few-photos" and (batch, name[:8]) != (128, "distill-"):
        queue = getattr(recipe.settings, "queue", 0)
        step = getattr(recipe.settings, "key_views", 1) * batch
        assert queue <= max(photos, step, 20 + step) or queue == load_recipe(name).settings.queue == 0
    assert build_recipe(recipe_to_dict(recipe), where="again") == recipe  # config.yaml holds it


def test_plenty_of_photos_change_nothing() -> None:
    for name in ("light-moco-mobilenetv3", "swav-mobilenetv2-sslight", "simclr-mobilenetv3"):
        recipe = load_recipe(name)
        assert fit(recipe, 2 * recipe.train.batch_size) == (recipe, [])


def test_few_photos_have_a_short_queue_and_plain_words() -> None:
    recipe, lines = fit(light("light-moco-mobilenetv3"), 120)
    assert (recipe.train.batch_size, recipe.settings.queue, recipe.settings.split_bn) == (32, 64, 8)
    assert lines == [
        "for 120 photos: train.batch_size 512 -> 32, moco.queue 65,536 -> 64; the learning rate follows the batch"
    ]
    small, _ = fit(light("light-moco-mobilenetv3"), 10)
    # 20 neighbours share the smoothing; a group of a view has two samples at least.
    groups = (small.settings.split_bn, small.settings.split_bn_queries)
    assert (small.train.batch_size, small.settings.queue, groups) == (4, 24, (2, 2))
    simclr, lines = fit(light("simclr-mobilenetv3"), 12)
    assert simclr.settings.weighting == "nearest" and "simclr.weighting stepped -> nearest" in lines[0]


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("name", ["few-photos-moco", "light-moco-mobilenetv3", "swav-mobilenetv2-sslight"])
def test_processes_share_a_lowered_batch_evenly(name: str, processes: int) -> None:
    for photos in (24, 50, 120):
        recipe, _ = fit(light(name), photos, processes=processes)
        require_buildable(recipe, processes)
        assert recipe.train.batch_size // processes >= 2 and photos // recipe.train.batch_size >= 2
    with pytest.raises(
        FastSSLError, match=rf"mine: 3 photos, but a batch for {processes} processes has at least {2 * processes}"
    ):
        fit(light(name), 3, processes=processes, where="mine")


def test_parts_of_a_batch_stay_equal() -> None:
    recipe, _ = fit(light("few-photos-moco", train__accumulate="4"), 50)
    assert recipe.train.batch_size == 16 and recipe.train.accumulate == 4
    with pytest.raises(FastSSLError, match="7 photos, but a batch in 4 parts has at least 8"):
        fit(light("few-photos-moco", train__accumulate="4"), 7)


def test_one_photo_is_too_few() -> None:
    with pytest.raises(FastSSLError, match=r"^photos: 1 photo, but a batch has at least 2; add photos$"):
        fit(light("few-photos-moco"), 1, where="photos")


@pytest.mark.parametrize(
    "name",
    ["few-photos-moco", "few-photos-moco", "light-moco-mobilenetv3", "swav-mobilenetv2-sslight", "simclr-mobilenetv3"],
)
@pytest.mark.parametrize("photos", [2, 11, 50, 77])
def test_a_batch_that_was_asked_for_is_refused_with_advice_that_works(name: str, photos: int) -> None:
    asked = {"train.batch_size"}
    with pytest.raises(
        FastSSLError,
        match=f"{photos} photos are fewer than one batch of 128; the largest that would do is --batch-size",
    ) as e:
        fit(light(name, train__batch_size="128"), photos, given=asked)
    largest = str(e.value).rsplit(" ", 1)[-1]
    recipe, _ = fit(light(name, train__batch_size=largest), photos, given=asked)
    assert recipe.train.batch_size == int(largest) == photos
    require_buildable(recipe)


def test_with_a_batch_that_was_asked_for_the_queue_follows_and_only_it() -> None:
    before = light("few-photos-moco", train__batch_size="7", train__epochs="9")
    recipe, lines = fit(before, 48, given={"train.batch_size"})
    assert lines == ["to go with a batch of 7: moco.queue 256 -> 266"]
    require_buildable(recipe)
    assert (
        fit(light("few-photos-moco", train__batch_size="8", train__epochs="9"), 48, given={"train.batch_size"})[1] == []
    )


def test_what_was_asked_for_stays() -> None:
    recipe, _ = fit(light("few-photos-moco", moco__queue="1000"), 150, given={"moco.queue"})
    assert recipe.settings.queue == 1000 and recipe.train.batch_size == 50  # no power of two goes into 500
    with pytest.raises(FastSSLError, match=r"largest that would do is --batch-size 125$"):
        fit(
            light("few-photos-moco", moco__queue="1000", train__batch_size="500"),
            150,
            given={"moco.queue", "train.batch_size"},
        )
    with pytest.raises(FastSSLError, match=r"no batch of up to 50 photos goes with the moco.queue that was asked for"):
        fit(light("few-photos-moco", moco__queue="1001"), 50, given={"moco.queue"})
    odd = light("few-photos-moco", moco__queue="60", train__batch_size="8")
    assert (
        fit(odd, 50, given={"moco.queue", "train.batch_size"})[0].settings.queue == 60
    )  # the method refuses it, and says why


def test_a_run_without_a_command_line_takes_the_batch_as_it_is() -> None:
    require_photos(load_recipe("few-photos-moco"), 128)
    with pytest.raises(
        FastSSLError, match="127 photos are fewer than one batch of 128; the largest that would do is --batch-size 127"
    ):
        require_photos(load_recipe("few-photos-moco"), 127)


# ---------------------------------------------------------------- epochs


def test_epochs_follow_from_the_number_of_photos() -> None:
    recipe = load_recipe("few-photos-moco")
    samples, steps = recipe.train.samples, round(recipe.train.samples / recipe.train.batch_size)
    found = {photos: fit(recipe, photos)[0].train for photos in (50, 300, 1_000, 3_000, 15_000, 25_000)}
    for photos, train in found.items():
        assert train.samples is None and train.epochs * (photos // train.batch_size) == pytest.approx(steps, rel=0.06)
    assert found[300].epochs > found[3_000].epochs > found[15_000].epochs
    assert found[3_000].epochs == pytest.approx(samples / 3_000, rel=0.05)
    epochs = [fit(recipe, photos)[0].train.epochs for photos in (3_000, 10_000, 100_000, 2_000_000)]
    assert all(more >= fewer for more, fewer in pairwise(epochs)) and epochs[-1] == FEWEST_EPOCHS
    assert fit(recipe, 2)[0].train.epochs == MOST_EPOCHS


def test_what_is_counted_in_epochs_keeps_its_share() -> None:
    recipe = load_recipe("swav-mobilenetv2-sslight", {"train.samples": "256000"})
    fitted, lines = fit(recipe, 12_800)
    assert fitted.train.epochs == 21 and "21 epochs for 12,800 photos: the recipe's 200 are for about 1,280" in lines[0]
    assert fitted.optim.warmup_epochs == pytest.approx(10 * 21 / 200)
    assert (fitted.settings.queue_epoch, fitted.settings.freeze_epochs, fitted.probe.every_epochs) == (2, 1, 1)
    kept, _ = fit(recipe, 12_800, given={"optim.warmup_epochs", "swav.queue_epoch", "probe"})
    assert (kept.optim.warmup_epochs, kept.settings.queue_epoch, kept.probe.every_epochs) == (10, 15, 5)
    staircase = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, per_epoch=True, warmup_lr=None))
    assert fit(staircase, 12_800)[0].optim.warmup_epochs == 1


def test_epochs_that_were_asked_for_stay() -> None:
    recipe, lines = fit(load_recipe("few-photos-moco", {"train.epochs": "7"}), 500, given={"train.epochs"})
    assert (recipe.train.epochs, recipe.train.samples, recipe.optim.warmup_epochs) == (7, None, 3) and lines == []
    assert follow_samples(load_recipe("few-photos-moco", {"train.epochs": "7"}), 500).train.epochs == 7
    full = load_recipe("light-moco-mobilenetv3")
    assert fit(full, 5_000)[0].train.epochs == 200


def test_a_batch_that_was_asked_for_sees_as_many_samples() -> None:
    asked = {"train.batch_size"}
    epochs = [
        fit(load_recipe("few-photos-moco", {"train.batch_size": size}), 3_072, given=asked)[0].train.epochs
        for size in ("32", "64", "256")
    ]
    assert max(epochs) - min(epochs) <= 1


def test_a_run_from_python_follows_too_and_a_resolved_recipe_stays() -> None:
    once = follow_samples(load_recipe("few-photos-moco"), 300)
    assert once.train.epochs > 60 and follow_samples(once, 9_000) == once
    with pytest.raises(FastSSLError, match=r"train\.samples must be at least 1"):
        load_recipe("few-photos-moco", {"train.samples": "0"})


# ---------------------------------------------------------------- warnings


def warned(recipe: Recipe, photos: int = 10_000, side: float = 500.0, arch: str | None = None) -> list[str]:
    return warnings_for(dataclasses.replace(recipe, arch=arch or recipe.arch), recipe.arch, photos, side)


def test_nothing_is_warned_of_without_reason() -> None:
    for name in recipe_names():
        assert warned(load_recipe(name), photos=1_281_167) == []
        fitted, _ = fit(load_recipe(name), 120)
        assert [line for line in warned(fitted, photos=120) if "queue" in line] == []
    assert warned(load_recipe("few-photos-moco"), side=48) == []


def test_a_queue_longer_than_the_photos() -> None:
    (line,) = warned(load_recipe("light-moco-mobilenetv3"), photos=3_000)
    assert "moco.queue holds 65,536 features of 3,000 photos" in line
    shorter = line.split("--set moco.queue=")[1].split()[0]
    recipe = light("light-moco-mobilenetv3", moco__queue=shorter)
    require_buildable(recipe)
    assert warned(recipe, photos=3_000) == []
    (line,) = warned(load_recipe("swav-mobilenetv2-sslight"), photos=3_000)
    assert "--set swav.queue=2048" in line


def test_photos_smaller_than_the_views() -> None:
    (line,) = warned(load_recipe("few-photos-moco"), side=47.5)
    assert "47.5 px or less, and are enlarged for views of 48 px" in line


def test_photos_that_were_scaled_down_are_not_what_published_runs_saw() -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        found = warnings_for(recipe, recipe.arch, 1_281_167, 256, shortened=True)
        small = ("quickstart", "few-photos", "few-photos-moco", "distill-few-photos", "adapt", "empssl-resnet18")
        assert len(found) == (name not in small), name
        assert all("scaled down to a short side of 256 px" in line and "--keep-size" in line for line in found)
        assert warnings_for(recipe, recipe.arch, 1_281_167, 384, shortened=True) == []


def test_a_warm_up_longer_than_the_run() -> None:
    (line,) = warned(load_recipe("dino-mobilenetv2-sslight", {"train.epochs": "10"}))
    assert (
        "a run of 10 epochs ends before its warm-up does (optim.warmup_epochs 10, dino.warmup_teacher_epochs 50)"
        in line
    )
    (line,) = warned(load_recipe("few-photos-moco", {"train.epochs": "1"}))
    assert "a run of 1 epoch ends" in line


def test_a_recipe_for_another_kind_of_network() -> None:
    (line,) = warned(load_recipe("dino-vit_tiny-sslight"), arch="resnet18")
    assert "resnet18 is a convolutional network, and the recipe was made for a vision transformer (vit_tiny)" in line
    (line,) = warned(load_recipe("few-photos-moco"), arch="vit_tiny")
    assert "vit_tiny is a vision transformer" in line
    assert warned(load_recipe("dino-resnet18-sslight"), arch="mobilenetv2", photos=1_281_167) == []
