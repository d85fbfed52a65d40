"""What the processes of a run tell each other: sums, rows, answers.

Every function is the identity in a single process: it returns what it was given, uncopied. All ranks must call the same
ones in the same order. None waits for the device but those that answer the host (``any_rank``, ``broadcast_object``,
``gather_objects``, ``barrier``), over the network of the hosts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Value = TypeVar("_Value")

#: Of gloo, by which hosts tell each other: what goes with every step, and where the others may wait for what one does
#: alone. None: the default group.
_voting: dist.ProcessGroup | None = None
_waiting: dist.ProcessGroup | None = None


#: Set in ``rehearsed``.
_alone = False


@contextmanager
def rehearsed() -> Iterator[None]:
    """For a try that may fail on one rank alone: collectives on the device take their memory and hear from this one."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def use_host_groups(voting: dist.ProcessGroup | None, waiting: dist.ProcessGroup | None) -> None:
    """Let these groups carry what hosts tell each other; ``waiting`` is the more patient one."""
    global _voting, _waiting
    _voting, _waiting = voting, waiting


def rank() -> int:
    """This process's number; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


# ---------------------------------------------------------------------- collectives on the device


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place, without gradient. Returns ``tensor``."""
    if world_size() > 1:
        whole = tensor.contiguous()
        if not _alone:
            dist.all_reduce(whole)
        tensor.copy_(whole)  # nothing where it is the same one
    return tensor


@torch.no_grad()
def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over ranks of a floating-point tensor, in place, without gradient. Returns ``tensor``."""
    return all_reduce_sum(tensor).div_(world_size()) if world_size() > 1 else tensor


def gather_rows(tensor: Tensor, gradient: bool = False) -> Tensor:
    """The rows of all ranks in the order of the ranks: (n, ...) -> (world * n, ...), ``n`` alike on all ranks. Keeps
    channels-last.

    Args:
        gradient: at a row the sum of what all ranks' losses say about it; otherwise there is none. Behind
            ``average_gradients`` it is that of the mean over all rows, where each rank takes a mean over its own rows
            against everyone's, or all compute the whole loss.
    """
    if world_size() == 1:
        return tensor
    if gradient:
        found: Tensor = _GatherRows.apply(tensor)
        return found
    rows, last = _channels_to_the_end(tensor.detach())
    rows = rows.contiguous()
    everyone = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
    if _alone:
        everyone.view(world_size(), *rows.shape).copy_(rows)
    else:
        dist.all_gather_into_tensor(everyone, rows)
    return everyone.movedim(-1, 1) if last else everyone


def gather_uneven(tensor: Tensor) -> Tensor:
    """``gather_rows`` of different numbers of rows; waits for the device. (n_r, ...) -> (sum of n_r, ...)."""
    if world_size() == 1:
        return tensor
    barrier()  # whoever has fewer rows waits here, where waiting is allowed
    count = torch.tensor([len(tensor)], dtype=torch.int64)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    most = int(max(counts))
    padded = torch.cat([tensor.detach(), tensor.new_zeros(most - len(tensor), *tensor.shape[1:])])
    rows = gather_rows(padded).unflatten(0, (world_size(), most))
    return torch.cat([part[: int(own)] for part, own in zip(rows, counts)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return gather_rows(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # A copy: autograd may show `grad` to others, too.
        total = all_reduce_sum(grad.clone(memory_format=torch.contiguous_format))
        return total.narrow(0, rank() * ctx.rows, ctx.rows)


def gather_views(tensor: Tensor, views: int, gradient: bool = False) -> Tensor:
    """View-major rows of each rank's samples -> view-major rows of all samples, as one process with the whole batch
    would hold them.

    Args:
        tensor: (views * B, ...), rows (view, sample). Channels-last maps stay so.
        views: how many each sample has.
        gradient: as of ``gather_rows``.

    Returns:
        (views * world * B, ...), rows (view, rank, sample).

    Raises:
        ValueError: the rows are no multiple of ``views``.
    """
    if len(tensor) % views:
        raise ValueError(f"{len(tensor)} rows are not {views} views of the same samples")
    if world_size() == 1:
        return tensor
    everyone = gather_rows(tensor, gradient)
    if views == 1:
        return everyone
    rows, last = _channels_to_the_end(everyone)
    whole: Tensor = rows.unflatten(0, (world_size(), views, -1)).transpose(0, 1).flatten(0, 2)
    return whole.movedim(-1, 1) if last else whole


def _channels_to_the_end(tensor: Tensor) -> tuple[Tensor, bool]:
    """Channels-last maps as the contiguous (N, H, W, C) which they are in memory, and whether ``tensor`` is such."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return (tensor.movedim(1, -1), True) if last else (tensor, False)


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Put the mean over ranks into every ``.grad`` that is there. Which ones are there must be the same on all ranks.

    All gradients of a type go through one buffer and one all-reduce, which can be recorded. These networks have 20 MB
    of them: no backward pass is long enough to hide buckets behind, as DistributedDataParallel does, and its hooks know
    nothing of bfloat16 copies whose gradients are collected later, or of parts of a batch.
    """
    size = world_size()
    if size == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault((parameter.grad.dtype, parameter.grad.device), []).append((parameter, parameter.grad))
    for (dtype, device), group in kinds.items():
        sizes, gradients = [parameter.numel() for parameter, _ in group], [gradient for _, gradient in group]
        buffer = torch.empty(sum(sizes), dtype=dtype, device=device)
        pieces = [_shaped_like(parameter, piece) for (parameter, _), piece in zip(group, buffer.split(sizes))]
        torch._foreach_copy_(pieces, gradients)
        if not _alone:
            dist.all_reduce(buffer)
        buffer.div_(size)
        torch._foreach_copy_(gradients, pieces)


def _shaped_like(parameter: Tensor, piece: Tensor) -> Tensor:
    """``piece`` (numel,) in the shape and layout of the parameter, which are alike on all ranks."""
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return piece.as_strided(parameter.shape, parameter.stride())
    return piece.view(parameter.shape)


@torch.no_grad()
def broadcast_module(module: nn.Module) -> None:
    """Give all ranks the parameters and buffers of rank 0, in place."""
    if world_size() == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        whole = tensor.contiguous()
        dist.broadcast(whole, src=0)
        tensor.copy_(whole)


# ---------------------------------------------------------------------- between the hosts


def any_rank(flag: bool) -> bool:
    """Whether any rank says so; the answer is the same on all."""
    if world_size() == 1:
        return flag
    said = torch.tensor([int(flag)], dtype=torch.int32)
    dist.all_reduce(said, op=dist.ReduceOp.MAX, group=_waiting)
    return bool(said.item())


class Vote:
    """What any rank says, known to all of them one call later: nobody waits for the slowest of them to have said it.

    All ranks call it at the same places. In a single process the answer is what was just said.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """Say ``flags``; whether any rank said so at the call before, each False at the first."""
        if world_size() == 1:
            return flags
        answer = self.close() or (False,) * len(flags)
        said = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
        self._pending = (dist.all_reduce(said, op=dist.ReduceOp.MAX, group=_voting, async_op=True), said)
        return answer

    def close(self) -> tuple[bool, ...]:
        """Wait for the call before; what any rank said at it. Empty: there was none."""
        if self._pending is None:
            return ()
        work, said = self._pending
        self._pending = None
        work.wait()
        return tuple(bool(value) for value in said.tolist())


def broadcast_object(value: _Value) -> _Value:
    """What rank 0 says, on all ranks: any value that can be pickled."""
    if world_size() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, src=0, group=_waiting, device=torch.device("cpu"))
    return said[0]


def gather_objects(value: _Value) -> list[_Value]:
    """What each rank says, by rank, on all ranks: any value that can be pickled."""
    if world_size() == 1:
        return [value]
    said: list[Any] = [None] * world_size()
    dist.all_gather_object(said, value, group=_waiting)
    return said


def barrier() -> None:
    """Wait until all ranks are here. What they have queued on their GPUs may still run."""
    any_rank(False)
