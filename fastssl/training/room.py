"""Whether a step finds room in memory, and in how many parts: tried, as only the allocator knows what it takes."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastssl.distributed.collectives import any_rank, rehearsed
from fastssl.errors import FastSSLError, counted, is_out_of_memory
from fastssl.training.cuda_graph import StepInputs

if TYPE_CHECKING:
    from fastssl.training.step import TrainStep


def fewest_parts(step: TrainStep, inputs: StepInputs) -> int:
    """``train.accumulate: auto``: from the present ones on, the fewest parts in which the step fits on all processes.
    Raises FastSSLError where it fits in none.
    """
    for parts in step.parts.tries():
        if not any_rank(not _fits(step, inputs, parts)):
            return parts
    raise FastSSLError(_said(step, None))


def make_step_or_say(step: TrainStep, inputs: StepInputs) -> Tensor:
    """``step`` of ``inputs``. Raises FastSSLError where there is no room, with the parts that have it; the step is then
    not to be used again.
    """
    try:
        return step(list(inputs.views), inputs.noise, inputs.rates, tables=inputs.tables)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Only here, out of the exception's reach, are the failed step's tensors nobody's.
    step.close()
    step.clear_gradients()
    step.method.set_forward_modules(*step.networks)  # compiled ones would be compiled for each number of parts
    _free(step)
    raise FastSSLError(_said(step, next((n for n in step.parts.tries()[1:] if _fits(step, inputs, n)), None)))


def _fits(step: TrainStep, inputs: StepInputs, parts: int) -> bool:
    """Whether an eager step finds room beside the batches that the loader has ready meanwhile. It leaves the state as
    it was, and each process makes it alone.
    """
    undo, before, ready, found = None, step.parts.count, list[Tensor](), True
    step.parts.count = parts
    try:
        undo = step.snapshot()
        with rehearsed():
            ready.extend(map(torch.empty_like, (*inputs.views, *inputs.tables) * 2))
            step._run(inputs)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        found = False
    finally:
        step.parts.count = before
        ready.clear()
        step.clear_gradients()
        if undo is not None:
            undo()
    if not found:
        _free(step)
    return found


def _free(step: TrainStep) -> None:
    gc.collect()
    if step.device.type == "cuda":
        torch.cuda.empty_cache()


def _said(step: TrainStep, fitting: int | None) -> str:
    parts, most, processes = step.parts.count, step.parts.tries()[-1], step.world.size
    batch = counted(step.recipe.train.batch_size, "photo") + f" on {processes} processes" * (processes > 1)
    said = f"out of memory: a step of {batch} in {counted(parts, 'part')} does not fit this {step.device.type}"
    recompute = not step.recipe.train.checkpoint  # which keeps BatchNorm's whole batch
    if fitting is None:
        more = f", nor does one in up to {most:,}" * (most > parts)
        return f"{said}{more}; a smaller --batch-size or network{' or train.checkpoint=true' * recompute} needs less"
    sees = ", BatchNorm then sees a part at a time" * bool(step.parts.statistics)
    sees += "; or --set train.checkpoint=true, if that is enough" * recompute
    return f"{said}; one in {counted(fitting, 'part')} does: --set train.accumulate={fitting}{sees}"
