"""Checkpoints: whole or absent, checked when they are read, and enough to go on at the very step.

A run's ``checkpoints/`` holds::

    step-00012000.pt, ...       the run (all networks, queue or centre, optimiser, position); the newest few are kept
    last.pt                     the newest of them: a second name of the same file
    last.safetensors            the backbone alone, for ``fastssl.load_backbone``
    last-teacher.safetensors    the teacher's, where the method has one
    initial.safetensors         the weights that the run began with, where they were given
    epoch-0050.pt, ...          milestones, where the recipe asks for them, with ``epoch-0050.safetensors`` (and
                                ``-teacher``): never deleted

Because the order of samples and every view are functions of (seed, epoch, sample), the position (epoch, step) is all
that has to be stored of the data side.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastssl.config.resolved import normalisation_of
from fastssl.errors import FastSSLError
from fastssl.methods.base import Encoder, Method
from fastssl.models.backbones import read_header, save_backbone
from fastssl.utils.atomic_files import link_atomically, write_atomically
from fastssl.utils.digest import digest

#: raised when the layout of last.pt changes; 1 had no digest
VERSION, READABLE = 2, (1, 2)
LAST, INITIAL = "last.pt", "initial.safetensors"


class DamagedCheckpoint(FastSSLError):
    """A checkpoint that is not as it was written."""


class NotSaved(FastSSLError):
    """A checkpoint could not be written; the ones before are untouched."""


@dataclass
class Position:
    """Where a run stands, and what it has to tell at its end.

    Attributes:
        step: steps that are done in all. epoch, step_in_epoch: ``step_in_epoch`` of them in ``epoch``.
        train_seconds: spent on them.
        skipped: ids of damaged samples that were passed over so far.
        passed_over: steps (counted from 1) that were not made because their loss or gradient was not finite.
        parts: that ``train.accumulate: auto`` has found; None: it was not asked.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    train_seconds: float = 0.0
    skipped: list[int] = field(default_factory=list)
    passed_over: list[int] = field(default_factory=list)
    parts: int | None = None


def save_checkpoint(
    folder: Path,
    *,
    method: Method,
    optimizer: torch.optim.Optimizer,
    position: Position,
    config: dict[str, Any],
    arch: str,
    keep: int = 2,
    milestone: int | None = None,
) -> None:
    """Write the files of this step into ``folder``, and delete those of earlier steps beyond the newest ``keep``; on a
    full disk, where it does not go otherwise, all but the newest whole one, the oldest first.

    Args:
        keep: how many ``step-*.pt`` stay, this one included; at least 1.
        milestone: the epoch that has just ended, to be kept forever.

    Raises:
        NotSaved: the disk is full or the folder cannot be written; the newest checkpoint before is untouched.
        FastSSLError: the GPU has failed, and will at whatever it is asked next; that checkpoint is untouched, too.
    """
    state = {
        "version": VERSION,
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "position": vars(position),
        "config": config,
    }
    path, networks = folder / f"step-{position.step:08}.pt", _networks(method)

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_state(path, state)
        link_atomically(path, folder / LAST)
        for name, network in networks.items():
            which = "teacher" if network is method.teacher else "student"
            notes = {"step": str(position.step), "network": which, **normalisation_of(config)._asdict()}
            save_backbone(network.backbone, folder / f"{name}.safetensors", arch=arch, **notes)
        if milestone is not None:
            for name, kept in _kept_names(networks, milestone).items():
                link_atomically(folder / name, folder / kept)

    while True:
        try:
            write()
            break
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and re.search("CUDA (error|out of memory)", str(error)):
                failed = f"the GPU failed ({' '.join(str(error).split())[:200]})"
                raise FastSSLError(f"{folder}: not saved, {failed}; the same command goes on from the last") from error
            if not (_may_be_full(folder, error) and _drop_oldest(folder)):
                said = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
                why = "the disk is full" if _may_be_full(folder, error) else said[:200]
                raise NotSaved(f"{folder}: checkpoint not written ({why}); the one before it is untouched") from error
    for other in [other for other in _steps(folder) if other != path][keep - 1 :]:
        with suppress(OSError):
            other.unlink()


def _networks(method: Method) -> dict[str, Encoder]:
    """Whose backbones are written, by the stem of the file."""
    return {"last": method.student, **({} if method.teacher is None else {"last-teacher": method.teacher})}


def has_all_files(folder: Path, method: Method, step: int, milestone: int | None = None) -> bool:
    """Whether beside the ``last.pt`` of this step lies all that ``save_checkpoint`` writes with it: not behind a kill
    between two of its files, nor where a checkpoint from elsewhere was taken over.
    """
    networks = _networks(method)
    try:
        steps = [read_header(folder / f"{name}.safetensors").get("step") for name in networks]
    except FastSSLError:
        return False
    kept = [] if milestone is None else _kept_names(networks, milestone).values()
    return all(found == str(step) for found in steps) and all((folder / name).is_file() for name in kept)


def _kept_names(networks: Iterable[str], epoch: int) -> dict[str, str]:
    """The files of a step, and what they are called where the epoch that it ends is kept forever."""
    names = (LAST, *(f"{name}.safetensors" for name in networks))
    return {name: f"epoch-{epoch:04}{name.removeprefix('last')}" for name in names}


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` with the digest of all that is in it; ``load_checkpoint`` compares it.

    Raises:
        OSError, RuntimeError: the file cannot be written; what was there is untouched.
    """
    # On the CPU, so that tensors are copied from a GPU once, and not again for the file.
    state = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), state)
    state.pop("digest", None)
    state["digest"] = digest(state)
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def _steps(folder: Path) -> list[Path]:
    """The ``step-*.pt`` of a folder, newest first."""
    return sorted((path for path in folder.glob("step-*.pt") if _step_of(path) >= 0), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    found = re.fullmatch(r"step-([0-9]{1,18})\.pt", path.name)
    return int(found[1]) if found else -1


def _may_be_full(folder: Path, error: Exception) -> bool:
    """Whether more room could help. torch's writer says that it failed and not why."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    try:
        newest = max((path.stat().st_size for path in _steps(folder)), default=0)
        return shutil.disk_usage(folder).free < 2 * max(newest, 1 << 20)
    except OSError:
        return False


def _drop_oldest(folder: Path) -> bool:
    """Delete the oldest ``step-*.pt`` where a newer one is last.pt; whether there was such a one."""
    steps = _steps(folder)
    try:
        if len(steps) < 2 or not steps[0].samefile(folder / LAST):
            return False
        steps[-1].unlink()
    except OSError:
        return False
    return True


def find_checkpoint(
    folder: Path, *, say: Callable[[str], None] = lambda text: None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run's ``checkpoints/`` that is whole, and its content; None: there is none at all.

    Args:
        say: is told of every damaged one that is passed over.

    Raises:
        FastSSLError: there are checkpoints and none of them is whole, or one is of another version.
    """
    seen: list[Path] = []
    damaged: list[str] = []
    # Milestones are a last resort: all that was learned since is lost.
    for path in (folder / LAST, *_steps(folder), *sorted(folder.glob("epoch-*.pt"), reverse=True)):
        if not path.is_file() or any(path.samefile(other) for other in seen):
            continue
        seen.append(path)
        try:
            found = load_checkpoint(path)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
            continue
        for complaint in damaged:
            say(f"passed over: {complaint}")
        return path, found
    if damaged:
        raise FastSSLError(f"{damaged[0]}; there is no other to go on from; start over with --resume never")
    return None


def set_aside(
    folder: Path, step: int, source: Path | None = None, *, say: Callable[[str], None] = lambda text: None
) -> None:
    """Put away the ``step-*.pt`` of later steps than ``step``, from where a run goes on: it makes these steps again,
    and they would be taken for newer ones. The newest of them is kept as ``....pt.aside``, for a look.

    Args:
        source: the file that it goes on from, which stays whatever its name.
        say: is told which file was set aside, and why.

    Raises:
        OSError: the folder cannot be written.
    """
    later = [path for path in _steps(folder) if _step_of(path) > step and not (source and path.samefile(source))]
    for path in (*folder.glob("*.aside"), *later[1:]) if later else ():
        path.unlink()
    if later:
        aside = later[0].rename(later[0].with_name(later[0].name + ".aside"))
        others = f" ({len(later) - 1} older than it, and also behind that step, were deleted)" if later[1:] else ""
        say(
            f"{aside}: set aside, as the run goes on from step {step:,} and makes the steps behind it "
            f"again{others}; nothing reads it, it may be deleted"
        )


def load_checkpoint(path: Path, *, advice: str = "") -> dict[str, Any]:
    """The content of a ``last.pt``, on the CPU, every bit as it was written; nothing in the file is executed.

    A run's has ``method``, ``position`` and ``config``; that of ``fastssl evaluate detect`` (``is_detector``) only
    ``config`` of them.

    Args:
        advice: what to do about a file that cannot be used, for the message.

    Raises:
        DamagedCheckpoint: not as it was written, or not written by us.
        FastSSLError: missing, or written by another version.
    """
    if not path.is_file():
        raise FastSSLError(f"{path}: no such checkpoint")
    end = f"; {advice}" if advice else ""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        said = state.pop("digest", None)
        intact = said is None or said == digest(state)
    except Exception as error:  # a damaged file makes torch raise anything at all
        # torch's own words would advise to load it without weights_only, which runs whatever code the file holds.
        raise DamagedCheckpoint(
            f"{path}: damaged checkpoint, or no last.pt at all ({type(error).__name__}){end}"
        ) from error
    if not intact:
        raise DamagedCheckpoint(f"{path}: damaged checkpoint (its content is not what was written){end}")
    if (version := state.get("version")) not in READABLE:
        raise FastSSLError(f"{path}: not a checkpoint of this version of fastssl (wanted version {VERSION}){end}")
    if version > 1 and said is None:
        raise DamagedCheckpoint(f"{path}: damaged checkpoint (its digest is missing){end}")
    kind, parts = ("detector", ("config",)) if is_detector(state) else ("run", ("method", "position", "config"))
    if missing := [part for part in parts if part not in state]:
        raise DamagedCheckpoint(f"{path}: is not a whole checkpoint of a {kind} (no {missing[0]}){end}")
    return state


def is_detector(state: dict[str, Any]) -> bool:
    """Whether this is the state of a detector in training and not a run's; older ones do not say what they are."""
    return state.get("kind", "detector" if "detector" in state and "method" not in state else None) == "detector"


def restore(state: dict[str, Any], *, method: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Put a loaded checkpoint into the networks and the optimiser; returns where the run stands.

    Raises:
        FastSSLError: it does not fit, as where a network has changed in timm since; the message names the part.
    """
    try:
        method.load_state_dict(state["method"], strict=True)
        load_optimizer(optimizer, state["optimizer"])
        return Position(**state["position"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise FastSSLError(f"the checkpoint does not fit this run ({why}); --resume never starts over") from error


def load_optimizer(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> None:
    """Take momentum and the like of an optimiser's ``state_dict``; its settings stay those of the run."""
    own = optimizer.state_dict()
    # A parameter that never had a gradient is not in the file: it keeps the buffer with which the run began.
    optimizer.load_state_dict({"state": {**own["state"], **found["state"]}, "param_groups": own["param_groups"]})
