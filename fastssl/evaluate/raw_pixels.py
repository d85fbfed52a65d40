"""The reference that a network has to beat before it has learned anything useful: the photo's own pixels, 16x16 RGB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastssl.evaluate.features import EVALUATION_CROP, Features, collect
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.plan.draw import ViewSpec

SIZE = 16


def raw_pixel_features(
    data: BetonReader | str | Path,
    *,
    indices: np.ndarray | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    crop: float = EVALUATION_CROP,
    on_bad: str = "fail",
) -> Features:
    """The centre square of every photo, shrunk to 16x16 with the antialiased filter: 768 normalised RGB values.

    The view is the one a network is evaluated on (same crop, same filter, same normalisation), only smaller, so a
    difference between the two rows is the network's doing. For the arguments see ``extract_features``.
    """

    def flatten(views: Tensor) -> Tensor:
        return views.flatten(1)

    spec = ViewSpec.evaluation(SIZE, crop=crop)
    return collect(flatten, data, spec, indices, batch_size, device=torch.device("cpu"), workers=workers, on_bad=on_bad)
