"""What a run needs, checked before its first step: better now than after the last epoch."""

from __future__ import annotations

import torch
from torch import nn

from fastssl.pipelines.beton import BetonReader, read_side_file
from fastssl.pipelines.errors import FastSSLError, counted
from fastssl.pipelines.multicrop import MultiCrop
from fastssl.pipelines.verify import verify
from fastssl.recipe import Recipe


def require_readable_names(reader: BetonReader) -> None:
    """Raise FastSSLError where there is a side file and it cannot be read: the report asks it for the names of the classes."""
    read_side_file(reader.path)


def require_whole_photos(reader: BetonReader, workers: int | None = None) -> None:
    """Decode all photos once; raise FastSSLError if one is damaged. For those that the run is judged on at its end.

    Args:
        workers: decoding threads; None: one a core.
    """
    # A wrong checksum alone is no reason: the photo decodes, and training would take it too.
    found = verify(reader.path, workers=workers).damaged
    damaged = [(sample, complaint) for sample, complaint in found if complaint != "wrong checksum"]
    if damaged:
        sample, complaint = damaged[0]
        photos = counted(len(reader), "photo")
        raise FastSSLError(
            f"{reader.path}: damaged are {len(damaged):,} of {photos}, the first is sample {sample} ({complaint}); "
            "convert again without them, or leave them out with --set train.on_bad=skip"
        )


def require_sizes(recipe: Recipe, backbone: nn.Module, device: torch.device) -> None:
    """Show the network one black picture of every size that it will meet; raise FastSSLError if it cannot take one. Leaves it in training mode."""
    keys = "views.global_size, views.local_size" if isinstance(recipe.views, MultiCrop) else "views.0.size"
    for size in sorted({spec.size for spec in recipe.views} | {recipe.probe.size}):
        try:
            with torch.no_grad():
                backbone.eval()(torch.zeros(1, 3, size, size, device=device))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise FastSSLError(f"{recipe.arch} cannot take pictures of {size} px ({reason}): change {keys} or probe.size") from error
    backbone.train()
