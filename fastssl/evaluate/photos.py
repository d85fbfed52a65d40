"""The photos of an evaluation: a ``.beton`` file, or a folder, with labels; a part to learn from and a part to be
judged on.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.data.photo_source import is_source
from fastssl.distributed.collectives import world_size
from fastssl.distributed.world import first_of_host_speaks
from fastssl.errors import FastSSLError
from fastssl.evaluate.features import ProbeError, split_indices
from fastssl.evaluate.online_probe import require_same_classes
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions


@contextmanager
def open_photos(path: str | Path, workers: int | None = None) -> Iterator[BetonReader]:
    """A ``.beton`` file; or a folder or tar of class folders, converted into a temporary one, JPEGs byte for byte.

    Raises:
        FastSSLError: neither; a folder without photos; or one where several processes evaluate, each of which would
            convert it.
    """
    path = Path(path)
    if not is_source(path):
        with BetonReader(path) as reader:
            yield reader
        return
    if world_size() > 1:
        raise ProbeError(
            f"{path}: several processes read one .beton file; make it with `fastssl convert-imagenet "
            f"{path.name} {path.name}.beton`"
        )
    with tempfile.TemporaryDirectory(prefix="fastssl-") as folder:
        target = Path(folder) / f"{path.name}.beton"
        try:
            # As of a .beton file: a damaged photo is an error, and no figure is over what is left.
            how: dict[str, Any] = {"quality": 95, "workers": workers, "resume": False, "on_bad": "fail"}
            convert(path, target, ConvertOptions(keep_size=True, short_side=None, **how))
            with BetonReader(target) as reader:
                yield reader
        except FastSSLError as error:  # whoever gave a folder knows nothing of the file
            advice = "mend or remove it; `fastssl convert-imagenet` can leave bad photos out"
            said = str(error).replace(str(target), str(path))
            raise FastSSLError(said.replace("--on-bad skip lists bad photos and goes on", advice)) from error


def require_labels(reader: BetonReader) -> np.ndarray:
    """The labels of all samples, (N,) int64.

    Raises:
        ProbeError: the file has no labels.
    """
    if reader.labels is None or (reader.labels < 0).any():
        raise ProbeError(f"{reader.path}: has no labels; convert a class/file folder tree to evaluate on")
    return reader.labels


@dataclass
class LabelledSplit:
    """The part to learn from and the part to be judged on: open files and (n,) int64 sample ids in them; one file where
    nothing was given to judge on.

    Attributes:
        held_out_seed: of the draw of the held-out fifth; None where the second part is a file of its own.
    """

    train: BetonReader
    train_index: np.ndarray
    val: BetonReader
    val_index: np.ndarray
    held_out_seed: int | None

    @property
    def classes(self) -> np.ndarray:
        """(C,) int64, the labels that the first part has, sorted: class c of a classifier is label ``classes[c]``."""
        return np.unique(require_labels(self.train)[self.train_index])

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Labels -> (n,) int64 classes 0 .. C - 1; -1 for a label that the first part does not have."""
        classes = self.classes
        place = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
        return np.where(classes[place] == labels, place, -1)

    def record(self) -> dict[str, Any]:
        """What a result says of its photos."""
        val = None if self.held_out_seed is not None else self.val.path.name
        return {"data": self.train.path.name, "val": val, "held_out_seed": self.held_out_seed}


@contextmanager
def open_split(
    data: str | Path, val: str | Path | None, *, seed: int = 0, workers: int | None = None
) -> Iterator[LabelledSplit]:
    """Both parts, open inside the block. Without ``val`` a fifth of ``data`` is held out, the same one for a seed.

    Raises:
        FastSSLError: no labels, or other classes in one file than in the other; what ``open_photos`` raises.
    """
    with ExitStack() as files:
        with first_of_host_speaks():
            split = _open_split(files, data, val, seed, workers)
        yield split


def _open_split(
    files: ExitStack, data: str | Path, val: str | Path | None, seed: int, workers: int | None
) -> LabelledSplit:
    train = files.enter_context(open_photos(data, workers))
    require_labels(train)
    if val is None:
        kept, held_out = split_indices(train.labels, len(train), seed=seed)
        if not len(held_out):
            raise ProbeError(f"{data}: one photo in each class leaves nothing to hold out; give --val")
        return LabelledSplit(train, kept, train, held_out, held_out_seed=seed)
    if Path(val).exists() and Path(val).samefile(data):
        warnings.warn(f"{val}: is --data itself; photos are judged that were learned from", stacklevel=4)
    judged = files.enter_context(open_photos(val, workers))
    require_labels(judged)
    require_same_classes(train, judged)
    return LabelledSplit(train, np.arange(len(train)), judged, np.arange(len(judged)), held_out_seed=None)
