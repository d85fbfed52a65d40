"""EMP-SSL: the coding rate against its eigenvalues, and the loss as written out."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import B, TinyBackbone, images
from torch.nn import functional

from fastssl.losses.coding_rate import coding_rate, largest_coding_rate
from fastssl.losses.pairs import PairWeights
from fastssl.methods.base import Views
from fastssl.methods.empssl import EMPSSL, EMPSSLConfig
from fastssl.models.heads import ProjectorConfig


@pytest.mark.parametrize(("count", "width"), [(5, 9), (9, 5), (6, 6)])
def test_the_coding_rate_by_eigenvalues(count: int, width: int) -> None:
    rows = functional.normalize(torch.randn(3, count, width, dtype=torch.float64), dim=-1).requires_grad_()
    found = coding_rate(rows, 0.3)
    for number, one in enumerate(rows):
        matrix = torch.eye(width, dtype=torch.float64) + width / (count * 0.3) * one.T @ one
        expected = torch.linalg.eigvalsh(matrix).log().sum() / 2
        torch.testing.assert_close(found[number], expected)
    torch.autograd.gradcheck(lambda given: coding_rate(given, 0.3), rows)
    assert bool((found < largest_coding_rate(count, width, 0.3)).all())


@pytest.mark.parametrize(("count", "width"), [(4, 7), (14, 7)])
def test_vectors_that_fill_all_directions_have_the_largest_rate(count: int, width: int) -> None:
    rows = torch.eye(width, dtype=torch.float64).repeat(2, 1)[:count]
    assert float(coding_rate(rows, 0.2)) == pytest.approx(largest_coding_rate(count, width, 0.2))
    alike = torch.ones(1, dtype=torch.float64) * functional.one_hot(torch.zeros(count, dtype=torch.long), width)
    assert float(coding_rate(alike, 0.2)) == pytest.approx(math.log1p(width / 0.2) / 2)


def test_the_loss_as_written_out() -> None:
    config = EMPSSLConfig(similarity=20.0, expansion=0.5, projector=ProjectorConfig(hidden=16, out=8, norm=True))
    torch.manual_seed(0)
    method = EMPSSL(TinyBackbone(), config, views=Views(B, PairWeights(3, 0.4, 0.6))).train()
    views = [images(0), images(1, views=3, size=7)]
    with torch.no_grad():
        embeddings = method.student(views).split(B)
    similar, rate = [], []
    for view in embeddings:
        rate.append(torch.logdet(torch.eye(8) + 8 / (B * 0.2) * view.T @ view) / 2)
        for sample in range(B):
            mean = sum(other[sample] for other in embeddings) / 5
            similar.append(view[sample] @ mean / mean.norm())
    found = method(views, (), {})
    expected = -20 * torch.stack(similar).mean() - 0.5 * torch.stack(rate).mean()
    torch.testing.assert_close(found.loss, expected)
    metrics = dict(zip(method.METRICS, found.metrics.tolist()))
    assert metrics["kl"] > 0 and metrics["coding_rate"] == pytest.approx(
        float(torch.stack(rate).mean()) / largest_coding_rate(B, 8, 0.2)
    )
    found.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.parameters())
