"""The reducer against the plain mean over all pairs, and the weights that it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastssl.losses.pairs import PairWeights, reduce_pairs, split_pairs
from fastssl.losses.reference_views import pair_mean


def matrix(seed: int, targets: tuple[int, ...], local: int) -> Tensor:
    """Pair losses (T, 2 + L); a view against itself, which must not count, is NaN."""
    pairs = torch.randn(len(targets), 2 + local, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, target in enumerate(targets):
        pairs[row, target] = math.nan
    return pairs


def test_twin_by_hand() -> None:
    pairs = torch.tensor([[math.nan, 1.0, 2.0], [3.0, math.nan, 6.0]])
    assert pair_mean(pairs, (0, 1)).item() == 3
    assert pair_mean(pairs[1:], (1,)).item() == 4.5


@pytest.mark.parametrize("targets", [(0, 1), (0,), (1,), (1, 0)])
@pytest.mark.parametrize("local", [0, 1, 6, 10])
def test_weights_by_count_give_the_plain_mean_over_all_pairs(local: int, targets: tuple[int, ...]) -> None:
    pairs = matrix(local, targets, local)
    loss = reduce_pairs(*split_pairs(pairs, targets), PairWeights.by_count(local))
    torch.testing.assert_close(loss, pair_mean(pairs, targets), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("local", "expected"), [(6, (1 / 7, 6 / 7)), (10, (1 / 11, 10 / 11)), (0, (1, 0))])
def test_published_weights_by_count(local: int, expected: tuple[float, float]) -> None:
    weights = PairWeights.by_count(local)
    assert (weights.local_views, weights.gg, weights.gl) == (local, *expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), local=st.integers(1, 12), gg=st.floats(0, 1), both=st.booleans())
def test_each_kind_has_its_weight_however_many_pairs_it_has(seed: int, local: int, gg: float, both: bool) -> None:
    targets = (0, 1) if both else (0,)
    pairs = matrix(seed, targets, local)
    crosses = [pairs[0, 1], pairs[1, 0]] if both else [pairs[0, 1]]
    locals_ = [pairs[t, v] for t in range(len(targets)) for v in range(2, 2 + local)]
    expected = gg * sum(crosses) / len(crosses) + (1 - gg) * sum(locals_) / len(locals_)
    loss = reduce_pairs(*split_pairs(pairs, targets), PairWeights(local, gg, 1 - gg))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)


def test_without_local_pairs_the_global_mean_comes_back_itself() -> None:
    gg = torch.tensor(0.1)
    assert reduce_pairs(gg, None, PairWeights.by_count(0)) is gg
    assert reduce_pairs(gg, torch.tensor(math.nan), PairWeights(6, 1.0, 0.0)) is gg


def test_gradient_of_a_pair_is_its_share() -> None:
    pairs = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    reduce_pairs(*split_pairs(pairs, (0, 1)), PairWeights(6, 0.4, 0.6)).backward()
    expected = torch.full((2, 8), 0.6 / 12, dtype=torch.float64)
    expected[:, :2] = torch.tensor([[0, 0.2], [0.2, 0]])
    torch.testing.assert_close(pairs.grad, expected)


def test_nothing_is_read_back_to_the_host() -> None:
    with FakeTensorMode():  # raises where a value is asked for
        assert reduce_pairs(*split_pairs(torch.ones(2, 8), (0, 1)), PairWeights(6, 0.4, 0.6)).shape == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 0.4, 0.5), r"views\.weights.*sum to 0\.9.*sum to 1"),
        ((6, 0.4, 0.60001), "sum to 1"),
        ((6, 1.2, -0.2), r"views\.weights: the global-local weight is -0\.2"),
        ((6, -0.2, 1.2), r"views\.weights: the global-global weight is -0\.2"),
        ((6, math.nan, 0.6), "finite"),
        ((6, 0.4, math.inf), "finite"),
        ((0, 0.4, 0.6), r"views\.weights.*no local views"),
        ((-1, 1.0, 0.0), "number of local views"),
    ],
)
def test_weights_that_make_no_sense(arguments: tuple[int, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairWeights(*arguments)


def test_weights_that_are_rounded_pass() -> None:
    assert PairWeights(6, 0.1428571, 0.8571429).gl == 0.8571429


def test_pairs_that_make_no_sense() -> None:
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="None with 6 local views"):
        reduce_pairs(one, None, PairWeights(6, 0.4, 0.6))
    with pytest.raises(ValueError, match="given with 0 local views"):
        reduce_pairs(one, one, PairWeights(0, 1, 0))
    for pairs, targets, message in [
        (torch.ones(2, 8), (0,), "1 targets"),
        (torch.ones(2, 1), (0, 1), "at least 2 views"),
        (torch.ones(8), (0,), "shape"),
        (torch.ones(1, 8), (2,), "each once"),
        (torch.ones(2, 8), (0, 0), "each once"),
        (torch.ones(0, 8), (), "each once"),
    ]:
        with pytest.raises(ValueError, match=message):
            split_pairs(pairs, targets)
