"""Conversion: what is copied, what is changed and how, what is rejected; stopping and going on; the command."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from functools import cache

import numpy as np
import pytest
from PIL import Image
from power import Disk

from fastssl.cli import main
from fastssl.errors import JpegError
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert.conversion import convert, rejects_path
from fastssl.pipelines.convert.encode import Encoded, How, encode_photo
from fastssl.pipelines.convert.options import ConvertError, ConvertOptions
from fastssl.pipelines.convert.sources import SourceError
from fastssl.pipelines.ops import jpeg


def picture(height=60, width=80, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def saved(image, fmt="JPEG", **options):
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def decoded(encoded):
    if encoded.mode == 0:
        return jpeg.decode(encoded.data)
    return np.frombuffer(encoded.data, np.uint8).reshape(encoded.height, encoded.width, 3)


def stored_as_it_is(photo: Encoded) -> bool:
    return bool(photo.how & How.COPIED)


def close(found, expected, mean=4.0):
    assert found.shape == expected.shape
    return np.abs(found.astype(int) - expected).mean() < mean


RAW = ConvertOptions(store="raw")


# ---------------------------------------------------------------- one photo


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"comment": b"x" * 100}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_that_needs_no_change_is_copied(options, mode):
    data = saved(Image.fromarray(picture()).convert(mode), **options)
    encoded = encode_photo(data, ConvertOptions())
    assert stored_as_it_is(encoded) and encoded.data == data and (encoded.height, encoded.width) == (60, 80)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (dict(short_side=60), (60, 80)),
        (dict(short_side=30), (30, 40)),
        (dict(short_side=31), (31, 41)),
        (dict(max_side=80), (60, 80)),
        (dict(max_side=50), (38, 50)),
        (dict(short_side=10, keep_size=True), (60, 80)),
        (dict(short_side=None), (60, 80)),
        (dict(short_side=1), (1, 1)),
    ],
)
def test_scaling(options, size):
    """Never up, antialiased, aspect kept; equal to Pillow's Lanczos on the decoded picture."""
    data = saved(picture(), quality=95)
    encoded = encode_photo(data, ConvertOptions(store="raw", **options))
    assert (encoded.height, encoded.width) == size
    if size[0] >= 20:
        expected = np.asarray(Image.fromarray(jpeg.decode(data)).resize((size[1], size[0]), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(decoded(encoded), expected)
    stored = encode_photo(data, ConvertOptions(quality=95, **options))
    assert stored_as_it_is(stored) == (size == (60, 80))
    assert close(decoded(stored), decoded(encoded), 3)


def test_a_far_too_large_jpeg_is_reduced_by_the_decoder_first():
    data = saved(picture(1600, 1200), quality=95)
    found = decoded(encode_photo(data, ConvertOptions(short_side=100, store="raw")))
    expected = np.asarray(Image.fromarray(jpeg.decode(data)).resize((100, 133), Image.Resampling.LANCZOS))
    assert close(found, expected, 0.6) and np.abs(found.astype(int) - expected).max() < 8


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(orientation):
    """Pixels come out upright, whatever the order of turning and scaling."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = picture()
    # How a camera held that way stores the upright picture: the EXIF standard's row 0 and column 0, in NumPy's words.
    stored = {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    stored = Image.fromarray(np.ascontiguousarray(stored))
    for fmt, options in [("JPEG", dict(quality=95, subsampling=0)), ("PNG", {}), ("WEBP", dict(quality=100))]:
        data = saved(stored, fmt, exif=exif, **options)
        encoded = encode_photo(data, RAW)
        assert not stored_as_it_is(encoded)
        assert close(decoded(encoded), upright, 4 if fmt == "WEBP" else 2)
        assert close(decoded(encode_photo(data, ConvertOptions(quality=95))), upright)
        small = decoded(encode_photo(data, ConvertOptions(short_side=30, store="raw")))
        assert close(small, np.asarray(Image.fromarray(upright).resize((40, 30), Image.Resampling.LANCZOS)))


def test_upright_exif_is_copied():
    exif = Image.Exif()
    exif[0x0112] = 1
    assert stored_as_it_is(encode_photo(saved(picture(), exif=exif), ConvertOptions()))


def with_alpha(array, alpha):
    return Image.fromarray(np.dstack([array, np.full(array.shape[:2], alpha, np.uint8)]))


@cache
def pictures_of_all_kinds():
    """name -> (file contents, the pixels that should come out)."""
    rgb = picture()
    grey = np.asarray(Image.fromarray(rgb).convert("L"))
    three = np.repeat(grey[:, :, None], 3, axis=2)
    palette = Image.fromarray(rgb).quantize(64)
    see_through = palette.copy()
    see_through.info["transparency"] = see_through.getpixel((0, 0))
    index = np.asarray(palette)
    over_white = np.where((index == index[0, 0])[:, :, None], 255, np.asarray(palette.convert("RGB")))
    half = np.clip(np.rint(rgb * (128 / 255) + 255 * (127 / 255)), 0, 255)
    sixteen = Image.fromarray((grey.astype(np.uint16) << 8) | 0x37)
    frames = [Image.fromarray(picture(seed=k)).quantize(256) for k in range(3)]
    return {
        "png": (saved(rgb, "PNG"), rgb),
        "png grey": (saved(grey, "PNG"), three),
        "png 1 bit": (saved(Image.fromarray(grey > 128), "PNG"), np.where(three > 128, 255, 0)),
        "png 16 bit": (saved(sixteen, "PNG"), three),
        "tiff 16 bit": (saved(sixteen, "TIFF"), three),
        "png palette": (saved(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "png palette alpha": (saved(see_through, "PNG", transparency=int(index[0, 0])), over_white),
        "png alpha": (saved(with_alpha(rgb, 128), "PNG"), half),
        "png invisible": (saved(with_alpha(rgb, 0), "PNG"), np.full_like(rgb, 255)),
        "png grey alpha": (saved(with_alpha(three, 0).convert("LA"), "PNG"), np.full_like(rgb, 255)),
        "webp": (saved(rgb, "WEBP", lossless=True), rgb),
        "bmp": (saved(rgb, "BMP"), rgb),
        "ppm": (saved(rgb, "PPM"), rgb),
        "tiff": (saved(rgb, "TIFF"), rgb),
        "gif": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), np.asarray(frames[0].convert("RGB"))),
        "jpeg rgb": (saved(rgb, quality=100, keep_rgb=True), rgb),
        "jpeg cmyk": (saved(Image.fromarray(rgb).convert("CMYK"), quality=100), rgb),
        "1x1": (saved(rgb[:1, :1], "PNG"), rgb[:1, :1]),
    }


@pytest.mark.parametrize("name", pictures_of_all_kinds())
def test_pictures_of_all_kinds(name):
    data, expected = pictures_of_all_kinds()[name]
    raw = encode_photo(data, RAW)
    assert raw.mode == 1 and close(decoded(raw), expected, 2.0 if "jpeg" in name else 0.51)
    stored = encode_photo(data, ConvertOptions(quality=95))
    assert stored.mode == 0 and not stored_as_it_is(stored)
    assert close(decoded(stored), expected, 12 if "1 bit" in name or "palette alpha" in name else 4)


def test_unusual_sampling_factors():
    """Colour at a third of the width: outside what the fast decoder knows, so Pillow decodes it, and it is encoded
    anew.
    """
    data = saved(np.full((8, 24, 3), 128, np.uint8), subsampling=0)
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    assert data[frame + 11] == 0x11
    # One block row in the standard Huffman codes: three grey luma blocks (DC 00, end 1010), then one block each of Cb
    # and Cr (00, 00).
    bits = "001010" * 3 + "0000" * 2
    bits += "1" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big")
    length = int.from_bytes(data[scan + 2 : scan + 4], "big")
    data = data[: frame + 11] + b"\x31" + data[frame + 12 : scan + 2 + length] + body + b"\xff\xd9"
    with pytest.raises(JpegError, match="subsampling"):
        jpeg.decode(data)
    encoded = encode_photo(data, RAW)
    assert (decoded(encoded) == 128).all() and decoded(encoded).shape == (8, 24, 3)
    assert not stored_as_it_is(encode_photo(data, ConvertOptions()))


def test_stray_bytes_before_the_end_marker_are_cleaned_away():
    """A whole picture in an untidy file: not rejected, not copied."""
    data = saved(picture(), quality=95)
    encoded = encode_photo(data[:-2] + bytes(40) + data[-2:], ConvertOptions(quality=95))
    assert not stored_as_it_is(encoded)
    assert close(decoded(encoded), picture(), 3)


def png_of_size(width, height):
    """A PNG whose header promises more than it has."""
    import struct
    import zlib

    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@cache
def bad_pictures():
    good, png = saved(picture()), saved(picture(), "PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    bomb = bytearray(good)
    at = good.index(b"\xff\xc0") + 5
    bomb[at : at + 4] = b"\xff\xdc\xff\xdc"
    return {
        "empty": b"",
        "text": b"hello",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        "soi only": good[:3],
        "jpeg cut": good[: len(good) // 2],
        "jpeg without end": good[:-2],
        "jpeg header only": good[:200],
        "jpeg bomb": bytes(bomb),
        "cmyk cut": saved(Image.fromarray(picture()).convert("CMYK"))[:-300],
        "cmyk without end": saved(Image.fromarray(picture()).convert("CMYK"))[:-2],
        "png cut": png[: len(png) // 2],
        "png flipped": bytes(flipped),
        "png bomb": png_of_size(60000, 60000),
        "png short data": png_of_size(300, 300),
        "gif cut": saved(picture(), "GIF")[:300],
        "webp cut": saved(picture(), "WEBP")[:200],
        "bmp cut": saved(picture(), "BMP")[:500],
        "float tiff with nan": saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
    }


@pytest.mark.parametrize("name", bad_pictures())
def test_bad_pictures_are_refused(name):
    with pytest.raises(Exception) as caught:  # Pillow's plugins raise what they like
        encode_photo(bad_pictures()[name], ConvertOptions())
    assert not isinstance(caught.value, MemoryError)
    if "bomb" in name:
        assert isinstance(caught.value, (JpegError, Image.DecompressionBombError))


def test_sides_that_the_format_cannot_hold():
    wide = saved(np.zeros((1, 70000, 3), np.uint8), "PNG")
    for store in ("jpeg", "raw"):
        with pytest.raises(JpegError, match="65535"):
            encode_photo(wide, ConvertOptions(keep_size=True, store=store))
    assert encode_photo(wide, ConvertOptions(max_side=1000)).width == 1000


def test_options_are_checked():
    wrongs = [
        dict(short_side=0),
        dict(quality=0),
        dict(quality=101),
        dict(store="png"),
        dict(workers=0),
        dict(on_bad="x"),
        dict(limit=-1),
    ]
    for wrong in wrongs:
        with pytest.raises(ConvertError):
            ConvertOptions(**wrong)
    with pytest.raises(ConvertError, match="not both"):
        ConvertOptions(max_side=5, keep_size=True)


# ---------------------------------------------------------------- whole sources


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """Two classes, all kinds of good pictures under wrong and right names, all kinds of bad ones."""
    root = tmp_path_factory.mktemp("shared") / "photos"
    (root / "good").mkdir(parents=True)
    (root / "mixed").mkdir()
    for k in range(12):
        (root / "good" / f"{k:02}.JPG").write_bytes(saved(picture(60 + 40 * k, 400, seed=k)))
    for k, (data, _) in enumerate(pictures_of_all_kinds().values()):
        (root / "mixed" / f"a{k:02}.jpg").write_bytes(data)
    for k, data in enumerate(bad_pictures().values()):
        (root / "mixed" / f"b{k:02}.png").write_bytes(data)
    (root / "mixed" / "readme.txt").write_text("not a photo")
    (root / "mixed" / "._a00.jpg").write_bytes(b"mac")
    return root


@pytest.fixture
def folder(shared_folder, tmp_path):
    """The shared folder, under the test's own."""
    (tmp_path / "photos").symlink_to(shared_folder)
    return tmp_path / "photos"


def outputs(dst):
    return {path.name.removeprefix(dst.name): path.read_bytes() for path in dst.parent.glob(dst.name + "*")}


def test_a_folder_with_everything(folder, tmp_path):
    dst = tmp_path / "out.beton"
    calls = []
    summary = convert(folder, dst, ConvertOptions(workers=2), lambda done, total: calls.append((done, total)))
    kinds, bad = len(pictures_of_all_kinds()), len(bad_pictures())
    assert (summary.written, summary.rejected, summary.ignored, summary.resumed) == (12 + kinds, bad, 2, 0)
    assert summary.copied + summary.reencoded == summary.written and summary.copied == 5 + 0
    assert summary.classes == ["good", "mixed"] and summary.path == dst and summary.bytes == dst.stat().st_size
    assert calls[0] == (0, 12 + kinds + bad) and calls[-1] == (12 + kinds + bad,) * 2
    assert set(outputs(dst)) == {"", ".json", ".rejects.jsonl"}

    with BetonReader(dst) as reader:
        assert reader.classes == ["good", "mixed"]
        np.testing.assert_array_equal(reader.labels, [0] * 12 + [1] * kinds)
        assert np.minimum(reader.heights, reader.widths).max() == 256
        for i in range(12):
            data = (folder / "good" / f"{i:02}.JPG").read_bytes()
            if 60 + 40 * i <= 256:
                assert reader.encoded(i).tobytes() == data
            assert close(reader.decode(i), decoded(encode_photo(data, RAW)))
        for i, (_, expected) in enumerate(pictures_of_all_kinds().values()):
            assert close(reader.decode(12 + i), expected, 12)

    rejects = [json.loads(line) for line in rejects_path(dst).read_text().splitlines()]
    assert [reject["path"] for reject in rejects] == [f"mixed/b{k:02}.png" for k in range(bad)]
    assert all(reject["reason"] for reject in rejects)
    side = json.loads((tmp_path / "out.beton.json").read_text())
    assert side["class_counts"] == [12, kinds] and side["bytes"] == summary.bytes
    assert (side["samples"], side["copied"], side["reencoded"], side["rejected"]) == (12 + kinds, 5, 7 + kinds, bad)
    assert side["options"]["short_side"] == 256 and side["scaled"] == summary.scaled == 7


def test_bytes_do_not_depend_on_workers_or_resume(folder, tmp_path):
    results = []
    for k, options in enumerate([dict(workers=1), dict(workers=5), dict(workers=2, resume=False)]):
        dst = tmp_path / str(k) / "out.beton"
        dst.parent.mkdir()
        convert(folder, dst, ConvertOptions(**options))
        results.append(outputs(dst))
    assert results[0] == results[1] == results[2]


def test_tars_give_the_same_pictures(folder, tmp_path):
    plain, outer = tmp_path / "plain.tar", tmp_path / "outer.tar"
    with tarfile.open(plain, "w") as archive:
        for name in sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*")):
            archive.add(folder / name, f"./photos/{name}")
    with tarfile.open(outer, "w") as archive:
        for name in ("good", "mixed"):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for path in sorted((folder / name).iterdir()):
                    inner.add(path, path.name)
            member = tarfile.TarInfo(f"{name}.tar")
            member.size = buffer.tell()
            buffer.seek(0)
            archive.addfile(member, buffer)
    convert(folder, tmp_path / "folder.beton")
    expected = (tmp_path / "folder.beton").read_bytes()
    for source in (plain, outer):
        summary = convert(source, tmp_path / "tar.beton")
        assert summary.classes == ["good", "mixed"] and summary.rejected == len(bad_pictures())
        assert (tmp_path / "tar.beton").read_bytes() == expected


def test_raw_flat_and_limited(folder, tmp_path):
    dst = tmp_path / "out.beton"
    summary = convert(folder / "good", dst, ConvertOptions(store="raw", limit=4, max_side=50))
    assert (summary.written, summary.copied, summary.classes) == (4, 0, None)
    with BetonReader(dst) as reader:
        assert reader.labels is None and reader.classes is None
        assert (reader.modes == 1).all() and np.maximum(reader.heights, reader.widths).max() == 50
        for i, k in enumerate([0, 3, 6, 9]):  # evenly spaced
            data = (folder / "good" / f"{k:02}.JPG").read_bytes()
            np.testing.assert_array_equal(
                reader.decode(i), decoded(encode_photo(data, ConvertOptions(store="raw", max_side=50)))
            )
    assert json.loads((tmp_path / "out.beton.json").read_text())["class_counts"] is None


def test_nothing_to_convert_leaves_nothing(tmp_path):
    source, dst = tmp_path / "photos", tmp_path / "out.beton"
    source.mkdir()
    with pytest.raises(SourceError, match="no photos found"):
        convert(source, dst)
    (source / "a.jpg").write_bytes(b"")
    (source / "b.jpg").write_bytes(b"xx")
    with pytest.raises(ConvertError, match=r"all of 2 photos rejected.*a.jpg: the file is empty"):
        convert(source, dst)
    with pytest.raises(SourceError, match="No such file"):
        convert(tmp_path / "nowhere", dst)
    assert os.listdir(tmp_path) == ["photos"]


def test_a_destination_that_cannot_be_written(folder, tmp_path):
    with pytest.raises(ConvertError, match="no such folder"):
        convert(folder, tmp_path / "no" / "out.beton")
    with pytest.raises(ConvertError, match="is a folder"):
        convert(folder, tmp_path)
    with pytest.raises(ConvertError, match=r"/proc/out.beton.partial: cannot write"):
        convert(folder, "/proc/out.beton")


@pytest.mark.parametrize("resume", [True, False])
def test_on_bad_fail_stops_at_the_first(folder, tmp_path, resume):
    dst = tmp_path / "out.beton"
    with pytest.raises(ConvertError, match=r"mixed/b00.png: the file is empty"):
        convert(folder, dst, ConvertOptions(on_bad="fail", resume=resume))
    assert not dst.exists()
    assert set(outputs(dst)) == ({".partial", ".partial.journal"} if resume else set())
    summary = convert(folder, dst, ConvertOptions(resume=resume))
    assert summary.resumed == (12 + len(pictures_of_all_kinds()) if resume else 0)
    assert set(outputs(dst)) == {"", ".json", ".rejects.jsonl"}


def test_a_conversion_that_did_nothing_leaves_nothing(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    with pytest.raises(ConvertError, match=r"a.jpg: the file is empty"):
        convert(tmp_path / "photos", tmp_path / "out.beton", ConvertOptions(on_bad="fail"))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_an_existing_file_is_replaced_at_the_end_only(folder, tmp_path):
    dst = tmp_path / "out.beton"
    convert(folder, dst)
    before = outputs(dst)
    with pytest.raises(ConvertError):
        convert(folder, dst, ConvertOptions(on_bad="fail", resume=False))
    assert outputs(dst) == before
    summary = convert(folder / "good", dst)
    assert summary.rejected == 0 and set(outputs(dst)) == {"", ".json"}  # the old list of rejects is gone
    assert outputs(dst)[""] != before[""]


def test_two_conversions_to_one_place(folder, tmp_path):
    import fcntl

    with open(tmp_path / "out.beton.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConvertError, match="another conversion"):
            convert(folder, tmp_path / "out.beton")


def test_a_full_disk_is_one_clear_error_and_can_go_on(folder, tmp_path, monkeypatch):
    import resource

    dst = tmp_path / "out.beton"
    convert(folder, dst, ConvertOptions(store="raw", workers=1))
    whole = outputs(dst)
    for path in tmp_path.glob("out*"):
        path.unlink()
    monkeypatch.setattr("fastssl.pipelines.convert.conversion.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(signal, "SIGXFSZ", signal.SIGXFSZ)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, limits[1]))
        with pytest.raises(ConvertError, match=r"out.beton: cannot write: File too large; run the same command again"):
            convert(folder, dst, ConvertOptions(store="raw", workers=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert not dst.exists()
    summary = convert(folder, dst, ConvertOptions(store="raw", workers=1))
    assert summary.resumed > 0 and outputs(dst) == whole


# ---------------------------------------------------------------- stopping and going on

KILLED = """
import os, signal, sys
from fastssl.pipelines.beton import writer
from fastssl.pipelines.convert import conversion as convert
convert.CHECKPOINT_SECONDS = 0.0
source, destination, what, when = sys.argv[1:]
count = 0
def dying(function):
    def wrapped(*args, **kwargs):
        global count
        count += 1
        if count == int(when):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped
if what == "add":
    writer.BetonWriter.add = dying(writer.BetonWriter.add)
elif what == "fsync":
    os.fsync = dying(os.fsync)
elif what == "replace":
    os.replace = dying(os.replace)
elif what == "unlink":
    convert.Path.unlink = dying(convert.Path.unlink)
convert.convert(source, destination, convert.ConvertOptions(workers=2))
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """(a folder of 40 photos, two of them bad, and what an undisturbed conversion makes of them)."""
    root = tmp_path_factory.mktemp("many")
    for k in range(40):
        path = root / "photos" / f"class{k % 3}" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"bad" if k in (7, 33) else saved(picture(260 + k, 300, seed=k)))
    convert(root / "photos", root / "out.beton")
    return root / "photos", outputs(root / "out.beton")


def test_a_power_cut_at_any_moment_leaves_what_the_journal_vouches_for(many, tmp_path, monkeypatch):
    source, whole = many
    monkeypatch.setattr("fastssl.pipelines.convert.conversion.CHECKPOINT_SECONDS", 0.0)
    disk = Disk(monkeypatch)
    convert(source, tmp_path / "out.beton")
    assert outputs(tmp_path / "out.beton") == whole
    vouched = [place for place, event in enumerate(disk.events) if event == ("fsync", "out.beton.partial.journal")]
    assert len(vouched) == 40 and all(disk.events[place - 1] == ("fsync", "out.beton.partial") for place in vouched)
    assert [name for what, name in disk.events if what == "rename"] == [
        "out.beton.rejects.jsonl",
        "out.beton.json",
        "out.beton",
    ]
    assert not disk.problems and not disk.lost_names


@pytest.mark.parametrize(
    ("what", "when"), [("add", 1), ("add", 25), ("fsync", 41), ("replace", 1), ("replace", 3), ("unlink", 6)]
)
def test_killed_at_a_chosen_moment(many, tmp_path, what, when):
    source, whole = many
    dst = tmp_path / "out.beton"
    result = subprocess.run([sys.executable, "-c", KILLED, str(source), str(dst), what, str(when)], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert (what == "unlink") == dst.exists()
    if dst.exists():
        assert dst.read_bytes() == whole[""]
    summary = convert(source, dst)
    assert outputs(dst) == whole
    assert (summary.written, summary.rejected) == (38, 2)
    if (what, when) != ("add", 1) and what != "unlink":
        assert summary.resumed > 15


def test_killed_at_random_moments_until_it_is_done(many, tmp_path):
    """Kill again and again; each run goes on where the last one stood, and the end is the same to the last byte."""
    source, whole = many
    dst = tmp_path / "out.beton"
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(source), str(dst), "never", "0"], stderr=subprocess.DEVNULL
        )
        journal = tmp_path / "out.beton.partial.journal"
        before = journal.stat().st_size if journal.exists() else 0
        deadline = time.monotonic() + 20
        while (
            process.poll() is None
            and time.monotonic() < deadline
            and not (journal.exists() and journal.stat().st_size > before)
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        if dst.exists():
            break
    assert kills >= 1  # a quick machine may be through before the second
    assert not dst.exists() or dst.read_bytes() == whole[""]
    convert(source, dst)
    assert outputs(dst) == whole


def stopped(source, dst, after):
    """Stop a conversion with Ctrl-C after some photos."""

    def progress(done, total):
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, dst, ConvertOptions(workers=1), progress)


def test_interrupted_and_changed(many, tmp_path, caplog):
    source, whole = many
    dst = tmp_path / "out.beton"
    stopped(source, dst, 1)
    assert set(outputs(dst)) == {".partial", ".partial.journal"}
    assert convert(source, dst).resumed > 0 and outputs(dst) == whole
    assert not caplog.records

    # Other options: the leftover is of no use, which is said.
    stopped(source, dst, 1)
    summary = convert(source, dst, ConvertOptions(quality=50))
    assert summary.resumed == 0 and "starting again" in caplog.text
    caplog.clear()

    # The unfinished file was damaged or lost.
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.unlink()):
        stopped(source, dst, 1)
        damage(tmp_path / "out.beton.partial")
        assert convert(source, dst).resumed == 0 and outputs(dst) == whole
        assert "does not match its journal" in caplog.text
        caplog.clear()

    # A torn, a repeated and a senseless journal line.
    for tail in (b"1234abcd [9, 123, true, 2", None, b"\xff\xfe\n", b"7\n", b"[40, 1]\n"):
        stopped(source, dst, 1)
        journal = tmp_path / "out.beton.partial.journal"
        journal.write_bytes(journal.read_bytes() + (journal.read_bytes().splitlines(True)[1] if tail is None else tail))
        assert convert(source, dst).resumed > 0 and outputs(dst) == whole

    # No resuming wanted: leftovers go.
    stopped(source, dst, 1)
    assert convert(source, dst, ConvertOptions(resume=False)).resumed == 0 and outputs(dst) == whole


def test_a_journal_that_was_damaged_makes_the_same_file(many, tmp_path):
    """Whatever a flipped digit would say: another label, or a place outside the file."""
    source, whole = many
    dst, journal, partial = (tmp_path / f"out.beton{end}" for end in ("", ".partial.journal", ".partial"))
    stopped(source, dst, 20)
    kept, photos, rng = journal.read_bytes(), partial.read_bytes(), random.Random(0)
    for _ in range(20):
        damaged = bytearray(kept)
        at = rng.randrange(len(damaged))
        if rng.random() < 0.5:
            damaged[at] = rng.choice(b"0123456789-,.[]\n")
        else:
            damaged[at:at] = rng.choice((b"9" * 25, b"-", b"[" * 2000, b"\n"))
        journal.write_bytes(damaged)
        partial.write_bytes(photos)
        convert(source, dst)
        assert outputs(dst) == whole, bytes(damaged)


# ---------------------------------------------------------------- the command


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_the_command(folder, tmp_path, capsys):
    dst = tmp_path / "out.beton"
    assert run("convert-imagenet", folder, dst, "--short-side", 64, "--workers", 1, "--json", "-") == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["written"] == 12 + len(pictures_of_all_kinds()) and record["path"] == dst.name
    assert "images/s" in captured.err and "rejects.jsonl" in captured.err and "2 other files ignored" in captured.err
    with BetonReader(dst) as reader:
        assert np.minimum(reader.heights, reader.widths).max() == 64


def test_convert_is_short_for_it_and_help_has_sections(capsys):
    assert run("convert", "--help") == 0
    said = capsys.readouterr().out
    places = [said.index(words) for words in ("Photos and classes:", "  --labels", "What is stored:", "  --keep-size")]
    assert places == sorted(places) and "Options:" not in said
    assert run("--help") == 0 and "\n  convert " not in capsys.readouterr().out


def test_a_table_among_photos_without_classes_may_hold_their_labels(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.jpg").write_bytes(saved(picture()))
    (tmp_path / "photos" / "labels.csv").write_text("0.jpg,cat\n")
    hint = "1 .csv: where labels are in it, give it as --labels FILE"
    assert run("convert", tmp_path / "photos", tmp_path / "out.beton") == 0 and hint in capsys.readouterr().err
    shutil.copytree(tmp_path / "photos", tmp_path / "set" / "val")  # train has classes, and val none
    for name in ("cat", "dog"):
        shutil.copytree(tmp_path / "photos", tmp_path / "set" / "train" / name)
    assert run("convert", tmp_path / "set", tmp_path / "set.beton") == 0
    assert hint.replace("1", "3", 1) in capsys.readouterr().err
    labels = ("--labels", tmp_path / "photos" / "labels.csv")
    assert run("convert", tmp_path / "photos", tmp_path / "out.beton", *labels) == 0
    assert hint not in capsys.readouterr().err


def test_what_scaling_down_costs_is_said_where_nobody_asked_for_it(folder, tmp_path, capsys):
    """The mixed photos are smaller than 256 px: re-encoded, some of them, but not scaled."""

    def said(source, *options):
        assert run("convert-imagenet", source, tmp_path / "out.beton", *options) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "softer" in line]

    (line,) = said(folder)
    assert line.startswith("7 photos scaled down to a short side of 256 px") and "--keep-size" in line
    assert not any(said(folder, *how) for how in (["--keep-size"], ["--short-side", 256], ["-q"]))
    assert not said(folder / "mixed")
    assert run("convert-imagenet", "--help") == 0 and "softer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere", "out.beton"], 1, "nowhere: cannot read"),
        (["photos", "no/out.beton"], 1, "no such folder"),
        (["photos/mixed/readme.txt", "out.beton"], 1, "no photos found"),
        (["photos", "out.beton", "--on-bad", "fail"], 1, "b00.png"),
        (["photos", "out.beton", "--keep-size", "--max-side", "9"], 2, "give one of"),
        (["photos", "out.beton", "--quality", "0"], 2, "0"),
        (["photos"], 2, "DST"),
    ],
)
def test_the_command_fails_in_one_line(folder, tmp_path, capsys, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    assert run("convert-imagenet", *arguments) == status
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    if status == 1:
        assert sum(line.startswith("fastssl: ") for line in errors.splitlines()) == 1
    assert not (tmp_path / "out.beton").exists()


def test_without_a_journal_little_waits_for_the_last_sync(folder, tmp_path, monkeypatch):
    """A large memory would hold it all back, and a slow disk then be taken for a dead one."""
    sizes, writer_sync = [], BetonWriter.sync

    def sync(writer):
        writer_sync(writer)
        sizes.append(os.path.getsize(writer.path))

    monkeypatch.setattr(BetonWriter, "sync", sync)
    monkeypatch.setattr("fastssl.pipelines.convert.conversion.CHECKPOINT_SECONDS", 0.0)
    convert(folder, tmp_path / "whole.beton", ConvertOptions(resume=False))
    at_the_end = len(sizes)
    monkeypatch.setattr("fastssl.pipelines.convert.conversion._MOST_UNSYNCED", 1)
    convert(folder, tmp_path / "often.beton", ConvertOptions(resume=False))
    assert len(sizes) > 2 * at_the_end + 2
    assert (tmp_path / "often.beton").read_bytes() == (tmp_path / "whole.beton").read_bytes()
