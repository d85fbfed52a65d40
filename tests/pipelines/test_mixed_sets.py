"""Files that are no one data set, given as one: photos that would count twice, or be of another conversion."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
from test_beton_set import write

from fastssl.errors import BetonError
from fastssl.pipelines.beton.dataset import BetonSet, beton_files, open_beton


def deal(folder: Path, count: int, made: dict[int, str] | None = None) -> list[Path]:
    """Eight photos as so many files, with side files that say what they were made of."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"train-{k:05d}-of-{count:05d}.beton" for k in range(count)]
    for k, file in enumerate(files):
        write(file, range(k, 8, count), [0] * len(range(k, 8, count)))
        note = {"bytes": file.stat().st_size, "classes": ["cat"], "fingerprint": (made or {}).get(k, "same")}
        Path(f"{file}.json").write_text(json.dumps({**note, "options": {"quality": 90}}))
    return files


def test_files_of_two_conversions_in_a_folder(tmp_path: Path) -> None:
    deal(tmp_path, 2), deal(tmp_path, 4)
    said = "train-*.beton: files of two sets, -of-00002 and -of-00004; photos would count twice: delete one, or name "
    for data in (tmp_path, tmp_path / "train-*.beton"):
        with pytest.raises(BetonError, match=re.escape(said + "the other by a pattern in quotes, 'train-*-of-00004.b")):
            open_beton(data)
    with open_beton(tmp_path / "train-*-of-00004.beton") as found:
        assert len(found) == 8
    deal(tmp_path / "other", 4)  # of another folder, and named by itself
    with open_beton([tmp_path / "train-*-of-00002.beton", tmp_path / "other"]) as found:
        assert len(found) == 16


@pytest.mark.parametrize("again", ["train-00001-of-00002.beton", "../set/train-00001-of-00002.beton", "*"])
def test_a_file_that_is_named_twice(tmp_path: Path, again: str) -> None:
    files = deal(tmp_path / "set", 2)
    with pytest.raises(BetonError, match=r"set/train-0000\d-of-00002\.beton: is named twice; its photos would count"):
        beton_files([*files, tmp_path / "set" / again])


@pytest.mark.parametrize("lazy", [False, True])
def test_one_file_of_other_photos(tmp_path: Path, lazy: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BetonSet(deal(tmp_path, 4), lazy=lazy).close()
        # Sets that differ may be read as one, if their names do not say that they are parts of one.
        BetonSet([*deal(tmp_path / "b", 2, {0: "b", 1: "b"}), *deal(tmp_path, 2)], lazy=lazy).close()
    files = deal(tmp_path, 4, {2: "other"})
    said = r"train-00002-of-00004\.beton: made of other photos, or in another way, than train-00000-of-00004\.beton"
    with pytest.warns(UserWarning, match=said) as found:
        BetonSet(files, lazy=lazy).close()
    assert len(found) == 1
