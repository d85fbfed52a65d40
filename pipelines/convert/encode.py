"""One photo: the bytes of any picture file to those that a ``.beton`` file holds."""

from __future__ import annotations

import io
import zlib
from collections import Counter
from enum import IntFlag
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from fastssl.errors import JpegError
from fastssl.pipelines.beton.format import MODE_JPEG, MODE_RAW
from fastssl.pipelines.convert import colour, deep
from fastssl.pipelines.convert.formats import pillow_formats, remedy
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.ops import jpeg, jpeg_header

#: By EXIF orientation, from 2 on.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_TRANSPOSE = {number: Image.Transpose[name] for number, name in enumerate(_TURNS, 2)}


class How(IntFlag):
    """What became of a photo."""

    COPIED = 1
    SCALED = 2
    REPAIRED = 4
    ANIMATED = 8
    PROFILE_IGNORED = 16
    PROFILE_APPLIED = 32
    PROFILE_BROKEN = 64


#: A number, because most photos of a large set are copied and flags are slow.
_COPIED = int(How.COPIED)
#: By these names photos are counted in `ConvertSummary` and in the side file.
COUNTS = ("reencoded", *(str(flag.name).lower() for flag in How))
#: Above the flags stands which of `deep.RANGES` a photo of more than 8 bits was mapped from.
_RANGE_SHIFT = 8


def tally(hows: Counter[int]) -> dict[str, Any]:
    """The counts of a conversion, as `ConvertSummary` and the side file have them, from how often each ``how`` was."""
    samples = hows.total()
    counts = {name: sum(n for how, n in hows.items() if how & flag) for name, flag in zip(COUNTS[1:], How)}
    mapped: Counter[str] = Counter()
    for how, photos in hows.items():
        if how >> _RANGE_SHIFT:
            mapped[deep.RANGES[(how >> _RANGE_SHIFT) - 1]] += photos
    return {"samples": samples, "reencoded": samples - counts["copied"], **counts, "deep": dict(mapped)}


class Encoded(NamedTuple):
    """A photo as it goes into the file. how: `How`, and the range."""

    data: bytes
    height: int
    width: int
    mode: int
    crc32: int
    how: int


class _Decoded(NamedTuple):
    """RGB pixels, the size that they get, the EXIF orientation still to be applied, `How` so far; or the JPEG that is
    stored as it is, and pixels of no use.
    """

    rgb: np.ndarray
    size: tuple[int, int]
    orientation: int
    how: int
    whole: bytes = b""


def encode_photo(data: bytes, options: ConvertOptions) -> Encoded:
    """Turn the bytes of any picture file into what goes into the ``.beton``: a pure function of its arguments. Raises
    JpegError, OSError, ValueError or whatever else a decoder raises for a damaged picture.

    * A JPEG in YCbCr or grey, upright and of fitting size, is returned as it is if it decodes without complaint, and
      else as `jpeg.repaired` gives it.
    * Scaling: Pillow's Lanczos filter (antialiased); a JPEG more than four times too large is first reduced by the
      decoder, in the DCT, to no less than twice the size.
    * EXIF orientation is applied. CMYK becomes RGB as Pillow does it. Transparency is laid over white. More than 8 bits
      become 8 by the range that they use. Of an animation the first picture is taken. A colour profile is ignored, or
      applied if ``options.icc`` says so.
    """
    if not data:
        raise JpegError("the file is empty")
    is_jpeg = data[:3] == b"\xff\xd8\xff"
    found = (_decode_jpeg(data, options) if is_jpeg else None) or _decode_pillow(data, is_jpeg, options)
    rgb, size, orientation, how, whole = found
    if whole:
        how = int(how) | _COPIED if whole is data else int(how)
        return Encoded(whole, *size, MODE_JPEG, zlib.crc32(whole), how)
    if size != rgb.shape[:2] or orientation != 1:
        how |= How.SCALED if size != rgb.shape[:2] else 0
        image = Image.fromarray(rgb).resize((size[1], size[0]), Image.Resampling.LANCZOS)
        # Turned after scaling, when there are fewer pixels; the filter does not know up from down.
        image = image.transpose(_TRANSPOSE[orientation]) if orientation != 1 else image
        rgb = np.asarray(image)
    height, width, _ = rgb.shape
    if max(height, width) > 0xFFFF:
        raise JpegError(f"{height}x{width} pixels: the format stores sides up to 65535; scale it down")
    mode = MODE_JPEG if options.store == "jpeg" else MODE_RAW
    stored = jpeg.encode(rgb, options.quality) if mode == MODE_JPEG else rgb.tobytes()
    return Encoded(stored, height, width, mode, zlib.crc32(stored), int(how))


def _decode_jpeg(data: bytes, options: ConvertOptions) -> _Decoded | None:
    """Decode strictly; None: only Pillow can."""
    header = _readable_header(data) or _readable_header(jpeg_header.tidied(data) or b"")
    if header is None:
        return None
    size = options.target_size(header.height, header.width)
    far = header.height >= 4 * size[0] and header.width >= 4 * size[1]
    at_least = (2 * size[0], 2 * size[1]) if far else None
    orientation, profile = jpeg_header.orientation_and_profile(data)
    stays = options.store == "jpeg" and orientation == 1 and size == header[:2] and header.colorspace != "RGB"
    if stays and (options.icc == "ignore" or colour.is_srgb(profile)):
        at_least = (1, 1)  # all of the data is decoded, to an eighth of the size: its pixels are not looked at
    whole, how = data, 0
    try:
        rgb = jpeg.decode(data, at_least=at_least, repair=False, header=header)
    except JpegError:
        if (mended := jpeg.repaired(data)) is None:
            raise
        rgb, whole, how = jpeg.decode(mended, at_least=at_least, repair=False), mended, How.REPAIRED
    if not colour.is_srgb(profile):
        image = Image.fromarray(rgb[..., 0] if header.colorspace == "Gray" else rgb)
        image, by_profile = _by_profile(image, profile, options)
        rgb, how = np.asarray(image.convert("RGB")), how | by_profile
    return _Decoded(rgb, size, orientation, how, b"" if not stays or how & How.PROFILE_APPLIED else whole)


def _readable_header(data: bytes) -> jpeg.JpegHeader | None:
    """The header of a JPEG, or None when it is one that only Pillow can decode: CMYK, or unusual sampling factors."""
    try:
        header = jpeg.read_header(data)
    except JpegError:
        return None
    return header if header.colorspace in jpeg.DECODABLE else None


def _decode_pillow(data: bytes, is_jpeg: bool, options: ConvertOptions) -> _Decoded:
    """Decode with Pillow."""
    try:
        image = Image.open(io.BytesIO(data), formats=pillow_formats())
    except PIL.UnidentifiedImageError:
        if data[:4] in (b"II*\0", b"MM\0*"):
            raise JpegError("a TIFF of a kind that Pillow does not read: save it with 8 bits a channel") from None
        if data[4:8] == b"ftyp" and (what := remedy(".avif" if data[8:12] == b"avif" else ".heic")):
            raise JpegError(f"HEIC or AVIF: {what}") from None
        raise JpegError("not a picture in a format that we read (by its contents, not by its name)") from None
    # Before load(): the size in the header costs nothing, the pixels behind it may cost gigabytes.
    jpeg.require_few_pixels(image.height, image.width)
    if is_jpeg:
        jpeg.require_few_scans(data, image.width * image.height)
    if image.format == "JPEG2000" and image.height * image.width > max(1 << 24, 1000 * len(data)):
        # Its decoder takes 18 bytes for each pixel that a header of 200 bytes asks for.
        raise JpegError(f"{len(data):,} bytes of JPEG 2000 for {image.height}x{image.width} pixels: save it as PNG")
    if image.format == "PNG":
        with Image.open(io.BytesIO(data), formats=("PNG",)) as check:
            check.verify()  # the chunks' checksums, which load() leaves out
    how = How.ANIMATED if getattr(image, "is_animated", False) else 0
    picture, number = deep.load(image, data, options.range)
    orientation = jpeg_header.orientation_and_profile(data)[0] if is_jpeg else image.getexif().get(0x0112, 1)
    picture = opaque(picture)
    if not colour.is_srgb(profile := image.info.get("icc_profile") or b""):
        picture, by_profile = _by_profile(picture, profile, options)
        how |= by_profile
    rgb = np.asarray(picture.convert("RGB"))
    orientation = orientation if orientation in _TRANSPOSE else 1
    return _Decoded(rgb, options.target_size(*rgb.shape[:2]), orientation, how | number << _RANGE_SHIFT)


def opaque(picture: Image.Image) -> Image.Image:
    """The picture over white, where parts of it can be transparent."""
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return picture


def _by_profile(image: Image.Image, profile: bytes, options: ConvertOptions) -> tuple[Image.Image, int]:
    """What becomes of a picture whose colour profile is not sRGB."""
    if options.icc == "ignore":
        return image, How.PROFILE_IGNORED
    converted = colour.converted(image, profile)
    return (image, How.PROFILE_BROKEN) if converted is None else (converted, How.PROFILE_APPLIED)
