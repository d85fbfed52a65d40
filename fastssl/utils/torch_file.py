"""What ``torch.save`` writes, and what a file of that name may be instead."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

from fastssl.errors import FastSSLError

#: what ``torch.load(weights_only=True)`` raises at files that are damaged, or that ``torch.save`` did not write
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
    OSError,
    MemoryError,
)


def require_stored_as_is(path: Path) -> None:
    """``torch.save`` packs its parts into a zip archive without compressing them. One that is compressed can become a
    thousand times as large in memory.

    Raises:
        FastSSLError: a compressed or encrypted part, or parts that are larger in all than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, *UNREADABLE, NotImplementedError):
        return  # another format, or damaged: the reader itself will say
    if odd := [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1]:
        raise FastSSLError(
            f"{path}: {len(odd)} of its parts are compressed, which torch.save never does; save it again with "
            "torch.save"
        )
    if (claimed := sum(part.file_size for part in parts)) > (size := path.stat().st_size):
        raise FastSSLError(f"{path}: damaged: its parts should have {claimed:,} bytes, the file has {size:,}")
