"""The backward pass in Python, against torch's engine."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastssl.benchmarks.harness.python_backward import releasing_what_was_read, run_backward


@pytest.fixture
def in_python() -> Iterator[None]:
    with (
        patch.object(torch.autograd, "_engine_run_backward", run_backward),
        patch.object(torch._C, "_current_graph_task_id", lambda: 0),
        releasing_what_was_read(),
    ):
        yield


class Doubled(torch.autograd.Function):
    """Two outputs, of which the second may get no gradient: then it is a zero."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, 3 * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, one: Tensor, two: Tensor) -> Tensor:
        return 2 * one + 3 * two


def loss_of(network: nn.Module, images: Tensor) -> Tensor:
    """A map that is used twice, a broadcast, a checkpoint and a function of one's own on the way."""
    scores = network(images)
    scores = checkpoint(lambda x: x.exp().log(), scores, use_reentrant=False)
    return (Doubled.apply(scores)[0].softmax(-1) * scores + scores.mean()).sum()


def test_gradients_are_the_engines_and_in_the_same_layout(in_python: None) -> None:
    torch.manual_seed(0)
    ours = timm.create_model("mobilenetv3_small_050").double().to(memory_format=torch.channels_last)
    theirs, images = copy.deepcopy(ours), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for _ in range(2):  # the second adds
        loss_of(ours, images).backward()
    with (
        patch.object(torch.autograd, "_engine_run_backward", torch.autograd.graph._engine_run_backward),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        for _ in range(2):
            loss_of(theirs, images).backward()
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-9)  # sums in another order
        assert mine.grad.stride() == other.grad.stride()


def test_gradients_of_inputs_leave_the_leaves_alone(in_python: None) -> None:
    x, weight = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    middle = x * weight
    unused = torch.ones(1, requires_grad=True)
    found, none = torch.autograd.grad(middle.square().sum(), [middle, unused], allow_unused=True)
    assert torch.equal(found, 2 * middle) and none is None and x.grad is None and weight.grad is None
    middle = x * weight
    middle.backward(torch.ones(3))
    assert torch.equal(x.grad, weight)


def test_what_a_node_kept_is_let_go_behind_it(in_python: None) -> None:
    kept: list[str] = []
    y = torch.randn(4, requires_grad=True).exp()
    storage = y.untyped_storage()
    weakref.finalize(storage, kept.remove, "y")
    kept.append("y")
    loss = (y * 2).sum()
    del y, storage
    assert kept == ["y"]
    loss.backward()
    assert not kept and loss.grad_fn is not None  # the graph is there, and holds nothing
