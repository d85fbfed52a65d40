"""What a GPU wants of a step, looked at on a CPU, or on a GPU that is not there: nothing here needs one."""

from __future__ import annotations

import pytest
import torch
from test_step import BATCH, CPU, METHODS, all_views, multicrop, rates, recipe, run_phases, train, views
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastssl.benchmarks.harness.fake_cuda import why_not
from fastssl.benchmarks.suites.count import count_step
from fastssl.methods import METHODS as CLASSES
from fastssl.methods.base import StepOutput
from fastssl.training.step import TrainStep


def layout_faults(step: TrainStep) -> list[str]:
    """Parameters whose gradient or moments lie otherwise than they do: torch's fused optimisers take all three to lie
    alike, and on a GPU refuse them, or go tensor by tensor.
    """
    faults = []
    for name, parameter in step.method.student.named_parameters():
        moments = step.optimizer.state.get(parameter, {}).values()
        like = [t for t in (parameter.grad, *moments) if isinstance(t, Tensor) and t.shape == parameter.shape]
        for tensor in like:
            strides = zip(tensor.stride(), parameter.stride(), parameter.shape)
            if tensor.dtype != parameter.dtype or any(a != b and size > 1 for a, b, size in strides):
                faults.append(f"{name} {tensor.dtype} {tensor.stride()}")
    return faults


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("case", METHODS)
def test_gradients_and_moments_lie_as_their_parameters_do(case: str, amp: bool) -> None:
    step, found = TrainStep(multicrop(case), CPU, amp=amp, seed=0), []
    update = step.update
    step.update = lambda rates: (update(rates), found.append(layout_faults(step)))
    for number in range(2):
        given = rates(step, number, lr=0.01)
        step(**all_views(step.recipe, step.view_dtype), noise=step.noise(0, number), rates=given)
    assert found == [[], []]
    assert any(
        isinstance(t, Tensor) and t.dim() == 4 for state in step.optimizer.state.values() for t in state.values()
    )


def test_another_layout_of_a_gradient_is_seen() -> None:
    step, found = TrainStep(recipe(), CPU, amp=False, seed=0), []

    def look(given: object) -> None:
        weight = step.method.student.backbone.conv_stem.weight
        weight.grad = weight.grad.contiguous(memory_format=torch.contiguous_format)
        found.extend(layout_faults(step))

    step.update = look
    train(step, 1)
    assert len(found) == 1 and found[0].startswith("backbone.conv_stem.weight")


def kept_nodes(step: TrainStep, parameters: list[nn.Parameter]) -> int:
    """Of how many ``parameters`` the node that collects the gradient outlives a step: it would belong to the stream of
    the step that made it, and a recording on another stream would wait for that one.
    """

    def node(parameter: nn.Parameter) -> torch.autograd.graph.Node:
        return parameter.expand_as(parameter).grad_fn.next_functions[0][0]

    def mark(*_: object) -> None:
        for parameter in parameters:
            node(parameter).metadata["seen"] = True

    hook = step.networks[0].register_forward_hook(mark)
    train(step, 1)
    hook.remove()
    return sum("seen" in node(parameter).metadata for parameter in parameters)


@pytest.mark.parametrize("amp", [False, True])
def test_no_node_of_a_step_outlives_it(amp: bool) -> None:
    step = TrainStep(recipe(), CPU, amp=amp, seed=0)
    parameters = [p for p in step.networks[0].parameters() if p.requires_grad]
    assert kept_nodes(step, parameters) == 0
    keeps = parameters[0].expand_as(parameters[0])  # whoever holds a result holds the node
    assert kept_nodes(step, parameters) == 1 and keeps is not None


@pytest.mark.parametrize("case", METHODS)
def test_compiled_networks_have_no_break_and_are_compiled_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all phases of a method and all values of its schedules."""
    real = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile", lambda network, **options: real(network, backend="eager", **{**options, "fullgraph": True})
    )
    with torch._dynamo.config.patch(disable=False):
        step = TrainStep(multicrop(case, train__compile="true"), CPU, amp=False, seed=0)
        run_phases(step, 1)
        first = counters["stats"]["unique_graphs"]
        run_phases(step, 6)
    assert not step.fallbacks
    assert counters["stats"]["unique_graphs"] == first > 0


def test_a_break_in_a_network_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda network, **options: real(network, backend="eager", **{**options, "fullgraph": True})
    )
    step = TrainStep(recipe(train__compile="true"), CPU, amp=False, seed=0)
    step.method.student.backbone.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with torch._dynamo.config.patch(disable=False):
        step([views(0)], step.noise(0, 0), rates(step))
    assert "compile" in step.fallbacks


def reads_a_value(output: StepOutput) -> None:
    output.loss.item()


def constant_on_the_cpu(output: StepOutput) -> None:
    output.metrics + torch.ones(len(output.metrics))


@pytest.mark.skipif(why_not() != "", reason=why_not())
@pytest.mark.parametrize("case", METHODS)
def test_a_loss_that_makes_the_host_wait_or_mixes_devices_is_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a step on the fake GPU, which does neither as it is."""
    small, faults = multicrop(case), []
    method = CLASSES[small.method][0]
    real = method.loss

    def loss(*args: object) -> StepOutput:
        output = real(*args)
        for fault in faults:
            fault(output)
        return output

    monkeypatch.setattr(method, "loss", loss)
    with torch._dynamo.config.patch(disable=True):  # it takes most of the time, and no loss is compiled
        parts = count_step(small, BATCH, amp=True, compiled=False)["parts"]
        assert {"student", "loss", "backward"} <= set(parts)
        for fault, words in ((reads_a_value, "_local_scalar_dense"), (constant_on_the_cpu, "two (different )?devices")):
            faults[:] = [fault]
            with pytest.raises(Exception, match=words):
                count_step(small, BATCH, amp=True, compiled=False)
