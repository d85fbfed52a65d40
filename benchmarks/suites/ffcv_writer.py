"""The converter's peer: ffcv's own writer over the same photos."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastssl.benchmarks.harness.windows import Window
from fastssl.errors import FastSSLError
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.convert.sources import Listing
from fastssl.pipelines.engines.registry import engine_state


@dataclass(frozen=True)
class Place:
    """Where a photo's bytes lie: in a file of its own, or in a tar."""

    path: Path
    offset: int
    size: int
    label: int

    def open(self) -> Image.Image:
        """The picture, decoded by Pillow as RGB; raises whatever a decoder raises for a damaged one."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return Image.open(io.BytesIO(file.read(self.size))).convert("RGB")


class Photos:
    """An indexable data set of (picture, label) as ffcv's writer takes it. Its processes open the files themselves."""

    def __init__(self, places: Sequence[Place]):
        self.places = list(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return self.places[number].open(), self.places[number].label


class FfcvWriter:
    """``DatasetWriter`` with as many processes as the converter has threads, as its documentation shows it; it does not
    wait for the disk.

    It has no copying through: every JPEG is re-encoded. It scales to a longest side, which is set to the median of
    what the converter's option gives; photos that Pillow cannot read are left out, because one of them would stop the
    writer for good.

    Raises:
        FastSSLError: ffcv is not installed, or Pillow can read none of the photos.
    """

    NAME = "ffcv's DatasetWriter"

    def __init__(self, listing: Listing, chosen: Sequence[int], options: ConvertOptions, folder: Path):
        if problem := engine_state("ffcv").problem:
            raise FastSSLError(f"ffcv's writer cannot run here: {problem}")
        self.folder, self.quality, self.workers = folder, options.quality, options.workers or 1
        places, sides, scaled = [], [], []
        for number in chosen:
            path, offset = listing.source / listing.names[number], 0
            if listing.offsets is not None:
                path, offset = listing.source, int(listing.offsets[number])
            place = Place(path, offset, int(listing.sizes[number]), int(listing.labels[number]))
            with contextlib.suppress(Exception):  # decoders raise anything at all for damaged input
                width, height = place.open().size
                places.append(place)
                sides.append(max(height, width))
                scaled.append(max(options.target_size(height, width)))
        if not places:
            raise FastSSLError(f"{listing.source}: Pillow can read none of its {len(chosen)} photos")
        self.photos = Photos(places)
        self.max_side = None if scaled == sides else round(statistics.median(scaled))
        # A sample that does not fit its page stops the writer for good, too.
        largest = max(place.size for place in places)
        self.page_size = max(2**23, 2 ** int(np.ceil(np.log2(4 * largest))))

    def __call__(self, seconds: float) -> Window:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            started = time.perf_counter()
            self.write(Path(folder) / "photos.beton")
            return Window(time.perf_counter() - started, len(self.photos))

    def write(self, path: Path) -> None:
        """Write the file ``path`` once."""
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        image = RGBImageField(write_mode="jpg", max_resolution=self.max_side, jpeg_quality=self.quality)
        writer = DatasetWriter(
            str(path), {"image": image, "label": IntField()}, page_size=self.page_size, num_workers=self.workers
        )
        # Its usual portions of 100 photos would leave processes idle when there are few.
        portion = max(1, min(100, len(self.photos) // (4 * self.workers)))
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            writer.from_indexed_dataset(self.photos, chunksize=portion)
