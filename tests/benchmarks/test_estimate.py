"""What a run will cost: the arithmetic by hand, and a short measurement against a run that was really made."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastssl.benchmarks.estimate import cost, gauge, memory
from fastssl.benchmarks.estimate import estimate as estimate_module
from fastssl.benchmarks.estimate.cost import Line, MemoryModel
from fastssl.benchmarks.estimate.estimate import run
from fastssl.benchmarks.suites.step import Step
from fastssl.config.recipe import Recipe, load_recipe
from fastssl.errors import FastSSLError
from fastssl.methods import DINOConfig, MoCoConfig, SimCLRConfig, SwAVConfig
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.loader import ViewLoader

CPU = torch.device("cpu")


def tiny(**changes: str) -> Recipe:
    """A small recipe with steps of 8."""
    values = {
        "arch": "mobilenetv3_small_050",
        "train.batch_size": "8",
        "moco.queue": "64",
        "train.epochs": "5",
        "probe.every_epochs": "2",
    }
    return load_recipe(
        "few-photos-moco",
        {
            "views.0.size": "32",
            "probe.size": "32",
            **values,
            **{key.replace("__", "."): value for key, value in changes.items()},
        },
    )


# ---------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(8, 20), (16, 36)], Line(4, 2)),  # two points: through both
        ([(1, 2), (2, 3), (3, 7)], Line(0, 7 / 3)),  # least squares would be -1 + 2.5 x: it may not begin below zero
        ([(1, 3), (2, 4), (3, 8)], Line(0, 2.5)),  # 5 / 2 x: begins at zero exactly
        ([(2, 10), (4, 10)], Line(10, 0)),  # nothing depends on x
        ([(4, 12)], Line(0, 3)),  # one point: in proportion
        ([(4, 12), (4, 16)], Line(0, 4)),  # one x, measured twice: the larger
        ([(8, 20), (16, 18)], Line(0, 18 / 16)),  # noise: it may not fall
        ([(4, 0), (8, 0)], Line(0, 0)),
    ],
)
def test_fit_line(points: list[tuple[float, float]], expected: Line) -> None:
    found = cost.fit_line(points)
    assert (found.fixed, found.slope) == pytest.approx((expected.fixed, expected.slope), abs=1e-12)
    assert cost.fit_line(points[::-1]).at(100) == pytest.approx(expected.at(100))


@pytest.mark.parametrize("points", [[], [(0, 1)], [(-4, 1), (4, 2)]])
def test_no_line_without_points(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="positive x"):
        cost.fit_line(points)


def test_seconds_of_a_step_with_data() -> None:
    # 64 pairs: the step takes 2 s, the loader alone 0.64 s.
    assert cost.step_with_data_s(2.0, 64, 100, shared=True, together=None) == pytest.approx(2.64)
    assert cost.step_with_data_s(2.0, 64, 100, shared=False, together=None) == pytest.approx(2.0)
    assert cost.step_with_data_s(2.0, 64, 10, shared=False, together=None) == pytest.approx(6.4)
    # Measured at the batch itself: nothing is worked out.
    assert cost.step_with_data_s(2.0, 64, 100, shared=True, together=(64, 2.2, 2.0)) == 2.2
    # Measured at 16 pairs, where data cost 0.05 s: four times that at 64. Noise cannot make data speed the step up.
    assert cost.step_with_data_s(2.0, 64, 100, shared=True, together=(16, 0.65, 0.6)) == pytest.approx(2.2)
    assert cost.step_with_data_s(2.0, 64, 100, shared=True, together=(16, 0.5, 0.6)) == 2.0
    # A loader of its own: at 64 pairs it may be the slower one although it was not at 16.
    assert cost.step_with_data_s(2.0, 64, 20, shared=False, together=(16, 0.8, 0.8)) == pytest.approx(3.2)


def test_seconds_of_a_run() -> None:
    # 1,000 photos make 7 steps of 128, the rest is left out; 5 epochs have probes after the second and the fourth.
    probes = cost.probe_count(5, 2)
    assert probes == 2
    assert cost.run_seconds(1000, 128, 5, 0.5, probes=probes, probe_s=3) == (3.5, 23.5)
    assert cost.run_seconds(128, 128, 1, 0.0) == (0, 0)
    with pytest.raises(ValueError, match="fewer than one batch"):
        cost.run_seconds(127, 128, 1, 0.5)
    # No probe after the last epoch, none at all with 0.
    assert [cost.probe_count(4, 2), cost.probe_count(1, 1), cost.probe_count(100, 0)] == [1, 0, 0]


def moco(queue: int, split_bn: int) -> MoCoConfig:
    return MoCoConfig(queue=queue, split_bn=split_bn)


def test_batches_that_a_recipe_allows() -> None:
    assert cost.allowed_batches(moco(256, 2), 1000) == [128, 64, 32, 16, 8, 4, 2]
    assert cost.allowed_batches(moco(256, 16), 1000) == [128, 64, 32, 16]  # two keys in each of 16 groups
    assert cost.allowed_batches(moco(256, 2), 100) == [64, 32, 16, 8, 4, 2]
    assert cost.allowed_batches(moco(96, 1), 1000) == [48, 24, 16, 12, 8, 6, 4, 3, 2]
    assert cost.allowed_batches(moco(7, 1), 1000) == []
    assert cost.allowed_batches(DINOConfig(), 5) == [5, 4, 3, 2]
    assert cost.allowed_batches(SwAVConfig(queue=4), 9) == [4, 3, 2]  # whole batches fit into the queue
    assert cost.allowed_batches(SimCLRConfig(neighbors=20), 13) == [13, 12, 11]


def test_a_method_without_a_bound_stops_at_the_photos() -> None:
    need = MemoryModel(0, Line(0, 1), 0, 0)
    assert cost.largest_batch(need, 1000, settings=DINOConfig(), most=77) == (77, "photos")
    assert cost.largest_batch(need, 50, settings=DINOConfig(), most=77) == (50, "memory")
    assert cost.largest_batch(need, 1000, settings=SwAVConfig(queue=40), most=77) == (40, "swav.queue")


def test_largest_batch() -> None:
    need = MemoryModel(static=100, step=Line(20, 10), images=1, data=2)
    assert need.at(8) == 100 + 20 + 80 + 16
    assert need.at(8, parts=2) == 100 + 20 + 40 + 4 + 16  # the keys' pass still holds all images

    def largest(limit: float, queue: int = 256, split_bn: int = 2, most: int = 1000) -> tuple[int | None, str]:
        return cost.largest_batch(need, limit, settings=moco(queue, split_bn), most=most)

    assert largest(need.at(32)) == (32, "memory")
    assert largest(need.at(32) - 1) == (16, "memory")
    assert largest(1e9) == (128, "moco.queue")
    assert largest(1e9, most=100) == (64, "photos")
    assert largest(10) == (None, "memory")
    assert largest(need.at(8), split_bn=32) == (None, "memory")
    assert largest(1e9, queue=7) == (None, "moco.queue")
    # What needs no more for more pairs always fits.
    assert cost.largest_batch(MemoryModel(5, Line(0, 0), 0, 0), 5, settings=moco(64, 1), most=99) == (32, "moco.queue")


def test_parts_that_fit() -> None:
    need = MemoryModel(static=100, step=Line(20, 10), images=1, data=2)
    assert cost.parts_that_fit(need, need.at(12), 12) == 1
    assert cost.parts_that_fit(need, need.at(12) - 1, 12) == 2
    assert cost.parts_that_fit(need, need.at(12, 6), 12) == 6  # parts of two pairs
    assert cost.parts_that_fit(need, need.at(12, 6) - 1, 12) is None


def test_the_measured_batch_follows_the_budget() -> None:
    class First:
        batch, median_s, peak_bytes = 2, 0.1, 1000

    def top(seconds: float, memory_bytes: float = 1e9, groups: int = 2) -> int:
        return gauge.affordable_batch(First(), 128, groups, seconds, memory_bytes)

    assert top(1000) == 128
    assert top(8 * 0.05 * 128) == 128 and top(8 * 0.05 * 127) == 64
    assert top(1000, memory_bytes=16_000) == 32  # 500 bytes a pair
    assert top(0) == 2 and top(-3) == 2
    # A pair for each BatchNorm group, in a hurry; nothing if there is no time even for that.
    assert top(4 * 0.05 * 8, groups=8) == 8 and top(4 * 0.05 * 7, groups=8) == 2


def test_memory_of_the_host(tmp_path: Path) -> None:
    group = tmp_path / "cgroup"
    assert memory._within_group(4096, 9216, group) == (4096, 9216)  # no such files: another system
    group.mkdir()
    for name, text in (
        ("memory.max", "max\n"),
        ("memory.current", "700\n"),
        ("memory.stat", "anon 1\ninactive_file 150\nactive_file 50\n"),
    ):
        (group / name).write_text(text)
    assert memory._within_group(4096, 9216, group) == (4096, 9216)
    (group / "memory.max").write_text("2000\n")
    assert memory._within_group(4096, 9216, group) == (1500, 2000)

    available, total = memory.memory_bytes(CPU)
    assert 0 < available <= total


def test_what_a_step_takes_beside_its_tensors() -> None:
    assert memory.step_overhead(grown=190, expected=150, step=100) == pytest.approx(1.4)
    assert memory.step_overhead(grown=140, expected=150, step=100) == 1
    assert memory.step_overhead(grown=900, expected=150, step=100) == 3
    now, most = memory.resident_bytes("VmRSS"), memory.resident_bytes("VmHWM")
    if now is not None:
        assert most > 2**20 and now > 2**20
    assert memory.resident_bytes("VmNothing") is None


# ---------------------------------------------------------------------- measuring


@pytest.fixture(scope="module")
def estimate(beton: Path) -> SimpleNamespace:
    return SimpleNamespace(**run(tiny(), "few-photos-moco", beton, workers=1, seconds=12))


@pytest.mark.timed
def test_the_estimate_hangs_together(estimate: SimpleNamespace, beton: Path) -> None:
    assert (estimate.arch, estimate.device, estimate.devices, estimate.workers) == (
        "mobilenetv3_small_050",
        "cpu",
        1,
        1,
    )
    assert estimate.data == {"name": beton.name, "samples": 48} and estimate.steps_per_epoch == 6
    assert estimate.epoch_s == pytest.approx(6 * estimate.step_s)
    assert estimate.probes == 2
    assert estimate.run_s == pytest.approx(5 * estimate.epoch_s + 2 * estimate.probe_s + estimate.final_probe_s)
    assert estimate.device_hours == pytest.approx(estimate.run_s / 3600)
    assert estimate.pair_per_s == pytest.approx(8 / estimate.step_s)
    assert estimate.pair_per_s <= estimate.step_pair_per_s
    assert estimate.limit == ("data" if estimate.loader_pair_per_s < estimate.step_pair_per_s else "step")
    assert estimate.memory_bytes == pytest.approx(
        estimate.static_bytes + estimate.activation_bytes + estimate.data_bytes, abs=3
    )
    assert estimate.fits and estimate.largest_batch == 32 and estimate.largest_batch_limit == "moco.queue"
    assert [step["batch_size"] for step in estimate.measured["step"]][-1] == 8 and not estimate.extrapolated
    assert estimate.measured["together"]["batch_size"] == 8
    json.dumps(vars(estimate), allow_nan=False)


@pytest.mark.timed
def test_an_epoch_takes_about_what_was_estimated(estimate: SimpleNamespace, beton: Path) -> None:
    recipe, epochs = tiny(), []
    step = Step(recipe, CPU, 8, amp=False)
    with ViewLoader(beton, recipe.views, 8, workers=1) as loader:
        for epoch in range(6):
            started = time.perf_counter()
            for batch in loader.epoch(epoch):
                step(batch.views)
            epochs.append(time.perf_counter() - started)
    # Loose: both are medians, but the machine may have other things to do in one of the two.
    assert estimate.epoch_s < 4 * statistics.median(epochs[1:])
    assert estimate.epoch_s > 0.25 * min(epochs)


def test_memory_grows_with_the_batch() -> None:
    small, large = (gauge.gauge_step(tiny(), CPU, size) for size in (8, 32))
    images = memory.image_bytes(tiny(), CPU)
    assert images == 2 * 3 * 32 * 32 * 4
    assert small.peak_bytes + 24 * images < large.peak_bytes < 4 * small.peak_bytes
    whole, backbone = memory.state_bytes(small.step)
    weights = sum(p.numel() for p in small.step.method.student.parameters())
    # Two networks, the optimiser's momentum, the queue; BatchNorm's statistics on top.
    assert 3 * 4 * weights + 64 * 128 * 4 < whole < 1.2 * (3 * 4 * weights + 64 * 128 * 4)
    assert 0 < backbone < whole / 3


def test_loader_bytes(beton: Path) -> None:
    with BetonReader(beton) as reader:
        assert memory.loader_bytes(tiny(), reader, CPU) == (2 * 2 * 3 * 32 * 32 * 4, 5 * 2 * 3 * 32 * 32)
        # Five batches of some 3,200 pixels a photo, each pinned as a power of two.
        recipe, gpu = tiny(train__batch_size="24", moco__queue="960"), torch.device("cuda")
        assert 1.1 * 24 * 3 * 48 * 64 < 2**18 < 2 * 24 * 3 * 48 * 64
        assert memory.loader_bytes(recipe, reader, gpu)[1] * 24 == pytest.approx(5 * 2**18, rel=1e-3)


@pytest.mark.timed
def test_a_slow_step_is_measured_in_small_and_extrapolated(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a laptop with the full recipe: 10 ms a pair and 20 ms a step, and a batch for which there is no time."""

    def slow(self: Step, views: list[torch.Tensor]) -> None:
        time.sleep(0.02 + 0.01 * self.batch_size)

    monkeypatch.setattr(Step, "__call__", slow)
    recipe = tiny(train__batch_size="48", moco__queue="960", moco__split_bn="4")
    started = time.perf_counter()
    found = SimpleNamespace(**run(recipe, "slow", beton, workers=1, seconds=3))
    assert time.perf_counter() - started < 9  # half as much again by itself, and as much for a busy machine
    top = found.measured["step"][-1]["batch_size"]
    assert top < 48 and any(f"from batch {top} to 48" in words for words in found.extrapolated)
    assert 0.25 < 48 / found.step_pair_per_s < 1.5  # 0.5 s, and room for a busy machine
    # In parts: the same work in two passes.
    halved = replace(recipe, train=replace(recipe.train, accumulate=2))
    parts = SimpleNamespace(**run(halved, "slow", beton, workers=1, seconds=2))
    assert 0.25 < 48 / parts.step_pair_per_s < 1.5
    assert any(words.startswith("train.accumulate") for words in parts.extrapolated)


@pytest.mark.timed
def test_a_batch_beyond_the_memory(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        memory, "resident_bytes", lambda key: None
    )  # as on a system that does not tell: tensors alone count
    measured: list[gauge.Measured] = []

    def measure(*arguments: Any) -> gauge.Measured:
        measured.append(gauge.measure(*arguments))
        return measured[-1]

    monkeypatch.setattr(estimate_module, "measure", measure)
    estimate = SimpleNamespace(**run(tiny(), "few-photos-moco", beton, workers=1, seconds=2))
    assert estimate.fits and estimate.measured["step_overhead"] == 1
    # The same measurement where there is room for what the estimate said of 8 pairs, minus a little.
    room = int(0.95 * estimate.memory_bytes / cost.USABLE["cpu"])
    monkeypatch.setattr(estimate_module, "measure", lambda *_: replace(measured[0], available=room))
    found = SimpleNamespace(**run(tiny(), "few-photos-moco", beton, workers=1, seconds=2))
    assert not found.fits and found.memory_bytes > found.usable_bytes
    assert found.largest_batch in (2, 4) and found.largest_batch_limit == "memory"
    assert found.fitting_accumulate in (2, 4)
    assert found.recomputed_bytes < found.memory_bytes
    lean = replace(tiny(), train=replace(tiny().train, checkpoint=True))
    assert SimpleNamespace(**run(lean, "few-photos-moco", beton, workers=1, seconds=2)).recomputed_bytes is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moco__queue": "60"}, "must be a multiple of twice the batch"),
        ({"moco__split_bn": "16"}, "fewer than 2 of 16 keys"),
        ({"train__batch_size": "64", "moco__queue": "128"}, "48 photos, fewer than one batch of 64"),
        ({"arch": "mobilenetv9"}, "unknown network"),
        ({"arch": "vit_tiny", "views__0__size": "33"}, "cannot take pictures of 33 px; try --set views.0.size=48,"),
    ],
)
def test_what_would_not_train(beton: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(FastSSLError, match=message):
        run(tiny(**changes), "few-photos-moco", beton, workers=1, seconds=1)


@pytest.mark.timed
def test_epochs_of_small_views_are_counted_by_their_own_steps(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_pixels(self: Step, views: list[torch.Tensor]) -> None:
        time.sleep(0.2 * (views[0].shape[-1] / 32) ** 2)

    monkeypatch.setattr(Step, "__call__", by_pixels)
    recipe = tiny(probe__every_epochs="0", progressive__epochs="0.6")  # three of five epochs, a quarter of the time
    found = SimpleNamespace(**run(recipe, "small", beton, workers=1, seconds=6))
    epochs = (found.run_s - found.final_probe_s) / found.epoch_s
    assert epochs == pytest.approx(2 + 3 / 4, abs=0.3) and found.small_epochs == 3


def test_the_largest_batch_goes_with_the_recipes_parts() -> None:
    memory = cost.MemoryModel(0.0, cost.Line(0.0, 1.0), 0.0, 0.0)
    assert cost.largest_batch(memory, 30, settings=moco(2040, 1), most=10_000) == (30, "memory")
    # In four parts only a quarter of the batch is held at once, and the batch is a multiple of four.
    assert cost.largest_batch(memory, 30, settings=moco(2040, 1), most=10_000, parts=4) == (68, "memory")


def test_the_final_probe_counts_every_network() -> None:
    def passes(name: str, **changes: str) -> int:
        return estimate_module._final_passes(
            load_recipe(name, {f"probe.{key}": value for key, value in changes.items()}), 100
        )

    assert passes("few-photos-moco") == 200  # the trained network, and the one before training
    assert passes("dino-mobilenetv2-sslight") == 300  # the teacher, too
    assert passes("dino-mobilenetv2-sslight", reestimate_bn="50") == 500 + 100
    assert passes("swav-mobilenetv2-sslight", teacher="true") == 200  # has none
