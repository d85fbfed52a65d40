"""A run may be stopped, killed or starved of room at any moment: the next one goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import run_processes

from fastssl import run_folder, saver
from fastssl.checkpoint import NotSaved
from fastssl.pipelines.errors import FastSSLError, Interrupted
from fastssl.recipe import Recipe, load_recipe, parse_overrides
from fastssl.train import Run, RunOptions, pretrain

#: 2 epochs of 6 steps on 48 photos
SMALL = [
    "arch=lcnet_035",
    "views.0.size=32",
    "train.epochs=2",
    "train.batch_size=8",
    "train.log_every=4",
    "moco.queue=64",
    "moco.projector.hidden=16",
    "moco.projector.out=8",
    "probe.online_samples=40",
    "probe.final_samples=40",
    "probe.size=32",
    "probe.every_epochs=1",
]


class Silent:
    def __init__(self) -> None:
        self.messages: list[str] = []

    def row(self, row: dict, done: int, total: int) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


class Crash(Exception):
    """The process is gone: nothing behind this line is run."""


def small(*overrides: str) -> Recipe:
    return load_recipe("quickstart", parse_overrides([*SMALL, *overrides]))


def options(beton: Path, out: Path, **changes: object) -> RunOptions:
    return RunOptions(**{"recipe_name": "quickstart", "data": beton, "out": out, "device": "cpu", "workers": 1, **changes})


def state(out: Path) -> dict:
    return torch.load(out / "checkpoints" / "last.pt", weights_only=True)


def same(one: dict, other: dict) -> bool:
    moments = [[state["momentum_buffer"] for state in found["optimizer"]["state"].values()] for found in (one, other)]
    return all(torch.equal(one["method"][name], other["method"][name]) for name in other["method"]) and all(map(torch.equal, *moments))


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(small(), options(beton, out), Silent())
    return out


def test_killed_behind_every_single_step(whole: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint behind each step (and none at the end of a killed one): twelve starts make one run."""
    out, original = tmp_path / "run", Run._step
    done = 0

    def one_more(run: Run, batch: object) -> object:
        if run.position.step > done:
            raise Crash
        return original(run, batch)

    monkeypatch.setattr(Run, "_step", one_more)
    for done in range(11):
        said = Silent()
        with pytest.raises(Crash):
            pretrain(small("train.checkpoint_minutes=0"), options(beton, out), said)
        assert state(out)["position"]["step"] == done + 1
        assert any(f"resumed at step {done}" in text for text in said.messages) == (done > 0)
        assert json.loads((out / "status.json").read_text()) | {"why": ""} == {
            "state": "failed", "step": done + 1, "total_steps": 12, "saved_step": done + 1, "why": "",
        }  # fmt: skip
    done = 11
    pretrain(small("train.checkpoint_minutes=0"), options(beton, out), Silent())
    assert same(state(out), state(whole))
    assert [(row["kind"], row["step"]) for row in rows(out)] == [
        (kind, step) for step in range(1, 13) for kind in ("step", *["probe"] * (step == 6))
    ]
    assert [row["knn"] for row in rows(out) if row["kind"] == "probe"] == [row["knn"] for row in rows(whole) if row["kind"] == "probe"]
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


def test_a_damaged_newest_checkpoint_is_passed_over(whole: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, original = tmp_path / "run", Run._step

    def crash(run: Run, batch: object) -> object:
        if run.position.step == 9:
            raise Crash
        return original(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_step", crash)
        with pytest.raises(Crash):
            pretrain(small("train.checkpoint_minutes=0"), options(beton, out), Silent())
    path = out / "checkpoints" / "last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = Silent()
    pretrain(small(), options(beton, out), said)
    assert any(text.startswith(f"passed over: {path}: damaged checkpoint") for text in said.messages)
    assert any("resumed at step 8" in text for text in said.messages)
    assert same(state(out), state(whole))
    assert sorted(path.name for path in (out / "checkpoints").glob("*.pt")) == ["last.pt", "step-00000008.pt", "step-00000012.pt"]
    assert (out / "checkpoints" / "step-00000009.pt.aside").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_that_asks_gets_a_checkpoint_and_status_130(number: int, whole: Path, beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    overrides = [argument for item in [*SMALL[1:], "train.epochs=2000"] for argument in ("--set", item)]
    command = [
        sys.executable,
        "-m",
        "fastssl",
        "pretrain",
        "--arch",
        "lcnet_035",
        "--recipe",
        "quickstart",
        "--data",
        str(beton),
        "--out",
        str(out),
    ]
    process = subprocess.Popen([*command, "--device", "cpu", *overrides], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (
            (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) > 2
        ):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        started = time.monotonic()
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "everything is saved" in text and "Traceback" not in text, text
    assert time.monotonic() - started < 30
    status, position = json.loads((out / "status.json").read_text()), state(out)["position"]
    assert status["state"] == "stopped" and status["saved_step"] == status["step"] == position["step"] > 0
    assert str(tmp_path) not in (out / "status.json").read_text()


def test_what_decides_no_step_may_be_another(whole: Path, beton: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "the same photos.beton"
    renamed.write_bytes(beton.read_bytes())
    out, original = tmp_path / "run", Run._step

    def stop(run: Run, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 4:
            run.stop.set()
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_step", stop)
        with pytest.raises(Interrupted, match="step 5"):
            pretrain(small(), options(beton, out), Silent())
    changed = small(
        "train.log_every=3",
        "train.keep_last=5",
        "train.checkpoint_minutes=1",
        "train.on_bad=skip",
        "train.milestone_epochs=2",
        "probe.every_epochs=2",
    )
    pretrain(changed, options(renamed, out), Silent())
    assert same(state(out), state(whole)) and (out / "checkpoints" / "epoch-0002.safetensors").exists()
    for other in ("train.epochs=3", "optim.lr=0.5", "train.batch_size=4"):
        with pytest.raises(FastSSLError, match="belongs to a run with other settings"):
            pretrain(small(other), options(beton, out), Silent())


def test_all_free_keys_exist() -> None:
    """A key that was renamed would silently decide again."""
    from fastssl.recipe import recipe_to_dict

    config = recipe_to_dict(small())
    for key in run_folder._FREE - {"data.name", "val"}:
        section, name = key.split(".")
        assert name in config[section], key
    assert all(section in config for section in run_folder._FREE_SECTIONS)


def test_damaged_photos_are_remembered_over_a_stop(damaged: tuple[Path, int], tmp_path: Path) -> None:
    data, sample = damaged
    out, original = tmp_path / "run", Run._step

    def stop(run: Run, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 5:  # all photos were met
            run.stop.set()
        return metrics

    recipe = small("train.on_bad=skip", "probe.every_epochs=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_step", stop)
        with pytest.raises(Interrupted, match="step 6"):
            pretrain(recipe, options(data, out), Silent())
    assert state(out)["position"]["skipped"] == [sample]
    assert pretrain(recipe, options(data, out), Silent())["skipped"] == 1


# ------------------------------------------------------------------ no room


class Disk:
    """``save_checkpoint`` on a disk that is full at the steps in ``full``."""

    def __init__(self, full: set[int], patch: pytest.MonkeyPatch):
        self.tried: list[int] = []
        original = saver.save_checkpoint

        def save(folder: Path, **options: object) -> None:
            self.tried.append(options["position"].step)
            if self.tried[-1] in full:
                raise NotSaved(f"{folder}: checkpoint not written ([Errno 28] No space left on device); the one before it is untouched")
            original(folder, **options)

        patch.setattr(saver, "save_checkpoint", save)
        patch.setattr(saver, "_RETRY_S", 0.0)


def test_a_run_lives_on_while_the_disk_is_full(whole: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, said, out = Disk({3, 4, 5}, monkeypatch), Silent(), tmp_path / "run"
    pretrain(small("train.checkpoint_minutes=0"), options(beton, out), said)
    assert disk.tried == [*range(1, 13), 12] and same(state(out), state(whole))
    told = [text for text in said.messages if "not written" in text]
    assert len(told) == 1 and "No space left" in told[0] and "the newest checkpoint is of step 2; the run goes on" in told[0]
    assert "saved at step 6: there is room again" in said.messages


def test_the_last_checkpoint_waits_for_room(whole: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_stop_without_room_does_not_say_that_all_is_saved(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk({5}, monkeypatch)
    original = Run._step

    def stop(run: Run, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 4:
            run.stop.set()
        return metrics

    monkeypatch.setattr(Run, "_step", stop)
    with pytest.raises(NotSaved, match=r"stopped at step 5, which could not be saved: the newest checkpoint is of step 4; .*No space left"):
        pretrain(small("train.checkpoint_minutes=0"), options(beton, tmp_path / "run"), Silent())
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and status["saved_step"] == 4
    assert state(tmp_path / "run")["position"]["step"] == 4


def test_a_file_system_without_locks_is_said(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    said = Silent()
    pretrain(small("train.epochs=1"), options(beton, tmp_path / "run"), said)
    assert any("has no locks" in text for text in said.messages)


def test_what_a_kill_left_half_written_is_cleared(beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    for path in (out / "config.yaml.tmp", out / "checkpoints" / "step-00000003.pt.tmp"):
        path.write_bytes(b"half")
    pretrain(small("train.epochs=1"), options(beton, out), Silent())
    assert not list(out.rglob("*.tmp"))


# ------------------------------------------------------------------ several processes, and GPUs


def stopped_by_one_of_two(data: str, out: str, number: int) -> int:
    """Process 1 is sent a signal behind step 4; where this process stopped."""
    from fastssl.distributed import world_from_environment

    original = Run._step

    def step(run: Run, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 3 and world_from_environment().rank == 1:
            os.kill(os.getpid(), number)
        return metrics

    Run._step = step
    with pytest.raises(Interrupted) as stop:
        pretrain(small("moco.split_bn=2"), options(Path(data), Path(out)), Silent())
    return int(str(stop.value).split("stopped at step ")[1].split(";")[0])


def test_a_signal_to_one_process_stops_all_behind_the_same_step(beton: Path, tmp_path: Path) -> None:
    """At once, not some steps later: a launcher kills after half a minute whoever has not left."""
    assert run_processes(stopped_by_one_of_two, 2, str(beton), str(tmp_path / "run"), signal.SIGUSR1, join=False) == [5, 5]
    assert state(tmp_path / "run")["position"]["step"] == 5


def said_by_one_of_two() -> list[tuple[bool, ...]]:
    from fastssl.distributed import Vote, rank

    vote = Vote(2)
    answers = [vote(rank() == 1, False), vote(False, rank() == 0), vote(False, False), vote(False, False)]
    with pytest.raises(ValueError, match="1 answers to 2 questions"):
        vote(True)
    return [*answers, vote.close(), vote.close()]


def test_a_vote_is_known_to_all_one_call_later() -> None:
    from fastssl.distributed import Vote

    expected = [(False, False), (True, False), (False, True), (False, False), (False, False), (False, False)]
    assert run_processes(said_by_one_of_two, 2) == [expected, expected]
    assert Vote(2)(True, False) == (True, False), "alone the answer is at hand"


def test_only_deterministic_algorithms_leave_torch_as_it_was(whole: Path, beton: Path, tmp_path: Path) -> None:
    pretrain(small("train.deterministic=true"), options(beton, tmp_path / "run"), Silent())
    assert same(state(tmp_path / "run"), state(whole)) and not torch.are_deterministic_algorithms_enabled()

    def refuse(*_: object) -> None:
        raise RuntimeError("some_op does not have a deterministic implementation")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_step", refuse)
        with pytest.raises(FastSSLError, match=r"train\.deterministic: some_op does not have"):
            pretrain(small("train.deterministic=true"), options(beton, tmp_path / "other"), Silent())


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["false", "true"])
def test_on_a_gpu_a_killed_run_goes_on_bit_for_bit(graph: str, beton: Path, tmp_path: Path) -> None:
    recipe, original = small("train.deterministic=true", "train.checkpoint_minutes=0", f"train.graph={graph}"), Run._step
    pretrain(recipe, options(beton, tmp_path / "whole", device="cuda"), Silent())

    def crash(run: Run, batch: object) -> object:
        if run.position.step == 7:
            raise Crash
        return original(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_step", crash)
        with pytest.raises(Crash):
            pretrain(recipe, options(beton, tmp_path / "run", device="cuda"), Silent())
    pretrain(recipe, options(beton, tmp_path / "run", device="cuda"), Silent())
    assert same(state(tmp_path / "run"), state(tmp_path / "whole"))
