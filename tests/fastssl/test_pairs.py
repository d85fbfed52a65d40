"""The reducer against the plain mean over all pairs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_twins import pair_mean
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastssl.losses.pairs import PairWeights, reduce_pairs, split_pairs
from fastssl.pipelines.plan.multicrop import MultiCrop


def matrix(seed: int, local: int) -> Tensor:
    """Pair losses (2, 2 + L); a view against itself, which must not count, is NaN."""
    pairs = torch.randn(2, 2 + local, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs[0, 0] = pairs[1, 1] = math.nan
    return pairs


def test_twin_by_hand() -> None:
    assert pair_mean(torch.tensor([[math.nan, 1.0, 2.0], [3.0, math.nan, 6.0]])).item() == 3


@pytest.mark.parametrize("local", [0, 1, 6, 10])
def test_weights_by_the_number_of_pairs_give_the_plain_mean_over_all_pairs(local: int) -> None:
    pairs = matrix(local, local)
    loss = reduce_pairs(*split_pairs(pairs), PairWeights(local, *MultiCrop(local_count=local).pair_weights))
    torch.testing.assert_close(loss, pair_mean(pairs), rtol=1e-13, atol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), local=st.integers(1, 12), gg=st.floats(0, 1))
def test_each_kind_has_its_weight_however_many_pairs_it_has(seed: int, local: int, gg: float) -> None:
    pairs = matrix(seed, local)
    locals_ = [pairs[t, v] for t in range(2) for v in range(2, 2 + local)]
    expected = gg * (pairs[0, 1] + pairs[1, 0]) / 2 + (1 - gg) * sum(locals_) / len(locals_)
    loss = reduce_pairs(*split_pairs(pairs), PairWeights(local, gg, 1 - gg))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)


def test_without_local_pairs_the_global_mean_comes_back_itself() -> None:
    gg = torch.tensor(0.1)
    assert reduce_pairs(gg, None, PairWeights(0, 1.0, 0.0)) is gg
    assert reduce_pairs(gg, torch.tensor(math.nan), PairWeights(6, 1.0, 0.0)) is gg


def test_gradient_of_a_pair_is_its_share() -> None:
    pairs = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    reduce_pairs(*split_pairs(pairs), PairWeights(6, 0.4, 0.6)).backward()
    expected = torch.full((2, 8), 0.6 / 12, dtype=torch.float64)
    expected[:, :2] = torch.tensor([[0, 0.2], [0.2, 0]])
    torch.testing.assert_close(pairs.grad, expected)


def test_nothing_is_read_back_to_the_host() -> None:
    with FakeTensorMode():  # raises where a value is asked for
        assert reduce_pairs(*split_pairs(torch.ones(2, 8)), PairWeights(6, 0.4, 0.6)).shape == ()
