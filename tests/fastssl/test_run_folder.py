"""The folder of a run: who may write into it, what is cleared, and which settings may be another when it goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from small_run import Silent, options, rows, same, small, state

from fastssl import run_folder
from fastssl.pipelines.errors import FastSSLError
from fastssl.recipe import recipe_to_dict
from fastssl.train import Run, pretrain


def test_all_free_keys_exist() -> None:
    """A key that was renamed would silently decide again."""
    config = recipe_to_dict(small())
    for key in run_folder._FREE - {"data.name", "val"}:
        section, name = key.split(".")
        assert name in config[section], key
    assert all(section in config for section in run_folder._FREE_SECTIONS)


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


def test_going_back_to_an_older_step_holds_also_if_that_start_is_killed(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve steps are made; the run is set back to step 8, killed before its first checkpoint, and started as usual."""
    out, original = tmp_path / "run", Run._step
    pretrain(small("train.checkpoint_minutes=0", "train.keep_last=9"), options(beton, out), Silent())
    whole = state(out)
    assert (out / "summary.json").exists()

    def crash(run: Run, batch: object) -> object:
        if run.position.step == 9:
            raise KeyError("killed")
        return original(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_step", crash)
        with pytest.raises(KeyError):
            pretrain(small(), options(beton, out, resume=str(out / "checkpoints" / "step-00000008.pt")), Silent())
    assert not (out / "summary.json").exists(), "of the run that was finished"
    said = Silent()
    pretrain(small(), options(beton, out), said)
    assert any("resumed at step 8" in text for text in said.messages) and same(state(out), whole)
    steps = [row["step"] for row in rows(out) if row["kind"] == "step"]
    assert steps == [*range(1, 9), 10, 12]


def test_a_checkpoint_of_elsewhere_is_not_mixed_with_another_run(beton: Path, tmp_path: Path) -> None:
    pretrain(small("train.epochs=1"), options(beton, tmp_path / "one"), Silent())
    pretrain(small("train.epochs=1"), options(beton, tmp_path / "two", seed=1), Silent())
    before = (tmp_path / "two" / "summary.json").read_bytes()
    with pytest.raises(FastSSLError, match=r"two: holds another run; for --resume .* choose another --out"):
        pretrain(
            small("train.epochs=1"), options(beton, tmp_path / "two", resume=str(tmp_path / "one" / "checkpoints" / "last.pt")), Silent()
        )
    assert (tmp_path / "two" / "summary.json").read_bytes() == before


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
    assert any("were deleted" in text for text in said.messages) and not list((out / "checkpoints").glob("epoch-*"))


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "summary.json", "checkpoints"])
def test_what_is_in_the_way_is_found_before_the_first_step(name: str, beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / name).write_text("") if name == "checkpoints" else os.mkfifo(out / name)
    with pytest.raises(FastSSLError, match="is no plain file" if name != "checkpoints" else "cannot write the run's folder"):
        pretrain(small("train.epochs=1"), options(beton, out), Silent())


def test_rows_that_are_none_do_not_stop_the_report(beton: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pretrain(small("train.epochs=1"), options(beton, out), Silent())
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 2}\n{"kind": "step", "step": 3, "seconds": "x", "data_wait": 0}\n{"a": ' + "9" * 5000 + "}\n")
    assert pretrain(small("train.epochs=1"), options(beton, out), Silent())["steps"] == 6
