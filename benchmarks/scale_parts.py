"""What docs/scale.md multiplies by a billion, measured on this machine: orders, opening a file, reads, starting up, writing a checkpoint."""

from __future__ import annotations

import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fastssl.benchmarks.limits import copy_bytes, copy_call
from fastssl.benchmarks.memory import forget_peak, resident_bytes
from fastssl.benchmarks.records import Record
from fastssl.benchmarks.scale_order import Windows, feistel_order, windowed_order
from fastssl.benchmarks.timing import MIN_RUNS
from fastssl.checkpoint import Position, save_checkpoint
from fastssl.pipelines.beton import FIELD_DTYPE, FIELD_TYPES, HEADER_DTYPE, MIN_PAGE_SIZE, TABLE_DTYPE, BetonReader
from fastssl.pipelines.errors import FastSSLError
from fastssl.pipelines.order import epoch_order
from fastssl.pipelines.rng import Stream, keyed_words
from fastssl.recipe import load_recipe
from fastssl.step import TrainStep

#: Positions asked for at a time: a process's batch, and many.
_BATCH, _MANY = 512, 65536
#: Bytes of the file that is read here and there, and of one read: a stored photo of short side 256, rounded to a disk's sectors.
_FILE, _PHOTO = 2**29, 40960


#: Recipes whose checkpoints are written: the smallest and the largest of those for ImageNet-1k.
RECIPES = ("light-moco-mobilenetv3", "dino-vit_tiny-sslight")


def jobs(samples: Iterable[int], runs: int, folder: Path | None) -> list[tuple[str, Callable[[], list[Record]]]]:
    """(what, measurement) of everything here, for each number of ``samples`` where that matters."""
    found: list[tuple[str, Callable[[], list[Record]]]] = []
    for count in samples:
        found.append((f"orders of {count:,}", partial(orders, count, runs)))
        found.append((f"opening {count:,}", partial(opening, count, runs, folder)))
    found += [("reads", partial(reads, runs, folder)), ("starting", partial(starting, runs))]
    return found + [(f"checkpoint, {name}", partial(checkpoints, name, runs, folder)) for name in RECIPES]


def orders(samples: int, runs: int = MIN_RUNS) -> list[Record]:
    """The sorted order of an epoch, and both prototypes at random places of it."""
    keys_s = _median(lambda: keyed_words(0, Stream.ORDER, 0, np.arange(-(-samples // 2))), runs)
    seconds, peaks = [], []
    for epoch in range(runs):
        epoch_order.cache_clear()
        forget_peak()
        before, started = resident_bytes("VmRSS") or 0, time.perf_counter()
        epoch_order(samples, 0, epoch)
        seconds.append(time.perf_counter() - started)
        peaks.append((resident_bytes("VmHWM") or 0) - before)
    epoch_order.cache_clear()
    ceiling = {"ceiling": samples / keys_s, "ceiling_name": "drawing a random key for each"}
    found = [
        _record(
            "order",
            samples / statistics.median(seconds),
            runs,
            ceiling,
            order="sorted",
            samples=samples,
            asked=samples,
            bytes_per_sample=statistics.median(peaks) / samples,
        )
    ]
    rng, windows = np.random.default_rng(0), Windows()
    for asked in (_BATCH, _MANY):
        anywhere = [rng.integers(0, samples, asked) for _ in range(runs)]
        inside = [int(rng.integers(0, windows.length(samples) - asked)) + np.arange(asked) for _ in range(runs)]
        for name, call in {
            "Feistel": lambda number, places=anywhere: feistel_order(places[number], samples, 0, 0),
            "windows": lambda number, places=inside: windowed_order(places[number], samples, 0, 0, windows),
        }.items():
            turn = iter(range(-1, runs))
            once = _median(lambda call=call, turn=turn: call(next(turn)), runs)
            found.append(_record("order", asked / once, runs, ceiling, order=name, samples=samples, asked=asked, bytes_per_sample=0.0))
    return found


def opening(samples: int, runs: int = MIN_RUNS, folder: Path | None = None) -> list[Record]:
    """Opening a file of so many photos: its tables are real, its photos a hole in the file that takes no room."""
    with tempfile.TemporaryDirectory(prefix="fastssl-scale-", dir=folder) as place:
        path = Path(place) / "tables.beton"
        tables = write_tables(path, samples)
        seconds, kept, peaks, checks = [], [], [], []
        for _ in range(runs + 1):
            forget_peak()
            before, started = resident_bytes("VmRSS") or 0, time.perf_counter()
            with BetonReader(path) as reader:
                seconds.append(time.perf_counter() - started)
                peaks.append((resident_bytes("VmHWM") or 0) - before)
                arrays = (reader.modes, reader.heights, reader.widths, reader.labels, reader.offsets, reader.sizes)
                kept.append(sum(array.nbytes for array in arrays))
                started = time.perf_counter()
                reader.table_checksums()
                checks.append(time.perf_counter() - started)
    copy = copy_call("cpu")
    copy_s = _median(copy, runs)
    ceiling = {"ceiling": copy_bytes("cpu") / copy_s / (2 * tables) * samples, "ceiling_name": "a copy of its tables in memory"}
    details = {"samples": samples, "table_bytes_per_sample": tables / samples, "kept_bytes_per_sample": kept[-1] / samples}
    details |= {"peak_bytes_per_sample": statistics.median(peaks[1:]) / samples, "checksum_s": statistics.median(checks[1:])}
    return [_record("opening", samples / statistics.median(seconds[1:]), runs, ceiling, **details)]


def write_tables(path: Path, samples: int, photo_bytes: int = 32) -> int:
    """A ``.beton`` whose photos are a hole of zeros: metadata and allocation table alone are written. Returns their bytes."""
    fields = np.zeros(2, FIELD_DTYPE)
    fields["type_id"], fields["name"] = (2, 1), (b"image", b"label")
    record = np.dtype([("", FIELD_TYPES[type_id][1]) for type_id in (2, 1)], align=True)
    metadata_at = HEADER_DTYPE.itemsize + fields.nbytes
    first = -(-(metadata_at + samples * record.itemsize) // MIN_PAGE_SIZE) * MIN_PAGE_SIZE
    table_at = first + photo_bytes * samples
    piece = 1 << 20
    with open(path, "wb") as file:
        file.write(np.array((2, 2, MIN_PAGE_SIZE, samples, table_at), HEADER_DTYPE).tobytes() + fields.tobytes())
        for start in range(0, samples, piece):
            numbers = np.arange(start, min(samples, start + piece))
            metadata = np.zeros(len(numbers), record)
            metadata["f0"]["height"], metadata["f0"]["width"], metadata["f0"]["data_ptr"] = 256, 341, first + photo_bytes * numbers
            table = np.zeros(len(numbers), TABLE_DTYPE)
            table["sample_id"], table["ptr"], table["size"] = numbers, first + photo_bytes * numbers, photo_bytes
            file.seek(metadata_at + start * record.itemsize)
            file.write(metadata.tobytes())
            file.seek(table_at + start * TABLE_DTYPE.itemsize)
            file.write(table.tobytes())
    return samples * (record.itemsize + TABLE_DTYPE.itemsize)


def reads(runs: int = MIN_RUNS, folder: Path | None = None) -> list[Record]:
    """Reads of one photo's size at random places of a file, past the page cache, on one thread; beside the same file from its beginning to its end."""
    with tempfile.TemporaryDirectory(prefix="fastssl-scale-", dir=folder) as place, mmap.mmap(-1, 2**22) as block:
        path, noise = Path(place) / "noise", np.random.default_rng(0).bytes(2**22)
        with open(path, "wb") as file:
            for _ in range(_FILE // 2**22):
                file.write(noise)
            os.fsync(file.fileno())
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            raise FastSSLError(
                f"{place}: no way past the page cache here ({error.strerror}); name a folder on a disk with --folder"
            ) from error
        try:
            whole = _median(lambda: [os.preadv(handle, [block], at) for at in range(0, _FILE, 2**22)], runs)
            places = np.random.default_rng(1).integers(0, (_FILE - _PHOTO) // 4096, (runs + 1, 512)) * 4096
            turn, one = iter(places.tolist()), memoryview(block)[:_PHOTO]
            here = _median(lambda: [os.preadv(handle, [one], at) for at in next(turn)], runs)
            one.release()
        finally:
            os.close(handle)
    ceiling = {"ceiling": _FILE / whole / _PHOTO, "ceiling_name": "the same bytes read in order"}
    return [_record("reads", 512 / here, runs, ceiling, bytes=_PHOTO, read_s=here / 512)]


def starting(runs: int = MIN_RUNS, clients: int = 16) -> list[Record]:
    """Importing what a training process imports, and questions a second to the store at which processes meet."""

    ours, theirs = zip(*[(_imported("fastssl.train"), _imported("torch")) for _ in range(runs)])
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
    stores = [torch.distributed.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=60)) for _ in range(clients)]
    server.set("address", "x" * 64)
    asked = _median(lambda: [store.get("address") for _ in range(64) for store in stores], runs) / (64 * clients)
    ceiling = {"ceiling": 1 / statistics.median(theirs), "ceiling_name": "importing torch alone"}
    record = _record("starting", 1 / statistics.median(ours), runs, ceiling, store_get_s=asked)
    return [record]


def _imported(what: str) -> float:
    """Seconds that a new interpreter takes to import ``what``."""
    code = f"import time; started = time.perf_counter(); import {what}; print(time.perf_counter() - started)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def checkpoints(name: str, runs: int = MIN_RUNS, folder: Path | None = None) -> list[Record]:
    """Writing a recipe's checkpoint, as training does, beside a plain file of as many bytes."""
    recipe = load_recipe(name)
    step = TrainStep(recipe, torch.device("cpu"), amp=False, seed=0)
    for parameter in step.method.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()  # makes the optimiser's numbers
    with tempfile.TemporaryDirectory(prefix="fastssl-scale-", dir=folder) as place:
        target = Path(place) / "checkpoints"
        ours = _median(
            lambda: save_checkpoint(target, method=step.method, optimizer=step.optimizer, position=Position(), config={}, arch=recipe.arch),
            runs,
        )
        sizes = {path.name: path.stat().st_size for path in target.iterdir()}

        def plain() -> None:
            with open(Path(place) / "plain", "wb") as file:
                file.write(memoryview(zeros))
                os.fsync(file.fileno())

        zeros = np.ones(sum(sizes.values()), np.uint8)
        ceiling = {"ceiling": 1 / _median(plain, runs), "ceiling_name": "writing as many bytes, with fsync"}
    record = _record("checkpoint", 1 / ours, runs, ceiling, bytes=sizes)
    record.recipe = name
    return [record]


def _median(call: Callable[[], object], runs: int) -> float:
    """Median seconds of ``runs`` calls after one that is not counted."""
    seconds = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _record(part: str, per_s: float, runs: int, ceiling: dict[str, object], **details: object) -> Record:
    """A record whose rate (samples, photos, or whole calls a second) stands in ``pair_per_s``."""
    return Record(
        bench="scale",
        device="cpu",
        pair_per_s=per_s,
        median_s=1 / per_s,
        runs=runs,
        fraction_of_ceiling=per_s / ceiling["ceiling"],
        details={"part": part, **details},
        **ceiling,
    )
