"""The view plan: every random choice of every view, drawn up front into a table of numbers.

A view group (`ViewSpec`) says what may happen to a picture; `draw_plan` decides what does, for each view of each
sample, as one record of `VIEW_DTYPE`. The draws follow torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale,
GaussianBlur, RandomSolarize and RandomHorizontalFlip. A record depends on (seed, epoch, sample id, view number, picture
size) and on nothing else, and the arithmetic is limited to IEEE-exact operations: any machine gets the same bytes.

Blocks of four random words used by a view (see `fastssl.pipelines.plan.philox`):

======  =======================================================
slot    words
======  =======================================================
0 - 9   one try of the crop each: area, ratio, top, left
10      flip, jitter, order of the jitter's operations, grey
11      brightness, contrast, saturation, hue
12      whether to blur, blur sigma, solarise, (not used)
======  =======================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import permutations
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from fastssl.errors import FastSSLError
from fastssl.pipelines.plan.philox import Stream, check_range, stream_word
from fastssl.utils.settings import Real, Share, Whole, settings

#: Values of ``order``: the jitter's operations.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

#: One view of one sample. A choice that was not drawn is stored as its neutral value (factor 1, hue 0, sigma 0),
#: so a record can be applied without its flags.
VIEW_DTYPE = np.dtype(
    [
        ("top", "<i4"),  # crop box in pixels of the decoded picture
        ("left", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("brightness", "<f4"),
        ("contrast", "<f4"),
        ("saturation", "<f4"),
        ("hue", "<f4"),  # in turns of the colour circle, -0.5 .. 0.5
        ("blur_sigma", "<f4"),  # in pixels of the view; 0 = no blur
        ("order", "u1", (4,)),  # the jitter's operations, first to last
        ("flip", "?"),
        ("jitter", "?"),
        ("grey", "?"),
        ("solarise", "?"),
    ]
)

_ORDERS = np.array(list(permutations(range(4))), dtype=np.uint8)  # (24, 4)


class ViewSpecError(FastSSLError, ValueError):
    """A view group's parameter has no meaning; the message names the field."""


_Area = Annotated[Real, Field(ge=1e-6, le=1)]
_Ratio = Annotated[Real, Field(ge=1e-3, le=1e3)]
_Sigma = Annotated[Real, Field(ge=1e-2, le=100)]
_Strength = Annotated[Real, Field(ge=0, le=100)]
_Std = Annotated[Real, Field(ge=1e-6, le=1e6)]
Pixels = Annotated[Whole, Field(ge=1, le=4096)]
AreaRange = tuple[_Area, _Area]


class Normalisation(NamedTuple):
    """What is done last to a picture scaled to 0 .. 1, per channel: (picture - mean) / std."""

    mean: tuple[Share, Share, Share]
    std: tuple[_Std, _Std, _Std]


#: The field's usual one: of ImageNet's photos.
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@settings(error=ViewSpecError)
class ViewSpec:
    """A group of views that share their size and the distribution of their augmentation. ``ViewSpecError``: a field is
    out of range.

    Attributes:
        size: side of the square view in pixels. count: views of this kind per sample.
        area: range of the crop's area as a share of the picture's.
        ratio: range of the crop's aspect ratio width / height, drawn log-uniformly.
        interpolation: "bilinear" or "bicubic", both antialiased.
        flip, jitter, grey, blur: probabilities of the horizontal flip, the colour jitter, turning grey, the Gaussian
            blur.
        brightness, contrast, saturation: factors are uniform in max(0, 1 - x) .. 1 + x.
        hue: uniform in -x .. x turns, at most 0.5.
        blur_sigma: range of its sigma in pixels of the view.
        solarise: probability of inverting the pixels at or above the threshold.
        solarise_threshold: 0 .. 256, in grey levels of 0 .. 255.
        mean, std: see ``Normalisation``.
        center: None, or the side of a centred square crop as a share of the picture's shorter side; then area and ratio
            are not used.
    """

    size: Pixels = 224
    count: Annotated[Whole, Field(ge=1, le=1024)] = 1
    area: AreaRange = (0.2, 1.0)
    ratio: tuple[_Ratio, _Ratio] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: _Strength = 0.4
    contrast: _Strength = 0.4
    saturation: _Strength = 0.4
    hue: Annotated[Real, Field(ge=0, le=0.5)] = 0.1
    grey: Share = 0.2
    blur: Share = 0.5
    blur_sigma: tuple[_Sigma, _Sigma] = (0.1, 2.0)
    solarise: Share = 0.0
    solarise_threshold: Annotated[Whole, Field(ge=0, le=256)] = 128
    mean: tuple[Share, Share, Share] = IMAGENET.mean
    std: tuple[_Std, _Std, _Std] = IMAGENET.std
    center: _Area | None = None

    def __post_init__(self) -> None:
        for name in ("area", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ViewSpecError(f"{name}: the lower end must not exceed the upper one, got {[low, high]}")

    @classmethod
    def evaluation(cls, size: int, crop: float = 0.875, normalisation: Normalisation = IMAGENET) -> ViewSpec:
        """The view that a network is looked at with, normalised as in its training: the centred square of side ``crop``
        x shorter side, resized; nothing random, no colour. With the default crop it is what ``Resize(size / 0.875)``
        and ``CenterCrop(size)`` show, up to a shift of less than one pixel of the source: boxes are whole pixels.
        """
        return cls(size=size, flip=0.0, jitter=0.0, grey=0.0, blur=0.0, center=crop, **normalisation._asdict())


def draw_plan(
    spec: ViewSpec,
    *,
    first_view: int,
    seed: int,
    epoch: int,
    sample_ids: ArrayLike,
    heights: ArrayLike,
    widths: ArrayLike,
) -> NDArray[np.void]:
    """Draw every random choice of a view group for a batch: (count, B) records of VIEW_DTYPE. No global random state is
    read or changed.

    Args:
        first_view: number of views in the groups before this one; view k of the group draws as view first_view + k.
        sample_ids: (B,) non-negative integers. The draws belong to the id, not to the place in the batch.
        heights, widths: (B,) sizes of the decoded pictures in pixels, at least 1.

    Raises:
        ValueError: the arrays' shapes differ, or a picture is empty.
        SeedError: seed, epoch, id or view number is out of range.
    """
    # numba takes half a second to load, and recipes are read without it.
    from fastssl.pipelines.plan.compiled_draw import Chances, draw_views

    ids, heights, widths = (np.asarray(array, dtype=np.int64) for array in (sample_ids, heights, widths))
    if ids.ndim != 1 or heights.shape != ids.shape or widths.shape != ids.shape:
        got = f"{ids.shape}, {heights.shape} and {widths.shape}"
        raise ValueError(f"sample_ids, heights and widths must have one shape (B,), got {got}")
    if ids.size and min(heights.min(), widths.min()) < 1:
        raise ValueError(f"sample {ids[np.minimum(heights, widths).argmin()]} has an empty picture")
    first, _ = stream_word(Stream.PLAN, [first_view, first_view + spec.count - 1])
    plan = np.zeros((spec.count, ids.size), dtype=VIEW_DTYPE)
    if spec.center is not None:
        side = np.maximum(np.rint(spec.center * np.minimum(heights, widths)), 1).astype(np.int64)
        plan["height"], plan["width"] = side, side
        plan["top"], plan["left"] = (heights - side) // 2, (widths - side) // 2
    factors = np.array([factor_range(spec, name) for name in ("brightness", "contrast", "saturation", "hue")])
    factors[:, 1] -= factors[:, 0]
    area, sigma = ((low, high - low) for low, high in (spec.area, spec.blur_sigma))
    flags = np.array([spec.flip, spec.jitter, spec.grey, spec.blur, spec.solarise])
    chances = Chances(spec.center is None, area, log_ratio_range(spec), spec.ratio, sigma, flags, factors, _ORDERS)
    key, epochs = check_range("seed", seed, 64)[()], check_range("epoch", epoch, 32)[()]
    draw_views(plan, check_range("item", ids, 63), heights, widths, first, epochs, key, chances)
    return plan


def draw_plans(
    specs: Iterable[ViewSpec], seed: int, epoch: int, sample_ids: ArrayLike, heights: ArrayLike, widths: ArrayLike
) -> list[NDArray[np.void]]:
    """``draw_plan`` of each group of a multi-crop, one (count, B) array each; their views are numbered through."""
    plans, first_view = [], 0
    for spec in specs:
        sizes = {"sample_ids": sample_ids, "heights": heights, "widths": widths}
        plans.append(draw_plan(spec, first_view=first_view, seed=seed, epoch=epoch, **sizes))
        first_view += spec.count
    return plans


def factor_range(spec: ViewSpec, name: str) -> tuple[float, float, float]:
    """Lowest, highest and neutral factor of one of the jitter's operations, as in torchvision's ColorJitter."""
    strength = getattr(spec, name)
    if name == "hue":
        return -strength, strength, 0.0
    return max(0.0, 1.0 - strength), 1.0 + strength, 1.0


def log_ratio_range(spec: ViewSpec) -> tuple[float, float]:
    """Lower end and length of the range of log(ratio), rounded to float32: the last bit of a logarithm differs between
    C libraries, and boxes must not.
    """
    low = float(np.float32(math.log(spec.ratio[0])))
    return low, float(np.float32(math.log(spec.ratio[1]))) - low
