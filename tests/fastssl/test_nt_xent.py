"""In-batch InfoNCE against its twin, which loops over samples, and the twin against NT-Xent as it is
usually written.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_twins import dense_nt_xent
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from fastssl.losses import SmoothedInfoNCE, nt_xent
from fastssl.losses.nt_xent import SmoothedNTXent
from fastssl.losses.smoothed_target import WEIGHTINGS

# Published numbers of neighbours need 20 negatives; these need few.
FEW = {"uniform_topk": 3, "stepped": 5}


def vectors(
    seed: int, views: int, batch: int, samples: int, dim: int, dtype: torch.dtype = torch.float64, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """Anchors (V, B, D) and candidates (2, M, D), unit vectors, or small whole numbers whose products tie often and
    exactly.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-1, 2, shape, generator=generator).to(dtype)
        return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)

    return draw(views, batch, dim).requires_grad_(), draw(2, samples, dim).requires_grad_()


def plain_nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """As in SimCLR's pseudo-code: the 2N x 2N similarities without their diagonal, cross-entropy against the other
    view.
    """
    z = torch.cat([first, second])
    similarity = (z @ z.t() / temperature).fill_diagonal_(-math.inf)
    count = len(first)
    return F.cross_entropy(similarity, torch.cat([torch.arange(count, 2 * count), torch.arange(count)]))


def test_two_views_without_smoothing_are_nt_xent_with_all_its_gradients() -> None:
    embeddings, _ = vectors(0, 2, 7, 7, 5)
    pairs = SmoothedNTXent(0.2, 0.0)(embeddings, embeddings)
    loss = (pairs[0, 1] + pairs[1, 0]) / 2
    expected = plain_nt_xent(embeddings[0], embeddings[1], 0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, embeddings), torch.autograd.grad(expected, embeddings), rtol=1e-10, atol=1e-13
    )


def test_twin_without_smoothing_is_nt_xent() -> None:
    embeddings, _ = vectors(1, 2, 4, 4, 5)
    pairs = dense_nt_xent(embeddings, embeddings, 0.2, 0.0, "nearest")
    torch.testing.assert_close((pairs[0, 1] + pairs[1, 0]) / 2, plain_nt_xent(embeddings[0], embeddings[1], 0.2))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    weighting=st.sampled_from(["uniform_topk", "stepped", "nearest", "uniform_all"]),
    views=st.integers(1, 3),
    batch=st.integers(1, 4),
    extra=st.integers(0, 3),
    temperature=st.sampled_from([0.1, 0.5, 1.0]),
    smoothing=st.sampled_from([None, 0.0, 0.1, 0.7]),
    ties=st.booleans(),
    data=st.data(),
)
def test_equals_the_twin_in_float64(
    seed: int,
    weighting: str,
    views: int,
    batch: int,
    extra: int,
    temperature: float,
    smoothing: float | None,
    ties: bool,
    data: st.DataObject,
) -> None:
    samples = max(4, batch + extra)
    first = data.draw(st.integers(0, samples - batch), label="first")
    anchors, candidates = vectors(seed, views, batch, samples, 4, whole=ties)
    criterion = SmoothedNTXent(temperature, smoothing, weighting, FEW.get(weighting))
    weights = torch.randn(2, views, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = criterion(anchors, candidates, first)
    gradients = torch.autograd.grad((weights * pairs).sum(), (anchors, candidates))
    expected = dense_nt_xent(
        anchors, candidates, temperature, criterion.smoothing, weighting, FEW.get(weighting), first
    )
    torch.testing.assert_close(pairs, expected, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad((weights * expected).sum(), (anchors, candidates))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12 / temperature)


@pytest.mark.parametrize("weighting", ["geometric", "thirds", "stepped"])
def test_published_numbers_of_neighbors(weighting: str) -> None:
    anchors, candidates = vectors(2, 2, 2, 11, 4, whole=True)  # 20 negatives: just enough
    criterion = SmoothedNTXent(0.3, weighting=weighting)
    expected = dense_nt_xent(anchors, candidates, 0.3, criterion.smoothing, weighting, None, 4)
    torch.testing.assert_close(criterion(anchors, candidates, 4), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_ties_go_to_the_lowest_column(dtype: torch.dtype) -> None:
    # The anchor sees zero in all candidates; the gradient of an axis shows how much of the target its candidate has.
    candidates = torch.cat([torch.zeros(8, 1), torch.eye(8)], 1).to(dtype).view(2, 4, 9)
    anchors = torch.zeros(1, 1, 9, dtype=dtype)
    anchors[..., 0] = -1
    anchors.requires_grad_()
    SmoothedNTXent(1.0, 0.4, "uniform_topk", 4)(anchors, candidates, first=1)[0, 0].backward()
    # columns 0 2 3 | 4 6 7 are negatives, 1 is the positive, 5 is the same sample's other view
    expected = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1], dtype=dtype) / 7
    expected[[0, 2, 3, 4]] -= 0.1
    expected[1] -= 0.6
    torch.testing.assert_close(anchors.grad[0, 0, 1:], expected)


def test_gradcheck() -> None:
    anchors, candidates = vectors(3, 3, 2, 4, 3)
    for weighting in ("stepped", "nearest", "uniform_all"):
        criterion = SmoothedNTXent(0.5, weighting=weighting, neighbors=FEW.get(weighting))
        assert torch.autograd.gradcheck(lambda a, c, loss=criterion: loss(a, c, 1), (anchors, candidates))


def test_gradients_add_up_where_candidates_are_the_anchors() -> None:
    anchors, _ = vectors(4, 4, 6, 6, 5)
    criterion = SmoothedNTXent(0.2, 0.3, "stepped", 5)
    together = torch.autograd.grad(criterion(anchors, anchors[:2])[:, 2:].sum(), anchors)[0]
    candidates = anchors.detach()[:2].clone().requires_grad_()
    of_anchors, of_candidates = torch.autograd.grad(criterion(anchors, candidates)[:, 2:].sum(), (anchors, candidates))
    of_anchors[:2] += of_candidates
    torch.testing.assert_close(together, of_anchors)
    assert of_candidates.abs().max() > 0.01


def test_a_view_against_itself_is_finite_also_in_its_gradient() -> None:
    anchors, _ = vectors(5, 2, 5, 5, 4)
    pairs = SmoothedNTXent(0.05, neighbors=5)(anchors, anchors)
    assert pairs.isfinite().all()
    pairs.sum().backward()
    assert anchors.grad.isfinite().all()


def test_parts_of_the_ranks_average_to_the_whole() -> None:
    anchors, _ = vectors(6, 3, 8, 8, 5)
    criterion = SmoothedNTXent(neighbors=5)
    parts = [criterion(anchors[:, first : first + 4], anchors[:2], first) for first in (0, 4)]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, criterion(anchors, anchors[:2]))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("mass", [0.0, 0.15])
def test_smoothing_as_a_tensor_equals_the_number(weighting: str, mass: float) -> None:
    anchors, candidates = vectors(7, 2, 3, 12, 5)
    criterion = SmoothedNTXent(weighting=weighting)
    expected = criterion(anchors, candidates, smoothing=mass)
    torch.testing.assert_close(
        expected, dense_nt_xent(anchors, candidates, 0.1, mass, weighting), rtol=1e-11, atol=1e-12
    )
    for tensor in (torch.tensor(mass, dtype=torch.float64), torch.tensor([mass], dtype=torch.float64)):
        torch.testing.assert_close(criterion(anchors, candidates, smoothing=tensor), expected)


def test_zero_smoothing_skips_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors, candidates = vectors(8, 2, 3, 12, 5)

    def no_search(*_: object) -> Tensor:
        raise AssertionError("searched for the nearest without need")

    monkeypatch.setattr(nt_xent, "top_columns", no_search)
    SmoothedNTXent()(anchors, candidates, smoothing=0.0)
    SmoothedNTXent()(anchors[:, :2], candidates[:, :2], smoothing=0.0)  # and asks for no neighbours
    with pytest.raises(AssertionError, match="searched"):
        SmoothedNTXent()(anchors, candidates)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_autocast_and_low_precision_inputs_lose_nothing(weighting: str) -> None:
    anchors, candidates = (t.detach().bfloat16().requires_grad_() for t in vectors(9, 3, 8, 16, 32))
    full = [t.detach().float().requires_grad_() for t in (anchors, candidates)]
    criterion = SmoothedNTXent(weighting=weighting)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = criterion(anchors, candidates, 3)
    pairs.sum().backward()
    expected = criterion(*full, 3)
    expected.sum().backward()
    assert pairs.dtype == torch.float32
    assert torch.equal(pairs, expected)
    assert anchors.grad.dtype == candidates.grad.dtype == torch.bfloat16
    torch.testing.assert_close(candidates.grad, full[1].grad.bfloat16())


def test_losses_next_to_zero_keep_their_digits() -> None:
    anchors = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]).expand(2, -1, -1)
    loss = SmoothedNTXent(0.1, 0.0)(anchors, anchors)[0, 1]
    assert loss.item() == pytest.approx(math.log1p(2 * math.exp(-20)), rel=1e-5)


def test_large_logits_do_not_overflow() -> None:
    anchors, candidates = vectors(10, 2, 4, 8, 6, torch.float32)
    pairs = SmoothedNTXent(1e-4, neighbors=5)(anchors, candidates)
    pairs.sum().backward()
    assert pairs.isfinite().all()
    assert candidates.grad.isfinite().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("spoiled", [0, 1])
def test_nan_reaches_the_loss(weighting: str, spoiled: int) -> None:
    tensors = [t.detach() for t in vectors(11, 2, 4, 12, 6, torch.float32)]
    tensors[spoiled][1, 2, 3] = math.nan
    assert SmoothedNTXent(weighting=weighting)(*tensors)[:, 1].isnan().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_target_entropy_is_that_of_the_loss_against_a_queue(weighting: str) -> None:
    ours, theirs = SmoothedNTXent(weighting=weighting), SmoothedInfoNCE(weighting=weighting)
    for mass in (None, 0.0, 0.3, torch.tensor(0.3)):
        assert float(ours.target_entropy(mass, negatives=30)) == float(theirs.target_entropy(mass, negatives=30))


def test_loss_of_the_target_itself_is_its_entropy() -> None:
    # Logits that are the log of the target's probabilities, made by anchors of one feature. The last negative has next
    # to none.
    log = torch.tensor([0.8, 0.1, 0.025, 0.025, 0.025, 0.025, 1e-300], dtype=torch.float64).log()
    other_view = torch.zeros(1, dtype=torch.float64)  # of the anchor's own sample: left out
    candidates = torch.stack([log[:4], torch.cat([other_view, log[4:]])])[..., None]
    criterion = SmoothedNTXent(1.0, 0.2, "stepped", 5)
    loss = criterion(torch.ones(1, 1, 1, dtype=torch.float64), candidates)[0, 0]
    assert loss.item() == pytest.approx(criterion.target_entropy(), rel=1e-12)


def test_the_first_call_may_be_made_in_inference_mode() -> None:
    anchors, candidates = vectors(12, 2, 3, 12, 5)
    nt_xent.weight_row.cache_clear()
    with torch.inference_mode():
        SmoothedNTXent()(anchors, candidates)
    SmoothedNTXent()(anchors, candidates).sum().backward()
    assert anchors.grad.isfinite().all()


@pytest.mark.parametrize("weighting", ["stepped", "uniform_all"])
def test_nothing_is_read_back_to_the_host(weighting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        nt_xent, "weight_row", nt_xent.weight_row.__wrapped__
    )  # a fake tensor must not stay in the cache
    with FakeTensorMode():  # raises where a value is asked for
        anchors, candidates = torch.randn(3, 4, 8, requires_grad=True), torch.randn(2, 16, 8, requires_grad=True)
        SmoothedNTXent(weighting=weighting)(anchors, candidates, 4, torch.tensor(0.2)).sum().backward()
        assert candidates.grad.shape == candidates.shape


def test_settings_that_make_no_sense() -> None:
    for options, message in [
        ({"weighting": "top"}, "choose one of"),
        ({"neighbors": 7}, "5, 10, 20, 30"),
        ({"smoothing": 1.0}, r"\[0, 1\)"),
        ({"temperature": 0.0}, "positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            SmoothedNTXent(**options)
    with pytest.raises(ValueError, match="negatives is missing"):
        SmoothedNTXent(weighting="uniform_all").target_entropy()


def test_inputs_that_make_no_sense() -> None:
    anchors, candidates = vectors(0, 3, 4, 12, 8)
    criterion = SmoothedNTXent()
    cases = [
        ((anchors, candidates[:, :10]), "18 negatives.*at least 20.*enlarge the batch"),
        ((anchors[:, :1], candidates[:, :1], 0, 0.0), "0 negatives.*at least 1"),
        ((anchors, candidates, 0, torch.tensor([0.1, 0.2])), "one floating-point element"),
        ((anchors, candidates, 0, 1.5), r"\[0, 1\)"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            criterion(*arguments)
