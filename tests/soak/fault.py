"""A command in a child process that may be struck at a chosen call of the system."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """SIGKILL at one call.

    Attributes:
        kind: ``fsync``, ``replace``, ``link``, ``unlink``, ``chmod`` of os; ``add`` of a photo to a .beton; ``often``:
            none, but a conversion keeps its journal after every photo.
        number: of the call, counted from 1.
        behind: when the call is done, not before.
    """

    kind: str
    number: int
    behind: bool = False


def child(command: list[str], environment: dict[str, str], log: str, float64: bool, fault: Fault | None) -> None:
    """Run ``fastssl COMMAND`` in this process; what it prints goes to ``log``."""
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 (for the life of the process)
    import torch

    torch.set_num_threads(1)
    if float64:
        in_float64()
    if fault is not None:
        install(fault)
    from fastssl.cli import main

    main(command)


def in_float64() -> None:
    """All of training in double precision, so that rounding, which the steps of fresh networks blow up, hides nothing.
    The probe is left out.
    """
    import torch

    from fastssl import pretrain

    torch.set_default_dtype(torch.float64)
    pretrain.finish_run = lambda result, started: None


def install(fault: Fault) -> None:
    """Let the fault strike this process."""
    from fastssl.pipelines.beton import writer
    from fastssl.pipelines.convert import conversion as convert

    convert.CHECKPOINT_SECONDS = 0.0  # a conversion of a second would otherwise have one point to go on from
    if fault.kind == "add":
        writer.BetonWriter.add = struck(writer.BetonWriter.add, fault)
    elif fault.kind != "often":
        setattr(os, fault.kind, struck(getattr(os, fault.kind), fault))


def struck(function: Callable, fault: Fault) -> Callable:
    """``function``, at whose chosen call the process dies."""
    made = 0

    def call(*args: object, **kwargs: object) -> object:
        nonlocal made
        made += 1
        if made == fault.number and not fault.behind:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if made == fault.number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call
