"""``fastssl bench step --count``: launches, bytes and memory of a step on a GPU, by part, on any machine: counted.

The step of the training loop runs once on a fake GPU (`fake_cuda`), at the recipe's batch, size of views and precision,
from uint8 crops: what is compiled by default on a GPU is compiled here, too (`compiled_traffic`). The *byte floor* is
the time in which a plain copy moves as many bytes: no step is faster that runs these kernels, and a GPU comes near to
it, as convolutions of small networks do little arithmetic for each byte.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch

from fastssl.benchmarks.harness.compiled_traffic import counting_compile
from fastssl.benchmarks.harness.fake_cuda import fake_cuda
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.setting import RecipeSetting
from fastssl.benchmarks.harness.traffic import Counter
from fastssl.benchmarks.suites.step import Step, random_crops
from fastssl.benchmarks.suites.views import colour_tables
from fastssl.config.recipe import Recipe
from fastssl.training.networks import Bf16Weights
from fastssl.training.step import TrainStep
from fastssl.utils.compiled import RECOMPUTE

#: Bytes a second of a large copy, read and written, as they were seen: what a step is held against where no GPU is.
COPY_RATES = {"H100": 3.0e12, "H200": 4.3e12}
#: Which parts of a step the method's calls are.
_OF_METHOD = {"targets": "teacher", "embed": "student", "loss": "loss", "after_step": "queue or centre"}


def count_step(recipe: Recipe, batch: int, *, amp: bool, compiled: bool) -> dict[str, Any]:
    """One step, counted.

    Args:
        compiled: the networks are compiled, too.

    Returns:
        ``parts``, {name: {launches, bytes, kept}} in their order; ``launches`` and ``bytes`` of all; ``state_bytes`` of
        what lives between steps, ``peak_bytes`` of all that is alive at most, crops included; ``fallbacks``.
    """
    with ExitStack() as stack:
        device, counter = stack.enter_context(fake_cuda()), stack.enter_context(Counter())

        def part(name: str, owner: Any, attribute: str) -> None:
            named = counter.named(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, named))

        stack.enter_context(counting_compile(counter))
        part("colour", TrainStep, "coloured")
        part("backward", torch.autograd, "_engine_run_backward")
        part("casts of weights", Bf16Weights, "refresh")
        part("casts of weights", Bf16Weights, "collect_gradients")
        step = Step(recipe, device, batch, amp=amp)
        for attribute, name in _OF_METHOD.items():
            part(name, step.method, attribute)
        part("optimiser and average", step.inner, "update")
        step.inner.prepared = True  # nothing to try and to undo
        if compiled:
            networks = [torch.compile(network, dynamic=False, options=RECOMPUTE) for network in step.inner.networks]
            step.method.set_forward_modules(*networks)
        state, (crops, plans) = counter.alive, random_crops(step.recipe, batch, device)
        inputs = crops, colour_tables(plans, device)
        step(*inputs)  # caches and moments of the optimiser are made
        counter.reset()
        step(*inputs)
        fallbacks = dict(step.inner.fallbacks)
    parts = {name: asdict(one) for name, one in counter.parts.items() if one.launches}
    return {
        "parts": parts,
        "launches": sum(one["launches"] for one in parts.values()),
        "bytes": sum(one["bytes"] for one in parts.values()),
        "state_bytes": state,
        "peak_bytes": counter.peak,
        "fallbacks": fallbacks,
    }


def _hide_gpus() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def count_apart(recipe: Recipe, batch: int, *, amp: bool, compiled: bool) -> dict[str, Any]:
    """`count_step` in a process of its own, which sees no GPU: what is patched in it is nobody else's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_hide_gpus) as pool:
        return pool.submit(count_step, recipe, batch, amp=amp, compiled=compiled).result()


class CountBeside:
    """The count of a step that is measured meanwhile, on views that were coloured before it: it takes longer than the
    figure, and the GPU's time is dear. In a process of its own, as `count_apart`.
    """

    def __init__(self, recipe: Recipe, batch: int, *, amp: bool, compiled: bool):
        self._pool = get_context("spawn").Pool(1, _hide_gpus)
        self._found = self._pool.apply_async(count_step, (recipe, batch), {"amp": amp, "compiled": compiled})

    def figures(self, seconds: float, rate: float, patience: float = 5.0) -> dict[str, Any]:
        """For the details of the step's record: ``counted_launches``, ``counted_bytes``, and ``byte_floor_fraction``,
        the byte floor at ``rate`` (bytes a second of a copy in the same turns) over the ``seconds`` that the step took;
        or ``not_counted``, the reason: a step that was measured is worth its figure without them.
        """
        try:
            parts = self._found.get(patience)["parts"]
        except Exception as error:  # not there in time, or whatever another version of torch may lack
            return {"not_counted": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        finally:
            self._pool.terminate()
        launches, moved = (
            sum(one[key] for name, one in parts.items() if name != "colour") for key in ("launches", "bytes")
        )
        fraction = moved / rate / seconds
        return {"counted_launches": launches, "counted_bytes": moved, "byte_floor_fraction": fraction}


def run(setting: RecipeSetting) -> list[Record]:
    """One record, of the step at the setting's batch (by default the recipe's own) and precision."""
    batch, amp = setting.batch_size or setting.recipe.train.batch_size, setting.amp != "off"
    found = count_apart(setting.recipe, batch, amp=amp, compiled=setting.compiled)
    details = {"amp": "bf16" if amp else "off", "compiled": setting.compiled, **found}
    of_all = {"arch": setting.arch, "device": "cuda", "batch_size": batch, "runs": 1}
    return [setting.record("count", **of_all, details=details)]


def table(record: Record) -> str:
    """A record for a terminal, in 80 columns."""
    details, batch = record.details or {}, record.batch_size or 0
    kind = "bf16" if details["amp"] == "bf16" else "float32"
    networks = "compiled" if details["compiled"] else "as they are written"
    lines = [
        f"{record.recipe}, {record.arch}",
        f"batch {batch}, {kind}, networks {networks}",
        f"{'counted, not measured':<30}{'launches':>10}{'GB moved':>10}{'share':>8}{'GB kept':>10}",
    ]
    for name, one in details["parts"].items():
        share = one["bytes"] / details["bytes"]
        moved, kept = f"{one['bytes'] / 1e9:.1f}", f"{one['kept'] / 1e9:.1f}"
        lines.append(f"{name:<30}{one['launches']:>10,}{moved:>10}{share:>8.1%}{kept:>10}")
    moved, peak = f"{details['bytes'] / 1e9:.1f}", f"{details['peak_bytes'] / 1e9:.1f}"
    lines.append(f"{'step; GB alive at most':<30}{details['launches']:>10,}{moved:>10}{'':>8}{peak:>10}")
    for name, per_s in COPY_RATES.items():
        floor = details["bytes"] / per_s
        rate = f"{floor * 1e3:.0f} ms, {round(batch / floor):,} pair/s"
        lines.append(f"byte floor at {per_s / 1e12:.1f} TB/s (a large copy on an {name}): {rate}")
    lines += [f"without {switch}: {reason}" for switch, reason in details["fallbacks"].items()]
    return "\n".join(lines)
