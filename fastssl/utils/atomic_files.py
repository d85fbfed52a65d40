"""Files that are whole or absent."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

#: what a file is called until it is whole
UNFINISHED = ".tmp"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary path)``, flush it to disk and rename it to ``path``: a reader sees the old file or the new
    one, also after a power cut. The file gets the usual permissions: safetensors writes for its owner's eyes only.
    Raises what ``write`` raises; an OSError names ``path``: of itself it says "No space left on device" and not where.
    """
    temporary = path.with_name(path.name + UNFINISHED)
    try:
        mode = usual_mode(temporary)
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        # Who keeps an exception keeps the frames that it went through, and they the file, open: its room on a full disk
        # would not come back.
        passed: BaseException | None = error
        while passed is not None:
            traceback.clear_frames(passed.__traceback__)
            passed = passed.__context__
        if not isinstance(error, OSError) or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        with suppress(OSError):  # a folder may be gone or read-only by now, and the first error is the one that matters
            temporary.unlink(missing_ok=True)


def usual_mode(path: Path) -> int:
    """The permissions that this process's umask gives to a new file; makes ``path``, an empty one."""
    path.unlink(missing_ok=True)
    path.touch()
    return path.stat().st_mode & 0o777


def link_atomically(source: Path, path: Path) -> None:
    """Make ``path`` a second name of the file ``source``, or where the file system has no such thing a copy of it, in
    the place of what is there.
    """
    temporary = path.with_name(path.name + UNFINISHED)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        write_atomically(path, lambda copy: copy.write_bytes(source.read_bytes()))
        return
    try:
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        # Renaming one name of a file to another name of it does nothing, and leaves both.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk: without that a renamed file may be lost with the power."""
    with suppress(OSError):  # not every file system lets a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_unfinished(folder: Path, *patterns: str) -> None:
    """Delete what a process that was killed left half-written in ``folder``, of files whose names match."""
    for path in (path for pattern in patterns for path in folder.glob(pattern + UNFINISHED)):
        with suppress(OSError):
            path.unlink()
