"""JPEG in and out: equal to Pillow where the picture is good, an error where it is not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from untidy import markers_behind_the_header, segment, untidy

from fastssl.errors import JpegError
from fastssl.pipelines.ops import jpeg, jpeg_header


def picture(height=45, width=61, seed=0):
    """A smooth colour picture: JPEG keeps it nearly as it is."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def saved(array, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    ("options", "colorspace", "subsampling"),
    [
        ({}, "YCbCr", "420"),
        ({"subsampling": 0}, "YCbCr", "444"),
        ({"progressive": True}, "YCbCr", "420"),
        ({"mode": "L"}, "Gray", "Gray"),
        ({"keep_rgb": True}, "RGB", "444"),
    ],
)
def test_decode_equals_pillow(options, colorspace, subsampling):
    data = saved(picture(), **options)
    assert jpeg.read_header(data) == (45, 61, colorspace, subsampling)
    pixels = jpeg.decode(data)
    assert pixels.shape == (45, 61, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - opened(data)).max() <= 1
    for kind in (memoryview(data), np.frombuffer(data, np.uint8), bytearray(data)):
        np.testing.assert_array_equal(jpeg.decode(kind), pixels)


def test_grey_has_three_equal_channels():
    pixels = jpeg.decode(saved(picture(), mode="L"))
    assert (pixels == pixels[:, :, :1]).all()


def test_decode_into_writes_the_buffer_and_nothing_else():
    data = saved(picture())
    around = np.full((45 * 61 * 3 + 200,), 7, np.uint8)
    out = around[100:-100].reshape(45, 61, 3)
    jpeg.decode_into(data, out)
    np.testing.assert_array_equal(out, jpeg.decode(data))
    assert (around[:100] == 7).all() and (around[-100:] == 7).all()


@pytest.mark.parametrize(
    "out",
    [
        np.empty((61, 45, 3), np.uint8),
        np.empty((45, 60, 3), np.uint8),
        np.empty((46, 61, 3), np.uint8),
        np.empty((45, 61), np.uint8),
        np.empty((45, 61, 3), np.int8),
        np.empty((45, 61, 6), np.uint8)[:, :, ::2],
    ],
    ids=["swapped", "narrow", "high", "flat", "signed", "strided"],
)
def test_decode_into_refuses_a_buffer_that_does_not_fit(out):
    with pytest.raises(JpegError, match="45x61"):
        jpeg.decode_into(saved(picture()), out)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000), saved(picture())[:100]]
)
def test_what_is_no_jpeg_is_refused(data):
    for call in (jpeg.read_header, jpeg.decode, lambda d: jpeg.decode_into(d, np.empty((45, 61, 3), np.uint8))):
        with pytest.raises(JpegError):
            call(data)


def test_cmyk_is_refused():
    data = saved(picture(), mode="CMYK")
    with pytest.raises(JpegError, match="CMYK"):
        jpeg.decode(data)
    with pytest.raises(JpegError, match="CMYK"):
        jpeg.decode_into(data, np.empty((45, 61, 3), np.uint8))


@pytest.mark.parametrize("progressive", [False, True])
def test_every_cut_is_noticed(progressive):
    """Strict means strict: no prefix of a JPEG decodes, not even the one that only lacks the end marker."""
    data = saved(picture(), progressive=progressive)
    for length in [*range(0, len(data), 17), len(data) - 2, len(data) - 1]:
        with pytest.raises(JpegError):
            jpeg.decode(data[:length])


def test_random_damage_gives_an_error_or_a_picture_of_the_right_size():
    rng = np.random.default_rng(1)
    good = np.frombuffer(saved(picture()), np.uint8)
    out = np.empty((45, 61, 3), np.uint8)
    refused = 0
    for _ in range(300):
        bad = good.copy()
        bad[rng.integers(0, len(bad), 3)] = rng.integers(0, 256, 3)
        try:
            jpeg.decode_into(bad, out)
        except JpegError:
            refused += 1
    assert 30 < refused < 300


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
def test_an_eighth_of_the_size_finds_every_damage(options):
    """A photo that is copied is checked at an eighth of its size: no other verdict than at the whole."""
    rng = np.random.default_rng(7)
    whole, refused = saved(picture(64, 80), **options), 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(2, len(data))] ^= 1 << rng.integers(8)
        verdicts = []
        for at_least in (None, (1, 1)):
            try:
                jpeg.decode(bytes(data), at_least=at_least, repair=False)
                verdicts.append("sound")
            except JpegError:
                verdicts.append("damaged")
        assert verdicts[0] == verdicts[1]
        refused += verdicts[0] == "damaged"
    assert 20 < refused < 130


def test_a_bomb_is_refused_by_its_header():
    data = bytearray(saved(picture()))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xdc\xff\xdc"  # 65500 x 65500: 12.9 GB of pixels
    with pytest.raises(JpegError, match="limit"):
        jpeg.decode(bytes(data))


def test_at_least_scales_in_the_decoder_but_not_below():
    data = saved(picture(400, 600), quality=95)
    for at_least, scale in [
        ((100, 150), 2),
        ((90, 120), 2),
        ((101, 100), 3),
        ((160, 9), 4),
        ((10, 300), 4),
        ((201, 9), 8),
    ]:
        pixels = jpeg.decode(data, at_least=at_least)
        shape = (400 * scale // 8, 600 * scale // 8, 3)
        assert pixels.shape == shape
        expected = Image.fromarray(jpeg.decode(data)).resize((shape[1], shape[0]), Image.Resampling.BOX)
        assert np.abs(pixels.astype(int) - np.asarray(expected)).mean() < 1.5


def test_encode_keeps_the_picture_and_is_repeatable():
    array = picture()
    data = jpeg.encode(array, 90)
    assert data == jpeg.encode(array.copy(), 90) == jpeg.encode(np.asfortranarray(array), 90)
    assert np.abs(jpeg.decode(data).astype(int) - array).mean() < 3
    assert jpeg.read_header(data).subsampling == "420"
    assert jpeg.read_header(jpeg.encode(array, 94)).subsampling == "420"
    assert jpeg.read_header(jpeg.encode(array, 95)).subsampling == "444"
    assert len(jpeg.encode(array, 30)) < len(data) < len(jpeg.encode(array, 100))
    np.testing.assert_array_equal(jpeg.decode(jpeg.encode(np.full((1, 1, 3), 128, np.uint8), 90)), 128)


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)]
)
def test_encode_refuses_other_arrays(bad):
    with pytest.raises(JpegError, match="expected"):
        jpeg.encode(bad, 90)


@pytest.mark.parametrize("quality", [0, 101, -1])
def test_encode_refuses_other_qualities(quality):
    with pytest.raises(JpegError, match="1 to 100"):
        jpeg.encode(picture(), quality)


def tiff(order, value, kind=3):
    """A TIFF block whose directory holds one other tag and the orientation."""
    put = lambda number, size: number.to_bytes(size, order)  # noqa: E731
    entry = put(0x0112, 2) + put(kind, 2) + put(1, 4) + (put(value, 4) if kind == 4 else put(value, 2) + bytes(2))
    other = put(0x010F, 2) + put(2, 2) + put(4, 4) + b"abc\0"
    return {"little": b"II", "big": b"MM"}[order] + put(42, 2) + put(8, 4) + put(2, 2) + other + entry + put(0, 4)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("kind", [3, 4])
def test_exif_orientation_equals_pillow(order, kind):
    for value in range(1, 9):
        data = saved(picture(), exif=b"Exif\0\0" + tiff(order, value, kind))
        assert jpeg_header.orientation_and_profile(data)[0] == Image.open(io.BytesIO(data)).getexif()[0x0112] == value
    assert jpeg_header.orientation_and_profile(saved(picture()))[0] == 1
    assert jpeg_header.orientation_and_profile(saved(picture(), exif=b"Exif\0\0" + tiff(order, 9, kind)))[0] == 1


def test_damaged_exif_is_harmless():
    rng = np.random.default_rng(2)
    good = np.frombuffer(saved(picture(), exif=b"Exif\0\0" + tiff("big", 6)), np.uint8)
    for _ in range(500):
        bad = good.copy()
        bad[rng.integers(0, 100, 4)] = rng.integers(0, 256, 4)
        assert 1 <= jpeg_header.orientation_and_profile(bad.tobytes())[0] <= 8
        assert 1 <= jpeg_header.orientation_and_profile(bad[: rng.integers(0, 120)].tobytes())[0] <= 8


# ---------------------------------------------------------------- what only warns


KINDS = [{}, {"mode": "L"}, {"subsampling": 0}, {"progressive": True}, {"restart_marker_blocks": 2}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_what_only_warns_is_repaired(options):
    """Headers that decoders never look at, and bytes that they pass over: Pillow's pixels, and those of the JPEG as it
    was.
    """
    expected = jpeg.decode(saved(picture(), **options))
    out = np.empty_like(expected)
    for name, data in untidy(saved(picture(), **options)).items():
        with pytest.raises(JpegError):
            jpeg.decode(data, repair=False)
        assert jpeg.decode_into(np.frombuffer(data, np.uint8), out), name
        np.testing.assert_array_equal(out, expected, err_msg=name)
        np.testing.assert_array_equal(out, opened(data), err_msg=name)
        np.testing.assert_array_equal(jpeg.decode(jpeg.repaired(data), repair=False), expected, err_msg=name)


def test_what_needs_no_repair_is_not_said_to_be_repaired():
    data = saved(picture())
    assert jpeg.decode_into(data, np.empty((45, 61, 3), np.uint8)) is False
    assert jpeg.decode_into(data + bytes(1000), np.empty((45, 61, 3), np.uint8)) is False  # behind the end


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_what_lacks_data_is_not_repaired(options):
    """Also where the headers are untidy, too, and where the decoder's words are those that it has for stray bytes."""
    data = saved(picture(), **options)
    scan = data.index(b"\xff\xda") + 14
    middle = scan + (len(data) - scan) // 2
    restarts = data[: scan - 14] + segment(0xDD, b"\0\1") + data[scan - 14 :]  # announced, but there are none
    lacking = [data[:-2], data[:-40], data[:middle], data[:middle] + b"\xff\xd9" + data[middle + 2 :]]
    for bad in lacking if "restart_marker_blocks" in options else [*lacking, restarts]:
        for lead in (b"", b"\xff\xfe\0\x04abcdefgh"):
            assert jpeg.repaired(bad[:20] + lead + bad[20:]) is None
            with pytest.raises(JpegError):
                jpeg.decode(bad[:20] + lead + bad[20:])
    assert (
        jpeg.repaired(b"\0" + data[1:]) is None
        and jpeg.repaired(b"") is None
        and jpeg.repaired(b"\xff\xd8\xff\xda") is None
    )


def test_repairing_is_bounded(monkeypatch):
    """No more passes over a picture than its scans may be."""
    passes = []
    complaint = jpeg._complaint
    monkeypatch.setattr(jpeg, "_complaint", lambda data: passes.append(1) or complaint(data))
    data = saved(picture(), progressive=True)
    for at in reversed(markers_behind_the_header(data)):
        data = data[:at] + bytes(20) + data[at:]
    assert jpeg.repaired(data) is not None and len(passes) > 30
    passes.clear()
    monkeypatch.setattr(jpeg, "MAX_SCANNED_PIXELS", 45 * 61 * 10 * 20)
    assert jpeg.repaired(data) is None and len(passes) < 25


def test_scans_are_counted_in_the_picture_alone(monkeypatch):
    """Behind a phone's picture may stand a film; and what looks like an end may stand in a comment."""
    data = saved(picture(), progressive=True)
    count = data.count(b"\xff\xda")
    assert jpeg_header.count_scans(data) == count > 5
    film = data + b"\xff\xda" * 1000
    assert (jpeg.decode(film) == jpeg.decode(data)).all() and jpeg_header.count_scans(film) == count
    first = markers_behind_the_header(data)[0]
    hidden = data[:first] + b"\xff\xff\xfe\0\x06\xff\xd9\xff\xda" + data[first:]
    assert jpeg_header.count_scans(hidden) == count and (jpeg.decode(hidden) == jpeg.decode(data)).all()
    monkeypatch.setattr(jpeg, "MAX_SCANS", count - 1)
    for one in (data, film, hidden):
        with pytest.raises(JpegError, match=f"comes in {count} scans"):
            jpeg.decode(one)


def test_a_colour_profile_of_several_segments():
    profile = bytes(range(256)) * 500  # 128,000 bytes: two segments
    data = saved(picture(), icc_profile=profile)
    assert jpeg_header.orientation_and_profile(data)[1] == Image.open(io.BytesIO(data)).info["icc_profile"] == profile
    assert jpeg_header.orientation_and_profile(saved(picture()))[1] == b""
