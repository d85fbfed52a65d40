"""JPEG in and out, over the libjpeg-turbo that ``simplejpeg`` carries in its wheel.

Strict by intent: a picture with missing or damaged data raises ``JpegError`` instead of coming back half grey,
because a wrong picture in a training set is never noticed again. Every call releases the GIL while it decodes.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import simplejpeg

from fastssl.errors import JpegError

#: Above this a header is taken for a decompression bomb (a few KB that ask for GBs). It is also Pillow's own limit.
MAX_PIXELS = 178_956_970

#: Scans of a progressive JPEG, and scans times pixels. The standard allows thousands of scans, and each costs a pass
#: over all pixels however few bytes it has: 390 KB can keep a decoder busy for half a minute. Encoders write 10 or so;
#: this budget is about two seconds.
MAX_SCANS, MAX_SCANNED_PIXELS = 100, 4_000_000_000

#: From this quality on the encoder keeps full colour resolution: whoever asks for it wants the colours too.
FULL_CHROMA_QUALITY = 95

#: The colour spaces that :func:`decode` accepts.
DECODABLE = frozenset({"YCbCr", "Gray", "RGB"})


class JpegHeader(NamedTuple):
    """What the first bytes of a JPEG say: sizes in pixels, colour space (YCbCr, Gray, RGB, CMYK, YCCK), subsampling
    ('420', ...).
    """

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
    """Decode to a new (H, W, 3) uint8 RGB array; grey pictures get three equal channels.

    ``at_least``: (height, width) in pixels; the decoder may then shrink the picture by itself to n/8, at most to half
    its size (in the DCT, several times cheaper), as long as neither side falls below.

    Raises:
        JpegError: not a JPEG, damaged, cut off, CMYK, or more than ``MAX_PIXELS``.
    """
    _checked_header(data)
    scale = {} if at_least is None else {"min_height": at_least[0], "min_width": at_least[1], "min_factor": 2}
    try:
        rgb: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, **scale)
    except (ValueError, MemoryError) as error:
        raise JpegError(f"damaged JPEG: {_cause(error)}") from None
    return rgb


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
    try:
        simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out, strict=True)
    except (ValueError, MemoryError) as error:
        raise JpegError(f"damaged JPEG: {_cause(error)}") from None


def encode(rgb: np.ndarray, quality: int) -> bytes:
    """Encode (H, W, 3) uint8 RGB as a baseline JPEG: 4:2:0, or 4:4:4 from quality 95 on. Same pixels, same bytes."""
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise JpegError(f"cannot encode {rgb.shape} {rgb.dtype}: expected (height, width, 3) uint8")
    if not 1 <= quality <= 100:
        raise JpegError(f"JPEG quality is 1 to 100, not {quality}")
    subsampling = "444" if quality >= FULL_CHROMA_QUALITY else "420"
    try:
        data: bytes = simplejpeg.encode_jpeg(
            np.ascontiguousarray(rgb), quality=quality, colorspace="RGB", colorsubsampling=subsampling
        )
    except ValueError as error:
        raise JpegError(f"cannot encode a {rgb.shape[0]}x{rgb.shape[1]} picture as JPEG: {_cause(error)}") from None
    return data


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 1 (upright) to 8; 1 when it has none or its EXIF block is damaged (EXIF 2.3, tag
    0x0112).
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in (0xD9, 0xDA):  # end, or start of the picture: no headers behind it
            break
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return _tiff_orientation(data[at + 10 : at + 2 + length])
        at += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    order: Literal["little", "big"] = "little" if tiff[:1] == b"I" else "big"
    directory = int.from_bytes(tiff[4:8], order)
    entries = int.from_bytes(tiff[directory : directory + 2], order)
    for at in range(directory + 2, min(directory + 2 + 12 * entries, len(tiff) - 11), 12):
        if int.from_bytes(tiff[at : at + 2], order) == 0x0112:
            # A SHORT by the standard; some cameras write a LONG.
            width = 4 if int.from_bytes(tiff[at + 2 : at + 4], order) == 4 else 2
            value = int.from_bytes(tiff[at + 8 : at + 8 + width], order)
            return value if 1 <= value <= 8 else 1
    return 1


def require_few_scans(data: bytes | memoryview | np.ndarray, pixels: int) -> None:
    """``JpegError`` where a picture of ``pixels`` is sent in so many passes that decoding it is an attack on our time.

    Sequential Huffman coding spends bits on every block of every scan, so there the file's size is the bound, and
    nothing is looked for.
    """
    view = memoryview(data).cast("B")  # type: ignore[arg-type]  # arrays are buffers, by NumPy's types from 3.12 on
    if _frame_marker(view) in (0xC0, 0xC1):
        return
    # 0xFF is followed by 0 in coded data: this is a marker, or a few bytes of a comment.
    scans = bytes(view).count(b"\xff\xda")
    if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
        raise JpegError(
            f"comes in {scans} scans, more than the limit of {MAX_SCANS} and of {MAX_SCANNED_PIXELS:,} pixels "
            "in all of them"
        )


def _frame_marker(data: memoryview) -> int | None:
    """The second byte of the marker that opens the frame, 0xC0 (baseline) to 0xCF; None where it is not plain what a
    decoder takes for it.
    """
    at, end = 2, len(data) - 3
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # stand alone, without a length
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # tables, reserved, conditioning
            return marker
        elif marker in (0xD9, 0xDA):
            return None
        else:
            at += 2 + max(2, data[at + 2] << 8 | data[at + 3])
    return None


def _checked_header(data: bytes | memoryview | np.ndarray) -> JpegHeader:
    header = read_header(data)
    if header.height * header.width > MAX_PIXELS:
        raise JpegError(
            f"the header asks for {header.height}x{header.width} pixels, more than the limit of {MAX_PIXELS:,}"
        )
    if header.colorspace not in DECODABLE:
        # libjpeg-turbo would turn it into RGB with a formula that ignores ink inversion: plausible, wrong colours.
        raise JpegError(f"the picture is {header.colorspace}: convert it to RGB first")
    require_few_scans(data, header.height * header.width)
    return header


def _cause(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
