"""Launches, bytes and memory, against counts by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.benchmarks.harness.compiled_traffic import counting_compile
from fastssl.benchmarks.harness.fake_cuda import fake_cuda, why_not
from fastssl.benchmarks.harness.traffic import Counter, Part

pytestmark = pytest.mark.skipif(why_not() != "", reason=why_not())


@pytest.fixture
def counter() -> Iterator[Counter]:
    with fake_cuda(), Counter() as counter:
        yield counter


def maps(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", memory_format=torch.channels_last)


def convolution() -> object:
    return functional.conv2d(maps(8, 16, 10, 10), torch.empty(32, 16, 1, 1, dtype=torch.bfloat16, device="cuda"))


def chosen_rows() -> object:
    return torch.empty(100, 8, device="cuda")[:].index_select(0, torch.empty(5, dtype=torch.int64, device="cuda"))


def batch_norm() -> object:
    return functional.batch_norm(maps(8, 16, 10, 10), None, None, training=True)


def optimiser() -> object:
    parameter = nn.Parameter(torch.empty(100, device="cuda"))
    chosen = torch.optim.SGD([parameter], 0.1, momentum=0.9, fused=True)
    parameter.grad, chosen.state[parameter]["momentum_buffer"] = torch.empty(2, 100, device="cuda")
    return chosen.step()


@pytest.mark.parametrize(
    ("call", "launches", "moved"),
    [
        (lambda: maps(4, 4, 2, 2) + maps(4, 4, 2, 2), 1, 3 * 2 * 64),
        (lambda: maps(4, 4, 2, 2).add_(maps(1, 4, 1, 1).expand(4, 4, 2, 2)), 1, 2 * (64 + 4 + 64)),
        (lambda: maps(4, 4, 2, 2).zero_(), 1, 2 * 64),
        (lambda: maps(4, 4, 2, 2).flatten(2).transpose(1, 2)[1:].detach(), 0, 0),
        (chosen_rows, 1, 4 * 2 * 40 + 8 * 5),
        (lambda: torch._foreach_add_([torch.empty(10, device="cuda") for _ in range(200)], 1.0), 2, 2 * 4 * 2000),
        (convolution, 1, 2 * (8 * 16 * 100 + 16 * 32 + 8 * 32 * 100)),
        (batch_norm, 3, 3 * 2 * 8 * 16 * 100),
        (optimiser, 1, 5 * 4 * 100),
        (lambda: torch.empty(7) + 1, 0, 0),  # not on the GPU
    ],
)  # fmt: skip
def test_what_an_operator_moves(counter: Counter, call: Callable[[], object], launches: int, moved: int) -> None:
    call()
    rest = counter.parts.get("rest", Part())
    assert (rest.launches, rest.bytes) == (launches, moved)


def test_a_backward_pass_reads_and_writes_for_both_gradients_and_memory_is_what_is_alive(counter: Counter) -> None:
    layer = nn.Conv2d(16, 16, 1, bias=False).to("cuda", torch.bfloat16)
    x = maps(8, 16, 10, 10).requires_grad_()
    size, weight = 2 * 8 * 16 * 100, 2 * 256
    assert counter.alive == size + weight
    counter.reset()
    loss = counter.named("forward", lambda: layer(x).relu().sum())()
    forward = counter.parts["forward"]
    # relu keeps its result, the convolution what is there; the map between them is gone.
    assert forward.kept == size + 2 and counter.peak == 3 * size + weight
    assert (forward.launches, forward.bytes) == (3, 2 * size + weight + 2 * size + size + 2)
    counter.named("backward", loss.backward)()
    backward = counter.parts["backward"]
    assert backward.launches == 4  # ones, ReLU, two gradients; the sum's is a view
    assert backward.kept == weight and x.grad is not None  # both gradients came, the ReLU's result went


def test_a_part_within_another_is_none_of_it(counter: Counter) -> None:
    inner = counter.named("inner", lambda: maps(4, 4, 2, 2).add_(1))

    def call() -> Tensor:
        return inner().mul_(2)

    kept = counter.named("outer", call)()
    assert {name: (one.launches, one.kept) for name, one in counter.parts.items() if one.launches} == {
        "inner": (1, 128),
        "outer": (1, 0),
    }
    del kept
    assert counter.alive == 0 and counter.peak == 128


def test_a_compiled_function_is_what_inductor_makes_of_it(counter: Counter) -> None:
    """A chain of operators is one kernel that reads and writes once, forward and backward; a product stays torch's."""

    def chain(x: Tensor) -> Tensor:
        return (x * 2 + 1).exp().sin()

    x = torch.empty(1000, device="cuda", requires_grad=True)
    with counting_compile(counter):
        compiled, product = torch.compile(chain), torch.compile(lambda a, b: (a @ b).relu())
        counter.reset()
        y = compiled(x)
        assert (counter.parts["rest"].launches, counter.parts["rest"].bytes) == (1, 2 * 4000)
        grad = torch.empty(1000, device="cuda")
        counter.reset()
        y.backward(grad)
        assert (counter.parts["rest"].launches, counter.parts["rest"].bytes) == (1, 3 * 4000)
        assert x.grad is not None and counter.parts["rest"].kept == 0
        a = torch.empty(64, 64, device="cuda")
        counter.reset()
        with torch.no_grad():
            product(a, a)
        assert (counter.parts["rest"].launches, counter.parts["rest"].bytes) == (2, 5 * 4 * 64 * 64)
