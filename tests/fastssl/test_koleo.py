"""KoLeo against distances taken pair by pair, and in DINO's loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loss_twins import dense_koleo
from test_dino import RATES, SMALL, batch, make
from tiny import B, images
from torch.nn import functional

from fastssl.losses.koleo import koleo


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(vectors, dim=-1).requires_grad_()


@pytest.mark.parametrize("shape", [(2, 5), (9, 4), (33, 16)])
def test_loss_and_gradient_are_the_twins(shape: tuple[int, int]) -> None:
    vectors = unit(*shape)
    found, wanted = koleo(vectors, vectors), dense_koleo(vectors)
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad(one, vectors)[0] for one in (found, wanted)]
    torch.testing.assert_close(*slopes)


def test_a_share_of_the_rows_among_all() -> None:
    """The mean of the shares' losses is the whole loss, and so are the gradients."""
    everyone = unit(2, 12, 6)
    shares = [koleo(everyone[:, first : first + 4], everyone, first) for first in (0, 4, 8)]
    whole = torch.stack([dense_koleo(view) for view in everyone])
    torch.testing.assert_close(torch.stack(shares).mean(0), whole)
    slopes = [torch.autograd.grad(one.sum(), everyone)[0] for one in (torch.stack(shares).mean(0), whole)]
    torch.testing.assert_close(*slopes)


def test_equal_vectors_have_a_gradient_that_is_a_number() -> None:
    vectors = unit(1, 4).detach().repeat(3, 1).requires_grad_()
    loss = koleo(vectors, vectors)
    loss.backward()
    assert loss.isfinite() and vectors.grad is not None and vectors.grad.isfinite().all()


def test_float32_under_autocast() -> None:
    vectors = unit(8, 4).detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = koleo(vectors, vectors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dense_koleo(vectors.double()), rtol=1e-5, atol=1e-6)


def test_dino_adds_it_for_both_global_views() -> None:
    views = batch()
    plain, spread = make(), make(replace(SMALL, koleo=0.3))
    outputs = [one(views, one.targets(views, {}, RATES), RATES) for one in (plain, spread)]
    features = functional.normalize(spread.student.backbone(views[0]), dim=1)
    wanted = 0.3 * sum(dense_koleo(view) for view in features.split(B))
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss + wanted)
    torch.testing.assert_close(outputs[1].metrics, outputs[0].metrics)
    assert spread.teacher(images(0)).shape == plain.teacher(images(0)).shape
    # Its gradient goes through the backbone, too.
    own, without = (list(one.student.backbone.parameters()) for one in (spread, plain))
    more = torch.autograd.grad(outputs[1].loss, own)
    rest, added = torch.autograd.grad(outputs[0].loss, without), torch.autograd.grad(wanted, own)
    assert max(slope.abs().max() for slope in added) > 1e-3
    for slope, one, other in zip(more, rest, added):
        torch.testing.assert_close(slope, one + other)
