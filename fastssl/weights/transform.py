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
from fastssl.weights.source import load_weights

Photo = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


@dataclass(frozen=True)
class Transform:
    """A photo -> (3, S, S) float32, channels-last, normalised: the view ``spec`` by the evaluation's own code, equal to
    the last bit. Takes a path, the bytes of a file, a PIL image, or (H, W, 3) or (H, W) uint8. As in a conversion EXIF
    turns it, and what is transparent becomes white. FastSSLError: no picture, or a damaged one.
    """

    spec: ViewSpec

    def __call__(self, photo: Photo) -> Tensor:
        rgb, view = _pixels(photo), np.empty((1, 1, self.spec.size, self.spec.size, 3), np.uint8)
        (plan,) = draw_plans([self.spec], 0, 0, [0], [rgb.shape[0]], [rgb.shape[1]])  # nothing in it is random
        crop_resize_host(rgb, boxes_of(plan)[0], self.spec, view, 0)
        return augment(torch.from_numpy(view[0]).permute(0, 3, 1, 2), plan.reshape(-1), self.spec)[0]


def transform(
    weights: str | os.PathLike[str], *, size: int | None = None, crop: float | None = None, arch: str | None = None
) -> Transform:
    """For the network of ``load_weights``, by its run's ``size`` (pixels) and ``crop`` (of the short side)."""
    run = load_weights(os.fspath(weights), arch)
    # Where nobody says: the usual ones. The evaluation's own names would load what Windows does not have.
    size = run.size or 224 if size is None else size
    return Transform(ViewSpec.evaluation(size, crop or run.crop or 0.875, run.normalisation))


def _pixels(photo: Photo) -> np.ndarray:
    """(H, W, 3) uint8, C-contiguous."""
    if isinstance(photo, (str, os.PathLike, bytes)):
        name = "the picture" if isinstance(photo, bytes) else os.fspath(photo)
        try:
            data = photo if isinstance(photo, bytes) else Path(photo).read_bytes()
            found = encode_photo(data, ConvertOptions(short_side=None, store="raw"))
        except Exception as error:  # decoders raise anything at all for damaged input
            raise FastSSLError(f"{name}: cannot be read as a photo ({error})") from error
        return np.frombuffer(found.data, np.uint8).reshape(found.height, found.width, 3)
    if isinstance(photo, Image.Image):
        if photo.mode.startswith(("I", "F")):
            raise FastSSLError(f"a PIL image of mode {photo.mode}: give the path, by which its range becomes known")
        photo = np.asarray(opaque(ImageOps.exif_transpose(photo)).convert("RGB"))
    rgb = np.atleast_3d(photo)
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] not in (1, 3) or not rgb.size:
        raise FastSSLError(f"an array of {rgb.dtype} {rgb.shape} is no photo: give (H, W, 3) or (H, W) of uint8")
    return np.ascontiguousarray(np.broadcast_to(rgb, (*rgb.shape[:2], 3)))
