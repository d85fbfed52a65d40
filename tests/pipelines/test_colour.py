"""Colour profiles: which are sRGB, and the others against littleCMS through Pillow."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from conftest import make_photo
from PIL import Image, ImageCms
from profiles import ADOBE, SRGB, with_primaries

from fastssl.pipelines.convert.colour import _way, is_srgb
from fastssl.pipelines.convert.encode import How, encode_photo
from fastssl.pipelines.convert.options import ConvertOptions

RGB = make_photo(0, 64, 96)


def grey_profile(gamma: float) -> bytes:
    """A grey profile of one curve."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags = struct.pack(">I", 2) + b"wtpt" + struct.pack(">II", 156, 20) + b"kTRC" + struct.pack(">II", 176, 16)
    head = bytearray(SRGB[:128])
    head[0:4], head[16:20] = struct.pack(">I", 192), b"GRAY"
    return bytes(head) + tags + white + curve


def saved(image: np.ndarray | Image.Image, form: str, profile: bytes, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, form, icc_profile=profile, **options)
    return buffer.getvalue()


def by_pillow(data: bytes, profile: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return np.asarray(ImageCms.profileToProfile(image, opened, ImageCms.createProfile("sRGB"), outputMode="RGB"))


def encoded(data: bytes, icc: str) -> tuple[np.ndarray, int]:
    found = encode_photo(data, ConvertOptions(store="raw", keep_size=True, icc=icc))
    return np.frombuffer(found.data, np.uint8).reshape(found.height, found.width, 3), found.how


def test_what_is_srgb() -> None:
    assert is_srgb(b"") and is_srgb(SRGB)
    moved = {name: (x + 0.0005, y, z) for name, (x, y, z) in {b"rXYZ": (0.43607, 0.22249, 0.01392)}.items()}
    assert is_srgb(with_primaries(moved))  # as good as the same
    assert not is_srgb(with_primaries(ADOBE)) and not is_srgb(grey_profile(1.8))
    assert not is_srgb(b"broken") and not is_srgb(SRGB[:200])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_another_profile_is_ignored_or_applied(form: str) -> None:
    adobe = with_primaries(ADOBE)
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    data = saved(RGB, form, adobe, **options)
    plain, how = encoded(data, "ignore")
    assert how == How.PROFILE_IGNORED
    np.testing.assert_array_equal(plain, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    converted, how = encoded(data, "srgb")
    assert how == How.PROFILE_APPLIED
    assert np.abs(converted.astype(int) - by_pillow(data, adobe)).max() <= 2
    assert np.abs(converted.astype(int) - plain).max() > 10


def test_a_jpeg_is_copied_unless_its_profile_is_applied() -> None:
    data = saved(RGB, "JPEG", with_primaries(ADOBE))
    kept = encode_photo(data, ConvertOptions(keep_size=True))
    assert kept.data == data and kept.how == How.COPIED | How.PROFILE_IGNORED
    made = encode_photo(data, ConvertOptions(keep_size=True, icc="srgb"))
    assert made.data != data and made.how == How.PROFILE_APPLIED
    same = saved(RGB, "JPEG", SRGB)
    assert encode_photo(same, ConvertOptions(keep_size=True, icc="srgb")).how == How.COPIED


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_grey_photos(form: str) -> None:
    grey = Image.fromarray(RGB).convert("L")
    profile = grey_profile(1.8)
    data = saved(grey, form, profile)
    pixels, how = encoded(data, "srgb")
    assert how == How.PROFILE_APPLIED and np.abs(pixels.astype(int) - by_pillow(data, profile)).max() <= 2
    data = saved(grey, form, with_primaries(ADOBE))  # grey has no primaries
    assert encoded(data, "srgb")[1] == How.PROFILE_APPLIED


@pytest.mark.parametrize("profile", [b"broken", SRGB[:300], grey_profile(1.8)], ids=["no profile", "cut", "of greys"])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_profile_that_does_not_fit_is_ignored(form: str, profile: bytes) -> None:
    data = saved(RGB, form, profile)
    pixels, how = encoded(data, "srgb")
    assert how == How.PROFILE_BROKEN
    np.testing.assert_array_equal(pixels, encoded(data, "ignore")[0])


def test_profiles_of_strangers_do_not_fill_memory() -> None:
    """One of many megabytes is kept in no cache; its end, which belongs to nothing, decides nothing."""
    assert is_srgb(SRGB + bytes(8 << 20)) and not is_srgb(with_primaries(ADOBE) + bytes(8 << 20))
    before = _way.cache_info().currsize
    for k in range(3):
        is_srgb(with_primaries(ADOBE) + bytes(8 << 20) + bytes([k]))
    assert _way.cache_info().currsize == before
