"""MetricRing: means of the right steps, in order."""

from __future__ import annotations

import math

import pytest
import torch

from fastssl.training.step_log import MetricRing


def fill(device: str) -> None:
    ring = MetricRing(("loss", "kl"), capacity=4, device=torch.device(device))
    for step in range(4):
        ring.push(torch.tensor([step, 10.0 * step], device=device), step + 1)
    assert len(ring) == 4
    ring.flush({"step": 4})
    ring.push(torch.tensor([7.0, 8.0], device=device), 5)  # writes where the first block was: it must have been copied
    ring.flush({"step": 5})
    assert ring.collect(wait=True) == [{"step": 4, "loss": 1.5, "kl": 15.0}, {"step": 5, "loss": 7.0, "kl": 8.0}]
    assert ring.collect(wait=True) == [] and len(ring) == 0


def test_blocks_on_the_cpu() -> None:
    fill("cpu")


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    ring = MetricRing(("loss", "spread"), capacity=4, device=torch.device("cpu"))
    for step, (loss, spread) in enumerate([(1.0, math.nan), (math.inf, 1.0), (math.nan, 1.0)], start=11):
        ring.push(torch.tensor([loss, spread]), step)
        assert ring.is_finite() == (step == 11), "the loss alone decides"
    ring.flush({})
    assert ring.collect()[0]["nonfinite"] == 12


def test_steps_that_are_taken_back_are_in_no_mean() -> None:
    ring = MetricRing(("loss",), capacity=3, device=torch.device("cpu"))
    for step, loss in ((1, 5.0), (2, 1.0), (3, math.nan)):
        ring.push(torch.tensor([loss]), step)
    ring.pop()
    assert len(ring) == 2 and ring.is_finite()
    ring.clear()
    ring.push(torch.tensor([2.0]), 1)
    ring.flush({})
    assert ring.collect() == [{"loss": 2.0}]


@pytest.mark.gpu
def test_blocks_on_the_gpu() -> None:
    fill("cuda")


@pytest.mark.gpu
def test_push_and_flush_do_not_wait_for_the_gpu() -> None:
    ring = MetricRing(("loss",), capacity=2, device=torch.device("cuda"))
    value = torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ring.push(value, 1)
        ring.flush({})
        ring.collect()
    finally:
        torch.cuda.set_sync_debug_mode("default")
