"""The folder of a run that was just finished, with the smallest networks: what the commands behind a training read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fastssl.config.recipe import load_recipe, recipe_to_dict
from fastssl.models.backbones import resolve_arch
from fastssl.optim.schedules import RunLength
from fastssl.runs.checkpoint import Position, save_checkpoint
from fastssl.training.step import TrainStep

BATCH = 4
_SMALL = {
    "moco": {"moco.queue": 64, "moco.projector.hidden": 16, "moco.projector.out": 8, "moco.split_bn": 1},
    "dino": {"dino.out": 12, "dino.projector.hidden": 16, "dino.projector.out": 8},
}


def finished_run(
    folder: Path, recipe: str, overrides: Mapping[str, str] | None = None, *, arch: str = "lcnet_035", steps: int = 2
) -> Path:
    """Some steps on noise, then the checkpoint as training writes it; returns ``folder``."""
    method = load_recipe(recipe).method
    views = (
        {"views.0.size": 32}
        if method == "moco"
        else {"views.global_size": 32, "views.local_size": 16, "views.local_count": 1}
    )
    small = {"arch": arch, "train.batch_size": BATCH, **views, **_SMALL[method]}
    chosen = load_recipe(recipe, {**{key: str(value) for key, value in small.items()}, **(overrides or {})})
    step = TrainStep(chosen, torch.device("cpu"), amp=False, seed=0)
    length = RunLength(10, 2)
    for number in range(steps):
        images = [torch.randn(spec.count * BATCH, 3, spec.size, spec.size) for spec in chosen.views]
        images = [view.contiguous(memory_format=torch.channels_last) for view in images]
        later = {name: on for name, on in step.rates(number + 5, length).items() if isinstance(on, bool)}
        step(images, step.noise(0, number), {**step.rates(number + 1, length), **later})
    config = {
        "recipe": recipe,
        "data": {"name": "noise"},
        "seed": 0,
        **recipe_to_dict(chosen),
        "arch": resolve_arch(arch),
    }
    position = Position(step=steps)
    save_checkpoint(
        folder / "checkpoints",
        method=step.method,
        optimizer=step.optimizer,
        position=position,
        config=config,
        arch=arch,
    )
    return folder
