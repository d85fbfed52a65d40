"""Colour jitter, grey, Gaussian blur, solarise and normalisation with per-sample parameters.

The semantics are those of torchvision.transforms.v2 on float pictures in 0 .. 1, operation by operation, clamped in
between; the order is jitter (in the sample's own order), grey, blur, solarise (the flip happened in the crop).

Two drivers give the same numbers:

* `augment_host` is a compiled loop over samples, which does what was drawn and nothing else (see `compiled.py`).
* `augment_device` has no branch, no shape and no host value that depends on the plan: the same kernels for every batch,
  so it can be captured in a CUDA graph or compiled. Hue has one place in each sample's order, so three blends, hue,
  three blends hold all 24 orders; places that a sample does not need blend with factor one, which changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastssl.pipelines.ops.compiled import colour
from fastssl.pipelines.ops.memory import RecycledMemory
from fastssl.pipelines.plan.draw import CONTRAST, HUE, SATURATION, VIEW_DTYPE, ViewSpec
from fastssl.utils.transfer import to_device

_LUMINANCE = (0.2989, 0.587, 0.114)  # ITU-R 601-2, with torchvision's digits

# Columns of the parameter table: six blends of three columns (three before hue, three after), then one column each.
_BLENDS = 6
_HUE, _GREY, _BLUR, _FALLOFF, _SOLARISE = range(3 * _BLENDS, 3 * _BLENDS + 5)
_COLUMNS = 3 * _BLENDS + 5

# Views that a thread takes at a time: handing out costs as much as a tenth of a view's colours.
_PART = 8


def augment(
    views: Tensor,
    plan: NDArray[np.void],
    spec: ViewSpec,
    dtype: torch.dtype = torch.float32,
    pool: Executor | None = None,
    memory: RecycledMemory | None = None,
) -> Tensor:
    """Apply the plan's colour operations and normalise: (N, 3, S, S) of ``dtype`` in channels-last layout on the device
    of ``views``, (picture / 255 - mean) / std. ``ValueError``: shapes or types are not as below.

    Args:
        views: (N, 3, S, S) uint8, channels-last (other layouts give the same numbers).
        plan: (N,) records of VIEW_DTYPE, drawn for ``spec``; the crop box and the flip are not used.
        spec: the view group; what it gives no probability or strength is left out.
        dtype: of the result. Everything is computed in float32 (on a GPU the blur multiplies in float16).
        pool: threads that share the work on a CPU; None: the calling one alone. The result is the same to the last bit.
        memory: where the result lies, on a CPU; None: new memory.
    """
    _check(views, len(plan))
    if plan.dtype != VIEW_DTYPE or plan.ndim != 1:
        raise ValueError(f"plan must be a one-dimensional array of VIEW_DTYPE, got shape {plan.shape}")
    if views.is_cuda:
        return augment_device(views, to_device(parameter_table(plan), views.device), spec, dtype)
    return augment_host(views, plan, spec, dtype, pool, memory)


def _check(views: Tensor, count: int) -> None:
    if views.dim() != 4 or views.shape[1] != 3 or views.shape[2] != views.shape[3] or views.dtype != torch.uint8:
        raise ValueError(f"views must be (N, 3, S, S) uint8, got {tuple(views.shape)} {views.dtype}")
    if len(views) != count:
        raise ValueError(f"{len(views)} views, but parameters for {count}")


def parameter_table(plan: NDArray[np.void]) -> NDArray[np.float32]:
    """The plan as plain numbers for the kernels, (N, 23) float32: six blends of (factor, (1 - factor) * to_luminance,
    (1 - factor) * to_mean), the hue's shift, grey, blur, 1 / (2 sigma^2), solarise; flags are 0 or 1.

    A blend is ``x * factor + (1 - factor) * (to_luminance * luminance + to_mean * mean luminance)``: brightness has (0,
    0), saturation (1, 0), contrast (0, 1).
    """
    count = len(plan)
    table = np.zeros((count, _COLUMNS), dtype=np.float32)
    blends = table[:, : 3 * _BLENDS].reshape(count, _BLENDS, 3)
    blends[:, :, 0] = 1.0
    factors, order = _factors(plan), plan["order"].astype(np.int64)
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


def _factors(plan: NDArray[np.void]) -> NDArray[np.float32]:
    """(N, 4), at the operations' numbers."""
    return np.stack([plan["brightness"], plan["contrast"], plan["saturation"], plan["hue"]], axis=1)


def augment_device(views: Tensor, table: Tensor, spec: ViewSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """`augment` with the parameters already on the device, any device: ``table`` (N, 23) float32 from
    `parameter_table`; other arguments and result as there.

    The same kernels and allocations whatever the plan, and no host sync. The blur's constants are made and cached by
    the first call for a size, so call once before capturing a graph.
    """
    _check(views, len(table))
    count, _, size, _ = views.shape
    column = table.split(1, dim=1)  # (N, 1) each: per-sample numbers that broadcast over (N, S * S)
    planes = [
        views[:, channel].to(torch.float32, memory_format=torch.contiguous_format).view(count, size * size).div_(255)
        for channel in range(3)
    ]
    if spec.jitter > 0:
        for place in range(_BLENDS):
            if place == _BLENDS // 2 and spec.hue > 0:
                # Samples whose hue stays must keep their bits: rounding could carry one over the solarise threshold.
                turned = turn_hue(planes, column[_HUE])
                planes = [torch.where(column[_HUE] != 0, *pair) for pair in zip(turned, planes)]
            factor, to_luminance, to_mean = column[3 * place : 3 * place + 3]
            grey = luminance(planes)
            blend(planes, factor, grey.mean(dim=1, keepdim=True) * to_mean + grey * to_luminance)
    if spec.grey > 0:
        grey = luminance(planes)
        for plane in planes:
            plane.lerp_(grey, column[_GREY])  # gives its end points exactly: a share of 0 keeps every bit
    if spec.blur > 0:
        multiplied = torch.float16 if views.is_cuda else torch.float32
        matrices = blur_matrices(column[_FALLOFF], blur_radius(spec, size), size, multiplied)
        planes = [torch.where(column[_BLUR] > 0, blur_by_matrices(plane, matrices), plane) for plane in planes]
    if spec.solarise > 0:
        bound, picked = spec.solarise_threshold / 255, column[_SOLARISE] > 0
        planes = [torch.where(picked & (plane >= bound), 1 - plane, plane) for plane in planes]
    result = torch.empty(views.shape, dtype=dtype, device=views.device, memory_format=torch.channels_last)
    for plane, out, mean, std in zip(planes, result.unbind(1), spec.mean, spec.std):
        out.copy_(plane.mul(1 / std).add_(-mean / std).view(count, size, size))
    return result


def augment_host(
    views: Tensor,
    plan: NDArray[np.void],
    spec: ViewSpec,
    dtype: torch.dtype = torch.float32,
    pool: Executor | None = None,
    memory: RecycledMemory | None = None,
) -> Tensor:
    """`augment` on the CPU, compiled: only what was drawn is computed. Arguments and result as there."""
    _check(views, len(plan))
    count, size = len(plan), views.shape[-1]
    source = views.permute(0, 2, 3, 1).contiguous().numpy().reshape(count, 3 * size * size)
    result = (memory or RecycledMemory()).take(count, size, size, 3)
    out = result.numpy().reshape(count, 3 * size * size)
    flags, factors = np.stack([plan["jitter"], plan["grey"], plan["solarise"]], axis=1), _factors(plan)
    order, sigmas = plan["order"].astype(np.int64), np.ascontiguousarray(plan["blur_sigma"])
    std, mean = np.array(spec.std, np.float32), np.array(spec.mean, np.float32)
    scale, offset = 1 / std, -mean / std
    radius, threshold = blur_radius(spec, size), np.float32(spec.solarise_threshold / 255)

    def part(rows: slice) -> None:
        mine = (source[rows], flags[rows], order[rows], factors[rows], sigmas[rows])
        colour(*mine, radius, threshold, scale, offset, out[rows])

    # Costs differ from sample to sample: parts of a few samples even out between the threads.
    step = count if pool is None else _PART
    parts = [slice(start, start + step) for start in range(0, count, max(step, 1))]
    list(map(part, parts) if pool is None else pool.map(part, parts))
    return result.to(dtype).permute(0, 3, 1, 2)


def luminance(planes: Sequence[Tensor]) -> Tensor:
    """Three (N, P) planes -> (N, P), a new tensor."""
    red, green, blue = planes
    return red.mul(_LUMINANCE[0]).add_(green, alpha=_LUMINANCE[1]).add_(blue, alpha=_LUMINANCE[2])


def blend(planes: Sequence[Tensor], factor: Tensor, other: Tensor) -> None:
    """Brightness, contrast or saturation of each sample, in place: ``clamp(plane * factor + other)``.

    Args:
        planes: red, green, blue, each (N, P) float32 in 0 .. 1.
        factor: (N, 1).
        other: (N, 1) or (N, P), (1 - factor) times what to blend with: black, the mean luminance (of the picture as the
            operations before left it, as ColorJitter has it), or the luminance.
    """
    for plane in planes:
        plane.mul_(factor).add_(other).clamp_(0, 1)


def turn_hue(planes: Sequence[Tensor], shift: Tensor) -> list[Tensor]:
    """Turn the hue of each sample with value and chroma kept: torchvision's way through HSV without its choices.

    With the lowest channel moved to 0 and the highest to 1, the hue in sixths of a turn is q = 1 + green + blue - red,
    counted from red towards green when green >= blue and the other way round otherwise; that covers all six sectors.
    Back, a channel is low + chroma * clamp(2 - distance of the hue from the channel's own), and |||difference| - 3| -
    3| is the distance on the circle of six for differences up to 9. `compiled._turn_hue` is the same formula.

    Args:
        planes: red, green, blue, each (N, P) float32 in 0 .. 1. The result is three new ones.
        shift: (N, 1) in turns, -0.5 .. 0.5.
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


def blur_radius(spec: ViewSpec, size: int) -> int:
    """Radius of the blur's kernel: three of the largest sigmas, but no more than reflection at the border of a tiny
    view can fill.
    """
    return min(math.ceil(3 * spec.blur_sigma[1]), size - 1)


def blur_matrices(falloff: Tensor, radius: int, size: int, dtype: torch.dtype) -> Tensor:
    """The blur along one axis as matrices, reflection included: (N, 1) of 1 / (2 sigma^2) -> (N, S, S) of ``dtype``."""
    distance = torch.arange(-radius, radius + 1, device=falloff.device, dtype=torch.float32)
    weights = torch.exp(-falloff * distance**2)  # torch.softmax would use the thread pool even for these few numbers
    weights = weights / weights.sum(dim=1, keepdim=True)
    taps = _tap_matrices(size, radius, falloff.device, dtype)
    return (weights.to(dtype) @ taps).view(len(falloff), size, size)


def blur_by_matrices(plane: Tensor, matrices: Tensor) -> Tensor:
    """The blur of (N, S * S) float32 by matrices (N, S, S) as two batched products M X M^T: more multiplications, but
    few kernels and all of them for tensor cores. The result is a new tensor.

    With float16 matrices it is off by less than 0.3/255; the products accumulate in float32.
    """
    square = plane.view(matrices.shape).to(matrices.dtype)
    return torch.bmm(torch.bmm(matrices, square), matrices.transpose(1, 2)).float().flatten(1)


@lru_cache(maxsize=32)
def _tap_matrices(size: int, radius: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(2 * radius + 1, S * S) of 0 and 1: entry (k, i * S + j) says that tap k of place i reads place j."""
    line = torch.arange(-radius, size + radius).abs()
    line = torch.where(line >= size, 2 * (size - 1) - line, line)  # reflected; the border itself is not repeated
    taps = torch.stack([torch.eye(size)[line[k : k + size]] for k in range(2 * radius + 1)])
    return taps.flatten(1).to(device=device, dtype=dtype)
