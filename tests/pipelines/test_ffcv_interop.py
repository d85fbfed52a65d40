"""The real ``ffcv`` package reads what we write, and we read what it writes."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import need_engine
from PIL import Image

from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.ops import jpeg

# ruff: noqa: E402  (what follows is there only where ffcv is installed)
need_engine("ffcv")
from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter

# numba prints an ignored KeyError from a finalizer when ffcv's compiled functions are collected.
pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

SIDE = 64


@pytest.fixture(autouse=True)
def torch_threads():
    """ffcv's Loader sets torch's thread count for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def picture(seed, height=SIDE, width=SIDE):
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def ffcv_read(path, os_cache, labels=True, order=OrderOption.SEQUENTIAL):
    """All (pixels, label) as the real Loader gives them; batches are copied, because it overwrites them."""
    # Decoders only: each further operation costs seconds of compilation.
    pipelines = {"image": [SimpleRGBImageDecoder()]} | ({"label": [IntDecoder()]} if labels else {})
    loader = Loader(
        str(path), batch_size=4, num_workers=1, order=order, os_cache=os_cache, pipelines=pipelines, drop_last=False
    )
    images, found = [], []
    for batch in loader:
        images.append(np.array(batch[0]))
        if labels:
            found.append(np.array(batch[1]).reshape(-1))
    return np.concatenate(images), np.concatenate(found) if labels else None


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """What the converter makes of 14 photos of one size: copied, progressive, grey, from PNG, turned; two are
    rejected.
    """
    root = tmp_path_factory.mktemp("converted")
    for k in range(14):
        image = Image.fromarray(picture(k))
        folder = root / "photos" / f"class{k % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        fmt, mode, options = [
            ("JPEG", "RGB", {}),
            ("JPEG", "RGB", {"progressive": True}),
            ("JPEG", "L", {}),
            ("PNG", "RGB", {}),
            ("JPEG", "RGB", {"exif": exif}),
        ][k % 5]
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, fmt, **options)
        (folder / f"{k:02}.jpg").write_bytes(buffer.getvalue() if k not in (4, 9) else b"bad")
    summary = convert(root / "photos", root / "out.beton", ConvertOptions(quality=95))
    assert (summary.written, summary.rejected) == (12, 2) and summary.copied > 5
    return root / "out.beton"


@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_reads_what_the_converter_writes(converted, os_cache):
    """Labels equal; pixels equal to those of the fast, less exact DCT that ffcv asks for, and near ours."""
    with BetonReader(converted) as reader:
        images, labels = ffcv_read(converted, os_cache)
        np.testing.assert_array_equal(labels, reader.labels)
        assert images.shape == (12, SIDE, SIDE, 3)
        for i in range(12):
            fast = simplejpeg.decode_jpeg(reader.encoded(i), colorspace="RGB", fastdct=True)
            assert np.abs(images[i].astype(int) - fast).max() <= 1
            assert np.abs(images[i].astype(int) - reader.decode(i)).mean() < 2


@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcv_reads_pages_that_grew_raw_pixels_and_no_labels(tmp_path, os_cache):
    """Pages of 2 MiB that became 4 MiB half-way, room reserved for samples that never came; raw pixels are equal to the
    bit.
    """
    path = tmp_path / "a.beton"
    images = [picture(k) for k in range(9)]
    with BetonWriter(path, 20, labels=False, page_size=2 << 20) as writer:
        for k, image in enumerate(images):
            if k % 4 == 1:
                writer.add(image.tobytes(), SIDE, SIDE, mode=MODE_RAW)
            else:
                # Decoders stop at the end marker: bytes behind it make a large sample of a small picture.
                writer.add(jpeg.encode(image, 95) + bytes([900_000, 1_500_000, 3_000_000][k // 3]), SIDE, SIDE)
    images_found, _ = ffcv_read(path, os_cache, labels=False)
    with BetonReader(path) as reader:
        assert reader.page_size == 4 << 20
        assert (reader.offsets[:6] // (2 << 20) == (reader.offsets[:6] + reader.sizes[:6] - 1) // (2 << 20)).all()
        for k, image in enumerate(images):
            if k % 4 == 1:
                np.testing.assert_array_equal(images_found[k], image)
            assert np.abs(images_found[k].astype(int) - reader.decode(k)).max() <= 12


class Photos:
    """An indexable data set as ffcv's writer wants it; at module level, because its workers import it."""

    def __init__(self, images, extra):
        self.images, self.extra = images, extra

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        more = (
            (float(i), np.arange(3, dtype=np.int64) + i, {"i": int(i)}, np.frombuffer(b"b" * int(i), np.uint8))
            if self.extra
            else ()
        )
        return (self.images[i], int(i) * 7 - 3, *more)


@pytest.mark.parametrize("mode", ["jpg", "raw", "smart", "proportion"])
@pytest.mark.parametrize("extra", [False, True])
def test_we_read_what_ffcv_writes(tmp_path, mode, extra):
    path = tmp_path / "theirs.beton"
    images = [picture(k, 30 + 17 * k % 40, 20 + 13 * k % 50) for k in range(25)]
    fields = {
        "image": RGBImageField(write_mode=mode, jpeg_quality=95, compress_probability=0.5, smart_threshold=3000),
        "label": IntField(),
    }
    if extra:
        fields |= {"f": FloatField(), "a": NDArrayField(np.dtype("int64"), (3,)), "j": JSONField(), "b": BytesField()}
    DatasetWriter(str(path), fields, page_size=2 << 20, num_workers=2).from_indexed_dataset(
        Photos(images, extra), chunksize=4
    )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        reader = BetonReader(path)
    assert [str(w.message) for w in caught] == (
        [f"{path}: fields not read: f (float), a (ndarray), j (json), b (bytes)"] if extra else []
    )
    with reader:
        assert len(reader) == 25 and reader.classes is None
        np.testing.assert_array_equal(reader.labels, np.arange(25) * 7 - 3)
        np.testing.assert_array_equal(reader.heights, [image.shape[0] for image in images])
        np.testing.assert_array_equal(reader.widths, [image.shape[1] for image in images])
        expected = {"jpg": {0}, "raw": {1}, "smart": {0, 1}, "proportion": {0, 1}}[mode]
        assert set(reader.modes.tolist()) == expected
        for i, image in enumerate(images):
            found = reader.decode(i)
            if reader.modes[i] == 1:
                np.testing.assert_array_equal(found, image)
            else:
                np.testing.assert_array_equal(found, jpeg.decode(reader.encoded(i)))
                assert np.abs(found.astype(int) - image).mean() < 6
