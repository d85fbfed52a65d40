"""Files that come along: whole, or one clear line, and never a wait."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastssl.errors import FastSSLError
from fastssl.utils.plain_file import read_plain


def test_what_is_there_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 4)
    assert read_plain(path, 1024) == path.read_bytes()
    with pytest.raises(FastSSLError, match=r"a: is longer than 0 KiB$"):
        read_plain(path, 1023)
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "b", 1024)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_has_no_end_is_not_begun(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    {"pipe": os.mkfifo, "device": lambda at: at.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](path)
    with pytest.raises(FastSSLError, match=r"a: is not a plain file$"):
        read_plain(path, 1 << 20)


def test_holes_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(FastSSLError, match="a: is longer than 2 MiB"):
        read_plain(path, 2 << 20)
