"""The training step alone, on views that are on the device already: no loader, no files.

Its ceiling is what the method cannot do without: the student's forward and backward pass and the teacher's forward pass over the same images. What
the step takes above that is loss, optimiser, moving average and queue. Beside it stand the step's matrix arithmetic as a share of a measured matrix
product and, on a GPU, the share of the time for which any kernel ran: what is missing there is waiting for launches.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fastssl.backbones import resolve_arch
from fastssl.benchmarks.loader import default_batch
from fastssl.benchmarks.plain_step import PlainStep
from fastssl.benchmarks.records import Record
from fastssl.benchmarks.timing import MIN_RUNS, measure_in_turns, peak_extra_bytes
from fastssl.benchmarks.windows import synchronize
from fastssl.pipelines.errors import FastSSLError
from fastssl.recipe import Recipe
from fastssl.step import TrainStep, use_amp

#: Side of the square matrices whose product stands for the device's arithmetic.
_MATMUL_CPU, _MATMUL_GPU = 1024, 8192


class Step:
    """The training loop's own step, again and again at rates that stand still.

    Args:
        recipe: arch, method and optimiser.
        batch_size: source pictures a step.
        amp: autocast to bfloat16.

    Raises:
        FastSSLError: the batch does not fit the recipe's queue or BatchNorm groups, or the network does not exist.
    """

    def __init__(self, recipe: Recipe, device: torch.device, batch_size: int, *, amp: bool, seed: int = 0):
        self.recipe = recipe = replace(recipe, train=replace(recipe.train, batch_size=batch_size))
        self.seed = seed
        self.inner = TrainStep(recipe, device, amp=amp, seed=seed)
        self.device, self.batch_size, self.amp, self.method, self.optimizer = (
            device,
            batch_size,
            amp,
            self.inner.method,
            self.inner.optimizer,
        )
        self.number = 0
        self.metrics: Tensor | None = None

    def compile(self) -> None:
        """Compile both networks at their next call; loss, optimiser and queue stay as they are."""
        self.method.student.compile()
        self.method.teacher.compile()

    def __call__(self, views: list[Tensor]) -> None:
        """Views as ``ViewLoader`` gives them. Nothing here waits for the device."""
        # A rate so small that the weights stay where they are: every run then does the same arithmetic, and none diverges.
        lr = 1e-4 * self.recipe.optim.peak_lr(self.batch_size)
        moco = self.recipe.moco
        self.metrics = self.inner(views, self.inner.permutation(0, self.number), lr=lr, momentum=moco.momentum, smoothing=moco.smoothing)
        self.number += 1

    def networks_alone(self, views: list[Tensor]) -> None:
        """The passes through the networks that a step makes, and nothing else."""
        images = views[0] if len(views) == 1 else torch.cat(views)
        with self.inner.autocast():
            embeddings = self.method.student(images)
            self.method.keys(images, self.inner.permutation(0, self.number))
        embeddings.sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1


@dataclass
class Fitted:
    """A step that was seen to run on this machine.

    Attributes:
        step, views: the step, and random views to feed it: a list of (count * B, 3, S, S) float32, channels-last.
        asked: batch size before it was halved for want of memory.
        flop: see :func:`network_flop`.
        compiled: whether the networks are compiled, and if they should be and are not, ``why_not``.
        compile_s: seconds from the first compiled call to its end.
    """

    step: Step
    views: list[Tensor]
    asked: int
    flop: int
    compiled: bool = False
    why_not: str | None = None
    compile_s: float | None = None

    @property
    def details(self) -> dict[str, object]:
        """The part of a record's details that says what ran."""
        return {
            "amp": "bf16" if self.step.amp else "off",
            "compiled": self.compiled,
            "compile_failed": self.why_not,
            "compile_s": self.compile_s,
            "asked_batch_size": self.asked,
            "tf32": torch.backends.cudnn.allow_tf32 if self.step.device.type == "cuda" and not self.step.amp else None,
            "threads": torch.get_num_threads() if self.step.device.type == "cpu" else None,
        }


def network_flop(step: Step, views: list[Tensor]) -> int:
    """Floating-point operations of a step's matrix products and convolutions in both networks, two for a multiplication with its addition.

    Counted in a forward pass, which the student and the teacher make once each; the student's backward pass is taken as two more. (torch's own count
    of a grouped convolution's backward pass forgets the groups: for depthwise networks it is several times too high.)
    """
    images = views[0] if len(views) == 1 else torch.cat(views)
    with torch.no_grad(), step.inner.autocast(), FlopCounterMode(display=False) as counter:
        step.method.student(images)
    return 4 * counter.get_total_flops()


def random_views(recipe: Recipe, batch_size: int, device: torch.device) -> list[Tensor]:
    """Standard normal numbers in the shape and layout of the recipe's views."""
    shapes = [(spec.count * batch_size, 3, spec.size, spec.size) for spec in recipe.views]
    return [torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for shape in shapes]


def fit_step(recipe: Recipe, device: torch.device, batch_size: int, *, amp: bool, compiled: bool = False) -> Fitted:
    """A step of the largest batch that fits: ``batch_size``, or half of it as often as memory runs out.

    A network that cannot be compiled here runs as it is, and the result says why.

    Raises:
        FastSSLError: not even two pictures a BatchNorm group fit.
    """
    size = batch_size
    while True:
        fitted = _try_step(recipe, device, size, amp=amp, compiled=compiled)
        if fitted is not None:
            return replace(fitted, asked=batch_size)
        # Only here, out of the exception's reach, are the tensors of the failed try nobody's.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        size //= 2
        if size < max(2, recipe.moco.split_bn):
            raise FastSSLError(f"{recipe.arch}: out of memory even with {2 * size} pictures a step on this {device.type} device")


def _try_step(recipe: Recipe, device: torch.device, batch_size: int, *, amp: bool, compiled: bool) -> Fitted | None:
    """None: out of memory."""
    try:
        step, views = Step(recipe, device, batch_size, amp=amp), random_views(recipe, batch_size, device)
        step(views)
        synchronize(device)
        fitted = Fitted(step, views, batch_size, network_flop(step, views))
        return _compile(fitted) if compiled else fitted
    except torch.OutOfMemoryError:
        return None


def _compile(fitted: Fitted) -> Fitted:
    if torch._dynamo.config.disable:
        return replace(fitted, why_not="switched off by TORCH_COMPILE_DISABLE")
    step, started = fitted.step, time.perf_counter()
    step.compile()
    try:
        step(fitted.views)
        synchronize(step.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may fail with, the eager step can still be measured
        fresh = Step(step.recipe, step.device, step.batch_size, amp=step.amp, seed=step.seed)
        return replace(fitted, step=fresh, why_not=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return replace(fitted, compiled=True, compile_s=time.perf_counter() - started)


def busy_share(run: Callable[[], object], device: torch.device) -> tuple[float, int] | None:
    """Share of a run's time for which a kernel or copy was on the GPU, and how many there were; None on a CPU, or where the profiler sees no kernels.

    What is left is the GPU waiting for the host. The profiler itself slows the host a little, so the share is a lower bound.
    """
    if device.type != "cuda":
        return None
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))
    return (busy_of_spans(spans), len(spans)) if spans else None


def busy_of_spans(spans: list[tuple[float, float]]) -> float:
    """Length of the union of ``(begin, end)`` spans, sorted by begin, over the time from the first begin to the last end."""
    covered, reached = 0.0, float("-inf")
    for begin, end in spans:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered / (reached - spans[0][0])


def run(
    recipe: Recipe,
    recipe_name: str,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    amp: str = "auto",
    compiled: bool = False,
    runs: int = MIN_RUNS,
    peers: bool = False,
) -> list[Record]:
    """Measure one recipe's training step.

    Args:
        recipe: all numbers of the step; its ``arch`` is the network.
        batch_size: default: the recipe's, at most 32 on a CPU. Halved while memory runs out; the record says so.
        amp: ``auto``, ``bf16`` or ``off``.
        compiled: compile the networks; if that fails the record says so and is of the eager step.
        runs: counted runs, at least five.
        peers: in turns with a step as public code writes it (`PlainStep`) at the same precision; with autocast also in float32.

    Returns:
        One record, and one more for each peer, whose ``ratio_to_peer`` is how many times as fast our step is. ``pair_per_s``: source pictures a second; a pair is trained on in both of its views.
    """
    device = torch.device(device)
    fitted = fit_step(recipe, device, default_batch(recipe, device, batch_size), amp=use_amp(amp, device), compiled=compiled)
    step, views = fitted.step, fitted.views
    side = _MATMUL_GPU if device.type == "cuda" else _MATMUL_CPU
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if step.amp else torch.float32) for _ in range(2))
    contenders: dict[str, Callable[[], object]] = {
        "step": lambda: step(views),
        "networks": lambda: step.networks_alone(views),
        "product": lambda: left @ right,
    }
    plain = _plain_steps(fitted) if peers else {}
    timings = measure_in_turns({**contenders, **plain}, device=device, runs=runs)
    seconds, batch = timings["step"].median_s, step.batch_size
    count = sum(spec.count for spec in recipe.views)
    fraction = timings["step"].times_faster_than(timings["networks"])
    arithmetic = fitted.flop / seconds
    product = 2 * side**3 / timings["product"].median_s
    busy = busy_share(lambda: step(views), device)
    common = {
        "bench": "step",
        "recipe": recipe_name,
        "arch": resolve_arch(recipe.arch),
        "device": device.type,
        "batch_size": batch,
        "runs": runs,
    }
    return [
        Record(
            **common,
            pair_per_s=batch / seconds,
            view_per_s=count * batch / seconds,
            median_s=seconds,
            ceiling=count * batch / seconds / fraction,
            ceiling_name="the networks' passes alone",
            fraction_of_ceiling=fraction,
            bottleneck=bottleneck(arithmetic / product, busy),
            details={
                **fitted.details,
                "peak_bytes": _peak_bytes(lambda: step(views), device),
                "cpu_s": timings["step"].median_cpu_s,
                "flop_per_pair": fitted.flop / batch,
                "flop_per_s": arithmetic,
                "product_flop_per_s": product,
                "busy_share": busy and busy[0],
                "kernels": busy and busy[1],
            },
        ),
        *(
            Record(
                **common,
                pair_per_s=batch / timings[name].median_s,
                view_per_s=count * batch / timings[name].median_s,
                median_s=timings[name].median_s,
                peer=name,
                ratio_to_peer=timings["step"].times_faster_than(timings[name]),
                details={**fitted.details, "cpu_ratio_to_peer": timings["step"].times_less_cpu_than(timings[name])},
            )
            for name in plain
        ),
    ]


def _plain_steps(fitted: Fitted) -> dict[str, Callable[[], object]]:
    """The peers by name, ready to run on the same images in NCHW memory."""
    step, recipe = fitted.step, fitted.step.recipe
    first, second = (view.contiguous() for view in fitted.views[0].chunk(2))
    lr = 1e-4 * recipe.optim.peak_lr(step.batch_size)
    found: dict[str, Callable[[], object]] = {}
    for amp in dict.fromkeys((step.amp, False)):
        plain = PlainStep(recipe, step.device, step.batch_size, amp=amp, lr=lr, seed=step.seed)
        found[f"plain MoCo step, NCHW, {'bf16 autocast' if amp else 'float32'}"] = partial(plain, first, second)
    return found


def bottleneck(arithmetic: float, busy: tuple[float, int] | None) -> str:
    """In words, from the share of the measured matrix product's rate and what ``busy_share`` found."""
    if busy is not None and busy[0] < 0.8:
        return f"launches: the GPU waits for the host {1 - busy[0]:.0%} of the step ({busy[1]:,} kernels)"
    if arithmetic >= 0.5:
        return f"arithmetic ({arithmetic:.0%} of a matrix product's rate)"
    return f"memory traffic and small operations (arithmetic at {arithmetic:.0%} of a matrix product's rate)"


def _peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """On a GPU all that is allocated at the peak of a step, weights and queue included; on a CPU what a step adds to them."""
    if device.type != "cuda":
        return peak_extra_bytes(run, device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
