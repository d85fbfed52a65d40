"""One photo: the bytes of any picture file to those that a ``.beton`` file holds."""

from __future__ import annotations

import io
import re
import zlib
from typing import NamedTuple

import numpy as np
import PIL
import simplejpeg
from PIL import Image

from fastssl.errors import JpegError
from fastssl.pipelines.beton.format import MODE_JPEG, MODE_RAW
from fastssl.pipelines.convert.formats import pillow_formats
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.ops import jpeg

#: By EXIF orientation, from 2 on.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_TRANSPOSE = {number: Image.Transpose[name] for number, name in enumerate(_TURNS, 2)}


class Encoded(NamedTuple):
    """A photo as it goes into the file."""

    data: bytes
    height: int
    width: int
    mode: int
    copied: bool
    crc32: int
    scaled: bool = False


def encode_photo(data: bytes, options: ConvertOptions) -> Encoded:
    """Turn the bytes of any picture file into what goes into the ``.beton``: a pure function of its arguments. Raises
    JpegError, OSError, ValueError or whatever else a decoder raises for a damaged picture.

    * A JPEG in YCbCr or grey, upright and of fitting size, that decodes without complaint, is returned as it is.
    * Scaling: Pillow's Lanczos filter (antialiased); a JPEG more than four times too large is first reduced by the
      decoder, in the DCT, to no less than twice the size.
    * EXIF orientation is applied. CMYK becomes RGB as Pillow does it. Transparency is laid over white. Of 16 bits the
      high 8 stay. Of an animation the first picture is taken.
    """
    if not data:
        raise JpegError("the file is empty")
    is_jpeg = data[:3] == b"\xff\xd8\xff"
    header = _readable_header(data) if is_jpeg else None
    if header is not None:
        size = options.target_size(header.height, header.width)
        orientation = jpeg.exif_orientation(data)
        scaled = size != (header.height, header.width)
        unchanged = not scaled and orientation == 1
        far = header.height >= 4 * size[0] and header.width >= 4 * size[1]
        rgb, clean = _decode_jpeg(data, (2 * size[0], 2 * size[1]) if far else None)
        if unchanged and clean and header.colorspace != "RGB" and options.store == "jpeg":
            return Encoded(data, header.height, header.width, MODE_JPEG, True, zlib.crc32(data))
    else:
        rgb, orientation = _decode_pillow(data, is_jpeg)
        size = options.target_size(*rgb.shape[:2])
        scaled = size != rgb.shape[:2]
        unchanged = not scaled and orientation == 1
    if not unchanged:
        image = Image.fromarray(rgb).resize((size[1], size[0]), Image.Resampling.LANCZOS)
        # Turned after scaling, when there are fewer pixels; the filter does not know up from down.
        image = image.transpose(_TRANSPOSE[orientation]) if orientation != 1 else image
        rgb = np.asarray(image)
    height, width, _ = rgb.shape
    if max(height, width) > 0xFFFF:
        raise JpegError(f"{height}x{width} pixels: the format stores sides up to 65535; scale it down")
    mode = MODE_JPEG if options.store == "jpeg" else MODE_RAW
    stored = jpeg.encode(rgb, options.quality) if mode == MODE_JPEG else rgb.tobytes()
    return Encoded(stored, height, width, mode, False, zlib.crc32(stored), scaled)


def _readable_header(data: bytes) -> jpeg.JpegHeader | None:
    """The header of a JPEG, or None when it is one that only Pillow can decode: CMYK, or unusual sampling factors."""
    try:
        header = jpeg.read_header(data)
    except JpegError:
        return None
    return header if header.colorspace in jpeg.DECODABLE else None


def _decode_jpeg(data: bytes, at_least: tuple[int, int] | None) -> tuple[np.ndarray, bool]:
    """Decode strictly; (pixels, whether the file may be stored as it is)."""
    try:
        return jpeg.decode(data, at_least=at_least), True
    except JpegError as error:
        # Stray bytes between the last pixel and the end marker (0xd9): the picture is whole, only untidy.
        if re.search(r"extraneous bytes before marker 0xd9$", str(error)) is None:
            raise
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False), False


def _decode_pillow(data: bytes, is_jpeg: bool) -> tuple[np.ndarray, int]:
    """Decode with Pillow; (RGB pixels, EXIF orientation still to be applied)."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=pillow_formats())
    except PIL.UnidentifiedImageError:
        raise JpegError("not a picture in a format that we read (by its contents, not by its name)") from None
    # Before load(): the size in the header costs nothing, the pixels behind it may cost gigabytes.
    jpeg.require_few_pixels(image.height, image.width)
    if is_jpeg:
        jpeg.require_few_scans(data, image.width * image.height)
    if image.format == "PNG":
        with Image.open(io.BytesIO(data), formats=("PNG",)) as check:
            check.verify()  # the chunks' checksums, which load() leaves out
    image.load()
    orientation = jpeg.exif_orientation(data) if is_jpeg else image.getexif().get(0x0112, 1)
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise JpegError("32 bits a pixel: of unknown range, convert it to 8 or 16 bits first")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise JpegError("floating-point pixels: of unknown range, convert it to 8 or 16 bits first")
    elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB")), orientation if orientation in _TRANSPOSE else 1
