"""The folder of a run: who may write into it, what is cleared, and which settings may be another when it goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from small_run import Silent, options, small

from fastssl import run_folder
from fastssl.recipe import recipe_to_dict
from fastssl.train import pretrain


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
