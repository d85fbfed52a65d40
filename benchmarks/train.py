"""Training end to end: the loader and the step of the real loop, and how much faster the same steps go on batches that are there already.

The difference is the *headspace*: all that any work on the input side could win. Real and replayed windows come in turns.
"""

from __future__ import annotations

import itertools
from functools import partial

import torch

from fastssl.backbones import resolve_arch
from fastssl.benchmarks.loader import default_batch, endless, open_loader
from fastssl.benchmarks.photos import describe_data, find_data
from fastssl.benchmarks.records import Record
from fastssl.benchmarks.step import fit_step
from fastssl.benchmarks.timing import MIN_RUNS
from fastssl.benchmarks.windows import measure_windows, rate, ratio, stream_window, wait_share
from fastssl.pipelines.beton import BetonReader
from fastssl.pipelines.engine import EngineStats
from fastssl.pipelines.loader import Batch
from fastssl.recipe import Recipe
from fastssl.step import use_amp

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
) -> list[Record]:
    """Train for a while on one file.

    Args:
        data, photos: see :func:`fastssl.benchmarks.photos.find_data`.
        workers: decoding threads; default: the cores that this process may use.
        batch_size, amp, compiled: as in :func:`fastssl.benchmarks.step.run`.
        seconds: of all counted windows together, half of them replayed; warm-up comes on top.
        runs: windows of each kind, at least five.

    Returns:
        One record. ``details``: ``data_wait``, the share of the time for which the loop stood waiting for a batch, and ``headspace``, how much
        faster (0.2: 20 %) the loop would be if data cost nothing.
    """
    device = torch.device(device)
    path, name = find_data(data, photos)
    fitted = fit_step(recipe, device, default_batch(recipe, device, batch_size), amp=use_amp(amp, device), compiled=compiled)
    step, size = fitted.step, fitted.step.batch_size
    with BetonReader(path) as reader, open_loader(reader, recipe.views, size, device, workers=workers) as loader:
        batches = loader.epoch(0)
        cached = [next(batches) for _ in range(_CACHED)]
        batches.close()

        def train(batch: Batch) -> None:
            step(batch.views)

        real = partial(stream_window, lambda: endless(loader), train, loader.stats, size, device)
        replay = partial(stream_window, lambda: (batch for batch in itertools.cycle(cached)), train, EngineStats(), size, device)
        windows = measure_windows({"real": real, "replay": replay}, seconds=seconds, runs=runs)
        about, threads = describe_data(reader, name), loader.engine.workers
    fraction, waited = ratio(windows["real"], windows["replay"]), wait_share(windows["real"])
    pair_per_s, count = rate(windows["real"]), sum(spec.count for spec in recipe.views)
    return [
        Record(
            bench="train",
            recipe=recipe_name,
            arch=resolve_arch(recipe.arch),
            pipeline="native",
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
            details={**fitted.details, "data": about, "data_wait": waited, "headspace": 1 / fraction - 1},
        )
    ]


def bottleneck(data_share: float) -> str:
    """In words, from the share of the time that the loop would save if data cost nothing."""
    if data_share >= 0.05:
        return f"data ({data_share:.0%} of the time)"
    return f"step (data costs {max(0.0, data_share):.0%} of the time)"
