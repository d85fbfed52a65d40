"""Putting what a checkpoint holds into a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastssl.errors import FastSSLError
from fastssl.runs.checkpoint import Position


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
