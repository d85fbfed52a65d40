"""A disk that is full does not end a run, and nothing says that all is saved when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from power import Disk as Power
from small_run import Silent, options, same, small, state, status

from fastssl.pretrain import pretrain
from fastssl.runs import saver
from fastssl.runs.checkpoint import NotSaved
from fastssl.training import trainer
from fastssl.training.setup import Setup


@pytest.fixture(scope="module")
def whole(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(small(), options(beton, out), Silent())
    return out


class Disk:
    """``save_checkpoint`` on a disk that is full at the steps in ``full``."""

    def __init__(self, full: set[int], patch: pytest.MonkeyPatch):
        self.tried: list[int] = []
        original = saver.save_checkpoint

        def save(folder: Path, **options: object) -> None:
            self.tried.append(options["position"].step)
            if self.tried[-1] in full:
                raise NotSaved(
                    f"{folder}: checkpoint not written ([Errno 28] No space left on device); the one before it "
                    "is untouched"
                )
            original(folder, **options)

        patch.setattr(saver, "save_checkpoint", save)
        patch.setattr(saver, "_RETRY_S", 0.0)


@pytest.mark.slow
def test_a_power_cut_at_any_moment_leaves_whole_files(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Power(monkeypatch)
    pretrain(
        small("train.checkpoint_minutes=0", "train.milestone_epochs=1"), options(beton, tmp_path / "run"), Silent()
    )
    renamed = [name for what, name in disk.events if what == "rename"]
    assert {
        "config.yaml",
        "last.pt",
        "last-teacher.safetensors",
        "epoch-0001.pt",
        "status.json",
        "summary.json",
        "report.html",
    } <= {*renamed}
    assert not disk.problems and not disk.lost_names
    # The lines of metrics of a checkpoint's steps are there before it: its run would not write them again.
    metrics = disk.events.index(("fsync", "metrics.jsonl"))
    for step in range(4, 13):
        metrics = disk.events.index(("fsync", "metrics.jsonl"), metrics)
        metrics = disk.events.index(("rename", f"step-{step:08}.pt"), metrics)


@pytest.mark.slow
def test_a_run_lives_on_while_the_disk_is_full(
    whole: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, said, out = Disk({3, 4, 5}, monkeypatch), Silent(), tmp_path / "run"
    pretrain(small("train.checkpoint_minutes=0"), options(beton, out), said)
    assert disk.tried == [*range(1, 13), 12] and same(state(out), state(whole))
    told = [text for text in said.messages if "not written" in text]
    assert (
        len(told) == 1
        and "No space left" in told[0]
        and "the newest checkpoint is of step 2; the run goes on" in told[0]
    )
    assert "saved at step 6: there is room again" in said.messages


def test_the_last_checkpoint_waits_for_room(
    whole: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, out = {12}, tmp_path / "run"
    disk = Disk(full, monkeypatch)
    tries: list[float] = []

    def wait(stop: object, seconds: float) -> bool:
        tries.append(seconds)
        if len(tries) == 3:
            full.clear()
        return False

    monkeypatch.setattr(saver.StopRequest, "wait", wait)
    pretrain(small(), options(beton, out), Silent())
    assert len(tries) == 3 and disk.tried == [12] * 4 and same(state(out), state(whole))


def test_a_stop_without_room_does_not_say_that_all_is_saved(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk({5}, monkeypatch)
    original = trainer.make_step

    def stop(run: Setup, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 4:
            run.stop.set()
        return metrics

    monkeypatch.setattr(trainer, "make_step", stop)
    with pytest.raises(
        NotSaved,
        match=r"stopped at step 5, which could not be saved: the newest checkpoint is of step 4; .*No space left",
    ):
        pretrain(small("train.checkpoint_minutes=0"), options(beton, tmp_path / "run"), Silent())
    told = status(tmp_path / "run")
    assert told["state"] == "failed" and told["saved_step"] == 4
    assert state(tmp_path / "run")["position"]["step"] == 4
