"""One process per GPU: how all of them meet, and what they tell each other. Who this process is among them, world.py says.

The command is the same for any number of processes. Every collective below is the identity in a single process: it returns what it was given, uncopied, so
that the code which calls it reads the same for any number of processes. All ranks must call the same collectives in the same order. None of them waits for
the device but those that answer the host: ``agree_any``, ``share``, ``gather_values`` and ``barrier``, and these travel beside the device, over the network of the hosts.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastssl.meeting import NotMet, Patience, agent_keeps_store, connect, meet
from fastssl.pipelines.errors import FastSSLError, Interrupted
from fastssl.watch import Watch, ended_line
from fastssl.world import World

_Value = TypeVar("_Value")

_TIMED_OUT = "Timed out waiting"
#: What gloo and NCCL say in a collective where the process at the other end is gone, or does not come.
_LOST_ANOTHER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    _TIMED_OUT,
    "remote process exited",
    "NCCL communicator was aborted",
)
#: Seconds for which the others wait with their line for that of the process that failed.
_SPEAKS_FIRST_S = 0.5


# ---------------------------------------------------------------------- meeting and leaving


@contextmanager
def joined(world: World, device: torch.device, timeout_minutes: float = 60, patience: Patience | None = None) -> Iterator[None]:
    """Be one of ``world`` inside the block; nothing happens for a world of one.

    All ranks leave a block that ends well together. The failure of one ends the others within seconds, and what they say begins with its words: over gloo their
    collective fails when the connection breaks; over NCCL, or where a process is killed, stopped or cut off, the watch (watch.py) notices.
    ``Interrupted`` is no failure: all ranks raise it behind the same step.

    Args:
        device: where this rank's tensors are. ``cuda``: NCCL, and gloo beside it for what hosts tell each other; ``cpu``: gloo.
        timeout_minutes: for each collective: longer than anything that one rank does while the others wait.
        patience: for all to be there, and with a process that gives no sign of life; None: as the environment says, or 10 minutes and 60 seconds.

    Raises:
        FastSSLError: the others are not met, or another kind of device; or another process has failed, with its name and words.
    """
    if world.size == 1:
        yield
        return
    if device.type not in ("cpu", "cuda"):
        raise FastSSLError(f"{world.size} processes can train together on cpu and cuda, not on {device.type}")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    kept, group, watch = _meet(world, patience or Patience.from_environment(os.environ))
    try:
        _make_group(world, device, group, timeout_minutes)
        yield
        barrier()
    except BaseException as error:
        told, another = error, None
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_ANOTHER):
            another = _learn_why(watch)
            late = another is None and _TIMED_OUT in str(error)
            told = FastSSLError(f"waited {timeout_minutes:g} min for the other processes in vain" if late else ended_line(another))
        if another is None and not isinstance(error, Interrupted):
            watch.leave(failure=_one_line(told))
        # NCCL's orderly end waits for all ranks of a machine, and these may be waiting in a collective that this one will never reach.
        if device.type == "cuda" and dist.is_initialized() and hasattr(dist.group.WORLD, "abort"):
            with suppress(RuntimeError):
                dist.group.WORLD.abort()
        if told is not error:
            raise told from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        watch.close()
        del kept  # the store, if it is this process that keeps it


def _meet(world: World, patience: Patience) -> tuple[dist.Store, dist.Store, Watch]:
    """Wait for all to be there: (the store, the part of it that is for the group, the watch, which has begun)."""
    agent = agent_keeps_store(world.address, world.port, os.environ)
    seconds, started = 60 * patience.meet_minutes, time.monotonic()
    try:
        with _signals_end_the_process():
            store = connect(world.address, world.port, seconds, keep=world.is_main and not agent)
            call = meet(store, world.rank, world.size, seconds - (time.monotonic() - started))
    except (RuntimeError, ValueError, OSError, NotMet) as error:
        reason = str(error) if isinstance(error, NotMet) else _one_line(error)
        raise FastSSLError(
            f"process {world.rank} of {world.size} did not meet the others at {world.address}:{world.port} in {time.monotonic() - started:.0f} s: {reason}; is that the "
            f"host of rank 0, is the port open and free there, and were all {world.size} started? FASTSSL_MEET_MINUTES gives them longer"
        ) from error
    watch = Watch(
        lambda: connect(world.address, world.port, patience.silent_s),
        world.rank,
        world.size,
        prefix=f"{call}/watch",
        address=world.address,
        port=world.port,
        keeper=f"torchrun's store at {world.address}:{world.port}" if agent else f"process 0 of {world.size} ({world.address})",
        keeps_store=world.is_main and not agent,
        silent_s=patience.silent_s,
    )
    return store, dist.PrefixStore(f"{call}/group", store), watch.start()


def _make_group(world: World, device: torch.device, store: dist.Store, timeout_minutes: float) -> None:
    try:
        with _signals_end_the_process():
            dist.init_process_group(
                # One group with two ways: a tensor on the host goes by gloo, and no GPU waits for it.
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=world.rank,
                world_size=world.size,
                timeout=timedelta(minutes=timeout_minutes),
                device_id=device if device.type == "cuda" else None,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise FastSSLError(
            f"process {world.rank} of {world.size} met the others but cannot connect to them: {_one_line(error)}; does GLOO_SOCKET_IFNAME (or NCCL_SOCKET_IFNAME) name "
            "the network between the hosts?"
        ) from error


def _learn_why(watch: Watch) -> str | None:
    """What ended the others' side of a collective; the process that failed speaks first. torchrun, which ends all as soon as one has failed, has to wait so long."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if main else None
    try:
        reason = watch.reason()
        time.sleep(_SPEAKS_FIRST_S)
        return reason
    finally:
        if main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: a handler that was not written in Python


def _one_line(error: BaseException) -> str:
    """What the others are told of this process's failure."""
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted"
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, FastSSLError) else f"{type(error).__name__}: {text}"


@contextmanager
def _signals_end_the_process() -> Iterator[None]:
    """SIGINT and SIGTERM end the process at once inside the block: it waits in compiled code, where a handler written in Python does not get its turn."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rank() -> int:
    """This process's number; 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# ---------------------------------------------------------------------- collectives on the device


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place, without gradient. Returns ``tensor``."""
    if world_size() > 1:
        whole = tensor.contiguous()
        dist.all_reduce(whole)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)
    return tensor


@torch.no_grad()
def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over ranks of a floating-point tensor, in place, without gradient. Returns ``tensor``."""
    return all_reduce_sum(tensor).div_(world_size()) if world_size() > 1 else tensor


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks in the order of the ranks, without gradient: (n, ...) -> (world * n, ...), ``n`` alike on all ranks. Keeps channels-last."""
    if world_size() == 1:
        return tensor
    rows, last = _channels_to_the_end(tensor.detach())
    rows = rows.contiguous()
    everyone = rows.new_empty((world_size() * len(rows), *rows.shape[1:]))
    dist.all_gather_into_tensor(everyone, rows)
    return everyone.movedim(-1, 1) if last else everyone


def gather_uneven(tensor: Tensor) -> Tensor:
    """``gather_rows`` of ranks that have different numbers of rows; waits for the device. (n_r, ...) -> (sum of n_r, ...)."""
    if world_size() == 1:
        return tensor
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
        total = all_reduce_sum(grad.clone(memory_format=torch.contiguous_format))  # autograd may show `grad` to others, too
        return total.narrow(0, rank() * ctx.rows, ctx.rows)


def gather_rows_with_gradient(tensor: Tensor) -> Tensor:
    """``gather_rows`` whose gradient at a row is the sum of what all ranks' losses say about it.

    With ``average_gradients`` behind it, ranks that each take a mean over their own rows against everyone's make the gradient of the mean over all rows; and
    so do ranks that all compute the whole loss.
    """
    return tensor if world_size() == 1 else _GatherRows.apply(tensor)


def gather_views(tensor: Tensor, views: int, gradient: bool = False) -> Tensor:
    """View-major rows of each rank's samples -> view-major rows of all samples, as one process with the whole batch would hold them.

    Args:
        tensor: (views * B, ...), rows (view, sample). Channels-last maps stay so.
        views: how many each sample has.
        gradient: as of ``gather_rows_with_gradient``.

    Returns:
        (views * world * B, ...), rows (view, rank, sample).

    Raises:
        ValueError: the rows are no multiple of ``views``.
    """
    if len(tensor) % views:
        raise ValueError(f"{len(tensor)} rows are not {views} views of the same samples")
    if world_size() == 1:
        return tensor
    everyone = gather_rows_with_gradient(tensor) if gradient else gather_rows(tensor)
    if views == 1:
        return everyone
    rows, last = _channels_to_the_end(everyone)
    rows = rows.unflatten(0, (world_size(), views, -1)).transpose(0, 1).flatten(0, 2)
    return rows.movedim(-1, 1) if last else rows


def _channels_to_the_end(tensor: Tensor) -> tuple[Tensor, bool]:
    """Channels-last maps as the contiguous (N, H, W, C) which they are in memory, and whether ``tensor`` is such."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return (tensor.movedim(1, -1), True) if last else (tensor, False)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Put the mean over ranks into every ``.grad`` that is there. Which ones are there must be the same on all ranks.

    All gradients of a type go through one buffer and one all-reduce. These networks have 20 MB of them: there is no backward pass long enough to
    hide buckets behind, as DistributedDataParallel does, and its hooks know nothing of bfloat16 copies whose gradients are collected later, of
    parts of a batch, or of a recorded CUDA graph. This is a plain call at a plain place, and can be recorded.
    """
    size = world_size()
    if size == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            kinds.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter)
    for (dtype, device), group in kinds.items():
        buffer = torch.empty(sum(parameter.numel() for parameter in group), dtype=dtype, device=device)
        pieces = [_shaped_like(parameter, piece) for parameter, piece in zip(group, buffer.split([p.numel() for p in group]))]
        gradients = [parameter.grad for parameter in group]
        torch._foreach_copy_(pieces, gradients)
        dist.all_reduce(buffer)
        buffer.div_(size)
        torch._foreach_copy_(gradients, pieces)


def _shaped_like(parameter: Tensor, piece: Tensor) -> Tensor:
    """``piece`` (numel,) in the shape and layout of the parameter: alike on all ranks, whatever the gradient's, and copied in one launch where they agree."""
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
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)


# ---------------------------------------------------------------------- between the hosts


def agree_any(flag: bool) -> bool:
    """Whether any rank says so; the answer is the same on all."""
    if world_size() == 1:
        return flag
    said = torch.tensor([int(flag)], dtype=torch.int32)
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said.item())


class Vote:
    """What any rank says, known to all of them one call later: nobody waits for the slowest of them to have said it.

    All ranks call it at the same places. In a single process the answer is what was just said.

    Args:
        questions: how many flags each call has.
    """

    def __init__(self, questions: int):
        self._questions = questions
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """Say ``flags``; whether any rank said so at the call before."""
        if len(flags) != self._questions:
            raise ValueError(f"{len(flags)} answers to {self._questions} questions")
        if world_size() == 1:
            return flags
        answer = self.close()
        said = torch.tensor([int(flag) for flag in flags], dtype=torch.int32)
        self._pending = (dist.all_reduce(said, op=dist.ReduceOp.MAX, async_op=True), said)
        return answer

    def close(self) -> tuple[bool, ...]:
        """Wait for the call before; what any rank said at it."""
        if self._pending is None:
            return (False,) * self._questions
        work, said = self._pending
        self._pending = None
        work.wait()
        return tuple(bool(value) for value in said.tolist())


def share(value: _Value) -> _Value:
    """What rank 0 says, on all ranks: any value that can be pickled."""
    if world_size() == 1:
        return value
    said: list[Any] = [value]
    dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
    return said[0]


def gather_values(value: _Value) -> list[_Value]:
    """What each rank says, by rank, on all ranks: any value that can be pickled."""
    if world_size() == 1:
        return [value]
    said: list[Any] = [None] * world_size()
    dist.all_gather_object(said, value)
    return said


def barrier() -> None:
    """Wait until all ranks are here. What they have queued on their GPUs may still run."""
    agree_any(False)
