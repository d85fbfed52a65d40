"""Which files are taken for photos, who decodes them, and what is said of the others.

Only formats that are decoded in this process, from memory: EPS, for one, would start Ghostscript on a stranger's
program, and a video would need frames to be chosen.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import cache

from PIL import Image

#: Pillow's name of a format, and the endings of its files, compared in lower case. The contents decide how a file is
#: decoded.
_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "HEIF": (".heic", ".heif", ".hif"),
}

#: What a user can do about files that are passed over.
_INSTALL = {
    "HEIF": "pip install pillow-heif",
    "AVIF": "pip install 'pillow>=11.3'",
    "JPEG2000": "pip install a Pillow that was built with OpenJPEG",
    "WEBP": "pip install a Pillow that was built with WebP",
}
_REMEDIES = {
    "develop them into JPEG or 16-bit TIFF (darktable, rawpy)": (
        ".3fr .arw .cr2 .cr3 .crw .dng .nef .nrw .orf .pef .raf .raw .rw2 .sr2 .srw .x3f"
    ),
    "extract frames (ffmpeg -i FILE %06d.jpg)": ".avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .mts .webm .wmv",
    "draw them as PNG (rsvg-convert, pdftoppm, Ghostscript)": ".ai .eps .pdf .ps .svg",
    "convert them to PNG": ".dcm .exr .hdr .ico .jxl .jxr .npy .pcx .psd .qoi .tga .xcf",
}
_REMEDY_OF = {ending: text for text, endings in _REMEDIES.items() for ending in endings.split()}


@cache
def pillow_formats() -> tuple[str, ...]:
    """Those of our formats that can be decoded here; asked once before threads start, as it loads Pillow's plugins."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        # One photo a thread: the converter has as many threads as there are cores already.
        pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    if "AVIF" not in Image.OPEN:  # before Pillow 11.3
        with suppress(ImportError):
            import pillow_avif  # noqa: F401 (registers itself)
    with suppress(ImportError):
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    return tuple(name for name in _ENDINGS if name in Image.OPEN)


@cache
def _decodable() -> frozenset[str]:
    return frozenset(ending for name in pillow_formats() for ending in _ENDINGS[name])


def is_photo_name(name: str) -> bool:
    """Whether a file of this name is taken for a photo: the ending, in any case, of a format that can be decoded here,
    and not hidden.
    """
    base = name.rsplit("/", 1)[-1]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in _decodable()


def kind_of(name: str) -> str:
    """Under which word a file that is passed over is counted: ``hidden``, its ending in lower case, or ``other``."""
    parts = name.split("/")
    if any(part.startswith(".") for part in parts):
        return "hidden"
    ending = os.path.splitext(parts[-1])[1].lower()
    # Numbers and long ones are parts of names, not kinds: there may be a million of them.
    return ending if re.fullmatch(r"\.(?=.*[a-z])[a-z0-9]{1,7}", ending) else "other"


def remedy(kind: str) -> str | None:
    """What to do so that files of this kind (:func:`kind_of`) are read; None: they are no photos, or can be read."""
    lacking = next((name for name, endings in _ENDINGS.items() if kind in endings), None)
    if lacking is None:
        return _REMEDY_OF.get(kind)
    return None if lacking in pillow_formats() else _INSTALL.get(lacking)


def in_words(passed_over: dict[str, int]) -> str:
    """How many files of which kinds: ``2,311 .heic, 7 .txt, 3 of other kinds``; the four most frequent by name."""
    ordered = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[4:])
    return ", ".join([f"{count:,} {kind}" for kind, count in ordered[:4]] + [f"{rest:,} of other kinds"] * bool(rest))


def remedies(passed_over: dict[str, int]) -> list[str]:
    """What to do about files that are passed over, a line for each kind: ``2,311 .heic: pip install pillow-heif``."""
    return [f"{count:,} {kind}: {what}" for kind, count in sorted(passed_over.items()) if (what := remedy(kind))]
