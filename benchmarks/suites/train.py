"""Training end to end: the loader and the step of the real loop, and how much faster the same steps go on batches that
are there already.

The difference is the *headspace*: all that any work on the input side could win. Real and replayed windows come in
turns, and with them the loader alone. Where there is headspace, ``advice.py`` says what to do about it and what that
will bring; the loop is then run that way, too.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.setting import RecipeSetting, rates
from fastssl.benchmarks.harness.windows import (
    Contender,
    Window,
    measure_windows,
    rate,
    ratio,
    stream_window,
    wait_share,
)
from fastssl.benchmarks.suites.advice import WORTH, Loop, Remedy, in_words, more_threads, per_sample, shrunken
from fastssl.benchmarks.suites.loader import endless, open_loader
from fastssl.benchmarks.suites.step import fit_step
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import EngineStats
from fastssl.pipelines.loader import Batch, ViewLoader
from fastssl.training.bottleneck import bottleneck, data_share, smaller_side
from fastssl.utils.cores import available_cores

#: Batches that are replayed: more than one, so that no cache holds the input of a step.
_CACHED = 4


def run(setting: RecipeSetting) -> list[Record]:
    """Train for a while on one file.

    A third of the counted time goes to replayed batches, a third to the loader alone; the same time again is taken
    where there is advice to try.

    Returns:
        One record. ``details``: ``data_wait``, the share of the time for which the loop stood waiting for a batch;
        ``headspace``, how much faster (0.2: 20 %) the loop would be if data cost nothing; ``data_counted``, the share
        of data as ``pretrain`` counts it, beside the one measured in ``share``; ``advice`` in words; and its
        ``remedies`` with ``predicted`` and ``measured`` gain.
    """
    device, recipe, threads = setting.device, setting.recipe, setting.threads
    fitted = fit_step(setting)
    step, size = fitted.step, fitted.step.batch_size
    options = {"pipeline": setting.pipeline, "dtype": step.inner.view_dtype, "colour": not step.inner.takes_crops}
    options["on_bad"] = recipe.train.on_bad

    def train(batch: Batch) -> None:
        step(batch.views, batch.tables)

    def counted(window: Window) -> float:
        return data_share(
            window.seconds,
            on_cpu=setting.on_cpu,
            wait_s=window.wait_s,
            colour_s=window.colour_s,
            loader_cpu_s=window.host_cpu_s,
            step_cpu_s=window.step_cpu_s,
        )

    def loop(loader: ViewLoader, consume: Callable[[Batch], None] = train) -> Contender:
        return partial(stream_window, lambda: endless(loader), consume, loader.stats, size, device)

    with ExitStack() as opened:
        reader, about = opened.enter_context(setting.open())

        def loader_of(source: BetonReader, threads: int) -> ViewLoader:
            return opened.enter_context(open_loader(source, recipe.views, size, device, workers=threads, **options))

        loader = loader_of(reader, threads)
        batches = loader.epoch(0)
        cached = [next(batches) for _ in range(_CACHED)]
        batches.close()
        # A generator, since a stream is closed at a window's end.
        replay = partial(
            stream_window, lambda: (batch for batch in itertools.cycle(cached)), train, EngineStats(), size, device
        )
        contenders: dict[str, Contender] = {
            "real": loop(loader),
            "replay": replay,
            "loader": loop(loader, lambda batch: None),
        }
        # The same photos, smaller, through the loader alone: what decoding them would cost.
        side, small = smaller_side(reader, list(recipe.views)), None
        if side is not None:
            small = loader_of(opened.enter_context(BetonReader(opened.enter_context(shrunken(reader, side)))), threads)
            contenders["small"] = loop(small, lambda batch: None)
        windows = measure_windows(contenders, seconds=setting.seconds, runs=setting.runs)
        fraction = ratio(windows["real"], windows["replay"])
        model = Loop(
            *per_sample(windows["replay"]), *per_sample(windows["loader"]), threads=threads, cores=available_cores()
        )
        model = model.seen(per_sample(windows["real"])[0])
        tried: list[tuple[Remedy, ViewLoader]] = []
        if fraction < 1 / WORTH:
            if (found := more_threads(model)) is not None:
                tried.append((found[1], loader_of(reader, found[0])))
            if small is not None:
                gain = model.gain(model.with_loader(*per_sample(windows["small"])))
                if gain >= WORTH:
                    tried.append((Remedy(f"convert with --short-side {side}", gain), small))
        outcomes = []
        if tried:
            trials = {"before": loop(loader), **{remedy.words: loop(other) for remedy, other in tried}}
            windows_of = measure_windows(trials, seconds=setting.seconds, runs=setting.runs)
            outcomes = [ratio(windows_of[remedy.words], windows_of["before"]) for remedy, _ in tried]
    remedies = sorted(zip((remedy for remedy, _ in tried), outcomes), key=lambda pair: -pair[0].predicted)
    return [
        setting.record(
            "train",
            arch=setting.arch,
            pipeline=setting.pipeline,
            workers=threads,
            ceiling_name="the same steps on cached batches",
            **rates(rate(windows["real"]), size, setting.views, fraction),
            bottleneck=bottleneck(1 - fraction),
            details={
                **fitted.details,
                "data": about,
                "data_wait": wait_share(windows["real"]),
                "headspace": 1 / fraction - 1,
                "share": {"step": min(1.0, fraction), "data": max(0.0, 1 - fraction)},
                "data_counted": statistics.median(map(counted, windows["real"])),
                "loader_pair_per_s": rate(windows["loader"]),
                "step_pair_per_s": rate(windows["replay"]),
                "advice": in_words(1 - fraction, remedies, shared=setting.on_cpu),
                "remedies": [
                    {"do": remedy.words, "predicted": remedy.predicted, "measured": outcome}
                    for remedy, outcome in remedies
                ],
                "model": asdict(model),
            },
        )
    ]
