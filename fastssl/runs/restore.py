"""Putting what a checkpoint holds into a run.

Its digest says that a file is as it was written, and not by whom: anybody can compute it. So everything is compared
with the run before any of it is taken, and all that is taken are numbers, into tensors of the run's own. torch's
loading takes more: an optimiser's settings; buffers of any shape or layout, which its fused kernels read and write as
if they were the parameter's, beyond their end; and, where the file asks for it, tensors in the place of parameters,
which the optimiser then never moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.errors import FastSSLError, counted
from fastssl.optim.optimizers import state_names
from fastssl.runs.checkpoint import Position
from fastssl.utils.yaml_file import shown


class Unfit(ValueError):
    """What of a file does not fit, as half a sentence."""


def require_fit(
    state: dict[str, Any],
    *,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps_per_epoch: int,
    epochs: int,
    samples: int,
) -> None:
    """Compare a loaded checkpoint with the run that is to go on from it; changes nothing.

    Args:
        state: as ``load_checkpoint`` returns it.
        steps_per_epoch, epochs, samples: of the run and its photos.

    Raises:
        FastSSLError: it does not fit; the message names the part.
    """
    with _told():
        _require_position(vars(Position(**state["position"])), steps_per_epoch, epochs, samples)
        require_tensors(method.state_dict(), state["method"])
        _require_optimizer(optimizer, state.get("optimizer"), state["position"]["step"])


def restore(state: dict[str, Any], *, method: nn.Module, optimizer: torch.optim.Optimizer) -> Position:
    """Put a loaded checkpoint into the networks and the optimiser; returns where the run stands.

    Raises:
        FastSSLError: it does not fit; the message names the part.
    """
    with _told():
        position = Position(**state["position"])
        load_network(method, state["method"])
        load_optimizer(optimizer, state.get("optimizer"), steps=position.step)
    return position


@contextmanager
def _told() -> Iterator[None]:
    """Make one line of whatever a stranger's state leads to."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        why = (
            str(error) if isinstance(error, Unfit) else f"{type(error).__name__}: {shown(' '.join(str(error).split()))}"
        )
        raise FastSSLError(f"the checkpoint does not fit this run ({why}); --resume never starts over") from error


def load_network(network: nn.Module, found: object) -> None:
    """Copy the tensors of a ``state_dict`` into ``network``.

    Raises:
        Unfit: a name, shape or type is another one, or a number is not finite.
    """
    require_tensors(network.state_dict(), found)
    # A plain dict: the one that was read may carry notes for torch, with which a file can have parameters replaced
    # instead of filled.
    network.load_state_dict(dict(found), strict=True)


def load_optimizer(optimizer: torch.optim.Optimizer, found: object, *, steps: int) -> None:
    """Copy momentum and the like of an optimiser's ``state_dict``; its settings are those of the run.

    Args:
        optimizer: over the parameters that the saved one had.
        steps: that the run has made: no tensor counts more.

    Raises:
        Unfit: a name, shape or type is another one, or a number is not finite.
    """
    _require_optimizer(optimizer, found, steps)
    state = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        kept = found["state"].get(number, {})
        if not kept and "momentum_buffer" in state_names(optimizer):
            # A parameter that never had a gradient. Some with a buffer and some without is what no first step leaves;
            # from zero it is the same.
            state[number] = {"momentum_buffer": torch.zeros_like(parameter)}
        elif kept:
            state[number] = {
                name: value.clone() if name == "step" else torch.empty_like(parameter, requires_grad=False).copy_(value)
                for name, value in kept.items()
            }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def require_tensors(wanted: Mapping[str, Tensor], found: object) -> None:
    """Raise Unfit where the tensors of a ``state_dict`` are not of these names, shapes and types, or hold a number that
    is not finite.
    """
    if not isinstance(found, Mapping):
        raise Unfit(f"its networks are a {type(found).__name__}")
    for what, names in (("missing", wanted.keys() - found.keys()), ("unknown", found.keys() - wanted.keys())):
        if names:
            raise Unfit(
                f"{shown(min(names, key=str))} is {what}{f', with {len(names) - 1} more' if len(names) > 1 else ''}"
            )
    for name, tensor in wanted.items():
        _require_like(name, found[name], tensor.shape, tensor.dtype)


def _require_like(name: str, value: object, shape: torch.Size, dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise Unfit(f"{name} is a {type(value).__name__}")
    if value.shape != shape or value.dtype != dtype or value.layout != torch.strided:
        raise Unfit(f"{name} is {tuple(value.shape)} {_short(value.dtype)}, not {tuple(shape)} {_short(dtype)}")
    if not torch.isfinite(value).all():
        raise Unfit(f"{name} holds numbers that are not finite")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """In the order in which ``state_dict`` numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _require_optimizer(optimizer: torch.optim.Optimizer, found: object, steps: int) -> None:
    state = found.get("state") if isinstance(found, Mapping) else None
    if not isinstance(state, Mapping):
        raise Unfit("it holds no state of an optimiser")
    parameters, names = _parameters(optimizer), state_names(optimizer)
    if missing := optimizer.state_dict()["state"].keys() - state.keys():
        raise Unfit(f"its optimiser has nothing of parameter {min(missing)}")
    for number, kept in state.items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise Unfit(f"its optimiser has a parameter {shown(number)}; there are {len(parameters)}")
        if not isinstance(kept, Mapping) or kept.keys() != names:
            raise Unfit(f"its optimiser does not keep {' and '.join(sorted(names)) or 'nothing'} of parameter {number}")
        for name, value in kept.items():
            what, parameter = f"{name} of parameter {number}", parameters[number]
            if name != "step":
                _require_like(what, value, parameter.shape, parameter.dtype)
                continue
            _require_like(what, value, torch.Size(), torch.float32)
            if not 0 <= float(value) <= steps or not float(value).is_integer():
                raise Unfit(f"{what} is {float(value):g} behind {counted(steps, 'step')}")


def _require_position(position: Mapping[str, Any], steps_per_epoch: int, epochs: int, samples: int) -> None:
    step, epoch, inside = (position[name] for name in ("step", "epoch", "step_in_epoch"))
    # Behind its last step an epoch is not at its end before the probe is made.
    if inside > steps_per_epoch or epoch > epochs or (epoch == epochs and inside):
        how_many = counted(epochs, "epoch")
        steps = counted(steps_per_epoch, "step")
        raise Unfit(f"its position is step {shown(inside)} of epoch {shown(epoch)}; the run has {how_many} of {steps}")
    if step != epoch * steps_per_epoch + inside:
        raise Unfit(
            f"position.step is {shown(step)}, but step {inside:,} of epoch {epoch:,} is step "
            f"{epoch * steps_per_epoch + inside:,}"
        )
    if (last := max(position["skipped"], default=0)) >= samples:
        raise Unfit(f"position.skipped names sample {shown(last)}; there are {samples:,}")
    # Not only those that are made: a run that was set back twice remembers what it found out ahead of where it stands
    # now.
    if odd := [number for number in position["passed_over"] if not 1 <= number <= epochs * steps_per_epoch]:
        raise Unfit(f"position.passed_over names step {shown(odd[0])}; the run has {epochs * steps_per_epoch:,}")
