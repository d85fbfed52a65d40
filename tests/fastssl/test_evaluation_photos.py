"""The photos of an evaluation: files and folders, the held-out fifth, classes."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fastssl.errors import BetonError, FastSSLError
from fastssl.evaluate import photos
from fastssl.evaluate.photos import open_photos, open_split, scaled_to
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import side_path
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.convert.sources import ListingRules
from fastssl.pipelines.convert.splits import convert_splits

FULL = {"scaled_to": None, "val_scaled_to": None}


def test_a_folder_is_as_good_as_a_file(beton: Path, photo_tree: Path) -> None:
    with open_photos(beton, 1) as file, open_photos(photo_tree, 1) as folder:
        assert np.array_equal(file.labels, folder.labels) and file.classes == folder.classes == ["blue", "green", "red"]
        assert all(np.array_equal(file.decode(sample), folder.decode(sample)) for sample in (0, 17, 40))
        made = folder.path
        assert made.is_file()
    assert not made.exists() and not made.parent.exists()


def test_several_processes_want_a_file(photo_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photos, "world_size", lambda: 2)
    with pytest.raises(FastSSLError, match=r"several processes read one \.beton file"), open_photos(photo_tree):
        pass


def test_a_split_holds_out_a_fifth_or_takes_another_file(beton: Path) -> None:
    with open_split(beton, None, seed=3) as split:
        assert split.train is split.val
        assert split.record() == {"data": beton.name, "val": None, "held_out_seed": 3, **FULL}
        assert sorted([*split.train_index, *split.val_index]) == list(range(48)) and len(split.val_index) == 9
    with open_split(beton, beton) as split:
        assert split.record() == {"data": beton.name, "val": beton.name, "held_out_seed": None, **FULL}
        assert len(split.train_index) == len(split.val_index) == 48 and split.classes.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "noted", "without_note"),
    [
        ({"short_side": 40}, 40, 40),
        ({"short_side": 50}, 50, None),  # some are smaller and stay so
        ({"short_side": 256}, None, None),  # all are
        ({"max_side": 50}, 50, None),
        ({"keep_size": True}, None, None),
    ],
)
def test_a_file_tells_to_what_it_has_scaled_its_photos(
    photo_tree: Path, tmp_path: Path, options: dict, noted: int | None, without_note: int | None
) -> None:
    """The photos' short sides are 48, 50 and 56, the long ones 56 to 71."""
    path = tmp_path / "photos.beton"
    convert(photo_tree, path, ConvertOptions(**options))
    with BetonReader(path) as reader:
        assert scaled_to(reader) == noted
    side_path(path).unlink()
    with BetonReader(path) as reader:
        assert scaled_to(reader) == without_note


def test_a_class_that_the_first_part_lacks_has_no_number(beton: Path) -> None:
    with open_split(beton, beton) as split:
        split.train_index = np.flatnonzero(split.train.labels != 1)
        assert split.classes.tolist() == [0, 2]
        assert split.targets(np.array([0, 1, 2, 3])).tolist() == [0, -1, 1, -1]


def test_val_that_lacks_classes_or_has_them_in_another_order_is_matched_by_name(
    beton: Path, photo_tree: Path, tmp_path: Path
) -> None:
    shutil.copytree(photo_tree, tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "blue")
    (tmp_path / "names.txt").write_text("red\ngreen\n")
    rules = ListingRules(classes=tmp_path / "names.txt")
    convert(tmp_path / "val", tmp_path / "val.beton", ConvertOptions(), rules=rules)
    for val in (tmp_path / "val", tmp_path / "val.beton"):
        with open_split(beton, val, workers=1) as split:
            assert split.val.classes == split.train.classes == ["blue", "green", "red"]
            assert split.val.labels_of(np.arange(32)).tolist() == [1] * 16 + [2] * 16
    with BetonReader(tmp_path / "val.beton") as val, pytest.raises(BetonError, match=r"val\.beton: its labels"):
        val.use_classes(["blue", "green"])


def test_photos_without_labels(photo_tree: Path, beton: Path, tmp_path: Path) -> None:
    for number, photo in enumerate(sorted(photo_tree.rglob("*.jpg"))[:4]):
        shutil.copy(photo, tmp_path / f"{number}.jpg")
    with pytest.raises(FastSSLError, match="has no labels"), open_split(tmp_path, None, workers=1):
        pass
    with pytest.raises(FastSSLError, match="has no labels"), open_split(beton, tmp_path, workers=1):
        pass


def test_one_photo_in_each_class_leaves_nothing_to_judge_on(photo_tree: Path, tmp_path: Path) -> None:
    for number, photo in enumerate(sorted(photo_tree.rglob("*.jpg"))[:3]):
        (tmp_path / str(number)).mkdir()
        shutil.copy(photo, tmp_path / str(number))
    with (
        pytest.raises(FastSSLError, match="leaves nothing to hold out; give --val"),
        open_split(tmp_path, None, workers=1),
    ):
        pass


def test_a_damaged_photo_in_a_folder_is_an_error_that_names_the_folder(photo_tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photo_tree, folder)
    damaged = sorted(folder.rglob("*.jpg"))[5]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:200])
    with pytest.raises(FastSSLError, match=rf"photos: blue/{damaged.name}.*mend or remove it"), open_photos(folder, 1):
        pass
    damaged.write_bytes(whole)
    (folder / "green").rename(folder / "grey")
    with pytest.raises(FastSSLError) as error, open_split(photo_tree, folder, workers=1):
        pass
    assert str(photo_tree) in str(error.value) and "fastssl-" not in str(error.value)


def test_judging_on_what_was_learned_from_is_said(beton: Path) -> None:
    with pytest.warns(UserWarning, match="is --data itself"), open_split(beton, beton):
        pass


def test_a_tar_is_taken_as_a_folder_is(photo_tree: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photo_tree, "photos")
    with open_photos(photo_tree, 1) as folder, open_photos(tmp_path / "photos.tar", 1) as tar:
        assert tar.classes == folder.classes and tar.labels.tolist() == folder.labels.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["photos.tar"]


def test_of_a_tree_train_is_learned_from_and_val_judged_on(photo_tree: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(photo_tree, tmp_path / "set" / split)
    for number in range(8):
        (tmp_path / "set" / "val" / "red" / f"{number:02}.jpg").unlink()
    with (
        pytest.warns(UserWarning, match=r"holds train.*: (train|val) is taken") as said,
        open_split(tmp_path / "set", tmp_path / "set", workers=1) as split,
    ):
        assert (len(split.train), len(split.val)) == (48, 40)
    assert not any("is --data itself" in str(one.message) for one in said)
    with pytest.warns(UserWarning), open_split(tmp_path / "set", None, workers=1) as split:
        assert len(split.train) == 48 and split.train is split.val


def test_a_list_names_photos_of_a_split(photo_tree: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(photo_tree, tmp_path / "set" / split)
    convert_splits(tmp_path / "set", tmp_path / "x.beton", ConvertOptions(keep_size=True))
    with BetonReader(tmp_path / "x-val.beton") as reader:
        assert photos.stored_names(reader, tmp_path / "set")[0] == "val/blue/00.jpg"
        assert photos.stored_names(reader, tmp_path / "set" / "val")[0] == "blue/00.jpg"
