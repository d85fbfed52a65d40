"""A loss or gradient that is not finite: the run stops and keeps the batch, or passes over the step as if it had not
been.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_processes
from safetensors.torch import load_file
from small_run import Silent, options, rows, same, small, state, status
from torch import nn

from fastssl.errors import FastSSLError, Interrupted
from fastssl.evaluate.online_probe import OnlineProbe
from fastssl.pipelines.loader import Batch, ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.pretrain import pretrain
from fastssl.runs.nonfinite import save_bad_step
from fastssl.runs.saver import Saver
from fastssl.training import trainer
from fastssl.training.setup import Setup
from fastssl.training.step import TrainStep


@pytest.fixture
def break_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``break_steps({step: "loss" or "gradient"})``: what becomes NaN at steps counted from 1; whatever the run does
    about it, it does with real batches.
    """

    def install(broken: dict[int, str]) -> None:
        step, update = trainer.make_step, TrainStep.update

        def poisoned(run: Setup, batch: Batch) -> torch.Tensor:
            kind = broken.get(run.position.step + 1)
            run.step.poison = kind is not None
            metrics = step(run, batch)
            if kind == "loss":
                metrics = metrics.clone()
                metrics[0] = float("nan")
                run.ring.pop()
                run.ring.push(metrics, run.position.step + 1)
            return metrics

        def nan_gradients(self: TrainStep, rates: dict) -> None:
            if getattr(self, "poison", False):
                for parameter in self._trained:
                    if parameter.grad is not None:
                        parameter.grad.fill_(float("nan"))
            update(self, rates)

        monkeypatch.setattr(trainer, "make_step", poisoned)
        monkeypatch.setattr(TrainStep, "update", nan_gradients)

    return install


@pytest.mark.slow
def test_a_step_that_is_passed_over_leaves_no_trace(
    beton: Path, tmp_path: Path, break_steps: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the obvious way: a run that does not make steps 2 and 7 in the first place."""
    original = trainer.make_step

    def leave_out(run: Setup, batch: Batch) -> torch.Tensor | None:
        return None if run.position.step + 1 in (2, 7) else original(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", leave_out)
        pretrain(small(), options(beton, tmp_path / "left-out"), Silent())

    break_steps({2: "loss", 7: "gradient"})
    said = Silent()
    summary = pretrain(small("train.skip_nonfinite=2"), options(beton, tmp_path / "run"), said)
    assert same(state(tmp_path / "run"), state(tmp_path / "left-out"))
    assert summary["passed_over_steps"] == [2, 7] == state(tmp_path / "run")["position"]["passed_over"]
    told = [text for text in said.messages if "passed over" in text]
    assert told[0].startswith("step 2: the loss is nan; passed over") and told[1].startswith(
        "step 7: a gradient is not finite; passed over"
    )
    blocks = [row for row in rows(tmp_path / "run") if row["kind"] == "step"]
    assert [row["step"] for row in blocks] == [4, 6, 10, 12] and all(np.isfinite(row["loss"]) for row in blocks)


@pytest.mark.slow
def test_a_run_without_bad_steps_is_not_changed_by_the_option(beton: Path, tmp_path: Path) -> None:
    pretrain(small(), options(beton, tmp_path / "plain"), Silent())
    pretrain(small("train.skip_nonfinite=3"), options(beton, tmp_path / "ready"), Silent())
    assert same(state(tmp_path / "ready"), state(tmp_path / "plain"))


def test_the_batch_of_the_step_that_ends_a_run_is_kept(beton: Path, tmp_path: Path, break_steps: Callable) -> None:
    break_steps({3: "loss"})
    with pytest.raises(
        FastSSLError,
        match=r"the loss is nan at step 3: the run has diverged.*train\.skip_nonfinite.*there is no checkpoint",
    ):
        pretrain(small(), options(beton, tmp_path / "run"), Silent())
    folder = tmp_path / "run" / "nonfinite" / "step-00000003"
    about = json.loads((folder / "step.json").read_text())
    with ViewLoader(beton, views=small().views, batch_size=8, seed=0, workers=1) as loader:
        expected = next(iter(loader.epoch(0, start_step=2)))
        kept = load_file(folder / "batch.safetensors")
        assert torch.equal(kept["views.0"], expected.views[0]) and torch.equal(kept["index"], expected.index)
    assert about["samples"] == kept["index"].tolist() and (about["step"], about["epoch"], about["step_in_epoch"]) == (
        3,
        0,
        2,
    )
    assert about["reason"] == "the loss is nan" and about["lr"] > 0
    picture = Image.open(folder / "views.png")
    assert picture.size == (2 * 34, 8 * 34)
    told = status(tmp_path / "run")
    assert told["state"] == "failed" and "diverged" in told["why"] and str(tmp_path) not in told["why"]


@pytest.mark.slow
def test_the_same_command_with_the_option_goes_on(beton: Path, tmp_path: Path, break_steps: Callable) -> None:
    break_steps({8: "gradient"})
    with pytest.raises(
        FastSSLError, match=r"no longer finite at step 8, though the loss is.*the newest checkpoint is of step 7"
    ):
        pretrain(small("train.checkpoint_minutes=0"), options(beton, tmp_path / "run"), Silent())
    summary = pretrain(small("train.skip_nonfinite=1"), options(beton, tmp_path / "run"), Silent())
    assert summary["passed_over_steps"] == [8]
    pretrain(small("train.skip_nonfinite=1"), options(beton, tmp_path / "whole"), Silent())
    assert same(state(tmp_path / "run"), state(tmp_path / "whole"))


def test_a_state_that_is_not_finite_is_never_saved(beton: Path, tmp_path: Path, break_steps: Callable) -> None:
    break_steps({12: "gradient"})  # the very last: no later loss would tell
    with pytest.raises(FastSSLError, match=r"no longer finite at step 12.*there is no checkpoint"):
        pretrain(small(), options(beton, tmp_path / "run"), Silent())
    assert not (tmp_path / "run" / "checkpoints" / "last.pt").exists()


@pytest.mark.slow
def test_checkpoints_go_on_behind_a_step_that_was_passed_over(
    beton: Path, tmp_path: Path, break_steps: Callable
) -> None:
    """The checkpoint that was due found the NaN, and the run went back instead."""
    break_steps({5: "loss"})
    recipe = small("train.skip_nonfinite=1", "train.checkpoint_minutes=0", "train.log_every=50", "train.keep_last=99")
    pretrain(recipe, options(beton, tmp_path / "run"), Silent())
    steps = {int(path.stem.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").glob("step-*.pt")}
    assert {1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12} <= steps


def test_more_bad_steps_than_allowed_end_the_run_in_a_good_state(
    beton: Path, tmp_path: Path, break_steps: Callable
) -> None:
    break_steps({2: "loss", 3: "gradient", 4: "loss"})
    with pytest.raises(FastSSLError, match=r"step 4: the loss is nan, and 2 such steps were passed over before"):
        pretrain(small("train.skip_nonfinite=2"), options(beton, tmp_path / "run"), Silent())
    assert sorted(path.name for path in (tmp_path / "run" / "nonfinite").iterdir()) == [
        f"step-0000000{number}" for number in (2, 3, 4)
    ]


@pytest.mark.slow
def test_what_was_passed_over_is_known_behind_a_resume(
    beton: Path, tmp_path: Path, break_steps: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps({2: "loss", 9: "loss"})
    recipe, poisoned = small("train.skip_nonfinite=2"), trainer.make_step

    def stop(run: Setup, batch: Batch) -> torch.Tensor:
        metrics = poisoned(run, batch)
        if run.position.step == 6:
            run.stop.set()
        return metrics

    pretrain(recipe, options(beton, tmp_path / "whole"), Silent())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", stop)
        with pytest.raises(Interrupted):
            pretrain(recipe, options(beton, tmp_path / "run"), Silent())
    assert state(tmp_path / "run")["position"]["passed_over"] == [2]
    summary = pretrain(recipe, options(beton, tmp_path / "run"), Silent())
    assert summary["passed_over_steps"] == [2, 9] and same(state(tmp_path / "run"), state(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("when", [7, 8, 10])
def test_a_signal_while_the_run_is_set_back(when: int, beton: Path, tmp_path: Path, break_steps: Callable) -> None:
    """Step 9 of the block 7..10 is bad; the signal comes while its steps are made again one by one, or while the run
    goes back.
    """
    break_steps({9: "gradient"})
    recipe, poisoned, made = small("train.skip_nonfinite=1"), trainer.make_step, []
    pretrain(recipe, options(beton, tmp_path / "whole"), Silent())

    def stop(run: Setup, batch: Batch) -> torch.Tensor:
        made.append(run.position.step + 1)
        if made[-1] == when and made.count(when) == (2 if when < 9 else 1):
            run.stop.set()
        return poisoned(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", stop)
        with pytest.raises(Interrupted):
            pretrain(recipe, options(beton, tmp_path / "run"), Silent())
    summary = pretrain(recipe, options(beton, tmp_path / "run"), Silent())
    assert summary["passed_over_steps"] == [9] and same(state(tmp_path / "run"), state(tmp_path / "whole"))


@pytest.mark.slow
def test_a_run_set_back_twice_goes_on_from_before_the_step_that_it_knows_as_bad(
    beton: Path, tmp_path: Path, break_steps: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is due behind step 3 finds step 2, the end of the block step 4; the signal comes while step 1
    is made for the third time.
    """
    break_steps({2: "gradient", 4: "gradient"})
    recipe, poisoned, made = small("train.skip_nonfinite=2"), trainer.make_step, []
    pretrain(recipe, options(beton, tmp_path / "whole"), Silent())

    def stop(run: Setup, batch: Batch) -> torch.Tensor:
        made.append(run.position.step + 1)
        if made[-1] == 1 and made.count(1) == 3:
            run.stop.set()
        return poisoned(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", stop)
        patch.setattr(Saver, "is_due", lambda saver: made == [1, 2, 3])
        with pytest.raises(Interrupted):
            pretrain(recipe, options(beton, tmp_path / "run"), Silent())
    assert state(tmp_path / "run")["position"] | {"train_seconds": 0} == {
        "step": 1,
        "epoch": 0,
        "step_in_epoch": 1,
        "train_seconds": 0,
        "skipped": [],
        "passed_over": [2],
        "parts": None,
    }
    summary = pretrain(recipe, options(beton, tmp_path / "run"), Silent())
    assert summary["passed_over_steps"] == [2, 4] and same(state(tmp_path / "run"), state(tmp_path / "whole"))


def in_one_of_two(beton: str, out: str) -> None:
    """The loss of process 1 is NaN at step 3; the gradients of both are then, as they are averaged."""
    from fastssl.distributed.world import world_from_environment

    original = trainer.make_step

    def poisoned(run: Setup, batch: Batch) -> torch.Tensor:
        if run.position.step == 2 and world_from_environment().rank == 1:
            batch.views = [view * float("nan") for view in batch.views]
        return original(run, batch)

    trainer.make_step = poisoned
    pretrain(small("train.skip_nonfinite=1", "moco.split_bn=2"), options(Path(beton), Path(out)), Silent())


@pytest.mark.slow
def test_processes_pass_over_a_step_together(beton: Path, tmp_path: Path) -> None:
    run_processes(in_one_of_two, 2, str(beton), str(tmp_path / "run"), join=False)
    assert state(tmp_path / "run")["position"] | {"train_seconds": 0} == {
        "step": 12,
        "epoch": 2,
        "step_in_epoch": 0,
        "train_seconds": 0,
        "skipped": [],
        "passed_over": [3],
        "parts": None,
    }
    kept = [
        load_file(tmp_path / "run" / "nonfinite" / "step-00000003" / name)
        for name in ("batch.safetensors", "batch-1.safetensors")
    ]
    assert len({*kept[0]["index"].tolist(), *kept[1]["index"].tolist()}) == 8, "both halves of the batch"
    assert torch.isfinite(kept[0]["views.0"]).all() and not torch.isfinite(kept[1]["views.0"]).any()


def test_crops_that_are_coloured_on_the_device_are_kept_with_their_tables(beton: Path, tmp_path: Path) -> None:
    views = [ViewSpec(size=32, count=2), ViewSpec(size=16, count=1, area=(0.05, 0.3))]
    with ViewLoader(beton, views=views, batch_size=4, workers=1, colour=False) as loader:
        batch = next(iter(loader.epoch(0)))
        save_bad_step(tmp_path, batch, views, rank=0, about={})
    kept = load_file(tmp_path / "batch.safetensors")
    assert kept["views.0"].dtype == torch.uint8 and kept["tables.1"].shape == (4, 23)
    picture = np.asarray(Image.open(tmp_path / "views.png"))
    assert picture.shape == (4 * 34, 3 * 34, 3) and picture[:32, :32].std() > 5


def test_values_that_are_not_finite_are_red_in_the_picture(beton: Path, tmp_path: Path) -> None:
    views = [ViewSpec(size=16, count=1)]
    with ViewLoader(beton, views=views, batch_size=2, workers=1) as loader:
        batch = next(iter(loader.epoch(0)))
    batch.views[0][1, :, 3, 5] = float("inf")
    save_bad_step(tmp_path, batch, views, rank=0, about={})
    red = (np.asarray(Image.open(tmp_path / "views.png")) == [255, 0, 0]).all(-1)
    assert red.sum() == 1 and red[18 + 3, 5]


def test_features_that_overflow_in_an_online_probe_do_not_end_the_run(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch statistics hold in training what the running ones, in evaluation, let grow without bound."""
    said, probe = Silent(), OnlineProbe.run

    def overflowing(self: OnlineProbe, backbone: nn.Module, *, step: int, epoch: int) -> dict:
        hook = backbone.register_forward_hook(lambda *call: call[2] * torch.inf)
        try:
            return probe(self, backbone, step=step, epoch=epoch)
        finally:
            hook.remove()

    monkeypatch.setattr(OnlineProbe, "run", overflowing)
    pretrain(small(), options(beton, tmp_path / "run"), said)
    (row,) = (found for found in rows(tmp_path / "run") if found["kind"] == "probe")
    assert [row[name] for name in ("knn", "effective_rank", "feature_std")] == [None] * 3
    assert "epoch 1: features that are NaN or infinite outside of training (online probe)" in said.messages
    assert status(tmp_path / "run")["state"] == "finished"
