"""The growing file beside the result, and how results take their names."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastssl.pipelines.convert.options import ConvertError
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.deadline import threads_given_up


@contextmanager
def reserve(dst: Path) -> Iterator[Path]:
    """Yield the path of the unfinished file, held against a second conversion to the same place."""
    partial = Path(f"{dst}.partial")
    existed = partial.exists()
    try:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConvertError(f"{partial}: cannot write: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConvertError(f"{partial}: another conversion is writing it") from None
        except OSError:
            pass  # a file system without locks
        yield partial
    finally:
        # Closing waits for what is on its way to the disk, also to one that will never take it.
        if not threads_given_up():
            os.close(handle)
            if not existed and partial.exists() and partial.stat().st_size == 0:
                partial.unlink()


def write_or_remove(path: Path, text: str) -> None:
    """Write ``text`` to ``path``; an empty text removes the file."""
    if text:
        write_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
    else:
        path.unlink(missing_ok=True)
