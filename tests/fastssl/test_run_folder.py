"""The folder of a run: who may write into it, what is cleared, and which settings may be another when it goes on."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from children import in_child
from small_run import Silent, options, rows, same, small, state

from fastssl.config.recipe import recipe_to_dict
from fastssl.errors import FastSSLError
from fastssl.pretrain import pretrain
from fastssl.runs import folder as run_folder
from fastssl.runs.checkpoint import write_state
from fastssl.training import trainer
from fastssl.training.setup import Setup


def test_all_free_keys_exist() -> None:
    """A key that was renamed would silently decide again."""
    config = recipe_to_dict(small())
    # of runs that began with weights, of distillation, of older versions
    others = {"init_from.name", "distill.teacher", "next_mark"}
    for key in run_folder._FREE - {"data.name", "data.val_photos", "val", *others}:
        section, _, name = key.partition(".")
        assert section in config and (not name or name in config[section]), key


def test_a_file_system_without_locks_is_said(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.slow
def test_going_back_to_an_older_step_holds_also_if_that_start_is_killed(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve steps are made; the run is set back to step 8, killed before its first checkpoint, and
    started as usual.
    """
    out, original = tmp_path / "run", trainer.make_step
    pretrain(small("train.checkpoint_minutes=0", "train.keep_last=9"), options(beton, out), Silent())
    whole = state(out)
    assert (out / "summary.json").exists()

    def crash(run: Setup, batch: object) -> object:
        if run.position.step == 9:
            raise KeyError("killed")
        return original(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", crash)
        with pytest.raises(KeyError):
            pretrain(small(), options(beton, out, resume=str(out / "checkpoints" / "step-00000008.pt")), Silent())
    assert not (out / "summary.json").exists(), "of the run that was finished"
    said = Silent()
    pretrain(small(), options(beton, out), said)
    assert any("resumed at step 8" in text for text in said.messages) and same(state(out), whole)
    steps = [row["step"] for row in rows(out) if row["kind"] == "step"]
    assert steps == [*range(1, 9), 10, 12]


@pytest.mark.slow
def test_a_checkpoint_of_elsewhere_is_not_mixed_with_another_run(beton: Path, tmp_path: Path) -> None:
    pretrain(small("train.epochs=1"), options(beton, tmp_path / "one"), Silent())
    pretrain(small("train.epochs=1"), options(beton, tmp_path / "two", seed=1), Silent())
    before = (tmp_path / "two" / "summary.json").read_bytes()
    with pytest.raises(FastSSLError, match=r"two: holds another run; for --resume .* choose another --out"):
        pretrain(
            small("train.epochs=1"),
            options(beton, tmp_path / "two", resume=str(tmp_path / "one" / "checkpoints" / "last.pt")),
            Silent(),
        )
    assert (tmp_path / "two" / "summary.json").read_bytes() == before


@pytest.mark.slow
def test_files_that_no_run_wrote_are_not_deleted(beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.tmp").write_text("mine")
    (out / "report.html").write_text("mine")
    with pytest.raises(FastSSLError, match=r"holds report.html and is no run's folder; choose another --out"):
        pretrain(small("train.epochs=1"), options(beton, out), Silent())
    (out / "report.html").rename(out / "page.html")
    pretrain(small("train.epochs=1", "train.milestone_epochs=1"), options(beton, out), Silent())
    assert (out / "notes.tmp").read_text() == "mine"
    for path in (out / "checkpoints").glob("*.pt"):
        path.unlink()
    with pytest.raises(FastSSLError, match=r"holds milestones of an earlier run and no checkpoint"):
        pretrain(small("train.epochs=1"), options(beton, out), Silent())
    said = Silent()
    pretrain(small("train.epochs=1"), options(beton, out, resume="never"), said)
    assert any("of an earlier run" in text and "deleted" in text for text in said.messages) and not list(
        (out / "checkpoints").glob("epoch-*")
    )


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "summary.json", "checkpoints"])
def test_what_is_in_the_way_is_found_before_the_first_step(name: str, beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / name).write_text("") if name == "checkpoints" else os.mkfifo(out / name)
    with pytest.raises(
        FastSSLError, match="is no plain file" if name != "checkpoints" else "cannot write the run's folder"
    ):
        pretrain(small("train.epochs=1"), options(beton, out), Silent())


def test_a_configuration_that_cannot_be_read_does_not_stop_a_new_start(tmp_path: Path) -> None:
    """``--resume never`` asks it for the launch that wrote it, and then writes its own in its place."""
    (tmp_path / "config.yaml").write_text("launch: !!bool x")
    folder = run_folder.RunFolder(tmp_path, Silent().message)
    assert folder.open({"seed": 0}, "never", {}, lambda state: None) is None
    folder.close()
    assert (tmp_path / "config.yaml").read_text() == "seed: 0\nlaunch: {}\n"


@pytest.mark.slow
def test_rows_that_are_none_do_not_stop_the_report(beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(small("train.epochs=1"), options(beton, out), Silent())
    with (out / "metrics.jsonl").open("a") as file:
        file.write(
            '{"kind": "step", "step": 2}\n{"kind": "step", "step": 3, "seconds": "x", "data_wait": 0}\n{"a": '
            + "9" * 5000
            + "}\n"
        )
    assert pretrain(small("train.epochs=1"), options(beton, out), Silent())["steps"] == 6


# ------------------------------------------------------------------ killed while the folder is opened

#: What changes a folder, as Python's audit hooks name it; "open" does where it may write.
CHANGES = ("os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate", "open")


def a_finished_run(out: Path, damaged: bool) -> dict:
    """The folder of a run of twelve steps that keeps all it can; returns its settings."""
    config = {**recipe_to_dict(small()), "data": {"photos": "0"}, "val": None, "seed": 0}
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(parents=True)
    for step in (6, 8, 12):
        position = {"step": step, "epoch": step // 6, "step_in_epoch": step % 6, "train_seconds": 1.0}
        state = {"version": 2, "method": {}, "optimizer": {}, "position": position, "config": config}
        write_state(checkpoints / f"step-{step:08}.pt", state)
    if damaged:
        (checkpoints / "step-00000012.pt").write_bytes(b"damaged")
    os.link(checkpoints / "step-00000012.pt", checkpoints / "last.pt")
    os.link(checkpoints / "step-00000006.pt", checkpoints / "epoch-0001.pt")
    for name in (
        "checkpoints/epoch-0001.safetensors",
        "checkpoints/last.safetensors",
        "config.yaml",
        *run_folder._RESULTS,
    ):
        (out / name).write_text("of the run")
    (out / "metrics.jsonl").write_text("".join(f'{{"kind": "step", "step": {step}}}\n' for step in range(4, 13, 2)))
    (out / "nonfinite" / "step-00000002").mkdir(parents=True)
    (out / "nonfinite" / "step-00000002" / "step.json").write_text("{}")
    return config


def opened(out: Path, config: dict, resume: str) -> tuple[int | None, list[str], list[int]]:
    """Where the run goes on, the names of all files, and the steps that are on record."""
    folder = run_folder.RunFolder(out, lambda text: None)
    state = folder.open(config, resume, {}, lambda state: None)
    folder.close()
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    return state and state["position"]["step"], files, [row["step"] for row in folder.metrics.rows()]


def open_and_be_killed(out: Path, config: dict, resume: str, changes: int) -> None:
    """The process ends before the change of a file that follows the first ``changes`` of them, with nothing put in
    order.
    """
    left = [changes]

    def watch(event: str, arguments: tuple) -> None:
        if event not in CHANGES or not str(arguments[0]).startswith(str(out)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)

    sys.addaudithook(watch)
    opened(out, config, resume)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resume", "again"),
    [("never", "never"), ("step-00000008.pt", "step-00000008.pt"), ("step-00000008.pt", "auto"), ("damaged", "auto")],
)
def test_killed_between_any_two_changes_of_opening(resume: str, again: str, tmp_path: Path) -> None:
    def case(name: str) -> tuple[Path, dict, Callable[[str], str]]:
        out = tmp_path / name
        return (
            out,
            a_finished_run(out, resume == "damaged"),
            lambda what: str(out / "checkpoints" / what) if what.endswith(".pt") else what.replace("damaged", "auto"),
        )

    out, config, place = case("whole")
    expected = opened(out, config, place(resume))
    assert expected[0] == (None if resume == "never" else 8)
    untouched = opened(*case("finished")[:2], "auto") if again == "auto" and resume != "damaged" else None
    for changes in range(100):
        out, config, place = case(str(changes))
        status = in_child(open_and_be_killed, out, config, place(resume), changes).status
        assert opened(out, config, place(again)) in (expected, untouched), changes
        if status == 0:
            break
        assert status == 9
    assert changes > 8
