"""Whether a step finds room in memory, and in how many parts: tried, as only the allocator knows what it takes."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from fastssl.distributed.collectives import any_rank, rehearsed
from fastssl.errors import FastSSLError, counted, is_out_of_memory
from fastssl.training.cuda_graph import StepInputs

if TYPE_CHECKING:
    from fastssl.training.step import TrainStep


def fits(step: TrainStep, inputs: StepInputs, parts: int) -> bool:
    """Whether an eager step in so many parts, and the batches that the loader has ready meanwhile, find room.

    Networks, queue and optimiser are then as they were, and what the try took is free. Each process tries alone.
    """
    undo, before, found, held = step.snapshot(), step.parts.count, True, list[torch.Tensor]()
    step.parts.count = parts
    try:
        with rehearsed():
            held.extend(torch.empty_like(tensor) for tensor in (*inputs.views, *inputs.tables) * 2)
            step._run(inputs)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        found = False
    finally:
        held.clear()
        step.parts.count = before
        step.clear_gradients()
        undo()
    if not found:
        _free(step)
    return found


def fewest_parts(step: TrainStep, inputs: StepInputs) -> int:
    """``train.accumulate: auto``: the fewest parts, from those that the step has, with which it fits on all processes.

    Raises:
        FastSSLError: none do.
    """
    for parts in step.parts.tries():
        if not any_rank(not fits(step, inputs, parts)):
            return parts
    raise FastSSLError(_said(step, None))


def no_room(step: TrainStep, inputs: StepInputs) -> FastSSLError:
    """What to say where a step ran out of memory, with the number of parts that fit. The step is not to be used again.

    To be called where the failure's exception, which holds its frames' tensors, is gone.
    """
    step.close()
    step.clear_gradients()
    step.method.set_forward_modules(*step.networks)  # compiled ones would be compiled for each number of parts
    _free(step)
    tries = step.parts.tries()[1:]
    return FastSSLError(_said(step, next((parts for parts in tries if fits(step, inputs, parts)), None)))


def _said(step: TrainStep, fitting: int | None) -> str:
    train, processes = step.recipe.train, step.world.size
    batch = counted(train.batch_size, "photo") + f" on {processes} processes" * (processes > 1)
    said = (
        f"out of memory: a step of {batch} in {counted(step.parts.count, 'part')} does not fit this {step.device.type}"
    )
    if fitting is None:
        most = step.parts.tries()[-1]
        more = f", nor does one in up to {most:,}" * (most > step.parts.count)
        return f"{said}{more}; a smaller --batch-size or network needs less"
    sees = ", BatchNorm then sees a part at a time" * step.parts.changes_batchnorm
    return f"{said}; one in {counted(fitting, 'part')} does: --set train.accumulate={fitting}{sees}"


def _free(step: TrainStep) -> None:
    """Give what nobody holds any more back to the device."""
    gc.collect()
    if step.device.type == "cuda":
        torch.cuda.empty_cache()
