"""Training end to end: the loader and the step of the real loop, and how much faster the same steps go on batches that
are there already.

The difference is the *headspace*: all that any work on the input side could win. Real and replayed windows come in
turns, and with them the loader alone. Where there is headspace, a model says what to do about it and what that will
bring; the loop is then run that way, in turns with the loop as it was, and both figures go into the record.

The model: a batch costs the host some processor time for its photos and some for the step; photos are decoded beside
the step, on threads of their own. So a batch takes the longest of three times: the step's alone, the loader's alone,
and both together spread over all cores. What the loop takes above that, because the two get into each other's way, is
measured, and taken to shrink with the loader's processor time. What a remedy changes is measured on the loader alone.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.setting import RecipeSetting, rates
from fastssl.benchmarks.harness.timing import Contender, Window, measure_windows, rate, ratio, stream_window, wait_share
from fastssl.benchmarks.suites.loader import endless, open_loader
from fastssl.benchmarks.suites.step import fit_step
from fastssl.errors import counted
from fastssl.pipelines.beton.format import MIN_PAGE_SIZE
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert.encode import encode_photo
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.engines.base import EngineStats
from fastssl.pipelines.loader import Batch, ViewLoader
from fastssl.training import bottleneck
from fastssl.utils.cores import available_cores

#: Batches that are replayed: more than one, so that no cache holds the input of a step.
_CACHED = 4
#: Photos that stand for the file when it is tried in another size.
_TRIED_PHOTOS = 256
#: Gains below that are not worth a word: the measurement is hardly finer.
WORTH = 1.05


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
    fitted = fit_step(setting, crops=True)
    step, size = fitted.step, fitted.step.batch_size
    views = {"dtype": step.inner.view_dtype, "colour": not step.inner.takes_crops}
    options = {"pipeline": setting.pipeline, "on_bad": recipe.train.on_bad, **views}

    def train(batch: Batch) -> None:
        step(batch.views, batch.tables)

    def data_counted(window: Window) -> float:
        cpu = {"loader_cpu_s": window.host_cpu_s, "step_cpu_s": window.step_cpu_s}
        waits = {"wait_s": window.wait_s, "colour_s": window.colour_s}
        return bottleneck.data_share(window.seconds, on_cpu=setting.on_cpu, **waits, **cpu)

    def loop(loader: ViewLoader, consume: Callable[[Batch], None] = train) -> Contender:
        return partial(stream_window, lambda: endless(loader), consume, loader.stats, size, device)

    def measured(contenders: dict[str, Contender]) -> dict[str, list[Window]]:
        return measure_windows(contenders, seconds=setting.seconds, runs=setting.runs)

    with ExitStack() as opened:
        reader, about = opened.enter_context(setting.open())

        def loader_of(source: BetonReader, threads: int) -> ViewLoader:
            return opened.enter_context(open_loader(source, recipe.views, size, device, workers=threads, **options))

        loader = loader_of(reader, threads)
        batches = loader.epoch(0)
        cached = [next(batches) for _ in range(_CACHED)]
        batches.close()

        def again() -> Generator[Batch, None, None]:
            yield from itertools.cycle(cached)

        replay = partial(stream_window, again, train, EngineStats(), size, device)
        alone = loop(loader, lambda batch: None)
        contenders: dict[str, Contender] = {"real": loop(loader), "replay": replay, "loader": alone}
        # The same photos, smaller, through the loader alone: what decoding them would cost.
        side, small = bottleneck.smaller_side(reader, list(recipe.views)), None
        if side is not None:
            small = loader_of(opened.enter_context(BetonReader(opened.enter_context(shrunken(reader, side)))), threads)
            contenders["small"] = loop(small, lambda batch: None)
        windows = measured(contenders)
        fraction = ratio(windows["real"], windows["replay"])
        costs = (*per_sample(windows["replay"]), *per_sample(windows["loader"]))
        model = Loop(*costs, threads=threads, cores=available_cores()).seen(per_sample(windows["real"])[0])
        tried: list[tuple[Remedy, ViewLoader]] = []
        if fraction < 1 / WORTH:
            if (found := more_threads(model)) is not None:
                tried.append((found[1], loader_of(reader, found[0])))
            if small is not None:
                gain = model.gain(model.with_loader(*per_sample(windows["small"])))
                if gain >= WORTH:
                    tried.append((Remedy(f"convert with --short-side {side}", gain), small))
        remedies: list[tuple[Remedy, float]] = []
        if tried:
            trials = measured({"before": loop(loader), **{remedy.words: loop(other) for remedy, other in tried}})
            remedies = [(remedy, ratio(trials[remedy.words], trials["before"])) for remedy, _ in tried]
            remedies.sort(key=lambda pair: -pair[0].predicted)
    details = {
        **fitted.details,
        "colours_crops": step.inner.takes_crops,
        "data": about,
        "data_wait": wait_share(windows["real"]),
        "headspace": 1 / fraction - 1,
        "share": {"step": min(1.0, fraction), "data": max(0.0, 1 - fraction)},
        "data_counted": median(map(data_counted, windows["real"])),
        "loader_pair_per_s": rate(windows["loader"]),
        "step_pair_per_s": rate(windows["replay"]),
        "advice": in_words(1 - fraction, remedies, shared=setting.on_cpu),
        "remedies": [{"do": one.words, "predicted": one.predicted, "measured": outcome} for one, outcome in remedies],
        "model": asdict(model),
    }
    record = setting.record(
        "train",
        arch=setting.arch,
        pipeline=setting.pipeline,
        workers=threads,
        ceiling_name="the same steps on cached batches",
        **rates(rate(windows["real"]), size, setting.views, fraction),
        bottleneck=bottleneck.bottleneck(1 - fraction),
        details=details,
    )
    return [record]


@dataclass(frozen=True)
class Loop:
    """What one sample costs in the training loop, in seconds: the step on batches that are there and its processor
    time, the loader alone and its, with ``threads`` that decode and ``cores`` that the process may use; ``excess_s``:
    what it takes above the longest of the three times.
    """

    step_s: float
    step_cpu_s: float
    loader_s: float
    loader_cpu_s: float
    threads: int
    cores: int
    excess_s: float = 0.0

    @property
    def sample_s(self) -> float:
        """Seconds a sample, as the model has it."""
        return max(self.step_s, self.loader_s, (self.step_cpu_s + self.loader_cpu_s) / self.cores) + self.excess_s

    def seen(self, sample_s: float) -> Loop:
        """The same, fitted to the time that the loop was seen to take."""
        return replace(self, excess_s=max(0.0, sample_s - replace(self, excess_s=0.0).sample_s))

    def with_threads(self, threads: int) -> Loop:
        """With other threads the loader's time falls, down to its processor time on all cores."""
        loader_s = max(self.loader_s * self.threads / threads, self.loader_cpu_s / self.cores)
        return replace(self, loader_s=loader_s, threads=threads)

    def with_loader(self, seconds: float, cpu_s: float) -> Loop:
        """The same with a loader of other costs."""
        shrunk = min(1.0, cpu_s / self.loader_cpu_s) if self.loader_cpu_s else 1.0
        return replace(self, loader_s=seconds, loader_cpu_s=cpu_s, excess_s=shrunk * self.excess_s)

    def gain(self, other: Loop) -> float:
        """How many times as fast the loop will be as ``other``."""
        return self.sample_s / other.sample_s


class Remedy(NamedTuple):
    """An imperative for the reader, and how many times as fast the model says that the loop will then be."""

    words: str
    predicted: float


def per_sample(windows: Sequence[Window]) -> tuple[float, float]:
    """(seconds, processor seconds) a sample: medians over windows."""
    seconds, cpu = zip(*((window.seconds / window.samples, window.cpu_s / window.samples) for window in windows))
    return median(seconds), median(cpu)


def more_threads(loop: Loop) -> tuple[int, Remedy] | None:
    """The smallest number of threads that wins all that threads can; None: nothing to win, or no cores left."""
    found = {threads: loop.gain(loop.with_threads(threads)) for threads in range(loop.threads + 1, loop.cores + 1)}
    if not found or max(found.values()) < WORTH:
        return None
    threads = min(number for number, gain in found.items() if gain >= 0.98 * max(found.values()))
    more = counted(threads - loop.threads, "decode thread")
    return threads, Remedy(f"add {more} (--workers {threads})", found[threads])


@contextmanager
def shrunken(reader: BetonReader, side: int) -> Iterator[Path]:
    """Some of the file's photos as ``convert-imagenet --short-side`` would store them, in a temporary file."""
    with tempfile.TemporaryDirectory(prefix="fastssl-bench-") as folder:
        path, options = Path(folder) / "shrunken.beton", ConvertOptions(short_side=side)
        count = min(_TRIED_PHOTOS, len(reader))
        # Spread over the file: photos are often stored class by class, and classes differ in size.
        samples = np.linspace(0, len(reader) - 1, count).round().astype(int)
        with BetonWriter(path, count, page_size=MIN_PAGE_SIZE) as writer:
            for sample in samples.tolist():
                with suppress(Exception):  # decoders raise anything for damaged photos, which training will name
                    photo = encode_photo(reader.encoded(sample).tobytes(), options)
                    writer.add(photo.data, photo.height, photo.width, label=0)
        yield path


def in_words(data_share: float, remedies: list[tuple[Remedy, float]], *, shared: bool) -> str:
    """One sentence: what limits the loop, what to do, what the model said and what came of it, from the share of the
    time that the loop would save if data cost nothing and the remedies, each with the measured gain. ``shared``: step
    and decoding share the cores (training on a CPU).
    """
    if data_share < bottleneck.WORTH:
        share = max(0.0, data_share)
        return f"step-bound: data costs {share:.0%} of the time, and no work on the input side can win more"
    found = "neither more threads nor smaller photos would help"
    if shared:
        found = "step and decoding share all cores, and smaller photos would help little"
    if remedies:
        found = ", or ".join(
            f"{remedy.words} (predicted {remedy.predicted:.2f}x, measured {outcome:.2f}x)"
            for remedy, outcome in remedies
        )
    return f"data-bound {data_share:.0%}: {found}"
