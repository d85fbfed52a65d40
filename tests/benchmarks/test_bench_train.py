"""The benchmark of training end to end."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lines import to_line

from fastssl.benchmarks.harness.roofline import Cost
from fastssl.benchmarks.harness.setting import RecipeSetting
from fastssl.benchmarks.suites import step as step_bench
from fastssl.benchmarks.suites import train as bench
from fastssl.benchmarks.suites.step import Fitted
from fastssl.config.recipe import Recipe, load_recipe
from fastssl.errors import FastSSLError
from fastssl.training.step import TrainStep
from fastssl.utils.cores import available_cores

SMALL = {"views.0.size": "32", "probe.size": "32"}


def setting(recipe: Recipe, data: str = "synthetic", **options: object) -> RecipeSetting:
    return RecipeSetting(recipe=recipe, recipe_name="few-photos-moco", data=data, **options)


class FakeStep:
    """A step of known length."""

    def __init__(self, seconds: float):
        self.seconds, self.batch_size, self.device, self.amp = seconds, 8, torch.device("cpu"), False
        self.batches: set[int] = set()
        train = SimpleNamespace(compile=False, graph=False, accumulate=1)
        self.recipe = SimpleNamespace(train=train)
        parts = SimpleNamespace(count=1)
        self.inner = SimpleNamespace(fallbacks={}, view_dtype=torch.float32, takes_crops=False, parts=parts)

    def __call__(self, views: list[torch.Tensor], tables: object = ()) -> None:
        assert views[0].shape == (16, 3, 32, 32)
        self.batches.add(views[0].data_ptr())
        time.sleep(self.seconds)


def measure(beton: Path, step: FakeStep, monkeypatch: pytest.MonkeyPatch, seconds: float = 1.0):
    monkeypatch.setattr(bench, "fit_step", lambda *args, **options: Fitted(step, [], 8, Cost((), 0)))
    recipe = load_recipe("few-photos-moco", SMALL)
    (record,) = bench.run(setting(recipe, str(beton), workers=1, batch_size=8, seconds=seconds))
    assert record.view_per_s == pytest.approx(2 * record.pair_per_s)
    assert record.fraction_of_ceiling == pytest.approx(record.view_per_s / record.ceiling)
    assert record.details["headspace"] == pytest.approx(1 / record.fraction_of_ceiling - 1)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastssl-decode")]
    return record


def test_a_step_that_costs_nothing_is_bound_by_data(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = measure(beton, FakeStep(0.0), monkeypatch)
    assert record.fraction_of_ceiling < 0.5
    assert record.bottleneck.startswith("data (")
    assert record.details["data_counted"] > 0.5, "a step without processor time: all of it is data's"


def test_a_slow_step_hides_the_loader(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = measure(beton, FakeStep(0.08), monkeypatch, seconds=2.0)
    # Decoding runs while the step sleeps; what is left is the colour, which the consumer computes itself.
    assert record.fraction_of_ceiling > 0.6
    assert record.pair_per_s <= 8 / 0.08
    assert record.details["data_wait"] < 0.3


@pytest.mark.slow
def test_advice_is_tried_and_its_outcome_stands_beside_the_prediction(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos that take far longer to decode than the step takes: smaller ones, and another thread where there is a core
    for it, must help.
    """
    monkeypatch.setattr(bench, "fit_step", lambda *args, **options: Fitted(FakeStep(0.0), [], 8, Cost((), 0)))
    recipe = load_recipe("few-photos-moco", SMALL)
    (record,) = bench.run(setting(recipe, "synthetic", workers=1, batch_size=8, seconds=2.0, photos=64))
    remedies = record.details["remedies"]
    (smaller,) = [remedy for remedy in remedies if remedy["do"] == "convert with --short-side 48"]
    assert smaller["predicted"] > 2 and smaller["measured"] > 1.5
    assert (
        f"{smaller['predicted']:.2f}x" in record.details["advice"]
        and f"{smaller['measured']:.2f}x" in record.details["advice"]
    )
    assert record.details["advice"].startswith("data-bound ")
    threads = [remedy for remedy in remedies if "decode thread" in remedy["do"]]
    assert len(threads) == (available_cores() > 1)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastssl-decode")]


def test_a_loop_that_waits_for_nothing_needs_no_advice(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ratio", lambda ours, theirs: 0.97)  # whatever this machine makes of it
    record = measure(beton, FakeStep(0.05), monkeypatch, seconds=1.0)
    assert record.details["remedies"] == [] and record.details["advice"].startswith("step-bound: data costs 3%")


def test_train_record_of_a_real_network(beton: Path) -> None:
    recipe = load_recipe("few-photos-moco", {**SMALL, "moco.queue": "64", "arch": "lcnet_035"})
    (record,) = bench.run(setting(recipe, str(beton), workers=2, batch_size=4, seconds=0.2))
    assert record.bench == "train" and record.arch == "lcnet_035" and record.workers == 2 and record.batch_size == 4
    assert record.details["data"]["name"] == beton.name and record.details["amp"] == "off"
    assert record.pair_per_s > 0
    to_line(record)


@pytest.mark.slow
def test_a_recorded_step_is_fed_the_crops_that_it_was_recorded_with(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replayed(call):
        result = torch.zeros(4)
        return lambda: result.copy_(call()), result

    monkeypatch.setattr(step_bench, "TrainStep", partial(TrainStep, record=replayed))
    recipe = load_recipe(
        "few-photos-moco", {**SMALL, "moco.queue": "64", "arch": "lcnet_035", "zero_init_residual": "false"}
    )
    chosen = setting(recipe, str(beton), workers=1, batch_size=4, seconds=0.2, graph=True, amp="bf16")
    (record,) = bench.run(chosen)
    assert record.details["graph"] and record.details["colours_crops"] and record.details["fallbacks"] == {}
    (record,) = step_bench.run(setting(recipe, batch_size=4, graph=True))
    assert record.details["graph"] and record.details["share"] is None


def test_damaged_photos_are_passed_over_as_the_recipe_says(damaged: tuple[Path, int]) -> None:
    path, _ = damaged
    options = {"moco.queue": "64", "arch": "lcnet_035", "zero_init_residual": "false"}
    with pytest.raises(FastSSLError, match="sample"):
        recipe = load_recipe("few-photos-moco", {**SMALL, **options})
        bench.run(setting(recipe, str(path), workers=1, batch_size=4, seconds=0.2))
    skipping = load_recipe("few-photos-moco", {**SMALL, **options, "train.on_bad": "skip"})
    (record,) = bench.run(setting(skipping, str(path), workers=1, batch_size=4, seconds=0.2))
    assert record.pair_per_s > 0
