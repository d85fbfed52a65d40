"""status.json: for whoever has to decide whether to start a run again."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from children import in_child
from small_run import Silent, options, small, status

from fastssl.pretrain import pretrain
from fastssl.runs import folder as run_folder
from fastssl.runs import status as run_status
from fastssl.runs.status import RunStatus, read_status, write_status
from fastssl.training import trainer
from fastssl.training.setup import Setup


def test_it_says_how_a_run_stands_and_when(tmp_path: Path) -> None:
    before = time.time() // 1
    write_status(tmp_path, "stopped", step=3, why="a signal")
    found = json.loads((tmp_path / "status.json").read_text())
    said = time.mktime(time.strptime(found.pop("time"), "%Y-%m-%dT%H:%M:%SZ")) - time.timezone
    assert before <= said <= time.time() and found == {"state": "stopped", "step": 3, "why": "a signal"}


def test_no_run_ends_because_it_cannot_be_written(tmp_path: Path) -> None:
    status = RunStatus(tmp_path / "missing", dict)
    status.tell("training")
    status.close()
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"\xff", b"{", b"[" * 100_000])
def test_what_is_none_says_nothing(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "status.json").write_bytes(content)
    assert read_status(tmp_path) == {}


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not condition():
        time.sleep(0.01)
    return condition()


def test_signs_of_life_come_whatever_the_run_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And end with the run, or with its last words."""
    monkeypatch.setattr(run_status, "BEAT_S", 0.01)
    asked = []

    def standing() -> dict[str, int]:
        asked.append(threading.current_thread())
        return {"step": len(asked)}

    found = RunStatus(tmp_path, standing)
    found.tell("training", why="said once")
    assert soon(lambda: read_status(tmp_path)["step"] > 3)
    assert read_status(tmp_path)["state"] == "training" and "why" not in read_status(tmp_path)
    found.tell("stopped", why="a signal")
    number = len(asked)
    time.sleep(0.05)
    assert (
        read_status(tmp_path)["state"] == "stopped"
        and read_status(tmp_path)["why"] == "a signal"
        and len(asked) == number
    )
    found.close()
    (writer,) = set(asked) - {threading.current_thread()}
    assert not writer.is_alive()


def test_a_disk_that_does_not_answer_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was told meanwhile is written when it does, in order."""
    answer, write = threading.Event(), run_status.write_status
    monkeypatch.setattr(run_status, "write_status", lambda *args, **values: (answer.wait(), write(*args, **values)))
    monkeypatch.setattr(run_status, "_WAIT_S", 0.05)
    found = RunStatus(tmp_path, dict)
    for state in ("training", "failed"):
        found.tell(state)
    found.close()
    assert read_status(tmp_path) == {}
    answer.set()
    assert soon(lambda: read_status(tmp_path).get("state") == "failed")


def killed_in_the_fourth_step(beton: Path, out: Path) -> None:
    original = trainer.make_step

    def step(run: Setup, batch: object) -> object:
        if run.position.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(run, batch)

    trainer.make_step = step
    pretrain(small("train.checkpoint_minutes=0"), options(beton, out), Silent())


def test_a_killed_run_is_told_from_one_at_work(beton: Path, tmp_path: Path) -> None:
    """By the time that is not renewed; and the next run, which has the lock, says so."""
    out = tmp_path / "run"
    ended = in_child(killed_in_the_fourth_step, beton, out, seconds=120)
    assert ended.signal == "SIGKILL", ended
    left = status(out)
    assert left == {"state": "training", "time": left["time"], "step": 3, "total_steps": 12, "saved_step": 3}
    said = Silent()
    pretrain(small(), options(beton, out), said)
    words = (
        f"{out}: the run before ended without a word (killed, out of memory, power cut?); last heard of "
        f"{left['time']}, at step 3"
    )
    assert words in said.messages and status(out)["state"] == "finished"


@pytest.mark.parametrize(
    ("state", "locked", "killed"), [("training", True, True), ("training", False, False), ("stopped", True, False)]
)
def test_only_one_that_was_at_work_and_cannot_be_any_more(
    state: str, locked: bool, killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks it may still be at work, on another host."""
    said: list[str] = []
    folder = run_folder.RunFolder(tmp_path, said.append)
    (tmp_path / "config.yaml").write_text("")
    write_status(tmp_path, state, step=3)
    if not locked:
        monkeypatch.setattr(folder, "_lock", lambda: False)
    folder.open({"train": {"epochs": 2}}, "never", {}, lambda state: None)
    folder.close()
    assert any("without a word" in text for text in said) == killed


def test_why_a_run_failed_names_no_folder(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Setup, batch: object) -> None:
        raise RuntimeError("cannot open /home/somebody/.cache/kernel.so")

    monkeypatch.setattr(trainer, "make_step", fail)
    with pytest.raises(RuntimeError, match="somebody"):
        pretrain(small(), options(beton, tmp_path / "run"), Silent())
    assert read_status(tmp_path / "run")["why"] == "RuntimeError: cannot open kernel.so"


def test_the_first_words_say_how_many_steps_there_are(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next ones come a minute later, which a run that is killed soon does not see."""
    found, original = [], Setup.make_loader
    monkeypatch.setattr(Setup, "make_loader", lambda run: found.append(status(run.options.out)) or original(run))
    pretrain(small("probe.final_samples=0"), options(beton, tmp_path / "run"), Silent())
    assert found == [{"state": "training", "time": found[0]["time"], "step": 0, "total_steps": 12, "saved_step": None}]
