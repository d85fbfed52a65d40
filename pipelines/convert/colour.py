"""ICC colour profiles: which ones say something else than sRGB, and the way there, by littleCMS."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

#: By the colour space that a profile names.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
#: No profile has as many bytes; a hundred strangers' would fill our memory.
_LARGEST = 4 << 20
#: The colours by which a profile is judged: 9 levels a channel, (1, 729, 3), or all greys.
_COLOURS = np.stack(np.meshgrid(*[np.linspace(0, 255, 9).astype(np.uint8)] * 3), 3).reshape(1, -1, 3)
_GREYS = np.arange(256, dtype=np.uint8)[None]


@lru_cache(64)  # a camera's photos share one
def _way(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """(Pillow's mode of a profile's colours, their way to sRGB). No mode: the profile is broken; no way: it is sRGB, as
    it moves none of 729 colours by more than 2 of 255.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[opened.profile.xcolor_space.strip()]
        way = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
        before = Image.fromarray(_GREYS if mode == "L" else _COLOURS).convert(mode)
        moved = np.asarray(ImageCms.applyTransform(before, way)).astype(int) - np.asarray(before.convert("RGB"))
        return mode, None if mode != "CMYK" and np.abs(moved).max() <= 2 else way
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        return "", None


def is_srgb(profile: bytes) -> bool:
    """Whether colours are sRGB by their profile; empty: there is none, and so they are."""
    mode, way = _way(profile[:_LARGEST])
    return not profile or (mode != "" and way is None)


def converted(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The picture as sRGB; None: the profile is broken, or one of another kind of colours."""
    mode, way = _way(profile[:_LARGEST])
    if mode == "RGB":
        image = image.convert(mode)
    return None if way is None or image.mode != mode else ImageCms.applyTransform(image, way)
