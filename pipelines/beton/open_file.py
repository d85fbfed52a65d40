"""A file descriptor that outlives whoever closes its reader."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np


class OpenFile:
    """A file descriptor that is closed with the last reference to it: a thread that still reads keeps its file, whoever
    closes the reader.

    Closed in time, its number could be given to another file while a thread that the disk holds up is about to read
    from it.
    """

    def __init__(self, path: Path):
        self.descriptor = -1
        # A named pipe would wait here for its writer; a plain file knows nothing of the flag.
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        about = os.fstat(self.descriptor)
        self.num_bytes, self.plain = about.st_size, stat.S_ISREG(about.st_mode)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read_into(self, out: np.ndarray, offset: int) -> int:
        """Fill ``out``, 1-D uint8, from byte ``offset`` on; how many bytes there were, fewer than wanted at the end of
        the file only.
        """
        view, done = out.data, 0
        while done < len(view):
            got = os.preadv(self.descriptor, [view[done:]], offset + done)
            if got == 0:
                break
            done += got
        return done
