"""Colour profiles, made of littleCMS' own."""

from __future__ import annotations

import struct

from PIL import ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
#: X, Y, Z of the primaries of Adobe RGB, under D50.
ADOBE = {
    b"rXYZ": (0.60974, 0.31111, 0.01947),
    b"gXYZ": (0.20528, 0.62567, 0.06087),
    b"bXYZ": (0.14919, 0.06322, 0.74457),
}


def with_primaries(primaries: dict[bytes, tuple[float, float, float]], profile: bytes = SRGB) -> bytes:
    """The profile with other primaries: each tag's entry says where its values stand."""
    made = bytearray(profile)
    for name, values in primaries.items():
        start = struct.unpack(">I", profile[profile.index(name, 128) + 4 :][:4])[0]
        made[start + 8 : start + 20] = struct.pack(">3i", *(round(65536 * value) for value in values))
    return bytes(made)
