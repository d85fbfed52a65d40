"""Timing in turns, peak memory, and the loss benchmark in a small form."""

from __future__ import annotations

import time

import pytest
import torch
from lines import to_line

from fastssl.benchmarks.harness.setting import RecipeSetting
from fastssl.benchmarks.harness.timing import Timing, measure_in_turns, peak_extra_bytes
from fastssl.benchmarks.suites import loss
from fastssl.config.recipe import load_recipe


def test_contenders_take_turns_and_the_order_turns_round() -> None:
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = measure_in_turns(contenders, device="cpu", runs=5, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba" + "ab"
    assert {name: len(timing.wall) for name, timing in timings.items()} == {"a": 5, "b": 5}


@pytest.mark.parametrize("enough_for", [0, 1, 4])
def test_one_that_runs_out_of_memory_is_left_out_if_it_may_be(enough_for: int) -> None:
    left = iter(range(enough_for))

    def greedy() -> None:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    contenders = {"a": lambda: None, "greedy": greedy}
    timings = measure_in_turns(contenders, device="cpu", runs=5, warmup=2, optional=["greedy"])
    assert list(timings) == ["a"] and len(timings["a"].wall) == 5 and timings["a"].median_s > 0
    with pytest.raises(torch.OutOfMemoryError):
        measure_in_turns(contenders, device="cpu", runs=5, optional=["a"])


def test_time_of_waiting_is_wall_time_but_not_processor_time() -> None:
    timings = measure_in_turns(
        {"wait": lambda: time.sleep(0.02), "nothing": lambda: None}, device="cpu", runs=5, warmup=0
    )
    assert timings["wait"].median_s >= 0.02
    assert timings["wait"].median_cpu_s < 0.01
    assert timings["nothing"].times_faster_than(timings["wait"]) > 5


def test_ratios_are_taken_within_rounds() -> None:
    # The machine is ten times slower in the middle round; within every round the ratio is 2.
    ours, theirs = Timing(wall=[1, 10, 1], cpu=[1, 1, 1]), Timing(wall=[2, 20, 2], cpu=[3, 3, 3])
    assert ours.times_faster_than(theirs) == 2
    assert theirs.times_faster_than(ours) == 0.5
    assert ours.times_less_cpu_than(theirs) == 3
    assert Timing(wall=[3, 1, 2], cpu=[]).median_s == 2


@pytest.mark.parametrize(
    ("contenders", "runs", "message"), [({"a": lambda: None}, 4, "fewer than 5"), ({}, 5, "0 contenders")]
)
def test_mistakes(contenders: dict, runs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_in_turns(contenders, device="cpu", runs=runs)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    million = 2**20

    def two_at_once_then_one() -> None:
        first = torch.zeros(million)
        second = first + 1
        del first
        second.add_(1)
        del second
        torch.zeros(million // 2)

    assert peak_extra_bytes(two_at_once_then_one, "cpu") == pytest.approx(2 * 4 * million, rel=0.01)


@pytest.mark.parametrize("weighting", ["stepped", "uniform_all"])
def test_loss_record(weighting: str) -> None:
    numbers = {"queue": 2048, "projector.out": 16, "weighting": weighting}
    numbers["neighbors"] = 20 if weighting == "stepped" else "null"
    changes = {f"moco.{name}": str(value) for name, value in numbers.items()}
    recipe = load_recipe("light-moco-mobilenetv3", changes)
    (record,) = loss.run(RecipeSetting(recipe=recipe, recipe_name="light-moco-mobilenetv3", batch_size=32))
    assert (record.bench, record.device, record.batch_size, record.runs, record.peer) == (
        "loss",
        "cpu",
        32,
        5,
        loss.PEER,
    )
    assert record.view_per_s == pytest.approx(32 / record.median_s)
    assert record.pair_per_s == record.view_per_s / 2
    assert record.fraction_of_ceiling == pytest.approx(record.view_per_s / record.ceiling)
    assert record.ratio_to_peer > 0
    assert record.details["peer_peak_extra_bytes"] > 3 * 32 * 2048 * 4
    assert record.details["peak_extra_bytes"] > 0
    assert record.details["neighbors"] == (20 if weighting == "stepped" else None)
    to_line(record)
