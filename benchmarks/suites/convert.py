"""The converter, in photos a second: copying JPEGs through as they are, and re-encoding them at a smaller size.

Every contender of a mode does one whole run over the same photos in its turn, into a new file that is removed before
the next turn. The sources come from the page cache, where the first round has put them; the results go to the disk.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from fastssl.benchmarks.harness.photos import ensure_photos
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.setting import Setting
from fastssl.benchmarks.harness.windows import Contender, Window, largest_share, measure_windows, rate, ratio
from fastssl.benchmarks.suites.ffcv_writer import FfcvWriter
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
    """The converter itself, one whole run a turn, without what a stopped run would need.

    Attributes:
        last: what the last run did.
    """

    def __init__(self, source: Path, count: int, options: ConvertOptions, folder: Path):
        self.source, self.count, self.options, self.folder = source, count, options, folder
        self.last: ConvertSummary | None = None

    def __call__(self, seconds: float) -> Window:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            started, cpu = time.perf_counter(), time.process_time()
            self.last = convert(self.source, Path(folder) / "photos.beton", self.options)
            elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
        return Window(elapsed, self.count, cpu_s=cpu)


class BareCopy:
    """A plain copy of the photos' bytes into one file, brought to the disk once at the end: no look at them, no
    tables.
    """

    def __init__(self, listing: Listing, chosen: Sequence[int], folder: Path):
        self.listing, self.chosen, self.folder = listing, chosen, folder

    def __call__(self, seconds: float) -> Window:
        with tempfile.TemporaryFile(dir=self.folder, buffering=1 << 20) as file:
            started = time.perf_counter()
            for number in self.chosen:
                file.write(self.listing.read(number))
            file.flush()
            os.fsync(file.fileno())
            return Window(time.perf_counter() - started, len(self.chosen))


class BareLoop:
    """Nothing but the work on the pixels: decode, scale, encode, with the converter's libraries on ``threads`` threads;
    the result is dropped.

    Attributes:
        spent: processor time in seconds of all runs so far, by stage.
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
            except BaseException:  # Ctrl-C too: what is left is taken from the threads, which the pool waits for
                for _ in waiting:
                    pass
                raise
        elapsed = time.perf_counter() - started
        self.spent += np.sum(parts, axis=0)
        return Window(elapsed, len(self.chosen), host_cpu_s=float(np.sum(parts)))

    @property
    def shares(self) -> dict[str, float]:
        """Of each stage in ``spent``; stages that never ran are left out."""
        return {name: float(spent / self.spent.sum()) for name, spent in zip(self.STAGES, self.spent) if spent}

    def _loop(self, waiting: Iterator[int]) -> list[float]:
        """One thread's processor time in each stage, in seconds."""
        spent = [0.0] * len(self.STAGES)
        for number in waiting:
            times = [time.thread_time()]
            data = self.listing.read(number)
            times.append(time.thread_time())
            with contextlib.suppress(
                Exception
            ):  # a damaged photo, whose decoder raises anything at all: the converter goes on, too
                self._photo(data, times)
            for stage, (begin, end) in enumerate(itertools.pairwise(times)):
                spent[stage] += end - begin
        return spent

    def _photo(self, data: bytes, times: list[float]) -> None:
        pixels = _decode(data, self.options)
        times.append(time.thread_time())
        height, width, _ = pixels.shape
        size = self.options.target_size(height, width)
        if size != (height, width):
            pixels = np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS))
            times.append(time.thread_time())
            jpeg.encode(pixels, self.options.quality)
            times.append(time.thread_time())


def _decode(data: bytes, options: ConvertOptions) -> np.ndarray:
    """(H, W, 3) uint8 pixels; of a JPEG that is more than four times too large at least twice the wanted size, as the
    converter does it.
    """
    if data[:3] != b"\xff\xd8\xff":
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    height, width, *_ = jpeg.read_header(data)
    goal = options.target_size(height, width)
    far = height >= 4 * goal[0] and width >= 4 * goal[1]
    scale = {"min_height": 2 * goal[0], "min_width": 2 * goal[1], "min_factor": 2} if far else {}
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True, **scale)
    return pixels


def run(setting: Setting) -> list[Record]:
    """Measure the conversion of one source: ``data`` is ``synthetic`` (``photos`` JPEGs made here, written as a tree of
    class folders), or a folder or tar as ``convert-imagenet`` takes it, of which at most ``photos``, evenly spaced, are
    converted. The peer is ffcv's writer, where that is installed.

    Returns:
        One record for each of MODES (``details["part"]``). The ceiling of ``copy`` is a plain copy of the same bytes
        with ``fsync``, that of re-encoding a bare loop over the pixels' work on as many threads.
        ``details["share"]``: of a run's time, by what that loop took.

    Raises:
        FastSSLError: the source cannot be read, or the folder not be written to.
    """
    data, folder, photos = setting.data, setting.folder, setting.photos
    problem = engine_state("ffcv").problem if setting.peers else None
    try:
        temporary = tempfile.TemporaryDirectory(prefix="fastssl-bench-", dir=folder)
    except OSError as error:
        raise FastSSLError(
            f"{folder or tempfile.gettempdir()}: cannot write temporary files: {error.strerror}"
        ) from error
    with temporary as name:
        source = Path(name) / "photos" if data == "synthetic" else Path(data)
        if data == "synthetic":
            write_tree(source, photos)
        with list_source(source) as listing:
            count = min(photos, len(listing))
            chosen = (np.arange(count) * len(listing) // count).tolist()
            sizes = listing.sizes[chosen]
            about = {
                "name": data if data == "synthetic" else source.name,
                "samples": count,
                "bytes": round(float(sizes.mean())),
            }
            about = {"data": about, "missing": {"ffcv": problem} if problem else {}}
            peer = setting.peers and not problem
            return [_measure(setting, listing, chosen, part, Path(name), peer, about) for part in MODES]


def _measure(
    setting: Setting, listing: Listing, chosen: list[int], part: str, folder: Path, peer: bool, about: dict[str, Any]
) -> Record:
    """One mode's record."""
    workers = setting.threads
    options = ConvertOptions(workers=workers, limit=len(chosen), resume=False, **MODES[part])
    ours, loop = Convert(listing.source, len(chosen), options, folder), BareLoop(listing, chosen, options, workers)
    contenders: dict[str, Contender] = {"ours": ours, "loop": loop}
    if part == "copy":
        contenders["copy"] = BareCopy(listing, chosen, folder)
    if peer:
        contenders["peer"] = FfcvWriter(listing, chosen, options, folder)
    windows = measure_windows(contenders, seconds=1.0, runs=setting.runs)  # whole runs, however long they take
    top = "copy" if part == "copy" else "loop"
    names = {
        "copy": "plain copy of the same bytes, with fsync",
        "loop": f"bare decode, scale and encode loop, {counted(workers, 'thread')}",
    }
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
        "photos": len(chosen),
        "copied": ours.last.copied,
        "reencoded": ours.last.reencoded,
        "rejected": ours.last.rejected,
        "bytes_in": int(listing.sizes[chosen].sum()),
        "bytes_out": ours.last.bytes,
        "share": share,
        "loop_per_s": rate(windows["loop"]),
        "cpu_s": statistics.median(window.cpu_s for window in windows["ours"]),
        **about,
    }
    if peer:
        details["peer_median_s"] = len(chosen) / rate(windows["peer"])
    return setting.record(
        "convert",
        pipeline="native",
        workers=workers,
        pair_per_s=pair_per_s,
        median_s=len(chosen) / pair_per_s,
        ceiling=pair_per_s / fraction,
        ceiling_name=names[top],
        fraction_of_ceiling=fraction,
        bottleneck=words,
        peer=FfcvWriter.NAME if peer else None,
        ratio_to_peer=ratio(windows["ours"], windows["peer"]) if peer else None,
        details=details,
    )
