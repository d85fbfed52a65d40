"""The reference that a network has to beat before it has learned anything useful: the photo's own pixels, 16x16 RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fastssl.evaluate.features import EVALUATION_CROP, Features, collect
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.plan.draw import ViewSpec

SIZE = 16


def raw_pixel_features(data: BetonReader | str | Path, *, crop: float = EVALUATION_CROP, **how: Any) -> Features:
    """The centre square of every photo, shrunk to 16x16 with the antialiased filter: 768 normalised RGB values.

    The view is the one a network is evaluated on (same crop, same filter, same normalisation), only smaller, so a
    difference between the two rows is the network's doing. ``how``: as of ``collect``.
    """

    def flatten(views: Tensor) -> Tensor:
        return views.flatten(1)

    return collect(flatten, data, ViewSpec.evaluation(SIZE, crop=crop), **how)
