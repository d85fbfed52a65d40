"""A disk that is full when a test says so.

``mounted``: a tmpfs of its own, filled with a file and, for read-only, mounted again. Where mounting is not allowed,
``limited``: the kernel refuses writes beyond a size (RLIMIT_FSIZE: EFBIG, as on a disk whose quota is used up), and
read-only are the calls that open, rename and link files there.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass
class SmallDisk:
    """The folder of the disk, and which way it was made."""

    folder: Path
    how: str
    limit: int | None = None
    covered: bool = False

    def fill(self, leave: int = 0, processes: tuple[int, ...] = ()) -> None:
        """Leave room for ``leave`` bytes more. ``limited``: in any file, for processes that are started from now on and
        for ``processes``.
        """
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
        if (
            self.how == "mounted"
        ):  # a second, read-only view of it on top: the first one is busy while a lock file is open
            subprocess.run(["mount", "--bind", str(self.folder), str(self.folder)], check=True)
            self.covered = True
            # Busy while the run has a file open for writing through it; it seldom has.
            command, deadline = ["mount", "-o", "remount,bind,ro", str(self.folder)], time.monotonic() + 30
            while subprocess.run(command, capture_output=True, check=time.monotonic() > deadline).returncode:
                time.sleep(0.02)
            return
        self.flag.touch()

    def writable(self) -> None:
        """It may again."""
        if self.covered:
            subprocess.run(["umount", str(self.folder)], check=True)
            self.covered = False
        if self.how == "mounted":
            return
        self.flag.unlink(missing_ok=True)

    @property
    def flag(self) -> Path:
        """``limited``: nothing may be written while this file is there."""
        return self.folder.with_name(self.folder.name + ".read-only")


@contextmanager
def small_disk(folder: Path, way: str, megabytes: int = 16) -> Iterator[SmallDisk]:
    """A disk at ``folder``; ``way`` is what is wanted, ``SmallDisk.how`` what it is: without the right to mount all are
    ``limited``.
    """
    folder.mkdir()
    mounted = way == "mounted" and (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True
        ).returncode
        == 0
        if os.geteuid() == 0
        else False
    )
    disk = SmallDisk(folder, "mounted" if mounted else "limited")
    try:
        yield disk
    finally:
        disk.writable()
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
    """``fastssl COMMAND`` in this process, on that disk. ``patches``: ``{"fastssl.runs.saver._RETRY_S": 0.2}``."""
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
    if disk.how == "limited":
        refuse_while(disk)
    main(command)


def refuse_while(disk: SmallDisk) -> None:
    """Let the calls that change a folder fail in this process while ``disk.flag`` is there, as the kernel does on a
    read-only disk.
    """

    def guarded(function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            writes = function is not os.open or args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            inside = any(str(arg).startswith(f"{disk.folder}/") for arg in args)
            if writes and inside and os.path.exists(disk.flag):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))
            return function(*args, **kwargs)

        return call

    for name in ("open", "replace", "link", "mkdir"):
        setattr(os, name, guarded(getattr(os, name)))


#: What the kernel says of a disk that is full, in either way.
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG))
