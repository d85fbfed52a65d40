"""Many ``.beton`` files as one data set: the same photos as from one file, with tables in memory and without."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.errors import BetonError, FastSSLError, JpegError
from fastssl.pipelines.beton import dataset
from fastssl.pipelines.beton.dataset import BetonSet, beton_files, open_beton
from fastssl.pipelines.beton.format import MODE_JPEG, MODE_RAW, TABLE_DTYPE
from fastssl.pipelines.beton.open_file import OpenFiles
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import read_side_file, read_side_note
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.engines.registry import require_engine
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.ops import jpeg
from fastssl.pipelines.plan.draw import ViewSpec

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


# ---- which files


def test_numbers_in_names_are_in_order(tmp_path: Path) -> None:
    names = ["a-10.beton", "a-2.beton", "b-1.beton", "a-1.beton", "a-02.beton"]
    for number, name in enumerate(names):
        write(tmp_path / name, [number])
    (tmp_path / "a-1.beton.json").write_text("{}")
    expected = ["a-1.beton", "a-02.beton", "a-2.beton", "a-10.beton"]
    for pattern in ("a-*.beton", "a-*"):
        assert [file.name for file in beton_files(tmp_path / pattern)[0]] == expected
    files, path = beton_files([tmp_path / "b-1.beton", tmp_path / "a-*.beton"])
    assert [file.name for file in files] == [*expected, "b-1.beton"]
    assert path == tmp_path / "b-1.beton and 1 more file"
    assert [file.name for file in beton_files(tmp_path)[0]] == [*expected, "b-1.beton"]


def test_one_file_is_a_plain_reader(tmp_path: Path) -> None:
    write(tmp_path / "odd[1].beton", [1])
    for data in (tmp_path / "odd[1].beton", str(tmp_path / "od*.beton"), tmp_path, [tmp_path / "odd[1].beton"]):
        with open_beton(data) as reader:
            assert type(reader) is BetonReader and reader.path.name == "odd[1].beton"
            assert reader.starts.tolist() == [0, 1] and reader.files == [reader.path]


def test_a_shard_is_missing(shards: Path) -> None:
    (shards / "train-00002-of-00004.beton").unlink()
    for data in (shards, shards / "train-*.beton"):
        with pytest.raises(BetonError, match=r"train-00002-of-00004\.beton: is missing; put it"):
            open_beton(data)
    (shards / "train-00000-of-00004.beton").unlink()
    with pytest.raises(BetonError, match=r"train-00000-of-00004\.beton: is missing \(and 1 more file\)"):
        open_beton(shards)
    # Numbers may begin at 1, and who names files means those.
    (shards / "train-00003-of-00004.beton").rename(shards / "train-00002-of-00002.beton")
    (shards / "train-00001-of-00004.beton").rename(shards / "train-00001-of-00002.beton")
    assert len(beton_files(shards)[0]) == 2
    assert len(beton_files([shards / "train-00002-of-00002.beton"])[0]) == 1


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        (["train.beton", "val.beton"], ".", "holds files of train and val, which are not one data set; name"),
        (["a.jpg"], ".", "no .beton files in this folder"),
        (["a.beton"], "b*.beton", r"b\*.beton: no file is named like this"),
        (["a.beton"], "b.beton", "b.beton: cannot open: No such file"),
    ],
)
def test_what_names_no_set(tmp_path: Path, names: list[str], asked: str, message: str) -> None:
    for name in names:
        write(tmp_path / name, [1])
    with pytest.raises(FastSSLError, match=message):
        open_beton(tmp_path / asked)
    with pytest.raises(BetonError, match="empty list"):
        open_beton([])


# ---- labels and side files


def both(files: Sequence[Path]) -> list[np.ndarray]:
    """Labels of the set with its tables and without."""
    found = []
    for lazy in (False, True):
        with BetonSet(files, lazy=lazy) as many:
            found.append(many.labels_of(np.arange(len(many))))
    return found


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "0.beton", range(3), [0, 1, -1], ["dog", "cat"]),
        write(tmp_path / "1.beton", range(3, 6), [1, 0, 1], ["bird", "dog"]),
        write(tmp_path / "2.beton", range(6, 8), [1, 0], ["dog", "cat"]),
    ]
    with BetonSet(files) as many:
        assert many.classes == ["bird", "cat", "dog"]
    for labels in both(files):
        assert labels.tolist() == [2, 1, -1, 2, 0, 2, 1, 2]
    # Lists that are alike stay as they are, and so do labels whose names nobody knows.
    for labels in both([files[0], files[2]]):
        assert labels.tolist() == [0, 1, -1, 1, 0]
    with BetonSet([files[0], files[2]]) as many:
        assert many.classes == ["dog", "cat"]
    (tmp_path / "0.beton.json").unlink()
    for labels in both([files[0], files[2]]):
        assert labels.tolist() == [0, 1, -1, 1, 0]
    with pytest.raises(BetonError, match="list different classes, and a file has no such list"):
        BetonSet(files)


def test_a_label_without_a_name(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "0.beton", range(2), [0, 1], ["dog", "cat"]),
        write(tmp_path / "1.beton", range(2), [0, 2], ["bird", "dog"]),
    ]
    message = r"1.beton: sample 1: has the label 2, but its side file lists 2 classes"
    with pytest.raises(BetonError, match=message):
        BetonSet(files)
    with BetonSet(files, lazy=True) as many:
        assert many.labels_of(np.array([0, 2])).tolist() == [2, 0]
        with pytest.raises(BetonError, match=message):
            many.labels_of(np.array([3]))


def test_labels_or_none(tmp_path: Path) -> None:
    files = [write(tmp_path / "0.beton", [1], [0]), write(tmp_path / "1.beton", [2])]
    with pytest.raises(BetonError, match=r"0.beton has labels, 1.beton has none: they are not one data set"):
        BetonSet(files)
    with BetonSet([files[1], write(tmp_path / "2.beton", [3])]) as many:
        assert not many.labelled and many.labels is None and many.classes is None
        assert many.labels_of(np.arange(2)).tolist() == [-1, -1]


def test_a_side_file_is_read_up_to_its_checksums(tmp_path: Path) -> None:
    names = [f"class \u00e9 {number}" for number in range(20_000)]  # more than the first piece
    for classes in (["a"], names):
        path = write(tmp_path / "a.beton", [1], [0], classes)
        side = Path(f"{path}.json")
        whole = read_side_file(path)
        assert (
            whole is not None
            and "crc32" in whole
            and read_side_note(path) == {key: value for key, value in whole.items() if key != "crc32"}
        )
        side.write_bytes(side.read_bytes()[:-1_000_000])
        assert (read_side_note(path) or {})["classes"] == classes
        with pytest.raises(BetonError, match="unreadable side file"):
            read_side_file(path)
    side.write_text('{"crc32": {}, "bytes": 3}')
    assert read_side_note(path) == {"bytes": 3}
    for content in ('{"crc32": {}}', '{"classes": [', "[]", ""):
        side.write_text(content)
        with pytest.raises(BetonError, match=r"a.beton.json: (unreadable|not a) side file"):
            read_side_note(path)
    side.unlink()
    assert read_side_note(path) is None


# ---- tables that are not in memory


def numbers_of(path: Path, sample: int, change: dict[str, int]) -> None:
    """Write other numbers into the metadata record and the table entry of a sample."""
    with BetonReader(path) as reader:
        layout = reader._file
    content = bytearray(path.read_bytes())
    record = np.frombuffer(content, layout._record, len(reader), layout._metadata_at)[sample]
    entry = np.frombuffer(content, TABLE_DTYPE, len(reader), layout.table_at)[sample]
    for name, value in change.items():
        if name in ("size", "sample_id", "ptr"):
            entry[name] = value
        else:
            record["f0"][name] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        {"height": 0},
        {"height": 65_535, "width": 65_535},
        {"mode": 2},
        {"data_ptr": 12},
        {"data_ptr": 2**63, "ptr": 2**63},
        {"ptr": 7, "data_ptr": 7},
        {"size": 0},
        {"size": 2**64 - 1},
        {"size": 2 << 20},
        {"sample_id": 3},
        {"height": 1},
    ],
    ids=str,
)
def test_a_hostile_record_is_the_same_error(shards: Path, change: dict[str, int]) -> None:
    path = shards / "train-00002-of-00004.beton"
    numbers_of(path, 7, change)  # sample 13 of all, which is a JPEG, or 15, which is raw
    if change == {"height": 1}:
        numbers_of(path, 6, {"height": 1})
    with pytest.raises(BetonError) as expected:
        BetonReader(path)
    said = re.sub(r" \(and .*\)", "", str(expected.value))
    wrong = int(re.findall(r"sample (\d+)", said)[0])
    assert wrong == (6 if change == {"height": 1} else 7)
    with BetonSet(beton_files(shards)[0], lazy=True) as many:
        for read in (many.decode, many.encoded, lambda i: many.shapes(np.array([0, i]))):
            with pytest.raises(BetonError, match=re.escape(said)):
                read(6 + wrong)
        assert np.array_equal(many.decode(6 + 8), BetonReader(shards.parent / "whole.beton").decode(14))


def test_rows_by_themselves_equal_whole_tables(shards: Path) -> None:
    """Whatever is written over the tables: a row is what the whole tables say, or an error where they are one."""
    source = shards / "train-00002-of-00004.beton"
    content, outcomes = source.read_bytes(), {True: 0, False: 0}
    with BetonReader(source) as reader:
        file, count = reader._file, len(reader)
        places = [*range(file._metadata_at, file.metadata_end), *range(file.table_at, reader.num_bytes)]
    path = shards.parent / "changed.beton"
    for seed in range(300):
        rng, changed = np.random.default_rng(seed), bytearray(content)
        for place in rng.choice(places, rng.integers(1, 3)):
            changed[place] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        with BetonReader(path, lazy=True) as lazy:
            found = []
            for i in range(count):
                try:
                    found.append(lazy._file.row(i))
                except BetonError as error:
                    found.append(re.sub(r" \(and .*\)", "", str(error)))
        wrong = {row for row in found if isinstance(row, str)}
        try:
            with BetonReader(path) as whole:
                names = ("heights", "widths", "modes", "offsets", "sizes", "labels")
                rows = zip(*(getattr(whole, name).tolist() for name in names))
                assert [tuple(row) for row in found] == list(rows)
        except BetonError as error:
            said = re.sub(r" \(and .*\)", "", str(error))
            assert said in wrong or "knows more samples" in said, (seed, said, wrong)
        outcomes[not wrong] += 1
    assert min(outcomes.values()) > 20  # a label or a side may be any; most else is an error


def test_a_table_that_is_out_of_order(shards: Path) -> None:
    """As FFCV's workers write it."""
    for path in shards.iterdir():
        with BetonReader(path) as reader:
            at, count = reader._file.table_at, len(reader)
        content = bytearray(path.read_bytes())
        table = np.frombuffer(content, TABLE_DTYPE, count, at)
        table[:] = table[np.random.default_rng(0).permutation(count)]
        path.write_bytes(content)
    with BetonSet(beton_files(shards)[0], lazy=True) as many, BetonReader(shards.parent / "whole.beton") as one:
        for i in range(len(one)):
            assert np.array_equal(many.encoded(i), one.encoded(i))


def test_few_files_are_open(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(dataset, "OpenFiles", functools.partial(OpenFiles, 2))
    with BetonSet(beton_files(shards)[0], lazy=True) as many:
        for i in (0, 5, 6, 20, 0, 23):
            many.decode(i)
            assert len(os.listdir("/proc/self/fd")) <= before + 2
        # Closed meanwhile: what is there by then must be what was there.
        other = shards.parent / "other"
        shutil.copy(many.files[1], other)
        os.replace(other, many.files[1])
        assert many.encoded(0).size
        with pytest.raises(BetonError, match=r"train-00001-of-00004.beton: was replaced or written to"):
            many.encoded(5)
    assert len(os.listdir("/proc/self/fd")) <= before
    with pytest.raises(BetonError, match="the reader is closed"):
        many.decode(0)
    assert 8 <= OpenFiles().most <= 4096


def test_few_records_are_remembered(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_REMEMBERED", 6)
    with BetonSet(beton_files(shards)[0], lazy=True) as many, BetonReader(shards.parent / "whole.beton") as one:
        for low in (0, 3, 6, 12, 18, 0):
            index = np.arange(low, low + 6)
            assert np.array_equal(many.shapes(index)[0], one.heights[index]) and len(many._recent) <= 12


def test_files_that_come_later(shards: Path) -> None:
    asked: list[str] = []

    class Fetched(BetonSet):
        def _open(self, k: int) -> BetonReader:
            asked.append(str(self.files[k]))
            return BetonReader(shards / self.files[k].name, lazy=True)

    names = [f"far/{file.name}" for file in beton_files(shards)[0]]
    with Fetched(names, counts=COUNTS) as many, BetonReader(shards.parent / "whole.beton") as one:
        assert asked == names[:1] and many.starts.tolist() == [0, 5, 6, 18, 24]
        many.served = [(name, 1) for name in names]
        assert many.table_checksums()["head"] and asked == names[:1]
        for i in (20, 19, 0):
            assert np.array_equal(many.decode(i), one.decode(i))
        assert asked == [names[0], names[3]]
        assert np.array_equal(many.sizes, one.sizes) and sorted(asked) == sorted(names)
    wrong = Fetched(names, counts=(5, 2, 12, 6))
    with wrong, pytest.raises(BetonError, match=r"train-00001-of-00004.beton: 1 sample, not 2"):
        wrong.decode(5)
    write(shards / "train-00001-of-00004.beton", [5], [0], ["other"])
    other = Fetched(names, counts=COUNTS)
    with other, pytest.raises(BetonError, match=r"lists other classes than train-00000-of-00004.beton"):
        other.decode(5)


# ---- what tells a set from another one


def identity(data: Path | list[Path], lazy: bool = False) -> tuple[dict[str, int], int]:
    with BetonSet(beton_files(data)[0], lazy=lazy) as many:
        return many.table_checksums(), many.photo_checksum()


def test_sets_are_told_apart(shards: Path) -> None:
    tables, pictures = identity(shards)
    assert identity(shards, lazy=True) == (tables, pictures)
    moved = shards.parent / "moved"
    shutil.copytree(shards, moved)
    assert identity(moved) == (tables, pictures)
    first, second = moved / "train-00000-of-00004.beton", moved / "train-00003-of-00004.beton"
    first.rename(moved / "x"), second.rename(first), (moved / "x").rename(second)
    assert identity(moved)[0] != tables
    # Another number in the first record, of a file as long as it was.
    changed = shards.parent / "changed"
    shutil.copytree(shards, changed)
    numbers_of(changed / "train-00001-of-00004.beton", 0, {"height": 7, "width": 10})
    with BetonSet(beton_files(changed)[0], lazy=True) as many:
        found = many.table_checksums()
    assert found["head"] == tables["head"] and found["table"] != tables["table"]
    with BetonReader(second) as reader:
        place = int(reader.offsets[2]) + int(reader.sizes[2]) // 2
    content = bytearray(second.read_bytes())
    content[place] ^= 255
    before = identity(moved)
    second.write_bytes(content)
    assert identity(moved)[0] == before[0] and identity(moved)[1] != before[1]


# ---- the loader

VIEWS = [ViewSpec(size=8, count=2)]


def same_batches(one: ViewLoader, other: ViewLoader, epoch: int, start: int = 0) -> int:
    steps = 0
    for mine, theirs in zip(one.epoch(epoch, start), other.epoch(epoch, start), strict=True):
        assert torch.equal(mine.index, theirs.index) and torch.equal(mine.label, theirs.label)
        assert all(map(torch.equal, mine.views, theirs.views))
        steps += 1
    return steps


@pytest.mark.parametrize("lazy", [False, True])
def test_a_loader_sees_what_it_sees_in_one_file(shards: Path, lazy: bool) -> None:
    how = {"seed": 3, "workers": 2}
    with (
        BetonSet(beton_files(shards)[0], lazy=lazy) as many,
        ViewLoader(many, VIEWS, 4, **how) as mine,
        ViewLoader(shards.parent / "whole.beton", VIEWS, 4, **how) as theirs,
    ):
        assert same_batches(mine, theirs, 0) == 6
        assert same_batches(mine, theirs, 1, 4) == 2  # resumed in the middle
        seen = torch.cat([batch.index for batch in mine.epoch(2)])
        assert sorted(seen.tolist()) == list(range(24))
        assert many.lazy is lazy
        whole = [batch.views[0].unflatten(0, (2, 4)) for batch in mine.epoch(0)]
        for rank in range(2):  # each of two processes has its part of the same batches
            with ViewLoader(many, VIEWS, 2, rank=rank, world=2, **how) as part:
                for batch, both_parts in zip(part.epoch(0), whole, strict=True):
                    share = both_parts[:, 2 * rank : 2 * rank + 2]
                    assert torch.equal(batch.views[0].unflatten(0, (2, 2)), share)


def test_a_loader_takes_patterns_folders_and_lists(shards: Path) -> None:
    for data in (shards, str(shards / "train-*.beton"), beton_files(shards)[0]):
        with ViewLoader(data, VIEWS, 4, workers=1) as loader:
            assert len(loader) == 6 and isinstance(loader.reader, BetonSet)


@pytest.mark.parametrize("lazy", [False, True])
def test_damage_in_one_shard(shards: Path, lazy: bool) -> None:
    path = shards / "train-00002-of-00004.beton"
    with BetonReader(path) as reader:  # sample 10 of all is a JPEG
        start, size = int(reader.offsets[4]), int(reader.sizes[4])
    content = bytearray(path.read_bytes())
    content[start + size // 2 : start + size] = bytes(size - size // 2)
    path.write_bytes(content)
    with BetonSet(beton_files(shards)[0], lazy=lazy) as many:
        with pytest.raises(JpegError, match=r"train-00002-of-00004.beton: sample 4: "):
            many.decode(10)
        with ViewLoader(many, VIEWS, 6, on_bad="skip", workers=1) as loader:
            seen = [i for batch in loader.epoch(0) for i in batch.index.tolist()]
            assert loader.stats.skipped == [10] and len(seen) == 24 and 10 not in seen
        with ViewLoader(many, VIEWS, 6, workers=1) as loader, pytest.raises(JpegError, match=r"00002-of.*: sample 4: "):
            list(loader.epoch(0))


def test_ffcv_maps_one_file(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastssl.pipelines.engines import registry

    monkeypatch.setattr(registry, "engine_state", lambda name: registry.EngineState(name, "1"))
    with open_beton(shards) as many:
        with pytest.raises(FastSSLError, match="FFCV maps one file, and these are 4; use --pipeline native"):
            require_engine("ffcv", many, VIEWS)
        with pytest.raises(FastSSLError, match="8 pictures of it stored raw, which dali cannot decode"):
            require_engine("dali", many, [ViewSpec(size=32, count=1)])
