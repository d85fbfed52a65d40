"""Small views first: what they are, when they change, and that a run goes on from either side of the change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import Silent, options, rows, same, small, state
from test_resume import crash_behind
from torch import Tensor

from fastssl.config.recipe import load_recipe
from fastssl.errors import FastSSLError
from fastssl.optim.schedules import RunLength
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.pipelines.plan.multicrop import MultiCrop, smaller
from fastssl.pretrain import pretrain
from fastssl.training import trainer
from fastssl.training.setup import Setup
from fastssl.training.step import TrainStep

#: 4 epochs of 6 steps, two of them at 16 px
HALF = ["train.epochs=4", "progressive.epochs=0.5", "train.checkpoint_minutes=0"]


def test_smaller_views_are_the_same_in_all_but_size_and_blur() -> None:
    views = [ViewSpec(size=224, count=2, area=(0.2, 1.0), blur_sigma=(0.1, 2.0), hue=0.1)]
    (found,) = smaller(views, 0.5)
    assert found == ViewSpec(size=112, count=2, area=(0.2, 1.0), blur_sigma=(0.1, 1.0), hue=0.1)
    assert [smaller([ViewSpec(size=size, count=2)], 0.5)[0].size for size in (8, 20, 44, 96)] == [8, 8, 24, 48]
    # Never larger than they are.
    assert [smaller([ViewSpec(size=size, count=2)], 0.95)[0].size for size in (4, 30, 224)] == [4, 30, 216]
    assert smaller([ViewSpec(size=32, count=2, blur_sigma=(0.4, 0.5))], 0.5)[0].blur_sigma == (0.4, 0.4)


def test_a_multi_crop_stays_one() -> None:
    crop = MultiCrop(augment={"hue": 0.2}, global_1={"blur_sigma": [0.2, 1.0]}, weights=(0.4, 0.6))
    found = smaller(crop, 0.5)
    assert isinstance(found, MultiCrop) and found.pair_weights == (0.4, 0.6) and found.threshold == crop.threshold
    assert [spec.size for spec in found] == [112, 112, 64] and [spec.count for spec in found] == [1, 1, 6]
    assert [spec.blur_sigma[1] for spec in found] == [0.5, ViewSpec.blur_sigma[1] / 2, ViewSpec.blur_sigma[1] / 2]
    assert [spec.area for spec in found] == [spec.area for spec in crop]


def test_the_epoch_decides() -> None:
    recipe = small("train.epochs=8", "progressive.epochs=0.75", "progressive.size=0.5")
    assert [recipe.views_at(epoch)[0].size for epoch in range(8)] == [16] * 6 + [32] * 2
    assert small().small_epochs == 0 and small().views_at(0)[0].size == 32
    # The last epoch is always one of full views.
    few = [small(f"train.epochs={epochs}", "progressive.epochs=0.9").small_epochs for epochs in (1, 2, 3, 10)]
    assert few == [0, 1, 2, 9]


def test_what_cannot_be() -> None:
    with pytest.raises(FastSSLError, match=r"progressive\.size"):
        small("progressive.size=1.0")
    with pytest.raises(FastSSLError, match=r"progressive\.size=0\.95 leaves the views as they are"):
        small("progressive.epochs=0.5", "progressive.size=0.95")
    with pytest.raises(FastSSLError, match=r"progressive makes other views"):
        load_recipe("distill-few-photos", {"progressive.epochs": "0.5"})
    with pytest.raises(FastSSLError, match=r"progressive\.size=0\.5: vit_tiny cannot take pictures of 56 px; ch"):
        recipe = load_recipe("dino-vit_tiny-sslight", {"progressive.epochs": "0.5", "views.global_size": "112"})
        TrainStep(recipe, torch.device("cpu"), amp=False, seed=0)


def test_a_run_changes_once_and_says_so(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, sizes = trainer.make_step, []

    def noted(run: Setup, batch: object) -> Tensor:
        sizes.append(batch.views[0].shape[-1])
        return original(run, batch)

    monkeypatch.setattr(trainer, "make_step", noted)
    said = Silent()
    summary = pretrain(small(*HALF[:2]), options(beton, tmp_path / "run"), said)
    assert sizes == [16] * 12 + [32] * 12 and summary["steps"] == 24
    assert any("2 x 32 px (16 px in the first 2 epochs)" in line for line in said.messages)
    assert [row["step"] for row in rows(tmp_path / "run") if row["kind"] == "step"] == [4, 6, 10, 12, 16, 18, 22, 24]


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, 12, 13, 18])
def test_a_killed_run_goes_on_to_the_same_bits(step: int, beton: Path, tmp_path: Path) -> None:
    """In the middle of small views, at the change, behind the first step of full ones, later."""
    pretrain(small(*HALF), options(beton, tmp_path / "whole"), Silent())
    crash_behind(step, small(*HALF), options(beton, tmp_path / "cut"))
    said = Silent()
    pretrain(small(*HALF), options(beton, tmp_path / "cut"), said)
    assert any(f"resumed at step {step}" in line for line in said.messages)
    assert same(state(tmp_path / "cut"), state(tmp_path / "whole"))


def test_a_step_is_recorded_anew_for_other_sizes() -> None:
    recorded = []

    def record(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        recorded.append(call())
        return lambda: None, recorded[-1]

    recipe = small("progressive.epochs=0.5", "train.graph=true", "moco.split_bn=2")
    step = TrainStep(recipe, torch.device("cpu"), amp=False, seed=0, record=record)
    rates = {name: 0.01 for name in step.rates(0, RunLength(12, 6))}
    for epoch in (0, 1, 1):
        step.take(recipe.views_at(epoch))
        size = step.views[0].size
        views = torch.randn(16, 3, size, size).contiguous(memory_format=torch.channels_last)
        step([views], noise=step.noise(epoch, 0), rates=rates)
        assert step.recorded and step.prepared
    assert len(recorded) == 2
