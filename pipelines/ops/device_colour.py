"""The colour operations for a GPU: the same kernels for every batch, compiled where that can be had.

No branch, shape or host value depends on the plan, so they can be captured in a CUDA graph. Hue has one place in each
sample's order, so three blends, hue, three blends hold all 24 orders; places that a sample does not need blend with
factor one, which changes nothing. `torch.compile` makes three kernels and seven matrix products of some 170 operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastssl.pipelines.plan.draw import CONTRAST, HUE, SATURATION, ViewSpec
from fastssl.utils.compiled import Compiled

_LUMINANCE = (0.2989, 0.587, 0.114)  # ITU-R 601-2, with torchvision's digits

# Columns of the parameter table: six blends of three columns (three before hue, three after), then one column each.
_BLENDS = 6
_HUE, _GREY, _BLUR, _FALLOFF, _SOLARISE = range(3 * _BLENDS, 3 * _BLENDS + 5)


def parameter_table(plan: NDArray[np.void]) -> NDArray[np.float32]:
    """The plan as plain numbers for the kernels, (N, 23) float32: six blends of (factor, (1 - factor) * to_luminance,
    (1 - factor) * to_mean), the hue's shift, grey, blur, 1 / (2 sigma^2), solarise; flags are 0 or 1.

    A blend is ``x * factor + (1 - factor) * (to_luminance * luminance + to_mean * mean luminance)``: brightness has (0,
    0), saturation (1, 0), contrast (0, 1).
    """
    count = len(plan)
    table = np.zeros((count, 3 * _BLENDS + 5), dtype=np.float32)
    blends = table[:, : 3 * _BLENDS].reshape(count, _BLENDS, 3)
    blends[:, :, 0] = 1.0
    factors, order = jitter_factors(plan), plan["order"].astype(np.int64)
    hue_place = (order == HUE).argmax(axis=1)
    for place in range(4):
        operation = order[:, place]
        sample = np.flatnonzero(operation != HUE)
        operation = operation[sample]
        # Before hue the blends fill places 0, 1, 2; after it the operation at place p of the order sits at blend p + 2.
        blend = place + 2 * (place > hue_place[sample])
        factor = factors[sample, operation]
        blends[sample, blend, 0] = factor
        blends[sample, blend, 1] = (1 - factor) * (operation == SATURATION)
        blends[sample, blend, 2] = (1 - factor) * (operation == CONTRAST)
    sigma = plan["blur_sigma"]
    falloff = 0.5 / np.where(sigma > 0, sigma, 1.0) ** 2
    table[:, 3 * _BLENDS :] = np.stack([plan["hue"], plan["grey"], sigma > 0, falloff, plan["solarise"]], axis=1)
    return table


def jitter_factors(plan: NDArray[np.void]) -> NDArray[np.float32]:
    """(N, 4), at the operations' numbers."""
    return np.stack([plan["brightness"], plan["contrast"], plan["saturation"], plan["hue"]], axis=1)


def device_colour(spec: ViewSpec, dtype: torch.dtype, device: torch.device) -> DeviceColour:
    """What colours the views of ``spec`` on ``device``, shared by all who ask: compiled on a GPU, unless there is
    nothing to fuse or torch may only use deterministic algorithms (a compiler chooses its kernels by the clock).
    """
    work = max(spec.jitter, spec.grey, spec.blur, spec.solarise) > 0
    compiled = device.type == "cuda" and work and not torch.are_deterministic_algorithms_enabled()
    return _shared(spec, dtype, "inductor" if compiled else None)


class DeviceColour:
    """`augment` with the parameters already on the device, any device: a call takes views and table, (N, 23) float32
    from `parameter_table`; other arguments, result and errors as there. No host sync.

    The first call for a size compiles, in some ten seconds, and makes the blur's constants: call once before capturing.
    ``backend`` is that of torch.compile; None: nothing is compiled.
    """

    def __init__(self, spec: ViewSpec, dtype: torch.dtype, backend: str | Callable[..., Any] | None = None):
        self.spec, self.dtype, self.backend = spec, dtype, backend
        self._stages = [Compiled(stage, backend, fullgraph=True) for stage in (_to_blur, _from_blur)]

    @property
    def fallback(self) -> str:
        """Why something is not compiled, though it should be; else empty."""
        return self._stages[0].reason or self._stages[1].reason

    @torch.no_grad()
    def __call__(self, views: Tensor, table: Tensor) -> Tensor:
        check_views(views, len(table))
        spec, size = self.spec, views.shape[-1]
        planes = self._stages[0](views, table, spec, self.dtype)
        taps = blur_taps(size, blur_radius(spec, size), views.device, planes[1][0].dtype) if planes[1] else ()
        result: Tensor = self._stages[1](planes, table, taps, spec)
        return result


_shared = lru_cache(maxsize=64)(DeviceColour)


def check_views(views: Tensor, count: int) -> None:
    """Raise ValueError where ``views`` are not (``count``, 3, S, S) uint8."""
    if views.dim() != 4 or views.shape[1] != 3 or views.shape[2] != views.shape[3] or views.dtype != torch.uint8:
        raise ValueError(f"views must be (N, 3, S, S) uint8, got {tuple(views.shape)} {views.dtype}")
    if len(views) != count:
        raise ValueError(f"{len(views)} views, but parameters for {count}")


def _to_blur(views: Tensor, table: Tensor, spec: ViewSpec, dtype: torch.dtype) -> list[list[Tensor]]:
    """What comes ahead of the blur: the planes that are not blurred, (N, S * S) normalised of ``dtype`` (finished here,
    they spare the float32 planes, half of what would be moved), and those that the blur reads.
    """
    count, _, size, _ = views.shape
    column = table.split(1, dim=1)  # (N, 1) each: per-sample numbers that broadcast over (N, S * S)
    planes = [
        views[:, channel].to(torch.float32, memory_format=torch.contiguous_format).view(count, size * size).div_(255)
        for channel in range(3)
    ]
    if spec.jitter > 0:
        # A compiler fuses one mean that all pixels wait for, not six; uncompiled, a second pass moves twice the bytes.
        jitter(planes, column, spec, contrast_mean(planes, column, spec) if torch.compiler.is_compiling() else None)
    if spec.grey > 0:
        grey = luminance(planes)
        for plane in planes:
            plane.lerp_(grey, column[_GREY])  # gives its end points exactly: a share of 0 keeps every bit
    unblurred = [plane.to(torch.float16 if views.is_cuda else torch.float32) for plane in planes if spec.blur > 0]
    return [_finish(planes, column, spec, dtype), unblurred]


def _from_blur(planes: Sequence[list[Tensor]], table: Tensor, taps: Sequence[Tensor], spec: ViewSpec) -> Tensor:
    """The blur and all behind it: the views, channels-last."""
    sharp, unblurred = planes
    size = math.isqrt(sharp[0].shape[1])
    if taps:
        column = table.split(1, dim=1)
        matrices = blur_matrices(column[_FALLOFF], *taps)
        blurred = _finish([blur_by_matrices(plane, matrices) for plane in unblurred], column, spec, sharp[0].dtype)
        sharp = [torch.where(column[_BLUR] > 0, *pair) for pair in zip(blurred, sharp)]
    return torch.stack(sharp, dim=2).view(len(table), size, size, 3).permute(0, 3, 1, 2)


def _finish(planes: Sequence[Tensor], column: Sequence[Tensor], spec: ViewSpec, dtype: torch.dtype) -> list[Tensor]:
    """Solarise and normalise (N, P) planes; the result is three new ones of ``dtype``."""
    if spec.solarise > 0:
        bound, picked = spec.solarise_threshold / 255, column[_SOLARISE] > 0
        planes = [torch.where(picked & (plane >= bound), 1 - plane, plane) for plane in planes]
    return [plane.mul(1 / std).add_(-mean / std).to(dtype) for plane, mean, std in zip(planes, spec.mean, spec.std)]


def jitter(planes: list[Tensor], column: Sequence[Tensor], spec: ViewSpec, mean: Tensor | float | None) -> None:
    """Brightness, contrast, saturation and hue in each sample's own order, in place, of red, green and blue (N, P) in 0
    .. 1. Contrast blends with ``mean``, (N, 1) or for all; None: the mean luminance of the picture as the operations
    before left it, as ColorJitter has it. ``column``: the parameter table's, (N, 1) each.
    """
    for place in range(_BLENDS):
        if place == _BLENDS // 2 and spec.hue > 0:
            # Samples whose hue stays must keep their bits: rounding could carry one over the solarise threshold.
            turned = turn_hue(planes, column[_HUE])
            planes[:] = [torch.where(column[_HUE] != 0, *pair) for pair in zip(turned, planes)]
        factor, to_luminance, to_mean = column[3 * place : 3 * place + 3]
        grey = luminance(planes)
        other = (grey.mean(dim=1, keepdim=True) if mean is None else mean) * to_mean + grey * to_luminance
        for plane in planes:
            plane.mul_(factor).add_(other).clamp_(0, 1)


def contrast_mean(planes: Sequence[Tensor], column: Sequence[Tensor], spec: ViewSpec) -> Tensor:
    """(N, 1): the mean luminance of each picture where contrast comes in its order; the planes stay as they are."""
    until = list(accumulate(to_mean.abs() for to_mean in column[2 : 3 * _BLENDS : 3]))  # not 0 from contrast on
    rest = list(column)
    rest[_HUE] = column[_HUE].masked_fill(until[_BLENDS // 2 - 1] > 0, 0)
    for place in range(_BLENDS):
        for number, unchanged in ((3 * place, 1), (3 * place + 1, 0)):
            rest[number] = column[number].masked_fill(until[place] > 0, unchanged)
    jitter(copies := [plane.clone() for plane in planes], rest, spec, mean=0.0)
    return luminance(copies).mean(dim=1, keepdim=True)


def luminance(planes: Sequence[Tensor]) -> Tensor:
    """Three (N, P) planes -> (N, P), a new tensor."""
    red, green, blue = planes
    return red.mul(_LUMINANCE[0]).add_(green, alpha=_LUMINANCE[1]).add_(blue, alpha=_LUMINANCE[2])


def turn_hue(planes: Sequence[Tensor], shift: Tensor) -> list[Tensor]:
    """Turn the hue of each sample with value and chroma kept: torchvision's way through HSV without its choices.

    With the lowest channel moved to 0 and the highest to 1, the hue in sixths of a turn is q = 1 + green + blue - red,
    counted from red towards green when green >= blue and the other way round otherwise; that covers all six sectors.
    Back, a channel is low + chroma * clamp(2 - distance of the hue from the channel's own), and |||difference| - 3| -
    3| is the distance on the circle of six for differences up to 9. `compiled._turn_hue` is the same formula. ``shift``
    is (N, 1) in turns, -0.5 .. 0.5; the result is three new planes.
    """
    red, green, blue = planes
    low = torch.minimum(red, green).minimum(blue)
    chroma = torch.maximum(red, green).maximum(blue).sub_(low)
    # Of grey pixels 1, without effect as chroma is 0.
    hue = (green + blue).sub_(red).sub_(low).div_(chroma.clamp_min(1e-12)).add_(1)
    hue.copysign_(green - blue).add_(shift * 6)  # -6 .. 6
    top = low.add_(chroma, alpha=2)
    own = (0, 2, -2)  # red, green, blue on the circle
    return [
        torch.addcmul(top, chroma, (hue - at).abs_().sub_(3).abs_().sub_(3).abs_().clamp_(1, 2), value=-1) for at in own
    ]


@lru_cache(maxsize=32)
def blur_taps(size: int, radius: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The blur's constants for 2 * radius + 1 taps along an axis: their squared distances (taps,) float32, and (taps, S
    * S) of 0 and 1, whose entry (k, i * S + j) says that tap k of place i reads place j. torch.compile does not see a
    cache and would make them anew at every call, hence outside of what is compiled.
    """
    line = torch.arange(-radius, size + radius).abs()
    line = torch.where(line >= size, 2 * (size - 1) - line, line)  # reflected; the border itself is not repeated
    places = torch.stack([torch.eye(size)[line[k : k + size]] for k in range(2 * radius + 1)])
    squares = torch.arange(-radius, radius + 1, dtype=torch.float32) ** 2
    return squares.to(device), places.flatten(1).to(device=device, dtype=dtype)


def blur_radius(spec: ViewSpec, size: int) -> int:
    """Of the blur's kernel: three of the largest sigmas, at most what reflection at a tiny view's border can fill."""
    return min(math.ceil(3 * spec.blur_sigma[1]), size - 1)


def blur_matrices(falloff: Tensor, squares: Tensor, places: Tensor) -> Tensor:
    """The blur along one axis as matrices, reflection included: (N, 1) of 1 / (2 sigma^2) -> (N, S, S)."""
    weights = torch.exp(-falloff * squares)  # torch.softmax would use the thread pool even for these few numbers
    weights = weights / weights.sum(dim=1, keepdim=True)
    size = math.isqrt(places.shape[1])
    return (weights.to(places.dtype) @ places).view(len(falloff), size, size)


def blur_by_matrices(plane: Tensor, matrices: Tensor) -> Tensor:
    """The blur of (N, S * S) by matrices (N, S, S) of its type as two batched products M X M^T: more multiplications,
    but few kernels and all of them for tensor cores. The result is float32; of float16 it is off by less than 0.3/255.
    """
    return torch.bmm(torch.bmm(matrices, plane.view(matrices.shape)), matrices.transpose(1, 2)).float().flatten(1)
