"""Damaged and hostile ``.beton`` files: the right pixels or a clear error, never a crash, a hang or a wrong picture."""

from __future__ import annotations

import struct
import warnings

import numpy as np
import pytest

from fastssl.errors import BetonError, FastSSLError, JpegError
from fastssl.pipelines.beton import format as beton_format
from fastssl.pipelines.beton.format import MODE_JPEG, MODE_RAW
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.ops import jpeg

METADATA_AT = 24 + 2 * 1041


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """(bytes of a small file with JPEG and raw samples, their pixels)."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("good") / "a.beton"
    images = [
        np.kron(rng.integers(0, 256, (2 + k % 3, 3, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)) for k in range(8)
    ]
    with BetonWriter(path, 8, page_size=2 << 20) as writer:
        for k, image in enumerate(images):
            stored = image.tobytes() if k % 2 else jpeg.encode(image, 95)
            writer.add(stored, *image.shape[:2], k, MODE_RAW if k % 2 else MODE_JPEG)
    with BetonReader(path) as reader:
        return path.read_bytes(), [reader.decode(i) for i in range(8)]


def read_all(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a flipped type id makes a field one that is skipped
        with BetonReader(path) as reader:
            return [reader.decode(i) for i in range(len(reader))]


def patched(data, at, layout, *values):
    data = bytearray(data)
    struct.pack_into(layout, data, at, *values)
    return bytes(data)


def table_at(data):
    return struct.unpack_from("<Q", data, 16)[0]


HUGE = [1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]

#: name -> (good bytes -> bad bytes, what the message says)
DAMAGE = {
    "empty": (lambda d: b"", "0 bytes"),
    "one byte": (lambda d: d[:1], "1 bytes"),
    "short header": (lambda d: d[:23], "23 bytes"),
    "header only": (lambda d: d[:24], "descriptors do not fit"),
    "zeros": (lambda d: bytes(len(d)), "unfinished"),
    "a text": (lambda d: b"this is no beton file, only some text", "not a .beton file"),
    "a jpeg": (lambda d: d[2 << 20 :][:600], "not a .beton file"),
    "version 1": (lambda d: patched(d, 0, "<H", 1), "version"),
    "version 3": (lambda d: patched(d, 0, "<H", 3), "version"),
    "no fields": (lambda d: patched(d, 2, "<H", 0), "0 field descriptors"),
    "page size 0": (lambda d: patched(d, 4, "<I", 0), "page size 0"),
    "page size 3": (lambda d: patched(d, 4, "<I", 3 << 20), "page size"),
    "no samples": (lambda d: patched(d, 8, "<Q", 0), "no samples"),
    "fewer samples": (lambda d: patched(d, 8, "<Q", 5), "more samples than the 5"),
    "more samples": (lambda d: patched(d, 8, "<Q", 9), "sample 8: height or width is zero"),
    "table in the header": (lambda d: patched(d, 16, "<Q", 24), "allocation table should start"),
    "table behind the end": (lambda d: patched(d, 16, "<Q", len(d) + 24), "allocation table should start"),
    "table empty": (lambda d: patched(d, 16, "<Q", len(d)), "allocation table has 0 bytes"),
    "table shifted": (lambda d: patched(d, 16, "<Q", table_at(d) + 8), "not a multiple of 24"),
    "table shortened": (lambda d: patched(d, 16, "<Q", table_at(d) + 24), "sample 0: no entry"),
    "table cut": (lambda d: d[:-1], "not a multiple of 24"),
    "table cut by an entry": (lambda d: d[:-24], "sample 7: no entry"),
    "cut before the table": (lambda d: d[: table_at(d) - 1], "allocation table should start"),
    "cut in the padding": (lambda d: d[:100_000], "allocation table should start"),
    "cut in the metadata": (lambda d: d[: METADATA_AT + 30], "of metadata"),
    "type unknown": (lambda d: patched(d, 24, "<B", 77), "unknown or custom type 77"),
    "type custom": (lambda d: patched(d, 24 + 1041, "<B", 255), "'label' has the unknown or custom type 255"),
    "mode 2": (lambda d: patched(d, METADATA_AT + 24, "<B", 2), "sample 1: its storage mode"),
    "jpeg called raw": (lambda d: patched(d, METADATA_AT, "<B", 1), "sample 0: raw pixels"),
    "width 0": (lambda d: patched(d, METADATA_AT + 2 * 24 + 1, "<H", 0), "sample 2: height or width"),
    "height 0": (lambda d: patched(d, METADATA_AT + 2 * 24 + 3, "<H", 0), "sample 2: height or width"),
    "too many pixels": (
        lambda d: patched(d, METADATA_AT + 1, "<HH", 65535, 65535),
        "sample 0: more than 178,956,970 pixels",
    ),
    "raw too wide": (lambda d: patched(d, METADATA_AT + 24 + 1, "<H", 25), "sample 1: raw pixels"),
    "pointer into the header": (lambda d: patched(d, METADATA_AT + 5, "<Q", 0), "sample 0: no entry"),
    "pointer off by one": (lambda d: patched(d, METADATA_AT + 5, "<Q", (2 << 20) + 1), "sample 0: no entry"),
    "another's picture": (
        lambda d: d[: METADATA_AT + 5] + d[METADATA_AT + 48 + 5 :][:8] + d[METADATA_AT + 13 :],
        "sample 0: .*another sample",
    ),
    "size 0": (lambda d: patched(d, table_at(d) + 16, "<Q", 0), "sample 0: "),
    **{f"{n:#x} samples": (lambda d, n=n: patched(d, 8, "<Q", n), "bytes of metadata") for n in HUGE},
    **{f"table at {n:#x}": (lambda d, n=n: patched(d, 16, "<Q", n), "allocation table should start") for n in HUGE},
    **{
        f"sample of {n:#x} bytes": (lambda d, n=n: patched(d, table_at(d) + 24 + 16, "<Q", n), "sample 1: .*outside")
        for n in HUGE
    },
    **{
        f"both pointers {n:#x}": (
            lambda d, n=n: patched(patched(d, METADATA_AT + 5, "<Q", n), table_at(d) + 8, "<Q", n),
            "sample 0: .*outside",
        )
        for n in [0, 24, METADATA_AT, *HUGE]
    },
    "65535 fields": (lambda d: patched(d, 2, "<H", 65535), "65535 field descriptors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_known_damage_is_named(good, tmp_path, name):
    change, message = DAMAGE[name]
    path = tmp_path / "bad.beton"
    path.write_bytes(change(good[0]))
    with pytest.raises(BetonError, match=message) as caught:
        BetonReader(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.beton", tmp_path):
        with pytest.raises(BetonError, match=str(path)):
            BetonReader(path)


def test_every_length_of_file(good, tmp_path):
    """No prefix of a good file is taken for a whole one."""
    data, _ = good
    path = tmp_path / "cut.beton"
    rng = np.random.default_rng(1)
    for length in {*rng.integers(0, len(data), 60).tolist(), *range(len(data) - 60, len(data))}:
        path.write_bytes(data[:length])
        with pytest.raises(BetonError):
            BetonReader(path)


@pytest.mark.parametrize("kind", ["bit", "byte", "word"])
def test_random_damage_to_the_tables(good, tmp_path, kind):
    """A few hundred random changes of header, descriptors, metadata and table: each ends in an error or the right
    pixels.
    """
    data, pixels = good
    rng = np.random.default_rng({"bit": 2, "byte": 3, "word": 4}[kind])
    path = tmp_path / "bad.beton"
    numbers = [*range(24), 24, 24 + 1041, *range(METADATA_AT, METADATA_AT + 8 * 24), *range(table_at(data), len(data))]
    refused = harmless = 0
    for round_ in range(250):
        bad = np.frombuffer(data, np.uint8).copy()
        # Nine in ten where numbers stand; names, arguments and padding are most of the file and mean nothing.
        at = int(rng.choice(numbers)) if round_ % 10 else int(rng.integers(0, METADATA_AT))
        if kind == "bit":
            bad[at] ^= 1 << rng.integers(8)
        elif kind == "byte":
            bad[at] = rng.integers(256)
        else:
            bad[at : at + 8] = rng.integers(0, 256, len(bad[at : at + 8]))
        path.write_bytes(bad.tobytes())
        try:
            found = read_all(path)
        except (BetonError, JpegError) as error:
            assert str(path) in str(error)
            refused += 1
            continue
        harmless += 1
        assert len(found) == len(pixels)
        for one, other in zip(found, pixels):
            np.testing.assert_array_equal(one, other)
    # Labels, names and padding may change without any effect on pixels; everything else may not.
    assert refused > 100 and harmless > 10


def test_random_damage_to_the_pictures(good, tmp_path):
    """Damaged JPEG data: an error that names the sample, or a picture of the promised size; other samples are
    untouched.
    """
    data, pixels = good
    rng = np.random.default_rng(5)
    path = tmp_path / "bad.beton"
    refused = 0
    for _ in range(200):
        bad = np.frombuffer(data, np.uint8).copy()
        at = rng.integers(2 << 20, table_at(data), 2)
        bad[at] = rng.integers(0, 256, 2)
        path.write_bytes(bad.tobytes())
        with BetonReader(path) as reader:
            for i, expected in enumerate(pixels):
                touched = ((reader.offsets[i] <= at) & (at < reader.offsets[i] + reader.sizes[i])).any()
                try:
                    found = reader.decode(i)
                except JpegError as error:
                    assert touched and str(error).startswith(f"{path}: sample {i}: ")
                    refused += 1
                    continue
                assert found.shape == expected.shape
                assert touched or (found == expected).all()
    assert refused > 20


def test_random_bytes_are_no_file(tmp_path):
    rng = np.random.default_rng(6)
    path = tmp_path / "noise.beton"
    for size in rng.integers(1, 5000, 150):
        noise = rng.integers(0, 256, size, dtype=np.uint8)
        if size > 24 and size % 2:
            # With a header that gets past the first checks.
            noise[:24] = np.array([(2, 1, 2 << 20, 1 + size % 7, size - 24)], beton_format.HEADER_DTYPE).view(np.uint8)
            noise[24] = 2 if size > 1100 else noise[24]
        path.write_bytes(noise.tobytes())
        with pytest.raises(FastSSLError, match=r"noise.beton"):
            read_all(path)
