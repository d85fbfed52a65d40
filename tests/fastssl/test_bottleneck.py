"""The share of data in a loop's time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.training.bottleneck import bottleneck, data_share


def test_on_a_gpu_the_wait_counts_and_on_a_cpu_what_the_step_did_not_use() -> None:
    spent = {"wait_s": 0.5, "colour_s": 0.5, "loader_cpu_s": 6.0, "step_cpu_s": 6.0}
    assert data_share(10.0, on_cpu=False, **spent) == pytest.approx(0.05)
    assert data_share(10.0, on_cpu=True, **spent) == pytest.approx(0.4)


def test_other_processes_on_the_cores_are_not_data() -> None:
    """Half of the time the step's thread was not at work, but the loader hardly was either."""
    spent = {"wait_s": 0.0, "colour_s": 0.1, "loader_cpu_s": 0.2, "step_cpu_s": 5.0}
    assert data_share(10.0, on_cpu=True, **spent) == pytest.approx(0.03)


def test_clocks_that_disagree_stay_within_bounds() -> None:
    assert data_share(1.0, on_cpu=True, wait_s=0.0, colour_s=0.0, loader_cpu_s=1.0, step_cpu_s=1.1) == 0
    assert data_share(1.0, on_cpu=False, wait_s=1.2, colour_s=0.0, loader_cpu_s=0.0, step_cpu_s=0.0) == 1


def test_bottlenecks_in_words() -> None:
    assert bottleneck(0.37) == "data (37% of the time)"
    assert bottleneck(-0.02) == "step (data costs 0% of the time)"


def test_the_loader_counts_its_part_of_the_consumers_thread(beton: Path) -> None:
    """The consumer's own work between two batches is not the loader's; the colours are."""
    with ViewLoader(beton, [ViewSpec(size=32, count=2)], 8, workers=1, pipeline="native") as loader:
        began = time.thread_time()
        worked = 0.0
        for _ in loader.epoch(0):
            cpu = time.thread_time()
            while time.thread_time() - cpu < 0.05:
                pass
            worked += time.thread_time() - cpu
        spent = loader.stats
        left = time.thread_time() - began - worked
        assert 0 < spent.consumer_cpu_s <= left and spent.consumer_cpu_s > 0.5 * left
        assert spent.colour_s > 0
        spent.reset()
        assert (spent.colour_s, spent.consumer_cpu_s, spent.host_cpu_s, spent.wait_s) == (0, 0, 0, 0)
