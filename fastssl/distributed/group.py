"""One process per GPU: how all of them (world.py) join and leave, and what the failure of one means for the others.

torchrun, or ``srun --kill-on-bad-exit``, ends all processes when one ends. One that hangs is what they cannot see: the
collectives of the others fail after ``FASTSSL_TIMEOUT_MINUTES``, and they say which process did not come.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist

from fastssl.distributed.collectives import barrier, use_host_groups
from fastssl.distributed.world import World
from fastssl.errors import FastSSLError

#: Environment variable, and its value where it is not set: minutes for all to join, and for a collective.
TIMEOUT_VARIABLE, TIMEOUT_MINUTES = "FASTSSL_TIMEOUT_MINUTES", 10.0
#: Times that, for what one process does alone while the others wait: a probe, a disk that is full at the very end.
_WAITING = 6
#: What gloo says in a collective that lasted too long, and in others that were under way then.
_TIMED_OUT = ("Timed out waiting", "Application timeout caused pair closure")
#: What gloo and NCCL say in a collective where the process at the other end is gone, or does not come.
_LOST_ANOTHER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    *_TIMED_OUT,
    "remote process exited",
    "NCCL communicator was aborted",
)
#: Seconds for which a process whose collective broke stays, so that the launcher sees the first failure first.
_LAUNCHER_SEES_S = 3.0
#: Seconds for which processes whose collective timed out look for each other.
_ROLL_CALL_S = 5.0
#: Seconds beyond the limit in which the others learn who is missing.
_LAST_LOOK_S = 10.0
#: Every group of a process has keys of its own in the store.
_groups = count()


@contextmanager
def joined(world: World, device: torch.device) -> Iterator[None]:
    """Be one of ``world`` inside the block; nothing happens for a world of one.

    All ranks leave a block that ends well together; ``Interrupted`` all raise after the same step. A CUDA graph that
    holds collectives must be gone when the block ends: until then NCCL waits, without end, for its communicator.

    Args:
        device: where this rank's tensors are. ``cuda``: NCCL, and gloo beside it for what hosts tell each other;
            ``cpu``: gloo.

    Raises:
        FastSSLError: ranks that did not join, by number; another kind of device; another process has failed or hangs.
    """
    if world.size == 1:
        yield
        return
    if device.type not in ("cpu", "cuda"):
        raise FastSSLError(f"{world.size} processes can train together on cpu and cuda, not on {device.type}")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    minutes = _timeout()
    store = _join(world, minutes)
    try:
        _make_groups(world, device, store, minutes)
        yield
        barrier()
    except BaseException as error:
        lost = isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_ANOTHER)
        why = _why_lost(str(error), world, store) if lost else ""
        # NCCL's orderly end waits for all ranks of a machine, and these may be in a collective that this one will never
        # reach.
        if device.type == "cuda" and (everyone := dist.group.WORLD) is not None:
            with suppress(RuntimeError, AttributeError):  # older ones have no abort
                everyone.abort()
        if lost:
            raise FastSSLError(f"the run cannot go on: {why}") from error
        raise
    finally:
        use_host_groups(None, None)
        if dist.is_initialized():
            dist.destroy_process_group()


def _timeout() -> float:
    """Minutes for all to join, and for each collective.

    Raises:
        FastSSLError: the variable is no positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        value = float(text) if text else TIMEOUT_MINUTES
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:  # NaN fails, too
        raise FastSSLError(f"{TIMEOUT_VARIABLE}={text!r} in the environment is not a positive number")
    return value


def _join(world: World, minutes: float) -> dist.Store:
    """Wait for all to be there; the part of the store that is this group's."""
    started, agent = time.monotonic(), _agent_keeps_store(world)
    # torchrun's store outlives the processes: after a restart it still holds what the ended ones wrote.
    prefix = f"fastssl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_groups)}"
    try:
        with _signals_end_the_process():
            # A little longer than process 0 takes to know who is missing.
            serve, limit = world.is_main and not agent, timedelta(minutes=minutes, seconds=_LAST_LOOK_S)
            tcp = dist.TCPStore(world.address, world.port, None, serve, limit, wait_for_workers=False)
            store = dist.PrefixStore(prefix, tcp)
            store.set(f"joined/{world.rank}", "")
            if world.is_main:
                store.set("missing", _missing(store, "joined", world, started + 60 * minutes))
            try:
                missing = store.get("missing").decode()  # waits for it
            except RuntimeError:
                missing = "process 0 is"
            if missing and serve:
                time.sleep(1)  # the others still read in it
            reason = missing and f"{missing} missing"
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:400]
    if reason:
        raise FastSSLError(
            f"process {world.rank} of {world.size} did not meet the others at {world.address}:{world.port} in "
            f"{time.monotonic() - started:.0f} s: {reason}; is that the host of rank 0, is the port open and free "
            f"there, and were all {world.size} started? {TIMEOUT_VARIABLE} gives them longer"
        )
    return store


def _missing(store: dist.Store, key: str, world: World, deadline: float) -> str:
    """Ranks that have not set their ``key`` by the deadline, in words; empty: all have."""
    missing = list(range(world.size))
    while missing := [rank for rank in missing if not store.check([f"{key}/{rank}"])]:
        if time.monotonic() >= deadline:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            return f"process {shown} is" if len(missing) == 1 else f"processes {shown} are"
        time.sleep(0.1)
    return ""


def _agent_keeps_store(world: World) -> bool:
    """Whether torchrun serves a store there, so that no process of the run has to."""
    there = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"))
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and there == (world.address, str(world.port))


def _make_groups(world: World, device: torch.device, store: dist.Store, minutes: float) -> None:
    try:
        with _signals_end_the_process():
            dist.init_process_group(
                # One group with two ways: a tensor on the host goes by gloo, and no GPU waits for it.
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore("group", store),
                rank=world.rank,
                world_size=world.size,
                # Of NCCL's longer collectives gloo's, which wait for the same steps, give up first, and say why.
                timeout=timedelta(minutes=(2 if device.type == "cuda" else 1) * minutes),
                device_id=device if device.type == "cuda" else None,
            )
            use_host_groups(_gloo(minutes) if device.type == "cuda" else None, _gloo(_WAITING * minutes))
    except (RuntimeError, ValueError, OSError) as error:
        raise FastSSLError(
            f"process {world.rank} of {world.size} met the others but cannot connect to them: "
            f"{' '.join(str(error).split())[:400]}; does GLOO_SOCKET_IFNAME (or NCCL_SOCKET_IFNAME) name the network "
            "between the hosts?"
        ) from error


def _gloo(minutes: float) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))
    assert isinstance(group, dist.ProcessGroup)  # a number, where this process is none of the group
    return group


def _why_lost(text: str, world: World, store: dist.Store) -> str:
    """What broke this process's collective."""
    timed_out, answers = any(words in text for words in _TIMED_OUT), False
    # When one gives up, gloo ends the collectives of all: each of them answers, the one that hangs does not.
    with suppress(RuntimeError):
        store.set_timeout(timedelta(seconds=_ROLL_CALL_S))
        store.set(f"lost/{world.rank}", "")
        answers = True
    if not timed_out:
        with _signals(signal.SIG_IGN, signal.SIGTERM):  # by which torchrun ends all as soon as one has failed
            time.sleep(_LAUNCHER_SEES_S)
        return "another process has ended, and its message says why"
    with suppress(RuntimeError):
        if answers and (absent := _missing(store, "lost", world, time.monotonic() + _ROLL_CALL_S)):
            return f"{absent} not answering (stopped, or held up by a disk?)"
    return "a collective lasted too long" if answers else "process 0 is not answering (stopped, or held up by a disk?)"


@contextmanager
def _signals(action: signal.Handlers, *numbers: signal.Signals) -> Iterator[None]:
    """Let these signals do something else inside the block; they belong to the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, action) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that was not written in Python


def _signals_end_the_process() -> AbstractContextManager[None]:
    """For the time in which it waits in compiled code, where a handler written in Python does not get its turn."""
    return _signals(signal.SIG_DFL, signal.SIGINT, signal.SIGTERM)
