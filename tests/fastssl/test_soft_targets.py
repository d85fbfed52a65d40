"""The soft cross-entropy against its twin and against known values, and what it promises about memory and precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_twins import dense_soft_cross_entropy
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastssl.benchmarks.harness.timing import peak_extra_bytes
from fastssl.losses.soft_targets import soft_cross_entropy, teacher_probabilities


def inputs(
    seed: int,
    targets: int,
    views: int,
    batch: int,
    classes: int,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Distributions (T, B, K) and logits (V, B, K) that ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = (3 * torch.randn(targets, batch, classes, generator=generator, dtype=torch.float64)).softmax(-1)
    logits = scale * torch.randn(views, batch, classes, generator=generator, dtype=torch.float64)
    return probabilities.to(dtype), logits.to(dtype).requires_grad_()


def test_twin_by_hand() -> None:
    targets = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], dtype=torch.float64)
    logits = (
        torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]], dtype=torch.float64) / 2
    )  # halves and ones with temperature 1/2
    found = dense_soft_cross_entropy(targets, logits, 0.5)
    # first sample: log 4 - log(3) / 2; second: log 2
    assert found.item() == pytest.approx((math.log(4) - math.log(3) / 2 + math.log(2)) / 2, rel=1e-14)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    targets=st.integers(1, 2),
    views=st.integers(1, 5),
    batch=st.integers(1, 5),
    classes=st.integers(1, 30),
    temperature=st.sampled_from([0.04, 0.1, 1.0]),
)
def test_equals_the_twin_in_float64(
    seed: int, targets: int, views: int, batch: int, classes: int, temperature: float
) -> None:
    probabilities, logits = inputs(seed, targets, views, batch, classes)
    weights = torch.randn(targets, views, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = soft_cross_entropy(probabilities, logits, temperature)
    gradient = torch.autograd.grad((weights * pairs).sum(), logits)[0]
    expected = dense_soft_cross_entropy(probabilities, logits, temperature)
    torch.testing.assert_close(pairs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient, torch.autograd.grad((weights * expected).sum(), logits)[0], rtol=1e-11, atol=1e-12 / temperature
    )


def test_gradcheck() -> None:
    probabilities, logits = inputs(1, 2, 3, 2, 5)
    assert torch.autograd.gradcheck(lambda z: soft_cross_entropy(probabilities, z, 0.5), (logits,))


@pytest.mark.parametrize("classes", [4096, 65536])
@pytest.mark.parametrize("value", [0.0, -70.0, 300.0])
def test_loss_of_constant_logits_is_the_log_of_their_number(classes: int, value: float) -> None:
    probabilities, _ = inputs(0, 2, 1, 2, classes, torch.float32)
    pairs = soft_cross_entropy(probabilities, torch.full((3, 2, classes), value), 0.1)
    torch.testing.assert_close(pairs, torch.full((2, 3), math.log(classes)), rtol=1e-6, atol=0)
    assert math.log(classes) == pytest.approx({4096: 8.318, 65536: 11.090}[classes], abs=5e-4)


def test_float32_equals_the_twin_within_rounding() -> None:
    # cosines over 0.04: logits up to 25, thousands of classes
    probabilities, logits = inputs(3, 2, 4, 8, 3000, torch.float32, scale=0.3)
    pairs = soft_cross_entropy(probabilities, logits, 0.04)
    gradient = torch.autograd.grad(pairs.sum(), logits)[0]
    exact = logits.detach().double().requires_grad_()
    expected = dense_soft_cross_entropy(probabilities.double(), exact, 0.04)
    torch.testing.assert_close(pairs.double(), expected, rtol=1e-6, atol=0)
    theirs = torch.autograd.grad(expected.sum(), exact)[0]
    assert (gradient - theirs).norm() <= 3e-6 * theirs.norm()


def test_autocast_and_low_precision_inputs_lose_nothing() -> None:
    probabilities, logits = inputs(4, 2, 3, 8, 500, torch.float32, scale=5)
    half = logits.detach().bfloat16().requires_grad_()
    full = half.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = soft_cross_entropy(probabilities, half, 0.1)
        pairs.sum().backward()
    expected = soft_cross_entropy(probabilities, full, 0.1)
    expected.sum().backward()
    assert pairs.dtype == torch.float32
    assert torch.equal(pairs, expected)
    assert half.grad.dtype == torch.bfloat16
    assert torch.equal(half.grad, full.grad.bfloat16())


def test_float64_targets_make_the_result_float64() -> None:
    probabilities, logits = inputs(4, 1, 1, 2, 5, torch.float32)
    pairs = soft_cross_entropy(probabilities.double(), logits, 0.1)
    pairs.sum().backward()
    assert (pairs.dtype, logits.grad.dtype) == (torch.float64, torch.float32)


def test_columns_of_a_wider_matrix_get_their_gradient() -> None:
    # scores that lie beside an embedding: neither contiguous nor dense
    probabilities, logits = inputs(5, 2, 3, 4, 7)
    wide = torch.cat([torch.ones(3, 4, 2, dtype=torch.float64), logits.detach()], 2).requires_grad_()
    soft_cross_entropy(probabilities, wide[..., 2:], 0.1).sum().backward()
    soft_cross_entropy(probabilities, logits, 0.1).sum().backward()
    torch.testing.assert_close(wide.grad[..., 2:], logits.grad)
    assert not wide.grad[..., :2].any()


def test_large_logits_do_not_overflow() -> None:
    probabilities, logits = inputs(6, 1, 2, 3, 10, torch.float32, scale=1e5)
    pairs = soft_cross_entropy(probabilities, logits, 0.1)
    pairs.sum().backward()
    assert pairs.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("spoiled", [0, 1])
def test_nan_reaches_its_pairs_and_no_others(spoiled: int) -> None:
    probabilities, logits = inputs(7, 2, 3, 4, 6)
    with torch.no_grad():
        (probabilities, logits)[spoiled][1, 2, 3] = math.nan
        bad = soft_cross_entropy(probabilities, logits, 0.1).isnan()
    expected = torch.zeros(2, 3, dtype=torch.bool)
    expected[(slice(None), 1) if spoiled else 1] = True
    assert torch.equal(bad, expected)


def test_only_inputs_and_one_number_a_sample_and_view_are_kept() -> None:
    probabilities, logits = inputs(8, 2, 5, 4, 100)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        soft_cross_entropy(probabilities, logits, 0.1)
    others = [tensor for tensor in kept if tensor.data_ptr() not in (probabilities.data_ptr(), logits.data_ptr())]
    assert [tuple(tensor.shape) for tensor in others] == [(5, 4)]


def test_peak_memory() -> None:
    views, batch, classes = 8, 16, 4096
    probabilities, logits = inputs(9, 2, views, batch, classes, torch.float32)
    matrix = batch * classes * 4
    forward = peak_extra_bytes(lambda: soft_cross_entropy(probabilities, logits, 0.1), "cpu")
    assert matrix < forward < 2.2 * matrix
    pairs = soft_cross_entropy(probabilities, logits, 0.1)
    backward = peak_extra_bytes(lambda: pairs.sum().backward(), "cpu")
    assert views * matrix < backward < (views + 2.2) * matrix


def test_nothing_is_read_back_to_the_host() -> None:
    with FakeTensorMode():  # raises where a value is asked for
        logits = torch.randn(8, 4, 16, requires_grad=True)
        probabilities = teacher_probabilities(torch.randn(2, 4, 16), torch.zeros(16), torch.tensor([0.04]))
        soft_cross_entropy(probabilities, logits, 0.1).sum().backward()
        assert logits.grad.shape == logits.shape


def test_no_second_derivative_is_pretended() -> None:
    probabilities, logits = inputs(10, 1, 1, 2, 3)
    pairs = soft_cross_entropy(probabilities, logits, 0.5)
    gradient = torch.autograd.grad(pairs.square().sum(), logits, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_inputs_that_make_no_sense() -> None:
    probabilities, logits = inputs(0, 2, 3, 4, 6)
    cases = [
        ((probabilities[:, :3], logits, 0.1), "must agree"),
        ((probabilities[..., :1], logits, 0.1), "must agree"),
        ((probabilities.clone().requires_grad_(), logits, 0.1), r"targets\.detach\(\)"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            soft_cross_entropy(*arguments)


# ---------------------------------------------------------------- the teacher's probabilities


def test_teacher_probabilities_by_hand() -> None:
    logits = torch.tensor([[[1.0, 2.0 + math.log(3) / 2]]], dtype=torch.float64, requires_grad=True)
    found = teacher_probabilities(logits, torch.tensor([1.0, 2.0], dtype=torch.float64), 0.5)
    torch.testing.assert_close(found, torch.tensor([[[0.25, 0.75]]], dtype=torch.float64))
    assert not found.requires_grad


def test_teacher_probabilities_in_float32_under_autocast_and_from_a_scheduled_temperature() -> None:
    logits = torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    center = torch.linspace(-1, 1, 50)
    before = logits.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = teacher_probabilities(logits, center, torch.tensor([0.04]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ((logits.float() - center) / 0.04).softmax(-1), rtol=1e-6, atol=0)
    assert torch.equal(found, teacher_probabilities(logits.float(), center, 0.04))
    assert torch.equal(logits, before)
