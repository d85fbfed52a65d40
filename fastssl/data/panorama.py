"""Perspective views of a 360-degree panorama: what a camera that stands in it would see.

    pixel grid -> rays of the field of view -> roll, pitch, yaw -> longitude, latitude
    -> bilinear look-up in linear light
    -> mean over 2 x 2 rays a pixel -> exposure, white balance, saturation -> gamma, contrast

The geometry is the pinhole camera's; the panorama is equirectangular (width: longitude, height: latitude, 90 degrees at
the top).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

#: Of the stored pictures, so that exposure and white balance multiply light and not pixel values.
GAMMA = 2.2
#: Rays along each side of a pixel.
SUPERSAMPLING = 2
#: Weights of red, green and blue in the luminance (ITU-R BT.709).
LUMINANCE = (0.2126, 0.7152, 0.0722)


@dataclass(frozen=True)
class Cameras:
    """One camera a view; every field is a float tensor (N,), white_balance (N, 3). Angles in degrees.

    Attributes:
        yaw: compass direction; 0 is the panorama's middle column, positive to the right.
        pitch: above the horizon. roll: clockwise turn of the camera about its own axis.
        field_of_view: between the left and the right edge.
        exposure: in stops. white_balance: factors of red, green and blue. saturation: 1 as it is, 0 grey.
        contrast: exponent of the pixel values in 0 .. 1; above 1 shadows are darker.
    """

    yaw: Tensor
    pitch: Tensor
    roll: Tensor
    field_of_view: Tensor
    exposure: Tensor
    white_balance: Tensor
    saturation: Tensor
    contrast: Tensor

    def __len__(self) -> int:
        return len(self.yaw)


def directions(cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """(longitude, latitude) in radians, both (N, size, size), of the rays through the pixels' centres."""
    centres = (torch.arange(size) + 0.5) / size * 2 - 1
    half = (cameras.field_of_view.deg2rad() / 2).tan()[:, None, None]
    right, down = centres[None, None, :] * half, centres[None, :, None] * half
    roll, pitch = cameras.roll.deg2rad()[:, None, None], cameras.pitch.deg2rad()[:, None, None]
    x = right * roll.cos() - down * roll.sin()
    y = -(right * roll.sin() + down * roll.cos())
    up = y * pitch.cos() + pitch.sin()
    forward = pitch.cos() - y * pitch.sin()
    longitude = torch.atan2(x, forward) + cameras.yaw.deg2rad()[:, None, None]
    return longitude, torch.atan2(up, torch.hypot(x, forward))


def render(panorama: Tensor, cameras: Cameras, size: int) -> Tensor:
    """The views of ``cameras``.

    Args:
        panorama: (3, H, W) uint8, equirectangular, W covers 360 degrees.
        size: pixels along each side of a view.

    Returns:
        (N, size, size, 3) uint8.
    """
    light = (panorama.float() / 255) ** GAMMA
    # One column more on each side: the left and the right edge are neighbours.
    light = torch.cat([light[:, :, -1:], light, light[:, :, :1]], 2)
    width = panorama.shape[2]
    longitude, latitude = directions(cameras, size * SUPERSAMPLING)
    column = (longitude / (2 * math.pi) + 0.5) % 1 * width  # in pixels from the left edge
    x = (column + 1) / (width + 2) * 2 - 1
    y = -latitude / (math.pi / 2)
    grid = torch.stack([x, y], -1)
    rays = functional.grid_sample(
        light[None].expand(len(cameras), -1, -1, -1), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    view = functional.avg_pool2d(rays, SUPERSAMPLING)
    view = view * (2**cameras.exposure)[:, None, None, None] * cameras.white_balance[:, :, None, None]
    grey = torch.einsum("nchw,c->nhw", view, view.new_tensor(LUMINANCE))[:, None]
    view = grey + (view - grey) * cameras.saturation[:, None, None, None]
    exponent = (cameras.contrast / GAMMA)[:, None, None, None]
    return (view.clamp(0, 1) ** exponent * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
