"""Zips and compressed tars."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import struct
import warnings
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.sources import SourceError, list_source, unpacked
from tests.pipelines.test_convert import picture, saved, stopped
from tests.pipelines.test_sources import content, grow, tar_bytes

PACKERS = {"tar.gz": gzip.compress, "tgz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}


def zip_bytes(files, how=zipfile.ZIP_DEFLATED, **attributes):
    """``files``: name -> bytes; ``attributes``: of every member."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in files.items() if isinstance(files, dict) else files:
            info = zipfile.ZipInfo(name)
            info.compress_type = how
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.writestr(info, data)
    return buffer.getvalue()


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "./", "data/train/"])
def test_a_zip_is_as_a_folder(tmp_path, how, prefix):
    """In its order, from any thread, below the folders that all share; unpacked nowhere."""
    rng = np.random.default_rng(0)
    data = {"dog/2.jpg": rng.bytes(5000), "cat/\u00e4.png": bytes(9000), "dog/1.JPEG": b""}
    others = {"notes.txt": b"x", "__MACOSX/dog/._2.jpg": b"", "dog/.hidden.jpg": b""}
    (tmp_path / "x.zip").write_bytes(zip_bytes({prefix + name: one for name, one in (data | others).items()}, how))
    with list_source(tmp_path / "x.zip") as listing, ThreadPoolExecutor(4) as pool:
        clean = prefix.removeprefix("./")
        assert content(listing) == [
            (clean + name, label, data[name]) for name, label in zip(data, ("dog", "cat", "dog"), strict=True)
        ]
        assert list(pool.map(listing.read, [0, 1, 2] * 20)) == list(data.values()) * 20
        assert listing.ignored == 3 and listing.rejected == []
    assert os.listdir(tmp_path) == ["x.zip"]


def test_zips_without_labels_of_windows_and_behind_something_else(tmp_path):
    """Flat; with Windows' separators; names in the old encoding; as what unpacks itself; of more than 65,535 files."""
    (tmp_path / "flat.zip").write_bytes(zip_bytes({f"x/{k}.jpg": b"%d" % k for k in range(3)}))
    old = (
        zip_bytes({"cat_a.jpg": b"a", "dog_b.jpg": b"b"}, create_system=0)
        .replace(b"_", b"\\")
        .replace(b"a.jpg", b"\x84.jpg")
    )
    (tmp_path / "old.zip").write_bytes(b"MZ" + bytes(1000) + old)
    many = zip_bytes({f"{'cat' if k % 2 else 'dog'}/{k}.jpg": b"" for k in range(65_600)}, zipfile.ZIP_STORED)
    (tmp_path / "many.zip").write_bytes(many)
    with list_source(tmp_path / "flat.zip") as listing:
        assert listing.classes is None and len(listing) == 3
    with list_source(tmp_path / "old.zip") as listing:
        assert content(listing) == [("cat/\u00e4.jpg", "cat", b"a"), ("dog/b.jpg", "dog", b"b")]
    with list_source(tmp_path / "many.zip") as listing:
        assert len(listing) == 65_600 and listing.names[-1] == "cat/65599.jpg"


def test_hostile_zip_members(tmp_path):
    good = {"cat/a.jpg": b"a" * 100}
    parts = [
        (zip_bytes([("cat/a.jpg", b"a"), ("cat/a.jpg", b"b")]), "a second file of the same name"),
        (zip_bytes(good | {"../../evil.jpg": b"e", "cat/../x.jpg": b"e"}), "leads out of the zip"),
        (zip_bytes(good | {"l.jpg": b"/etc/passwd"}, external_attr=(stat.S_IFLNK | 0o777) << 16), "a link inside"),
        (zip_bytes(good, zipfile.ZIP_LZMA), "compressed in a way that is not read (method 14)"),
    ]
    for data, why in parts:
        (tmp_path / "bad.zip").write_bytes(data)
        try:
            with list_source(tmp_path / "bad.zip") as listing:
                assert len(listing) == 1 and why in listing.rejected[0][1]
        except SourceError as error:  # of the only ones
            assert why in str(error)
    assert os.listdir(tmp_path) == ["bad.zip"]


def directory(data):
    """Where the entry of a zip's first file begins in its directory."""
    return struct.unpack_from("<L", data, data.rindex(b"PK\5\6") + 16)[0]


@pytest.mark.parametrize(
    ("at", "how", "value", "why"),
    [
        (8, "<H", 1, "encrypted"),
        (16, "<L", 5, "not the size or the checksum"),
        (20, "<L", 1 << 31, "larger compressed than not"),
        (20, "<L", 30, "not the size or the checksum|damaged in the zip"),
        (24, "<L", 999_999, "not the size or the checksum"),  # a bomb would have more than it says
        (24, "<L", 3_000, "larger compressed than not"),
        (42, "<L", 7, "no file at byte 7"),
        (42, "<L", 1 << 30, "no file at byte"),
    ],
)
def test_a_directory_that_lies(tmp_path, at, how, value, why):
    data = bytearray(zip_bytes({"a.jpg": bytes(1_000_000) + np.random.default_rng(0).bytes(4000), "b.jpg": b"b"}))
    struct.pack_into(how, data, directory(data) + at, value)
    (tmp_path / "bad.zip").write_bytes(data)
    with list_source(tmp_path / "bad.zip") as listing:
        if listing.rejected:
            assert why in listing.rejected[0][1]
        else:
            with pytest.raises(SourceError, match=why):
                listing.read(0)
        assert listing.read(len(listing) - 1) == b"b"


def test_a_file_without_a_name(tmp_path):
    data = bytearray(zip_bytes({"a.jpg": b"a", "b.jpg": b"b"}))
    data[directory(data) + 46] = 0
    (tmp_path / "bad.zip").write_bytes(data)
    with list_source(tmp_path / "bad.zip") as listing:
        assert listing.names == ["b.jpg"] and listing.ignored == 1


def test_cut_zips_and_random_damage(tmp_path):
    path, good = tmp_path / "bad.zip", zip_bytes({f"{k % 3}/{k}.jpg": b"%03d" % k * 40 for k in range(20)})
    for part in (good[:-10], good[: len(good) // 2], b"PK\3\4", b""):
        path.write_bytes(part)
        with pytest.raises(SourceError, match=r"bad\.zip: damaged, cut off or not a zip file"):
            list_source(path)
    rng, listed = np.random.default_rng(0), 0
    for k in range(400):
        bad = np.frombuffer(good, np.uint8).copy()
        where = rng.integers(directory(good) if k % 2 else 0, len(bad), 3)
        bad[where] ^= rng.integers(1, 256, 3, dtype=np.uint8)
        path.write_bytes(bad.tobytes())
        try:
            with list_source(path) as listing:
                listed += 1
                for i in range(len(listing)):
                    try:
                        assert len(listing.read(i)) == listing.sizes[i]
                    except SourceError:
                        continue
        except SourceError as error:
            assert "bad.zip" in str(error)
    assert 50 < listed < 400


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_tars(tmp_path, ending, caplog, monkeypatch):
    """As the tar itself; what is uncompressed leaves nothing behind."""
    monkeypatch.delenv("TMPDIR", raising=False)
    inner = {f"{name}.tar": tar_bytes({f"{k}.jpg": os.urandom(9000) for k in range(40)}) for name in ("cat", "dog")}
    whole = tar_bytes(inner | {"x.txt": b""})
    (tmp_path / "x.tar").write_bytes(whole)
    (tmp_path / f"x.{ending}").write_bytes(PACKERS[ending](whole))
    (tmp_path / "scratch").mkdir()
    with (
        list_source(tmp_path / "x.tar") as plain,
        list_source(tmp_path / f"x.{ending}", scratch=tmp_path / "scratch") as listing,
    ):
        assert content(listing) == content(plain) and listing.classes == ["cat", "dog"] and listing.ignored == 1
        assert listing.fingerprint != plain.fingerprint  # by the time of change
    assert os.listdir(tmp_path / "scratch") == []
    assert f"compressed; uncompressed first, into a temporary file in {tmp_path}/scratch" in caplog.text


def test_damaged_and_bottomless_compressed_tars(tmp_path, monkeypatch):
    whole = tar_bytes({f"{k}.jpg": np.random.default_rng(k).bytes(3000) for k in range(40)})
    for ending, pack in PACKERS.items():
        path, data = tmp_path / f"x.{ending}", pack(whole)
        for bad in (data[:-100], data[: len(data) // 2], data[:3000] + bytes(500) + data[3500:]):
            path.write_bytes(bad)
            with pytest.raises(SourceError, match=rf"x\.{ending}: damaged"):
                list_source(path)
    path.with_name("x.tar.gz").write_bytes(gzip.compress(tar_bytes({"a.jpg": bytes(60 << 20)})))
    monkeypatch.setattr(unpacked, "_LEFT_FREE", 1 << 20)
    with pytest.raises(SourceError, match="more than 200 times as large uncompressed"):
        list_source(path.with_name("x.tar.gz"))
    monkeypatch.setattr(unpacked.shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(1 << 20))
    with pytest.raises(SourceError, match=r"no room in .* to uncompress it"):
        list_source(path.with_name("x.tar.gz"))


def test_zstd_is_told_from_damage(tmp_path):
    (tmp_path / "x.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(SourceError, match=r"uncompress it first \(unzstd\)"):
        list_source(tmp_path / "x.tar.zst")


@pytest.mark.parametrize("kind", ["x.zip", "x.tar.gz", "x.parquet", "x.csv", "s-{0..1}.tar"])
def test_a_conversion_of_every_kind_goes_on(tmp_path, kind):
    """Stopped half-way: the same bytes as in one go. Photos that changed meanwhile are not mixed with the old ones."""
    photos = {f"{'cat' if k % 2 else 'dog'}/{k}.jpg": saved(picture(30, 40, k)) for k in range(12)}

    def make(names, stamp):
        some = {name: photos[name] for name in names}
        grow(tmp_path / "in", some)
        table = {"image": pa.array(some.values(), pa.binary()), "label": [name[:3] for name in names]}
        parquet.write_table(pa.table(table), tmp_path / "x.parquet", row_group_size=5)
        files = {"x.zip": zip_bytes(some), "x.tar.gz": gzip.compress(tar_bytes(some))}
        files |= {f"s-{k}.tar": tar_bytes({name: some[name] for name in names[k::2]}) for k in range(2)}
        grow(tmp_path, files | {"x.csv": "".join(f"in/{name},{name[:3]}\n" for name in names).encode()})
        for path in tmp_path.glob("[xs]*.[ztpc]*"):
            os.utime(path, ns=(stamp, stamp))

    names = list(photos)
    make(names, 1)
    whole, dst = tmp_path / "whole.beton", tmp_path / "out.beton"
    convert(tmp_path / kind, whole)
    stopped(tmp_path / kind, dst, 1)
    assert convert(tmp_path / kind, dst).resumed > 0 and dst.read_bytes() == whole.read_bytes()
    stopped(tmp_path / kind, dst, 1)
    make(names[::-1], 2)
    assert convert(tmp_path / kind, dst).resumed == 0
    convert(tmp_path / kind, whole)
    assert dst.read_bytes() == whole.read_bytes()


def test_archives_in_a_zip_are_to_be_unpacked(tmp_path):
    (tmp_path / "x.zip").write_bytes(zip_bytes({"cat.zip": b"", "dog.zip": b""}))
    with pytest.raises(SourceError, match=r"it holds 2 \.zip files: unpack it first, and give those$"):
        list_source(tmp_path / "x.zip")
