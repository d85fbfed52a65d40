"""The teacher of a distillation: from whatever names it to a network that is known to work on this run's views."""

from __future__ import annotations

import torch

from fastssl.config.recipe import Recipe
from fastssl.errors import FastSSLError
from fastssl.evaluate.trained import load_trained
from fastssl.methods.distill import DistillConfig, FrozenTeacher
from fastssl.models.backbones import require_sizes
from fastssl.pipelines.plan.draw import Normalisation
from fastssl.utils.digest import digest


def load_teacher(recipe: Recipe) -> FrozenTeacher:
    """On the CPU. ``about`` has its ``name``, ``arch`` and ``fingerprint``: a digest of all that decides what it says.

    Raises:
        FastSSLError: none is named, there are no such weights, it does not take pictures of that size, or what it says
            is not finite.
    """
    config = recipe.settings
    assert isinstance(config, DistillConfig)
    if config.teacher is None:
        what = "a run's folder, a file with weights or a timm name with its tag"
        raise FastSSLError(f"distill.teacher is missing: --set distill.teacher=... names {what}")
    view = recipe.views[0]
    given, size = Normalisation(view.mean, view.std), config.teacher_size or view.size
    found = load_trained(config.teacher)
    require_sizes(found.backbone, found.arch, {"distill.teacher_size": size})
    parts = {**found.backbone.state_dict(), "size": size, "seen": [*found.normalisation]}
    about = {"name": found.name, "arch": found.arch, "fingerprint": digest(parts)[:16]}
    teacher = FrozenTeacher(
        found.backbone, size=config.teacher_size, given=given, seen=found.normalisation, about=about
    )
    noise = torch.randn(2, 3, view.size, view.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not torch.isfinite(teacher(noise)).all():
            raise FastSSLError(f"{config.teacher}: its features are NaN or infinite; such a teacher teaches nothing")
    return teacher
