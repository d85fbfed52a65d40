"""Photos for a trained network, one at a time and from anywhere, as the evaluation shows them to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastssl.errors import FastSSLError
from fastssl.pipelines.convert.encode import encode_photo, opaque
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.ops.augment import augment
from fastssl.pipelines.ops.crop import boxes_of, crop_resize_host
from fastssl.pipelines.plan.draw import ViewSpec, draw_plans

_AS_IT_IS = ConvertOptions(short_side=None, store="raw")


@dataclass(frozen=True)
class Transform:
    """A photo -> (3, S, S) float32, channels-last, normalised: the centre crop ``spec``, by the code of the evaluation
    and equal to its view to the last bit. (A photo that was scaled down for a ``.beton`` file is another photo.)

    Takes a path, the bytes of a file, a PIL image, or an (H, W, 3) or (H, W) uint8 array. As in a conversion EXIF turns
    the photo, and what is transparent becomes white. Can be pickled: for a ``DataLoader``'s workers.
    """

    spec: ViewSpec

    def __call__(self, photo: str | os.PathLike | bytes | Image.Image | np.ndarray) -> Tensor:
        """Raises FastSSLError where it is no picture, or a damaged one."""
        rgb = _pixels(photo)
        height, width = rgb.shape[:2]
        (plan,) = draw_plans([self.spec], 0, 0, [0], [height], [width])  # nothing in it is random
        view = np.empty((1, 1, self.spec.size, self.spec.size, 3), np.uint8)
        crop_resize_host(rgb, boxes_of(plan)[0], self.spec, view, 0)
        return augment(torch.from_numpy(view[0]).permute(0, 3, 1, 2), plan.reshape(-1), self.spec)[0]


def _pixels(photo: str | os.PathLike | bytes | Image.Image | np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, C-contiguous."""
    if isinstance(photo, (str, os.PathLike)):
        path = Path(photo)
        try:
            return _pixels(path.read_bytes())
        except OSError as error:
            raise FastSSLError(f"{path}: cannot be read: {error.strerror or error}") from error
        except FastSSLError as error:
            raise FastSSLError(f"{path}: {error}") from error
    if isinstance(photo, bytes):
        try:
            found = encode_photo(photo, _AS_IT_IS)
        except Exception as error:  # decoders raise anything at all for damaged input
            if isinstance(error, FastSSLError):
                raise
            raise FastSSLError(f"a damaged picture ({type(error).__name__}: {error})") from error
        return np.frombuffer(found.data, np.uint8).reshape(found.height, found.width, 3)
    if isinstance(photo, Image.Image):
        if photo.mode.startswith(("I", "F")):
            raise FastSSLError(f"a PIL image of mode {photo.mode}: give the path, by which its range becomes known")
        photo = np.asarray(opaque(ImageOps.exif_transpose(photo)).convert("RGB"))
    rgb = np.asarray(photo)
    if rgb.dtype != np.uint8 or rgb.ndim not in (2, 3) or (rgb.ndim == 3 and rgb.shape[2] != 3) or not rgb.size:
        raise FastSSLError(f"an array of {rgb.dtype} {rgb.shape} is no photo: give (H, W, 3) or (H, W) of uint8")
    return np.ascontiguousarray(rgb if rgb.ndim == 3 else np.repeat(rgb[..., None], 3, 2))
