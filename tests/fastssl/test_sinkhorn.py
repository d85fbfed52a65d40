"""The assignment against its textbook twin, over one rank and over several, and what a shift of the scores may do to
it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_twins import dense_sinkhorn
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from fastssl.losses.sinkhorn import sinkhorn


def cosines(seed: int, samples: int, prototypes: int, dim: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1) for n in (samples, prototypes)
    )
    return (first @ second.t()).to(dtype)


class Summing:
    """``all_reduce`` of ranks that are threads of this process."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=20)
        self.slots: dict[int, Tensor] = {}
        self.calls = 0

    def of(self, rank: int, in_place: bool = False) -> Callable[[Tensor], Tensor]:
        def all_reduce(share: Tensor) -> Tensor:
            self.slots[rank] = share.clone()
            self.barrier.wait()
            total = sum(self.slots[other] for other in sorted(self.slots))
            self.barrier.wait()
            self.calls += rank == 0
            return share.copy_(total) if in_place else total

        return all_reduce


def on_ranks(parts: Sequence[Tensor], in_place: bool = False, **options: float) -> tuple[list[Tensor], int]:
    """The parts' assignments, each computed by a rank of its own, and the number of reductions."""
    summing, found = Summing(len(parts)), {}

    def work(rank: int) -> None:
        try:
            found[rank] = sinkhorn(parts[rank], all_reduce=summing.of(rank, in_place), ranks=len(parts), **options)
        except BaseException:
            summing.barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(len(parts))], summing.calls


def test_twin_by_hand() -> None:
    # exp(S / epsilon), samples down: [1, 1], [3, 1]. Prototypes sum to 4 and 2: [1/4, 1/2], [3/4, 1/2]. Samples sum to
    # 3/4 and 5/4.
    scores = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    expected = torch.tensor([[1 / 3, 2 / 3], [3 / 5, 2 / 5]], dtype=torch.float64)
    torch.testing.assert_close(dense_sinkhorn(scores / 2, 0.5, 1), expected)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    samples=st.integers(1, 12),
    prototypes=st.integers(1, 12),
    epsilon=st.sampled_from([0.05, 0.1, 1.0]),
    iterations=st.integers(1, 5),
)
def test_equals_the_twin_in_float64(seed: int, samples: int, prototypes: int, epsilon: float, iterations: int) -> None:
    scores = cosines(seed, samples, prototypes)
    expected = dense_sinkhorn(scores, epsilon, iterations)
    torch.testing.assert_close(sinkhorn(scores, epsilon, iterations), expected, rtol=1e-10, atol=1e-14)


def test_float32_equals_the_twin_within_rounding() -> None:
    scores = cosines(1, 64, 100, dtype=torch.float32)
    torch.testing.assert_close(
        sinkhorn(scores).double(), dense_sinkhorn(scores.double(), 0.05, 3), rtol=2e-5, atol=1e-9
    )


def test_samples_sum_to_one_and_prototypes_are_used_nearly_alike() -> None:
    samples, prototypes = 600, 30
    scores = cosines(2, samples, prototypes, dtype=torch.float32)
    scores[:, :3] += 0.3  # three prototypes that a softmax would take for nearly everything
    assigned = sinkhorn(scores)
    torch.testing.assert_close(assigned.sum(1), torch.ones(samples), rtol=1e-5, atol=0)
    share = assigned.sum(0) * prototypes / samples
    assert ((share - 1).abs() < 0.5).all()
    assert (scores / 0.05).softmax(1).sum(0).mul(prototypes / samples)[:3].min() > 3, (
        "the scores must be unequal for this to say anything"
    )
    many = sinkhorn(scores, iterations=100).sum(0) * prototypes / samples
    torch.testing.assert_close(many, torch.ones(prototypes), rtol=1e-4, atol=0)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("sizes", [(6, 6), (3, 9), (2, 4, 6), (12,)])
def test_ranks_together_equal_the_whole(sizes: tuple[int, ...], in_place: bool) -> None:
    scores = cosines(3, sum(sizes), 9)
    scores[:4] += torch.linspace(0, 2, 4, dtype=torch.float64)[:, None]  # ranks with other maxima
    parts = list(scores.split(sizes))
    found, calls = on_ranks(parts, in_place)
    torch.testing.assert_close(torch.cat(found), dense_sinkhorn(scores, 0.05, 3), rtol=1e-10, atol=1e-14)
    assert calls == 4
    if len(sizes) > 1:
        alone = torch.cat([sinkhorn(part) for part in parts])
        assert (alone - torch.cat(found)).abs().max() > 0.01, "without the reduction the result must be another"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shift_of_a_prototype_changes_nothing_but_one_of_a_sample_does(ranks: int) -> None:
    scores = cosines(4, 8, 6)

    def whole(shifted: Tensor) -> Tensor:
        return torch.cat(on_ranks(list(shifted.chunk(ranks)))[0])

    expected = whole(scores)
    torch.testing.assert_close(whole(scores + 3 * torch.randn(6, dtype=torch.float64)), expected, rtol=1e-9, atol=1e-13)
    of_a_sample = scores.clone()
    of_a_sample[0] += 0.2
    assert (whole(of_a_sample) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("offset", [1000.0, -1000.0, torch.linspace(-900, 900, 19)])
def test_large_scores_neither_overflow_nor_vanish(offset: Tensor | float, ranks: int) -> None:
    scores = (
        cosines(5, 40, 19, dtype=torch.float32) * 64
    ).round() / 64  # so that the offsets, whole numbers, round nothing
    found = torch.cat(on_ranks(list((scores + offset).chunk(ranks)))[0])
    torch.testing.assert_close(found, sinkhorn(scores), rtol=1e-5, atol=1e-9)


def test_ranks_with_other_maxima_and_small_epsilon_stay_finite() -> None:
    scores = cosines(5, 40, 20, dtype=torch.float32)
    assert sinkhorn(scores, 0.025).isfinite().all()
    spread = scores + torch.tensor([[2.0]] * 20 + [[-2.0]] * 20)
    assert torch.cat(on_ranks(list(spread.chunk(2)))[0]).isfinite().all()


def test_autocast_and_low_precision_scores_lose_nothing() -> None:
    half = cosines(6, 30, 40).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sinkhorn(half)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(found, sinkhorn(half.detach().float()))


def test_scores_are_left_as_they_are_and_may_be_columns_of_a_wider_matrix() -> None:
    wide = cosines(7, 10, 12, dtype=torch.float32)
    before = wide.clone()
    torch.testing.assert_close(sinkhorn(wide[:, 4:]), sinkhorn(wide[:, 4:].contiguous()))
    assert torch.equal(wide, before)


def test_nan_reaches_the_assignment() -> None:
    scores = cosines(8, 5, 4)
    scores[2, 1] = math.nan
    assert sinkhorn(scores).isnan().all()


def test_nothing_is_read_back_to_the_host() -> None:
    with FakeTensorMode():  # raises where a value is asked for
        assert sinkhorn(torch.randn(4, 6), all_reduce=lambda share: share * 2, ranks=2).shape == (4, 6)
