"""Pictures to measure with when no photos are at hand: made up, but as costly to decode as an ImageNet photo.

What decoding costs depends on the number of pixels and of non-zero coefficients, so that is what is imitated: sides of
500 x 375, a spectrum that falls with frequency as photos' does, edges, texture that comes and goes over the picture,
JPEG quality 90 with 4:2:0. They show nothing, and nothing measured on them is a statement about any data set.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fastssl.data.sample_set import ensure_sample_set
from fastssl.pipelines.beton.format import MIN_PAGE_SIZE
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.ops import jpeg
from fastssl.utils.cores import available_cores
from fastssl.utils.remote_cache import default_cache_dir

#: (height, width): about every fourth ImageNet photo is upright.
SIZES = ((375, 500), (375, 500), (375, 500), (500, 375))
QUALITY = 90
#: Part of the cached file's name: raise it when the pictures change.
_EDITION = 1


def make_photo(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """One picture, (height, width, 3) uint8; the same for the same arguments."""
    rng = np.random.default_rng(seed)

    def noise(cells: int) -> NDArray[np.float32]:
        """Smooth noise of about ``cells`` bumps across the longer side; standard deviation near 1."""
        grid = rng.standard_normal(
            (max(2, cells * height // max(height, width)), max(2, cells * width // max(height, width)))
        ).astype(np.float32)
        return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))

    # Amplitude falls as 1 / frequency: the spectrum of natural photos (Field 1987).
    light = sum(noise(cells) * (60 / cells**0.9) for cells in (2, 4, 8, 16, 32, 64)) + 128
    edges = Image.new("F", (width, height), 0)
    draw = ImageDraw.Draw(edges)
    for _ in range(12):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        across, down = rng.uniform(0.05, 0.35, 2) * (width, height)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - across, y - down, x + across, y + down), fill=float(rng.uniform(-70, 70)))
    texture = np.clip(noise(6) + 0.6, 0.1, 2.0) * rng.standard_normal((height, width)).astype(np.float32)
    light += np.asarray(edges) + 24 * texture
    red, blue = (sum(noise(cells) * (25 / cells**0.5) for cells in (2, 6, 24)) for _ in range(2))
    photo: NDArray[np.uint8]
    photo = np.clip(np.stack([light + red, light - 0.5 * (red + blue), light + blue], axis=2), 0, 255).astype(np.uint8)
    return photo


def write_photos(path: Path, count: int, *, seed: int = 0, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """Write ``count`` pictures, label 0 to 9 and ``sizes`` (height, width) in turn, as the ``.beton`` file ``path``,
    which is whole or absent, never half; the same bytes for the same arguments.
    """

    def encode(number: int) -> tuple[bytes, int, int]:
        height, width = sizes[number % len(sizes)]
        return jpeg.encode(make_photo(seed * 1_000_003 + number, height, width), QUALITY), height, width

    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        with (
            ThreadPoolExecutor(available_cores()) as pool,
            BetonWriter(temporary, count, page_size=MIN_PAGE_SIZE) as writer,
        ):
            for number, (data, height, width) in enumerate(pool.map(encode, range(count))):
                writer.add(data, height, width, label=number % 10)
        os.replace(temporary, path)


def ensure_photos(count: int = 512, cache_dir: Path | None = None) -> Path:
    """The file of ``count`` synthetic pictures, made on first use (about 20 ms of a core each) and found again in
    ``cache_dir`` (default: the sample set's); where that cannot be written, a temporary folder.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    path = folder / f"synthetic-photos-{count}-{_EDITION}.beton"
    if path.is_file():  # it was renamed into place, so it is whole
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_photos(path, count)
    except OSError as error:
        path = Path(tempfile.mkdtemp(prefix="fastssl-photos-")) / path.name
        warnings.warn(
            f"{folder} cannot be written ({error.strerror}); the synthetic photos go to {path.parent}", stacklevel=2
        )
        write_photos(path, count)
    return path


def find_data(name: str, count: int = 512) -> tuple[Path, str]:
    """The file, and the name under which records speak of it, for what ``--data`` says: ``synthetic`` (``count``
    pictures made here), ``samples`` (the sample set that installs with the package) or what `open_beton` takes.
    """
    if name == "synthetic":
        return ensure_photos(count), "synthetic"
    if name == "samples":
        return ensure_sample_set().train, "samples (views of 18 places, 64 px)"
    return Path(name), Path(name).name


def mean_pixels(reader: BetonReader) -> float:
    """Of a picture."""
    heights, widths = reader.shapes(reader.some())
    return float((heights.astype(np.int64) * widths).mean())


def describe_data(reader: BetonReader, name: str) -> dict[str, str | int | float]:
    """What a rate depends on: how many pictures, their pixels and their bytes, as means."""
    pixels, size = mean_pixels(reader), float(reader.take("sizes", reader.some()).mean())
    return {
        "name": name,
        "samples": len(reader),
        "pixels": round(pixels),
        "bytes": round(size),
        "bits_per_pixel": round(8 * size / pixels, 2),
    }
