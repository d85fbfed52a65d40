"""Whole runs through the real loop and loader: two processes end where one does, for every method; and the tables that
say so.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastssl.benchmarks.studies.processes import (
    EXACT,
    compare_weights,
    curve_job,
    difference,
    exact_jobs,
    run_here,
    run_under_torchrun,
    summarise,
    to_markdown,
)


@pytest.fixture(scope="module")
def both(beton: Path) -> tuple[list[dict], list[dict]]:
    """12 steps of each method in float64, and of MoCo with shuffle-BN: (of one process, of two)."""
    jobs = [*exact_jobs("resnet10t", 16, 4).values(), curve_job("resnet10t", 4, 16, 4, seed=1)]
    return run_here(jobs, beton), run_under_torchrun(jobs, beton)


def test_the_weights_of_two_processes_are_those_of_one(both: tuple[list[dict], list[dict]]) -> None:
    rows = compare_weights(exact_jobs("resnet10t", 16, 4), *(found[: len(EXACT)] for found in both))
    assert [row["method"] for row in rows] == list(EXACT)
    for row in rows:
        assert row["steps"] == 12 and row["moved"] > 1e-3
        assert row["max_difference"] < 1e-9, row


def test_the_losses_of_two_processes_are_those_of_one(both: tuple[list[dict], list[dict]]) -> None:
    for one in both[0]:
        assert len(one["losses"]) == 12 and one["losses"][0] != one["losses"][-1]
    for one, two in list(zip(*both))[: len(EXACT)]:
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    shuffled, again = (
        both[0][-1]["losses"],
        both[1][-1]["losses"],
    )  # in float32, where rounding grows by ten times and more from step to step
    assert again[0] == pytest.approx(shuffled[0], abs=1e-4)


def test_a_difference_is_the_largest_one_and_counters_must_agree() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    assert difference(one, {"a": torch.tensor([1.0, 2.5]), "n": torch.tensor(3)}) == 0.5
    assert difference(one, {**one, "n": torch.tensor(4)}) == float("inf")


def test_the_summary_by_hand() -> None:
    ends = {"one process, off": (1.0, 3.0), "one process, on": (2.0, 4.0), "two processes, on": (2.5, 4.0)}
    curves = [
        {"name": name, "seed": seed, "losses": [9.0, 9.0, 9.0, end]}
        for name, pair in ends.items()
        for seed, end in enumerate(pair)
    ]
    found = summarise(curves)
    assert [row["end"] for row in found["kinds"]] == [2.0, 3.0, 3.25]
    assert found["kinds"][0]["between_seeds"] == pytest.approx(2**0.5)
    same, off = found["pairs"]
    assert (same["mean"], same["largest"], same["largest_step"]) == (0.25, 0.5, 0.5) and (
        off["mean"],
        off["largest"],
    ) == (1.25, 1.5)
    text = to_markdown(
        {
            "weights": [{"method": "moco", "steps": 2, "values": 5000, "max_difference": 1e-9, "moved": 0.5}],
            "summary": found,
        }
    )
    assert (
        "| moco | 2 | 5,000 | 1.0e-09 | 0.5 |" in text
        and "| two processes, on - one process, on | +0.2500 | 0.5000 | 0.5000 |" in text
    )
