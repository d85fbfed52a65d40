"""Layouts of formats of photos (layouts.py says how)."""

from __future__ import annotations

import numpy as np
import pytest
from layouts import BLUE, CLASSES, COLOURS, GREEN, RED, coded, layout, picture, write
from PIL import Image
from profiles import ADOBE, with_primaries
from untidy import untidy


@layout("JPEGs: progressive, grey, 4:4:4, with restart markers")
def _() -> None:
    kinds = {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}
    write({f"{n}.jpg": coded(BLUE, **options) for n, options in enumerate(kinds)})
    write({"3.jpg": coded(BLUE.getchannel("B"))})


@layout("PNG, BMP, TIFF, PPM, WebP without loss")
def _() -> None:
    write({f"green/{n}.{ending}": GREEN for n, ending in enumerate(("png", "bmp", "tif", "tiff", "ppm"))})
    write({"green/5.webp": coded(GREEN, "WEBP", lossless=True), "red/0.png": RED})


@layout("GIF, palettes, grey, two colours")
def _() -> None:
    write({"a.gif": BLUE.convert("P"), "b.png": BLUE.convert("P"), "c.jpg": BLUE.convert("L")})
    write({"d.png": BLUE.convert("L"), "e.pgm": BLUE.convert("L"), "f.tif": BLUE.convert("1")})


@layout("CMYK")
def _() -> None:
    write({"red/0.jpg": RED.convert("CMYK"), "red/1.tif": RED.convert("CMYK"), "green/0.jpg": GREEN.convert("CMYK")})


@layout("transparency")
def _() -> None:
    clear = RED.copy()
    clear.putalpha(Image.new("L", clear.size, 128))
    write({"red/0.png": clear, "red/1.webp": clear, "blue/0.png": BLUE.convert("RGBA")})


@layout("photos that a camera held sideways")
def _() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write({f"{n}.jpg": coded(GREEN, exif=exif.tobytes()) for n in range(3)})


@layout("endings that do not fit the contents")
def _() -> None:
    write({"0.jpg": coded(BLUE, "PNG"), "1.png": coded(BLUE), "2.jpeg": coded(BLUE, "WEBP")})


@layout("HEIC of phones (`pip install pillow-heif`)")
def _() -> None:
    pytest.importorskip("pillow_heif")
    write({f"{colour}/0.HEIC": coded(picture(colour), "HEIF") for colour in COLOURS})


@layout("AVIF, JPEG 2000")
def _() -> None:
    write({f"{colour}/0.{form}": picture(colour) for colour, form in zip(COLOURS, ("avif", "jp2", "j2k"))})


@layout("animations, TIFFs of several pages")
def _() -> None:
    frames = {"save_all": True, "append_images": [picture("red")]}
    forms = enumerate(("gif", "webp", "tiff"))
    write({f"blue/{n}.{form}": coded(picture("blue"), form, **frames) for n, form in forms})


@layout("PNG, TIFF and PGM of 16 bits that hold 12")
def _() -> None:
    grey = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))
    pgm = b"P5 64 64 65535\n" + np.asarray(grey).astype(">u2").tobytes()
    write({"a.png": grey, "b.tiff": grey, "c.pgm": pgm})


@layout("TIFF of 32 bits, floats")
def _() -> None:
    values = np.arange(4096).reshape(64, 64) / 16
    write({"a.tiff": Image.fromarray(values.astype(np.int32)), "b.tiff": Image.fromarray(values.astype(np.float32))})


@layout("JPEGs with headers that decoders complain of, Samsung's among them")
def _() -> None:
    write({f"{colour}/0.jpg": next(iter(untidy(coded(picture(colour))).values())) for colour in COLOURS})


@layout("photos with another colour profile than sRGB")
def _() -> None:
    data = with_primaries(ADOBE)
    write({f"{colour}/0.jpg": coded(picture(colour), icc_profile=data) for colour in COLOURS})


@layout("raw photos and films among the photos")
def _() -> None:
    write(CLASSES | {"blue/2.nef": b"II", "blue/3.mp4": b"ftyp"})


@layout("damaged and empty files among the photos")
def _() -> None:
    write(CLASSES | {"blue/2.jpg": CLASSES["blue/0.jpg"][:-300], "blue/3.jpg": b"", "red/2.png": b"no picture"})
