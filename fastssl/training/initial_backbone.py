"""The network that a recipe names, as a run begins with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastssl.config.recipe import Recipe
from fastssl.models.backbones import create_backbone, require_sizes, resolve_arch
from fastssl.pipelines.plan.multicrop import MultiCrop


def picture_sizes(recipe: Recipe) -> dict[str, int]:
    """Sides of the pictures that the network will see, by the recipe's key."""
    if isinstance(recipe.views, MultiCrop):
        local = {"views.local_size": recipe.views.local_size} if recipe.views.local_count else {}
        views = {"views.global_size": recipe.views.global_size, **local}
    else:
        views = {f"views.{number}.size": spec.size for number, spec in enumerate(recipe.views)}
    return {**views, "probe.size": recipe.probe.size}


def initial_backbone(recipe: Recipe, seed: int, say: Callable[[str], None] = lambda text: None) -> nn.Module:
    """The backbone as a run with this seed begins with it, on the CPU: the same weights at every call.

    Args:
        say: is told which settings of the recipe change nothing in this network. A recipe may be for other networks,
            too: that is no warning.

    Raises:
        FastSSLError: no such network, a name with the tag of weights, or a size of views or probe that the network does
            not take.
    """
    resolve_arch(recipe.arch)  # refuses the tag of weights, which would not be used
    torch.manual_seed(seed)
    backbone = create_backbone(
        recipe.arch, drop_path=recipe.drop_path, init=recipe.init, zero_init_residual=recipe.zero_init_residual, say=say
    )
    require_sizes(backbone, recipe.arch, picture_sizes(recipe))
    return backbone
