"""The views alone: crop and colour of pictures that are decoded already and lie on the device.

The stages are those of a ``ViewLoader``: on a GPU all crops of a batch as matrix products, on a CPU one view after the
other on one thread (the loader runs that on each decoding thread); then colour, blur and normalisation of the whole
batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastssl.benchmarks.harness.limits import copy_bytes, copy_call
from fastssl.benchmarks.harness.photos import describe_data, find_data
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.timing import MIN_RUNS, measure_in_turns
from fastssl.benchmarks.suites.loader import default_batch
from fastssl.config.recipe import Recipe
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.ops.augment import augment
from fastssl.pipelines.ops.crop import boxes_of, crop_resize_device, crop_resize_host
from fastssl.pipelines.plan.draw import draw_plans


def run(
    recipe: Recipe,
    recipe_name: str,
    data: str = "synthetic",
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    runs: int = MIN_RUNS,
    photos: int = 512,
) -> list[Record]:
    """Measure the recipe's views on one batch of pictures.

    Args:
        data, photos: see :func:`fastssl.benchmarks.harness.photos.find_data`.
        batch_size: pictures; default: the recipe's, at most 32 on a CPU.
        runs: counted runs of each stage, at least five.

    Returns:
        Three records, ``crop``, ``colour`` and ``whole`` (``details["stage"]``). The ceiling is memory: the bytes of
        the boxes, of the uint8 views and of the float views that the stage cannot avoid to read or write, at the
        bandwidth of a large copy measured in the same turns.
    """
    device = torch.device(device)
    path, name = find_data(data, photos)
    batch = default_batch(recipe, device, batch_size)
    with BetonReader(path) as reader:
        ids = np.arange(batch) % len(reader)
        pictures = {int(sample): reader.decode(int(sample)) for sample in np.unique(ids)}
        heights, widths = reader.heights[ids].astype(np.int64), reader.widths[ids].astype(np.int64)
        about = describe_data(reader, name)
    plans = draw_plans(recipe.views, 0, 0, np.arange(batch), heights, widths)
    packed = torch.from_numpy(np.concatenate([pictures[int(sample)].reshape(-1) for sample in ids])).to(device)
    offsets = np.concatenate([[0], np.cumsum(heights * widths * 3)[:-1]])
    boxes = [boxes_of(plan) for plan in plans]
    slots = [torch.empty(spec.count, batch, spec.size, spec.size, 3, dtype=torch.uint8) for spec in recipe.views]

    def crop() -> list[Tensor]:
        if device.type == "cuda":
            return crop_resize_device(packed, offsets, heights, widths, plans, recipe.views)
        for position, sample in enumerate(ids):
            for table, spec, slot in zip(boxes, recipe.views, slots):
                crop_resize_host(pictures[int(sample)], table[position], spec, slot.numpy(), position)
        return [slot.flatten(0, 1).permute(0, 3, 1, 2) for slot in slots]

    def colour(cropped: list[Tensor]) -> list[Tensor]:
        return [augment(pixels, plan.reshape(-1), spec) for pixels, plan, spec in zip(cropped, plans, recipe.views)]

    cropped = crop()
    if device.type == "cpu":
        cropped = [
            pixels.clone(memory_format=torch.channels_last) for pixels in cropped
        ]  # `crop` writes its result again and again
    timings = measure_in_turns(
        {"crop": crop, "colour": lambda: colour(cropped), "whole": lambda: colour(crop()), "copy": copy_call(device)},
        device=device,
        runs=runs,
    )
    bandwidth = copy_bytes(device) / timings["copy"].median_s
    box_pixels = float(sum(3 * (plan["height"].astype(np.int64) * plan["width"]).sum() for plan in plans))
    pixels = float(sum(spec.count * batch * 3 * spec.size**2 for spec in recipe.views))
    # crop: boxes in, bytes out. colour: bytes in, float32 out. whole: the bytes between the two need not exist.
    moved = {"crop": box_pixels + pixels, "colour": 5 * pixels, "whole": box_pixels + 4 * pixels}
    views = sum(spec.count for spec in recipe.views)
    records = []
    for stage, size in moved.items():
        seconds, view_per_s = timings[stage].median_s, views * batch / timings[stage].median_s
        ceiling = views * batch * bandwidth / size
        records.append(
            Record(
                bench="views",
                recipe=recipe_name,
                pipeline="native",
                device=device.type,
                batch_size=batch,
                pair_per_s=batch / seconds,
                view_per_s=view_per_s,
                median_s=seconds,
                runs=runs,
                ceiling=ceiling,
                ceiling_name="memory bandwidth (measured copy)",
                fraction_of_ceiling=view_per_s / ceiling,
                bottleneck=_larger(timings["crop"].median_s, timings["colour"].median_s) if stage == "whole" else None,
                details={
                    "stage": stage,
                    "data": about,
                    "bytes_per_view": size / (views * batch),
                    "copy_bytes_per_s": bandwidth,
                    "cpu_s": timings[stage].median_cpu_s,
                    "threads": torch.get_num_threads() if device.type == "cpu" else None,
                },
            )
        )
    return records


def _larger(crop: float, colour: float) -> str:
    name, seconds = ("crop", crop) if crop > colour else ("colour", colour)
    return f"{name} ({seconds / (crop + colour):.0%} of the time)"
