"""The views alone: crop and colour of pictures that are decoded already and lie on the device.

The stages are a ``ViewLoader``'s: on a GPU all crops of a batch as matrix products, on a CPU a view after the other on
one thread (the loader runs that on each decoding thread); then colour, blur and normalisation of the whole batch, into
the step's precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.setting import RecipeSetting, rates
from fastssl.benchmarks.harness.timing import copy_limit, largest_share, measure_in_turns
from fastssl.pipelines.ops.augment import augment
from fastssl.pipelines.ops.crop import boxes_of, crop_resize_device, crop_resize_host
from fastssl.pipelines.ops.device_colour import device_colour, parameter_table
from fastssl.pipelines.plan.draw import ViewSpec, draw_plans
from fastssl.utils.transfer import to_device


def colour_tables(plans: Sequence[NDArray[np.void]], device: torch.device) -> list[Tensor]:
    """One for each group of views, as a loader hands them to a step that colours crops itself."""
    return [to_device(parameter_table(plan.reshape(-1)), device) for plan in plans]


def colouring(
    plans: Sequence[NDArray[np.void]], specs: Sequence[ViewSpec], dtype: torch.dtype, device: torch.device
) -> Callable[[list[Tensor]], list[Tensor]]:
    """What colours uint8 crops of these plans as training does, into ``dtype``: on a GPU with tables that lie there
    already, on a CPU by the compiled loops, on one thread.
    """
    if device.type == "cuda":
        tables, colours = colour_tables(plans, device), [device_colour(spec, dtype, device) for spec in specs]
        return lambda crops: [colour(*given) for colour, *given in zip(colours, crops, tables)]
    rows = [plan.reshape(-1) for plan in plans]
    return lambda crops: [augment(*one, dtype) for one in zip(crops, rows, specs)]


def run(setting: RecipeSetting) -> list[Record]:
    """Measure the recipe's views on one batch of pictures.

    Returns:
        Three records, ``crop``, ``colour`` and ``whole`` (``details["stage"]``). The ceiling is memory: the bytes of
        the boxes, of the uint8 views and of the float views that the stage cannot avoid to read or write, at the
        bandwidth of a large copy measured in the same turns.
    """
    device, batch, specs = setting.device, setting.batch, setting.recipe.views
    with setting.open() as (reader, about):
        ids = np.arange(batch) % len(reader)
        pictures = {int(sample): reader.decode(int(sample)) for sample in np.unique(ids)}
        heights, widths = reader.heights[ids].astype(np.int64), reader.widths[ids].astype(np.int64)
    plans = draw_plans(specs, 0, 0, np.arange(batch), heights, widths)
    packed = torch.from_numpy(np.concatenate([pictures[int(sample)].reshape(-1) for sample in ids])).to(device)
    offsets = np.concatenate([[0], np.cumsum(heights * widths * 3)[:-1]])
    boxes = [boxes_of(plan) for plan in plans]
    slots = [torch.empty(spec.count, batch, spec.size, spec.size, 3, dtype=torch.uint8) for spec in specs]

    def crop() -> list[Tensor]:
        if device.type == "cuda":
            return crop_resize_device(packed, offsets, heights, widths, plans, specs)
        for position, sample in enumerate(ids):
            for table, spec, slot in zip(boxes, specs, slots):
                crop_resize_host(pictures[int(sample)], table[position], spec, slot.numpy(), position)
        return [slot.flatten(0, 1).permute(0, 3, 1, 2) for slot in slots]

    cropped = crop()
    if setting.on_cpu:
        # `crop` writes its result again and again.
        cropped = [pixels.clone(memory_format=torch.channels_last) for pixels in cropped]
    dtype = torch.bfloat16 if setting.in_bf16 else torch.float32
    colour = colouring(plans, specs, dtype, device)
    copy, copied = copy_limit(device)
    stages = {"crop": crop, "colour": lambda: colour(cropped), "whole": lambda: colour(crop()), "copy": copy}
    timings = measure_in_turns(stages, device=device, runs=setting.runs)
    bandwidth = copied / timings["copy"].median_s
    box_pixels = float(sum(3 * (plan["height"].astype(np.int64) * plan["width"]).sum() for plan in plans))
    pixels = float(sum(spec.count * batch * 3 * spec.size**2 for spec in specs))
    # crop: boxes in, bytes out. colour: bytes in, floats out. whole: the bytes between the two need not exist.
    floats = dtype.itemsize * pixels
    moved = {"crop": box_pixels + pixels, "colour": pixels + floats, "whole": box_pixels + floats}
    crop_s, colour_s = timings["crop"].median_s, timings["colour"].median_s
    largest = largest_share({"crop": crop_s / (crop_s + colour_s), "colour": colour_s / (crop_s + colour_s)})
    return [
        setting.record(
            "views",
            pipeline="native",
            ceiling_name="memory bandwidth (measured copy)",
            bottleneck=largest if stage == "whole" else None,
            details={
                "stage": stage,
                "data": about,
                "amp": "bf16" if setting.in_bf16 else "off",
                "bytes_per_view": size / (setting.views * batch),
                "copy_bytes_per_s": bandwidth,
                "cpu_s": timings[stage].median_cpu_s,
                "threads": torch.get_num_threads() if setting.on_cpu else None,
            },
            **rates(batch / timings[stage].median_s, batch, setting.views, size / bandwidth / timings[stage].median_s),
        )
        for stage, size in moved.items()
    ]
