"""The loader, stage by stage: what the host's decoding can give at most, what the engine makes of it, and what arrives
as views.

Three records for each setting:

``decode``      the engine with its device stage left out, beside a bare loop over the same JPEGs with the same
                binding on as many threads
``host cost``   processor time a picture for one view, for two, and for two global and six local views, when
                crops run on the device
``views``       a whole ``ViewLoader``: decode, crop, colour, on the device; beside what the bare loop could have fed
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from fastssl.benchmarks.harness.photos import describe_data, find_data
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.timing import MIN_RUNS
from fastssl.benchmarks.harness.windows import Window, measure_windows, rate, ratio, stream_window, wait_share
from fastssl.config.recipe import Recipe
from fastssl.errors import counted
from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import Engine, EngineSettings, Request
from fastssl.pipelines.engines.native import NativeEngine
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.ops.crop import boxes_of, crop_resize_host
from fastssl.pipelines.plan.draw import ViewSpec, draw_plans
from fastssl.utils.cores import available_cores

#: Samples of an epoch: small files are read again and again, because a real epoch is not over after a handful of
#: batches.
_EPOCH = 65536
#: Batch on a CPU when none is asked for: a recipe's own would need gigabytes of buffers, and rates do not depend on it.
CPU_BATCH = 32


class DecodeEngine(NativeEngine):
    """The engine up to the decoded batch: reading, plan, decoding, the ring; nothing is rendered from it."""

    def _deliver(self, slot: object, job: object) -> list[Tensor]:
        return []


def default_batch(recipe: Recipe, device: torch.device, batch_size: int | None) -> int:
    """``batch_size`` if given; else the recipe's, on a CPU at most CPU_BATCH."""
    if batch_size is not None:
        return batch_size
    return recipe.train.batch_size if device.type == "cuda" else min(recipe.train.batch_size, CPU_BATCH)


def open_loader(
    reader: BetonReader, views: Sequence[ViewSpec], batch_size: int, device: torch.device, **options: object
) -> ViewLoader:
    """A loader whose epochs are long, however few samples the file has."""
    repeats = max(1, -(-max(_EPOCH, 16 * batch_size) // len(reader)))
    indices = np.tile(np.arange(len(reader)), repeats)
    return ViewLoader(reader, views=views, batch_size=batch_size, device=device, indices=indices, **options)


def endless(loader: ViewLoader) -> Iterator:
    """The loader's batches, epoch after epoch."""
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def requests_of(loader: ViewLoader) -> Iterator[Callable[[], Request]]:
    for epoch in itertools.count():
        for step in range(len(loader)):
            yield partial(loader.request, epoch, step)


class BareLoop:
    """Nothing but the work itself: the same JPEGs through the same binding, on ``threads`` threads that share nothing.

    Args:
        specs: also cut these views from each picture, as the engine's host crops do; empty: only decode.
    """

    def __init__(self, reader: BetonReader, threads: int, specs: Sequence[ViewSpec] = ()):
        self.reader, self.threads, self.specs = reader, threads, list(specs)
        ids = np.arange(len(reader))
        self.boxes = [boxes_of(plan) for plan in draw_plans(self.specs, 0, 0, ids, reader.heights, reader.widths)]

    def __call__(self, seconds: float) -> Window:
        started = time.perf_counter()
        with ThreadPoolExecutor(self.threads) as pool:
            parts = list(pool.map(lambda number: self._loop(number, started + seconds), range(self.threads)))
        elapsed, count = time.perf_counter() - started, sum(done for done, _ in parts)
        return Window(elapsed, count, decoded=count, host_cpu_s=sum(cpu for _, cpu in parts))

    def _loop(self, number: int, deadline: float) -> tuple[int, float]:
        """One thread's pictures and its processor time in seconds."""
        cpu = time.thread_time()
        reader, count = self.reader, len(self.reader)
        scratch = np.empty(int((reader.heights.astype(np.int64) * reader.widths).max()) * 3, np.uint8)
        outs = [np.empty((spec.count, 1, spec.size, spec.size, 3), np.uint8) for spec in self.specs]
        # Each thread begins elsewhere: two that decode the same picture would share the caches' content.
        for done in itertools.count(1):
            sample = (number * count // self.threads + done) % count
            height, width = int(reader.heights[sample]), int(reader.widths[sample])
            picture = scratch[: height * width * 3].reshape(height, width, 3)
            if reader.modes[sample] == MODE_RAW:
                np.copyto(picture, reader.encoded(sample).reshape(picture.shape))
            else:
                simplejpeg.decode_jpeg(reader.encoded(sample), colorspace="RGB", buffer=picture, strict=True)
            for boxes, spec, out in zip(self.boxes, self.specs, outs):
                crop_resize_host(picture, boxes[sample], spec, out, 0)
            if time.perf_counter() >= deadline:
                return done, time.thread_time() - cpu
        raise AssertionError("unreachable: itertools.count does not end")


def run(
    recipe: Recipe,
    recipe_name: str,
    data: str = "synthetic",
    device: torch.device | str = "cpu",
    workers: int | None = None,
    batch_size: int | None = None,
    seconds: float = 10.0,
    runs: int = MIN_RUNS,
    photos: int = 512,
    pipeline: str = "native",
) -> list[Record]:
    """Measure one recipe's loader on one file.

    Args:
        recipe: its views and, on a GPU, its batch size.
        data, photos: see :func:`fastssl.benchmarks.harness.photos.find_data`.
        workers: decoding threads; default: the cores that this process may use.
        batch_size: default: the recipe's; at most 32 on a CPU.
        seconds: of all counted windows together; warm-up comes on top.
        runs: windows of each contender, at least five.
        pipeline: the engine. Of ``dali`` and ``ffcv`` only the whole loader is measured: their stages cannot be taken
            apart.

    Returns:
        The records ``decode``, ``host cost`` and ``views`` (``details["part"]``). A pair is one source picture with all
        views of the recipe, and ``median_s`` the time of one batch.
    """
    device = torch.device(device)
    workers = workers or available_cores()
    path, name = find_data(data, photos)
    size = default_batch(recipe, device, batch_size)
    # One global view; the recipe's two; two global and six local ones. The host does not look at a view's size when
    # crops run on the device.
    single, pair = replace(recipe.views[0], count=1), replace(recipe.views[0], count=2)
    local = replace(single, size=max(8, single.size * 3 // 7), count=6, area=(0.05, 0.2))
    groups = {"1 view": [single], "2 views": [pair], "2 + 6 views": [pair, local]} if pipeline == "native" else {}
    with BetonReader(path) as reader:
        loaders = {
            key: open_loader(reader, specs, size, device, workers=workers, crops="device")
            for key, specs in groups.items()
        }
        engines = {
            key: DecodeEngine(reader, specs, EngineSettings(device, size, workers=workers, crops="device"))
            for key, specs in groups.items()
        }
        whole = open_loader(reader, recipe.views, size, device, workers=workers, pipeline=pipeline)
        host_crops = device.type == "cpu"
        contenders: dict[str, Callable[[float], Window]] = {
            "bare, 1 thread": BareLoop(reader, 1),
            "bare": BareLoop(reader, workers),
        }

        def stream(start: Callable[[], Iterator], engine: Engine) -> Callable[[float], Window]:
            return partial(stream_window, start, lambda batch: None, engine.stats, size, device)

        for key, engine in engines.items():
            contenders[key] = stream(
                partial(lambda e, requests: e.run(requests_of(requests)), engine, loaders[key]), engine
            )
        if host_crops:
            contenders["bare crops"] = BareLoop(reader, workers, recipe.views)
            contenders["crops"] = stream(lambda: whole.engine.run(requests_of(whole)), whole.engine)
        contenders["views"] = stream(lambda: endless(whole), whole.engine)
        try:
            windows = measure_windows(contenders, seconds=seconds, runs=runs)
        finally:
            for loader in (*loaders.values(), whole):
                loader.close()
            for engine in engines.values():
                engine.close()
        about = {"data": describe_data(reader, name), "crops": "host" if host_crops else "device", "seconds": seconds}
    views = sum(spec.count for spec in recipe.views)

    def record(part: str, **values: object) -> Record:
        details = {"part": part, **about, **values.pop("details")}
        common = {
            "recipe": recipe_name,
            "pipeline": pipeline,
            "device": device.type,
            "batch_size": size,
            "workers": workers,
            "runs": runs,
        }
        return Record(bench="loader", **common, **values, details=details)

    def rates(mine: str, ceiling: str) -> dict[str, float]:
        pair_per_s, fraction = rate(windows[mine]), ratio(windows[mine], windows[ceiling])
        return {
            "pair_per_s": pair_per_s,
            "view_per_s": pair_per_s * views,
            "median_s": size / pair_per_s,
            "ceiling": pair_per_s * views / fraction,
            "fraction_of_ceiling": fraction,
        }

    bare = {"bare_per_s": rate(windows["bare"]), "bare_per_s_1_thread": rate(windows["bare, 1 thread"])}
    cost = {key: [1e3 * w.host_cpu_s / max(w.decoded, 1) for w in windows[key]] for key in ("bare", *engines)}

    def growth(key: str, base: str) -> float:
        return float(np.median([more / one for more, one in zip(cost[key], cost[base])]))

    def host_rates() -> dict[str, float]:
        """Photos a second of one core that does nothing else, with the most views; beside the bare loop's."""
        most, views_each = "2 + 6 views", 8
        per_s, fraction = 1e3 / float(np.median(cost[most])), 1 / growth(most, "bare")
        limit = {"ceiling": per_s * views_each / fraction, "fraction_of_ceiling": fraction}
        return {"pair_per_s": per_s, "view_per_s": per_s * views_each, "median_s": size / per_s, **limit}

    top = "bare crops" if host_crops else "bare"
    bottleneck, shares = _bottleneck(windows, host_crops)
    loader_record = record(
        "views",
        **rates("views", top),
        ceiling_name=f"bare decode {'and crop loop' if host_crops else 'loop'}, {counted(workers, 'thread')}",
        bottleneck=bottleneck,
        details={**bare, **shares, "consumer_wait_share": wait_share(windows["views"])},
    )
    if pipeline != "native":
        return [loader_record]
    return [
        record(
            "decode",
            **rates("2 views", "bare"),
            ceiling_name=f"bare decode loop, {counted(workers, 'thread')}",
            bottleneck="decode",
            details={
                **bare,
                "threads_help": ratio(windows["bare"], windows["bare, 1 thread"]),
                "host_cpu_of_bare": growth("2 views", "bare"),
            },
        ),
        record(
            "host cost",
            **host_rates(),
            ceiling_name="bare decode loop, per processor second",
            bottleneck="decode",
            details={
                "rates": "per processor second, of 2 + 6 views",
                "host_cpu_ms": {key: float(np.median(values)) for key, values in cost.items()},
                "times_1_view": {key: growth(key, "1 view") for key in engines},
                "times_2_views": growth("2 + 6 views", "2 views"),
            },
        ),
        loader_record,
    ]


def _bottleneck(windows: dict[str, list[Window]], host_crops: bool) -> tuple[str | None, dict[str, float]]:
    """What the whole loader's time goes into, in words and as figures."""
    if not host_crops:
        if "2 views" not in windows:  # an engine of others: nothing of it was measured alone
            return None, {}
        of_decode = ratio(windows["views"], windows["2 views"])
        # The device works beside the decoding threads: what is slower sets the pace.
        return ("decode" if of_decode >= 0.9 else "crop and colour on the device"), {
            "fraction_of_engine_decode": of_decode
        }
    # Everything runs on the same cores, one after the other: times add up. A loop that a busy neighbour held up would
    # look slower than the whole of which it is a part: no share is more than what is left.
    decode = min(1.0, ratio(windows["views"], windows["bare"]))
    crops = min(1.0, max(decode, ratio(windows["views"], windows["bare crops"])))
    shares = {"decode": decode, "crop": crops - decode, "colour and hand-over": 1 - crops}
    details = {"share": shares, "engine_crops_of_bare_crops": ratio(windows["crops"], windows["bare crops"])}
    largest = max(shares, key=shares.__getitem__)
    return f"{largest} ({shares[largest]:.0%} of the time)", details
