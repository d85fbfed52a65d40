"""What would make a training loop faster, by how much, and was that so?

A batch costs the host some processor time for its photos and some for the step; photos are decoded beside the step, on
threads of their own. So a batch takes the longest of three times: the step's alone, the loader's alone, and both
together spread over all cores. What the loop takes above that, because the two get into each other's way, is measured,
and taken to shrink with the loader's processor time. A remedy changes one of these; what it changes it to is measured
on the loader alone, and the model says what the loop will make of it. Then the loop is run with the remedy, in turns
with the loop as it was, and both figures go into the record.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastssl.benchmarks.harness.windows import Window
from fastssl.errors import counted
from fastssl.pipelines.beton.format import MIN_PAGE_SIZE
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert.encode import encode_photo
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.training.bottleneck import WORTH as WORTH_A_WORD

#: Photos that stand for the file when it is tried in another size.
_TRIED_PHOTOS = 256
#: Gains below that are not worth a word: the measurement is hardly finer.
WORTH = 1.05


@dataclass(frozen=True)
class Loop:
    """What one sample costs in the training loop, in seconds a sample.

    Attributes:
        step_s: the step on batches that are there.
        step_cpu_s: its processor time.
        loader_s: the loader alone.
        loader_cpu_s: its processor time.
        threads: that decode.
        cores: that the process may use.
        excess_s: what a sample takes above the longest of the three times.
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
        """The same with other threads: the loader's time falls with their number, down to its processor time on all
        cores.
        """
        loader_s = max(self.loader_s * self.threads / threads, self.loader_cpu_s / self.cores)
        return replace(self, loader_s=loader_s, threads=threads)

    def with_loader(self, seconds: float, cpu_s: float) -> Loop:
        """The same with a loader of other costs."""
        shrunk = min(1.0, cpu_s / self.loader_cpu_s) if self.loader_cpu_s else 1.0
        return replace(self, loader_s=seconds, loader_cpu_s=cpu_s, excess_s=shrunk * self.excess_s)

    def gain(self, other: Loop) -> float:
        """How many times as fast the loop will be as ``other``."""
        return self.sample_s / other.sample_s


@dataclass(frozen=True)
class Remedy:
    """Something to do, and what the model says of it.

    Attributes:
        words: an imperative for the reader.
        predicted: how many times as fast the loop will be.
    """

    words: str
    predicted: float


def per_sample(windows: list[Window]) -> tuple[float, float]:
    """(seconds, processor seconds) a sample: medians over windows."""
    return (
        float(np.median([window.seconds / window.samples for window in windows])),
        float(np.median([window.cpu_s / window.samples for window in windows])),
    )


def more_threads(loop: Loop) -> tuple[int, Remedy] | None:
    """The smallest number of threads that gives all there is to win by threads; None: no more than there are, or
    nothing to win.
    """
    found = {threads: loop.gain(loop.with_threads(threads)) for threads in range(loop.threads + 1, loop.cores + 1)}
    if not found or max(found.values()) < WORTH:
        return None
    threads = min(number for number, gain in found.items() if gain >= 0.98 * max(found.values()))
    more = threads - loop.threads
    return threads, Remedy(f"add {counted(more, 'decode thread')} (--workers {threads})", found[threads])


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
                with contextlib.suppress(
                    Exception
                ):  # a damaged photo, whose decoder raises anything at all: training names it, or passes over it
                    photo = encode_photo(reader.encoded(sample).tobytes(), options)
                    writer.add(photo.data, photo.height, photo.width, label=0)
        yield path


def in_words(data_share: float, remedies: list[tuple[Remedy, float]], *, shared: bool) -> str:
    """One sentence: what limits the loop, what to do, what the model said and what came of it.

    Args:
        data_share: share of the time that the loop would save if data cost nothing.
        remedies: each with the measured gain.
        shared: whether step and decoding share the cores (training on a CPU).
    """
    if data_share < WORTH_A_WORD:
        return (
            f"step-bound: data costs {max(0.0, data_share):.0%} of the time, and no work on the input side can win more"
        )
    found = ", or ".join(
        f"{remedy.words} (predicted {remedy.predicted:.2f}x, measured {outcome:.2f}x)" for remedy, outcome in remedies
    )
    if found:
        return f"data-bound {data_share:.0%}: {found}"
    why = (
        "step and decoding share all cores, and smaller photos would help little"
        if shared
        else "neither more threads nor smaller photos would help"
    )
    return f"data-bound {data_share:.0%}: {why}"
