"""Pictures of more than 8 bits a channel as 8 bits, by the range that they use: 12 bits in 16 keep their grey levels.

Pillow gives grey pictures whole, but of 16-bit colours the high bytes alone. The low ones come from a second look at
the file, in which its pixels are said to be of the other byte order.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from fastssl.errors import JpegError

_DEPTHS = (8, 10, 12, 14, 16)
#: What a picture was mapped from, as the summary says it; by number, from 1 on.
RANGES = (
    *(f"0..{2**bits - 1}" for bits in _DEPTHS),
    "0..1",
    "the lowest to the highest value of each",
    "the range that each names",
    "the range that was given",
)
_ZERO_TO_ONE, _OWN, _NAMED, _GIVEN = range(6, 10)
_OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
_REMEDY = "save it with 8 bits a channel"


def load(image: ImageFile.ImageFile, data: bytes, given: tuple[float, float] | None) -> tuple[Image.Image, int]:
    """Load a picture that was opened; (it with 8 bits a channel, what it was mapped from as a number of ``RANGES``; 0:
    it has no more). ``JpegError``: some values are no numbers, or Pillow does not give them.

    Whole numbers up to 65535 are mapped from 0 to the end of the smallest of the first five ``RANGES`` that holds them,
    unless the file itself names its range; others from their lowest to their highest value, floats within 0 and 1 from
    0 to 1. ``given``: (low, high) for all.
    """
    raw = _mended(image)
    tags = getattr(image, "tag_v2", {})
    bits = _jpeg2000_bits(data) if image.format == "JPEG2000" else int(np.max(tags.get(258, 8)))
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.dtype == np.int32 and np.max(tags.get(339, 2)) == 1:
            values = values.view(np.uint32)
    elif image.mode in ("RGB", "RGBA") and (";16" in raw or bits > 8):
        if tags.get(284) == 2:
            raise JpegError(f"{bits} bits a channel in separate planes, which Pillow misreads: {_REMEDY}")
        values = _colours(image, data, raw, bits, given)
    else:
        return image, 0
    height, width = values.shape[:2]
    values = values.reshape(height, width, -1)
    alpha = values[..., -1] if values.shape[2] in (2, 4) else None
    values = values if alpha is None else values[..., :-1]
    low, high, which = _range(values, given, _named(image.format, data, raw, bits, tags))
    mapped = _mapped(values, low, high)
    if tags.get(262) == 0:  # white is zero
        mapped = 255 - mapped
    clear = image.info.get("transparency")
    if alpha is not None:
        alpha = _mapped(alpha, 0, _holding(int(alpha.max())))
    elif isinstance(clear, (int, tuple)):
        alpha = np.where((values == clear).all(2), 0, 255).astype(np.uint8)
    colours = mapped if mapped.shape[2] == 3 else mapped.repeat(3, 2)
    return Image.fromarray(colours if alpha is None else np.dstack([colours, alpha])), which


def _mended(image: ImageFile.ImageFile) -> str:
    """Pillow's word for the pixels in an opened file, ``RGB;16B``, set right where Pillow errs."""
    if not image.tile:
        return ""
    codec, _, _, arguments = image.tile[0]
    raw = arguments if isinstance(arguments, str) else str((arguments or [""])[0])
    if codec == "ppm" and arguments == ("RGB", 65535):  # or it would keep the high bytes alone
        image.tile, raw = [image.tile[0]._replace(codec_name="raw", args="RGB;16B")], "RGB;16B"
    elif codec == "libtiff" and raw in ("I;16BS", "I;32BS", "F;32BF"):  # libtiff has given them our byte order already
        raw = raw.replace("B", "N")
        _call_pixels(image, raw)
    return raw


def _call_pixels(image: ImageFile.ImageFile, raw: str) -> None:
    image.tile = [
        tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in image.tile
    ]


def _colours(
    image: ImageFile.ImageFile, data: bytes, raw: str, bits: int, given: tuple[float, float] | None
) -> np.ndarray:
    """(H, W, C) uint16 of a loaded picture that Pillow reduced to 8 bits."""
    values = np.asarray(image).astype(np.uint16)
    if raw[:-1].endswith(";16") and not raw.startswith("RGBa"):
        # Grey and its alpha make four bytes, as four channels of 8 bits do.
        twin = "RGBA" if raw.startswith("LA") else raw[:-1] + _OTHER_ORDER[raw[-1]]
        again = Image.open(io.BytesIO(data), formats=(str(image.format),))
        _mended(again)
        _call_pixels(again, twin)
        low = np.asarray(again)
        if twin == "RGBA":
            values, low = low[..., 0::2].astype(np.uint16), low[..., 1::2]
        values <<= 8
        values |= low
        return values
    if given is not None or (bits == 16 and values[..., :3].max() < 64):
        # What Pillow leaves of 14 bits and less is too dark and too coarse.
        raise JpegError(f"{bits} bits a channel, of which Pillow gives 8 in this kind of file: {_REMEDY}")
    values *= 257
    return values


def _range(
    values: np.ndarray, given: tuple[float, float] | None, named: list[tuple[float, float]]
) -> tuple[float, float, int]:
    """(low, high, number of ``RANGES``)"""
    lowest, highest = float(values.min()), float(values.max())
    if not np.isfinite([lowest, highest]).all():
        raise JpegError("infinite pixels, or some that are no numbers: replace them first")
    if given is not None:
        return *given, _GIVEN
    if fitting := [(low, high) for low, high in named if low <= lowest and highest <= high]:
        low, high = fitting[0]
        word = f"{low:g}..{high:g}"
        return low, high, 1 + RANGES.index(word) if word in RANGES else _NAMED
    if values.dtype.kind == "f" and lowest >= 0 and highest <= 1:
        return 0, 1, _ZERO_TO_ONE
    if values.dtype.kind == "f" or lowest < 0 or highest > 0xFFFF:
        return lowest, highest, _OWN
    high = _holding(int(highest))
    return 0, high, 1 + RANGES.index(f"0..{high}")


def _holding(highest: int) -> int:
    return next(1 << bits for bits in _DEPTHS if highest < 1 << bits) - 1


def _named(form: str | None, data: bytes, raw: str, bits: int, tags: Any) -> list[tuple[float, float]]:
    """The ranges that a file names for itself; the first that holds all values counts."""
    full = (0.0, 65535.0)
    if form == "PNG" and (at := data.find(b"sBIT", 0, data.find(b"IDAT"))) > 0 and 8 <= data[at + 4] < 16:
        return [(0, 2 ** data[at + 4] - 1), full]  # by the standard such values are spread over all 16 bits
    # PPM: with any end but 65535, Pillow has mapped it to that.
    if (form == "PPM" and raw == "L") or (form == "JPEG2000" and bits < 16):
        return [full]
    if 341 in tags and np.max(tags[341]) < 2**bits - 1:  # which would say nothing
        return [(float(np.min(tags.get(340, 0))), float(np.max(tags[341])))]
    return [(0, 2**bits - 1)] if 8 < bits < 16 else []


def _mapped(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """``low``..``high`` to 0..255, uint8, rounded."""
    out = np.empty(values.shape, np.uint8)
    scale = 255 / (high - low) if high > low else 0.0
    for top in range(0, len(values), 64):  # by rows: 8 bytes a value are many for a whole picture
        part = (values[top : top + 64].astype(np.float64) - low) * scale
        out[top : top + 64] = np.rint(part.clip(0, 255))
    return out


def _jpeg2000_bits(data: bytes) -> int:
    """Of a channel, by the SIZ marker, which opens every codestream."""
    at = data.find(b"\xff\x4f\xff\x51") + 2
    return (data[at + 40] & 0x7F) + 1 if 2 <= at < len(data) - 40 else 8
