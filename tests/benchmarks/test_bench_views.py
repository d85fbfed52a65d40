"""The benchmark of crop and colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lines import to_line

from fastssl.benchmarks.harness import timing
from fastssl.benchmarks.harness.setting import RecipeSetting
from fastssl.benchmarks.harness.timing import largest_share
from fastssl.benchmarks.suites import step as step_bench
from fastssl.benchmarks.suites import views as bench
from fastssl.config.recipe import load_recipe
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.ops.augment import augment
from fastssl.pipelines.plan.draw import draw_plan


def test_views_records(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.LIMITS, "cpu", (2**22, 64))
    recipe = load_recipe("quickstart", {"views.0.size": "32"})
    records = bench.run(RecipeSetting(recipe=recipe, recipe_name="quickstart", data=str(beton), batch_size=6))
    by_stage = {record.details["stage"]: record for record in records}
    assert list(by_stage) == ["crop", "colour", "whole"]
    for record in records:
        assert record.bench == "views" and record.recipe == "quickstart" and record.batch_size == 6
        assert record.view_per_s == pytest.approx(2 * record.pair_per_s) == pytest.approx(12 / record.median_s)
        assert record.fraction_of_ceiling == pytest.approx(record.view_per_s / record.ceiling)
        to_line(record)
    # The bytes that a stage must move, counted here from the same plan.
    (spec,) = recipe.views
    with BetonReader(beton) as reader:
        ids = np.arange(6)
        plan = draw_plan(
            spec, first_view=0, seed=0, epoch=0, sample_ids=ids, heights=reader.heights[ids], widths=reader.widths[ids]
        )
    view, box = 3 * 32 * 32, 3 * float(np.mean(plan["height"].astype(float) * plan["width"]))
    assert by_stage["crop"].details["bytes_per_view"] == pytest.approx(box + view)
    assert by_stage["colour"].details["bytes_per_view"] == pytest.approx(view + 4 * view)
    assert by_stage["whole"].details["bytes_per_view"] == pytest.approx(box + 4 * view)
    # The whole is its parts (half as much again allowed: the machine is shared).
    parts = by_stage["crop"].median_s + by_stage["colour"].median_s
    assert by_stage["whole"].median_s < 3 * parts
    assert by_stage["whole"].median_s > max(by_stage["crop"].median_s, by_stage["colour"].median_s) / 3


def test_every_view_of_every_group_is_made(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.LIMITS, "cpu", (2**20, 64))
    shapes = set()
    real = bench.augment

    def spy(pixels, plan, spec, dtype):
        assert dtype == torch.bfloat16
        shapes.add((tuple(pixels.shape), len(plan)))
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        # Decoded photos, not empty memory: every view has more than one colour.
        assert all(view.float().std() > 1 for view in pixels)
        return real(pixels, plan, spec, dtype)

    monkeypatch.setattr(bench, "augment", spy)
    recipe = load_recipe("quickstart", {"views.0.size": "24"})
    records = bench.run(
        RecipeSetting(recipe=recipe, recipe_name="quickstart", data=str(beton), batch_size=3, amp="bf16")
    )
    # Bytes in and floats of the step's size out.
    assert records[1].details["bytes_per_view"] == 3 * 24 * 24 * (1 + 2) and records[1].details["amp"] == "bf16"
    assert shapes == {((6, 3, 24, 24), 6)}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_colours_come_from_what_is_ready(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the tables are on the device before anything is timed; both ways give the same views."""
    recipe = load_recipe("quickstart", {"views.0.size": "24"})
    crops, plans = step_bench.random_crops(recipe, 3, torch.device("cpu"))
    monkeypatch.setattr(bench, "to_device", lambda table, device: torch.from_numpy(table))
    colour = bench.colouring(plans, recipe.views, torch.float32, torch.device(kind))
    if kind == "cuda":
        monkeypatch.setattr(bench, "parameter_table", None)
    (views,) = colour(crops)
    expected = augment(crops[0], plans[0].reshape(-1), recipe.views[0])
    torch.testing.assert_close(views, expected, atol=2e-2, rtol=0)


def test_the_larger_stage_is_named() -> None:
    assert largest_share({"crop": 0.75, "colour": 0.25}) == "crop (75% of the time)"
    assert largest_share({"crop": 0.2, "colour": 0.8}) == "colour (80% of the time)"
