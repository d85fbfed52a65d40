"""How a step may run: which of the recipe's switches are tried here, and whether what they make is the eager step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm as total_norm

from fastssl.config.recipe import TrainConfig
from fastssl.errors import FastSSLError, counted
from fastssl.training.cuda_graph import StepInputs

if TYPE_CHECKING:
    from fastssl.training.step import TrainStep

SWITCHES = ("compile", "graph")
#: Steps of a run from which on `auto` compiles: the minutes that it takes come back at some 20 ms a step (counted).
COMPILE_PAYS = 5_000
#: What a check lets pass, by whether it is in bfloat16: (of a step's loss, of the way that the steps went).
BOUNDS = {False: (2e-3, 0.05), True: (2e-2, 0.3)}
#: The losses of some steps (steps,), and {name: end - beginning} of all that they changed.
Trial = tuple[Tensor, dict[str, Tensor]]


def left_out(train: TrainConfig, device: torch.device, *, processes: int, steps: int) -> dict[str, str]:
    """{switch: why} for those that are not to be tried: off, or ``auto`` where it does not pay, or was never seen to
    work, in a run of so many ``steps`` (0: unknown) that ``processes`` share.
    """
    found = {switch: f"train.{switch}=false" for switch in SWITCHES if getattr(train, switch) is False}
    auto = [switch for switch in SWITCHES if getattr(train, switch) == "auto"]
    if device.type != "cuda":
        return found | dict.fromkeys(auto, "auto is for NVIDIA GPUs")
    if train.deterministic or processes > 1:
        which = "deterministic runs" if train.deterministic else "several processes"
        return found | dict.fromkeys(auto, f"auto leaves {which} alone")
    if "compile" in auto and steps < COMPILE_PAYS:
        found["compile"] = f"auto needs {COMPILE_PAYS:,} steps for it to pay, this run has {counted(steps, 'step')}"
    return found


def trial(step: TrainStep, run: Callable[[StepInputs], Tensor], inputs: StepInputs) -> Trial:
    """Some steps of these views by ``run``; the state stays as it is."""
    undo, before, losses = step.snapshot(), {name: t.clone() for name, t in step.tensors().items()}, []
    # Other rates at each step: one that a recording does not read again is found. The first may be next to nothing.
    first = {**inputs.rates, "lr": 0.1 * step.recipe.optim.peak_lr(step.recipe.train.batch_size)}
    for number, share in enumerate((1.0, 0.7, 0.4)):
        rates = {name: value if isinstance(value, bool) else value * share for name, value in first.items()}
        losses.append(run(inputs._replace(noise=step.noise(0, number), rates=rates))[0].clone())
    way = {name: end - before[name] if name in before else end.clone() for name, end in step.tensors().items()}
    undo()
    return torch.stack(losses), way


def compare(eager: Trial, other: Trial, *, amp: bool) -> str:
    """How far two ways to make the same steps are apart, in words: in the loss, and in what they moved, kind by kind (a
    network's weights, its running means, the queue, ...; single layers may go no way but that of their rounding noise),
    as a share of the eager steps' way. Raises FastSSLError beyond ``BOUNDS``.
    """
    loss, kinds, shares = float(((other[0] - eager[0]) / eager[0]).abs().max()), dict[str, list[str]](), {}
    for name in eager[1]:
        first, last = name.split(".")[0], name.split(".")[-1]
        apart = first == "optimizer" or last.startswith(("running_", "num_batches"))
        kinds.setdefault(f"{first}'s {last}" if apart else first, []).append(name)
    kinds.pop("optimizer's exp_avg_sq", None)  # says what exp_avg says, twice as loud
    for kind, names in kinds.items():
        mine, theirs = ([way[name].float() for name in names] for _, way in (eager, other))
        length, between = total_norm(mine), total_norm(torch._foreach_sub(theirs, mine))
        if "optimizer's exp_avg" in kinds and kind in ("student", "teacher"):
            # Adam makes a whole step also of a gradient that is noise: the length of the way says more.
            between = (total_norm(theirs) - length).abs()
        shares[kind] = float(between / length if length else between * math.inf if between else between)
    what, way = max(shares.items(), key=lambda found: math.inf if math.isnan(found[1]) else found[1])
    most_loss, most_way = BOUNDS[amp]
    words = f"{loss:.1e} of the loss (bound {most_loss:g}), {way:.1e} of the way of the {what} (bound {most_way:g})"
    if loss <= most_loss and way <= most_way:
        return f"on, and checked: {counted(len(eager[0]), 'step')} differ from eager ones by {words}"
    raise FastSSLError(f"the check found another step than the eager one: they differ by {words}")
