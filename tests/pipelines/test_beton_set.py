"""Many ``.beton`` files as one data set: the same photos as from one file, with tables in memory and without."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fastssl.pipelines.beton.dataset import BetonSet, beton_files
from fastssl.pipelines.beton.format import MODE_JPEG, MODE_RAW
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.ops import jpeg

COUNTS = (5, 1, 12, 6)


def photo(number: int) -> np.ndarray:
    """(H, W, 3) uint8, another size and content for each number."""
    shape = (8 + number % 7, 9 + number % 5, 3)
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def write(path: Path, numbers: Sequence[int], labels: Sequence[int] | None = None, classes: list[str] | None = None):
    """Photos, every third one raw; with ``classes`` a side file that lists them."""
    with BetonWriter(path, len(numbers), labels=labels is not None) as writer:
        for place, number in enumerate(numbers):
            picture = photo(number)
            raw = number % 3 == 0
            data = picture.tobytes() if raw else jpeg.encode(picture, 95)
            label = labels[place] if labels is not None else 0
            writer.add(data, *picture.shape[:2], label, MODE_RAW if raw else MODE_JPEG)
    if classes is not None:
        note = {"bytes": path.stat().st_size, "classes": classes, "crc32": {"samples": "A" * 3_000_000}}
        Path(f"{path}.json").write_text(json.dumps(note))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of four shards, and one file of the same photos beside it."""
    folder, first = tmp_path / "shards", 0
    folder.mkdir()
    for k, count in enumerate(COUNTS):
        numbers = range(first, first := first + count)
        write(folder / f"train-{k:05d}-of-00004.beton", numbers, [n % 4 for n in numbers])
    write(tmp_path / "whole.beton", range(first), [n % 4 for n in range(first)])
    return folder


def columns(reader: BetonReader, index: np.ndarray) -> list[np.ndarray]:
    return [*reader.shapes(index), reader.labels_of(index)]


@pytest.mark.parametrize("lazy", [False, True])
def test_a_set_is_read_like_one_file(shards: Path, lazy: bool) -> None:
    files, path = beton_files(shards)
    with BetonSet(files, path=path, lazy=lazy) as many, BetonReader(shards.parent / "whole.beton") as one:
        assert len(many) == len(one) == sum(COUNTS) and many.labelled and many.lazy is lazy
        assert many.starts.tolist() == [0, 5, 6, 18, 24]
        index = np.random.default_rng(1).permutation(len(one))
        for mine, theirs in zip(columns(many, index), columns(one, index)):
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
        for i in index.tolist():
            assert np.array_equal(many.encoded(i), one.encoded(i)) and np.array_equal(many.decode(i), one.decode(i))
        assert many.lazy is lazy  # nothing of this has read whole tables
        for name in ("heights", "widths", "modes", "sizes", "labels"):
            assert np.array_equal(getattr(many, name), getattr(one, name)), name
        assert not many.lazy
        with pytest.raises(IndexError):
            many.decode(24)
