"""Colour jitter, grey, Gaussian blur, solarise and normalisation with per-sample parameters.

Takes uint8 views and their plan, gives normalised channels-last tensors. The semantics are those of torchvision.transforms.v2 on
float pictures in 0 .. 1, operation by operation, clamped in between; the order is jitter (in the sample's own order), grey, blur,
solarise (the flip happened in the crop).

Two drivers share the operations:

* `augment_host` sorts the samples by what was drawn, does only that, and works in pieces that stay in the cache and
  below the size at which torch would wake its thread pool: it is meant to run beside a training step that owns the pool.
* `augment_device` has no branch, no shape and no host value that depends on the plan: the same kernels for every batch, so it can be
  captured in a CUDA graph or compiled. Hue has one place in each sample's order, so three blends, hue, three blends
  hold all 24 orders; places that a sample does not need blend with factor one, which changes nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastssl.pipelines.crop import to_device
from fastssl.pipelines.plan import BRIGHTNESS, CONTRAST, HUE, SATURATION, VIEW_DTYPE, ViewSpec

_LUMINANCE = (0.2989, 0.587, 0.114)  # ITU-R 601-2, with torchvision's digits

# Columns of the parameter table: six blends of three columns (three before hue, three after), then one column each.
_BLENDS = 6
_HUE, _GREY, _BLUR, _FALLOFF, _SOLARISE = range(3 * _BLENDS, 3 * _BLENDS + 5)
_COLUMNS = 3 * _BLENDS + 5

# torch runs element-wise operations of fewer elements than this on the calling thread alone.
_SERIAL_ELEMENTS = 32768

# On the host, the blur of larger views works in bands of this many rows: a full matrix would mostly multiply zeros.
_BAND = 64


def augment(views: Tensor, plan: NDArray[np.void], spec: ViewSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """Apply the plan's colour operations and normalise.

    Args:
        views: (N, 3, S, S) uint8, channels-last (other layouts give the same numbers more slowly).
        plan: (N,) records of VIEW_DTYPE; the crop box and the flip are not used.
        spec: the view group: solarise threshold, largest sigma, mean and std; an operation whose probability there is 0 is left out.
        dtype: of the result. Everything is computed in float32 (on a GPU the blur multiplies in float16).

    Returns:
        (N, 3, S, S) of ``dtype`` in channels-last layout on the device of ``views``: (picture / 255 - mean) / std.

    Raises:
        ValueError: the views' shape or type, or the plan's, is not as above.
    """
    _check(views, len(plan))
    if plan.dtype != VIEW_DTYPE or plan.ndim != 1:
        raise ValueError(f"plan must be a one-dimensional array of VIEW_DTYPE, got shape {plan.shape}")
    if views.is_cuda:
        return augment_device(views, to_device(parameter_table(plan), views.device), spec, dtype)
    return augment_host(views, plan, spec, dtype)


def _check(views: Tensor, count: int) -> None:
    if views.dim() != 4 or views.shape[1] != 3 or views.shape[2] != views.shape[3] or views.dtype != torch.uint8:
        raise ValueError(f"views must be (N, 3, S, S) uint8, got {tuple(views.shape)} {views.dtype}")
    if len(views) != count:
        raise ValueError(f"{len(views)} views, but parameters for {count}")


def parameter_table(plan: NDArray[np.void]) -> NDArray[np.float32]:
    """The plan as plain numbers for the kernels.

    A blend is ``x * factor + (1 - factor) * (to_luminance * luminance + to_mean * mean luminance)``: brightness has (0, 0), saturation (1, 0), contrast (0, 1).

    Returns:
        (N, 23) float32: six blends of (factor, (1 - factor) * to_luminance, (1 - factor) * to_mean), the hue's shift, grey, blur,
        1 / (2 sigma^2), solarise; flags are 0 or 1.
    """
    count = len(plan)
    table = np.zeros((count, _COLUMNS), dtype=np.float32)
    blends = table[:, : 3 * _BLENDS].reshape(count, _BLENDS, 3)
    blends[:, :, 0] = 1.0
    factors = np.stack([plan["brightness"], plan["contrast"], plan["saturation"], plan["hue"]], axis=1)
    order = plan["order"].astype(np.int64)
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
    table[:, _HUE], table[:, _GREY], table[:, _SOLARISE], table[:, _BLUR] = plan["hue"], plan["grey"], plan["solarise"], sigma > 0
    table[:, _FALLOFF] = 0.5 / np.where(sigma > 0, sigma, 1.0) ** 2
    return table


def augment_device(views: Tensor, table: Tensor, spec: ViewSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """`augment` with the parameters already on the device; the same kernels whatever the plan, no allocation that depends on it, no host sync.

    Args:
        views: (N, 3, S, S) uint8.
        table: (N, 23) float32 on the same device, from `parameter_table`.
        spec, dtype: as in `augment`.

    Returns:
        (N, 3, S, S) of ``dtype``, channels-last.
    """
    _check(views, len(table))
    column = table[:, :, None, None, None].unbind(1)  # per-sample numbers that broadcast over (N, 3, S, S)
    picture = torch.empty(views.shape, dtype=torch.float32, device=views.device).copy_(views).div_(255)
    if spec.jitter > 0:
        for blend in range(_BLENDS):
            if blend == _BLENDS // 2 and spec.hue > 0:
                adjust_hue(picture, column[_HUE])
            adjust(picture, *column[3 * blend : 3 * blend + 3])
    if spec.grey > 0:
        # lerp gives its end points exactly, so samples that are not grey keep their bits.
        picture.lerp_(luminance(picture), column[_GREY])
    if spec.blur > 0:
        exact = torch.float16 if views.is_cuda else torch.float32
        picture = torch.where(column[_BLUR] > 0, gaussian_blur(picture, table[:, _FALLOFF], blur_radius(spec, views.shape[-1]), exact), picture)
    if spec.solarise > 0:
        inverted = (picture >= spec.solarise_threshold / 255) & (column[_SOLARISE] > 0)
        picture = torch.where(inverted, 1 - picture, picture)
    scale, shift = _normalisation(spec)
    scale, shift = (_constant(values, views.device) for values in (scale, shift))
    result = torch.empty(views.shape, dtype=dtype, device=views.device, memory_format=torch.channels_last)
    return result.copy_(picture.mul_(scale).add_(shift))


def augment_host(views: Tensor, plan: NDArray[np.void], spec: ViewSpec, dtype: torch.dtype = torch.float32) -> Tensor:
    """`augment` on the CPU: only what was drawn is computed, a few samples at a time. Arguments and result as there."""
    _check(views, len(plan))
    size = views.shape[-1]
    result = torch.empty(views.shape, dtype=dtype, memory_format=torch.channels_last)
    order = plan["order"].astype(np.int64)
    hue_place = np.where(plan["jitter"], (order == HUE).argmax(axis=1), -1)
    kind = np.stack([hue_place, plan["grey"], plan["blur_sigma"] > 0, plan["solarise"]], axis=1)
    # Samples of a piece share what was drawn; within it, equal operations lie side by side and most blends are of one operation.
    sequence = np.lexsort((order[:, 3], order[:, 2], order[:, 1], order[:, 0], *kind.T))
    kind, table = kind[sequence], torch.from_numpy(parameter_table(plan)[sequence])
    operations = order[sequence]
    most = max(1, (_SERIAL_ELEMENTS - 1) // (3 * size * size))
    radius = blur_radius(spec, size)
    scale, shift = _normalisation(spec)
    start = 0
    while start < len(plan):
        end = start + 1
        while end < len(plan) and end - start < most and (kind[end] == kind[start]).all():
            end += 1
        samples = sequence[start:end].tolist()
        picture = torch.empty((len(samples), 3, size, size))
        for row, sample in enumerate(samples):
            picture[row].copy_(views[sample])
        picture.div_(255)
        hue_at, grey, blur, solarise = (int(value) for value in kind[start])
        if hue_at >= 0:
            column = table[start:end, :, None, None, None].unbind(1)
            for place in range(4):
                if place == hue_at:
                    if spec.hue > 0:
                        adjust_hue(picture, column[_HUE])
                    continue
                present = set(operations[start:end, place].tolist())
                factor, to_luminance, to_mean = column[3 * (place + 2 * (place > hue_at)) :][:3]
                adjust(picture, factor, to_luminance if SATURATION in present else None, to_mean if CONTRAST in present else None)
        if grey:
            picture.copy_(luminance(picture).expand_as(picture))
        if blur:
            picture = gaussian_blur(picture, table[start:end, _FALLOFF], radius, torch.float32)
        if solarise:
            picture = torch.where(picture >= spec.solarise_threshold / 255, 1 - picture, picture)
        for channel in range(3):
            picture[:, channel].mul_(scale[channel]).add_(shift[channel])
        for row, sample in enumerate(samples):
            result[sample].copy_(picture[row])
        start = end
    return result


def luminance(picture: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, 1, S, S)."""
    red, green, blue = picture[:, 0:1], picture[:, 1:2], picture[:, 2:3]
    return red.mul(_LUMINANCE[0]).add_(green, alpha=_LUMINANCE[1]).add_(blue, alpha=_LUMINANCE[2])


def adjust(picture: Tensor, factor: Tensor, to_luminance: Tensor | None, to_mean: Tensor | None) -> None:
    """Brightness, contrast or saturation of each sample, in place: blend with black, the mean luminance, or the luminance.

    Args:
        picture: (N, 3, S, S) float32 in 0 .. 1.
        factor, to_luminance, to_mean: (N, 1, 1, 1), three columns of `parameter_table`; None for a share that is 0 in every sample.
    """
    other = None
    if to_luminance is not None or to_mean is not None:
        grey = luminance(picture)
        # The mean is taken here, after the operations that precede this one, as ColorJitter does.
        other = None if to_mean is None else grey.mean(dim=(2, 3), keepdim=True) * to_mean
        if to_luminance is not None:
            grey.mul_(to_luminance)
            other = grey if other is None else grey.add_(other)
    picture.mul_(factor)
    if other is not None:
        picture.add_(other)
    picture.clamp_(0, 1)


def adjust_hue(picture: Tensor, shift: Tensor) -> None:
    """Turn the hue of each sample, in place, with value and saturation kept as in HSV.

    The way back from HSV is the closed form low + chroma * clamp(|h - 3| - 1) and its two rotations, which equals torchvision's choice among six sectors.

    Args:
        picture: (N, 3, S, S) float32 in 0 .. 1.
        shift: (N, 1, 1, 1) in turns.
    """
    red, green, blue = picture.unbind(1)
    high, low = torch.maximum(red, green).maximum(blue), torch.minimum(red, green).minimum(blue)
    chroma = high - low
    inverse = chroma.clamp_min(1e-12).reciprocal_()  # a grey pixel has differences of zero, and stays at hue zero
    hue = torch.where(
        high == red,
        (green - blue).mul_(inverse),
        torch.where(high == green, (blue - red).mul_(inverse).add_(2), (red - green).mul_(inverse).add_(4)),
    )
    hue.add_(shift[:, 0], alpha=6)
    hue.sub_((hue / 6).floor_(), alpha=6)  # 0 .. 6
    torch.addcmul(low, chroma, (hue - 3).abs_().sub_(1).clamp_(0, 1), out=red)
    torch.addcmul(low, chroma, (hue - 2).abs_().neg_().add_(2).clamp_(0, 1), out=green)
    torch.addcmul(low, chroma, (hue - 4).abs_().neg_().add_(2).clamp_(0, 1), out=blue)


def blur_radius(spec: ViewSpec, size: int) -> int:
    """Radius of the blur's kernel: three of the largest sigmas, but no more than reflection at the border of a tiny view can fill."""
    return min(math.ceil(3 * spec.blur_sigma[1]), size - 1)


def gaussian_blur(picture: Tensor, falloff: Tensor, radius: int, exact: torch.dtype) -> Tensor:
    """Blur each sample with its own sigma, borders reflected; equals torchvision's gaussian_blur with kernel size 2 * radius + 1.

    A blur along one axis is a product with an S x S band matrix in which the reflection is folded in, so the whole batch is a
    few batched matrix products with no padding and no loop over taps.

    Args:
        picture: (N, 3, S, S) float32.
        falloff: (N,) 1 / (2 sigma^2).
        radius: 0 <= radius < S.
        exact: type of the factors of the products. With float16 the error is below 0.3/255.

    Returns:
        (N, 3, S, S) float32, a new tensor.
    """
    count, _, size, _ = picture.shape
    distance = torch.arange(-radius, radius + 1, device=picture.device, dtype=torch.float32)
    weights = torch.exp(-falloff[:, None] * distance**2)
    weights = weights / weights.sum(1, keepdim=True)
    matrices = (weights.to(exact) @ _reflected_taps(size, radius, picture.device, exact)).view(count, size, size)
    planes = picture.to(exact)
    along = torch.empty_like(planes)
    blurred = torch.empty_like(planes)
    # A GPU is faster with one product over everything than with bands.
    band = size if picture.is_cuda else _BAND
    for start in range(0, size, band):
        rows = slice(start, min(start + band, size))
        near = slice(max(0, start - radius), min(size, start + band + radius))
        part = planes.view(count, 3 * size, size)[:, :, near]
        along.view(count, 3 * size, size)[:, :, rows] = torch.bmm(part, matrices[:, rows, near].transpose(1, 2))
    for start in range(0, size, band):
        rows = slice(start, min(start + band, size))
        near = slice(max(0, start - radius), min(size, start + band + radius))
        for channel in range(3):
            blurred[:, channel, rows] = torch.bmm(matrices[:, rows, near], along[:, channel, near])
    return blurred.float()


@lru_cache(maxsize=32)
def _reflected_taps(size: int, radius: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(2 * radius + 1, size * size) of 0 and 1: entry (k, i * size + j) says that tap k of output i reads input j."""
    taps = np.zeros((2 * radius + 1, size, size), dtype=np.float32)
    places = np.arange(size)
    for k in range(2 * radius + 1):
        source = np.abs(places + k - radius)
        source = np.where(source >= size, 2 * (size - 1) - source, source)
        taps[k, places, source] = 1.0
    return torch.from_numpy(taps.reshape(2 * radius + 1, -1)).to(device=device, dtype=dtype)


def _normalisation(spec: ViewSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel: (x - mean) / std = x * scale + shift."""
    return tuple(1 / std for std in spec.std), tuple(-mean / std for mean, std in zip(spec.mean, spec.std))


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(1, 3, 1, 1) float32. Cached: a graph under capture must not copy from the host."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)
