"""Which files are photos, what is said of the others, and every format through its real writer."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import jpeg_bytes, make_photo
from PIL import Image, ImageOps
from test_deep import GREY, png
from untidy import untidy

from fastssl.cli import main
from fastssl.errors import JpegError
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.verify import verify
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert import encode, formats
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.encode import How, encode_photo
from fastssl.pipelines.convert.formats import _ENDINGS, in_words, is_photo_name, kind_of, remedies, remedy
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.convert.sources import SourceError, list_source
from fastssl.pipelines.ops import jpeg

KEEP = ConvertOptions(store="raw", keep_size=True)
RGB = make_photo(0, 64, 96)
#: Whether Pillow writes the very same pixels.
EXACT = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}, "PPM": {}, "JPEG2000": {"irreversible": False}}
CLOSE = {"HEIF": {"quality": 95, "chroma": 444}, "AVIF": {"quality": 95, "subsampling": "4:4:4"}}


def written(image: Image.Image | np.ndarray, form: str, **options: object) -> bytes:
    if form not in formats.pillow_formats():
        pytest.skip(f"this Pillow does not read {form}")
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, form, **options)
    return buffer.getvalue()


def encoded(data: bytes, options: ConvertOptions = KEEP) -> tuple[np.ndarray, How]:
    found = encode_photo(data, options)
    return np.frombuffer(found.data, np.uint8).reshape(found.height, found.width, 3), How(found.how)


def assert_alike(found: np.ndarray, expected: np.ndarray, mean: float) -> None:
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() <= mean


@pytest.mark.parametrize("form", [*EXACT, *CLOSE])
def test_every_format(form: str) -> None:
    pixels, how = encoded(written(RGB, form, **(EXACT | CLOSE)[form]))
    assert how == 0
    assert_alike(pixels, RGB, 0 if form in EXACT else 4)


@pytest.mark.parametrize("form", CLOSE)
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_turned_photos_of_phones(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = written(RGB, form, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(encoded(data)[0], expected)


@pytest.mark.parametrize("form", [*CLOSE, "WEBP"])
def test_transparency_of_every_format(form: str) -> None:
    half = np.dstack([RGB, np.full(RGB.shape[:2], 128, np.uint8)])
    assert_alike(encoded(written(half, form))[0], (RGB * 128.0 + 255 * 127) / 255, 4)


@pytest.mark.parametrize("form", [*CLOSE, "JPEG2000", "WEBP"])
def test_what_is_cut_off_is_refused(form: str) -> None:
    data = written(RGB, form)
    for length in range(len(data) // 4, len(data) - 8, len(data) // 7):
        with pytest.raises(Exception) as caught:  # plugins raise what they like
            encoded(data[:length])
        assert not isinstance(caught.value, MemoryError)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "HEIF"])
def test_of_several_pictures_the_first(form: str) -> None:
    """Animations and pages."""
    frames = [Image.fromarray(np.roll(RGB, 30 * k, 1)) for k in range(3)]
    options = EXACT.get(form, {}) | CLOSE.get(form, {})
    pixels, how = encoded(written(frames[0], form, save_all=True, append_images=frames[1:], **options))
    assert how == How.ANIMATED
    assert_alike(pixels, RGB, 0 if form in EXACT else 8)


def test_kinds_of_files() -> None:
    names = {
        "a/b.HEIC": ".heic",
        "x.tar.gz": ".gz",
        "README": "other",
        "scan.0001": "other",
        "a.verylongending": "other",
        "a.b c": "other",
        "a.\x1b[1": "other",
        ".x/a.jpg": "hidden",
        "a/._b.jpg": "hidden",
    }
    assert {name: kind_of(name) for name in names} == names
    assert in_words({".heic": 2311, ".txt": 7}) == "2,311 .heic, 7 .txt"
    assert (
        in_words({f".{k}": k for k in "gfedcba" for k in [ord(k) - 96]}) == "7 .7, 6 .6, 5 .5, 4 .4, 6 of other kinds"
    )


def test_every_kind_that_may_be_a_photo_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (".cr2", ".nef", ".dng", ".arw", ".svg", ".pdf", ".mp4", ".avi", ".jxl"):
        assert remedy(kind) is not None and not is_photo_name(f"a{kind}")
    assert remedy(".txt") is remedy("hidden") is remedy("other") is None
    endings = [ending for endings in _ENDINGS.values() for ending in endings]
    assert all(remedy(ending) is None for ending in endings if is_photo_name(f"a{ending}"))
    monkeypatch.setattr(formats, "pillow_formats", lambda: ("JPEG", "PNG"))
    formats._decodable.cache_clear()
    try:
        assert is_photo_name("a.jpg") and not is_photo_name("a.heic") and not is_photo_name("a.avif")
        assert remedies({".heic": 2311, ".txt": 1, ".avif": 1}) == [
            "1 .avif: pip install 'pillow>=11.3'",
            "2,311 .heic: pip install pillow-heif",
        ]
        assert all(remedy(kind) for kind in (".heif", ".hif", ".jp2", ".webp")) and remedy(".png") is None
    finally:
        formats._decodable.cache_clear()


def test_a_folder_without_photos_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.nef").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"no photos found \(1 other file; 1 \.nef: develop"):
        list_source(tmp_path)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    good = jpeg_bytes(RGB)
    for number, data in enumerate(list(untidy(good).values())[:3]):
        (folder / f"untidy{number}.jpg").write_bytes(data)
    (folder / "good.jpg").write_bytes(good)
    (folder / "deep.png").write_bytes(png(GREY))
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::-1])]
    (folder / "moving.webp").write_bytes(written(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    (folder / "broken-profile.png").write_bytes(written(RGB, "PNG", icc_profile=b"none"))
    (folder / "film.mp4").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    return folder


def test_the_summary(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*options: str) -> tuple[dict, str]:
        with pytest.raises(SystemExit) as stop:
            main(["convert-imagenet", str(mixed), str(tmp_path / "a.beton"), "--keep-size", "--json", "-", *options])
        printed = capsys.readouterr()
        assert stop.value.code == 0, printed.err
        return json.loads(printed.out), " ".join(printed.err.split())

    record, text = said()
    counts = {"written": 7, "copied": 1, "repaired": 3, "animated": 1, "profile_ignored": 1, "deep": {"0..4095": 1}}
    assert {key: record[key] for key in counts} == counts and record["passed_over"] == {".mp4": 1, ".txt": 1}
    for line in (
        "2 other files ignored (1 .mp4, 1 .txt)",
        "1 .mp4: extract frames",
        "3 photos of which decoders complain, of headers or stray bytes alone, so that no pixel is missing: repaired",
        "1 file with several pictures: the first one was taken",
        "1 photo of more than 8 bits: mapped to 8, 1 from 0..4095 (--range LOW,HIGH sets one for all)",
        "1 photo with a colour profile other than sRGB: ignored; --icc srgb converts",
    ):
        assert line in text
    record, text = said("--range", "-5,300.5", "--icc", "srgb")
    assert record["deep"] == {"the range that was given": 1} and record["profile_broken"] == 1
    assert "1 photo with a colour profile that is broken, or not of its kind of colours: ignored" in text
    side = json.loads((tmp_path / "a.beton.json").read_text())
    assert side["options"]["range"] == [-5, 300.5] and side["options"]["icc"] == "srgb" and side["repaired"] == 3
    for wrong in ("5", "1,2,3", "a,b"):
        with pytest.raises(SystemExit) as stop:
            main(["convert-imagenet", str(mixed), str(tmp_path / "a.beton"), "--range", wrong])
        assert stop.value.code == 2 and "two numbers" in capsys.readouterr().err


def test_a_resumed_conversion_says_the_same(mixed: Path, tmp_path: Path) -> None:
    whole = convert(mixed, tmp_path / "whole.beton")
    (mixed / "zz.jpg").write_bytes(b"bad")
    with pytest.raises(Exception, match=r"zz\.jpg"):
        convert(mixed, tmp_path / "b.beton", ConvertOptions(on_bad="fail"))
    again = convert(mixed, tmp_path / "b.beton")
    assert again.resumed == 7 and again.remarks() == whole.remarks() and len(again.remarks()) == 4
    assert (tmp_path / "whole.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()


def test_jpegs_that_only_warn_are_stored_as_jpegs_that_do_not(tmp_path: Path) -> None:
    good = jpeg_bytes(RGB)
    for name, data in untidy(good).items():
        found = encode_photo(data, ConvertOptions(keep_size=True))
        assert found.how == How.REPAIRED, name
        np.testing.assert_array_equal(jpeg.decode(found.data, repair=False), jpeg.decode(good), err_msg=name)
        assert encode_photo(data, ConvertOptions(max_side=32)).how == How.REPAIRED | How.SCALED
    with BetonWriter(tmp_path / "as-ffcv-writes-it.beton", len(untidy(good))) as writer:
        for data in untidy(good).values():
            writer.add(data, 64, 96)
    assert verify(tmp_path / "as-ffcv-writes-it.beton").ok
    with BetonReader(tmp_path / "as-ffcv-writes-it.beton") as reader:
        for sample in range(len(reader)):
            np.testing.assert_array_equal(reader.decode(sample), jpeg.decode(good))


def test_pillow_is_not_asked_for_what_lacks_data() -> None:
    """It would give a picture that is half grey."""
    good = jpeg_bytes(RGB)
    for lead in (b"", b"\xff\xfe\0\x04abcdefgh"):  # with it, the strict decoder does not get to the header's end
        bad = good[:20] + lead + good[20 : len(good) // 2] + b"\xff\xd9"
        with pytest.raises(JpegError):
            encoded(bad)


def test_a_repaired_jpeg_keeps_its_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    good = jpeg_bytes(RGB, exif=exif)
    scan = good.index(b"\xff\xda") + 11
    for bad in (good[:scan] + bytes(3) + good[scan + 3 :], good[:2] + good[2:].replace(b"\xff\xdb", b"xyz\xff\xdb", 1)):
        assert encode_photo(bad, KEEP).how == How.REPAIRED
        np.testing.assert_array_equal(encoded(bad)[0], encoded(good)[0])


def test_heic_under_another_name_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(RGB, "HEIF")
    for module in (formats, encode):
        monkeypatch.setattr(module, "pillow_formats", lambda: ("JPEG", "PNG"))
    with pytest.raises(JpegError, match="pip install pillow-heif"):
        encoded(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_of_jpeg_2000_that_asks_for_gigabytes() -> None:
    data = bytearray(written(RGB, "JPEG2000"))
    sizes, codestream = data.index(b"ihdr") + 4, data.index(b"\xff\x4f\xff\x51") + 8
    for at in (sizes, codestream, codestream + 16):
        data[at : at + 8] = struct.pack(">II", 13_000, 13_000)
    with pytest.raises(JpegError, match="bytes of JPEG 2000 for 13000x13000 pixels: save"):
        encoded(bytes(data))
