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

import torch

from fastssl.benchmarks.harness.photos import describe_data, find_data
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.timing import MIN_RUNS
from fastssl.benchmarks.harness.windows import Window, measure_windows, rate, ratio, stream_window, wait_share
from fastssl.benchmarks.suites.advice import WORTH, Loop, Remedy, in_words, more_threads, per_sample, shrunken
from fastssl.benchmarks.suites.loader import default_batch, endless, open_loader
from fastssl.benchmarks.suites.step import fit_step
from fastssl.config.recipe import Recipe
from fastssl.distributed.devices import use_amp
from fastssl.models.backbones import resolve_arch
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import EngineStats
from fastssl.pipelines.loader import Batch, ViewLoader
from fastssl.training.bottleneck import bottleneck, data_share, smaller_side
from fastssl.utils.cores import available_cores

#: Batches that are replayed: more than one, so that no cache holds the input of a step.
_CACHED = 4


def run(
    recipe: Recipe,
    recipe_name: str,
    data: str = "synthetic",
    device: torch.device | str = "cpu",
    workers: int | None = None,
    batch_size: int | None = None,
    amp: str = "auto",
    compiled: bool = False,
    seconds: float = 10.0,
    runs: int = MIN_RUNS,
    photos: int = 512,
    graph: bool = False,
    pipeline: str = "native",
) -> list[Record]:
    """Train for a while on one file.

    Args:
        data, photos: see :func:`fastssl.benchmarks.harness.photos.find_data`.
        workers: decoding threads; default: the cores that this process may use.
        batch_size, amp, compiled, graph: as in :func:`fastssl.benchmarks.suites.step.run`.
        seconds: of all counted windows together, a third of them replayed, a third the loader alone; warm-up comes on
            top, and the same time again where there is advice to try.
        runs: windows of each kind, at least five.
        pipeline: the engine.

    Returns:
        One record. ``details``: ``data_wait``, the share of the time for which the loop stood waiting for a batch;
            ``headspace``, how much
        faster (0.2: 20 %) the loop would be if data cost nothing; ``data_counted``, the share of data as ``pretrain``
        counts it, beside the one measured in ``share``; ``advice`` in words; and its ``remedies`` with ``predicted``
        and ``measured`` gain.
    """
    device = torch.device(device)
    path, name = find_data(data, photos)
    size = default_batch(recipe, device, batch_size)
    fitted = fit_step(recipe, device, size, amp=use_amp(amp, device), compiled=compiled, graph=graph)
    step, size = fitted.step, fitted.step.batch_size
    options = {"pipeline": pipeline, "dtype": step.inner.view_dtype, "colour": not step.inner.takes_crops}
    options["on_bad"] = recipe.train.on_bad

    def train(batch: Batch) -> None:
        step(batch.views, batch.tables)

    def counted(window: Window) -> float:
        return data_share(
            window.seconds,
            on_cpu=device.type == "cpu",
            wait_s=window.wait_s,
            colour_s=window.colour_s,
            loader_cpu_s=window.host_cpu_s,
            step_cpu_s=window.step_cpu_s,
        )

    def loop(loader: ViewLoader, consume: Callable[[Batch], None] = train) -> Callable[[float], Window]:
        return partial(stream_window, lambda: endless(loader), consume, loader.stats, size, device)

    with ExitStack() as opened:
        reader = opened.enter_context(BetonReader(path))

        def loader_of(source: BetonReader, threads: int | None) -> ViewLoader:
            return opened.enter_context(open_loader(source, recipe.views, size, device, workers=threads, **options))

        loader = loader_of(reader, workers)
        threads = workers or available_cores()
        batches = loader.epoch(0)
        cached = [next(batches) for _ in range(_CACHED)]
        batches.close()
        replay = partial(
            stream_window, lambda: (batch for batch in itertools.cycle(cached)), train, EngineStats(), size, device
        )
        contenders = {"real": loop(loader), "replay": replay, "loader": loop(loader, lambda batch: None)}
        # The same photos, smaller, through the loader alone: what decoding them would cost.
        side, small = smaller_side(reader, recipe.views), None
        if side is not None:
            small = loader_of(opened.enter_context(BetonReader(opened.enter_context(shrunken(reader, side)))), threads)
            contenders["small"] = loop(small, lambda batch: None)
        windows = measure_windows(contenders, seconds=seconds, runs=runs)
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
        outcomes = _try(loop(loader), [loop(other) for _, other in tried], seconds, runs)
        about = describe_data(reader, name)
    remedies = sorted(zip((remedy for remedy, _ in tried), outcomes), key=lambda pair: -pair[0].predicted)
    pair_per_s, count = rate(windows["real"]), sum(spec.count for spec in recipe.views)
    return [
        Record(
            bench="train",
            recipe=recipe_name,
            arch=resolve_arch(recipe.arch),
            pipeline=pipeline,
            device=device.type,
            batch_size=size,
            workers=threads,
            pair_per_s=pair_per_s,
            view_per_s=count * pair_per_s,
            median_s=size / pair_per_s,
            runs=runs,
            ceiling=count * pair_per_s / fraction,
            ceiling_name="the same steps on cached batches",
            fraction_of_ceiling=fraction,
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
                "advice": in_words(1 - fraction, remedies, shared=device.type == "cpu"),
                "remedies": [
                    {"do": remedy.words, "predicted": remedy.predicted, "measured": outcome}
                    for remedy, outcome in remedies
                ],
                "model": asdict(model),
            },
        )
    ]


def _try(
    before: Callable[[float], Window], after: list[Callable[[float], Window]], seconds: float, runs: int
) -> list[float]:
    """How many times as fast the loop is with each remedy, in turns with the loop as it was."""
    if not after:
        return []
    windows = measure_windows(
        {"before": before, **{str(number): run for number, run in enumerate(after)}}, seconds=seconds, runs=runs
    )
    return [ratio(windows[str(number)], windows["before"]) for number in range(len(after))]
