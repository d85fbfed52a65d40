"""WebDataset's shards, written by the webdataset package itself, beside tars that only look like them."""

from __future__ import annotations

import json
import resource

import numpy as np
import pytest

from fastssl.errors import FastSSLError
from fastssl.pipelines.convert.sources import ListingRules, SourceError, list_source
from fastssl.utils.patterns import expand
from tests.pipelines.test_sources import content, grow, tar_bytes

webdataset = pytest.importorskip("webdataset")


def write(path, samples):
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


def photo(k):
    return b"\xff\xd8" + b"%04d" % k


def test_shards_of_a_pattern_with_numbers_as_classes(tmp_path):
    """2 stands before 10, among shards and among classes; every class counts, also one that a shard lacks."""
    with webdataset.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=4, verbose=0) as writer:
        for k in range(12):
            writer.write({"__key__": f"{k:06d}", "jpg": photo(k), "cls": 3 * k % 12, "json": {"id": k}})
    with list_source(tmp_path / "train-{000000..000002}.tar") as listing:
        assert listing.names == [f"train-{k // 4:06d}.tar/{k:06d}.jpg" for k in range(12)]
        assert listing.classes == ["0", "3", "6", "9"] and listing.labels.tolist() == [0, 1, 2, 3] * 3
        assert [listing.read(k) for k in range(12)] == [photo(k) for k in range(12)]
        assert listing.ignored == 0 and listing.rejected == []
    with list_source(tmp_path / "train-*.tar") as same:
        assert same.fingerprint == listing.fingerprint and len(same) == 12
    with pytest.raises(SourceError, match=r"train-000003\.tar: cannot read: No such file"):
        list_source(tmp_path / "train-{000002..000003}.tar")


@pytest.mark.parametrize("field", ["label", "cls", "class", "class_name"])
def test_classes_in_json(tmp_path, field):
    write(
        tmp_path / "a.tar",
        [{"__key__": f"{k}", "png": photo(k), "json": {field: ["cat", "dog"][k % 2]}} for k in range(4)],
    )
    with list_source(tmp_path / "a.tar") as listing:
        assert [name for _, name, _ in content(listing)] == ["cat", "dog"] * 2


def test_what_names_the_class(tmp_path):
    """.cls before .json; -1 and what is no JSON say nothing; .txt is a caption unless it is asked for."""
    sides = [{"cls": "cow", "json": {"label": 1}}, {"json": {"label": 7}}, {"cls": -1}, {"txt": "dog"}]
    write(tmp_path / "a.tar", [{"__key__": f"x/{k}", "jpg": photo(k), **side} for k, side in enumerate(sides)])
    with list_source(tmp_path / "a.tar") as listing:
        assert content(listing) == [("x/0.jpg", "cow", photo(0)), ("x/1.jpg", "7", photo(1))]
        assert [name for name, _ in listing.rejected] == ["x/2.jpg", "x/3.jpg"]
    with list_source(tmp_path / "a.tar", rules=ListingRules(label_from="txt")) as listing:
        assert content(listing) == [("x/3.jpg", "dog", photo(3))]
    write(tmp_path / "captions.tar", [{"__key__": f"{k}", "jpg": photo(k), "txt": "a dog"} for k in range(3)])
    with list_source(tmp_path / "captions.tar") as listing:
        assert listing.classes is None and len(listing) == 3 and listing.ignored == 0


def test_the_order_of_the_files_of_a_sample_does_not_matter(tmp_path):
    files = {
        "1.cls": b"5\n",
        "1.jpg": b"a",
        "2.jpg": b"b",
        "2.cls": b"4",
        "1x.cls": b"9",
        "3.left.jpg": b"c",
        "3.cls": b"4",
    }
    (tmp_path / "a.tar").write_bytes(tar_bytes(files))
    with list_source(tmp_path / "a.tar") as listing:
        assert content(listing) == [("1.jpg", "5", b"a"), ("2.jpg", "4", b"b"), ("3.left.jpg", "4", b"c")]
        assert listing.passed_over == {".cls": 1}  # of no photo


def test_a_tar_of_class_folders_stays_one(tmp_path):
    """Whatever else lies beside its photos."""
    notes = json.dumps({"camera": "x", "label": {"deep": 1}}).encode()
    files = {
        f"{name}/{k}.{kind}": notes for name in ("cat", "dog") for k in range(2) for kind in ("jpg", "json", "nef")
    }
    (tmp_path / "a.tar").write_bytes(tar_bytes(files | {"cat/4.json": b"[" * 100_000, "cat/4.jpg": b"x"}))
    with list_source(tmp_path / "a.tar") as listing:
        assert listing.classes == ["cat", "dog"] and np.bincount(listing.labels).tolist() == [3, 2]
        assert listing.passed_over[".nef"] == 4 and ".json" not in listing.passed_over  # something can be done


def test_patterns(tmp_path):
    assert expand("a-{0..2}.tar") == ["a-0.tar", "a-1.tar", "a-2.tar"]
    assert expand("a-{0..10}.tar")[-2:] == ["a-9.tar", "a-10.tar"]
    assert expand("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert expand("{b,a{10,9}}/x-{2..1}") == ["a9/x-1", "a9/x-2", "a10/x-1", "a10/x-2", "b/x-1", "b/x-2"]
    grow(tmp_path, {"s-10.tar": b"", "s-9.tar": b"", "t-1.tar": b"", "odd{1,2}.tar": b"", "odd1.tar": b""})
    assert expand(tmp_path / "{s,t}-*.tar") == [str(tmp_path / name) for name in ("s-9.tar", "s-10.tar", "t-1.tar")]
    for name in ("odd{1,2}.tar", "{x}.tar", "plain.tar"):  # a file's own name, and what is no pattern
        assert expand(tmp_path / name) == [str(tmp_path / name)]
    with pytest.raises(FastSSLError, match="no file is named like this"):
        expand(tmp_path / "u-*.tar")
    for pattern in ("x{0..99999999999}", "{0..9999}{0..9999}", "{1,2}" * 40):
        with pytest.raises(FastSSLError, match="more than 1,000,000 files"):
            expand(pattern)


def test_more_shards_than_files_may_be_open(tmp_path):
    """The soft limit of most systems is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for k in range(80):
        write(tmp_path / f"s-{k}.tar", [{"__key__": f"{k}", "jpg": photo(k), "cls": k % 2}])
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        with list_source(tmp_path / "s-{0..79}.tar") as listing:
            assert [listing.read(k) for k in range(80)] == [photo(k) for k in range(80)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_names_with_dots_keep_their_labels(tmp_path):
    """By WebDataset's rule the first four are one sample; the class of each is its own file's."""
    photos = {f"2024.01.{k}.jpg": photo(k) for k in range(4)}
    classes = {f"2024.01.{k}.cls": b"\xef\xbb\xbf%d" % k for k in range(3)} | {"2024.02.9.cls": b"9"}
    (tmp_path / "x.tar").write_bytes(tar_bytes(photos | classes))
    with list_source(tmp_path / "x.tar") as listing:
        assert content(listing) == [(f"2024.01.{k}.jpg", f"{k}", photo(k)) for k in range(3)]
        assert listing.rejected == [("2024.01.3.jpg", "no label, unlike other photos here")]
    both = {"1.left.jpg": photo(1), "1.right.jpg": photo(2), "1.cls": b"7", "2.jpg": photo(3)}
    (tmp_path / "x.tar").write_bytes(tar_bytes(both | {"2.info.json": b'{"label": 8.0}'}))
    with list_source(tmp_path / "x.tar") as listing:
        assert listing.classes == ["7", "8"] and listing.labels.tolist() == [0, 0, 1]
