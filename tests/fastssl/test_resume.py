"""A run may be stopped, killed or starved of room at any moment: the next one goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_processes
from small_run import SMALL, Silent, options, rows, same, small, state, status

from fastssl.config.recipe import Recipe
from fastssl.errors import FastSSLError, Interrupted
from fastssl.evaluate.online_probe import OnlineProbe
from fastssl.models.backbones import read_header
from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pretrain import pretrain
from fastssl.runs import checkpoint
from fastssl.runs.checkpoint import load_checkpoint, write_state
from fastssl.runs.saver import Saver
from fastssl.training import trainer
from fastssl.training.setup import RunOptions, Setup


class Crash(Exception):
    """The process is gone: nothing behind this line is run."""


def crash_behind(step: int, recipe: Recipe, chosen: RunOptions) -> None:
    """A run that ends without a word when it has made so many steps."""
    original = trainer.make_step

    def crash(run: Setup, batch: object) -> object:
        if run.position.step == step:
            raise Crash
        return original(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", crash)
        with pytest.raises(Crash):
            pretrain(recipe, chosen, Silent())


@pytest.fixture(scope="module")
def whole(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    pretrain(small(), options(beton, out), Silent())
    return out


@pytest.mark.slow
def test_killed_behind_every_single_step(
    whole: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint behind each step (and none at the end of a killed one): twelve starts make one run."""
    out, original = tmp_path / "run", trainer.make_step
    done = 0

    def one_more(run: Setup, batch: object) -> object:
        if run.position.step > done:
            raise Crash
        return original(run, batch)

    monkeypatch.setattr(trainer, "make_step", one_more)
    for done in range(11):
        said = Silent()
        with pytest.raises(Crash):
            pretrain(small("train.checkpoint_minutes=0"), options(beton, out), said)
        assert state(out)["position"]["step"] == done + 1
        assert any(f"resumed at step {done}" in text for text in said.messages) == (done > 0)
        assert status(out) | {"why": "", "time": ""} == {
            "state": "failed",
            "time": "",
            "step": done + 1,
            "total_steps": 12,
            "saved_step": done + 1,
            "why": "",
        }
    done = 11
    pretrain(small("train.checkpoint_minutes=0"), options(beton, out), Silent())
    assert same(state(out), state(whole))
    assert [(row["kind"], row["step"]) for row in rows(out)] == [
        (kind, step) for step in range(1, 13) for kind in ("step", *["probe"] * (step == 6))
    ]
    assert [row["knn"] for row in rows(out) if row["kind"] == "probe"] == [
        row["knn"] for row in rows(whole) if row["kind"] == "probe"
    ]
    assert status(out)["state"] == "finished"


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over(whole: Path, beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    crash_behind(9, small("train.checkpoint_minutes=0"), options(beton, out))
    path = out / "checkpoints" / "last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = Silent()
    pretrain(small(), options(beton, out), said)
    assert any(text.startswith(f"passed over: {path}: damaged checkpoint") for text in said.messages)
    assert any("resumed at step 8" in text for text in said.messages)
    assert any("step-00000009.pt.aside: set aside" in text for text in said.messages)
    assert same(state(out), state(whole))
    assert sorted(path.name for path in (out / "checkpoints").glob("*.pt")) == [
        "last.pt",
        "step-00000008.pt",
        "step-00000012.pt",
    ]
    assert (out / "checkpoints" / "step-00000009.pt.aside").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_scheduler_that_asks_gets_a_checkpoint_and_status_130(
    number: int, whole: Path, beton: Path, tmp_path: Path
) -> None:
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
        "few-photos-moco",
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
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "everything is saved" in text and "Traceback" not in text, text
    told, position = status(out), state(out)["position"]
    assert told["state"] == "stopped" and told["saved_step"] == told["step"] == position["step"] > 0
    assert str(tmp_path) not in (out / "status.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_probe_is_left_in_the_middle_and_made_again(
    number: int, whole: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU it may take longer than the half a minute that a launcher gives."""
    out, original = tmp_path / "run", OnlineProbe.run

    def slow(probe: OnlineProbe, *args: object, **options: object) -> dict:
        os.kill(os.getpid(), number)
        time.sleep(60)
        return original(probe, *args, **options)

    monkeypatch.setattr(OnlineProbe, "run", slow)
    started = time.monotonic()
    with pytest.raises(Interrupted, match="step 6"):
        pretrain(small(), options(beton, out), Silent())
    assert time.monotonic() - started < 45
    monkeypatch.undo()
    pretrain(small(), options(beton, out), Silent())
    assert same(state(out), state(whole))
    assert [(row["kind"], row["step"]) for row in rows(out)] == [(row["kind"], row["step"]) for row in rows(whole)]
    assert [row["knn"] for row in rows(out) if row["kind"] == "probe"] == [
        row["knn"] for row in rows(whole) if row["kind"] == "probe"
    ]


def test_a_signal_during_the_last_save_does_not_wait_for_the_report(
    whole: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which takes minutes; a launcher gives half of one."""
    out, original = tmp_path / "run", Saver.save

    def save(saver: Saver, *args: object, **options: object) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(saver, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", save)
        with pytest.raises(Interrupted, match=r"12 of 12 steps made and saved .* the same command writes the report"):
            pretrain(small(), options(beton, out), Silent())
    assert status(out)["state"] == "trained" and not (out / "summary.json").exists()
    pretrain(small(), options(beton, out), Silent())
    assert status(out)["state"] == "finished" and (out / "report.html").exists() and same(state(out), state(whole))


def test_a_signal_that_comes_again_does_not_disturb_the_leaving(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command line has it, where a signal outside the training is a KeyboardInterrupt."""
    out, step, tell = tmp_path / "run", trainer.make_step, Setup.tell_status

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def stop(run: Setup, batch: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(run, batch)

    def tell_status(run: Setup, said: str, **more: str) -> None:
        if said == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        tell(run, said, **more)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        monkeypatch.setattr(trainer, "make_step", stop)
        monkeypatch.setattr(Setup, "tell_status", tell_status)
        with pytest.raises(Interrupted, match="stopped at step 1;"):
            pretrain(small(), options(beton, out), Silent())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert status(out)["state"] == "stopped" and status(out)["saved_step"] == 1


def raw(path: Path, seed: int, labels: int = 3, count: int = 48) -> Path:
    """Pictures of one size as raw pixels: the tables of any two such files are equal."""
    rng = np.random.default_rng(seed)
    with BetonWriter(path, count) as writer:
        for sample in range(count):
            writer.add(rng.integers(0, 256, 40 * 40 * 3, dtype=np.uint8), 40, 40, label=sample % labels, mode=MODE_RAW)
    return path


@pytest.mark.slow
def test_other_photos_under_the_same_tables_are_another_run(tmp_path: Path) -> None:
    out, data, val = tmp_path / "run", raw(tmp_path / "photos.beton", 0), raw(tmp_path / "val.beton", 1)
    pretrain(small("train.epochs=1"), options(data, out, val=val), Silent())
    said, whole = Silent(), data.read_bytes()
    raw(val, 2)
    pretrain(small("train.epochs=1"), options(data, out, val=val), said)
    assert any("--val holds other photos than before: the probes up to step 6 " in text for text in said.messages)
    raw(data, 3)
    with pytest.raises(FastSSLError, match=r"belongs to a run with other settings \(data\.photos: .* there, .* here\)"):
        pretrain(small("train.epochs=1"), options(data, out, val=val), Silent())
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FastSSLError, match=r"photos\.beton: cut off"):
        pretrain(small("train.epochs=1"), options(data, out, val=val), Silent())
    data.write_bytes(whole)
    # One that was written before there was this checksum.
    found, said = state(out), Silent()
    del found["config"]["data"]["photos"], found["config"]["data"]["val_photos"]
    write_state(out / "checkpoints" / "last.pt", found)
    pretrain(small("train.epochs=1"), options(data, out, val=val), said)
    assert not any("--val" in text for text in said.messages)


def test_a_finished_run_taken_over_into_another_folder_is_whole_there(whole: Path, beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    pretrain(small(), options(beton, out, resume=str(whole / "checkpoints" / "last.pt")), Silent())
    assert same(state(out), state(whole)) and read_header(out / "checkpoints" / "last.safetensors")["step"] == "12"


@pytest.mark.slow
@pytest.mark.parametrize("files", range(6))
def test_killed_between_the_files_of_a_milestone(
    files: int, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step, last.pt, two backbones, the milestone and its backbones: the next start writes what is missing."""
    out, original, written = tmp_path / "run", checkpoint.save_checkpoint, 0

    def save(*args: object, **options: object) -> None:
        with monkeypatch.context() as patch:
            for name in ("write_state", "link_atomically", "save_backbone"):
                patch.setattr(checkpoint, name, counted(getattr(checkpoint, name)))
            original(*args, **options)

    def counted(write: Callable[..., None]) -> Callable[..., None]:
        def writes(*args: object, **options: object) -> None:
            nonlocal written
            if written == files + 1:
                raise Crash
            write(*args, **options)
            written += 1

        return writes

    monkeypatch.setattr("fastssl.runs.saver.save_checkpoint", save)
    settings = small("train.milestone_epochs=1")
    with pytest.raises(Crash):
        pretrain(settings, options(beton, out), Silent())
    monkeypatch.setattr("fastssl.runs.saver.save_checkpoint", original)
    assert state(out)["position"]["step"] == 6 if files else not (out / "checkpoints" / "last.pt").exists()
    pretrain(settings, options(beton, out), Silent())
    folder = out / "checkpoints"
    assert {path.name: read_header(path)["step"] for path in folder.glob("*.safetensors")} == {
        f"{name}{which}.safetensors": step
        for name, step in (("last", "12"), ("epoch-0001", "6"), ("epoch-0002", "12"))
        for which in ("", "-teacher")
    }
    assert load_checkpoint(folder / "epoch-0001.pt", advice="")["position"]["step"] == 6


def test_what_decides_no_step_may_be_another(whole: Path, beton: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "the same photos.beton"
    renamed.write_bytes(beton.read_bytes())
    out, original = tmp_path / "run", trainer.make_step

    def stop(run: Setup, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 4:
            run.stop.set()
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", stop)
        with pytest.raises(Interrupted, match="step 5"):
            pretrain(small(), options(beton, out), Silent())
    changed = small(
        "train.log_every=3",
        "train.keep_last=5",
        "train.checkpoint_minutes=1",
        "train.on_bad=skip",
        "train.milestone_epochs=2",
        "probe.every_epochs=2",
        "train.compile=false",  # as every run before these two could be auto
        "train.graph=false",
    )
    pretrain(changed, options(renamed, out), Silent())
    assert same(state(out), state(whole)) and (out / "checkpoints" / "epoch-0002.safetensors").exists()
    for other in ("train.epochs=3", "optim.lr=0.5", "train.batch_size=4"):
        with pytest.raises(FastSSLError, match="belongs to a run with other settings"):
            pretrain(small(other), options(beton, out), Silent())


def test_damaged_photos_are_remembered_over_a_stop(damaged: tuple[Path, int], tmp_path: Path) -> None:
    data, sample = damaged
    out, original = tmp_path / "run", trainer.make_step

    def stop(run: Setup, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 5:  # all photos were met
            run.stop.set()
        return metrics

    recipe = small("train.on_bad=skip", "probe.every_epochs=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", stop)
        with pytest.raises(Interrupted, match="step 6"):
            pretrain(recipe, options(data, out), Silent())
    assert state(out)["position"]["skipped"] == [sample]
    assert pretrain(recipe, options(data, out), Silent())["skipped"] == 1


# ------------------------------------------------------------------ several processes, and GPUs


def stopped_by_one_of_two(data: str, out: str, number: int) -> int:
    """Process 1 is sent a signal behind step 4; where this process stopped."""
    from fastssl.distributed.world import world_from_environment

    original = trainer.make_step

    def step(run: Setup, batch: object) -> object:
        metrics = original(run, batch)
        if run.position.step == 3 and world_from_environment().rank == 1:
            os.kill(os.getpid(), number)
        return metrics

    trainer.make_step = step
    with pytest.raises(Interrupted) as stop:
        pretrain(small("moco.split_bn=2"), options(Path(data), Path(out)), Silent())
    return int(str(stop.value).split("stopped at step ")[1].split(";")[0])


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_behind_the_same_step(beton: Path, tmp_path: Path) -> None:
    """At once, not some steps later: a launcher kills after half a minute whoever has not left."""
    assert run_processes(stopped_by_one_of_two, 2, str(beton), str(tmp_path / "run"), signal.SIGUSR1, join=False) == [
        5,
        5,
    ]
    assert state(tmp_path / "run")["position"]["step"] == 5


def said_by_one_of_two() -> list[tuple[bool, ...]]:
    from fastssl.distributed.collectives import Vote, rank

    vote = Vote()
    answers = [vote(rank() == 1, False), vote(False, rank() == 0), vote(False, False), vote(False, False)]
    return [*answers, vote.close(), vote.close()]


@pytest.mark.slow
def test_a_vote_is_known_to_all_one_call_later() -> None:
    from fastssl.distributed.collectives import Vote

    expected = [(False, False), (True, False), (False, True), (False, False), (False, False), ()]
    assert run_processes(said_by_one_of_two, 2) == [expected, expected]
    assert Vote()(True, False) == (True, False), "alone the answer is at hand"


def test_only_deterministic_algorithms_leave_torch_as_it_was(whole: Path, beton: Path, tmp_path: Path) -> None:
    pretrain(small("train.deterministic=true"), options(beton, tmp_path / "run"), Silent())
    assert same(state(tmp_path / "run"), state(whole)) and not torch.are_deterministic_algorithms_enabled()

    def refuse(*_: object) -> None:
        raise RuntimeError("some_op does not have a deterministic implementation")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", refuse)
        with pytest.raises(FastSSLError, match=r"train\.deterministic: some_op does not have"):
            pretrain(small("train.deterministic=true"), options(beton, tmp_path / "other"), Silent())


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["false", "true"])
def test_on_a_gpu_a_killed_run_goes_on_bit_for_bit(graph: str, beton: Path, tmp_path: Path) -> None:
    recipe = small("train.deterministic=true", "train.checkpoint_minutes=0", f"train.graph={graph}")
    pretrain(recipe, options(beton, tmp_path / "whole", device="cuda"), Silent())
    crash_behind(7, recipe, options(beton, tmp_path / "run", device="cuda"))
    pretrain(recipe, options(beton, tmp_path / "run", device="cuda"), Silent())
    assert same(state(tmp_path / "run"), state(tmp_path / "whole"))


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_on_a_gpu_a_recorded_run_goes_on(optimizer: str, beton: Path, tmp_path: Path) -> None:
    """Bit for bit it may not be recorded: torch's deterministic forms of some operations wait for the device."""
    changes = (
        "train.graph=true",
        "train.checkpoint_minutes=0",
        f"optim.name={optimizer}",
        "optim.lr=0.001",
        "optim.lr_batch=0",
    )
    recipe = small(*changes)
    whole = pretrain(recipe, options(beton, tmp_path / "whole", device="cuda"), Silent())
    crash_behind(7, recipe, options(beton, tmp_path / "run", device="cuda"))
    found = pretrain(recipe, options(beton, tmp_path / "run", device="cuda"), Silent())
    assert whole["fallbacks"] == found["fallbacks"] == {}
    losses = [[row["loss"] for row in rows(tmp_path / out) if row["kind"] == "step"] for out in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)
    states = [state(tmp_path / out)["optimizer"]["state"].values() for out in ("run", "whole")]
    assert all(one.keys() == other.keys() and one.get("step") == other.get("step") for one, other in zip(*states))
