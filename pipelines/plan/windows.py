"""An order for storage on which random reads are dear (remote, spinning): a few whole files at a time.

In every epoch the files come in a new random order, ``window`` of them at a time, and the samples of such a group are
shuffled exactly, among all of its files. What it costs: the samples of a batch are of one group, or of two where
groups meet. Only the files' counts are needed, and no memory for the samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastssl.pipelines.plan.philox import Stream, keyed_words


@dataclass(frozen=True, eq=False)
class FileWindows:
    """The groups of a set of files.

    Attributes:
        starts: (F + 1,) int64, each file's first sample, and behind them the number of samples.
        window: files of a group; the last group of an epoch may have fewer.
    """

    starts: NDArray[np.int64]
    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    def samples_at(self, positions: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
        """The samples at these positions of an epoch: (k,) int64. ``ValueError``: a position outside."""
        from fastssl.pipelines.plan.permutation import permuted, random_keys  # numba takes half a second to load

        if len(positions) and not 0 <= positions.min() <= positions.max() < self.starts[-1]:
            raise ValueError(f"positions {positions.min()} to {positions.max()} reach beyond {self.starts[-1]} samples")
        files, ends = self._order(seed, epoch)
        groups = np.searchsorted(ends, positions, "right") // self.window
        samples = np.empty(len(positions), np.int64)
        for group in np.unique(groups).tolist():  # a batch lies in one or two
            here, first = groups == group, group * self.window
            begin = ends[first - 1] if first else 0
            own = ends[first : first + self.window] - begin
            inside = permuted(positions[here] - begin, int(own[-1]), random_keys(seed, Stream.ORDER, epoch, group, 3))
            file = np.searchsorted(own, inside, "right")
            samples[here] = self.starts[files[first + file]] + inside - np.append(0, own)[file]
        return samples

    def files_ahead(self, position: int, seed: int, epoch: int) -> list[list[int]]:
        """The numbers of the files, group by group, that an epoch still needs from ``position`` on: what a cache holds,
        and fetches next.
        """
        files, ends = self._order(seed, epoch)
        group = int(np.searchsorted(ends, position, "right")) // self.window
        return [part.tolist() for part in np.split(files, range(self.window, len(files), self.window))[group:]]

    def _order(self, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The files in the epoch's order, and at which position each would end if none were shuffled."""
        files = _file_order(len(self.starts) - 1, seed, epoch)
        return files, np.cumsum(np.diff(self.starts)[files])


@lru_cache(maxsize=2)
def _file_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    words = keyed_words(seed, Stream.ORDER, epoch, np.arange(count), 2).astype(np.uint64)
    order = np.argsort((words[0] << np.uint64(32)) | words[1], kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order
