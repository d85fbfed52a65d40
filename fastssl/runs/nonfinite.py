"""The batch of a step whose loss is not finite, kept for a look: what the network was given, exactly, and as a
picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastssl.pipelines.loader import Batch
from fastssl.pipelines.ops.device_colour import DeviceColour
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.json_text import to_json

#: the folder for them in a run's folder
BAD_STEPS = "nonfinite"
#: samples and views of each that the picture shows
_ROWS, _COLUMNS = 16, 12


@torch.no_grad()
def save_bad_step(folder: Path, batch: Batch, views: Sequence[ViewSpec], *, rank: int, about: dict[str, Any]) -> None:
    """Write ``batch.safetensors``, ``step.json`` and ``views.png`` into ``folder`` (of rank r > 0
    ``batch-r.safetensors`` and so on).

    The tensors: ``index`` and ``label`` (B,) int64 and ``views.0``, ...: (count * B, 3, S, S), view-major, normalised
    floats or uint8 crops together with their colour tables ``tables.0``, ... (see ``DeviceColour``).

    Args:
        batch: of the step.
        views: the view groups that made it.
        rank: of the process whose share of the batch this is.
        about: what step.json says besides the samples' ids.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    mine = f"-{rank}" if rank else ""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"index": batch.index, "label": batch.label}
    for kind, parts in (("views", batch.views), ("tables", batch.tables)):
        tensors.update({f"{kind}.{number}": part.detach().cpu().contiguous() for number, part in enumerate(parts)})
    write_atomically(folder / f"batch{mine}.safetensors", lambda path: save_file(tensors, str(path)))
    text = to_json({**about, "rank": rank, "samples": batch.index.tolist()}, indent=2) + "\n"
    write_atomically(folder / f"step{mine}.json", lambda path: path.write_text(text))
    groups = batch.views
    if batch.tables:
        triples = zip(batch.views, batch.tables, views)
        groups = [DeviceColour(spec, torch.float32)(crops, table) for crops, table, spec in triples]
    picture = _picture(groups, views, len(batch.index))
    write_atomically(folder / f"views{mine}.png", lambda path: picture.save(path, format="PNG"))


def _picture(groups: Sequence[Tensor], views: Sequence[ViewSpec], batch: int) -> Image.Image:
    """A sample a row, a view a column, at their own size; values that are not finite are red."""
    columns = [
        (spec, group.unflatten(0, (spec.count, batch))[view, :_ROWS])
        for group, spec in zip(groups, views)
        for view in range(spec.count)
    ][:_COLUMNS]
    tile = max(spec.size for spec, _ in columns)
    canvas = Image.new("RGB", (len(columns) * (tile + 2), min(batch, _ROWS) * (tile + 2)), "white")
    for column, (spec, pictures) in enumerate(columns):
        std, mean = (torch.tensor(values).view(3, 1, 1) for values in (spec.std, spec.mean))
        for row, normalised in enumerate(pictures.float().cpu()):
            broken = ~torch.isfinite(normalised).all(0)
            grey_levels = (torch.nan_to_num(normalised) * std + mean).mul(255).round().clamp(0, 255)
            grey_levels[:, broken] = torch.tensor([255.0, 0.0, 0.0]).unsqueeze(1)
            shown = Image.fromarray(grey_levels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
            canvas.paste(shown, (column * (tile + 2), row * (tile + 2)))
    return canvas
