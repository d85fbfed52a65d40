"""The kernel against its dense twin, the twin against numbers worked out by hand, and the promises about memory and
misuse.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_twins import dense_smoothed_infonce, dense_target
from torch import Tensor
from torch.nn import functional as F

from fastssl.benchmarks.harness.timing import peak_extra_bytes
from fastssl.losses import SmoothedInfoNCE
from fastssl.losses.reference import dense_step
from fastssl.losses.smoothed_target import WEIGHTINGS, rank_weights, top_columns


def vectors(
    seed: int, batch: int, rows: int, dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors: query and key (batch, dim), both asking for a gradient, and queue (rows, dim)."""
    generator = torch.Generator().manual_seed(seed)
    query, key, queue = (
        F.normalize(torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)
        for n in (batch, batch, rows)
    )
    return query.requires_grad_(), key.requires_grad_(), queue


def whole_numbers(seed: int, batch: int, rows: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors of -1, 0 and 1, whose products are exact in any order of summation: different keys tie exactly, and
    often.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key, queue = (torch.randint(-1, 2, (n, dim), generator=generator).to(dtype) for n in (batch, batch, rows))
    return query.requires_grad_(), key.requires_grad_(), queue


def assert_equals_dense(
    criterion: SmoothedInfoNCE,
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    rtol: float,
    smoothing: float | None = None,
) -> None:
    """Value and both gradients, each relative to its own size, against the dense twin in float64."""
    mass = criterion.smoothing if smoothing is None else smoothing
    loss = criterion(query, key, queue, smoothing)
    gradients = torch.autograd.grad(loss, (query, key))
    dense_inputs = [tensor.detach().double().requires_grad_() for tensor in (query, key)]
    expected = dense_smoothed_infonce(
        *dense_inputs, queue.double(), criterion.temperature, mass, criterion.weighting, criterion.neighbors
    )
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
    for name, ours, theirs in zip(("query", "key"), gradients, torch.autograd.grad(expected, dense_inputs)):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error <= rtol, f"gradient of {name}: relative error {error:.2e}"


# ---------------------------------------------------------------- the twin itself


def test_dense_twin_by_hand() -> None:
    query, key = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    queue = torch.tensor([[0.0, 1.0], [0.8, 0.6], [-1.0, 0.0], [0.8, -0.6]], dtype=torch.float64)
    # temperature 0.5: logits are 1.2 | 0, 1.6, -2, 1.6; rows 1 and 3 tie, row 1 comes first
    normaliser = math.log(math.exp(1.2) + 1 + 2 * math.exp(1.6) + math.exp(-2))
    nearest = dense_smoothed_infonce(query, key, queue, 0.5, 0.5, "nearest")
    assert nearest.item() == pytest.approx(normaliser - 0.5 * 1.2 - 0.5 * 1.6, rel=1e-14)
    top3 = dense_smoothed_infonce(query, key, queue, 0.5, 0.3, "uniform_topk", 3)
    assert top3.item() == pytest.approx(normaliser - 0.7 * 1.2 - 0.1 * (1.6 + 1.6 + 0), rel=1e-14)
    everywhere = dense_smoothed_infonce(query, key, queue, 0.5, 0.2, "uniform_all")
    assert everywhere.item() == pytest.approx(normaliser - 0.8 * 1.2 - 0.05 * (0 + 1.6 - 2 + 1.6), rel=1e-14)
    logits = torch.tensor([[1.2, 0.0, 1.6, -2.0, 1.6]], dtype=torch.float64)
    assert dense_target(logits, 0.5, "nearest").tolist() == [[0.5, 0, 0.5, 0, 0]]


@pytest.mark.parametrize(
    ("weighting", "neighbors", "expected"),
    [
        ("uniform_topk", 5, [0.2] * 5),
        ("stepped", 5, [1 / 2, 1 / 8, 1 / 8, 1 / 8, 1 / 8]),
        ("stepped", 10, [1 / 2] + [1 / 12] * 3 + [1 / 24] * 6),
        ("stepped", 20, [1 / 4] * 2 + [1 / 24] * 6 + [1 / 48] * 12),
        ("stepped", 30, [1 / 6] * 3 + [1 / 36] * 9 + [1 / 72] * 18),
        ("geometric", None, [2.0**-i for i in range(1, 11)] + [2.0**-10]),
        ("nearest", None, [1.0]),
        ("thirds", None, [1 / 6] * 2 + [1 / 18] * 6 + [1 / 36] * 12),
        ("uniform_all", None, []),
    ],
)
def test_rank_weights(weighting: str, neighbors: int | None, expected: list[float]) -> None:
    weights = rank_weights(weighting, neighbors)
    assert list(weights) == pytest.approx(expected, rel=1e-15)
    assert not weights or sum(weights) == pytest.approx(1, rel=1e-14)


def test_published_defaults() -> None:
    found = {
        name: (SmoothedInfoNCE(weighting=name).smoothing, SmoothedInfoNCE(weighting=name).neighbors)
        for name in WEIGHTINGS
    }
    assert found == {
        "uniform_topk": (0.2, 20),
        "stepped": (0.2, 20),
        "geometric": (0.4, 11),
        "nearest": (0.5, 1),
        "uniform_all": (0.2, None),
        "thirds": (0.2, 20),
    }


# ---------------------------------------------------------------- kernel and twin


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    weighting=st.sampled_from(WEIGHTINGS),
    batch=st.integers(1, 9),
    rows=st.integers(20, 400),
    dim=st.integers(1, 24),
    tile=st.sampled_from([None, 1, 16, 17, 48, 100, 1000]),
    temperature=st.sampled_from([0.05, 0.1, 0.2, 1.0]),
    smoothing=st.sampled_from([None, 0.0, 0.05, 0.7]),
    ties=st.booleans(),
)
def test_equals_dense_in_float64(
    seed: int,
    weighting: str,
    batch: int,
    rows: int,
    dim: int,
    tile: int | None,
    temperature: float,
    smoothing: float | None,
    ties: bool,
) -> None:
    inputs = whole_numbers(seed, batch, rows, dim, torch.float64) if ties else vectors(seed, batch, rows, dim)
    criterion = SmoothedInfoNCE(temperature, smoothing, weighting, tile=tile)
    # Draws include losses next to zero, where relative means nothing: hence a floor, of rounding size.
    loss = criterion(*inputs)
    gradients = torch.autograd.grad(loss, inputs[:2])
    query, key = (tensor.detach().clone().requires_grad_() for tensor in inputs[:2])
    expected = dense_smoothed_infonce(query, key, inputs[2], temperature, criterion.smoothing, weighting)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (query, key))):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12 / temperature)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_float32_equals_dense_within_rounding(weighting: str, seed: int) -> None:
    assert_equals_dense(
        SmoothedInfoNCE(0.1, weighting=weighting), *vectors(seed, 32, 3000, 64, torch.float32), rtol=3e-6
    )


@pytest.mark.parametrize("neighbors", [5, 10, 20, 30])
@pytest.mark.parametrize("weighting", ["stepped", "uniform_topk"])
def test_every_published_number_of_neighbors(weighting: str, neighbors: int) -> None:
    assert_equals_dense(
        SmoothedInfoNCE(0.1, 0.2, weighting, neighbors, tile=64), *vectors(neighbors, 6, 333, 16), rtol=1e-12
    )


def test_queue_just_as_long_as_the_neighbors() -> None:
    assert_equals_dense(SmoothedInfoNCE(0.1, 0.2, "stepped", 30), *vectors(0, 4, 30, 8), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "uniform_all"])
def test_exact_ties_go_to_the_lowest_row(weighting: str, dtype: torch.dtype) -> None:
    # 8 features of -1, 0, 1: 17 possible products for 500 keys, so that every rank is inside a tie that crosses blocks
    # and tiles
    inputs = whole_numbers(3, 8, 500, 8, dtype)
    for tile in (16, 48, None):
        assert_equals_dense(
            SmoothedInfoNCE(0.7, 0.5, weighting, tile=tile), *inputs, rtol=3e-6 if dtype == torch.float32 else 1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_products_equal(dtype: torch.dtype) -> None:
    # The keys differ but the query sees zero (of either sign) in all of them: rank goes by row alone, and the gradient
    # shows which rows.
    query = torch.zeros(3, 101, dtype=dtype)
    query[:, 0] = -1
    queue = torch.cat([torch.zeros(100, 1, dtype=dtype), torch.eye(100, dtype=dtype)], 1)
    key = query.clone()
    criterion = SmoothedInfoNCE(1.0, 0.4, "uniform_topk", 4, tile=32)
    query.requires_grad_()
    criterion(query, key, queue).backward()
    probability = 1 / (100 + math.e)
    expected = torch.full((100,), probability, dtype=dtype)
    expected[:4] -= 0.1
    torch.testing.assert_close(query.grad[:, 1:], (expected / 3).expand(3, -1))


@pytest.mark.parametrize("copies", [[3, 4], [15, 16], [31, 32, 200], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 90, 91, 250]])
def test_duplicate_keys_in_and_across_blocks_and_tiles(copies: list[int]) -> None:
    query, key, queue = vectors(5, 6, 256, 12)
    queue[copies] = F.normalize(query.detach().mean(0), dim=0)
    for weighting in WEIGHTINGS:
        assert_equals_dense(SmoothedInfoNCE(0.1, weighting=weighting, tile=32), query, key, queue, rtol=1e-12)


def test_ranking_equals_a_stable_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (50, 300), generator=generator) / 2
    values[:, ::7] = -0.0  # equal to 0.0, with other bits
    values[0, 5], values[1, 7], values[2, :] = math.inf, -math.inf, -math.inf
    expected = values.sort(dim=1, descending=True, stable=True).indices
    for count in (1, 20, 300):
        assert torch.equal(top_columns(values, count), expected[:, :count])
        assert torch.equal(top_columns(values.double(), count), expected[:, :count])


def test_gradcheck() -> None:
    query, key, queue = vectors(1, 3, 50, 5)
    for weighting in WEIGHTINGS:
        criterion = SmoothedInfoNCE(0.5, weighting=weighting, tile=16)
        assert torch.autograd.gradcheck(lambda q, k, loss=criterion: loss(q, k, queue), (query, key))


def test_gradient_follows_what_the_loss_is_multiplied_by() -> None:
    query, key, queue = vectors(2, 4, 64, 8)
    criterion = SmoothedInfoNCE()
    once = torch.autograd.grad(criterion(query, key, queue), (query, key))
    scaled = torch.autograd.grad(-2.5 * criterion(query, key, queue) + query.sum(), (query, key))
    torch.testing.assert_close(scaled[0], -2.5 * once[0] + 1)
    torch.testing.assert_close(scaled[1], -2.5 * once[1])


def test_queue_may_be_overwritten_before_backward() -> None:
    query, key, queue = vectors(2, 4, 64, 8)
    criterion = SmoothedInfoNCE()
    expected = torch.autograd.grad(criterion(query, key, queue.clone()), query)
    loss = criterion(query, key, queue)
    queue.zero_()
    assert torch.equal(torch.autograd.grad(loss, query)[0], expected[0])


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    query, key, queue = vectors(2, 4, 64, 8)
    criterion = SmoothedInfoNCE()
    value = criterion(query, key, queue)
    with torch.no_grad():
        silent = criterion(query, key, queue)
    assert not silent.requires_grad
    assert torch.equal(silent, value)
    criterion(query, key.detach(), queue).backward()
    criterion(query.detach(), key, queue).backward()
    expected = torch.autograd.grad(value, (query, key))
    torch.testing.assert_close((query.grad, key.grad), expected)


# ---------------------------------------------------------------- schedule, precision, entropy


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("mass", [0.0, 0.15, 0.6])
def test_smoothing_as_a_tensor_equals_the_number(weighting: str, mass: float) -> None:
    query, key, queue = vectors(4, 5, 100, 8)
    criterion = SmoothedInfoNCE(weighting=weighting, tile=48)
    assert_equals_dense(criterion, query, key, queue, rtol=1e-12, smoothing=mass)
    by_number = torch.autograd.grad(criterion(query, key, queue, mass), (query, key))
    for tensor in (torch.tensor(mass, dtype=torch.float64), torch.tensor([mass], dtype=torch.float64)):
        loss = criterion(query, key, queue, tensor)
        assert loss.shape == ()
        torch.testing.assert_close(torch.autograd.grad(loss, (query, key)), by_number)


def test_zero_smoothing_skips_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, queue = vectors(4, 5, 100, 8)

    def no_search(*_: object) -> Tensor:
        raise AssertionError("searched for the nearest without need")

    monkeypatch.setattr("fastssl.losses.smoothed_infonce.top_columns", no_search)
    plain = F.cross_entropy(
        torch.cat([(query * key).sum(1, keepdim=True), query @ queue.t()], 1) / 0.1, torch.zeros(5, dtype=torch.int64)
    )
    torch.testing.assert_close(SmoothedInfoNCE()(query, key, queue, 0.0), plain)
    with pytest.raises(AssertionError, match="searched"):
        SmoothedInfoNCE()(query, key, queue, 0.1)


def test_autocast_does_not_lower_the_precision() -> None:
    query, key, queue = vectors(6, 16, 500, 32, torch.float32)
    criterion = SmoothedInfoNCE()
    plain = criterion(query, key, queue)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = criterion(query, key, queue)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)

    half_query, half_key, half_queue = (
        query.detach().bfloat16().requires_grad_(),
        key.detach().bfloat16(),
        queue.bfloat16(),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(half_query, half_key, half_queue)
    loss.backward()
    assert half_query.grad.dtype == torch.bfloat16
    exact = criterion(half_query.float(), half_key.float(), half_queue.float())
    assert torch.equal(loss, exact), "low-precision inputs are exact numbers; nothing may be lost after them"


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_target_entropy(weighting: str) -> None:
    rows = 64
    criterion = SmoothedInfoNCE(weighting=weighting)
    for mass in (0.0, 0.3):
        target = dense_target(torch.randn(1, 1 + rows, dtype=torch.float64), mass, weighting)
        expected = torch.special.entr(target).sum().item()
        assert criterion.target_entropy(mass, negatives=rows) == pytest.approx(expected, rel=1e-12)
        on_device = criterion.target_entropy(torch.tensor(mass, dtype=torch.float64), negatives=rows)
        assert isinstance(on_device, Tensor)
        assert on_device.item() == pytest.approx(expected, rel=1e-12)


def test_loss_of_the_target_itself_is_its_entropy() -> None:
    # 1 + 5 logits whose softmax is the target: log of its probabilities, made by a query of one feature.
    target = torch.tensor([0.8, 0.1, 0.025, 0.025, 0.025, 0.025], dtype=torch.float64)
    criterion = SmoothedInfoNCE(1.0, 0.2, "stepped", 5)
    loss = criterion(torch.ones(1, 1, dtype=torch.float64), target[:1, None].log(), target[1:, None].log())
    assert loss.item() == pytest.approx(criterion.target_entropy(), rel=1e-12)


# ---------------------------------------------------------------- memory, non-finite input, misuse


def test_peak_memory_is_a_small_part_of_the_dense_form() -> None:
    query, key, queue = vectors(0, 512, 65536, 128, torch.float32)
    key = key.detach()
    kernel = peak_extra_bytes(lambda: SmoothedInfoNCE()(query, key, queue).backward(), "cpu")
    dense = peak_extra_bytes(lambda: dense_step(query, key, queue, 0.1, 0.2, "stepped").backward(), "cpu")
    assert dense > 3 * 512 * 65536 * 4, "the measurement must see at least logits, target and their gradient"
    assert kernel <= dense / 8


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_nan_reaches_the_loss(weighting: str, spoiled: int) -> None:
    inputs = [tensor.detach() for tensor in vectors(7, 4, 50, 6, torch.float32)]
    for bad in (math.nan, -math.nan):
        inputs[spoiled][2, 3] = bad
        assert SmoothedInfoNCE(weighting=weighting, tile=16)(*inputs).isnan()


def test_overflow_reaches_the_loss() -> None:
    query, key, queue = (tensor.detach() for tensor in vectors(7, 4, 50, 6, torch.float32))
    queue[40] = query[1] * 1e38
    queue[40] *= 1e38
    assert SmoothedInfoNCE()(query, key, queue).isnan()


def test_large_logits_do_not_overflow() -> None:
    query, key, queue = vectors(8, 4, 200, 6)
    assert_equals_dense(SmoothedInfoNCE(1e-4, tile=16), query, key, queue, rtol=1e-10)
    as_float32 = SmoothedInfoNCE(1e-4, tile=16)(query.float(), key.float(), queue.float())
    assert as_float32.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "top"}, "uniform_topk, stepped, geometric, nearest, uniform_all, thirds"),
        ({"weighting": "stepped", "neighbors": 7}, "5, 10, 20, 30"),
        ({"weighting": "uniform_topk", "neighbors": 0}, "at least 1"),
        ({"weighting": "uniform_topk", "neighbors": 2.5}, "whole number"),
        ({"weighting": "geometric", "neighbors": 20}, "always uses 11"),
        ({"weighting": "nearest", "neighbors": 2}, "always uses 1"),
        ({"weighting": "uniform_all", "neighbors": 2}, "leave neighbors=None"),
        ({"smoothing": 1.0}, r"\[0, 1\)"),
        ({"smoothing": -0.1}, r"\[0, 1\)"),
        ({"smoothing": math.nan}, r"\[0, 1\)"),
        ({"temperature": 0.0}, "positive"),
        ({"temperature": math.nan}, "positive"),
        ({"tile": 0}, "positive"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmoothedInfoNCE(**options)


def test_inputs_that_make_no_sense() -> None:
    query, key, queue = vectors(0, 4, 64, 8)
    criterion = SmoothedInfoNCE()
    cases = [
        ((query[0], key, queue), "query is torch.float64 of shape"),
        ((query, key, queue.long()), "queue is torch.int64"),
        ((query, key[:3], queue), "must have one shape"),
        ((query[:0], key[:0], queue), "must have one shape"),
        ((query, key, queue[:, :5]), "queue has 5 features and query 8"),
        ((query, key, queue[:19]), "19 negatives, and weighting='stepped' needs at least 20"),
        ((query, key, queue.clone().requires_grad_()), r"queue\.detach\(\)"),
        ((query, key, queue.to("meta")), "move them to one device"),
        ((query, key, queue, torch.tensor([0.1, 0.2])), "one floating-point element"),
        ((query, key, queue, torch.tensor(0.1, requires_grad=True)), "without gradient"),
        ((query, key, queue, 1.5), r"\[0, 1\)"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            criterion(*arguments)
    with pytest.raises(ValueError, match="at least 1"):
        SmoothedInfoNCE(weighting="uniform_all")(query, key, queue[:0])
    with pytest.raises(ValueError, match="negatives"):
        SmoothedInfoNCE(weighting="uniform_all").target_entropy()


def test_peer_of_the_benchmark_computes_the_same_loss() -> None:
    query, key, queue = vectors(9, 8, 300, 16)
    for weighting in WEIGHTINGS:
        for mass in (0.0, 0.3):
            ours = dense_step(query, key, queue, 0.1, mass, weighting)
            torch.testing.assert_close(ours, dense_smoothed_infonce(query, key, queue, 0.1, mass, weighting))


@pytest.mark.gpu
def test_on_a_gpu_equals_dense_without_a_sync() -> None:
    query, key, queue = (tensor.detach().cuda() for tensor in vectors(10, 64, 5000, 64, torch.float32))
    query.requires_grad_()
    key.requires_grad_()
    mass = torch.tensor(0.2, device="cuda")
    for weighting in WEIGHTINGS:
        criterion = SmoothedInfoNCE(weighting=weighting, tile=1024)
        assert_equals_dense(criterion, query, key, queue, rtol=5e-6)
        torch.cuda.set_sync_debug_mode("error")
        try:
            criterion(query, key, queue, mass).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
