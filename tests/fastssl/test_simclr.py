"""SimCLR: NT-Xent over the batch, smoothed, with local views."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import TWO, B, TinyBackbone, images
from torch.nn import functional

from fastssl.losses.pairs import PairWeights
from fastssl.methods.base import Views
from fastssl.methods.simclr import SimCLR, SimCLRConfig
from fastssl.models.heads import ProjectorConfig
from fastssl.optim.schedules import RunLength

SMALL = SimCLRConfig(smoothing=0.0, weighting="nearest", projector=ProjectorConfig(hidden=16, out=8))


def make(config: SimCLRConfig = SMALL, weights: PairWeights = TWO) -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(TinyBackbone(), config, views=Views(B, weights)).train()


def test_without_smoothing_and_local_views_it_is_nt_xent() -> None:
    """Written out: each of 2B embeddings against the 2B - 1 others, its other view being the right one."""
    method, views = make(), images()
    with torch.no_grad():
        embeddings = method.student(views)
    similar = embeddings @ embeddings.t() / 0.1
    similar.fill_diagonal_(float("-inf"))
    right = torch.cat([torch.arange(B) + B, torch.arange(B)])
    found = method([views], (), {})
    torch.testing.assert_close(found.loss, functional.cross_entropy(similar, right))
    found.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.parameters())
    assert method.teacher is None


def test_smoothing_and_local_views_change_the_loss_as_written() -> None:
    method = make(replace(SMALL, smoothing=0.5), PairWeights(3, 0.4, 0.6))
    views = [images(0), images(1, views=3, size=7)]
    with torch.no_grad():
        embeddings = method.student(views).split(B)
    total = {"gg": [], "gl": []}
    for v in range(5):
        for g in range(2):
            if v == g:
                continue
            losses = []
            for b in range(B):
                anchor = embeddings[v][b]
                positive = anchor @ embeddings[g][b] / 0.1
                negatives = torch.stack([anchor @ embeddings[c][o] / 0.1 for c in range(2) for o in range(B) if o != b])
                losses.append(
                    torch.logsumexp(torch.cat([positive[None], negatives]), 0) - 0.5 * positive - 0.5 * negatives.max()
                )
            total["gg" if v < 2 else "gl"].append(torch.stack(losses).mean())
    expected = 0.4 * torch.stack(total["gg"]).mean() + 0.6 * torch.stack(total["gl"]).mean()
    found = method(views, (), {"smoothing": 0.5})
    torch.testing.assert_close(found.loss, expected)
    assert dict(zip(method.METRICS, found.metrics.tolist()))["loss"] == pytest.approx(float(expected))


def test_rates_and_batches_that_are_too_small() -> None:
    config = replace(SMALL, smoothing=0.2, smoothing_schedule="cosine")
    assert make(config).rates(0, RunLength(10, 5)) == {"smoothing": 0.0} and make().rates(0, RunLength(10, 5)) == {}
    wide = replace(config, weighting="stepped", neighbors=20)
    with pytest.raises(ValueError, match="10 negatives, fewer than the 20"):
        make(wide)
    assert not wide.allows(10) and wide.allows(11) and wide.scaled(10).allows(10) and wide.scaled(11) is wide
    with pytest.raises(ValueError, match=r"simclr\.smoothing_schedule"):
        replace(SMALL, smoothing_schedule="linear")
