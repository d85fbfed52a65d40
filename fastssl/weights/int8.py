"""What int8 costs: the features of a file beside those of its float form, on photos; a part of these calibrates it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from fastssl.errors import FastSSLError, counted
from fastssl.evaluate.features import Bar, Features, collect, silent
from fastssl.evaluate.knn import knn_accuracy, nearest_neighbors
from fastssl.evaluate.online_probe import choose_split
from fastssl.evaluate.photos import open_photos
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.weights.runtimes import Run

#: Photos: fewest that are taken for an answer, those that calibrate, and most that are judged with.
LEAST, CALIBRATION, MOST = 100, 200, 2000
NEIGHBOURS = 10  # without labels a photo is right whose nearest is among so many that the float form finds


@dataclass(frozen=True)
class Int8:
    """``data``: photos to calibrate and to judge on. ``max_drop``: points that int8 may cost; more are refused."""

    data: Path
    max_drop: float = 1.0
    bar: Bar = silent


@dataclass(frozen=True)
class Judged:
    """What became of the features.

    Attributes:
        obstacle: why nearest photos judged; empty: kNN did. before, after: percent, of the float form and of int8.
        bank, queries, calibration: how many photos. The queries are neither in the bank nor calibrate.
    """

    obstacle: str
    before: float
    after: float
    bank: int
    queries: int
    calibration: int
    float_size_bytes: int
    float_milliseconds: float | None

    def __str__(self) -> str:
        what = f"{self.obstacle}: nearest photo among {NEIGHBOURS} of the float form" if self.obstacle else "kNN"
        return f"{what} {self.before:.1f} -> {self.after:.1f} % of {counted(self.queries, 'photo')}"


def quantised(
    int8: Int8, view: ViewSpec, run: Run, write: Callable[[Tensor], Run], size_bytes: int, took: float | None
) -> tuple[Run, Judged]:
    """Write the int8 form and judge it. FastSSLError: too few photos, or what ``open_photos`` and ``write`` raise.

    Args:
        view: of photos, as the file takes them. run: the float form. size_bytes, took: of its file.
        write: (N, 3, size, size) images to calibrate on -> the int8 form.
    """
    with open_photos(int8.data) as reader:
        if (count := len(reader)) < LEAST:
            raise FastSSLError(f"{int8.data}: {counted(count, 'photo')}; --int8 is calibrated and judged on {LEAST}")
        split = choose_split(reader, None, MOST, seed=0)
        bank = split.bank_index
        # Evenly spread over the bank, and so over its classes.
        some = bank[np.linspace(0, len(bank) - 1, min(CALIBRATION, len(bank))).astype(np.int64)]

        def features(run: Run, form: str, index: np.ndarray) -> Features:
            with int8.bar(f"features, {form}", len(index)) as advance:
                return collect(run, reader, view, indices=index, batch_size=32, progress=advance)

        before, queries = features(run, "float", bank), features(run, "float", split.query_index)
        images = collect(lambda views: views.flatten(1), reader, view, indices=some).features
        run = write(images.view(-1, 3, view.size, view.size))
        after, asked = features(run, "int8", bank), features(run, "int8", split.query_index)
    if split.labelled:
        values = knn_accuracy(before, queries).accuracy, knn_accuracy(after, asked).accuracy
    else:
        _, near = nearest_neighbors(before.features, queries.features, k=NEIGHBOURS)
        _, nearest = nearest_neighbors(after.features, asked.features, k=1)
        values = 100.0, 100 * float((near == nearest).any(dim=1).float().mean())
    return run, Judged(split.obstacle, *values, len(bank), len(queries), len(some), size_bytes, took)
