"""A folder or tar in the place of a ``.beton`` file: converted once, found again, never in the place of anything
else.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tarfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest
from conftest import jpeg_bytes, make_photo

from fastssl.config.recipe import load_recipe
from fastssl.data import photo_source
from fastssl.data.photo_source import as_beton, is_source, look_at, side_for
from fastssl.errors import FastSSLError
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import read_side_file, side_path
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastssl" / "photos"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five photos of 60 x 80 pixels in a folder."""
    folder = tmp_path / "data" / "photos"
    folder.mkdir(parents=True)
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(jpeg_bytes(make_photo(number, 60, 80)))
    return folder


def made(path: Path, side: int = 32) -> tuple[Path, list[str]]:
    """(the .beton file, what was said)."""
    said: list[str] = []
    return as_beton(look_at(path), side, workers=1, say=said.append), said


def count(path: Path) -> int:
    with BetonReader(path) as reader:
        return len(reader)


def test_a_folder_becomes_a_file_beside_it_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look_at(photos)
    assert (found.photos, found.short_side) == (5, 60)
    path, (line,) = made(photos)
    assert path == photos.parent / "photos.beton" and count(path) == 5
    assert f"{photos}: 5 photos, no labels, now also in {path}" in line and "short side at most 32 px" in line
    with BetonReader(path) as reader:
        assert reader.heights.tolist() == [32] * 5
    monkeypatch.setattr(photo_source, "convert", None)  # would fail
    again, (line,) = made(photos)
    assert again == path and "converted before" in line
    assert sorted(entry.name for entry in photos.parent.iterdir()) == ["photos", "photos.beton", "photos.beton.json"]


def test_photos_that_changed_are_converted_again(photos: Path) -> None:
    path, _ = made(photos)
    (photos / "5.jpg").write_bytes(jpeg_bytes(make_photo(5, 60, 80)))
    assert made(photos)[0] == path and count(path) == 6
    before = path.read_bytes()
    (photos / "5.jpg").write_bytes(jpeg_bytes(make_photo(6, 60, 80)))
    os.utime(photos / "5.jpg", ns=(1, 1))
    assert made(photos)[0] == path and path.read_bytes() != before
    (photos / "5.jpg").unlink()
    assert made(photos)[0] == path and count(path) == 5


def test_another_size_goes_elsewhere_and_both_are_found(photos: Path, cache: Path) -> None:
    small, _ = made(photos, 32)
    content = small.read_bytes()
    large, _ = made(photos, 48)
    assert large.parent == cache and large.name.startswith("photos-") and small.read_bytes() == content
    assert made(photos, 32)[0] == small and made(photos, 48)[0] == large
    (photos / "4.jpg").unlink()
    assert made(photos, 48)[0] == large and count(large) == 4 and count(small) == 5
    assert made(photos, 32)[0] == small and count(small) == 4


@pytest.mark.parametrize("how", ["converted", "copied over ours", "no beton", "side file alone", "damaged"])
def test_a_file_that_somebody_made_is_never_written_over(how: str, photos: Path, tmp_path: Path, cache: Path) -> None:
    theirs = photos.parent / "photos.beton"
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(photos / "0.jpg", other)
    if how == "converted":
        convert(other, theirs, ConvertOptions())
    elif how == "copied over ours":
        assert made(photos)[0] == theirs
        (photos / "4.jpg").unlink()
        convert(other, tmp_path / "other.beton", ConvertOptions())
        shutil.copy(tmp_path / "other.beton", theirs)
    elif how == "no beton":
        theirs.write_text("my notes")
    elif how == "side file alone":
        (photos.parent / "photos.beton.json").write_text("{}")
    else:
        assert made(photos)[0] == theirs
        theirs.write_bytes(theirs.read_bytes()[:-100])
    before = {path: path.read_bytes() for path in photos.parent.glob("photos.beton*")}
    path, _ = made(photos)
    assert path.parent == cache and count(path) == len(list(photos.iterdir()))
    assert {path: path.read_bytes() for path in photos.parent.glob("photos.beton*")} == before


def test_a_folder_and_a_tar_of_one_name_do_not_take_each_others_place(photos: Path, cache: Path) -> None:
    path, _ = made(photos)
    with tarfile.open(f"{photos}.tar", "w") as archive:
        archive.add(photos / "0.jpg", "0.jpg")
    other, _ = made(Path(f"{photos}.tar"))
    assert other.parent == cache and count(other) == 1 and count(path) == 5
    assert made(photos)[0] == path and made(Path(f"{photos}.tar"))[0] == other


def test_what_was_left_out_is_said_each_time(photos: Path) -> None:
    (photos / "bad.jpg").write_bytes(b"no photo")
    (photos / "clip.mov").write_bytes(b"a film")
    assert "1 rejected (see " in made(photos)[1][0] and "1 rejected (see " in made(photos)[1][0]
    (photos / "5.jpg").write_bytes((photos / "0.jpg").read_bytes())
    assert "photos.beton.rejects.jsonl); 1 other file passed over; 1 .mov: extract frames" in made(photos)[1][0]


def test_a_conversion_that_somebody_made_the_same_way_is_taken(photos: Path, cache: Path) -> None:
    theirs = photos.parent / "photos.beton"
    convert(photos, theirs, ConvertOptions(short_side=32))
    assert made(photos)[0] == theirs
    (photos / "4.jpg").unlink()  # it is out of date now, and not ours to renew
    assert made(photos)[0].parent == cache and count(theirs) == 5


def test_where_nothing_can_be_written_beside_the_cache_is_used(
    photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != photos.parent and access(path, mode))
    path, _ = made(photos)
    assert path.parent == cache and made(photos)[0] == path
    assert [entry.name for entry in photos.parent.iterdir()] == ["photos"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (photos / "4.jpg").unlink()
    with pytest.raises(
        FastSSLError, match=r"neither .*photos.beton nor .* can be written; convert it with `fastssl convert-imagenet`"
    ):
        made(photos)


def test_many_at_once_convert_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def counting(*arguments: object, **options: object) -> object:
        calls.append(Path(str(arguments[1])))
        return convert(*arguments, **options)

    monkeypatch.setattr(photo_source, "convert", counting)
    source = look_at(photos)
    with ThreadPoolExecutor(6) as pool:
        paths = set(pool.map(lambda _: as_beton(source, 32, workers=1), range(6)))
    assert paths == {photos.parent / "photos.beton"} and len(calls) == 1
    assert not list(photos.parent.glob(".*.lock"))


@contextmanager
def waiting(photos: Path, lock: Path) -> Iterator[tuple[IO[str], Future, list[str]]]:
    """Another one that waits for the file of ``photos``: (what holds the lock against it, its result, what it says)."""
    said: list[str] = []
    with open(lock, "a") as held, ThreadPoolExecutor(1) as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        other = pool.submit(as_beton, look_at(photos), 32, workers=1, say=said.append)
        while not said:
            time.sleep(0.01)
        yield held, other, said


def test_who_comes_between_the_file_and_its_side_file_waits(photos: Path, cache: Path, tmp_path: Path) -> None:
    """The two take their names one after the other: without the second the first looks like a stranger's."""
    path, _ = made(photos)
    side, lock = side_path(path), path.with_name(f".{path.name}.lock")
    side.rename(tmp_path / "side")
    with waiting(photos, lock) as (held, other, said):
        (tmp_path / "side").rename(side)
        lock.unlink()
        held.close()
        assert other.result(timeout=60) == path
    assert "waiting for another process" in said[0] and "converted before" in said[1] and not cache.exists()


def test_a_lock_on_a_file_that_was_taken_away_keeps_nobody_out(photos: Path) -> None:
    """Three at once: the second waits for the first one's file, the third finds none there and makes a new one."""
    place = photos.parent / "photos.beton"
    lock = place.with_name(f".{place.name}.lock")
    with waiting(photos, lock) as (first, second, _):
        lock.unlink()
        with open(lock, "a") as third:
            fcntl.flock(third, fcntl.LOCK_EX)
            first.close()
            time.sleep(0.3)
            assert not second.done() and not place.exists()
            lock.unlink()
        assert second.result(timeout=60) == place


def test_tars_and_classes(photos: Path, photo_tree: Path, tmp_path: Path) -> None:
    assert [is_source(path) for path in (photos, photo_tree, photos / "0.jpg", tmp_path / "none.tar")] == [
        True,
        True,
        False,
        False,
    ]
    with tarfile.open(photos.parent / "set.tar", "w") as archive:
        archive.add(photo_tree, "set")
    (photos.parent / "set.tar").rename(photos.parent / "set.tar.1")  # known by its contents
    assert is_source(photos.parent / "set.tar.1")
    (photos.parent / "set.tar.1").rename(photos.parent / "set.tar")
    path, (line,) = made(photos.parent / "set.tar")
    assert path == photos.parent / "set.beton" and "48 photos, 3 classes" in line
    with BetonReader(path) as reader:
        assert reader.classes == ["blue", "green", "red"]
    assert look_at(path).photos == 48 and as_beton(look_at(path), 7) == path  # a .beton file stays what it is


def test_damaged_photos_are_counted_and_all_damaged_is_an_error(photos: Path) -> None:
    (photos / "0.jpg").write_bytes(b"\xff\xd8\xff damaged")
    _, (line,) = made(photos)
    assert "4 photos" in line and f"1 rejected (see {photos.parent / 'photos.beton.rejects.jsonl'})" in line
    for path in photos.iterdir():
        path.write_bytes(b"\xff\xd8\xff damaged")
    before = (photos.parent / "photos.beton").read_bytes()
    assert look_at(photos).short_side is None
    with pytest.raises(FastSSLError, match="all of 5 photos rejected"):
        made(photos)
    assert (photos.parent / "photos.beton").read_bytes() == before and not list(photos.parent.glob("*.partial*"))


def test_no_photos(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastSSLError, match="no photos found"):
        look_at(tmp_path / "empty")


def test_whether_photos_were_scaled_down_is_known(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "theirs.beton"
    for options, shortened in (
        (ConvertOptions(keep_size=True), False),
        (ConvertOptions(short_side=32), True),
    ):
        convert(photos, path, options)
        side = read_side_file(path)
        assert look_at(path).shortened is shortened
        old = {name: value for name, value in side.items() if name != "scaled"}  # of before it was counted
        side_path(path).write_text(json.dumps(old))
        assert look_at(path).shortened is shortened
        side_path(path).write_text(json.dumps({**side, "bytes": 1}))  # another file's
        assert not look_at(path).shortened
    side_path(path).unlink()
    assert not look_at(path).shortened


def test_the_file_is_marked_as_ours(photos: Path, tmp_path: Path) -> None:
    path, _ = made(photos)
    convert(photos, tmp_path / "theirs.beton", ConvertOptions(short_side=32))
    ours, theirs = read_side_file(path), read_side_file(tmp_path / "theirs.beton")
    assert (ours.pop("automatic"), theirs.pop("automatic")) == (True, False) and ours == theirs


@pytest.mark.parametrize(
    ("recipe", "side"),
    [("quickstart", 96), ("few-photos", 96), ("light-moco-mobilenetv3", 384), ("dino-mobilenetv2-sslight", 384)],
)
def test_photos_are_stored_as_large_as_the_views_can_show(recipe: str, side: int) -> None:
    assert side_for(load_recipe(recipe)) == side


def test_large_views_and_probes_get_their_pixels() -> None:
    assert side_for(load_recipe("light-moco-mobilenetv3", {"views.0.size": "448"})) == 448
    assert side_for(load_recipe("few-photos", {"probe.size": "160", "probe.crop": "0.8"})) == 200


def test_archives_and_patterns_are_sources(photos: Path) -> None:
    """A pattern gets a file beside the first of its names, called like it; a set of .beton files stays one."""
    for number in range(2):
        with zipfile.ZipFile(photos.parent / f"part-{number}.zip", "w") as archive:
            archive.write(photos / f"{number}.jpg", f"{number}.jpg")
    (photos.parent / "list.csv").write_text("path\n" + "".join(f"photos/{number}.jpg\n" for number in range(4)))
    names = {"part-0.zip": ("part-0.beton", 1), "part-{0..1}.zip": ("part-_.beton", 2), "list.csv": ("list.beton", 4)}
    for name, (made_name, number) in names.items():
        assert is_source(photos.parent / name)
        path, _ = made(photos.parent / name)
        assert path == photos.parent / made_name and count(path) == number
        assert "converted before" in made(photos.parent / name)[1][0]
    assert not any(
        is_source(photos.parent / name) for name in ("part-*.beton", "part-{0..1}.beton", "none-{0..1}.beton")
    )


def spread(photos: Path, *folders: str) -> Path:
    """The five photos once more in each of these folders, new in the folder ``photos``; which is empty otherwise."""
    files = sorted(photos.iterdir())
    for folder in folders:
        (photos / folder).mkdir(parents=True)
        for file in files:
            shutil.copy(file, photos / folder)
    for file in files:
        file.unlink()
    return photos


def test_of_splits_train_is_learned_from(photos: Path) -> None:
    """Never test; val gets a file of its own."""
    spread(photos, "train/a", "train/b", "val/a", "test")
    found = look_at(photos)
    assert (found.photos, list(found.splits)) == (10, ["train", "val", "test"])
    assert list(found.notes) == [
        f"{photos}: holds train (10 photos) and val (5 photos) and test (5 photos): train is taken"
    ]
    path, _ = made(photos)
    assert path == photos.parent / "photos-train.beton" and count(path) == 10
    val = as_beton(look_at(photos, "val"), 32, workers=1)
    assert val == photos.parent / "photos-val.beton" and count(val) == 5
    with BetonReader(val) as reader:
        assert reader.classes == ["a", "b"]
    said: list[str] = []
    assert as_beton(look_at(photos), 32, say=said.append) == path and "converted before" in said[0]
    shutil.rmtree(photos / "train")
    with pytest.raises(FastSSLError, match=r"holds val \(5 photos\) and test \(5 photos\); `fastssl convert-imagenet`"):
        look_at(photos)


def test_pre_training_loses_no_photo_beside_class_folders(photos: Path) -> None:
    spread(photos, "a", "b")
    (photos / "loose.jpg").write_bytes(jpeg_bytes(make_photo(7, 60, 80)))
    found = look_at(photos)
    assert found.photos == 11
    assert list(found.notes) == ["1 photo beside the folders a, b: all are taken, without classes"]
    path, said = made(photos)
    assert count(path) == 11 and "11 photos, no labels" in said[0] and "rejected" not in said[0]
    assert look_at(photos, "val").photos == 10  # of photos to be judged on, those count that have a label
