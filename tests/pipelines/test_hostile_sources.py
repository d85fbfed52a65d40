"""Folders, tars and pictures that are made to harm: nothing is written outside, nothing expands without end, nothing
reaches the terminal.
"""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from children import in_child
from conftest import jpeg_bytes, make_photo
from PIL import Image
from rich.console import Console

from fastssl.cli import main
from fastssl.cli.common import PlainConsole
from fastssl.errors import BetonError, FastSSLError, JpegError, printable, without_folders
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.encode import encode_photo
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.convert.sources import SourceError, list_source
from fastssl.pipelines.ops import jpeg

PHOTO = jpeg_bytes(make_photo(0, 24, 32))
KEEP = ConvertOptions(keep_size=True, short_side=None)
#: what a terminal would act on, and what rich would take for markup
TRICKS = [
    "\x1b[2J\x1b]0;owned\x07",
    "[red]",
    "new\nline",
    "\x9b31m",
    "\u202egpj",
    "carriage\rreturn",
    "{task.total}",
    "%s%n",
]


def snapshot(root: Path) -> dict[str, bytes | str]:
    """Everything below ``root``: contents of files, targets of links."""
    found: dict[str, bytes | str] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder) / name
            kind = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
            found[path.relative_to(root).as_posix()] = kind
    return found


def add(archive: tarfile.TarFile, name: str, data: bytes = PHOTO, **attributes: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data) if attributes.get("type", tarfile.REGTYPE) == tarfile.REGTYPE else 0
    for key, value in attributes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def hostile_tar(path: Path, outside: Path) -> None:
    """Members that lead out of the tar by every way there is, between two good ones."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "cat/first.jpg")
        add(archive, "../evil.jpg")
        add(archive, "cat/../../../evil.jpg")
        add(archive, f"{outside}/absolute.jpg")
        add(archive, f"//{outside}/two-slashes.jpg")
        add(archive, "cat/link.jpg", type=tarfile.SYMTYPE, linkname=f"{outside}/secret.jpg")
        add(archive, "way", type=tarfile.SYMTYPE, linkname=str(outside))
        add(archive, "way/through-the-link.jpg")
        add(archive, "cat/hard.jpg", type=tarfile.LNKTYPE, linkname="../../outside/secret.jpg")
        add(archive, "cat/device.jpg", type=tarfile.BLKTYPE, devmajor=8, devminor=0)
        add(archive, "cat/zero.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add(archive, "cat/pipe.jpg", type=tarfile.FIFOTYPE)
        add(archive, "cat/sparse.jpg", type=tarfile.GNUTYPE_SPARSE)
        add(archive, "dog/odd.jpg", pax_headers={"path": "dog/nul\0byte.jpg"})
        add(archive, "dog/setuid.jpg", mode=0o6777, uid=0, gid=0)
        for number, trick in enumerate(TRICKS):
            add(archive, f"dog/{number}{trick}.jpg", PHOTO if number % 2 else b"no picture")
        add(archive, "dog/last.jpg")


def run(*arguments: object) -> int:
    try:
        main([str(one) for one in arguments])
    except SystemExit as left:
        return int(left.code or 0)
    raise AssertionError("main does not return")


def test_a_tar_writes_nothing_outside(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The whole command: beside DST and its two files nothing is there afterwards that was not before, and nothing has
    changed.
    """
    outside, work = tmp_path / "outside", tmp_path / "a" / "b" / "work"
    outside.mkdir()
    work.mkdir(parents=True)
    (outside / "secret.jpg").write_bytes(PHOTO)
    hostile_tar(tmp_path / "hostile.tar", outside)
    before = snapshot(tmp_path)
    assert run("convert-imagenet", tmp_path / "hostile.tar", work / "out.beton") == 0
    after = snapshot(tmp_path)
    added = after.keys() - before.keys()
    assert {name.rsplit("/", 1)[1] for name in added} == {"out.beton", "out.beton.json", "out.beton.rejects.jsonl"}
    assert {name: after[name] for name in before} == before
    rejected = {
        row["path"]: row["reason"]
        for row in map(json.loads, (work / "out.beton.rejects.jsonl").read_text().splitlines())
    }
    for name in (
        "../evil.jpg",
        "cat/../../../evil.jpg",
        "cat/link.jpg",
        "cat/hard.jpg",
        "cat/device.jpg",
        "cat/zero.jpg",
        "cat/pipe.jpg",
        "cat/sparse.jpg",
    ):
        assert name in rejected, name
    with BetonReader(work / "out.beton") as reader:  # names are names: an absolute one is a place inside the tar
        good = sum(number % 2 for number in range(len(TRICKS)))
        assert len(reader) == 6 + good + 1 and all(reader.decode(i).shape == (24, 32, 3) for i in range(len(reader)))
    require_plain(capsys.readouterr().err + (work / "out.beton.rejects.jsonl").read_text())


def require_plain(text: str) -> None:
    """No character that a terminal acts on but line ends, and no lines that names made."""
    assert text and all(char == "\n" or (char.isprintable() and ord(char) != 0x9B) for char in text), text
    assert not any(line.startswith("line") or line.startswith("return") for line in text.splitlines())


@pytest.mark.parametrize("trick", TRICKS)
def test_names_do_not_reach_the_terminal(trick: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In messages of every command that takes a folder or a file of a name: as printable characters on one line, markup
    as it is written.
    """
    source, folder = tmp_path / f"photos{trick}", tmp_path / f"photos{trick}" / f"class{trick}"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(PHOTO)
    (folder / f"bad{trick}.jpg").write_bytes(b"no picture")
    target = tmp_path / f"out{trick}.beton"
    assert run("convert-imagenet", source, target, "--on-bad", "fail") == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and printable(f"bad{trick}.jpg") in said
    assert run("convert-imagenet", source, target) == 0
    assert run("verify", target, "--decode", "all") == 0
    content = bytearray(target.read_bytes())
    content[(2 << 20) + 200 : (2 << 20) + 300] = bytes(100)
    target.write_bytes(content)
    assert run("verify", target) == 1
    target.write_bytes(bytes(content[:500]))
    assert run("verify", target) == 1
    assert run("pretrain", "--arch", "lcnet_035", "--data", target, "--out", tmp_path / "run") == 1
    assert run("evaluate", "knn", target, "--data", source) == 1
    if "\n" not in trick and "\r" not in trick:
        said += capsys.readouterr().err
        require_plain(said)
        assert printable(trick) in said


def test_printable() -> None:
    assert printable("plain ü 漢 [red] {x}") == "plain ü 漢 [red] {x}"
    assert printable("\x1b[31m\n\u202e\udcff\x00\u2028") == r"\x1b[31m\n\u202e\udcff\x00\u2028"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("g++ /tmp/torchinductor_me/2r/c2.cpp -I/home/me/x/include: no", "g++ c2.cpp -Iinclude: no"),
        ("[Errno 13] denied: '/home/me/run/last.pt', \"/a/b\"", "[Errno 13] denied: 'last.pt', \"b\""),
        ('File "/usr/lib/python3/site.py", line 3', 'File "site.py", line 3'),
        ("PATH=/usr/bin:/home/me/bin", "PATH=bin:bin"),
        ("see https://pytorch.org/docs/stable/x, 3 pair/s, runs/mine/last.pt, 1/2", None),
    ],
)
def test_folders_are_left_out_of_words_that_are_passed_on(text: str, left: str | None) -> None:
    assert without_folders(text) == (text if left is None else left)


def test_markup_is_text_to_the_console(capsys: pytest.CaptureFixture) -> None:
    """Rich raises at an end without a beginning, which "a[/b]" is, a folder and a file."""
    from fastssl.cli.progress import RunProgress

    for show in (PlainConsole(stderr=True).print, RunProgress(Console(stderr=True)).message):
        show("report: a[/b]/[red]c\x1b[2J.html")
        assert capsys.readouterr().err == "report: a[/b]/[red]c\\x1b[2J.html\n"


def test_field_names_of_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    from fuzz.files import BYTES, IMAGE, Beton, Sample

    content = (
        Beton("x", (Sample(PHOTO, 24, 32),), fields=(BYTES, IMAGE))
        .layout()
        .content.replace(b"\x05name", b"\x05\x1b[2J")
        .replace(b"\x03name", b"\x03\x1b[2J")
    )
    (tmp_path / "a.beton").write_bytes(content)
    with pytest.warns(UserWarning, match=r"fields not read: \\x1b\[2J \(bytes\)"), BetonReader(tmp_path / "a.beton"):
        pass


# ---------------------------------------------------------------- tars


def negative(archive: bytes) -> bytes:
    """The second member's size as -512, in the base-256 notation."""
    header = bytearray(archive[1024:1536])
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return archive[:1024] + bytes(header) + archive[1536:]


def test_a_member_of_negative_size_ends(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(3):
            add(archive, f"cat/{number}.jpg", b"x" * 512)
    (tmp_path / "bad.tar").write_bytes(negative(buffer.getvalue()))
    with pytest.raises(SourceError, match=r"bad.tar: .*damaged"):
        list_source(tmp_path / "bad.tar")


def test_a_member_that_claims_more_than_there_is(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "cat/a.jpg")
        member = tarfile.TarInfo("cat/b.jpg")
        member.size = 1 << 60
        archive.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))
    (tmp_path / "bad.tar").write_bytes(buffer.getvalue())
    with pytest.raises(SourceError, match=r"bad.tar: damaged tar: .*more bytes than a file can have"):
        list_source(tmp_path / "bad.tar")


def list_many(path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with list_source(path) as listing:
        assert len(listing) == 1 and listing.ignored == 10_000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50 << 10 and time.process_time() - started < 20, grown


def test_members_without_number(tmp_path: Path) -> None:
    """Nothing is remembered of what is no photo."""
    empty = tarfile.TarInfo("a.txt").tobuf()
    (tmp_path / "many.tar").write_bytes(empty * 10_000 + tarfile.TarInfo("cat/a.jpg").tobuf() + bytes(1024))
    ended = in_child(list_many, tmp_path / "many.tar")
    assert ended.status == 0, ended


def test_a_tar_that_holds_itself(tmp_path: Path) -> None:
    """Tars inside tars are read one level deep."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        add(archive, "b.tar", b"x" * 600)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "a.tar", inner.getvalue())
    with pytest.raises(SourceError, match="no photos found"):
        list_source(tmp_path / "a.tar")


def test_class_folders_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links out of the folder are read as the photos they are; pipes and devices are not opened; nothing stays
    behind.
    """
    from fastssl.evaluate.photos import open_photos

    source, temporary = tmp_path / "photos", tmp_path / "temporary"
    for name in ("cat", "dog"):
        (source / name).mkdir(parents=True)
        (source / name / "a.jpg").write_bytes(PHOTO)
    temporary.mkdir()
    os.mkfifo(source / "cat" / "pipe.jpg")
    (source / "cat" / "zero.jpg").symlink_to("/dev/zero")
    (source / "dog" / "loop").symlink_to(source)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    before = sorted(path for path in source.rglob("*"))
    with open_photos(source) as reader:
        assert len(reader) == 2 and reader.labels.tolist() == [0, 1]
    assert sorted(path for path in source.rglob("*")) == before and not list(temporary.iterdir())


# ---------------------------------------------------------------- pictures that expand


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *more: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes((1 + 3 * width) * height) if width * height < 1 << 20 else b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def sized_jpeg(width: int, height: int, mode: str = "RGB") -> bytes:
    """A small JPEG whose header says another size."""
    buffer = io.BytesIO()
    Image.new(mode, (16, 16)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def many_scans(side: int, scans: int) -> bytes:
    """A valid progressive JPEG, grey and even, that refines one coefficient after the other, bit by bit; a few bytes a
    scan.
    """
    segment = lambda marker, body: bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body  # noqa: E731

    def packed(bits: str) -> bytes:
        bits += "1" * (-len(bits) % 8)
        return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")

    blocks = (side // 8) ** 2
    # One symbol of one bit each: "no difference" for the first scan, "the next 2^14 + n blocks are zero" for the
    # others.
    tables = segment(0xC4, b"\x00\x01" + bytes(15) + b"\x00") + segment(0xC4, b"\x10\x01" + bytes(15) + b"\xe0")
    frame = segment(0xC2, b"\x08" + struct.pack(">HH", side, side) + b"\x01\x01\x11\x00")
    data = b"\xff\xd8" + segment(0xDB, b"\0" + b"\x01" * 64) + frame + tables
    data += segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + packed("0" * blocks)
    runs, left = "", blocks
    while left > 0:
        run = min(max(left, 16384), 32767)
        runs += "0" + format(run - 16384, "014b")
        left -= run
    steps = [(k, high) for high in range(13, -1, -1) for k in range(1, 64)]
    for k, low in steps[:scans]:
        data += segment(0xDA, bytes((1, 1, 0, k, k, (0 if low == 13 else low + 1) << 4 | low))) + packed(runs)
    return data + b"\xff\xd9"


def tiff(width: int, height: int, next_at: int = 0) -> bytes:
    rows = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, 100),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in rows)
    return (
        b"II*\0"
        + struct.pack("<I", 8)
        + struct.pack("<H", len(rows))
        + entries
        + struct.pack("<I", next_at)
        + bytes(100)
    )


def gif(width: int, height: int, frames: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (16, 16)).save(
        buffer, "GIF", save_all=True, append_images=[Image.new("P", (16, 16), k % 255) for k in range(frames)]
    )
    data = bytearray(buffer.getvalue())
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


PACKED = zlib.compress(bytes(200 << 20), 9)

#: name -> (file, whether it may be taken)
BOMBS: dict[str, tuple[Callable[[], bytes], bool]] = {
    "jpeg 50,000 x 50,000": (lambda: sized_jpeg(50_000, 50_000), False),
    "jpeg 65,535 x 65,535": (lambda: sized_jpeg(65_535, 65_535), False),
    "grey jpeg 50,000 x 50,000": (lambda: sized_jpeg(50_000, 50_000, "L"), False),
    "CMYK jpeg 50,000 x 50,000": (lambda: sized_jpeg(50_000, 50_000, "CMYK"), False),
    "jpeg of 800 scans": (lambda: many_scans(4096, 800), False),
    "png 50,000 x 50,000": (lambda: png(50_000, 50_000), False),
    "png 2^31 x 1": (lambda: png((1 << 31) - 1, 1), False),
    "png with a text of 200 MB": (lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + PACKED)), False),
    "png with an international text of 200 MB": (lambda: png(8, 8, chunk(b"iTXt", b"a\0\x01\0\0\0" + PACKED)), False),
    "png with a colour profile of 200 MB": (lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + PACKED)), True),
    "png with rows of 200 MB": (lambda: png(8, 8).replace(zlib.compress(bytes(25 * 8)), PACKED), False),
    "tiff 50,000 x 50,000": (lambda: tiff(50_000, 50_000), False),
    "tiff whose pages go round": (lambda: tiff(8, 8, 8), True),
    "gif 65,535 x 65,535": (lambda: gif(65_535, 65_535, 1), False),
    "gif of many frames": (lambda: gif(16, 16, 500), True),
    "bmp 50,000 x 50,000": (
        lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 50_000, 50_000, 1, 24, 0, 0, 0, 0, 0, 0),
        False,
    ),
    "ppm 50,000 x 50,000": (lambda: b"P6 50000 50000 255\n" + bytes(100), False),
    "ppm of ten thousand digits": (lambda: b"P6 " + b"9" * 10_000 + b" 1 255\n", False),
    "webp 16,383 x 16,383": (
        lambda: (
            b"RIFF"
            + struct.pack("<I", 30)
            + b"WEBPVP8L"
            + struct.pack("<I", 18)
            + b"\x2f"
            + struct.pack("<I", 16382 | 16382 << 14)
            + bytes(13)
        ),
        False,
    ),
}


def read_bombs() -> None:
    """Each through the converter, which is also how folders of an evaluation and a detector's photos are read."""
    for name, (make, may_be_taken) in BOMBS.items():
        data = make()
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            encode_photo(data, KEEP)
            taken = True
        except Exception as error:  # as the converter takes them
            taken, said = False, f"{type(error).__name__}: {error}"
            assert not isinstance(error, MemoryError), name
            print(f"{name}: {said[:150]}")
        assert may_be_taken or not taken, name
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        assert grown < 100 and time.process_time() - started < 3, (name, grown, time.process_time() - started)


def test_pictures_that_expand() -> None:
    """Refused by their headers, or read in the measure of their pixels: under 100 MiB and three seconds each."""
    ended = in_child(read_bombs, seconds=60)
    assert ended.status == 0, ended
    assert "50,000 x 50,000: JpegError: the header asks for 50000x50000 pixels, more than the limit" in ended.output


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_header_of_50000_by_50000_everywhere(mode: str, tmp_path: Path) -> None:
    bomb = sized_jpeg(50_000, 50_000, mode)
    for read in (
        jpeg.decode,
        lambda data: jpeg.decode_into(data, np.zeros((16, 16, 3), np.uint8)),
        lambda data: encode_photo(data, KEEP),
    ):
        # Where only Pillow reads it, it is Pillow's own limit.
        with pytest.raises(
            (JpegError, Image.DecompressionBombError),
            match=r"50000x50000 pixels, more than the limit|2500000000 pixels. exceeds",
        ):
            read(bomb)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "bomb.jpg").write_bytes(bomb)
    (tmp_path / "photos" / "cat" / "good.jpg").write_bytes(PHOTO)
    convert(tmp_path / "photos", tmp_path / "a.beton", KEEP)
    assert "bomb.jpg" in (tmp_path / "a.beton.rejects.jsonl").read_text()
    with BetonWriter(tmp_path / "b.beton", 1) as writer:
        writer.add(bomb, 16, 16)
    with BetonReader(tmp_path / "b.beton") as reader, pytest.raises(JpegError, match=r"sample 0: .*50000x50000"):
        reader.decode(0)
    with BetonWriter(tmp_path / "c.beton", 1) as writer:
        writer.add(bomb, 50_000, 50_000)
    with pytest.raises(BetonError, match="sample 0: more than"):
        BetonReader(tmp_path / "c.beton")
    from fastssl.evaluate.detection.batches import read_picture

    picture = SimpleNamespace(path=tmp_path / "photos" / "cat" / "bomb.jpg", height=50_000, width=50_000)
    with pytest.raises(FastSSLError, match=r"50000x50000 pixels, more than the limit|2500000000 pixels. exceeds"):
        read_picture(picture)


def test_scans_are_counted() -> None:
    """What 390 KB could do: 880 passes over 179 million pixels. Real encoders write some ten."""
    assert jpeg.decode(many_scans(64, 12)).shape == (64, 64, 3)
    assert jpeg.decode(many_scans(64, jpeg.MAX_SCANS - 1)).shape == (64, 64, 3)
    for read in (jpeg.decode, lambda data: encode_photo(data, KEEP)):
        with pytest.raises(JpegError, match=r"comes in 101 scans, more than the limit of 100 "):
            read(many_scans(64, jpeg.MAX_SCANS))
    with pytest.raises(JpegError, match=r"4,000,000,000 pixels in all"):
        jpeg.require_few_scans(many_scans(64, 30), jpeg.MAX_PIXELS)
    buffer = io.BytesIO()
    Image.fromarray(make_photo(1, 64, 64)).convert("CMYK").save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    at = data.rindex(b"\xff\xda")
    encode_photo(data, KEEP)
    with pytest.raises(JpegError, match="scans, more than the limit"):  # the way through Pillow
        encode_photo(data[:at] + data[at:-2] * 200 + data[-2:], KEEP)
    baseline = jpeg_bytes(make_photo(2, 64, 64), comment=b"\xff\xda" * 500)
    assert jpeg.decode(baseline).shape == (64, 64, 3)  # sequential: what a comment says is nobody's business
    # Nothing that a decoder passes over hides the frame: stray marks, fill bytes, lengths that are too short.
    bomb = many_scans(64, 150)
    for lead in (
        b"\xff\x01",
        b"\xff\xd0\xff\xd7",
        b"\xff\xff\xff\xfe\x00\x02",
        b"\xff\xfe\x00\x00",
        b"\xff\xe5\x00\x04\xff\xc0",
    ):
        with pytest.raises(JpegError, match=r"scans, more than the limit|damaged|not a readable"):
            jpeg.decode(bomb[:2] + lead + bomb[2:])
