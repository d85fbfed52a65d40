"""A disk that is full when a test says so.

``mounted``: a tmpfs of its own, filled with a file and, for read-only, mounted again. Where mounting is not allowed, ``limited``: the kernel refuses writes
beyond a size (RLIMIT_FSIZE: EFBIG, as on a disk whose quota is used up), and read-only is a folder of another user's.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

#: An arbitrary user that is not root.
NOBODY = 65534


@dataclass
class SmallDisk:
    """The folder of the disk, and which way it was made."""

    folder: Path
    how: str
    limit: int | None = None
    strange: bool = False

    def fill(self, leave: int = 0, processes: tuple[int, ...] = ()) -> None:
        """Leave room for ``leave`` bytes more. ``limited``: in any file, for processes that are started from now on and for ``processes``."""
        if self.how == "limited":
            self.limit = leave
            for pid in processes:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (leave, resource.RLIM_INFINITY))
            return
        with open(self.folder / "filler", "wb", buffering=0) as file:
            with suppress(OSError):
                while True:
                    file.write(bytes(4096))
            file.truncate(max(0, file.tell() - leave))

    def empty(self, processes: tuple[int, ...] = ()) -> None:
        """There is room again."""
        if self.how == "limited":
            self.limit = None
            for pid in processes:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return
        (self.folder / "filler").unlink(missing_ok=True)

    def read_only(self) -> None:
        """Nothing may be written any more."""
        if self.how == "mounted":
            subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)
            return
        for path in (self.folder, *self.folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        self.strange = os.geteuid() == 0  # permissions do not stop root

    def writable(self) -> None:
        """It may again."""
        if self.how == "mounted":
            subprocess.run(["mount", "-o", "remount,rw", str(self.folder)], check=True)
            return
        for path in (self.folder, *self.folder.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        self.strange = False


@contextmanager
def small_disk(folder: Path, way: str, megabytes: int = 64) -> Iterator[SmallDisk]:
    """A disk at ``folder``; ``way`` is what is wanted, ``SmallDisk.how`` what it is: without the right to mount all are ``limited``."""
    folder.mkdir()
    mounted = way == "mounted" and (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True).returncode == 0
        if os.geteuid() == 0
        else False
    )
    try:
        yield SmallDisk(folder, "mounted" if mounted else "limited")
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


class Spoken:
    """What a child says, through a socket: on a full disk a log would be lost."""

    def __init__(self) -> None:
        self._mine, self.theirs = socket.socketpair()
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):
            while part := self._mine.recv(65536):
                self._parts.append(part)

    @property
    def text(self) -> str:
        return b"".join(self._parts).decode(errors="replace")

    def end(self) -> str:
        """All of it, once the child has ended."""
        self._reader.join(10)
        self._mine.close()
        return self.text


def speaking_child(command: list[str], said: socket.socket, disk: SmallDisk, patches: dict[str, object]) -> None:
    """``fastssl COMMAND`` in this process, on that disk. ``patches``: ``{"fastssl.saver._RETRY_S": 0.2}``."""
    import importlib

    os.environ["OMP_NUM_THREADS"] = "1"
    for number in (1, 2):
        os.dup2(said.fileno(), number)
    said.close()
    import sys

    import torch

    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 (for the life of the process)
    torch.set_num_threads(1)
    for name, value in patches.items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    from fastssl.cli import main

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if disk.limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk.limit, resource.RLIM_INFINITY))
    if disk.strange:
        os.seteuid(NOBODY)
    main(command)


#: What the kernel says of a disk that is full, in either way.
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG))
