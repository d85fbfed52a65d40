"""BatchNorm over several processes is one BatchNorm over the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import timm
import torch
from processes import run_processes
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from fastssl.distributed.collectives import rank, world_size
from fastssl.distributed.sync_batchnorm import (
    _ByKernels,
    by_autograd,
    separate_batchnorm,
    synchronise_batchnorm,
)
from fastssl.errors import FastSSLError
from fastssl.training.networks import Bf16Weights

CPU, CHANNELS, SHARES = torch.device("cpu"), 6, (5, 3)


@dataclass(frozen=True)
class Case:
    """A network, what goes in, and how close two processes must come to one."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (CHANNELS, 4, 3)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-12
    shares: tuple[int, ...] = (4, 4)
    channels_last: bool = False
    training: bool = True
    steps: int = 2
    options: dict = field(default_factory=dict)


def network_of_timm() -> nn.Module:
    network = timm.create_model("lcnet_035", num_classes=0)
    assert any(isinstance(layer, BatchNormAct2d) for layer in network.modules())
    return network


def act_with_drop() -> nn.Module:
    layer = BatchNormAct2d(CHANNELS, act_layer=nn.SiLU, inplace=False)
    layer.drop = nn.Hardtanh(-0.5, 0.5)  # as definite as it is visible
    return layer


def at_rest() -> nn.Module:
    layer = nn.BatchNorm2d(CHANNELS)
    layer.track_running_stats = False  # it has statistics, and they stay as they are
    return layer


CASES = {
    "BatchNorm2d": Case(lambda: nn.BatchNorm2d(CHANNELS)),
    "channels-last": Case(lambda: nn.BatchNorm2d(CHANNELS), channels_last=True),
    "float32": Case(lambda: nn.BatchNorm2d(CHANNELS), dtype=torch.float32, tolerance=1e-5, channels_last=True),
    "rows": Case(lambda: nn.BatchNorm1d(CHANNELS), shape=(CHANNELS,)),
    "sequences": Case(lambda: nn.BatchNorm1d(CHANNELS), shape=(CHANNELS, 7)),
    "unequal shares": Case(lambda: nn.BatchNorm1d(CHANNELS), shape=(CHANNELS,), shares=SHARES),
    "affine=False": Case(lambda: nn.BatchNorm1d(CHANNELS, affine=False), shape=(CHANNELS,)),
    "momentum=None": Case(lambda: nn.BatchNorm2d(CHANNELS, momentum=None), steps=3),
    "no running statistics": Case(lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False)),
    "statistics at rest": Case(at_rest),
    "evaluation": Case(lambda: nn.BatchNorm2d(CHANNELS), training=False),
    "BatchNormAct2d": Case(lambda: BatchNormAct2d(CHANNELS)),  # an activation in place
    "act and drop": Case(act_with_drop),
    "lcnet_035": Case(network_of_timm, shape=(3, 32, 32), channels_last=True, tolerance=1e-9),
}


def made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    network = case.make().to(case.dtype)
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                if tensor is not None:
                    tensor.data.add_(0.3 * torch.randn(tensor.shape, dtype=case.dtype))
    return network.train(case.training)


def passes(case: Case, network: nn.Module, share: slice) -> dict:
    """Some steps forward and backward on this share of the batch."""
    generator, found = torch.Generator().manual_seed(1), {"outputs": [], "inputs": []}
    for step in range(case.steps):
        # Far from zero: where a variance from sums of squares would lose its digits.
        whole = torch.randn(sum(case.shares), *case.shape, generator=generator, dtype=case.dtype) * (step + 1) + 7
        images = whole[share]
        if case.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        images.requires_grad_()
        output = network(images)
        weights = torch.randn(sum(case.shares), *output.shape[1:], generator=generator, dtype=case.dtype)[share]
        (output * weights).sum().backward()
        found["outputs"].append(output.detach())
        found["inputs"].append(images.grad)
    found["parameters"] = {name: parameter.grad for name, parameter in network.named_parameters()}
    found["state"] = network.state_dict()
    return found


def all_cases() -> dict[str, dict]:
    found = {}
    for name, case in CASES.items():
        first = sum(case.shares[: rank()])
        found[name] = passes(case, synchronise_batchnorm(made(case), CPU), slice(first, first + case.shares[rank()]))
    return found | {"half": bf16_weights(), "compiled": compiled(), "separate": separate()}


def half_images() -> Tensor:
    images = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(2)) + 3
    return images.contiguous(memory_format=torch.channels_last)


def half_network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    return layers.to(memory_format=torch.channels_last).train()


def bf16_weights() -> dict:
    """A converted network through the copy that holds bfloat16 weights; also without a copy, in the same precision."""
    size = world_size()
    images = half_images().chunk(size)[rank()]
    full = synchronise_batchnorm(half_network(), CPU)
    half = Bf16Weights(full)
    half.network[1].register_forward_hook(
        lambda layer, inputs, output: seen.append((inputs[0].detach(), output.detach()))
    )
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = half.network(images)
    output.float().square().sum().backward()
    half.collect_gradients()
    return {
        "kinds": {type(layer).__name__ for layer in half.network.modules()},
        "shared": half.network[1].weight is full[1].weight and half.network[1].running_var is full[1].running_var,
        "first layer": seen[0],
        "state": full.state_dict(),
        "gradients": {name: parameter.grad for name, parameter in full.named_parameters()},
        "output": output.detach(),
    }


def compiled() -> Tensor:
    """A compiler that only traces: what it must survive is the collective in the middle."""
    network = synchronise_batchnorm(half_network(), CPU)
    images = half_images().chunk(world_size())[rank()]
    output = torch.compile(network, backend="eager")(images)
    output.square().sum().backward()
    return output.detach()


def separate() -> Tensor | None:
    """A pass that the first process makes alone would wait for the second."""
    network = separate_batchnorm(synchronise_batchnorm(half_network(), CPU))
    return network(half_images()).detach() if rank() == 0 else None


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    """What each of two processes found."""
    return run_processes(all_cases, 2)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_the_whole_batch(ranks: list[dict], name: str) -> None:
    case, both = CASES[name], [found[name] for found in ranks]
    expected = passes(case, made(case), slice(None))
    close = {"rtol": case.tolerance, "atol": case.tolerance}
    for kind in ("outputs", "inputs"):
        for step, whole in enumerate(expected[kind]):
            torch.testing.assert_close(torch.cat([found[kind][step] for found in both]), whole, **close)
            if case.channels_last and whole.dim() == 4:
                assert all(found[kind][step].is_contiguous(memory_format=torch.channels_last) for found in both)
    for parameter, whole in expected["parameters"].items():
        # Sums over up to thousands of places: as far off as the largest of them.
        bound = case.tolerance * max(1.0, whole.abs().max().item())
        torch.testing.assert_close(
            sum(found["parameters"][parameter] for found in both), whole, rtol=case.tolerance, atol=bound, msg=parameter
        )
    for found in both:
        assert list(found["state"]) == list(expected["state"])
        for buffer, whole in expected["state"].items():
            torch.testing.assert_close(found["state"][buffer], whole, **close, msg=buffer)


def test_statistics_are_float32_of_bfloat16_maps_and_weights_are_shared(ranks: list[dict]) -> None:
    both = [found["half"] for found in ranks]
    inputs, outputs = (torch.cat([found["first layer"][place] for found in both]) for place in (0, 1))
    assert inputs.dtype == outputs.dtype == torch.bfloat16
    layer = half_network()[1]
    expected = layer(inputs.float())
    torch.testing.assert_close(outputs.float(), expected, rtol=2e-2, atol=1e-2)  # rounded to bfloat16 once
    for found in both:
        assert found["shared"] and "SynchronisedBatchNorm2d" in found["kinds"] and "BatchNorm2d" not in found["kinds"]
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(found["state"][f"1.{name}"], getattr(layer, name), rtol=1e-5, atol=1e-6)
        assert found["state"]["1.num_batches_tracked"] == 1
        assert found["output"].is_contiguous(memory_format=torch.channels_last)
        assert all(
            grad is not None and grad.dtype == torch.float32 and grad.isfinite().all()
            for grad in found["gradients"].values()
        )


def test_a_compiler_cuts_its_graph_there(ranks: list[dict]) -> None:
    both = torch.cat([found["compiled"] for found in ranks])
    torch.testing.assert_close(both, half_network()(half_images()).detach(), rtol=1e-4, atol=1e-5)


def test_separated_layers_wait_for_nobody(ranks: list[dict]) -> None:
    assert torch.equal(ranks[0]["separate"], half_network()(half_images()))


# ---------------------------------------------------------------------- in one process


@pytest.mark.parametrize("name", CASES)
def test_alone_it_is_the_ordinary_layer(name: str) -> None:
    case = CASES[name]
    found, expected = (
        passes(case, network, slice(None)) for network in (synchronise_batchnorm(made(case), CPU), made(case))
    )
    assert all(torch.equal(*pair) for kind in ("outputs", "inputs") for pair in zip(found[kind], expected[kind]))
    assert all(torch.equal(value, expected["state"][key]) for key, value in found["state"].items())


def test_a_conversion_leaves_all_but_the_class() -> None:
    network = network_of_timm().eval()
    network.bn1.momentum = 0.25
    before, kinds = dict(network.state_dict(keep_vars=True)), [type(layer) for layer in network.modules()]
    modules = list(network.modules())
    converted = synchronise_batchnorm(network, CPU)
    assert converted is network and all(new is old for new, old in zip(network.modules(), modules))
    assert not any(type(layer) in (nn.BatchNorm2d, BatchNormAct2d) for layer in network.modules())
    assert isinstance(network.bn1, BatchNormAct2d) and network.bn1.momentum == 0.25 and not network.bn1.training
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is tensor for name, tensor in before.items())
    names = [type(layer) for layer in synchronise_batchnorm(network, CPU).modules()]  # twice is once
    assert [type(layer) for layer in copy.deepcopy(network).modules()] == names
    assert [type(layer) for layer in separate_batchnorm(network).modules()] == kinds


def test_the_network_may_be_a_layer() -> None:
    layer = nn.BatchNorm2d(3)
    assert synchronise_batchnorm(layer, CPU) is layer and type(layer).__name__ == "SynchronisedBatchNorm2d"


def test_what_cannot_be_synchronised_is_named_and_left_alone() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return input

    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(Own(3)))
    with pytest.raises(FastSSLError, match=r"layer 1\.0 is a Own"):
        synchronise_batchnorm(network, CPU)
    assert type(network[0]) is nn.BatchNorm2d
    with pytest.raises(FastSSLError, match="not on mps"):
        synchronise_batchnorm(nn.BatchNorm2d(3), torch.device("mps"))


# ---------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(16, CHANNELS, 5, 7), (16, CHANNELS)])
def test_the_kernels_compute_what_plain_operations_do(dtype: torch.dtype, affine: bool, shape: tuple[int, ...]) -> None:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    input, grad = ((torch.randn(shape) + 2).to("cuda", dtype).contiguous(memory_format=layout) for _ in range(2))
    weight, bias = (torch.randn(CHANNELS, device="cuda", requires_grad=True) if affine else None for _ in range(2))
    found = []
    for normalise in (_ByKernels.apply, by_autograd):
        images = input.clone().requires_grad_()
        running = [torch.zeros(CHANNELS, device="cuda"), torch.ones(CHANNELS, device="cuda")]
        untracked = normalise(images, weight, bias, None, None, 0.0, 1e-5)
        output = normalise(images, weight, bias, *running, 0.1, 1e-5)
        grads = torch.autograd.grad(output, [images, *([weight, bias] if affine else [])], grad)
        assert len(shape) == 2 or all(
            maps.is_contiguous(memory_format=torch.channels_last) for maps in (output, grads[0])
        )
        found.append([*running, untracked, output, *grads])
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for kernel, plain in zip(*found):
        torch.testing.assert_close(kernel, plain, rtol=tolerance, atol=tolerance)
