"""The count of a step beside its measurement: it must cost no record, and little of the GPU's time."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from fastssl.benchmarks.suites import count
from fastssl.benchmarks.suites.count import CountBeside
from fastssl.config.recipe import load_recipe


def test_what_is_not_there_in_time_is_said_and_stopped() -> None:
    counting = CountBeside(load_recipe("quickstart"), 8, amp=True, compiled=False)
    workers = counting._pool._pool
    started = time.monotonic()
    assert counting.figures(1.0, 1e9, patience=0.0) == {"not_counted": "TimeoutError: "}
    assert time.monotonic() - started < 10
    counting._pool.join()
    assert all(not worker.is_alive() for worker in workers)


def test_colour_is_not_of_the_step_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"colour": (7, 700), "student": (10, 4_000), "backward": (20, 5_000)}
    found = {"parts": {name: {"launches": launches, "bytes": size} for name, (launches, size) in parts.items()}}
    asked = []

    class Pool(SimpleNamespace):
        def apply_async(self, *call: object) -> SimpleNamespace:
            asked.append(call)
            return SimpleNamespace(get=lambda patience: found)

    monkeypatch.setattr(count, "get_context", lambda kind: SimpleNamespace(Pool=lambda *a: Pool(terminate=list)))
    recipe = load_recipe("quickstart")
    figures = CountBeside(recipe, 8, amp=True, compiled=False).figures(seconds=2.0, rate=9_000.0)
    assert asked == [(count.count_step, (recipe, 8), {"amp": True, "compiled": False})]
    assert figures == {"counted_launches": 30, "counted_bytes": 9_000, "byte_floor_fraction": 0.5}
