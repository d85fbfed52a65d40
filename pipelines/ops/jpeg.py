"""JPEG in and out, over the libjpeg-turbo that ``simplejpeg`` carries in its wheel.

Strict by intent: a picture with missing or damaged data raises ``JpegError`` instead of coming back half grey,
because a wrong picture in a training set is never noticed again. Every call releases the GIL while it decodes.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from fastssl.errors import JpegError
from fastssl.pipelines.ops.jpeg_header import count_scans, is_frame, segments, tidied

#: Above this a header is taken for a decompression bomb (a few KB that ask for GBs). It is also Pillow's own limit.
MAX_PIXELS = 178_956_970

#: Scans of a progressive JPEG, and scans times pixels: each costs a pass over all pixels however few bytes it has, and
#: 390 KB can keep a decoder busy for half a minute. Encoders write 10 or so; this budget is about two seconds.
MAX_SCANS, MAX_SCANNED_PIXELS = 100, 4_000_000_000

#: From this quality on the encoder keeps full colour resolution: whoever asks for it wants the colours too.
FULL_CHROMA_QUALITY = 95

#: What the strict decoder says of bytes that belong to nothing.
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x(\w\w)")

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


def decode(
    data: bytes | memoryview | np.ndarray,
    *,
    at_least: tuple[int, int] | None = None,
    repair: bool = True,
    header: JpegHeader | None = None,
) -> np.ndarray:
    """Decode to a new (H, W, 3) uint8 RGB array; grey pictures get three equal channels. ``JpegError``: not a JPEG,
    damaged, cut off, CMYK, or more than ``MAX_PIXELS``; or, without ``repair``, one that has to be `repaired`.

    ``at_least``: (height, width) in pixels; the decoder may then shrink the picture by itself to n/8, at most to half
    its size (in the DCT, several times cheaper), as long as neither side falls below. ``header``: what `read_header`
    said, if it was asked.
    """
    scale = {} if at_least is None else {"min_height": at_least[0], "min_width": at_least[1], "min_factor": 2}
    try:
        _checked_header(data, header)
        return _decoded(data, **scale)
    except JpegError:
        if not repair or (whole := repaired(data)) is None:
            raise
        return _decoded(whole, **scale)


def decode_into(data: bytes | memoryview | np.ndarray, out: np.ndarray) -> bool:
    """Decode into ``out``, (H, W, 3) uint8 C-contiguous and exactly of the picture's size; else as :func:`decode`.
    Returns whether the picture had to be `repaired` for it.

    After a ``JpegError`` the contents of ``out`` are undefined.
    """
    try:
        _strictly_into(data, out)
        return False
    except JpegError:
        if (whole := repaired(data)) is None:
            raise
        _strictly_into(whole, out)
        return True


def _strictly_into(data: bytes | memoryview | np.ndarray, out: np.ndarray) -> None:
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


def repaired(data: bytes | memoryview | np.ndarray) -> bytes | None:
    """A copy that the strict decoder takes without complaint and that has all the pixels: what it complained of were
    headers alone, or bytes that belong to nothing between the parts of the file. None: pixels are missing or damaged,
    or nobody could decode it.
    """
    whole = tidied(bytes(data))
    if whole is None:
        return None
    try:
        header = _checked_header(whole)
    except JpegError:
        return None
    # No more work than the picture with the most scans may make.
    left = MAX_SCANNED_PIXELS // (header.height * header.width * max(1, whole.count(b"\xff\xda")))
    while stray := _STRAY.search(complaint := _complaint(whole)):
        # So many bytes are passed over before such a marker. Which one: up to those in front of it, none were.
        count, marker = int(stray[1]), bytes([0xFF, int(stray[2], 16)])
        places = [found.start() for found in re.finditer(re.escape(marker), whole)]
        left -= 1 + len(places).bit_length()
        if not places or left < 0:
            return None
        up_to = lambda place, whole=whole: "extraneous" in _complaint(whole[:place] + b"\xff\xd9")  # noqa: E731
        place = places[bisect_left(places[:-1], True, key=up_to)]
        whole = whole[: place - count] + whole[place:]
    return None if complaint else whole


def _complaint(data: bytes) -> str:
    """Of the strict decoder; empty: none."""
    try:
        _decoded(data, min_height=1, min_width=1, min_factor=1)  # to an eighth: all of the data, less memory
    except JpegError as error:
        return str(error)
    return ""


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


def require_few_pixels(height: int, width: int) -> None:
    """``JpegError`` where a header asks for more than ``MAX_PIXELS``."""
    if height * width > MAX_PIXELS:
        raise JpegError(f"the header asks for {height}x{width} pixels, more than the limit of {MAX_PIXELS:,}")


def require_few_scans(data: bytes | memoryview | np.ndarray, pixels: int) -> None:
    """``JpegError`` where a picture of ``pixels`` is sent in so many passes that decoding it is an attack on our time.

    Sequential Huffman coding spends bits on every block of every scan: there the file's size is the bound.
    """
    data = bytes(data)  # single bytes of it are read several times as fast as an array's
    for marker, _, _ in segments(data):
        if is_frame(marker):
            if marker in (0xC0, 0xC1):  # sequential
                return
            break
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // max(1, pixels))
    # These bytes stand before each scan, and a few times elsewhere: in comments, and in films behind the picture.
    if data.count(b"\xff\xda") > most and (scans := count_scans(data)) > most:
        limit = f"{MAX_SCANS} and of {MAX_SCANNED_PIXELS:,} pixels in all of them"
        raise JpegError(f"comes in {scans} scans, more than the limit of {limit}")


def _checked_header(data: bytes | memoryview | np.ndarray, header: JpegHeader | None = None) -> JpegHeader:
    header = header or read_header(data)
    require_few_pixels(header.height, header.width)
    if header.colorspace not in DECODABLE:
        # libjpeg-turbo would turn it into RGB with a formula that ignores ink inversion: plausible, wrong colours.
        raise JpegError(f"the picture is {header.colorspace}: convert it to RGB first")
    require_few_scans(data, header.height * header.width)
    return header


def _cause(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
