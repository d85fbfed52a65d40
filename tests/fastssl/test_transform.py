"""One photo from anywhere gives the view that the evaluation shows to the network."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jpeg_bytes, make_photo
from PIL import Image

import fastssl
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import Normalisation, ViewSpec
from fastssl.weights.transform import Transform

SPEC = ViewSpec.evaluation(32, 0.8, Normalisation((0.5, 0.4, 0.3), (0.2, 0.2, 0.3)))


def png(rgb: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return buffer.getvalue()


def test_it_is_the_evaluations_view_to_the_last_bit(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    files = [tmp_path / "photos" / f"{n}.jpg" for n in range(4)]
    for number, (path, size) in enumerate(zip(files, [(48, 64), (31, 29), (90, 50), (200, 300)])):
        path.write_bytes(jpeg_bytes(make_photo(number, *size)))
    convert(tmp_path / "photos", tmp_path / "photos.beton", ConvertOptions(keep_size=True, short_side=None))
    with ViewLoader(tmp_path / "photos.beton", [SPEC], 4, shuffle=False) as loader:
        (views,) = next(loader.epoch(0)).views
        transform = pickle.loads(pickle.dumps(Transform(SPEC)))
        for path, view in zip(files, views):
            for photo in (path, str(path), path.read_bytes()):
                assert torch.equal(transform(photo), view)
            assert (transform(Image.open(path)) - view).abs().max() <= 1.01 / 255 / 0.2  # Pillow's decoder
    assert torch.stack([transform(path) for path in files]).shape == (4, 3, 32, 32)


def test_pixels_are_taken_as_they_are() -> None:
    rgb, transform = make_photo(1, 40, 50), Transform(SPEC)
    wanted = transform(png(rgb))
    for photo in (rgb, np.asfortranarray(rgb), rgb[:, ::-1][:, ::-1], Image.fromarray(rgb)):
        assert torch.equal(transform(photo), wanted)
    grey = rgb[..., 0]
    for photo in (grey, grey[..., None], Image.fromarray(grey), png(grey)):
        assert torch.equal(transform(photo), transform(np.stack([grey] * 3, -1)))
    turned = Image.fromarray(rgb)
    turned.getexif()[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=turned.getexif())
    for photo in (buffer.getvalue(), Image.open(buffer)):
        assert torch.equal(transform(photo), transform(np.rot90(rgb, -1)))
    clear = Image.fromarray(np.dstack([rgb, np.zeros((40, 50), np.uint8)]))
    assert torch.equal(transform(clear), transform(np.full_like(rgb, 255)))


def test_what_is_no_photo_is_said(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(jpeg_bytes(make_photo(1, 60, 60))[:400])
    (tmp_path / "text.jpg").write_text("hello")
    for photo, words in (
        (tmp_path / "cut.jpg", "cut.jpg: cannot be read as a photo ("),
        (tmp_path / "text.jpg", "text.jpg: cannot be read as a photo ("),
        (tmp_path / "none.jpg", "none.jpg: cannot be read as a photo"),
        (b"", "the picture: cannot be read as a photo (the file is empty)"),
        (np.zeros((3, 40, 40), np.uint8), "array of uint8 (3, 40, 40)"),
        (np.zeros((40, 40, 3), np.float32), "array of float32"),
        (np.zeros((0, 40, 3), np.uint8), "is no photo"),
        (Image.new("I", (9, 9)), "mode I"),
    ):
        with pytest.raises(fastssl.FastSSLError) as error:
            Transform(SPEC)(photo)
        assert words in str(error.value) and "\n" not in str(error.value)
