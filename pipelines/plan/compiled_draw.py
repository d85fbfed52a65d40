"""The compiled loops behind `plan.draw_plan` and `plan.philox`: one view of one sample after the other, whose random
words come from their own counter.

A batch of 32 costs as much in NumPy calls as two decoded photos, with the interpreter lock held. Here it costs nothing
that can be measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fastssl.utils.jit import exact

#: Tries of the crop, and behind their slots those of the other choices (the table is in `plan.draw`).
CROP_TRIES = 10
_FLAGS, _FACTORS, _BLUR = CROP_TRIES, CROP_TRIES + 1, CROP_TRIES + 2

_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


class Chances(NamedTuple):
    """What a view group may do, in numbers. A range is (lower end, length) where nothing else is said.

    Attributes:
        crops: False leaves the boxes alone. area, log_ratio, sigma: ranges. ratio: both ends.
        flags: (5,) probabilities of flip, jitter, grey, blur, solarise.
        factors: (4, 3) lower end, length and neutral value of the jitter's factors.
        orders: (24, 4) uint8, those of the jitter's operations.
    """

    crops: bool
    area: tuple[float, float]
    log_ratio: tuple[float, float]
    ratio: tuple[float, float]
    sigma: tuple[float, float]
    flags: np.ndarray
    factors: np.ndarray
    orders: np.ndarray


@exact
def philox(item: int, epoch: int, last: int, key: int) -> tuple:
    """Philox4x32-10 of one block, in 64-bit words of which the lower halves are used; all arguments uint64."""
    c0, c1, c2, c3 = item & _MASK, item >> _HALF, epoch, last
    k0, k1 = key & _MASK, key >> _HALF
    for _ in range(10):
        # 32 x 32 -> 64 bit products: the high half is mixed in, the low half moves one word on.
        left, right = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (right >> _HALF) ^ c1 ^ k0, right & _MASK, (left >> _HALF) ^ c3 ^ k1, left & _MASK
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


@exact
def philox_words(items: np.ndarray, epoch: int, last: np.ndarray, key: int, words: np.ndarray) -> None:
    """`philox` of each of (n,) items and last words into ``words``, (4, n) uint32."""
    for i in range(len(items)):
        words[0, i], words[1, i], words[2, i], words[3, i] = philox(items[i], epoch, last[i], key)


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
def draw_crop(record: np.record, item: int, epoch: int, slots: int, key: int, h: int, w: int, chances: Chances) -> None:
    """torchvision's rule for a picture of h x w: ten tries, then the centred crop of the nearest allowed ratio."""
    area, log_ratio, ratio, height, width = chances.area, chances.log_ratio, chances.ratio, h, w
    for attempt in range(CROP_TRIES):
        to_area, to_ratio, to_top, to_left = philox(item, epoch, slots | np.uint64(attempt), key)
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
def draw_colour(record: np.record, item: int, epoch: int, slots: int, key: int, chances: Chances) -> None:
    """Flip, colour and blur."""
    flags = philox(item, epoch, slots | np.uint64(_FLAGS), key)
    words = philox(item, epoch, slots | np.uint64(_FACTORS), key)
    blurs = philox(item, epoch, slots | np.uint64(_BLUR), key)
    chance, factors, sigma = chances.flags, chances.factors, chances.sigma
    record.flip = _uniform(flags[0]) < chance[0]
    record.grey = _uniform(flags[3]) < chance[2]
    drawn = _uniform(flags[1]) < chance[1]
    record.jitter = drawn
    order = _below(flags[2], len(chances.orders)) if drawn else 0
    for k in range(4):
        record.order[k] = chances.orders[order, k]
    record.brightness = factors[0, 0] + _uniform(words[0]) * factors[0, 1] if drawn else factors[0, 2]
    record.contrast = factors[1, 0] + _uniform(words[1]) * factors[1, 1] if drawn else factors[1, 2]
    record.saturation = factors[2, 0] + _uniform(words[2]) * factors[2, 1] if drawn else factors[2, 2]
    record.hue = factors[3, 0] + _uniform(words[3]) * factors[3, 1] if drawn else factors[3, 2]
    record.blur_sigma = sigma[0] + _uniform(blurs[1]) * sigma[1] if _uniform(blurs[0]) < chance[3] else 0.0
    record.solarise = _uniform(blurs[2]) < chance[4]


@exact
def draw_views(
    plan: np.ndarray,
    ids: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    first: int,
    epoch: int,
    key: int,
    chances: Chances,
) -> None:
    """Fill ``plan``, (count, B) records. ``first``: the first view's last word of the counter, uint64 like ``ids``,
    ``epoch`` and ``key``.
    """
    for view in range(plan.shape[0]):
        slots = first + (np.uint64(view) << np.uint64(8))
        for b in range(plan.shape[1]):
            if chances.crops:
                draw_crop(plan[view, b], ids[b], epoch, slots, key, heights[b], widths[b], chances)
            draw_colour(plan[view, b], ids[b], epoch, slots, key, chances)
