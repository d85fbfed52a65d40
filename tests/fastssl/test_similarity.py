"""SEED's loss against its twin, value and gradient; and what it promises about precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_twins import dense_similarity
from torch import Tensor
from torch.nn import functional

from fastssl.losses.similarity import neighbours_mean, similarity_loss


def unit(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=1).to(dtype)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    batch=st.integers(1, 5),
    keys=st.integers(1, 40),
    student=st.sampled_from([0.05, 0.2, 1.0]),
    teacher=st.sampled_from([1e-4, 0.01, 0.07, 1.0]),
)
def test_it_is_its_twin(seed: int, batch: int, keys: int, student: float, teacher: float) -> None:
    key, queue = unit(seed + 1, batch, 6), unit(seed + 2, keys, 6)
    found, expected = (unit(seed, batch, 6).requires_grad_() for _ in range(2))
    mean, entropy = neighbours_mean(key, queue, teacher)
    loss = similarity_loss(found, key, mean, queue, student)
    slow, least = dense_similarity(expected, key, queue, student, teacher)
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(entropy.mean(), least, atol=1e-9, rtol=1e-7)
    assert loss.item() >= least.item() - 1e-9
    (3 * loss).backward()
    (3 * slow).backward()
    torch.testing.assert_close(found.grad, expected.grad)
    assert not mean.requires_grad


def test_a_student_that_is_the_teacher_has_the_least_loss_and_no_gradient() -> None:
    key, queue = unit(0, 4, 6), unit(1, 30, 6)
    query = key.clone().requires_grad_()
    mean, entropy = neighbours_mean(key, queue, 0.2)
    loss = similarity_loss(query, key, mean, queue, 0.2)
    torch.testing.assert_close(loss, entropy.mean())
    loss.backward()
    assert query.grad.abs().max() < 1e-12


def test_the_picture_itself_is_among_those_that_it_is_compared_with() -> None:
    """A cold teacher is sure that it is the picture itself: what is left is InfoNCE."""
    query, key, queue = unit(0, 4, 6), unit(1, 4, 6), unit(2, 30, 6)
    mean, entropy = neighbours_mean(key, queue, 1e-4)
    torch.testing.assert_close(mean, key)
    assert entropy.abs().max() < 1e-6
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.t()], 1) / 0.2
    expected = functional.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(similarity_loss(query, key, mean, queue, 0.2), expected)


def test_many_tiles_float32_and_autocast() -> None:
    """The queue is longer than a tile; autocast changes nothing."""
    query, key, queue = (unit(seed, n, 8) for seed, n in ((0, 3), (1, 3), (2, 2500)))
    slow, least = dense_similarity(query, key, queue, 0.2, 0.01)
    single = [tensor.float() for tensor in (query, key, queue)]
    with torch.autocast("cpu", torch.bfloat16):
        mean, entropy = neighbours_mean(*single[1:], 0.01)
        loss = similarity_loss(single[0], single[1], mean, single[2], 0.2)
    assert loss.dtype == mean.dtype == torch.float32
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert entropy.mean().item() == pytest.approx(least.item(), rel=1e-3)


def test_nan_reaches_the_loss() -> None:
    query, key, queue = unit(0, 2, 6), unit(1, 2, 6), unit(2, 9, 6)
    key[0, 0] = float("nan")
    mean, _ = neighbours_mean(key, queue, 0.01)
    assert similarity_loss(query, key, mean, queue, 0.2).isnan()
