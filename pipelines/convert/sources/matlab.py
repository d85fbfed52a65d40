"""What ImageNet's devkit says only in MATLAB's format: which class has which number (``data/meta.mat``)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import islice

#: Letters of `struct` for the format's types of numbers; 16 is text. Element 14 holds others, 15 is compressed.
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q", 16: "B"}
_MATRIX, _COMPRESSED = 14, 15
#: Bytes that all elements may uncompress to; the devkit's has half a megabyte.
_MOST = 64 << 20


def read_synsets(data: bytes) -> dict[int, str]:
    """``meta.mat`` -> the WNID of each ILSVRC2012_ID. ``ValueError``: it is not that file, or damaged."""
    if data[124:128] != b"\x00\x01IM":
        raise ValueError("not a MATLAB file of version 5, little-endian")
    try:
        for _, body in _elements(data[128:], _MOST):
            parts = [content for _, content in islice(_elements(body), 5)]
            if len(parts) == 5 and parts[2] == b"synsets":
                width, names = struct.unpack("<i", parts[3])[0], parts[4]
                fields = [names[k : k + width].rstrip(b"\0") for k in range(0, len(names), width)]
                values = [content for _, content in islice(_elements(body), 5, None)]
                ids, wnids = (values[fields.index(name) :: len(fields)] for name in (b"ILSVRC2012_ID", b"WNID"))
                return {int(_array(one)[0]): "".join(map(chr, _array(wnid))) for one, wnid in zip(ids, wnids)}
    except (
        struct.error,
        zlib.error,
        LookupError,
        StopIteration,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(f"damaged ({type(error).__name__}: {error})") from None
    raise ValueError("it has no 'synsets'")


def _elements(data: bytes, room: int = 0) -> Iterator[tuple[int, bytes]]:
    """(type, content) of each; of compressed ones, of those in them, which take ``room`` bytes at most."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        start, step = at + 8, 8 + size + (-size % 8 if kind != _COMPRESSED else 0)
        if kind >> 16:  # a small one: type, size and content share eight bytes
            kind, size, start, step = kind & 0xFFFF, kind >> 16, at + 4, 8
        content = data[start : start + size]
        if len(content) < size:
            raise ValueError("cut off")
        if kind == _COMPRESSED:
            if room <= 0:  # compressed twice, or without end
                raise ValueError("more compressed than such a file holds")
            unpacked = zlib.decompressobj().decompress(content, room)
            room -= len(unpacked)
            yield from _elements(unpacked)
        else:
            yield kind, content
        at += step


def _array(matrix: bytes) -> tuple:
    """The numbers, or the letters' numbers, of a matrix: the element behind its flags, shape and name."""
    kind, content = next(islice(_elements(matrix), 3, None))
    letter = _NUMBERS[kind]
    return struct.unpack(f"<{len(content) // struct.calcsize(letter)}{letter}", content)
