"""How a step may run: which of the recipe's switches are tried here, and whether what they make is the eager step."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.config.recipe import TrainConfig
from fastssl.errors import counted, duration

SWITCHES = ("compile", "graph")
#: Steps of a run from which on `auto` compiles: the minutes that it takes come back at some 20 ms a step (counted).
COMPILE_PAYS = 5_000
#: What a check lets pass, by whether it is in bfloat16: (of a step's loss, of the way that the steps went).
BOUNDS = {False: (2e-3, 0.05), True: (2e-2, 0.3)}
#: Of the rates at the steps of a check: a number that a recording does not take from its inputs is found.
CHECKED_RATES = (1.0, 0.7, 0.4)


def left_out(train: TrainConfig, device: torch.device, *, processes: int, steps: int) -> dict[str, str]:
    """{switch: why} for those that are not to be tried: off, or ``auto`` where it does not pay or was never seen to go.

    Args:
        processes: that share a step. steps: of the whole run; 0: unknown.
    """
    found: dict[str, str] = {}
    for switch in SWITCHES:
        asked = getattr(train, switch)
        if asked is False:
            found[switch] = f"train.{switch}=false"
        elif asked is True:
            continue
        elif device.type != "cuda":
            found[switch] = "auto is for NVIDIA GPUs"
        elif train.deterministic or processes > 1:
            found[switch] = f"auto leaves {'deterministic runs' if train.deterministic else 'several processes'} alone"
        elif switch == "compile" and importlib.util.find_spec("triton") is None:
            found[switch] = "Triton is not installed"
        elif switch == "compile" and steps < COMPILE_PAYS:
            found[switch] = f"auto needs {COMPILE_PAYS:,} steps for it to pay, this run has {counted(steps, 'step')}"
    return found


@contextmanager
def telling(what: str, say: Callable[[str], None], every: float = 30.0) -> Iterator[None]:
    """Say ``what`` is begun, every so many seconds how long it has taken by now, and at its end how long it took."""
    started, over = time.monotonic(), threading.Event()

    def tell(how: str) -> None:
        say(f"{what}: {duration(time.monotonic() - started)}{how}")

    def watch() -> None:
        while not over.wait(every):
            tell(" so far")

    say(f"{what} ...")
    thread = threading.Thread(target=watch, name="fastssl-telling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        tell("")


class Trial(NamedTuple):
    """What some steps came to.

    Attributes:
        losses: (steps,) on the device.
        way: {name: end - beginning}, of all that a step changes.
    """

    losses: Tensor
    way: dict[str, Tensor]


def compare(eager: Trial, other: Trial, *, amp: bool) -> tuple[bool, str]:
    """Whether two ways to make the same steps agree within ``BOUNDS``, and in words by how much they do."""
    loss = float(((other.losses - eager.losses) / eager.losses).abs().max())
    what, way = max(_distances(eager, other).items(), key=lambda found: found[1])
    bounds = BOUNDS[amp]
    words = (
        f"{counted(len(eager.losses), 'step')} beside the eager ones: loss apart by {loss:.1e} (bound {bounds[0]:g}), "
        f"{what} by {way:.1e} of the way it went (bound {bounds[1]:g})"
    )
    return loss <= bounds[0] and way <= bounds[1], words  # NaN is no agreement


def _distances(eager: Trial, other: Trial) -> dict[str, float]:
    """{kind: distance as a share of the eager steps' way}: of the student's weights together, its running means, the
    queue, ... A single layer may go no way at all but rounding noise.
    """
    kinds: dict[str, list[str]] = {}
    for name in eager.way:
        first, last = name.split(".")[0], name.split(".")[-1]
        whole = first != "optimizer" and not last.startswith(("running_", "num_batches"))
        if last != "exp_avg_sq":  # says what exp_avg says, twice as loud
            kinds.setdefault(first if whole else f"{first}'s {last}", []).append(name)
    found, adam = {}, "optimizer's exp_avg" in kinds
    for kind, names in kinds.items():
        mine, theirs = ([trial.way[name].float() for name in names] for trial in (eager, other))
        length = _length(mine)
        # Adam makes a whole step also of a gradient that is noise: of weights the length of the way says more.
        same_noise = not (adam and kind in ("student", "teacher"))
        apart = _length(list(torch._foreach_sub(theirs, mine))) if same_noise else abs(_length(theirs) - length)
        found[kind] = apart / length if length else float("inf") if apart else 0.0
    return found


def _length(tensors: list[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm(tensors)).norm())
