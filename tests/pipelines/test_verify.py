"""``fastssl verify``: whole files pass, and every kind of damage is found and named."""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from fastssl.cli import main
from fastssl.errors import BetonError
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.verify import sample_checksums, verify
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.ops import jpeg


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A converted folder of 20 photos in two classes."""
    root = tmp_path_factory.mktemp("original")
    rng = np.random.default_rng(0)
    for k in range(20):
        path = root / "photos" / f"class{k % 2}" / f"{k:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        path.write_bytes(jpeg.encode(np.asarray(small.resize((80, 60))), 90))
    convert(root / "photos", root / "a.beton")
    return root


@pytest.fixture
def beton(original, tmp_path):
    for name in ("a.beton", "a.beton.json"):
        shutil.copy(original / name, tmp_path / name)
    return tmp_path / "a.beton"


def change(path, at, value=None):
    data = bytearray(path.read_bytes())
    data[at] = data[at] ^ 1 if value is None else value
    path.write_bytes(data)


def test_a_whole_file(beton):
    calls = []
    report = verify(beton, workers=2, progress=lambda done, total: calls.append((done, total)))
    assert report.ok and (report.samples, report.checksummed, report.decoded) == (20, 20, 20) and report.side_file
    assert calls[0] == (0, 20) and calls[-1] == (20, 20)
    assert (
        verify(beton, decode=0).decoded == 0
        and verify(beton, decode=7).decoded == 7
        and verify(beton, decode=99).decoded == 20
    )


def test_a_silent_flip_is_found_by_the_checksum(beton):
    """A flip in JPEG data usually decodes without complaint, to a wrong picture."""
    with BetonReader(beton) as reader:
        places = {i: int(reader.offsets[i] + reader.sizes[i] - 100) for i in (3, 17)}
    for at in places.values():
        change(beton, at)
    report = verify(beton, decode=0)
    assert not report.ok and report.damaged == [(3, "wrong checksum"), (17, "wrong checksum")] and not report.problems


def test_what_does_not_decode_is_found_without_a_side_file(beton):
    (beton.parent / "a.beton.json").unlink()
    with BetonReader(beton) as reader:
        first, last = int(reader.offsets[4]), int(reader.offsets[10] + reader.sizes[10] - 1)
    change(beton, first, 0)
    change(beton, last, 0)
    report = verify(beton)
    assert not report.side_file and report.checksummed == 0 and report.decoded == 20
    assert [i for i, _ in report.damaged] == [4, 10] and all(
        "JPEG" in why and str(beton) not in why for _, why in report.damaged
    )
    assert verify(beton, decode=1).ok  # sample 0 alone


def test_damaged_labels_are_found(beton):
    """The format itself cannot notice a wrong label; the checksum of the metadata does."""
    change(beton, 24 + 2 * 1041 + 5 * 24 + 16)
    report = verify(beton)
    assert report.problems == ["checksum of the header or metadata is wrong"] and not report.damaged
    change(beton, 24 + 2 * 1041 + 5 * 24 + 16, 77)
    assert "sample 5 has the label 77, but the file has 2 classes" in verify(beton).problems


def test_damaged_tables_cannot_be_verified(beton):
    change(beton, 24 + 2 * 1041 + 5)
    with pytest.raises(BetonError, match="sample 0"):
        verify(beton)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda side: side.update(bytes=5), "do not belong together"),
        (lambda side: side["crc32"].update(head=1), "header or metadata"),
        (lambda side: side["crc32"].update(table=1), "allocation table"),
        (lambda side: side["crc32"].update(samples="AAAA"), "unreadable checksums"),
        (lambda side: side["crc32"].update(samples="AAAAAA=="), "1 checksum for 20"),
        (lambda side: side["crc32"].update(samples="?"), "unreadable checksums"),
        (lambda side: side.update(crc32=3), "unreadable checksums"),
        (lambda side: side.update(crc32={}), "unreadable checksums"),
        (lambda side: side.update(classes=3), "not a side file"),
    ],
)
def test_a_side_file_that_does_not_fit(beton, edit, problem):
    path = beton.parent / "a.beton.json"
    side = json.loads(path.read_text())
    edit(side)
    path.write_text(json.dumps(side))
    report = verify(beton)
    assert len(report.problems) == 1 and problem in report.problems[0] and not report.damaged


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[" * 200_000, "recursion"),
        (b'{"bytes": ' + b"9" * 5000 + b"}", "digits"),
        (b"\xff\xfe", "codec"),
        (1 << 40, r"is longer than 1\d MiB"),
        (None, "is not a plain file"),
    ],
)
def test_a_side_file_that_is_made_to_harm(beton, content, why):
    """Whoever asks for the classes or the checksums is told, at once."""
    path = beton.parent / "a.beton.json"
    path.unlink()
    if content is None:
        os.mkfifo(path)
    elif isinstance(content, int):
        path.touch()
        os.truncate(path, content)
    else:
        path.write_bytes(content)
    (problem,) = verify(beton).problems
    assert re.search(
        rf"^{re.escape(str(path))}: unreadable side file \(.*{why}.*\); delete it, or convert again$", problem
    )
    with BetonReader(beton) as reader:
        assert sample_checksums(reader) is None
        with pytest.raises(BetonError, match="unreadable side file"):
            _ = reader.classes


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_the_command(beton, capsys):
    assert run("verify", beton, "--decode", "all", "--json", "-") == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert record["ok"] and record["decoded"] == 20 and record["path"] == beton.name
    assert "20 checksums compared, 20 decoded" in captured.err

    with BetonReader(beton) as reader:
        change(beton, int(reader.offsets[6]), 0)
    assert run("verify", beton, "--decode", "5", "--json", "-") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["damaged"] == [[6, "wrong checksum"]]
    assert "damaged: sample 6: wrong checksum" in captured.err
    assert f"fastssl: {beton}: damaged (1 of 20 samples)" in captured.err

    change(beton, 0, 9)
    assert run("verify", beton, "--json", "-") == 1
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["ok"] and "fastssl: " in captured.err
    assert run("verify", beton.parent / "none.beton") == 1
    assert "none.beton: cannot open" in capsys.readouterr().err
    for wrong in ("-1", "some"):
        assert run("verify", beton, "--decode", wrong) == 2


def test_the_command_says_when_there_are_no_checksums(beton, capsys):
    (beton.parent / "a.beton.json").unlink()
    assert run("verify", beton) == 0
    assert "no side file" in capsys.readouterr().err
