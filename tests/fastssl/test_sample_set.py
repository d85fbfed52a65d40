"""The sample photos: as published, converted by the real converter, safe against other processes and damage."""

from __future__ import annotations

import gzip
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from fastssl import sample_set
from fastssl.pipelines.beton import BetonReader
from fastssl.pipelines.errors import FastSSLError
from fastssl.sample_set import CLASS_NAMES, cut_slice, default_cache_dir, ensure_sample_set, load_part, read_idx, write_idx


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    ensure_sample_set(folder)
    return folder


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The package with a tiny set, so that it can be converted many times: 2 + 1 pictures of each class."""
    folder = tmp_path / "stored"
    folder.mkdir()
    monkeypatch.setattr(sample_set, "PARTS", {"train": ("train", 2), "val": ("t10k", 1)})
    for name in ("train", "t10k"):
        part = "train" if name == "train" else "val"
        images, labels = load_part(part)
        keep = np.sort(np.concatenate([np.flatnonzero(labels == k)[: 2 if part == "train" else 1] for k in range(10)]))
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images[keep])
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels[keep])
    monkeypatch.setattr(sample_set, "_STORED", folder)
    return tmp_path / "cache"


def test_stored_files_are_small_balanced_and_reproducible(tmp_path):
    for part, per_class in (("train", 400), ("val", 200)):
        images, labels = load_part(part)
        assert images.shape == (10 * per_class, 28, 28) and np.bincount(labels).tolist() == [per_class] * 10
    for path in sample_set._STORED.glob("*.gz"):
        assert path.stat().st_size < 2e6
        data = path.read_bytes()
        assert data[4:8] == bytes(4) and not data[3] & 8  # no time and no name in the gzip header
    licence = (sample_set._STORED / "LICENSE-fashion-mnist.txt").read_text()
    assert "MIT" in licence and "Zalando" in licence and "Permission is hereby granted" in licence


def test_cutting_the_slice_from_the_slice_gives_the_slice(tmp_path):
    cut_slice(sample_set._STORED, tmp_path)
    for path in sample_set._STORED.glob("*.gz"):
        assert gzip.decompress((tmp_path / path.name).read_bytes()) == gzip.decompress(path.read_bytes())


def test_cut_slice_takes_the_first_of_each_class_in_order(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir(), target.mkdir()
    rng = np.random.default_rng(0)
    for name in ("train", "t10k"):
        labels = rng.integers(0, 10, 9000, dtype=np.uint8)
        numbers = (np.arange(9000) % 251).astype(np.uint8)  # each picture is filled with its number
        write_idx(source / f"{name}-images-idx3-ubyte.gz", np.broadcast_to(numbers[:, None, None], (9000, 2, 2)))
        write_idx(source / f"{name}-labels-idx1-ubyte.gz", labels)
    cut_slice(source, target)
    labels, all_labels = read_idx(target / "train-labels-idx1-ubyte.gz"), read_idx(source / "train-labels-idx1-ubyte.gz")
    images = read_idx(target / "train-images-idx3-ubyte.gz")
    for label in (0, 9):
        expected = np.flatnonzero(all_labels == label)[:400] % 251
        assert images[labels == label, 0, 0].tolist() == expected.tolist()


def test_converted_set_holds_the_pictures_under_their_class_names(cache):
    found = ensure_sample_set(cache)
    for part, path in (("train", found.train), ("val", found.val)):
        images, labels = load_part(part)
        with BetonReader(path) as reader:
            assert len(reader) == len(images) and reader.classes == sorted(CLASS_NAMES)
            names = np.array(reader.classes)[reader.labels]
            # Classes come by name, pictures of a class in file order.
            source = np.concatenate([np.flatnonzero(labels == CLASS_NAMES.index(name)) for name in reader.classes])
            assert names.tolist() == [CLASS_NAMES[label] for label in labels[source]]
            for sample in range(0, len(reader), 371):
                stored = reader.decode(sample).astype(int)
                assert stored.shape == (28, 28, 3)
                assert np.abs(stored - images[source[sample]][..., None]).mean() < 3


def test_second_call_converts_nothing(cache, monkeypatch):
    monkeypatch.setattr(sample_set, "_build", lambda folder: pytest.fail("converted again"))
    first = ensure_sample_set(cache)
    assert first.train.is_file() and [p.name for p in cache.iterdir()] == [first.train.parent.name]


def test_damaged_and_short_files_are_made_again(small):
    found = ensure_sample_set(small)
    content = found.val.read_bytes()
    found.val.write_bytes(content[: len(content) // 2])
    again = ensure_sample_set(small)
    assert again == found
    with BetonReader(again.val) as reader:
        assert len(reader) == 10
    again.train.unlink()
    assert ensure_sample_set(small).train.is_file()
    assert [p.name for p in small.iterdir()] == [found.train.parent.name]  # nothing left lying about


def test_losing_the_race_uses_the_winners_files(small, monkeypatch):
    build = sample_set._build

    def slow_build(folder):
        """While we convert, another process finishes."""
        monkeypatch.setattr(sample_set, "_build", build)
        ensure_sample_set(small)
        marker.append(os.stat(next(small.glob("samples-*"))).st_ino)
        build(folder)

    marker = []
    monkeypatch.setattr(sample_set, "_build", slow_build)
    found = ensure_sample_set(small)
    assert found.train.parent.stat().st_ino == marker[0]
    assert [p.name for p in small.iterdir()] == [found.train.parent.name]


def test_several_processes_at_once(small):
    # fork, so that the children have the tiny set too
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ensure_sample_set, args=(small,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(small.iterdir())) == 1
    with BetonReader(ensure_sample_set(small).train) as reader:
        assert len(reader) == 20


def test_a_folder_that_cannot_be_written_falls_back_with_a_notice(small, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.warns(UserWarning, match="cannot be written"):
        found = ensure_sample_set(blocked / "cache")
    assert found.train.is_file() and found.val.is_file() and blocked not in found.train.parents


def test_a_failed_conversion_leaves_nothing(small, monkeypatch):
    def broken(folder: Path):
        (folder / "train.beton").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_set, "_build", broken)
    with pytest.raises(OSError, match="No space"):
        ensure_sample_set(small)
    assert list(small.iterdir()) == []


def test_cache_dir_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "fastssl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "fastssl"


@pytest.mark.parametrize(
    "data",
    [b"", b"junk", gzip.compress(b"\0\0\x08\x01\0\0\0\x05ab"), gzip.compress(b"\0\0\x0d\x01\0\0\0\x01abcd")],
    ids=["empty", "no gzip", "cut short", "another type"],  # gzip writes the time down, and a test must have one name in all processes
)
def test_damaged_idx_files_are_named(tmp_path, data):
    path = tmp_path / "x.gz"
    path.write_bytes(data)
    with pytest.raises(FastSSLError, match=r"x\.gz"):
        read_idx(path)
