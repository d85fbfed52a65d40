"""Parquet tables as the Hugging Face hub has them, written by pyarrow with the hub's metadata."""

from __future__ import annotations

import json
import sys
import threading

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fastssl.pipelines.convert.sources import ListingRules, SourceError, list_source, list_splits
from fastssl.pipelines.convert.sources import parquet as ours
from fastssl.utils.deadline import Deadline
from tests.pipelines.test_sources import content, grow

NAMES = ["zebra", "cat", "ape", "dog"]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def photo(k, size=40):
    return b"\xff\xd8" + b"%06d" % k + np.random.default_rng(k).bytes(size)


def table(rows, names=NAMES, label="label", image="image", metadata=True, kind=IMAGE, **others):
    """``rows``: (bytes or None, label)."""
    images = [{"bytes": data, "path": f"{k}.jpg"} if kind == IMAGE else data for k, (data, _) in enumerate(rows)]
    columns = {image: pa.array(images, kind)} | {name: pa.array(column) for name, column in others.items()}
    features = {image: {"_type": "Image"}}
    if label:
        columns[label] = pa.array([said for _, said in rows])
        if names:
            features[label] = {"names": names, "_type": "ClassLabel"}
    made = pa.table(columns)
    return made.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})} if metadata else None
    )


def write(path, rows, group=None, compression="snappy", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table(rows, **options), path, row_group_size=group, compression=compression)
    return path


def test_one_table(tmp_path):
    """Classes keep the hub's order, and their numbers, also where none has photos."""
    path = write(tmp_path / "train.parquet", [(photo(k), [2, 0, 1][k % 3]) for k in range(7)], group=2)
    with list_source(path) as listing:
        assert listing.classes == NAMES and listing.labels.tolist() == [2, 0, 1, 2, 0, 1, 2]
        assert listing.names == [f"train.parquet/{k}" for k in range(7)]
        assert [listing.read(k) for k in range(7)] == [photo(k) for k in range(7)]
        assert (listing.sizes == -1).all() and listing.rejected == [] and listing.ignored == 0


@pytest.mark.parametrize("pattern", ["", "data/train-*.parquet", "data/train-{00000..00002}-of-00003.parquet"])
def test_the_files_of_a_split(tmp_path, pattern):
    grow(tmp_path, {"README.md": b"", "data/.cache/x.parquet": b""})
    for k in range(3):
        write(tmp_path / f"data/train-{k:05d}-of-00003.parquet", [(photo(10 * k + j), j) for j in range(4)])
    with list_source(tmp_path / pattern) as listing:
        assert listing.names == [f"train-{k:05d}-of-00003.parquet/{j}" for k in range(3) for j in range(4)]
        assert listing.classes == NAMES and listing.labels.tolist() == [0, 1, 2, 3] * 3
        assert [listing.read(k) for k in (11, 0, 5)] == [photo(23), photo(0), photo(11)]


@pytest.mark.parametrize("files", [["cat/a.jpg", "dog/b.jpg"], ["a.jpg", "b.jpg"]])
def test_tables_beside_photos_hold_something_else(tmp_path, files):
    grow(tmp_path, dict.fromkeys(files, b"x"))
    write(tmp_path / "metadata.parquet", [(photo(0), 0)])
    with list_source(tmp_path) as listing:
        assert listing.names == files


@pytest.mark.parametrize(
    "files",
    [
        {"train": "default/train/0000.parquet", "test": "default/test/0000.parquet"},  # the hub's own conversions
        {"train": "data/train-00000-of-00001.parquet", "test": "data/test-00000-of-00001.parquet"},
    ],
)
def test_splits(tmp_path, files):
    for split, name in files.items():
        write(tmp_path / name, [(photo(k), -1 if split == "test" else k) for k in range(2)])
    listings = list_splits(tmp_path)
    assert {split: len(listing) for split, listing in listings.items()} == {"train": 2, "test": 2}
    assert listings["train"].classes == NAMES and listings["test"].classes is None
    listings["train"].close()
    with list_source(tmp_path, rules=ListingRules(split="train")) as listing:
        assert listing.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "labels", "classes"),
    [
        ({"label": "labels", "names": None}, [10, 9, 10], ["9", "10"]),
        ({"label": "fine_label", "coarse_label": [0, 0, 0]}, [3, 0, 3], NAMES),
        ({"label": "breed"}, [3, 0, 3], NAMES),  # the one that the hub calls a class
        ({"label": "class_name", "metadata": False}, ["b", "a", "b"], ["a", "b"]),
        ({"names": None, "metadata": False, "kind": pa.large_binary(), "image": "jpg"}, [1, 0, 1], ["0", "1"]),
        ({"names": ["crane", "ox", "crane", "x"]}, [2, 0, 2], ["crane #0", "ox", "crane #2", "x"]),
        ({"label": None, "caption": ["a", "b", "c"]}, [None] * 3, None),
        ({"label": None, "image": "thumb", "img": [b"no"] * 3}, [None] * 3, None),  # said to be the image
    ],
)
def test_which_columns(tmp_path, options, labels, classes):
    path = write(tmp_path / "a.parquet", [(photo(k), label) for k, label in enumerate(labels)], **options)
    with list_source(path) as listing:
        assert listing.classes == classes and [data for _, _, data in content(listing)] == [photo(k) for k in range(3)]
        if classes is not None:
            known = [
                label if isinstance(label, str) or not options.get("names", NAMES) else classes[label]
                for label in labels
            ]
            assert [name for _, name, _ in content(listing)] == list(map(str, known))


def test_tables_that_name_their_classes_in_another_order(tmp_path):
    write(tmp_path / "a.parquet", [(photo(0), 0), (photo(1), 1)], names=["dog", "cat"])
    write(tmp_path / "b.parquet", [(photo(2), 0), (photo(3), 1)], names=["cat", "dog"])
    with list_source([tmp_path / "a.parquet", tmp_path / "b.parquet"]) as listing:
        assert [name for _, name, _ in content(listing)] == ["dog", "cat", "cat", "dog"]
        assert listing.classes == ["cat", "dog"]


def test_rows_without_a_photo_or_a_label(tmp_path):
    rows = [(photo(0), 0), (None, 1), (b"", 1), (photo(3), -1), (photo(4), 4), (photo(5), None)]
    with list_source(write(tmp_path / "a.parquet", rows)) as listing:
        assert listing.names == [f"a.parquet/{k}" for k in range(3)]
        assert dict(listing.rejected).keys() == {f"a.parquet/{k}" for k in (3, 4, 5)}
        for k in (1, 2):
            with pytest.raises(SourceError, match=f"no photo in this row of the table, only its name, {k}.jpg"):
                listing.read(k)
        assert listing.read(0) == photo(0)
    with list_source(write(tmp_path / "test.parquet", [(photo(k), -1) for k in range(3)])) as listing:
        assert listing.classes is None and len(listing) == 3  # as the hub has test sets


def test_threads_decode_every_row_once(tmp_path, monkeypatch):
    """In the order of a conversion, in a little memory."""
    monkeypatch.setattr(ours, "_BATCH_ROWS", 8)
    monkeypatch.setattr(ours, "_KEPT_BYTES", 20_000)
    decoded, lock = [], threading.Lock()
    real = ours._Table._decode_some

    def counting(self, group):
        real(self, group)
        with lock:
            decoded.append(len(self._kept[-1][1]))
            assert self._kept_bytes <= 20_000

    monkeypatch.setattr(ours._Table, "_decode_some", counting)
    for k in range(3):
        write(tmp_path / f"{k}.parquet", [(photo(100 * k + j, 500), 0) for j in range(100)], group=30)
    with list_source([tmp_path / f"{k}.parquet" for k in range(3)]) as listing:
        found = Deadline(tmp_path).map(listing.read, range(300), 4, str)
        assert list(found) == [photo(k, 500) for k in range(300)]
        assert sum(decoded) == 300
        # Every tenth, and backwards, gives the same photos.
        assert [listing.read(k) for k in range(299, 0, -37)] == [photo(k, 500) for k in range(299, 0, -37)]


def test_a_damaged_page_costs_its_row_group(tmp_path):
    path = write(tmp_path / "a.parquet", [(photo(k), 0) for k in range(40)], group=10, compression="gzip")
    data = bytearray(path.read_bytes())
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    for at in range(column.dictionary_page_offset + 30, column.dictionary_page_offset + 60):
        data[at] ^= 0xFF
    path.write_bytes(data)
    with list_source(path) as listing:
        for k in range(40):
            if 10 <= k < 20:
                with pytest.raises(SourceError, match=r"a\.parquet: damaged"):
                    listing.read(k)
            else:
                assert listing.read(k) == photo(k)


def test_what_is_no_table_of_photos(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [(photo(k), 0) for k in range(5)])
    whole = path.read_bytes()
    for part in (whole[:-50], whole[: len(whole) // 2], b"PAR1", b"", b"PAR1" + bytes(100)):
        path.write_bytes(part)
        with pytest.raises(SourceError, match=r"a\.parquet: damaged, cut off or not a parquet file"):
            list_source(path)
    path.write_bytes(whole)
    with list_source(path) as listing:
        write(path, [(photo(k), 0) for k in range(6)])
        with pytest.raises(SourceError, match="changed"):
            listing.read(0)
    parquet.write_table(pa.table({"label": [1], "url": ["http://x/a.jpg"]}), path)
    with pytest.raises(SourceError, match=r"no column of encoded photos .* among label \(int64\), url \(string\)"):
        list_source(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"pip install pyarrow \(or 'fastssl-vision\[parquet\]'\)"):
        list_source(path)


def test_random_damage_to_a_table_ends(tmp_path):
    """With an error or with photos; the footer is hit in half of the cases."""
    good = np.fromfile(write(tmp_path / "bad.parquet", [(photo(k), k % 4) for k in range(20)], group=5), np.uint8)
    rng, listed = np.random.default_rng(0), 0
    for k in range(200):
        bad = good.copy()
        where = rng.integers(len(bad) - 1500, len(bad), 3) if k % 2 else rng.integers(0, len(bad), 3)
        bad[where] ^= rng.integers(1, 256, 3, dtype=np.uint8)
        (tmp_path / "bad.parquet").write_bytes(bad.tobytes())
        try:
            with list_source(tmp_path / "bad.parquet") as listing:
                listed += 1
                for i in range(len(listing)):
                    try:
                        assert listing.read(i)
                    except SourceError:
                        continue
        except SourceError as error:
            assert "bad.parquet" in str(error)
    assert 20 < listed < 200


def test_tables_on_a_server(tmp_path, monkeypatch):
    """By a pattern; the names are the server's, not the cache's."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    for k in (2, 10):
        path = write(tmp_path / "x.parquet", [(photo(k), 1)])
        system.pipe(f"/hub/data/train-{k}.parquet", path.read_bytes())
    for pattern in ("memory://hub/data/train-*.parquet", "memory://hub/data/train-{2,10}.parquet"):
        with list_source(pattern) as listing:
            assert content(listing) == [(f"train-{k}.parquet/0", "cat", photo(k)) for k in (2, 10)]
    with pytest.raises(SourceError, match=r"it holds 2 \.parquet files: .* 'memory://hub/data/\*\.parquet'"):
        list_source("memory://hub/data")


def test_labels_that_pandas_made_floats_and_those_that_are_none(tmp_path, caplog):
    path = tmp_path / "x.parquet"
    for labels, classes in (([1.0, None, 0.0, float("nan")], ["0", "1"]), ([0.5, 1.0, 2.0, None], None)):
        write(path, list(zip(map(photo, range(4)), labels)), names=None)
        with list_source(path) as listing:
            assert listing.classes == classes and len(listing) == (4 if classes is None else 2)
    write(path, [(photo(0), [0, 1])], names=None)
    with list_source(path) as listing:
        assert listing.classes is None
    assert [record.message.split(": ", 1)[1] for record in caplog.records] == [
        "no labels: its column label holds double, no classes",
        "no labels: its column label holds list<element: int64>, no classes",
    ]
    write(path, [(photo(0), "cat"), (photo(1), "-1")], names=None)
    with list_source(path) as listing:
        assert listing.classes == ["cat"] and len(listing.rejected) == 1


def test_tables_that_expand(tmp_path):
    """Few bytes that stand for gigabytes: photos, or rows without any."""
    write(tmp_path / "x.parquet", [(bytes(32 << 20), 0)], compression="zstd")
    parquet.write_table(pa.table({"image": pa.nulls(300_000, pa.binary())}), tmp_path / "y.parquet")
    for name, what in (("x", "1 row, 33,554,"), ("y", "300,000 rows, ")):
        with pytest.raises(SourceError, match=rf"{name}\.parquet: {what}.* in a file of [0-9,]+ bytes: no photos are"):
            list_source(tmp_path / f"{name}.parquet")
