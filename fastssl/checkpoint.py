"""Checkpoints: whole or absent, and enough to go on at the very step.

``last.pt`` holds the run (all networks, queue or centre, optimiser, position); ``last.safetensors`` holds the backbone alone, for
``fastssl.load_backbone``, and ``last-teacher.safetensors`` the teacher's, where the method has one. Because the order of samples and every view are functions of (seed, epoch, sample), the position
(epoch, step) is all that has to be stored of the data side.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fastssl.backbones import save_backbone
from fastssl.files import write_atomically
from fastssl.optim import after_restore
from fastssl.pipelines.errors import FastSSLError

#: raised when the layout of last.pt changes
VERSION = 1
#: what ``torch.load(weights_only=True)`` raises at files that are damaged, or that ``torch.save`` did not write
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, OverflowError,
    struct.error, OSError,
)  # fmt: skip


@dataclass
class Position:
    """Where a run stands: ``step`` steps are done in all, ``step_in_epoch`` of them in ``epoch``."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    train_seconds: float = 0.0


def save_checkpoint(
    folder: Path, *, method: nn.Module, optimizer: torch.optim.Optimizer, position: Position, config: dict[str, Any], arch: str
) -> None:
    """Write ``last.pt``, ``last.safetensors`` and, where there is a teacher, ``last-teacher.safetensors`` into ``folder``.

    Raises:
        FastSSLError: the disk is full or the folder cannot be written; the checkpoint before is untouched.
    """
    state = {
        "version": VERSION,
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "position": vars(position),
        "config": config,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "last.pt", lambda path: torch.save(state, path))
        save_backbone(method.student.backbone, folder / "last.safetensors", arch=arch, step=str(position.step), network="student")
        if method.teacher is not None:
            save_backbone(
                method.teacher.backbone, folder / "last-teacher.safetensors", arch=arch, step=str(position.step), network="teacher"
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FastSSLError(f"{folder}: checkpoint not written ({error}); the one before it is untouched") from error


def load_checkpoint(path: Path, *, advice: str = "") -> dict[str, Any]:
    """The content of a ``last.pt``, on the CPU. Nothing in the file is executed (``weights_only``).

    A run's has ``method``, ``position`` and ``config``, of the types that ``save_checkpoint`` writes; what is in them ``restore`` and
    ``load_trained`` check. The state of a detector, which ``fastssl evaluate detect`` keeps (see ``is_detector``), has only ``config`` of them.

    Args:
        advice: what to do about a file that cannot be used, for the message.

    Raises:
        FastSSLError: missing, damaged, written by another version, or neither a run's nor a detector's.
    """
    if not path.is_file():
        raise FastSSLError(f"{path}: no such checkpoint")
    end = f"; {advice}" if advice else ""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        # torch's own words would advise to load it without weights_only, which runs whatever code the file holds.
        raise FastSSLError(f"{path}: damaged checkpoint, or no last.pt at all ({type(error).__name__}){end}") from error
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is not int or version != VERSION:
        raise FastSSLError(f"{path}: not a checkpoint of this version of fastssl (wanted version {VERSION}){end}")
    if odd := _odd_part(state):
        raise FastSSLError(f"{path}: is not a whole checkpoint of a {'detector' if is_detector(state) else 'run'} ({odd}){end}")
    return state


def is_detector(state: dict[str, Any]) -> bool:
    """Whether this is the state of a detector in training and not a run's."""
    kind = state.get("kind")
    return (isinstance(kind, str) and kind == "detector") or (kind is None and "detector" in state and "method" not in state)


def _odd_part(state: dict[str, Any]) -> str:
    """What is not as it is written; empty if all is."""
    detector = is_detector(state)
    for part in ("config",) if detector else ("method", "position", "config"):
        if part not in state:
            return f"no {part}"
        if not _has_names(state[part]):
            return f"{part} is no dict with names"
    if detector:
        return ""
    for name, value in vars(Position()).items():
        found = state["position"].get(name)
        if type(found) not in {type(value), int} or not found >= 0:
            return f"position.{name} is no number of {'seconds' if isinstance(value, float) else 'steps or epochs'}"
    return ""


def _has_names(content: object, depth: int = 0) -> bool:
    """Whether all keys are strings, in the dicts inside too. Settings are a few levels deep; a dict that holds itself has no end."""
    if not isinstance(content, Mapping) or depth > 32:
        return False
    inner = [value for value in content.values() if isinstance(value, Mapping)]
    return all(isinstance(name, str) for name in content) and all(_has_names(value, depth + 1) for value in inner)


def restore(state: dict[str, Any], *, method: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Put a loaded checkpoint into the networks and the optimiser; returns where the run stands."""
    try:
        method.load_state_dict(state["method"], strict=True)
        optimizer.load_state_dict(state["optimizer"])
        after_restore(optimizer)
        return Position(**state["position"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise FastSSLError(
            f"the checkpoint does not fit this run ({type(error).__name__}: {first_line}); --resume never starts over"
        ) from error


def differences(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """``["optim.lr: 0.1 there, 0.2 here", ...]``: where two resolved configurations differ."""
    found = []
    for key in sorted({*mine, *theirs}):
        here, there = mine.get(key), theirs.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            found += differences(here, there, f"{prefix}{key}.")
        elif isinstance(here, dict) or isinstance(there, dict):
            found.append(f"{prefix}{key}: only {'here' if there is None else 'there'}")
        elif here != there:
            found.append(f"{prefix}{key}: {there} there, {here} here")
    return found
