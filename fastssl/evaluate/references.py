"""References that a network has to beat before it has learned anything useful: a photo's pixels, and its colours.

Both read the view that a network is evaluated on (same crop, same antialiased filter), only smaller, so that a
difference between the rows is the network's doing; mean and std do not follow the recipe, nor do these rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl.evaluate.features import EVALUATION_CROP, Features, collect
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.plan.draw import Normalisation, ViewSpec

#: Bins for each of red, green and blue: 512 colours. On the sample set a joint histogram is well above three separate
#: ones (kNN 38 % to 33 %), and its square root far above the plain shares (28 %).
BINS = 8
#: Sides of the views in pixels: of which the colours are counted, and which is taken as it is.
COLOUR_SIZE, RAW_SIZE = 64, 16


def raw_pixel_features(data: BetonReader | str | Path, *, crop: float = EVALUATION_CROP, **how: Any) -> Features:
    """The centre square of every photo at 16x16: 768 RGB values, ImageNet's mean and std. ``how``: of ``collect``."""
    return collect(lambda views: views.flatten(1), data, ViewSpec.evaluation(RAW_SIZE, crop=crop), **how)


def colour_histogram_features(data: BetonReader | str | Path, *, crop: float = EVALUATION_CROP, **how: Any) -> Features:
    """For every photo the square root of each colour's share of the pixels at 64x64: 512 values from 0 to 1, whose
    squares sum to 1. ``how``: of ``collect``.

    It knows colours and no shapes, and many labels go with a colour (leaves, sky, a brand's logo). With the root the
    cosine of two rows is the Bhattacharyya coefficient of their histograms, so a small patch of a telling colour counts
    beside a large background.
    """
    spec = ViewSpec.evaluation(COLOUR_SIZE, crop, Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    return collect(histograms, data, spec, **how)


def histograms(views: Tensor) -> Tensor:
    """(N, 3, S, S) in 0 .. 1, steps of 1/255 -> (N, BINS ** 3) float32; bin (red * BINS + green) * BINS + blue."""
    level = (views.flatten(2) * 255).round().long() * BINS // 256
    colour = (level[:, 0] * BINS + level[:, 1]) * BINS + level[:, 2]  # (N, S * S)
    counts = torch.zeros(len(views), BINS**3).scatter_add_(1, colour, torch.ones(colour.shape))
    return (counts / colour.shape[1]).sqrt()
