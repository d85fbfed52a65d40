"""MetricRing: means of the right steps, in order."""

from __future__ import annotations

import pytest
import torch

from fastssl.meters import MetricRing


def fill(device: str) -> None:
    ring = MetricRing(("loss", "kl"), capacity=4, device=torch.device(device))
    for step in range(4):
        ring.push(torch.tensor([step, 10.0 * step], device=device))
    assert len(ring) == 4
    ring.flush({"step": 4})
    ring.push(torch.tensor([7.0, 8.0], device=device))  # writes where the first block was: it must have been copied
    ring.flush({"step": 5})
    assert ring.collect(wait=True) == [{"step": 4, "loss": 1.5, "kl": 15.0}, {"step": 5, "loss": 7.0, "kl": 8.0}]
    assert ring.collect(wait=True) == [] and len(ring) == 0


def test_blocks_on_the_cpu() -> None:
    fill("cpu")


@pytest.mark.gpu
def test_blocks_on_the_gpu() -> None:
    fill("cuda")


@pytest.mark.gpu
def test_push_and_flush_do_not_wait_for_the_gpu() -> None:
    ring = MetricRing(("loss",), capacity=2, device=torch.device("cuda"))
    value = torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ring.push(value)
        ring.flush({})
        ring.collect()
    finally:
        torch.cuda.set_sync_debug_mode("default")
