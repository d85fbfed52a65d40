"""The converter, in photos a second: copying JPEGs through as they are, and re-encoding them at a smaller size; its
peer is ffcv's own writer over the same photos.

Every contender of a mode does one whole run over the same photos in its turn, into a new file that is removed before
the next turn. The sources come from the page cache, where the first round has put them; the results go to the disk.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from fastssl.benchmarks.harness.photos import ensure_photos
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.setting import Setting
from fastssl.benchmarks.harness.timing import Contender, Window, largest_share, measure_windows, rate, ratio
from fastssl.errors import FastSSLError, counted
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions, ConvertSummary
from fastssl.pipelines.convert.sources import Listing, list_source
from fastssl.pipelines.engines.registry import engine_state
from fastssl.pipelines.ops import jpeg

#: The two things a converter does, by the name of the record's part.
MODES: dict[str, dict[str, Any]] = {
    "copy": {"keep_size": True, "short_side": None},
    "short side 256": {"short_side": 256},
}


def write_tree(folder: Path, count: int) -> None:
    """Write the ``count`` synthetic JPEGs as ``folder``/class/number.jpg."""
    with BetonReader(ensure_photos(count)) as reader:
        assert reader.labels is not None  # `write_photos` gave them some
        for sample in range(len(reader)):
            place = folder / f"class{int(reader.labels[sample])}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{sample:06}.jpg").write_bytes(reader.encoded(sample).tobytes())


class Convert:
    """The converter itself, a whole run a turn, without what a stopped run would need. ``last``: what it did."""

    def __init__(self, source: Path, count: int, options: ConvertOptions, folder: Path):
        self.source, self.count, self.options, self.folder = source, count, options, folder
        self.last: ConvertSummary | None = None

    def __call__(self, seconds: float) -> Window:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            started, cpu = time.perf_counter(), time.process_time()
            self.last = convert(self.source, Path(folder) / "photos.beton", self.options)
            elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
        return Window(elapsed, self.count, cpu_s=cpu)


def bare_copy(listing: Listing, chosen: Sequence[int], folder: Path, seconds: float) -> Window:
    """A plain copy of the photos' bytes into one file, synced once at the end: no look at them, no tables."""
    with tempfile.TemporaryFile(dir=folder, buffering=1 << 20) as file:
        started = time.perf_counter()
        for number in chosen:
            file.write(listing.read(number))
        file.flush()
        os.fsync(file.fileno())
        return Window(time.perf_counter() - started, len(chosen))


class BareLoop:
    """Nothing but the work on the pixels: decode, scale, encode, with the converter's libraries on ``threads`` threads;
    the result is dropped. ``spent``: processor time in seconds of all runs so far, by stage.
    """

    STAGES = ("reading", "decoding", "scaling", "encoding")

    def __init__(self, listing: Listing, chosen: Sequence[int], options: ConvertOptions, threads: int):
        self.listing, self.chosen, self.options, self.threads = listing, chosen, options, threads
        self.spent = np.zeros(len(self.STAGES))

    def __call__(self, seconds: float) -> Window:
        waiting = iter(self.chosen)  # shared: a thread takes the next photo when it is done with one
        started = time.perf_counter()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                parts = list(pool.map(lambda _: self._loop(waiting), range(self.threads)))
            finally:  # Ctrl-C too: what is left is taken from the threads, which the pool waits for
                list(waiting)
        elapsed = time.perf_counter() - started
        self.spent += np.sum(parts, axis=0)
        return Window(elapsed, len(self.chosen), host_cpu_s=float(np.sum(parts)))

    @property
    def shares(self) -> dict[str, float]:
        """Of each stage in ``spent``; stages that never ran are left out."""
        return {name: float(spent / self.spent.sum()) for name, spent in zip(self.STAGES, self.spent) if spent}

    def _loop(self, waiting: Iterator[int]) -> np.ndarray:
        """One thread's processor time in each stage, in seconds."""
        spent = np.zeros(len(self.STAGES))
        for number in waiting:
            times = [time.thread_time()]
            with suppress(Exception):  # decoders raise anything for damaged photos: the converter goes on, too
                for _ in self._stages(number):
                    times.append(time.thread_time())
            spent[: len(times) - 1] += np.diff(times)
        return spent

    def _stages(self, number: int) -> Iterator[None]:
        """Work on one photo; yields behind each stage."""
        data = self.listing.read(number)
        yield
        pixels = _decode(data, self.options)
        yield
        size = self.options.target_size(*pixels.shape[:2])
        if size != pixels.shape[:2]:
            pixels = np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS))
            yield
            jpeg.encode(pixels, self.options.quality)
            yield


def _decode(data: bytes, options: ConvertOptions) -> np.ndarray:
    """(H, W, 3) uint8 pixels; of a JPEG that is more than four times too large at least twice the wanted size, as the
    converter does it.
    """
    if data[:3] != b"\xff\xd8\xff":
        return _by_pillow(data)
    height, width, *_ = jpeg.read_header(data)
    goal = options.target_size(height, width)
    far = height >= 4 * goal[0] and width >= 4 * goal[1]
    return jpeg.decode(data, at_least=(2 * goal[0], 2 * goal[1]) if far else None)


def _by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class FfcvWriter:
    """ffcv's ``DatasetWriter`` with as many processes as the converter has threads, as its documentation shows it; it
    does not wait for the disk. It is itself the indexable data set of (picture, label) that the writer takes.

    It has no copying through: every JPEG is re-encoded. It scales to a longest side, which is set to the median of
    what the converter's option gives; photos that Pillow cannot read are left out, because one of them would stop the
    writer for good. Raises FastSSLError where ffcv is not installed, or Pillow can read none of the photos.
    """

    NAME = "ffcv's DatasetWriter"

    def __init__(self, listing: Listing, chosen: Sequence[int], options: ConvertOptions, folder: Path):
        if problem := engine_state("ffcv").problem:
            raise FastSSLError(f"ffcv's writer cannot run here: {problem}")
        self.listing, self.folder, self.options = listing, folder, options
        self.readable: list[int] = []
        sides, scaled = [], []
        for number in chosen:
            with suppress(Exception):  # decoders raise anything at all for damaged input
                height, width, _ = _by_pillow(listing.read(number)).shape
                self.readable.append(number)
                sides.append(max(height, width))
                scaled.append(max(options.target_size(height, width)))
        if not sides:
            raise FastSSLError(f"{listing.source}: Pillow can read none of its {len(chosen)} photos")
        self.max_side = None if scaled == sides else round(median(scaled))

    def __len__(self) -> int:
        return len(self.readable)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        number = self.readable[position]
        return _by_pillow(self.listing.read(number)), int(self.listing.labels[number])

    def __call__(self, seconds: float) -> Window:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            started = time.perf_counter()
            self.write(Path(folder) / "photos.beton")
            return Window(time.perf_counter() - started, len(self))

    def write(self, path: Path) -> None:
        """Write the file ``path`` once."""
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter

        workers = self.options.workers or 1
        image = RGBImageField(write_mode="jpg", max_resolution=self.max_side, jpeg_quality=self.options.quality)
        # A sample that does not fit its page stops the writer for good, too.
        page = max(2**23, 2 ** int(np.ceil(np.log2(4 * self.listing.sizes[self.readable].max()))))
        writer = DatasetWriter(str(path), {"image": image, "label": IntField()}, page_size=page, num_workers=workers)
        # Its usual portions of 100 photos would leave processes idle when there are few.
        portion = max(1, min(100, len(self) // (4 * workers)))
        with redirect_stderr(io.StringIO()):  # its progress bar
            writer.from_indexed_dataset(self, chunksize=portion)


def run(setting: Setting) -> list[Record]:
    """Measure the conversion of one source: ``data`` is ``synthetic`` (``photos`` JPEGs made here, written as a tree of
    class folders), or a folder or tar as ``convert-imagenet`` takes it, of which at most ``photos``, evenly spaced, are
    converted. The peer is ffcv's writer, where that is installed. Raises FastSSLError where the source cannot be read,
    or the folder not be written to.

    Returns:
        One record for each of MODES (``details["part"]``). The ceiling of ``copy`` is a plain copy of the same bytes
        with ``fsync``, that of re-encoding a bare loop over the pixels' work on as many threads.
        ``details["share"]``: of a run's time, by what that loop took.
    """
    data, folder, photos = setting.data, setting.folder, setting.photos
    problem = engine_state("ffcv").problem if setting.peers else None
    try:
        temporary = tempfile.TemporaryDirectory(prefix="fastssl-bench-", dir=folder)
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise FastSSLError(f"{where}: cannot write temporary files: {error.strerror}") from error
    with temporary as name:
        source = Path(name) / "photos" if data == "synthetic" else Path(data)
        if data == "synthetic":
            write_tree(source, photos)
        with list_source(source) as listing:
            count = min(photos, len(listing))
            chosen = (np.arange(count) * len(listing) // count).tolist()
            size = round(float(listing.sizes[chosen].mean()))
            about = {"name": data if data == "synthetic" else source.name, "samples": count, "bytes": size}
            about = {"data": about, "missing": {"ffcv": problem} if problem else {}}
            peer = setting.peers and not problem
            return [_measure(setting, listing, chosen, part, Path(name), peer, about) for part in MODES]


def _measure(
    setting: Setting, listing: Listing, chosen: list[int], part: str, folder: Path, peer: bool, about: dict[str, Any]
) -> Record:
    """One mode's record."""
    workers, count = setting.threads, len(chosen)
    options = ConvertOptions(workers=workers, limit=count, resume=False, **MODES[part])
    ours, loop = Convert(listing.source, count, options, folder), BareLoop(listing, chosen, options, workers)
    contenders: dict[str, Contender] = {"ours": ours, "loop": loop}
    top, top_name = "loop", f"bare decode, scale and encode loop, {counted(workers, 'thread')}"
    if part == "copy":
        top, top_name = "copy", "plain copy of the same bytes, with fsync"
        contenders["copy"] = partial(bare_copy, listing, chosen, folder)
    if peer:
        contenders["peer"] = FfcvWriter(listing, chosen, options, folder)
    windows = measure_windows(contenders, seconds=1.0, runs=setting.runs)  # whole runs, however long they take
    pair_per_s, fraction = rate(windows["ours"]), ratio(windows["ours"], windows[top])
    of_loop = ratio(windows["ours"], windows["loop"])
    share = {stage: of_the_loop * min(1.0, of_loop) for stage, of_the_loop in loop.shares.items()}
    share["order, checksums, writing"] = max(0.0, 1 - of_loop)
    words = largest_share(share)
    if part == "copy":
        words = words.replace("decoding (", "decoding, by which damaged photos are found (")
    assert ours.last is not None  # it has run
    details = {
        "part": part,
        "photos": count,
        **{name: getattr(ours.last, name) for name in ("copied", "reencoded", "rejected")},
        "bytes_in": int(listing.sizes[chosen].sum()),
        "bytes_out": ours.last.bytes,
        "share": share,
        "loop_per_s": rate(windows["loop"]),
        "cpu_s": median(window.cpu_s for window in windows["ours"]),
        **about,
    }
    if peer:
        details["peer_median_s"] = count / rate(windows["peer"])
    return setting.record(
        "convert",
        pipeline="native",
        workers=workers,
        pair_per_s=pair_per_s,
        median_s=count / pair_per_s,
        ceiling=pair_per_s / fraction,
        ceiling_name=top_name,
        fraction_of_ceiling=fraction,
        bottleneck=words,
        peer=FfcvWriter.NAME if peer else None,
        ratio_to_peer=ratio(windows["ours"], windows["peer"]) if peer else None,
        details=details,
    )
