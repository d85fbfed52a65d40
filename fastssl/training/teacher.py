"""The teacher of a distillation: who it is; and what it says of the views of some epochs, computed once and kept.

With ``distill.cache_epochs: N`` epoch e has the views of epoch e mod N, in an order of its own. The teacher sees those
of N epochs before the first step; another run with the same teacher, views, seed and photos finds what it said.

A file for each view epoch, ``KEY-EPOCH.features``, has a record for each sample: (2, F) of its global views, in float32
or, where the teacher computes in bfloat16, in float16, and a CRC-32. KEY is a digest of all that decides the numbers.
The files are in ``NAME.beton.teacher/`` beside the photos, or in the run's folder where that cannot be.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastssl.config.recipe import Recipe
from fastssl.distributed.collectives import barrier, broadcast_object
from fastssl.errors import FastSSLError, counted
from fastssl.evaluate.features import shard
from fastssl.methods.distill import Distill, DistillConfig, FrozenTeacher
from fastssl.models.backbones import require_sizes
from fastssl.pipelines.plan.draw import Normalisation, ViewSpec
from fastssl.utils.atomic_files import UNFINISHED, sync_folder
from fastssl.utils.digest import digest
from fastssl.weights.source import load_weights

if TYPE_CHECKING:
    from fastssl.training.setup import Setup


def load_teacher(recipe: Recipe) -> FrozenTeacher:
    """On the CPU. ``about`` has its ``name``, ``arch`` and ``fingerprint``, a digest of all that decides what it says.
    Raises FastSSLError where none is named, there are no such weights, it does not take pictures of that size, or what
    it says is not finite.
    """
    config, view = recipe.settings, recipe.views[0]
    assert isinstance(config, DistillConfig)
    if config.teacher is None:
        what = "a run's folder, a file with weights or a timm name with its tag"
        raise FastSSLError(f"distill.teacher is missing: --set distill.teacher=... names {what}")
    try:
        found, size = load_weights(config.teacher), config.teacher_size or view.size
    except FastSSLError as error:
        raise FastSSLError(f"distill.teacher: {error}") from error
    for each in (size, config.teacher_size or recipe.views_at(0)[0].size):
        require_sizes(found.backbone, found.arch, {"distill.teacher_size": each})
    decides = {**found.backbone.state_dict(), "size": size, "normalisation": list(found.normalisation)}
    about = {"name": found.name, "arch": found.arch, "fingerprint": digest(decides)[:16]}
    given = Normalisation(view.mean, view.std)
    teacher = FrozenTeacher(found.backbone, config.teacher_size, given=given, seen=found.normalisation, about=about)
    with torch.no_grad():
        if not torch.isfinite(teacher(torch.zeros(1, 3, view.size, view.size))).all():
            raise FastSSLError(f"{config.teacher}: its features are NaN or infinite: it would teach nothing")
    return teacher


class TeacherCache:
    """``cache(epoch, samples)``: what the teacher says of them. ``files``: of view epochs 0, 1, ..., with a ``record``
    of each of so many ``samples``. Raises FastSSLError for one that is missing, of another size, or damaged.
    """

    def __init__(self, files: Sequence[Path], samples: int, record: np.dtype[np.void]):
        self.files = files
        for path in files:
            if not path.is_file():
                raise FastSSLError(f"{path}: not there; all processes need the photos (or --out) on one shared disk")
            if path.stat().st_size != samples * record.itemsize:
                raise FastSSLError(f"{path}: damaged (its size); delete it, and it is computed again")
        self._maps = [np.memmap(path, record, "r", shape=(samples,)) for path in files]

    def __call__(self, epoch: int, samples: NDArray[np.int64]) -> NDArray[np.float32]:
        """Unit vectors (2 B, F), view-major."""
        number = epoch % len(self._maps)
        rows = self._maps[number][samples]
        for sample, row in zip(samples.tolist(), rows):
            if row["crc"] != _crc(row["features"], sample):
                where = f"{self.files[number]}: damaged at sample {sample:,}"
                raise FastSSLError(f"{where}; delete it, and it is computed again")
        found = rows["features"].swapaxes(0, 1).reshape(2 * len(samples), -1)
        unit: NDArray[np.float32] = found.astype(np.float32)
        if found.dtype == np.float16:  # what was rounded is no longer of unit length
            unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        return unit


def _record(width: int, half: bool) -> np.dtype[np.void]:
    return np.dtype([("features", "<f2" if half else "<f4", (2, width)), ("crc", "<u4")])


def _crc(features: NDArray[np.floating], sample: int) -> int:
    return zlib.crc32(features.tobytes(), sample & 0xFFFFFFFF)


def open_cache(run: Setup) -> TeacherCache:
    """The cache of ``run``; what is missing of it all processes compute together, each for its share of the photos.
    Raises FastSSLError where a file cannot be written, a photo cannot be read, or not all processes see the files.
    """
    method, reader = run.step.method, run.reader
    assert isinstance(method, Distill)
    record = _record(method.frozen.width, run.step.amp)
    views = list(run.recipe.views)[: 1 if run.recipe.views[0].count == 2 else 2]
    decides = {"seed": run.options.seed, "bfloat16": run.step.amp, "views": [asdict(spec) for spec in views]}
    data = {name: run.config["data"][name] for name in ("samples", "tables", "photos")}
    key = digest({**decides, "data": data, "teacher": method.frozen.about["fingerprint"]})[:16]
    folder = reader.path.with_name(f"{reader.path.name}.teacher")
    if len(reader.files) > 1 or reader.streamed or not (folder.is_dir() or os.access(folder.parent, os.W_OK)):
        folder = run.options.out / "teacher"
    folder = broadcast_object(folder)
    used = min(method.config.cache_epochs, run.recipe.train.epochs)
    files = [folder / f"{key}-{epoch:04}.features" for epoch in range(used)]
    missing: list[int] = broadcast_object([number for number, path in enumerate(files) if not path.is_file()])
    if missing:
        size = len(missing) * len(reader) * record.itemsize / 1e9
        epochs = counted(len(missing), "epoch")
        run.progress.note(f"first the teacher sees the views of {epochs}, and fills {size:.2f} GB of {folder}")
        reader.require_here(None)
    for number in missing:
        unfinished = files[number].with_name(files[number].name + UNFINISHED)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_share(run, method, views, unfinished, number, record)
            barrier()
            if run.world.is_main:
                with suppress(FileNotFoundError):  # another run, which wrote the same, was faster
                    os.replace(unfinished, files[number])
                sync_folder(folder)
            barrier()
        except OSError as error:
            raise FastSSLError(f"{files[number]}: cannot be written ({error.strerror or error})") from error
    return TeacherCache(files, len(reader), record)


@torch.no_grad()
def _write_share(
    run: Setup, method: Distill, views: list[ViewSpec], path: Path, epoch: int, record: np.dtype[np.void]
) -> None:
    """Fill in this process's share of a file."""
    mine, done = shard(np.arange(len(run.reader))), 0
    alone: dict[str, Any] = {"rank": 0, "world": 1, "shuffle": False, "drop_last": False, "colour": True}
    alone |= {"window": None, "view_epochs": None, "views": views, "indices": mine}
    with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666), "wb") as file, run.make_loader(**alone) as loader:
        file.seek(int(mine[0]) * record.itemsize)
        for batch in loader.epoch(epoch):
            with run.step.autocast():
                found = run.step.networks[1](method.images(batch.views)[0])
            rows, places = np.zeros(len(batch.index), record), mine[done : done + len(batch.index)]
            rows["features"] = found.float().cpu().unflatten(0, (2, -1)).transpose(0, 1).numpy()
            rows["crc"] = [_crc(row["features"], sample) for row, sample in zip(rows, places.tolist())]
            # What came in the place of a damaged photo: it will do so in training, too, and is not asked for here.
            rows[batch.index.numpy() != places] = np.zeros((), record)
            file.write(rows.tobytes())
            done += len(rows)
        file.flush()
        os.fsync(file.fileno())
