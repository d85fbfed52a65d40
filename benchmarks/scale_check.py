"""The simulator held against this machine: its parts are measured alone, the loop is predicted from them, and the loop is measured.

    engine    decoding and cropping on their threads, nothing done with the crops
    colour    the consumer's colour operations on crops that are there
    step      the training step on coloured batches that are there
    read      the photos' bytes, as the file gives them
    real      all of it, as training does it

All come in turns. The parts are counted in processor time, which a neighbour on the same cores hardly stretches; the loop is not, and goes on until it had enough
windows in which others left the cores alone. Its quietest windows count, whatever came out; what others took even there is taken off the model's cores.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fastssl.backbones import resolve_arch
from fastssl.benchmarks.loader import endless, open_loader
from fastssl.benchmarks.photos import describe_data, find_data
from fastssl.benchmarks.records import Record
from fastssl.benchmarks.scale import Cluster, Outcome, simulate
from fastssl.benchmarks.step import fit_step
from fastssl.benchmarks.timing import MIN_RUNS
from fastssl.benchmarks.windows import Contender, Window, stream_window
from fastssl.pipelines.augment import augment
from fastssl.pipelines.beton import BetonReader
from fastssl.pipelines.engine import EngineStats
from fastssl.pipelines.errors import counted
from fastssl.pipelines.loader import Batch, ViewLoader
from fastssl.pipelines.memory import RecycledMemory
from fastssl.pipelines.native import available_cores
from fastssl.recipe import Recipe, load_recipe

#: Cores that others may use in a window that is called quiet, and windows of the loop that are made at most for each one that counts.
_QUIET, _MOST_TURNS = 0.1, 8
#: Batches that are replayed: more than one, so that no cache holds what a call reads.
_CACHED = 4
RECIPE = "few-photos-moco"


@dataclass(frozen=True)
class Situation:
    """A loop to predict: a network, the side of its views in pixels, decoding threads, threads of the step, and samples a batch."""

    arch: str
    size: int
    workers: int
    threads: int = 1
    batch: int = 64

    @property
    def words(self) -> str:
        decoders, step = (counted(count, "thread") for count in (self.workers, self.threads))
        return f"{self.arch}, {self.size} px, decoding on {decoders}, step on {step}"

    def recipe(self) -> Recipe:
        recipe = load_recipe(RECIPE, {"arch": self.arch, "views.0.size": str(self.size), "zero_init_residual": "false"})
        return replace(recipe, **{recipe.method: recipe.settings.scaled(self.batch)})


#: From bound by decoding to bound by the step, with cores for all threads and without.
SITUATIONS = (
    Situation("lcnet_035", 32, 1),
    Situation("lcnet_035", 32, 2),
    Situation("lcnet_035", 64, 1),
    Situation("lcnet_035", 64, 2),
    Situation("lcnet_035", 112, 1),
    Situation("resnet10t", 64, 1),
    Situation("resnet10t", 64, 2),
    Situation("lcnet_035", 64, 1, threads=2),
    Situation("lcnet_035", 112, 2, threads=2),
)


@dataclass(frozen=True)
class Parts:
    """What each part costs alone, in processor seconds a sample; ``image_bytes`` and ``read_rate`` in bytes (a second)."""

    engine_cpu_s: float
    colour_cpu_s: float
    step_cpu_s: float
    image_bytes: float
    read_rate: float


def cluster_of(parts: Parts, situation: Situation, cores: int, others: float = 0.0) -> Cluster:
    """One process on one machine without a GPU, whose step shares the ``cores`` with the decoders, and with other programs that use ``others`` of them."""
    colour_threads, step_threads = min(situation.workers, cores), min(situation.threads, cores)
    return Cluster(
        hosts=1,
        gpus=1,
        cores=cores,
        others=min(others, cores - 0.25),  # they cannot have had all: the loop ran
        workers=situation.workers,
        batch=situation.batch,
        image_bytes=parts.image_bytes,
        decode_s=parts.engine_cpu_s,
        disk_rate=parts.read_rate,
        gpu_rate=step_threads / parts.step_cpu_s,
        gpu_fixed_s=0.0,
        colour_s=parts.colour_cpu_s / colour_threads,
        colour_threads=colour_threads,
        step_threads=step_threads,
        jitter=0.0,
        checkpoint_s=0.0,
        host_mtbf_s=1e12,
    )


def predict(parts: Parts, situation: Situation, cores: int, others: float = 0.0) -> Outcome:
    """What the simulator makes of the parts."""
    return simulate(cluster_of(parts, situation, cores, others))


def run(situation: Situation, data: str = "synthetic", seconds: float = 10.0, runs: int = MIN_RUNS, photos: int = 512) -> list[Record]:
    """Measure the parts and the loop on the CPU in turns.

    Args:
        data, photos: see :func:`fastssl.benchmarks.photos.find_data`.
        seconds: of all windows that count together, a fifth of them the loop's; the loop's other windows and warm-up come on top.
        runs: windows of each kind that count, at least five.

    Returns:
        One record. ``details``: ``parts`` and ``predicted`` (images/s, shares of the time, limit) from the parts' medians; ``predicted_over_measured``, against the
        loop's median, and its ``range`` over the loop's windows; ``others``, the cores that other processes used in those windows (median).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(situation.threads)
    try:
        return _run(situation, data, seconds, runs, photos)
    finally:
        torch.set_num_threads(before)


def _run(situation: Situation, data: str, seconds: float, runs: int, photos: int) -> list[Record]:
    device, recipe = torch.device("cpu"), situation.recipe()
    fitted = fit_step(recipe, device, situation.batch, amp=False)
    step, batch = fitted.step, fitted.step.batch_size
    situation = replace(situation, batch=batch)
    path, name = find_data(data, photos)

    def train(loaded: Batch) -> None:
        step(loaded.views, loaded.tables)

    with ExitStack() as opened:
        reader = opened.enter_context(BetonReader(path))

        def loader_of(colour: bool) -> ViewLoader:
            return opened.enter_context(open_loader(reader, recipe.views, batch, device, workers=situation.workers, colour=colour))

        loader, crops = loader_of(True), loader_of(False)
        cached = list(itertools.islice(loader.epoch(0), _CACHED))
        pool = opened.enter_context(ThreadPoolExecutor(situation.workers))
        coloured = _colouring(crops, pool)
        contenders = {
            "real": partial(stream_window, lambda: endless(loader), train, loader.stats, batch, device),
            "engine": partial(stream_window, lambda: endless(crops), lambda _: None, crops.stats, batch, device),
            "colour": partial(stream_window, lambda: itertools.repeat(None), lambda _: coloured(), EngineStats(), batch, device),
            "step": partial(stream_window, lambda: itertools.cycle(cached), train, EngineStats(), batch, device),
            "read": partial(_read, reader),
        }
        windows, others = quiet_windows({key: _closable(run) for key, run in contenders.items()}, seconds=seconds, runs=runs)
        about = describe_data(reader, name)
    return [_record(situation, recipe, windows, about, runs, others)]


def _record(situation: Situation, recipe: Recipe, windows: dict[str, list[Window]], about: dict, runs: int, others: float) -> Record:
    cores = available_cores()
    cpu = {key: statistics.median(window.cpu_s / window.samples for window in found) for key, found in windows.items()}
    wall = {key: statistics.median(window.seconds / window.samples for window in found) for key, found in windows.items()}
    parts = Parts(cpu["engine"], cpu["colour"], cpu["step"], about["bytes"], about["bytes"] / cpu["read"])
    predicted = predict(parts, situation, cores, others)
    ratios = sorted(predicted.images_per_s * window.seconds / window.samples for window in windows["real"])
    off = predicted.images_per_s * wall["real"]
    pair_per_s, count, fraction = 1 / wall["real"], sum(spec.count for spec in recipe.views), wall["step"] / wall["real"]
    return Record(
        bench="scale",
        recipe=RECIPE,
        arch=resolve_arch(situation.arch),
        pipeline="native",
        device="cpu",
        batch_size=situation.batch,
        workers=situation.workers,
        pair_per_s=pair_per_s,
        view_per_s=count * pair_per_s,
        median_s=situation.batch / pair_per_s,
        runs=runs,
        ceiling=count * pair_per_s / fraction,
        ceiling_name="the same steps on cached batches",
        fraction_of_ceiling=fraction,
        bottleneck=f"predicted {predicted.images_per_s:,.0f} pair/s, {off:.2f} of what was measured; limit: {predicted.limit}",
        details={
            "part": "check",
            "size": situation.size,
            "data": about,
            "cores": cores,
            "threads": situation.threads,
            "parts": asdict(parts),
            "others": others,
            "predicted": asdict(predicted),
            "predicted_over_measured": off,
            "range": [ratios[0], ratios[-1]],
        },
    )


def _colouring(crops: ViewLoader, pool: ThreadPoolExecutor) -> Callable[[], None]:
    """Colours one batch of crops that is there, as the loader does it."""
    stream = crops.epoch(0)
    batches = [(next(stream).views, crops.request(0, number).plans) for number in range(_CACHED)]
    stream.close()
    memory, turn = [RecycledMemory() for _ in crops.views], itertools.cycle(batches)

    def call() -> None:
        views, plans = next(turn)
        for pixels, plan, spec, kept in zip(views, plans, crops.views, memory):
            augment(pixels, plan.reshape(-1), spec, crops.dtype, pool, kept)

    return call


def _read(reader: BetonReader, seconds: float) -> Window:
    """Photos' bytes copied out of the file, in a random order."""
    order = torch.randperm(len(reader), generator=torch.Generator().manual_seed(0)).tolist()
    cpu, started = time.process_time(), time.perf_counter()
    for count, sample in enumerate(itertools.cycle(order), 1):
        reader.encoded(sample).tobytes()
        if time.perf_counter() - started >= seconds:
            return Window(time.perf_counter() - started, count, cpu_s=time.process_time() - cpu)
    raise AssertionError("an endless loop has ended")


def quiet_windows(contenders: dict[str, Contender], *, seconds: float, runs: int) -> tuple[dict[str, list[Window]], float]:
    """(``runs`` windows of each contender, in turns after a short one; the median number of cores that others used in those of ``real``).

    Of ``real`` there are more windows, until enough were quiet, and the quietest are returned.

    Args:
        seconds: for the windows that are returned together.
    """
    length, found = seconds / (runs * len(contenders)), {key: [] for key in contenders}
    for run in contenders.values():
        run(length / 4)
    real: list[tuple[float, Window]] = []
    for number in range(_MOST_TURNS * runs):
        for key in (contenders if number % 2 == 0 else reversed(contenders)) if number < runs else ("real",):
            before, started = foreign_s(), time.perf_counter()
            window = contenders[key](length)
            found[key].append(window)
            if key == "real":
                real.append((max(0.0, foreign_s() - before) / (time.perf_counter() - started), window))
        if number + 1 >= runs and sum(others <= _QUIET for others, _ in real) >= runs:
            break
    real = sorted(real, key=lambda pair: pair[0])[:runs]
    found["real"] = [window for _, window in real]
    return found, statistics.median(others for others, _ in real)


def foreign_s() -> float:
    """Processor seconds that all other processes of this computer have used, from Linux; 0 elsewhere, where every window is taken for quiet."""
    try:
        words = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def _closable(run: Callable[[float], Window]) -> Callable[[float], Window]:
    """``stream_window`` closes its stream, which only a generator can be asked to do."""
    if isinstance(run, partial) and run.func is stream_window:
        start, *rest = run.args

        def generator() -> Iterator:
            yield from start()

        return partial(stream_window, generator, *rest)
    return run
