"""JPEG in and out, over the libjpeg-turbo that ``simplejpeg`` carries in its wheel.

Strict by intent: a picture with missing or damaged data raises ``JpegError`` instead of coming back half grey,
because a wrong picture in a training set is never noticed again. Every call releases the GIL while it decodes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from fastssl.errors import JpegError

#: Above this a header is taken for a decompression bomb (a few KB that ask for GBs). It is also Pillow's own limit.
MAX_PIXELS = 178_956_970

#: Scans of a progressive JPEG, and scans times pixels: each costs a pass over all pixels however few bytes it has, and
#: 390 KB can keep a decoder busy for half a minute. Encoders write 10 or so; this budget is about two seconds.
MAX_SCANS, MAX_SCANNED_PIXELS = 100, 4_000_000_000

#: From this quality on the encoder keeps full colour resolution: whoever asks for it wants the colours too.
FULL_CHROMA_QUALITY = 95

#: The colour spaces that :func:`decode` accepts.
DECODABLE = frozenset({"YCbCr", "Gray", "RGB"})


class JpegHeader(NamedTuple):
    """What a JPEG's first bytes say: pixels, colour space (YCbCr, Gray, RGB, CMYK, YCCK), subsampling ('420', ...)."""

    height: int
    width: int
    colorspace: str
    subsampling: str


def read_header(data: bytes | memoryview | np.ndarray) -> JpegHeader:
    """Read size and colour space without decoding (about 2 us). ``JpegError`` if ``data`` is not a JPEG."""
    try:
        return JpegHeader(*simplejpeg.decode_jpeg_header(data))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise JpegError(f"not a readable JPEG ({len(data)} bytes): {_cause(error)}") from None


def decode(data: bytes | memoryview | np.ndarray, *, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """Decode to a new (H, W, 3) uint8 RGB array; grey pictures get three equal channels. ``JpegError``: not a JPEG,
    damaged, cut off, CMYK, or more than ``MAX_PIXELS``.

    ``at_least``: (height, width) in pixels; the decoder may then shrink the picture by itself to n/8, at most to half
    its size (in the DCT, several times cheaper), as long as neither side falls below.
    """
    _checked_header(data)
    scale = {} if at_least is None else {"min_height": at_least[0], "min_width": at_least[1], "min_factor": 2}
    return _decoded(data, **scale)


def decode_into(data: bytes | memoryview | np.ndarray, out: np.ndarray) -> None:
    """Decode into ``out``, (H, W, 3) uint8 C-contiguous and exactly of the picture's size; else as :func:`decode`.

    After a ``JpegError`` the contents of ``out`` are undefined.
    """
    header = _checked_header(data)
    if out.shape != (header.height, header.width, 3) or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise JpegError(
            f"the picture is {header.height}x{header.width}, the buffer {'x'.join(map(str, out.shape))} {out.dtype}: "
            "give a C-contiguous uint8 buffer of (height, width, 3)"
        )
    _decoded(data, buffer=out)


def _decoded(data: bytes | memoryview | np.ndarray, **options: Any) -> np.ndarray:
    try:
        rgb: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, **options)
    except (ValueError, MemoryError) as error:
        raise JpegError(f"damaged JPEG: {_cause(error)}") from None
    return rgb


def encode(rgb: np.ndarray, quality: int) -> bytes:
    """Encode (H, W, 3) uint8 RGB as a baseline JPEG: 4:2:0, or 4:4:4 from quality 95 on. Same pixels, same bytes."""
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise JpegError(f"cannot encode {rgb.shape} {rgb.dtype}: expected (height, width, 3) uint8")
    if not 1 <= quality <= 100:
        raise JpegError(f"JPEG quality is 1 to 100, not {quality}")
    pixels, chroma = np.ascontiguousarray(rgb), "444" if quality >= FULL_CHROMA_QUALITY else "420"
    try:
        data: bytes = simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling=chroma)
    except ValueError as error:
        raise JpegError(f"cannot encode a {rgb.shape[0]}x{rgb.shape[1]} picture as JPEG: {_cause(error)}") from None
    return data


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 (upright) to 8; 1 when it has none or its EXIF block is damaged (EXIF 2.3, tag
    0x0112).
    """
    view = memoryview(data)
    for marker, at, end in _segments(view):
        if marker == 0xE1 and view[at : at + 6] == b"Exif\0\0":
            return _tiff_orientation(bytes(view[at + 6 : end]))
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4], "not a TIFF")
    with suppress(struct.error):  # that, or cut off
        directory = struct.unpack_from(f"{order}I", tiff, 4)[0]
        for entry in range(struct.unpack_from(f"{order}H", tiff, directory)[0]):
            tag, kind, _, value = struct.unpack_from(f"{order}HHI4s", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112:
                # A SHORT by the standard; some cameras write a LONG.
                orientation: int = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", value)[0]
                return orientation if 1 <= orientation <= 8 else 1
    return 1


def require_few_pixels(height: int, width: int) -> None:
    """``JpegError`` where a header asks for more than ``MAX_PIXELS``."""
    if height * width > MAX_PIXELS:
        raise JpegError(f"the header asks for {height}x{width} pixels, more than the limit of {MAX_PIXELS:,}")


def require_few_scans(data: bytes | memoryview | np.ndarray, pixels: int) -> None:
    """``JpegError`` where a picture of ``pixels`` is sent in so many passes that decoding it is an attack on our time.

    Sequential Huffman coding spends bits on every block of every scan: there the file's size is the bound.
    """
    data = bytes(data)  # single bytes of it are read several times as fast as an array's
    for marker, _, _ in _segments(data):
        # Tables, reserved, and conditioning have markers among those that open a frame.
        if marker & 0xF0 == 0xC0 and marker not in (0xC4, 0xC8, 0xCC):
            if marker in (0xC0, 0xC1):  # sequential
                return
            break
    # 0xFF is followed by 0 in coded data: this is a marker, or a few bytes of a comment.
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
        limit = f"{MAX_SCANS} and of {MAX_SCANNED_PIXELS:,} pixels in all of them"
        raise JpegError(f"comes in {scans} scans, more than the limit of {limit}")


def _segments(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """(second byte of the marker, where the content begins, where it ends) of what stands in front of the picture; it
    stops at what is not plain what a decoder takes for that.
    """
    at, end = 2, len(data) - 3
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # stand alone, without a length
            at += 2
        elif marker in (0xD9, 0xDA):  # end, or start of the picture
            return
        else:
            start, at = at + 4, at + 2 + max(2, data[at + 2] << 8 | data[at + 3])
            yield marker, start, at


def _checked_header(data: bytes | memoryview | np.ndarray) -> JpegHeader:
    header = read_header(data)
    require_few_pixels(header.height, header.width)
    if header.colorspace not in DECODABLE:
        # libjpeg-turbo would turn it into RGB with a formula that ignores ink inversion: plausible, wrong colours.
        raise JpegError(f"the picture is {header.colorspace}: convert it to RGB first")
    require_few_scans(data, header.height * header.width)
    return header


def _cause(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
