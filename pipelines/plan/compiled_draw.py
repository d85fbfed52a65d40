"""The compiled loop behind `plan.draw_plan`: one view of one sample after the other, whose random words come from their
own counter.

A batch of 32 costs as much in NumPy calls as two decoded photos, with the interpreter lock held. Here it costs nothing
that can be measured.
"""

from __future__ import annotations

import math

import numpy as np

from fastssl.utils.jit import exact

#: Tries of the crop, and behind their slots those of the other choices (the table is in `plan`).
CROP_TRIES = 10
_FLAGS, _FACTORS, _BLUR = CROP_TRIES, CROP_TRIES + 1, CROP_TRIES + 2

_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@exact
def philox(item: int, epoch: int, last: int, key: int) -> tuple:
    """`rng.philox4x32` of one block, in 64-bit words of which the lower halves are used; all arguments uint64."""
    c0, c1, c2, c3 = item & _MASK, item >> _HALF, epoch, last
    k0, k1 = key & _MASK, key >> _HALF
    for _ in range(10):
        left, right = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (right >> _HALF) ^ c1 ^ k0, right & _MASK, (left >> _HALF) ^ c3 ^ k1, left & _MASK
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


@exact
def _uniform(word: int) -> float:
    return word * 2.0**-32


@exact
def _below(word: int, bound: int) -> int:
    return np.int64((word * np.uint64(bound)) >> _HALF)


@exact
def portable_exp(x: float) -> float:
    """exp(x) for |x| <= 7 to about 1e-14 relative, from additions and multiplications only.

    The C library's own differs in the last bit from machine to machine, and boxes must not. Taylor series of degree 12
    at x / 32, then five squarings.
    """
    small = x * (1.0 / 32.0)
    result = 1.0
    for n in range(12, 0, -1):
        result = result * small * (1.0 / n) + 1.0
    for _ in range(5):
        result = result * result
    return result


@exact
def draw_crop(
    record: np.record,
    item: int,
    epoch: int,
    stream_view: int,
    key: int,
    height: int,
    width: int,
    area: tuple,
    log_ratio: tuple,
    ratio: tuple,
) -> None:
    """torchvision's rule: ten tries, then the centred crop of the nearest allowed ratio. ``area``, ``log_ratio``: lower
    end, length; ``ratio``: both ends.
    """
    for attempt in range(CROP_TRIES):
        to_area, to_ratio, to_top, to_left = philox(item, epoch, stream_view | np.uint64(attempt), key)
        pixels = (height * width) * (area[0] + _uniform(to_area) * area[1])
        shape = portable_exp(log_ratio[0] + _uniform(to_ratio) * log_ratio[1])
        w, h = np.int64(np.rint(math.sqrt(pixels * shape))), np.int64(np.rint(math.sqrt(pixels / shape)))
        if 0 < w <= width and 0 < h <= height:
            record.top, record.left = _below(to_top, height - h + 1), _below(to_left, width - w + 1)
            record.height, record.width = h, w
            return
    h, w = height, width
    if width / height > ratio[1]:
        w = np.int64(np.rint(height * ratio[1]))
    if width / height < ratio[0]:
        h = np.int64(np.rint(width / ratio[0]))
    # A picture of a few pixels can round to nothing or to one more than there is.
    w, h = min(max(w, 1), width), min(max(h, 1), height)
    record.top, record.left, record.height, record.width = (height - h) // 2, (width - w) // 2, h, w


@exact
def draw_colour(
    record: np.record,
    flags: tuple,
    factors: tuple,
    blurs: tuple,
    chances: np.ndarray,
    ranges: np.ndarray,
    sigma: tuple,
    orders: np.ndarray,
) -> None:
    """Flip, colour and blur from three blocks of words.

    ``chances``: flip, jitter, grey, blur, solarise. ``ranges``: (4, 3), lower end, length and neutral value of the
    jitter's factors.
    """
    record.flip = _uniform(flags[0]) < chances[0]
    record.grey = _uniform(flags[3]) < chances[2]
    drawn = _uniform(flags[1]) < chances[1]
    record.jitter = drawn
    order = _below(flags[2], len(orders)) if drawn else 0
    for k in range(4):
        record.order[k] = orders[order, k]
    record.brightness = ranges[0, 0] + _uniform(factors[0]) * ranges[0, 1] if drawn else ranges[0, 2]
    record.contrast = ranges[1, 0] + _uniform(factors[1]) * ranges[1, 1] if drawn else ranges[1, 2]
    record.saturation = ranges[2, 0] + _uniform(factors[2]) * ranges[2, 1] if drawn else ranges[2, 2]
    record.hue = ranges[3, 0] + _uniform(factors[3]) * ranges[3, 1] if drawn else ranges[3, 2]
    record.blur_sigma = sigma[0] + _uniform(blurs[1]) * sigma[1] if _uniform(blurs[0]) < chances[3] else 0.0
    record.solarise = _uniform(blurs[2]) < chances[4]


@exact
def draw_views(
    plan: np.ndarray,
    ids: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    first: int,
    epoch: int,
    key: int,
    crops: bool,
    area: tuple,
    log_ratio: tuple,
    ratio: tuple,
    chances: np.ndarray,
    ranges: np.ndarray,
    sigma: tuple,
    orders: np.ndarray,
) -> None:
    """Fill ``plan``, (count, B) records.

    ``first``: stream and number of the first view as in the counter's last word, uint64 like ``epoch`` and ``key``.
    ``crops``: False leaves the boxes alone.
    """
    for view in range(plan.shape[0]):
        slots = first + (np.uint64(view) << np.uint64(8))
        for sample in range(plan.shape[1]):
            record, item = plan[view, sample], np.uint64(ids[sample])
            if crops:
                draw_crop(record, item, epoch, slots, key, heights[sample], widths[sample], area, log_ratio, ratio)
            flags = philox(item, epoch, slots | np.uint64(_FLAGS), key)
            factors = philox(item, epoch, slots | np.uint64(_FACTORS), key)
            blurs = philox(item, epoch, slots | np.uint64(_BLUR), key)
            draw_colour(record, flags, factors, blurs, chances, ranges, sigma, orders)
