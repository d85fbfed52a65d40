"""The loader, stage by stage: what the host's decoding can give at most, what the engine makes of it, and what arrives
as views.

Three records for each setting (``details["part"]``):

``decode``      the engine with its device stage left out, beside a bare loop over the same JPEGs with the same
                binding on as many threads
``host cost``   processor time a picture for one view, for two, and for two global and six local views, or as many
                as the recipe has if that is more, when crops run on the device
``views``       a whole ``ViewLoader``: decode, crop, colour, on the device; beside what the bare loop could have fed
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from fastssl.benchmarks.harness import timing
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.setting import RecipeSetting, rates
from fastssl.benchmarks.harness.timing import Contender, Window, rate, ratio
from fastssl.errors import counted
from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import Engine, EngineSettings, Request
from fastssl.pipelines.engines.native import NativeEngine
from fastssl.pipelines.loader import Batch, ViewLoader
from fastssl.pipelines.ops.crop import boxes_of, crop_resize_host
from fastssl.pipelines.plan.draw import ViewSpec, draw_plans

#: Samples of an epoch: small files are read again and again, because a real epoch is not over after a handful of
#: batches.
_EPOCH = 65536


class DecodeEngine(NativeEngine):
    """The engine up to the decoded batch: reading, plan, decoding, the ring; nothing is rendered from it."""

    def _deliver(self, slot: object, job: object) -> list[Tensor]:
        return []


def open_loader(
    reader: BetonReader, views: Sequence[ViewSpec], batch_size: int, device: torch.device, **options: Any
) -> ViewLoader:
    """A loader whose epochs are long, however few samples the file has."""
    repeats = max(1, -(-max(_EPOCH, 16 * batch_size) // len(reader)))
    indices = np.tile(np.arange(len(reader)), repeats)
    return ViewLoader(reader, views=views, batch_size=batch_size, device=device, indices=indices, **options)


def endless(loader: ViewLoader) -> Generator[Batch, None, None]:
    """The loader's batches, epoch after epoch."""
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def requests_of(loader: ViewLoader) -> Iterator[Callable[[], Request]]:
    for epoch in itertools.count():
        for step in range(len(loader)):
            yield partial(loader.request, epoch, step)


class BareLoop:
    """Nothing but the work itself: the same JPEGs through the same binding, on ``threads`` threads that share nothing.
    It also cuts the views ``specs`` from each picture, as the engine's host crops do.
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
        cpu, done = time.thread_time(), 0
        reader, count = self.reader, len(self.reader)
        scratch = np.empty(int((reader.heights.astype(np.int64) * reader.widths).max()) * 3, np.uint8)
        outs = [np.empty((spec.count, 1, spec.size, spec.size, 3), np.uint8) for spec in self.specs]
        while done == 0 or time.perf_counter() < deadline:
            done += 1
            # Each thread begins elsewhere: two that decode the same picture would share the caches' content.
            sample = (number * count // self.threads + done) % count
            height, width = int(reader.heights[sample]), int(reader.widths[sample])
            picture = scratch[: height * width * 3].reshape(height, width, 3)
            if reader.modes[sample] == MODE_RAW:
                np.copyto(picture, reader.encoded(sample).reshape(picture.shape))
            else:
                simplejpeg.decode_jpeg(reader.encoded(sample), colorspace="RGB", buffer=picture, strict=True)
            for boxes, spec, out in zip(self.boxes, self.specs, outs):
                crop_resize_host(picture, boxes[sample], spec, out, 0)
        return done, time.thread_time() - cpu


def run(setting: RecipeSetting) -> list[Record]:
    """Measure one recipe's loader on one file.

    Of the engines ``dali`` and ``ffcv`` only the whole loader (``views``) is measured: their stages cannot be taken
    apart. A pair is one source picture with all views of the recipe, and ``median_s`` the time of one batch.
    """
    device, threads, size, engine = setting.device, setting.threads, setting.batch, setting.pipeline
    specs, on_cpu = setting.recipe.views, setting.on_cpu
    # One global view; the recipe's two; two global and many local ones. The host does not look at a view's size when
    # crops run on the device.
    count = max(6, setting.views - 2)
    many = f"2 + {count} views"
    single, pair = replace(specs[0], count=1), replace(specs[0], count=2)
    local = replace(single, size=max(8, single.size * 3 // 7), count=count, area=(0.05, 0.2))
    groups = {"1 view": [single], "2 views": [pair], many: [pair, local]} if engine == "native" else {}
    with ExitStack() as opened:
        reader, about = opened.enter_context(setting.open())
        whole = opened.enter_context(open_loader(reader, specs, size, device, workers=threads, pipeline=engine))
        contenders: dict[str, Contender] = {"bare, 1 thread": BareLoop(reader, 1), "bare": BareLoop(reader, threads)}

        def stream(start: Callable[[], Generator[Any, None, None]], engine: Engine) -> Contender:
            return partial(timing.stream_window, start, lambda batch: None, engine.stats, size, device)

        def decoding(views: list[ViewSpec]) -> Contender:
            loader = opened.enter_context(open_loader(reader, views, size, device, workers=threads, crops="device"))
            decoder = DecodeEngine(reader, views, EngineSettings(device, size, workers=threads, crops="device"))
            opened.callback(decoder.close)
            return stream(lambda: decoder.run(requests_of(loader)), decoder)

        contenders |= {name: decoding(views) for name, views in groups.items()}
        if on_cpu:
            contenders["bare crops"] = BareLoop(reader, threads, specs)
            contenders["crops"] = stream(lambda: whole.engine.run(requests_of(whole)), whole.engine)
        contenders["views"] = stream(lambda: endless(whole), whole.engine)
        windows = timing.measure_windows(contenders, seconds=setting.seconds, runs=setting.runs)

    about_run = {"data": about, "crops": "host" if on_cpu else "device", "seconds": setting.seconds}

    def record(part: str, ceiling: str, bottleneck: str | None, details: dict, rated: dict[str, float]) -> Record:
        values = {"ceiling_name": ceiling, "bottleneck": bottleneck, "details": {"part": part, **about_run, **details}}
        return setting.record("loader", pipeline=engine, workers=threads, **values, **rated)

    def of(mine: str, ceiling: str) -> dict[str, float]:
        return rates(rate(windows[mine]), size, setting.views, ratio(windows[mine], windows[ceiling]))

    words, shares = _bottleneck(windows)
    bare = {"bare_per_s": rate(windows["bare"]), "bare_per_s_1_thread": rate(windows["bare, 1 thread"])}
    waits = {"consumer_wait_share": timing.wait_share(windows["views"])}
    loop, on_threads = "bare crops" if on_cpu else "bare", counted(threads, "thread")
    ceiling = f"bare decode {'and crop loop' if on_cpu else 'loop'}, {on_threads}"
    found = [record("views", ceiling, words, {**bare, **shares, **waits}, of("views", loop))]
    if not groups:
        return found

    cost = {key: [1e3 * w.host_cpu_s / max(w.decoded, 1) for w in windows[key]] for key in ("bare", *groups)}

    def growth(key: str, base: str) -> float:
        return float(np.median([more / one for more, one in zip(cost[key], cost[base])]))

    help_of = {"threads_help": ratio(windows["bare"], windows["bare, 1 thread"])}
    decode = {**bare, **help_of, "host_cpu_of_bare": growth("2 views", "bare")}
    host: dict[str, Any] = {
        "rates": f"per processor second, of {many}",
        "host_cpu_ms": {key: median(values) for key, values in cost.items()},
        "times_1_view": {key: growth(key, "1 view") for key in groups},
        "times_2_views": growth(many, "2 views"),
    }
    # Photos a second of one core that does nothing else, with the most views; beside the bare loop's.
    alone = rates(1e3 / host["host_cpu_ms"][many], size, 2 + count, 1 / growth(many, "bare"))
    return [
        record("decode", f"bare decode loop, {on_threads}", "decode", decode, of("2 views", "bare")),
        record("host cost", "bare decode loop, per processor second", "decode", host, alone),
        *found,
    ]


def _bottleneck(windows: dict[str, list[Window]]) -> tuple[str | None, dict[str, Any]]:
    """What the whole loader's time goes into, in words and as figures."""
    if "crops" not in windows:
        if "2 views" not in windows:  # an engine of others: nothing of it was measured alone
            return None, {}
        of_decode = ratio(windows["views"], windows["2 views"])
        # The device works beside the decoding threads: what is slower sets the pace.
        words = "decode" if of_decode >= 0.9 else "crop and colour on the device"
        return words, {"fraction_of_engine_decode": of_decode}
    # Everything runs on the same cores, one after the other: times add up. A loop that a busy neighbour held up would
    # look slower than the whole of which it is a part: no share is more than what is left.
    decode = min(1.0, ratio(windows["views"], windows["bare"]))
    crops = min(1.0, max(decode, ratio(windows["views"], windows["bare crops"])))
    shares = {"decode": decode, "crop": crops - decode, "colour and hand-over": 1 - crops}
    details = {"share": shares, "engine_crops_of_bare_crops": ratio(windows["crops"], windows["bare crops"])}
    return timing.largest_share(shares), details
