"""One process per GPU: how all of them (world.py) meet, how they part, and what ends them when one fails. What they
tell each other is in collectives.py.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from fastssl.distributed.collectives import barrier
from fastssl.distributed.rendezvous import NotMet, Patience, agent_keeps_store, connect, meet
from fastssl.distributed.watchdog import Watch, ended_line
from fastssl.distributed.world import World
from fastssl.errors import FastSSLError, Interrupted

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


@contextmanager
def joined(
    world: World,
    device: torch.device,
    timeout_minutes: float = 60,
    patience: Patience | None = None,
    before_end: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Be one of ``world`` inside the block; nothing happens for a world of one.

    All ranks leave a block that ends well together. The failure of one ends the others within seconds, and what they
    say begins with its words: over gloo their collective fails when the connection breaks; over NCCL, or where a
    process is killed, stopped or cut off, the watch (watch.py) notices. ``Interrupted`` is no failure: all ranks raise
    it behind the same step.

    A CUDA graph that holds collectives must be gone when the block ends, however it ends: until then NCCL waits, for
    ever, with the end of its communicator.

    Args:
        device: where this rank's tensors are. ``cuda``: NCCL, and gloo beside it for what hosts tell each other;
            ``cpu``: gloo.
        timeout_minutes: for each collective: longer than anything that one rank does while the others wait.
        patience: for all to be there, and with a process that gives no sign of life; None: as the environment says, or
            10 minutes and 60 seconds.
        before_end: as of ``Watch``.

    Raises:
        FastSSLError: the others are not met, or another kind of device; or another process has failed, with its name
            and words.
    """
    if world.size == 1:
        yield
        return
    if device.type not in ("cpu", "cuda"):
        raise FastSSLError(f"{world.size} processes can train together on cpu and cuda, not on {device.type}")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    kept, group, watch = _meet(world, patience or Patience.from_environment(os.environ), before_end)
    try:
        _make_group(world, device, group, timeout_minutes)
        yield
        barrier()
    except BaseException as error:
        told, another = error, None
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_ANOTHER):
            another = _learn_why(watch)
            late = another is None and _TIMED_OUT in str(error)
            told = FastSSLError(
                f"waited {timeout_minutes:g} min for the other processes in vain" if late else ended_line(another)
            )
        if another is None and not isinstance(error, Interrupted):
            watch.leave(failure=_one_line(told))
        # NCCL's orderly end waits for all ranks of a machine, and these may be waiting in a collective that this one
        # will never reach.
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


def _meet(
    world: World, patience: Patience, before_end: Callable[[str], None] | None
) -> tuple[dist.Store, dist.Store, Watch]:
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
            f"process {world.rank} of {world.size} did not meet the others at {world.address}:{world.port} in "
            f"{time.monotonic() - started:.0f} s: {reason}; is that the "
            f"host of rank 0, is the port open and free there, and were all {world.size} started? "
            "FASTSSL_MEET_MINUTES gives them longer"
        ) from error
    watch = Watch(
        lambda: connect(world.address, world.port, patience.silent_s),
        world.rank,
        world.size,
        prefix=f"{call}/watch",
        address=world.address,
        port=world.port,
        keeper=f"torchrun's store at {world.address}:{world.port}"
        if agent
        else f"process 0 of {world.size} ({world.address})",
        keeps_store=world.is_main and not agent,
        silent_s=patience.silent_s,
        before_end=before_end,
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
            f"process {world.rank} of {world.size} met the others but cannot connect to them: "
            f"{_one_line(error)}; does GLOO_SOCKET_IFNAME (or NCCL_SOCKET_IFNAME) name "
            "the network between the hosts?"
        ) from error


def _learn_why(watch: Watch) -> str | None:
    """What ended the others' side of a collective; the process that failed speaks first. torchrun, which ends all as
    soon as one has failed, has to wait so long.
    """
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
    """SIGINT and SIGTERM end the process at once inside the block: it waits in compiled code, where a handler written
    in Python does not get its turn.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: as above
