"""Crop, antialiased resize and flip of decoded pictures, on the host or on the device.

Both paths compute Pillow's ``picture.crop(box).resize((S, S), filter)``: a triangle or a cubic (a = -0.5) filter whose
support grows with the reduction, normalised inside the box; pixels outside the box play no part.

Host: a compiled loop with Pillow's 8-bit intermediate (`compiled.crop_resize`).
Device: resizing is separable, so a view is ``Wy @ X @ Wx^T`` with the filter's weights as rows of two small matrices.
Boxes, ragged picture sizes and flips are only entries of these, and a batch is two batched matrix products per view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fastssl.pipelines.ops.compiled import crop_views
from fastssl.pipelines.ops.memory import ThreadMemory
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils.transfer import to_device

# Radius of the filter in output pixels when reducing, in source pixels when enlarging.
_SUPPORT = {"bilinear": 1, "bicubic": 2}

#: a view in a table of boxes, as int64
BOX = ("top", "left", "height", "width", "flip")

_memory = ThreadMemory()


def boxes_of(plan: NDArray[np.void]) -> NDArray[np.int64]:
    """(count, B) plan of a view group -> (B, count, 5) int64, the numbers of `BOX`."""
    return np.stack([plan[name].T for name in BOX], axis=-1).astype(np.int64)


def crop_resize_host(
    image: NDArray[np.uint8], boxes: NDArray[np.int64], spec: ViewSpec, views: NDArray[np.uint8], position: int
) -> None:
    """Crop, resize and flip all views that one group wants of one decoded picture, in one compiled call without the
    interpreter lock, from any thread. Differs from Pillow by 1/255, at most by 2. (Pillow 13 may begin with the
    columns; with the bicubic filter a sharp edge shows which pass was first.) ``ValueError``: types, layouts or shapes
    are others, or a box lies outside the image.

    Args:
        image: (H, W, 3) uint8, C-contiguous.
        boxes: (count, 5) int64, a sample's row of `boxes_of`.
        views: (count, B, S, S, 3) uint8, C-contiguous; [:, position] is overwritten.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.flags.c_contiguous:
        raise ValueError(f"a picture must be (H, W, 3) uint8 and C-contiguous, not {image.shape} {image.dtype}")
    if boxes.ndim != 2 or boxes.shape[1] != len(BOX) or boxes.dtype != np.int64:
        raise ValueError(f"boxes must be (count, {len(BOX)}) int64, not {boxes.shape} {boxes.dtype}")
    if views.ndim != 5 or views.dtype != np.uint8 or not (views.flags.c_contiguous and views.flags.writeable):
        raise ValueError(
            f"views must be (count, B, S, S, 3) uint8, C-contiguous and writable, not {views.shape} {views.dtype}"
        )
    if (
        views.shape[0] != len(boxes)
        or views.shape[2:] != (spec.size, spec.size, 3)
        or not 0 <= position < views.shape[1]
    ):
        raise ValueError(f"{len(boxes)} views of {spec.size} px do not go to place {position} of {views.shape}")
    rows, columns = image.shape[0], 3 * spec.size + 1
    scratch = _memory.take(rows * columns).reshape(rows, columns)
    crop_views(image, boxes, spec.interpolation == "bicubic", scratch, views, int(position))


def crop_resize_device(
    packed: Tensor,
    offsets: ArrayLike,
    heights: ArrayLike,
    widths: ArrayLike,
    plans: Sequence[NDArray[np.void]],
    specs: Sequence[ViewSpec],
) -> list[Tensor]:
    """Crop, resize and flip all views of a batch on the device that holds the decoded pictures.

    Works in float32 on the host and in float16 on a GPU, where a result moves by less than 0.3 grey levels before it is
    rounded to uint8. Never waits for the device: sizes come from the host, and one small table goes up from pinned
    memory. ``ValueError``: shapes differ, or a picture lies outside ``packed``.

    Args:
        packed: 1-D uint8 tensor, the decoded pictures one after the other. Rows are read in windows of the chunk's
            width, so pictures at the very end need up to 3 * (largest width + 8) spare bytes behind them; where they
            are missing the buffer is copied once.
        offsets, heights, widths: (B,) host integers; picture b is (heights[b], widths[b], 3) at packed[offsets[b]:].
        plans: one (count, B) plan per view group.

    Returns:
        For each group a (count * B, 3, S, S) uint8 tensor in channels-last layout; view k of sample b is row k * B + b.
    """
    offsets, heights, widths = (np.asarray(array, dtype=np.int64) for array in (offsets, heights, widths))
    batch = offsets.size
    if heights.shape != (batch,) or widths.shape != (batch,) or packed.dim() != 1 or packed.dtype != torch.uint8:
        raise ValueError("packed must be one-dimensional uint8; offsets, heights and widths must have one shape (B,)")
    if len(plans) != len(specs) or any(plan.shape != (spec.count, batch) for plan, spec in zip(plans, specs)):
        raise ValueError(f"one plan of shape (count, {batch}) is needed for each of the {len(specs)} view groups")
    if batch and (offsets.min() < 0 or (offsets + 3 * heights * widths).max() > packed.numel()):
        raise ValueError(f"a picture lies outside the packed buffer of {packed.numel()} bytes")

    outputs = [
        torch.empty((spec.count, batch, spec.size, spec.size, 3), dtype=torch.uint8, device=packed.device)
        for spec in specs
    ]
    dtype = torch.float16 if packed.is_cuda else torch.float32
    chunks = plan_chunks(heights, widths, specs, dtype.itemsize, budget=2**30 if packed.is_cuda else 2**26)
    order = np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int64)

    # One table for the whole batch, in the order of the chunks: index, offset, height, width, then each view's box.
    about = np.stack([order, offsets[order], heights[order], widths[order]], axis=1)
    columns = [len(BOX) * spec.count for spec in specs]
    boxes = [boxes_of(plan)[order].reshape(batch, wide) for plan, wide in zip(plans, columns)]
    table = to_device(np.concatenate([about, *boxes], axis=1), packed.device)

    shortfall = max((_last_byte(offsets, heights, widths, chunk) for chunk in chunks), default=0) - packed.numel()
    if shortfall > 0:
        packed = F.pad(packed, (0, shortfall))
    for chunk, rows in zip(chunks, table.split([len(chunk) for chunk in chunks])):
        head, *groups = rows.split([4, *columns], dim=1)
        source = _gather(packed, head, _padded(heights[chunk]), _padded(widths[chunk]), dtype)
        for group, plan, spec, output in zip(groups, plans, specs, outputs):
            own = group.unflatten(1, (spec.count, len(BOX)))
            _crop_group(source, own, plan[:, chunk], spec, head[:, 0], output)
    return [output.flatten(0, 1).permute(0, 3, 1, 2) for output in outputs]


def _padded(lengths: NDArray[np.int64]) -> int:
    """The common length of a chunk: a multiple of eight, which tensor cores want."""
    return -(-int(lengths.max()) // 8) * 8


def _last_byte(
    offsets: NDArray[np.int64], heights: NDArray[np.int64], widths: NDArray[np.int64], chunk: NDArray[np.int64]
) -> int:
    """One past the last byte that `_gather` reads for a chunk."""
    return int((offsets[chunk] + 3 * (heights[chunk] - 1) * widths[chunk]).max()) + 3 * _padded(widths[chunk])


def plan_chunks(
    heights: NDArray[np.int64], widths: NDArray[np.int64], specs: Sequence[ViewSpec], itemsize: int, budget: int
) -> list[NDArray[np.int64]]:
    """Group samples of (B,) sizes that are similar, so that padding to a common size wastes little and a chunk's
    tensors, with ``itemsize`` bytes per number, fit ``budget`` bytes: index arrays that together hold 0 .. B - 1 once.

    A chunk grows, in order of orientation and area, until padding would make it more than 1.4 times its pictures' own
    pixels (chunks below two megapixels may: they cost less than the kernel launches that splitting adds) or its tensors
    exceed the budget. One picture is always a chunk, whatever its size.
    """
    order = np.lexsort((heights * widths, heights > widths))
    rows_of_weights = sum(spec.count * spec.size for spec in specs)
    largest = max((spec.size for spec in specs), default=0)
    chunks: list[NDArray[np.int64]] = []
    start, tallest, widest, pixels = 0, 0, 0, 0
    for end, sample in enumerate(order):
        height, width = max(tallest, int(heights[sample])), max(widest, int(widths[sample]))
        area, count = int(heights[sample] * widths[sample]), end - start + 1
        padded = count * height * width
        size = count * (
            3 * height * width * (1 + itemsize)
            + (height + width) * rows_of_weights * itemsize
            + 3 * (height + largest) * largest * itemsize
        )
        wasteful = padded > max(1.4 * (pixels + area), 2e6)
        if count > 1 and (wasteful or size > budget):
            chunks.append(order[start:end])
            start, height, width, pixels = end, int(heights[sample]), int(widths[sample]), 0
        tallest, widest, pixels = height, width, pixels + area
    if start < len(order):
        chunks.append(order[start:])
    return chunks


def _gather(packed: Tensor, rows: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """The pictures of a chunk as (b, height, 3, width): planar within a row, so that both products are batched GEMMs.

    Rows are fetched by one index_select over an overlapping view of the packed bytes in which row s is the window that
    starts at byte s. What a window holds beyond its picture belongs to someone else; its weights are zero.
    """
    window = 3 * width
    windows = packed.as_strided((packed.numel() - window + 1, window), (1, 1))
    offset, own_height, own_width = rows[:, 1:2], rows[:, 2:3], rows[:, 3:4]
    line = torch.arange(height, device=packed.device).minimum(own_height - 1)
    lines = windows.index_select(0, (offset + 3 * line * own_width).flatten())
    source = torch.empty((rows.shape[0], height, 3, width), dtype=dtype, device=packed.device)
    return source.copy_(lines.view(-1, height, width, 3).permute(0, 1, 3, 2))


def _crop_group(
    source: Tensor, boxes: Tensor, plan: NDArray[np.void], spec: ViewSpec, index: Tensor, output: Tensor
) -> None:
    """All views of one group for one chunk.

    Args:
        source: (b, H, 3, W) pictures.
        boxes: (b, count, 5) integers on the device, as `BOX`. plan: (count, b), the same on the host.
        index: (b,) places of the chunk's samples in the batch.
        output: (count, B, S, S, 3) uint8, written at ``index``.
    """
    batch, height, _, width = source.shape
    size = spec.size
    top, left, box_height, box_width, flip = boxes.unbind(-1)
    rows = filter_matrices(top, box_height, None, spec, height, int(plan["height"].max()), source.dtype)
    columns = filter_matrices(left, box_width, flip, spec, width, int(plan["width"].max()), source.dtype)
    for view in range(spec.count):
        narrow = torch.bmm(source.view(batch, height * 3, width), columns[:, view].transpose(1, 2))  # (b, 3H, S)
        if spec.interpolation == "bicubic":
            narrow.clamp_(0, 255)  # Pillow stores this stage in 8 bits, which cuts the cubic's overshoot
        small = torch.bmm(rows[:, view], narrow.view(batch, height, 3 * size))  # (b, S, 3S)
        small.clamp_(0, 255).add_(0.5)  # the conversion to uint8 cuts the fraction off
        pixels = small.view(batch, size, 3, size).permute(0, 1, 3, 2)
        output[view].index_copy_(0, index, pixels.to(torch.uint8, memory_format=torch.contiguous_format))


def filter_matrices(
    start: Tensor, length: Tensor, flip: Tensor | None, spec: ViewSpec, extent: int, longest: int, dtype: torch.dtype
) -> Tensor:
    """Resize weights along one axis for a batch of boxes, (b, v, S, extent): each row sums to one and is zero outside
    its box. Source: Pillow's resampling (Resample.c, precompute_coeffs). Only the few taps of each row are computed:
    the whole matrix would cost more memory traffic than the product it feeds.

    Args:
        start, length: (b, v) integers, the box along this axis.
        flip: (b, v) integers, 1 where the output runs backwards; None for nowhere.
        extent: length of the source axis; at least start + length.
        longest: the largest of ``length``, known to the host.
        dtype: of the result; the weights are computed in float32.
    """
    size, radius = spec.size, _SUPPORT[spec.interpolation]
    place = torch.arange(size, device=start.device, dtype=torch.float32)
    if flip is not None:
        place = torch.where(flip.bool()[..., None], (size - 1) - place, place)
    scale = length[..., None].float() / size  # source pixels per output pixel
    stretch = scale.clamp_min(1.0)
    center = (place + 0.5) * scale  # (b, v, S), in source pixels from the start of the box
    taps = min(extent, math.ceil(2 * radius * max(longest / size, 1.0)) + 2)
    # Shifting a window that would leave the picture keeps its taps distinct, and it still covers every weight that is
    # not zero.
    first = ((center - radius * stretch - 0.5).floor().long() + start[..., None]).clamp_(0, extent - taps)
    columns = first[..., None] + torch.arange(taps, device=start.device)  # (b, v, S, taps)
    inside = columns - start[..., None, None]
    weights = _filter((inside.float() + 0.5 - center[..., None]) / stretch[..., None], spec.interpolation)
    weights *= (inside >= 0) & (inside < length[..., None, None])
    weights /= weights.sum(-1, keepdim=True)
    matrices = torch.zeros((*start.shape, size, extent), dtype=dtype, device=start.device)
    return matrices.scatter_(-1, columns, weights.to(dtype))


def _filter(x: Tensor, interpolation: str) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1.0 - x).clamp_min_(0.0)
    a = -0.5  # Keys' cubic as Pillow has it; torch's resize without antialiasing uses -0.75
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x * a - 4.0 * a) * (x < 2.0)
    return torch.where(x < 1.0, near, far)
