"""What a power cut would leave: which bytes and names a program has brought to the disk, and when. A kill does not
tell, as the system keeps what was written.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest


class Disk:
    """Follows ``os.fsync`` and ``os.replace``, from any thread.

    Attributes:
        events: ("fsync" or "rename", name of the file or folder, under which it was opened or is known afterwards), in
            order.
        problems: files that took their name before all their bytes were on the disk.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.events: list[tuple[str, str]] = []
        self.problems: list[str] = []
        self._files: dict[tuple[int, int], tuple[int, int]] = {}
        self._folders: dict[tuple[int, int], str] = {}
        self._real = os.fsync, os.replace
        patch.setattr(os, "fsync", self._fsync)
        patch.setattr(os, "replace", self._replace)

    @property
    def lost_names(self) -> list[str]:
        """The last file that was renamed in each folder which was not brought to the disk behind it."""
        return list(self._folders.values())

    def _fsync(self, descriptor: int) -> None:
        self._real[0](descriptor)
        about = os.fstat(descriptor)
        self.events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        if stat.S_ISDIR(about.st_mode):
            self._folders.pop((about.st_dev, about.st_ino), None)
        else:
            self._files[about.st_dev, about.st_ino] = about.st_size, about.st_mtime_ns

    def _replace(self, source: str | os.PathLike, path: str | os.PathLike) -> None:
        path = Path(path)
        about, folder = os.stat(source), os.stat(path.parent)
        if self._files.get((about.st_dev, about.st_ino)) != (about.st_size, about.st_mtime_ns):
            self.problems.append(path.name)
        self._real[1](source, path)
        self.events.append(("rename", path.name))
        self._folders[folder.st_dev, folder.st_ino] = path.name
