"""Files that are whole or absent, and may be read by others."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from power import Disk

from fastssl.models.backbones import create_backbone, save_backbone
from fastssl.utils.atomic_files import link_atomically, write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_checkpoint_may_be_read_by_whom_any_new_file_may(mask: int, tmp_path: Path) -> None:
    (tmp_path / "last.safetensors.tmp").touch(0o400)  # left by a process that was killed
    before = os.umask(mask)
    try:
        save_backbone(create_backbone("lcnet_035"), tmp_path / "last.safetensors", arch="lcnet_035")
    finally:
        assert os.umask(before) == mask
    assert stat.S_IMODE((tmp_path / "last.safetensors").stat().st_mode) == 0o666 & ~mask


def test_an_error_of_the_disk_names_the_file_that_was_meant(tmp_path: Path) -> None:
    """Of itself a write says "No space left on device", and a rename speaks of the temporary name."""

    def full(temporary: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for write in (full, lambda temporary: (tmp_path / "absent" / "file").write_text("")):
        with pytest.raises(OSError, match=r"results\.json'$") as error:
            write_atomically(tmp_path / "results.json", write)
        assert ".tmp" not in str(error.value)
    with pytest.raises(OSError, match="no errno"):
        write_atomically(tmp_path / "results.json", lambda temporary: (_ for _ in ()).throw(OSError("no errno")))
    assert not list(tmp_path.iterdir())


def test_an_error_that_is_kept_keeps_no_file_open(tmp_path: Path) -> None:
    """A file without a name that is still open takes room on the disk that is full already."""

    def inner(temporary: Path) -> None:
        file = open(temporary, "wb")  # noqa: SIM115 (as torch's writer, which does not close it)
        file.write(bytes(1 << 16))
        raise RuntimeError("no room")

    def half(temporary: Path) -> None:
        try:
            inner(temporary)
        except RuntimeError:
            raise RuntimeError("cannot end the file") from None

    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError) as kept:
        write_atomically(tmp_path / "last.pt", half)
    assert set(os.listdir("/proc/self/fd")) == before and "cannot end" in str(kept.value)


def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    write_atomically(tmp_path / "a", lambda path: path.write_text("all of it"))
    link_atomically(tmp_path / "a", tmp_path / "b")
    assert disk.events == [
        ("fsync", "a.tmp"),
        ("rename", "a"),
        ("fsync", tmp_path.name),
        ("rename", "b"),
        ("fsync", tmp_path.name),
    ]
    assert not disk.problems and not disk.lost_names


def test_what_is_not_on_the_disk_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    for name in ("a", "b"):
        (tmp_path / "new").write_text(name)
        if name == "b":
            with open(tmp_path / "new", "a") as file:
                os.fsync(file.fileno())
                file.write("more")
        os.replace(tmp_path / "new", tmp_path / name)
    assert disk.problems == ["a", "b"] and disk.lost_names == ["b"]
