"""Views as torchvision and Pillow make them from the same plan: slow, one at a time, and obviously right."""

from __future__ import annotations

import numpy as np
import torch
import torchvision.transforms.v2.functional as V2
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from fastssl.pipelines.ops.device_colour import blur_radius
from fastssl.pipelines.plan.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewSpec


def torchvision_crop(picture: np.ndarray, record: np.void, spec: ViewSpec) -> Tensor:
    """Crop, antialiased resize and flip of (H, W, 3) uint8 -> (3, S, S) uint8."""
    box = [int(record[name]) for name in ("top", "left", "height", "width")]
    chw = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    view = V2.resized_crop(chw, *box, [spec.size, spec.size], InterpolationMode(spec.interpolation), antialias=True)
    return V2.horizontal_flip(view) if record["flip"] else view


def pillow_crop(picture: np.ndarray, record: np.void, spec: ViewSpec) -> Image.Image:
    """The same with Pillow."""
    top, left, height, width = (int(record[name]) for name in ("top", "left", "height", "width"))
    size, method = (
        (spec.size, spec.size),
        {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[spec.interpolation],
    )
    view = Image.fromarray(picture).crop((left, top, left + width, top + height)).resize(size, method)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if record["flip"] else view


def torchvision_colour(view: Tensor, record: np.void, spec: ViewSpec) -> tuple[Tensor, Tensor]:
    """Colour operations on (3, S, S) uint8, in float as torchvision does them.

    Returns:
        the view in 0 .. 1, and each value's distance to the threshold of a solarisation (1 without one): a value on the
        threshold to a rounding error may fall on either side of it.
    """
    picture = _jitter(view.float() / 255, record)
    if record["grey"]:
        picture = V2.rgb_to_grayscale(picture, num_output_channels=3)
    if record["blur_sigma"] > 0:
        picture = V2.gaussian_blur(
            picture, [2 * blur_radius(spec, picture.shape[-1]) + 1] * 2, [float(record["blur_sigma"])] * 2
        )
    margin = torch.ones_like(picture)
    if record["solarise"]:
        margin = (picture - spec.solarise_threshold / 255).abs()
        picture = V2.solarize(picture, spec.solarise_threshold / 255)
    return picture, margin


def _jitter(picture: Tensor, record: np.void) -> Tensor:
    if not record["jitter"]:
        return picture
    for operation in record["order"]:
        if operation == BRIGHTNESS:
            picture = V2.adjust_brightness(picture, float(record["brightness"]))
        elif operation == CONTRAST:
            picture = V2.adjust_contrast(picture, float(record["contrast"]))
        elif operation == SATURATION:
            picture = V2.adjust_saturation(picture, float(record["saturation"]))
        elif operation == HUE:
            picture = V2.adjust_hue(picture, float(record["hue"]))
    return picture
