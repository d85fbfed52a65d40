"""The training step alone, on views that are on the device already: no loader, no files.

All contenders get the same views, recorded steps too, which in training colour crops themselves: what colour operations
add to a step is a figure of its own. The ceiling is a roofline (``roofline.py``) over both networks' layers, at the
rates of a matrix product and of a large copy that are measured in the same turns. Where the time goes is measured too:
the networks' passes alone, optimiser and moving average alone, and what is left for loss and queue; on a GPU also the
share of the time for which any kernel ran: what is missing there is waiting for launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastssl.benchmarks.harness import timing
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.roofline import Cost, forward_cost
from fastssl.benchmarks.harness.setting import RecipeSetting, rates
from fastssl.benchmarks.suites.plain_step import fill_gradients, has_peer, plain_steps, update_peers
from fastssl.benchmarks.suites.views import colour_tables, colouring
from fastssl.config.recipe import Recipe
from fastssl.errors import FastSSLError
from fastssl.optim.schedules import RunLength
from fastssl.pipelines.plan.draw import draw_plans
from fastssl.training.step import TrainStep

#: Runs of the optimiser alone, which takes milliseconds.
_UPDATE_RUNS = 21
#: What a step's rate is held against.
CEILING_NAME = "roofline of both networks' layers"


class Step:
    """The training loop's own step, again and again at rates that stand still, with ``batch_size`` source pictures in
    the place of the recipe's, ``amp`` (autocast to bfloat16), and ``compiled`` and ``graph`` to turn those switches on.

    Raises FastSSLError where the batch does not fit the recipe's queue or BatchNorm groups, or no such network exists.
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
        parts = train.accumulate if batch_size % train.parts == 0 and batch_size >= 2 * train.parts else 1
        compiled, graph = compiled or train.compile is True, graph or train.graph is True
        train = replace(train, batch_size=batch_size, accumulate=parts, compile=compiled, graph=graph)
        self.recipe = recipe = replace(recipe, train=train)
        self.device, self.batch_size, self.amp, self.seed = device, batch_size, amp, seed
        self.inner = TrainStep(recipe, device, amp=amp, seed=seed)
        self.method, self.optimizer = self.inner.method, self.inner.optimizer
        self.number = 0
        self.small_lr = 1e-4 * recipe.optim.peak_lr(batch_size)

    def __call__(self, views: list[Tensor], tables: Sequence[Tensor] = ()) -> None:
        """Views (and colour tables) as ``ViewLoader`` gives them. Nothing here waits for the device."""
        self.inner(views, self.inner.noise(0, self.number), self.rates, tables=tables)
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
            found["smoothing"] = getattr(self.recipe.settings, "smoothing", 0.0)
        return found

    def networks_alone(self, views: list[Tensor]) -> None:
        """The passes through the networks that a step makes, and nothing else but the teacher's targets."""
        method, inner = self.method, self.inner
        images, noise = method.images(views), inner.noise(0, self.number)
        with inner.autocast():
            method.targets(images, noise, self.rates)
        for part in inner.parts.images(images, noise):
            with inner.autocast():
                embeddings = method.embed(part)
            embeddings.sum().backward()
        inner.clear_gradients()
        self.number += 1

    def cost(self, views: list[Tensor]) -> Cost:
        """The networks' least work: the student's pass, its backward pass taken as two more, and the teacher's."""
        itemsize, images = 2 if self.amp else 4, self.method.images(views)
        with self.inner.autocast():
            seen = [images[0][self.method.hidden_views * self.batch_size :], *images[1:]]
            found = forward_cost(self.method.student, seen, itemsize) * 3
            for teacher in self.method.networks[1:]:
                taught = images[0][: self.method.teacher_views * self.batch_size]
                found += forward_cost(teacher, taught, itemsize)
            return found


@dataclass
class Fitted:
    """A step that was seen to run on this machine.

    Attributes:
        step, views: the step, and random views for its networks: a list of (count * B, 3, S, S) channels-last.
        asked: batch size before it was halved for want of memory. cost: of a step's passes through the networks.
        first_s: seconds of the first call: libraries choose kernels, networks are compiled, the step is recorded.
    """

    step: Step
    views: list[Tensor]
    asked: int
    cost: Cost
    first_s: float = 0.0

    @property
    def details(self) -> dict[str, object]:
        """The part of a record's details that says what ran."""
        train, fallbacks, on_cpu = self.step.recipe.train, self.step.inner.fallbacks, self.step.device.type == "cpu"
        return {
            "amp": "bf16" if self.step.amp else "off",
            "compiled": train.compile and "compile" not in fallbacks,
            "graph": train.graph and "graph" not in fallbacks,
            "fallbacks": fallbacks,
            "first_s": self.first_s,
            "accumulate": self.step.inner.parts.count,
            "asked_batch_size": self.asked,
            "tf32": None if on_cpu or self.step.amp else torch.backends.cudnn.allow_tf32,
            "threads": torch.get_num_threads() if on_cpu else None,
        }


def _shapes(recipe: Recipe, batch_size: int) -> list[tuple[int, int, int, int]]:
    return [(spec.count * batch_size, 3, spec.size, spec.size) for spec in recipe.views]


def random_views(recipe: Recipe, batch_size: int, device: torch.device) -> list[Tensor]:
    """Standard normal numbers in the shape and layout of the recipe's views."""
    views = [torch.randn(shape, device=device) for shape in _shapes(recipe, batch_size)]
    return [view.contiguous(memory_format=torch.channels_last) for view in views]


def random_crops(recipe: Recipe, batch_size: int, device: torch.device) -> tuple[list[Tensor], list[NDArray[np.void]]]:
    """Random bytes in the shape and layout of the recipe's crops, and the plans that were drawn for them."""
    crops = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for shape in _shapes(recipe, batch_size)]
    side = np.full(batch_size, 512)
    plans = draw_plans(recipe.views, 0, 0, np.arange(batch_size), side, side)
    return [crop.contiguous(memory_format=torch.channels_last) for crop in crops], plans


def fit_step(setting: RecipeSetting, *, crops: bool = False) -> Fitted:
    """A step of the largest batch that fits: the setting's, or half of it as often as memory runs out; FastSSLError
    where not even two pictures a BatchNorm group fit. ``crops``: it gets what training gives it, uint8 crops where it
    colours them itself.

    A network that cannot be compiled or recorded here runs as it is, and the result's details say why.
    """
    size, recipe, device = setting.batch, setting.recipe, setting.device
    while (fitted := _try_step(setting, size, crops)) is None:
        timing.free_memory(device)
        size //= 2
        if size < max(2, recipe.settings.groups):
            raise FastSSLError(
                f"{recipe.arch}: out of memory even with {2 * size} pictures a step on this {device.type} device"
            )
    return fitted


def _try_step(setting: RecipeSetting, size: int, crops: bool) -> Fitted | None:
    """None: out of memory."""
    recipe, device = setting.recipe, setting.device
    try:
        step = Step(recipe, device, size, amp=setting.in_bf16, compiled=setting.compiled, graph=setting.graph)
        views = [view.to(step.inner.view_dtype) for view in random_views(recipe, size, device)]
        inputs: tuple[list[Tensor], list[Tensor]] = views, []
        if crops and step.inner.takes_crops:
            pixels, plans = random_crops(recipe, size, device)
            inputs = pixels, colour_tables(plans, device)
        started = time.perf_counter()
        step(*inputs)
        timing.synchronize(device)
        first_s = time.perf_counter() - started
        return Fitted(step, views, setting.batch, step.cost(views), first_s)
    except torch.OutOfMemoryError:
        return None


def run(setting: RecipeSetting) -> list[Record]:
    """Measure one recipe's training step, in turns with peers if there are to be some: a step as public code writes it
    (`PlainStep`) at the same precision, with autocast also in float32; and its optimiser and moving average with ours.

    Returns:
        One record, and one more for each peer, whose ``ratio_to_peer`` is how many times as fast ours is.
        ``pair_per_s``: source pictures a second; a pair is trained on in both of its views.
    """
    device, recipe = setting.device, setting.recipe
    if setting.peers and not has_peer(recipe):
        raise FastSSLError(
            f"{setting.recipe_name}: the peers are steps of MoCo with two views of one kind; bench step without "
            "--peers measures any recipe"
        )
    compiled, counting = setting.compiled or recipe.train.compile is True, None
    if device.type == "cuda":
        from fastssl.benchmarks.suites.count import CountBeside

        counting = CountBeside(recipe, setting.batch, amp=setting.in_bf16, compiled=compiled)
    # First, as their memory is not the step's.
    product, flop = timing.product_limit(device, torch.bfloat16 if setting.in_bf16 else torch.float32)
    copy, moved = timing.copy_limit(device)
    fitted = fit_step(setting)
    step, cost, details, batch, views = fitted.step, fitted.cost, fitted.details, fitted.step.batch_size, fitted.views
    crops, plans = random_crops(recipe, batch, device)
    colour = colouring(plans, recipe.views, step.inner.view_dtype, device)

    def whole() -> None:
        step(views)

    beside = {"networks": lambda: step.networks_alone(views), "colour": lambda: colour(crops)}
    plain = plain_steps(step, views[0]) if setting.peers else {}
    contenders = {"step": whole, "product": product, "copy": copy, **beside, **plain}
    timings = timing.measure_in_turns(contenders, device=device, runs=setting.runs, optional=[*beside, *plain])
    # Apart from the steps: the gradients that it works on lie in memory that a step would want.
    updates = _measure_updates(step, setting.runs, setting.peers)
    flop_per_s, bytes_per_s = flop / timings["product"].median_s, moved / timings["copy"].median_s
    least_s, ours, update = cost.seconds(flop_per_s, bytes_per_s), timings["step"], updates["ours"]

    def record(timed: timing.Timing, fraction: float, **values: Any) -> Record:
        shown = rates(batch / timed.median_s, batch, setting.views, fraction)
        return setting.record("step", **{"arch": setting.arch, "ceiling_name": CEILING_NAME, **shown, **values})

    of_step = {name: 1 / timings[name].times_faster_than(ours) for name in beside if name in timings}
    arithmetic, networks = cost.flop / ours.median_s, of_step.get("networks")
    busy = timing.busy_share(whole, device)
    # On a CPU what a step adds. A recorded step allocates nothing when it is replayed: its memory is what is reserved.
    cuda, held = device.type == "cuda", 0
    replayed = cuda and step.inner.recorded
    if cuda:
        held = torch.cuda.memory_reserved(device) if replayed else torch.cuda.memory_allocated(device)
    figures = {
        # The parts are run as they are written: beside a recorded step their shares would say nothing.
        "share": _shares(networks, update.median_s / ours.median_s) if networks and not step.inner.recorded else None,
        "networks_fraction": networks,
        # Time of the colour operations over the step's, which is made on views that are coloured already.
        "colour_of_step": of_step.get("colour"),
        "no_memory_for": [name for name in contenders if name not in timings],
        "peak_bytes": held if replayed else held + timing.peak_extra_bytes(whole, device),
        "cpu_s": ours.median_cpu_s,
        "flop_per_pair": cost.flop / batch,
        "bytes_per_pair": cost.bytes / batch,
        "flop_per_s": arithmetic,
        "product_flop_per_s": flop_per_s,
        "copy_bytes_per_s": bytes_per_s,
        "busy_share": busy and busy[0],
        "kernels": busy and busy[1],
    }
    if counting is not None and (batch, details["compiled"]) == (setting.batch, compiled):
        figures |= counting.figures(ours.median_s, bytes_per_s)
    words = bottleneck(arithmetic / flop_per_s, busy)
    found = [record(ours, least_s / ours.median_s, bottleneck=words, details={**details, **figures})]
    for name, theirs in ((name, timings[name]) for name in plain if name in timings):
        compared = {"peer": name, "ratio_to_peer": ours.times_faster_than(theirs)}
        less_cpu = {"cpu_ratio_to_peer": ours.times_less_cpu_than(theirs)}
        found.append(record(theirs, least_s / theirs.median_s, **compared, details={**details, **less_cpu}))
    if setting.peers:
        fraction = update.times_faster_than(updates["flat"])
        of_update = {
            "part": "update",
            "parameters": sum(p.numel() for p in step.method.student.parameters()),
            "optimiser": recipe.optim.name,
            "amp": details["amp"],
            "peer_median_s": updates["loops"].median_s,
        }
        compared = {
            "runs": len(update.wall),
            "ceiling_name": "the same on one flat tensor",
            "bottleneck": "memory bandwidth" if fraction > 0.7 else "many small tensors",
            "peer": "optimiser and moving average tensor by tensor",
            "ratio_to_peer": update.times_faster_than(updates["loops"]),
        }
        found.append(record(update, fraction, **compared, details=of_update))
    return found


def _shares(networks: float, update: float) -> dict[str, float]:
    """Where a step's time goes; parts that come to more than the whole, as they were measured alone, are scaled."""
    total = max(1.0, networks + update)
    shares = {"networks": networks / total, "optimiser and moving average": update / total}
    return {**shares, "loss, queue, metrics": max(0.0, 1 - sum(shares.values()))}


def _measure_updates(step: Step, runs: int, peers: bool) -> dict[str, timing.Timing]:
    """Optimiser and moving average on gradients that stay; with ``peers`` in turns with loops and one flat tensor."""
    fill_gradients(step.method.student)
    contenders: dict[str, Callable[[], None]] = {"ours": lambda: step.inner.update(step.rates)}
    contenders |= update_peers(step) if peers else {}
    timings = timing.measure_in_turns(contenders, device=step.device, runs=max(runs, _UPDATE_RUNS))
    step.inner.clear_gradients()
    return timings


def bottleneck(arithmetic: float, busy: tuple[float, int] | None) -> str:
    """In words, from the share of the measured matrix product's rate and what ``busy_share`` found."""
    if busy is not None and busy[0] < 0.8:
        return f"launches: the GPU waits for the host {1 - busy[0]:.0%} of the step ({busy[1]:,} kernels)"
    if arithmetic >= 0.5:
        return f"arithmetic ({arithmetic:.0%} of a matrix product's rate)"
    return f"memory traffic and small operations (arithmetic at {arithmetic:.0%} of a matrix product's rate)"
