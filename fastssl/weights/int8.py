"""What int8 costs: the features of a file beside those of its float form, on photos; a part of these calibrates it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from fastssl.errors import FastSSLError, counted
from fastssl.evaluate.features import Bar, Features, collect, silent
from fastssl.evaluate.knn import knn_accuracies, nearest_neighbors
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

    def check(self) -> None:
        """Raises FastSSLError: too few photos, or what ``open_photos`` raises."""
        with open_photos(self.data) as reader:
            if (count := len(reader)) < LEAST:
                raise FastSSLError(f"{self.data}: {counted(count, 'photo')}; --int8 wants at least {LEAST}")


@dataclass(frozen=True)
class Judged:
    """What became of the features.

    Attributes:
        obstacle: why nearest photos judged; empty: kNN did. before, after: percent, of the float form and of int8.
        photos: how many were judged, each by all others (without labels: half of them, by the other half).
        calibration: how many others calibrated.
    """

    obstacle: str
    before: float
    after: float
    photos: int
    calibration: int
    float_size_bytes: int
    float_milliseconds: float | None

    def __str__(self) -> str:
        what = f"{self.obstacle}: nearest photo among {NEIGHBOURS} of the float form" if self.obstacle else "kNN"
        return f"{what} {self.before:.1f} -> {self.after:.1f} % of {counted(self.photos, 'photo')}"


def quantised(
    int8: Int8, view: ViewSpec, run: Run, write: Callable[[Tensor], Run], size_bytes: int, took: float | None
) -> tuple[Run, Judged]:
    """Write the int8 form and judge it. FastSSLError: what ``open_photos`` and ``write`` raise.

    Args:
        view: of photos, as the file takes them. run: the float form. size_bytes, took: of its file.
        write: (N, 3, size, size) images to calibrate on -> the int8 form.
    """
    with open_photos(int8.data) as reader:
        split = choose_split(reader, None, MOST, seed=0)
        index = np.sort(np.concatenate([split.bank_index, split.query_index]))
        places = np.linspace(0, len(index) - 1, min(CALIBRATION, len(index) // 2)).astype(np.int64)
        some, asked = index[places], np.delete(index, places)

        def features(run: Run, form: str) -> Features:
            with int8.bar(f"features, {form}", len(asked)) as advance:
                return collect(run, reader, view, indices=asked, batch_size=32, progress=advance)

        before = features(run, "float")
        images = collect(lambda views: views.flatten(1), reader, view, indices=some).features
        run = write(images.view(-1, 3, view.size, view.size))
        after = features(run, "int8")
    if split.labelled:
        # A fifth as queries would be 400 photos: two points of chance, and int8 is refused for one.
        was, now = (knn_accuracies(each, each, ks=[20], leave_one_out=True)[0].accuracy for each in (before, after))
    else:
        _, near = nearest_neighbors(before.features[::2], before.features[1::2], k=NEIGHBOURS)
        _, nearest = nearest_neighbors(after.features[::2], after.features[1::2], k=1)
        was, now = 100.0, 100 * float((near == nearest).any(dim=1).float().mean())
    return run, Judged(split.obstacle, was, now, len(asked) // (2 - split.labelled), len(some), size_bytes, took)
