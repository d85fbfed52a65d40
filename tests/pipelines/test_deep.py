"""More than 8 bits a channel: against a float64 reference, in every kind of file that holds such pictures."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastssl.errors import JpegError
from fastssl.pipelines.convert.deep import RANGES
from fastssl.pipelines.convert.encode import encode_photo
from fastssl.pipelines.convert.options import ConvertError, ConvertOptions

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 4096, (8, 9, 3)).astype(np.uint16)
COLOUR[0, 0], COLOUR[0, 1] = 0, 4095
GREY = COLOUR[..., 0]
OPAQUE = np.full((8, 9), 65535, np.uint16)


def png(values: np.ndarray, **chunks: bytes) -> bytes:
    """16 bits, (H, W) or (H, W, 2 to 4). Pillow writes no colours of 16 bits."""
    height, width = values.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = [("IHDR", head), *chunks.items(), ("IDAT", zlib.compress(rows)), ("IEND", b"")]
    made = b"\x89PNG\r\n\x1a\n"
    for name, body in parts:
        made += struct.pack(">I", len(body)) + name.encode() + body
        made += struct.pack(">I", zlib.crc32(name.encode() + body))
    return made


def tiff(values: np.ndarray, order: str = "<", deflate: bool = False, **tags: int) -> bytes:
    """Of any type of values, (H, W) or (H, W, C), in one strip (with ``t284=2`` one a channel)."""
    height, width, channels = *values.shape[:2], 1 if values.ndim == 2 else values.shape[2]
    bits, planes = 8 * values.dtype.itemsize, channels if tags.get("t284") == 2 else 1
    content = np.moveaxis(values, -1, 0) if planes > 1 else values
    data = content.astype(values.dtype.newbyteorder(order)).tobytes()
    strips = [data[k * len(data) // planes : (k + 1) * len(data) // planes] for k in range(planes)]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    starts = [8 + sum(map(len, strips[:k])) for k in range(planes)]
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries: dict[int, list[int]] = {256: [width], 257: [height], 258: [bits] * channels, 259: [8 if deflate else 1]}
    entries |= {
        262: [2 if channels > 2 else 1],
        273: starts,
        277: [channels],
        278: [height],
        279: list(map(len, strips)),
    }
    entries |= {284: [1], 339: [kind] * channels, **({338: [2]} if channels == 4 else {})}
    entries |= {int(name[1:]): [value] for name, value in tags.items()}
    body = b"".join(strips) + b"\0" * (sum(map(len, strips)) % 2)
    directory, far = 8 + len(body), b""
    table = struct.pack(order + "H", len(entries))
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(packed) > 4:
            far += packed
            packed = struct.pack(order + "I", directory + 6 + 12 * len(entries) + len(far) - len(packed))
        table += struct.pack(order + "HHI", tag, 4, len(numbers)) + packed
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", directory)
    return head + body + table + bytes(4) + far


def pnm(kind: str, values: np.ndarray, end: int) -> bytes:
    return f"{kind} {values.shape[1]} {values.shape[0]} {end}\n".encode() + values.astype(">u2").tobytes()


def jpeg2000(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG2000", irreversible=False)
    return buffer.getvalue()


def encoded(data: bytes, **options: object) -> tuple[np.ndarray, str]:
    """(pixels, from what range)"""
    found = encode_photo(data, ConvertOptions(store="raw", keep_size=True, **options))
    pixels = np.frombuffer(found.data, np.uint8).reshape(found.height, found.width, 3)
    return pixels, RANGES[(found.how >> 8) - 1] if found.how >> 8 else ""


def reference(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(H, W, 3) float64, 0 to 255."""
    values = values if values.ndim == 3 else np.repeat(values[..., None], 3, 2)
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255


def assert_mapped(data: bytes, values: np.ndarray, low: float, high: float, word: str = "", **options: object) -> None:
    pixels, found = encoded(data, **options)
    assert np.abs(pixels - reference(values, low, high)).max() <= 1
    assert found == (word or f"0..{high}")


def test_sixteen_bits_of_png() -> None:
    assert_mapped(png(GREY), GREY, 0, 4095)
    assert_mapped(png(COLOUR), COLOUR, 0, 4095)
    assert_mapped(png(np.dstack([GREY, OPAQUE])), GREY, 0, 4095)
    assert_mapped(png(np.dstack([COLOUR, OPAQUE])), COLOUR, 0, 4095)
    assert_mapped(png(COLOUR * 16), COLOUR * 16, 0, 65535)
    assert_mapped(png(COLOUR >> 4), COLOUR >> 4, 0, 255)  # 8 bits that were stored as 16
    assert_mapped(png(COLOUR >> 2), COLOUR >> 2, 0, 1023)
    assert_mapped(png(COLOUR << 2), COLOUR << 2, 0, 16383)


def test_a_picture_of_one_value_divides_by_nothing() -> None:
    assert_mapped(png(GREY * 0), GREY * 0, 0, 255)
    assert_mapped(png(GREY * 0 + 7), GREY * 0 + 7, 0, 255)
    assert (encoded(tiff(np.full((4, 4), 7, np.float32)))[0] == 0).all()


def test_what_a_file_says_of_its_range_counts() -> None:
    assert_mapped(png(GREY, sBIT=b"\x0c"), GREY, 0, 4095)
    assert_mapped(png(GREY, sBIT=b"\x0a"), GREY, 0, 65535)  # 10 bits, spread over 16
    assert_mapped(tiff(GREY, t341=5000), GREY, 0, 5000, "the range that each names")
    assert_mapped(tiff(GREY, t341=4000), GREY, 0, 4095)  # it is wrong
    assert_mapped(tiff(GREY, t341=65535), GREY, 0, 4095)  # it says nothing
    assert_mapped(pnm("P5", GREY >> 4, 4095), GREY >> 4, 0, 4095, "0..65535")  # Pillow has spread it over 16 bits
    assert_mapped(pnm("P5", GREY, 65535), GREY, 0, 4095)
    assert_mapped(pnm("P6", COLOUR, 65535), COLOUR, 0, 4095)


@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_kind_of_tiff(order: str, deflate: bool) -> None:
    """Pillow turns some of them round that libtiff has turned already."""
    how = {"order": order, "deflate": deflate}
    own = "the lowest to the highest value of each"
    assert_mapped(tiff(GREY, **how), GREY, 0, 4095)
    assert_mapped(tiff(COLOUR, **how), COLOUR, 0, 4095)
    assert_mapped(tiff(np.dstack([COLOUR, OPAQUE]), **how), COLOUR, 0, 4095)
    assert_mapped(tiff(GREY.astype(np.int32), **how), GREY, 0, 4095)
    assert_mapped(tiff(GREY.astype(np.int32) >> 4, **how), GREY >> 4, 0, 255)
    signed = GREY.astype(np.int16) - 2000
    assert_mapped(tiff(signed, **how), signed, -2000, 2095, own)
    wide = GREY.astype(np.int32) << 12
    assert_mapped(tiff(wide, **how), wide, 0, 4095 << 12, own)
    assert_mapped(tiff(GREY.astype(np.float32), **how), GREY, 0, 4095, own)
    assert_mapped(tiff((GREY / 5000).astype(np.float32), **how), GREY / 5000, 0, 1)
    if order == "<":  # the others are read by no Pillow
        assert_mapped(tiff(GREY, t262=0, **how), 4095 - GREY, 0, 4095)  # white is zero
        high = GREY.astype(np.uint32) << 20
        assert_mapped(tiff(high, **how), high, 0, 4095 << 20, own)


def test_jpeg_2000() -> None:
    assert_mapped(jpeg2000(GREY), GREY, 0, 4095)


def test_a_range_for_all() -> None:
    for data, values in [(png(COLOUR), COLOUR), (tiff(GREY), GREY), (tiff(GREY.astype(np.float32)), GREY)]:
        assert_mapped(data, values, 100, 3000, "the range that was given", range=(100, 3000))
    with pytest.raises(ConvertError, match="range"):
        ConvertOptions(range=(5, 5))
    assert "range" not in ConvertOptions().deciding()  # so that files of before are still those of these options
    assert ConvertOptions(range=(0, 9)).deciding()["range"] == [0, 9]


def test_transparency_is_laid_over_white() -> None:
    half = np.full((8, 9), 32768, np.uint16)
    pixels, _ = encoded(png(np.dstack([COLOUR, half])))
    assert np.abs(pixels - (reference(COLOUR, 0, 4095) + 255) / 2).max() <= 1.5
    assert (encoded(png(np.dstack([COLOUR, half * 0])))[0] == 255).all()
    for values, see_through in [(GREY, GREY[3, 3]), (COLOUR, COLOUR[3, 3])]:
        data = png(values, tRNS=np.atleast_1d(see_through).astype(">u2").tobytes())
        expected = reference(values, 0, 4095)
        expected[3, 3] = 255
        assert np.abs(encoded(data)[0][3, 3] - 255).max() == 0 and np.abs(encoded(data)[0] - expected).max() <= 1


def test_what_cannot_be_mapped_is_refused_with_what_to_do() -> None:
    """Rather than turn black."""
    for value in (np.nan, np.inf, -np.inf):
        bad = GREY.astype(np.float32)
        bad[5, 5] = value
        for given in (None, (0.0, 1.0)):
            with pytest.raises(JpegError, match="no numbers: replace"):
                encoded(tiff(bad), range=given)
    with pytest.raises(JpegError, match=r"separate planes.*8 bits"):
        encoded(tiff(COLOUR, t284=2))
    with pytest.raises(JpegError, match=r"16 bits a channel.*8 bits"):  # multiplied with its transparency
        encoded(tiff(np.dstack([COLOUR, OPAQUE]), t338=1))
    with pytest.raises(JpegError, match=r"a TIFF of a kind.*8 bits"):
        encoded(tiff(GREY.astype(np.float64)))


def test_eight_bits_stay_as_they_are() -> None:
    rgb = (COLOUR >> 4).astype(np.uint8)
    for form in ("PNG", "TIFF", "PPM", "BMP"):
        buffer = io.BytesIO()
        Image.fromarray(rgb).save(buffer, form)
        pixels, found = encoded(buffer.getvalue(), range=(0, 9))
        assert found == "" and (pixels == rgb).all()
