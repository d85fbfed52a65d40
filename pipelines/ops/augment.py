"""Colour jitter, grey, Gaussian blur, solarise and normalisation with per-sample parameters.

The semantics are those of torchvision.transforms.v2 on float pictures in 0 .. 1, operation by operation, clamped in
between; the order is jitter (in the sample's own order), grey, blur, solarise (the flip happened in the crop).

Two drivers give the same numbers: on a CPU a compiled loop over samples, which does what was drawn and nothing else
(see `compiled.py`); on a GPU `DeviceColour`, a fixed row of operations on all samples (see `device_colour.py`).
"""

from __future__ import annotations

import warnings
from concurrent.futures import Executor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastssl.pipelines.ops.compiled import colour
from fastssl.pipelines.ops.device_colour import blur_radius, check_views, device_colour, jitter_factors, parameter_table
from fastssl.pipelines.ops.memory import RecycledMemory
from fastssl.pipelines.plan.draw import VIEW_DTYPE, ViewSpec
from fastssl.utils.transfer import to_device

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
    check_views(views, len(plan))
    if plan.dtype != VIEW_DTYPE or plan.ndim != 1:
        raise ValueError(f"plan must be a one-dimensional array of VIEW_DTYPE, got shape {plan.shape}")
    if views.is_cuda:
        on_device = device_colour(spec, dtype, views.device)
        result = on_device(views, to_device(parameter_table(plan), views.device))
        if on_device.fallback:
            warnings.warn(f"colour operations are not compiled: {on_device.fallback}", stacklevel=2)
        return result
    count, size = len(plan), views.shape[-1]
    source = views.permute(0, 2, 3, 1).contiguous().numpy().reshape(count, 3 * size * size)
    result = (memory or RecycledMemory()).take(count, size, size, 3)
    out = result.numpy().reshape(count, 3 * size * size)
    flags, factors = np.stack([plan["jitter"], plan["grey"], plan["solarise"]], axis=1), jitter_factors(plan)
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
