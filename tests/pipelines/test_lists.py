"""Lists of photos: tables, paths a line, standard input."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from fastssl.cli import main
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertError, ConvertOptions
from fastssl.pipelines.convert.sources import SourceError, list_source, lists
from tests.pipelines.test_sources import content, grow

FILES = {"in/a.jpg": b"a", "in/b c.jpg": b"b", "in/d,1.jpg": b"d", "e.jpg": b"e"}
WANTED = [("in/a.jpg", "cat", b"a"), ("in/b c.jpg", "dog", b"b"), ("in/d,1.jpg", "cat", b"d")]


@pytest.fixture
def stdin(monkeypatch):
    """Puts bytes on standard input."""

    def put(data):
        lists._standard_input.cache_clear()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    yield put
    lists._standard_input.cache_clear()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", 'path,label\nin/a.jpg,cat\nin/b c.jpg,dog\n"in/d,1.jpg",cat\n'),
        (
            "x.csv",
            '\ufeff"Label";"w";"Image Path"\r\ncat;1;in/a.jpg\r\n\ndog;2;in/b c.jpg\r\ncat;3;in/d,1.jpg\r\n',
        ),
        ("x.csv", 'in/a.jpg,cat\nin/b c.jpg,dog\n"in/d,1.jpg",cat'),
        ("x.csv", "breed, file\ncat, in/a.jpg\ndog, in/b c.jpg\ncat, 'in/d,1.jpg'\n".replace("'", '"')),
        ("x.tsv", "filename\tclass\nin/a.jpg\tcat\nin/b c.jpg\tdog\nin/d,1.jpg\tcat\n"),
        ("x.txt", "# mine\nin/a.jpg cat\nin/b c.jpg dog\n  \nin/d,1.jpg cat\n"),
        ("x.txt", "cat\tin/a.jpg\ndog\tin/b c.jpg\ncat\tin/d,1.jpg\n"),
        ("x.lst", "in/a.jpg;cat\n./in/b c.jpg;dog\nin/d,1.jpg;cat\n"),
    ],
)
def test_tables(tmp_path, name, text):
    grow(tmp_path, FILES | {name: text.encode()})
    with list_source(tmp_path / name) as listing:
        assert content(listing) == WANTED and listing.classes == ["cat", "dog"] and listing.rejected == []
    (tmp_path / name).write_bytes(text.removeprefix("\ufeff").encode("utf-16"))
    with list_source(tmp_path / name) as listing:
        assert content(listing) == WANTED


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_path_a_line(tmp_path, ending, monkeypatch):
    """Labels are folders, as in a tar; anywhere on the disk."""
    grow(tmp_path, {"p/cat/1,2 3.jpg": b"1", "p/dog/#2.jpg": b"2", "l/x.txt": b""})
    names = ["../p/cat/1,2 3.jpg", f"{tmp_path}/p/dog/#2.jpg", "../p/readme.md"]
    (tmp_path / "l/x.txt").write_bytes(ending.join(names).encode())
    monkeypatch.chdir("/")
    with list_source(tmp_path / "l/x.txt") as listing:
        assert [data for _, _, data in content(listing)] == [b"1", b"2"] and listing.passed_over == {".md": 1}
    (tmp_path / "l/x.txt").write_bytes(ending.join(name.replace("../", f"{tmp_path}/") for name in names).encode())
    with list_source(tmp_path / "l/x.txt") as listing:
        assert [name for _, name, _ in content(listing)] == ["cat", "dog"]


def test_numbers_as_labels(tmp_path):
    """In the order of numbers; -1 is no label."""
    grow(tmp_path, {f"{k}.jpg": b"x" for k in range(4)} | {"x.txt": b"0.jpg 10\n1.jpg 9\n2.jpg 010\n3.jpg -1\n"})
    with list_source(tmp_path / "x.txt") as listing:
        assert listing.classes == ["9", "10"] and listing.labels.tolist() == [1, 0, 1]
        assert [name for name, _ in listing.rejected] == ["3.jpg"]


def test_what_cannot_be_read_is_a_reject(tmp_path):
    grow(tmp_path, FILES)
    os.mkfifo(tmp_path / "pipe.jpg")
    rows = ["path,label", "gone.jpg,cat", "e.jpg,cat", "pipe.jpg,cat", "./e.jpg,dog", "in/a.jpg", ""]
    (tmp_path / "x.csv").write_text("\n".join(rows))
    with list_source(tmp_path / "x.csv") as listing:
        assert content(listing) == [("e.jpg", "cat", b"e")]
        assert dict(listing.rejected).keys() == {"gone.jpg", "pipe.jpg", "e.jpg", "in/a.jpg"}
    for text, why in (
        ("gone.jpg\nlost.jpg", "2 rejected, first gone.jpg: cannot be read: No such file"),
        ("", "no photos found"),
        ("a.jpg,1,2\n", "which column is the path, which the label"),
        ("id,breed\n", "which column is the path, which the label"),
        ("path\n" + "x" * 70_000, "a line of more than 65,536 characters"),
        ('path\n"' + "x\n" * 200_000, r"line \d+: not a table of photos"),
    ):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(SourceError, match=why):
            list_source(tmp_path / "x.csv")


def test_names_that_are_no_utf_8(tmp_path):
    name = os.fsdecode(b"\xe4.jpg")
    grow(tmp_path, {name: b"x", "x.txt": b"\xe4.jpg\n"})
    with list_source(tmp_path / "x.txt") as listing:
        assert listing.names == [name] and listing.read(0) == b"x"


def test_random_bytes_as_a_list_end(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(60):
        for name in ("x.csv", "x.txt"):
            (tmp_path / name).write_bytes([b"", b"\xff\xfe", b"path,label\n"][k % 3] + rng.bytes(3000))
            with pytest.raises(SourceError, match=name):
                list_source(tmp_path / name)


@pytest.mark.parametrize("apart", [b"\0", b"\n"])
def test_standard_input(tmp_path, stdin, monkeypatch, apart):
    """As find -print0 writes it; whoever lists again, as for a second file, finds the same."""
    grow(tmp_path, {"cat/a\nb.jpg" if apart == b"\0" else "cat/a b.jpg": b"a", "dog/c.jpg": b"c"})
    monkeypatch.chdir(tmp_path)
    names = sorted(f"./{one.relative_to(tmp_path)}".encode() for one in tmp_path.glob("*/*.jpg"))
    stdin(apart.join(names) + apart)
    for _ in range(2):
        with list_source("-") as listing:
            assert listing.names == [os.fsdecode(name[2:]) for name in names] and listing.classes == ["cat", "dog"]


def picture(value):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), value).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_command_takes_several_sources(tmp_path, stdin, monkeypatch):
    """A folder, a pattern and standard input together; stopped and resumed as any other."""
    monkeypatch.chdir(tmp_path)
    grow(tmp_path, {"one/cat/1.png": picture("red"), "two/s-9.csv": b"x.png,dog\n", "two/s-10.csv": b"y.png,cow\n"})
    grow(
        tmp_path,
        {
            "two/x.png": picture("blue"),
            "two/y.png": picture("green"),
            "z/owl/z.png": picture("white"),
            "z/cat/w.png": picture("tan"),
        },
    )
    stdin(b"z/owl/z.png\nz/cat/w.png\n")
    arguments = ["convert-imagenet", "one", "two/s-*.csv", "-", "all.beton"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--json", "all.json"])
    assert ended.value.code in (0, None) and json.loads((tmp_path / "all.json").read_text())["written"] == 5
    with BetonReader(tmp_path / "all.beton") as reader:
        assert reader.classes == ["cat", "cow", "dog", "owl"]
        assert [reader.classes[label] for label in reader.labels] == ["cat", "dog", "cow", "owl", "cat"]


def test_no_source_is_written_over(tmp_path):
    grow(tmp_path, {"a.png": picture("red"), "s-1.csv": b"a.png\n", "s-2.csv": b"a.png\n"})
    with pytest.raises(ConvertError, match="SRC and DST are one file"):
        convert(tmp_path / "s-*.csv", tmp_path / "s-2.csv")
    assert (tmp_path / "s-2.csv").read_bytes() == b"a.png\n"


def test_a_list_with_other_labels_is_another_source(tmp_path):
    """A conversion is not continued with them."""
    grow(tmp_path, {"a.png": picture("red"), "b.png": picture("blue"), "x.csv": b"a.png,cat\nb.png,dog\n"})
    with list_source(tmp_path / "x.csv") as listing:
        before = listing.fingerprint
    (tmp_path / "x.csv").write_bytes(b"a.png,dog\nb.png,cat\n")
    with list_source(tmp_path / "x.csv") as listing:
        assert listing.fingerprint != before
    convert(tmp_path / "x.csv", tmp_path / "x.beton", ConvertOptions())
    with BetonReader(tmp_path / "x.beton") as reader:
        assert reader.labels.tolist() == [1, 0] and reader.classes == ["cat", "dog"]


def test_lists_of_other_systems(tmp_path):
    """Backslashes of Windows; accents in one piece, where the disk has them in two; names that have both stay."""
    grow(tmp_path, {"x/cafe\u0301.jpg": b"1", "x/a.jpg": b"2", "x\\b.jpg": b"3"})
    (tmp_path / "l.csv").write_text(".\\x\\café.jpg,cat\nx\\a.jpg,dog\nx\\b.jpg,owl\n")
    with list_source(tmp_path / "l.csv") as listing:
        assert [data for _, _, data in content(listing)] == [b"1", b"2", b"3"] and listing.rejected == []


@pytest.mark.parametrize("text", ['a.jpg,cat\n"b.jpg,dog\nc.jpg,cat\n', 'path,label\na.jpg,"big\nb.jpg,dog\n'])
def test_a_quote_that_is_not_closed_swallows_no_photos(tmp_path, text):
    grow(tmp_path, {f"{name}.jpg": b"x" for name in "abc"} | {"l.csv": text.encode()})
    with pytest.raises(SourceError, match=r"l\.csv: line 3: not a table .*are all quotes closed\?"):
        list_source(tmp_path / "l.csv")
