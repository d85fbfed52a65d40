"""The training step alone, on views that are on the device already: no loader, no files.

Its ceiling is a roofline (``roofline.py``) over both networks' layers, at the rates of a matrix product and of a large
copy that are measured in the same turns. Where the time goes is measured too: the networks' passes alone, optimiser and
moving average alone, and what is left for loss and queue; on a GPU also the share of the time for which any kernel ran:
what is missing there is waiting for launches.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastssl.benchmarks.harness.limits import copy_bytes, copy_call, product_call, product_flop
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.roofline import Cost, forward_cost
from fastssl.benchmarks.harness.timing import MIN_RUNS, Timing, measure_in_turns, peak_extra_bytes
from fastssl.benchmarks.harness.windows import synchronize
from fastssl.benchmarks.suites.loader import default_batch
from fastssl.benchmarks.suites.plain_step import PlainStep, has_peer
from fastssl.config.recipe import Recipe
from fastssl.distributed.devices import use_amp
from fastssl.errors import FastSSLError
from fastssl.models.backbones import resolve_arch
from fastssl.optim.optimizers import create_optimizer
from fastssl.optim.schedules import RunLength
from fastssl.pipelines.ops.augment import parameter_table
from fastssl.pipelines.plan.draw import draw_plans
from fastssl.training.step import TrainStep
from fastssl.utils.transfer import to_device

#: Runs of the optimiser alone, which takes milliseconds.
_UPDATE_RUNS = 21


class Step:
    """The training loop's own step, again and again at rates that stand still.

    Args:
        recipe: arch, method and optimiser.
        batch_size: source pictures a step.
        amp: autocast to bfloat16.
        compiled, graph: turn the recipe's switches of those names on.

    Raises:
        FastSSLError: the batch does not fit the recipe's queue or BatchNorm groups, or the network does not exist.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        batch_size: int,
        *,
        amp: bool,
        compiled: bool = False,
        graph: bool = False,
        seed: int = 0,
    ):
        train = recipe.train
        # A batch smaller than the recipe's may have no parts of two samples and more.
        parts = train.accumulate if batch_size % train.accumulate == 0 and batch_size >= 2 * train.accumulate else 1
        train = replace(
            train,
            batch_size=batch_size,
            accumulate=parts,
            compile=compiled or train.compile,
            graph=graph or train.graph,
        )
        self.recipe = recipe = replace(recipe, train=train)
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

    def __call__(self, views: list[Tensor], tables: Sequence[Tensor] = ()) -> None:
        """Views (and colour tables) as ``ViewLoader`` gives them. Nothing here waits for the device."""
        self.metrics = self.inner(views, self.inner.noise(0, self.number), self.rates, tables=tables)
        self.number += 1

    @property
    def rates(self) -> dict[str, float]:
        """Those of the first step, but for smoothing, which is there in full, and a learning rate so small that the
        weights stay where they are: every run then does the same arithmetic, and none diverges.
        """
        scheduled = self.inner.rates(0, RunLength(1, 1))
        # Nothing is frozen, no queue is filled: the step of most epochs.
        found = {name: False if isinstance(value, bool) else value for name, value in scheduled.items()}
        found["lr"] = self.small_lr
        if "smoothing" in found:
            found["smoothing"] = self.recipe.settings.smoothing
        return found

    @property
    def small_lr(self) -> float:
        """A ten-thousandth of the peak."""
        return 1e-4 * self.recipe.optim.peak_lr(self.batch_size)

    def networks_alone(self, views: list[Tensor]) -> None:
        """The passes through the networks that a step makes, and nothing else but the teacher's targets."""
        method, parts = self.method, self.recipe.train.accumulate
        images, noise = method.images(views), self.inner.noise(0, self.number)
        with self.inner.autocast():
            method.targets(images, noise, self.rates)
        for part in range(parts):
            if method.student.drop is not None:
                method.student.drop.coins = self.inner.part_of(noise["drop_path"].t(), part).t()
            with self.inner.autocast():
                embeddings = method.encode(*self._student_pass([self.inner.part_of(rows, part) for rows in images]))
            embeddings.sum().backward()
        self.inner.clear_gradients()
        self.number += 1

    def update_alone(self) -> None:
        """Optimiser and moving average over whatever gradients there are, and nothing else."""
        self.inner.update(self.rates)

    def cost(self, views: list[Tensor]) -> Cost:
        """The least work of the networks in a step: the student's pass, its backward pass taken as two more, and the
        teacher's.
        """
        itemsize, images = 2 if self.amp else 4, self.method.images(views)
        with self.inner.autocast():
            found = forward_cost(self.method.student, self._student_pass(images)[0], itemsize) * 3
            if self.method.teacher is None:
                return found
            seen = images[0][: self.method.teacher_views * self.batch_size]
            return found + forward_cost(self.method.teacher, seen, itemsize)

    def _student_pass(self, images: list[Tensor]) -> tuple[list[Tensor], int]:
        """What the student's pass is over, of all views of a part of the batch, and how many rows it leaves out."""
        rows = self.method.views.count * self.batch_size
        hidden = self.method.hidden_views * self.batch_size * sum(map(len, images)) // rows
        return [images[0][hidden:], *images[1:]], hidden


@dataclass
class Fitted:
    """A step that was seen to run on this machine.

    Attributes:
        step, views: the step, and random views for its networks: a list of (count * B, 3, S, S) channels-last.
        inputs: what the step is called with: ``views``, or uint8 crops with their colour tables where it colours them
            itself.
        asked: batch size before it was halved for want of memory.
        cost: of a step's passes through the networks.
        first_s: seconds of the first call, in which libraries choose kernels, networks are compiled and the step is
            recorded.
    """

    step: Step
    views: list[Tensor]
    asked: int
    cost: Cost
    first_s: float = 0.0
    inputs: tuple[list[Tensor], list[Tensor]] = ([], [])

    @property
    def details(self) -> dict[str, object]:
        """The part of a record's details that says what ran."""
        train, fallbacks = self.step.recipe.train, self.step.inner.fallbacks
        return {
            "amp": "bf16" if self.step.amp else "off",
            "compiled": train.compile and "compile" not in fallbacks,
            "graph": train.graph and "graph" not in fallbacks,
            "fallbacks": fallbacks,
            "colours_crops": bool(self.inputs[1]),
            "first_s": self.first_s,
            "accumulate": train.accumulate,
            "asked_batch_size": self.asked,
            "tf32": torch.backends.cudnn.allow_tf32 if self.step.device.type == "cuda" and not self.step.amp else None,
            "threads": torch.get_num_threads() if self.step.device.type == "cpu" else None,
        }


def random_views(recipe: Recipe, batch_size: int, device: torch.device) -> list[Tensor]:
    """Standard normal numbers in the shape and layout of the recipe's views."""
    shapes = [(spec.count * batch_size, 3, spec.size, spec.size) for spec in recipe.views]
    return [torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for shape in shapes]


def random_crops(recipe: Recipe, batch_size: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Random bytes in the shape and layout of the recipe's crops, and the colour tables of a drawn plan, as a loader
    with ``colour=False`` gives them.
    """
    crops, side = [], np.full(batch_size, 512)
    for spec in recipe.views:
        shape = (spec.count * batch_size, 3, spec.size, spec.size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        crops.append(pixels.contiguous(memory_format=torch.channels_last))
    plans = draw_plans(recipe.views, 0, 0, np.arange(batch_size), side, side)
    return crops, [to_device(parameter_table(plan.reshape(-1)), device) for plan in plans]


def fit_step(
    recipe: Recipe, device: torch.device, batch_size: int, *, amp: bool, compiled: bool = False, graph: bool = False
) -> Fitted:
    """A step of the largest batch that fits: ``batch_size``, or half of it as often as memory runs out.

    A network that cannot be compiled or recorded here runs as it is, and the result's details say why.

    Raises:
        FastSSLError: not even two pictures a BatchNorm group fit.
    """
    size = batch_size
    while True:
        fitted = _try_step(recipe, device, size, amp=amp, compiled=compiled, graph=graph)
        if fitted is not None:
            return replace(fitted, asked=batch_size)
        # Only here, out of the exception's reach, are the tensors of the failed try nobody's.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        size //= 2
        if size < max(2, recipe.settings.groups):
            raise FastSSLError(
                f"{recipe.arch}: out of memory even with {2 * size} pictures a step on this {device.type} device"
            )


def _try_step(
    recipe: Recipe, device: torch.device, batch_size: int, *, amp: bool, compiled: bool, graph: bool
) -> Fitted | None:
    """None: out of memory."""
    try:
        step = Step(recipe, device, batch_size, amp=amp, compiled=compiled, graph=graph)
        views = [view.to(step.inner.view_dtype) for view in random_views(recipe, batch_size, device)]
        inputs = random_crops(recipe, batch_size, device) if step.inner.takes_crops else (views, [])
        started = time.perf_counter()
        step(*inputs)
        synchronize(device)
        first_s = time.perf_counter() - started
        return Fitted(step, views, batch_size, step.cost(views), first_s, inputs)
    except torch.OutOfMemoryError:
        return None


def busy_share(run: Callable[[], object], device: torch.device) -> tuple[float, int] | None:
    """Share of a run's time for which a kernel or copy was on the GPU, and how many there were; None on a CPU, or where
    the profiler sees no kernels.

    What is left is the GPU waiting for the host. The profiler itself slows the host a little, so the share is a lower
    bound.
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
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    return (busy_of_spans(spans), len(spans)) if spans else None


def busy_of_spans(spans: list[tuple[float, float]]) -> float:
    """Length of the union of ``(begin, end)`` spans, sorted by begin, over the time from the first begin to the last
    end.
    """
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
    graph: bool = False,
) -> list[Record]:
    """Measure one recipe's training step.

    Args:
        recipe: all numbers of the step; its ``arch`` is the network.
        batch_size: default: the recipe's, at most 32 on a CPU. Halved while memory runs out; the record says so.
        amp: ``auto``, ``bf16`` or ``off``.
        compiled, graph: compile the networks; record the step as a CUDA graph. If that fails the record says so and is
            of the step without it.
        runs: counted runs, at least five.
        peers: in turns with a step as public code writes it (`PlainStep`) at the same precision, with autocast also in
            float32; and its optimiser and moving average with ours.

    Returns:
        One record, and one more for each peer, whose ``ratio_to_peer`` is how many times as fast ours is.
        ``pair_per_s``: source pictures a second; a pair is trained on in both of its views.
    """
    device = torch.device(device)
    if peers and not has_peer(recipe):
        raise FastSSLError(
            f"{recipe_name}: the peers are steps of MoCo with two views of one kind; bench step without "
            "--peers measures any recipe"
        )
    size = default_batch(recipe, device, batch_size)
    fitted = fit_step(recipe, device, size, amp=use_amp(amp, device), compiled=compiled, graph=graph)
    step, views = fitted.step, fitted.views
    contenders: dict[str, Callable[[], object]] = {
        "step": lambda: step(*fitted.inputs),
        "networks": lambda: step.networks_alone(views),
        "product": product_call(device, torch.bfloat16 if step.amp else torch.float32),
        "copy": copy_call(device),
    }
    plain = _plain_steps(fitted) if peers else {}
    timings = measure_in_turns({**contenders, **plain}, device=device, runs=runs)
    # Apart from the steps: the gradients that it works on lie in memory that a step would want.
    updates = _measure_updates(step, runs, peers)
    batch, count = step.batch_size, sum(spec.count for spec in recipe.views)
    flop_per_s, bytes_per_s = (
        product_flop(device) / timings["product"].median_s,
        copy_bytes(device) / timings["copy"].median_s,
    )
    least_s = fitted.cost.seconds(flop_per_s, bytes_per_s)
    common = {
        "bench": "step",
        "recipe": recipe_name,
        "arch": resolve_arch(recipe.arch),
        "device": device.type,
        "batch_size": batch,
        "runs": runs,
    }

    def record(timing: Timing, **values: Any) -> Record:
        seconds = timing.median_s
        limits = {
            "ceiling": count * batch / least_s,
            "ceiling_name": CEILING_NAME,
            "fraction_of_ceiling": least_s / seconds,
        }
        rates = {"pair_per_s": batch / seconds, "view_per_s": count * batch / seconds, "median_s": seconds}
        return Record(**{**common, **rates, **limits, **values})

    ours, arithmetic = timings["step"], fitted.cost.flop / timings["step"].median_s
    networks, update = 1 / timings["networks"].times_faster_than(ours), updates["ours"].median_s / ours.median_s
    busy = busy_share(lambda: step(*fitted.inputs), device)
    records = [
        record(
            ours,
            bottleneck=bottleneck(arithmetic / flop_per_s, busy),
            details={
                **fitted.details,
                # The parts are run as they are written: beside a recorded step their shares would say nothing.
                "share": None if step.inner.recorded else _shares(networks, update),
                "networks_fraction": networks,
                "peak_bytes": _peak_bytes(lambda: step(*fitted.inputs), device, step.inner.recorded),
                "cpu_s": ours.median_cpu_s,
                "flop_per_pair": fitted.cost.flop / batch,
                "bytes_per_pair": fitted.cost.bytes / batch,
                "flop_per_s": arithmetic,
                "product_flop_per_s": flop_per_s,
                "copy_bytes_per_s": bytes_per_s,
                "busy_share": busy and busy[0],
                "kernels": busy and busy[1],
            },
        )
    ]
    for name in plain:
        faster, less_cpu = ours.times_faster_than(timings[name]), ours.times_less_cpu_than(timings[name])
        records.append(
            record(
                timings[name],
                peer=name,
                ratio_to_peer=faster,
                details={**fitted.details, "cpu_ratio_to_peer": less_cpu},
            )
        )
    if peers:
        records.append(_update_record(step, updates, common))
    return records


#: What a step's rate is held against.
CEILING_NAME = "roofline of both networks' layers"


def _shares(networks: float, update: float) -> dict[str, float]:
    """Where a step's time goes. The parts were measured alone: together they may come to more than the whole, and are
    then scaled to it.
    """
    total = max(1.0, networks + update)
    shares = {"networks": networks / total, "optimiser and moving average": update / total}
    return {**shares, "loss, queue, metrics": max(0.0, 1 - sum(shares.values()))}


def _measure_updates(step: Step, runs: int, peers: bool = True) -> dict[str, Timing]:
    """Optimiser and moving average on gradients that stay: ours; with ``peers`` in turns with the loops over tensors
    and with one flat tensor.
    """
    _fill_gradients(step.method.student)
    contenders = {"ours": step.update_alone, **(_update_peers(step) if peers else {})}
    timings = measure_in_turns(contenders, device=step.device, runs=max(runs, _UPDATE_RUNS))
    step.inner.clear_gradients()
    return timings


def _update_peers(step: Step) -> dict[str, Callable[[], None]]:
    """The same work in loops over tensors, and on a single tensor."""
    lr = step.small_lr
    plain = PlainStep(step.recipe, step.device, step.batch_size, amp=step.amp, lr=lr, seed=step.seed)
    flat = torch.cat([p.detach().flatten() for p in step.method.student.parameters()])
    one = nn.ParameterDict({"flat": flat[None]})  # two dimensions: LARS takes norms of such
    average, weight = one["flat"].detach().clone(), 1 - step.recipe.moco.momentum
    of_one = create_optimizer(one, replace(step.recipe.optim, decay_1d=True, lr=lr))
    for network in (plain.query, one):
        _fill_gradients(network)

    def loops() -> None:
        plain.optimizer.step()
        plain.move_keys()

    def of_all() -> None:
        of_one.step()
        average.lerp_(one["flat"].detach(), weight)

    return {"loops": loops, "flat": of_all}


def _fill_gradients(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)


def _update_record(step: Step, updates: dict[str, Timing], common: dict[str, Any]) -> Record:
    """Ours beside the loops over tensors; the ceiling is the same work on one flat tensor."""
    ours, batch, views = updates["ours"], step.batch_size, step.method.views.count
    fraction = ours.times_faster_than(updates["flat"])
    return Record(
        **{**common, "runs": len(ours.wall)},
        pair_per_s=batch / ours.median_s,
        view_per_s=views * batch / ours.median_s,
        median_s=ours.median_s,
        ceiling=views * batch / ours.median_s / fraction,
        ceiling_name="the same on one flat tensor",
        fraction_of_ceiling=fraction,
        bottleneck="memory bandwidth" if fraction > 0.7 else "many small tensors",
        peer="optimiser and moving average tensor by tensor",
        ratio_to_peer=ours.times_faster_than(updates["loops"]),
        details={
            "part": "update",
            "parameters": sum(p.numel() for p in step.method.student.parameters()),
            "optimiser": step.recipe.optim.name,
            "amp": "bf16" if step.amp else "off",
            "peer_median_s": updates["loops"].median_s,
        },
    )


def _plain_steps(fitted: Fitted) -> dict[str, Callable[[], object]]:
    """The peers by name, ready to run on the same images in NCHW memory."""
    step, recipe = fitted.step, fitted.step.recipe
    first, second = (view.float().contiguous() for view in fitted.views[0].chunk(2))
    lr = step.small_lr
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


def _peak_bytes(run: Callable[[], object], device: torch.device, recorded: bool) -> int:
    """On a GPU all that is allocated at the peak of a step, weights and queue included; on a CPU what a step adds to
    them.

    A recorded step allocates nothing when it is replayed: its memory is what torch has reserved.
    """
    if device.type != "cuda":
        return peak_extra_bytes(run, device)
    if recorded:
        return torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)
