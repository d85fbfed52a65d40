"""The first part of a DINO run's head, which SSLight's fine-tuning keeps: everything before the last linear layer of
its MLP.

    Linear F-2048, BatchNorm, GELU, Linear 2048-2048, BatchNorm, GELU | Linear 2048-256, unit length, cosines: left out

Source: Tan et al., arXiv 2210.02808, and their public code.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl.config.recipe import Recipe, build_recipe
from fastssl.errors import FastSSLError
from fastssl.methods.dino import DINOConfig, DINOHead
from fastssl.models.backbones import create_backbone, feature_dim
from fastssl.runs.checkpoint import load_checkpoint

_RECIPE_KEYS = frozenset(field.name for field in dataclasses.fields(Recipe))


def run_file(checkpoint: str | Path) -> Path:
    """The ``last.pt`` of a run: heads are kept there alone.

    Args:
        checkpoint: a run's folder, its ``checkpoints/``, or the ``last.pt`` itself.

    Raises:
        FastSSLError: something else, or no such file.
    """
    path = Path(checkpoint)
    if path.is_dir():
        path = (path / "checkpoints" if (path / "checkpoints").is_dir() else path) / "last.pt"
    if path.suffix != ".pt":
        raise FastSSLError(
            f"{path}: holds a backbone alone; the DINO head is in the run's last.pt: give that, or the run's folder"
        )
    if not path.is_file():
        raise FastSSLError(f"{path}: no such file; the DINO head is kept in a run's last.pt")
    return path


def load_half_head(path: Path, which: str = "student", *, fresh: bool = False) -> tuple[nn.Sequential, int]:
    """The hidden layers of a DINO head, features (N, F) -> (N, H), and H.

    Args:
        path: the ``last.pt`` of a DINO run.
        which: ``student`` or ``teacher``.
        fresh: the same layers with new weights, as the run itself began with (drawn from torch's global generator).

    Raises:
        FastSSLError: no DINO run, or a head without hidden layers, or tensors that do not fit what the run says of
            itself.
    """
    state = load_checkpoint(path)
    config: dict[str, Any] = state["config"]
    if config.get("method") != "dino":
        raise FastSSLError(f"{path}: a run of {config.get('method')} has no DINO head; --head linear needs none")
    recipe = build_recipe({key: value for key, value in config.items() if key in _RECIPE_KEYS}, where=str(path))
    settings = recipe.settings
    assert isinstance(settings, DINOConfig)
    if settings.projector.layers < 2:
        raise FastSSLError(
            f"{path}: its DINO head has one linear layer, of which nothing is kept; --head linear does the same"
        )
    prefix = f"{which}.projector."
    tensors = {name.removeprefix(prefix): value for name, value in state["method"].items() if name.startswith(prefix)}
    with torch.device("meta"):  # the width alone is wanted of it
        width = feature_dim(create_backbone(recipe.arch))
    head = DINOHead(width, settings)
    if not fresh:
        try:
            head.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            why = " ".join(str(error).split())[:300]
            raise FastSSLError(f"{path}: the {which}'s head does not fit: {why}") from error
    layers = list(head.mlp)
    last = max(place for place, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    return nn.Sequential(*layers[:last]), settings.projector.hidden
