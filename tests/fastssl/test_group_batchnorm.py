"""BatchNorm by groups in one pass, against plain layers and a pass for each group."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from timm.layers import EvoNorm2dB0
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.methods.base import Encoder, new_encoder
from fastssl.models import group_batchnorm
from fastssl.models.activations import LeanReLU6
from fastssl.models.backbones import create_backbone
from fastssl.models.group_batchnorm import (
    BatchNorms,
    GroupBatchNorm,
    Together,
    forward,
    in_turn,
    not_compiled,
    ordinary_batchnorm,
)
from fastssl.models.heads import ProjectorConfig
from fastssl.models.recompute import recompute_blocks
from fastssl.training.networks import Bf16Weights
from fastssl.utils.compiled import Compiled


def together(*given) -> tuple[Tensor, ...]:
    """Without an activation."""
    return Together.apply(*given, "")


HEAD = ProjectorConfig(hidden=12, out=8, norm=True, norm_out=True)


def encoder(arch: str = "lcnet_035", dtype: torch.dtype = torch.float32) -> Encoder:
    torch.manual_seed(0)
    found = new_encoder(create_backbone(arch), HEAD).to(dtype).train()
    for layer in found.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False
    return found


def pictures(rows: int, size: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each with a brightness of its own, so that groups differ."""
    generator = torch.Generator().manual_seed(size)
    drawn = torch.randn(rows, 3, size, size, generator=generator, dtype=torch.float64)
    return (drawn + torch.arange(rows).view(-1, 1, 1, 1) / rows).to(dtype).to(memory_format=torch.channels_last)


def pass_by_pass(network: Encoder, images: list[Tensor], groups: int, views: int) -> Tensor:
    """With plain layers: the first group of every view, then the second ones, each through backbone and head alone."""
    plain = ordinary_batchnorm(network)
    parts = [part for batch in images for part in batch.split(sum(map(len, images)) // groups)]
    each, found = groups // views, {}
    for group in range(each):
        for view in range(views):
            number = view * each + group
            found[number] = plain.projector(plain.backbone(parts[number]))
    return torch.cat([found[number] for number in range(groups)])


@pytest.mark.parametrize("arch", ["mobilenetv3_small", "resnet18", "efficientnet_b0", "vit_tiny"])
def test_one_pass_is_a_pass_for_each_group(arch: str) -> None:
    """Outputs, gradients, running statistics and counters."""
    network = encoder(arch, torch.float64)
    twin = copy.deepcopy(network)
    images = [pictures(8, dtype=torch.float64)]
    outputs = network(images, groups=4, views=2), pass_by_pass(twin, images, 4, 2)
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-12)
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for output in outputs:
        (output * weights).sum().backward()
    for (name, mine), other in zip(network.named_parameters(), twin.parameters()):
        assert (mine.grad - other.grad).norm() <= 1e-6 * other.grad.norm() + 1e-9, name
    assert network.state_dict().keys() == twin.state_dict().keys()
    for (name, mine), other in zip(network.named_buffers(), twin.buffers()):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_float32_agrees_to_a_millionth_and_without_groups_to_the_bit() -> None:
    network = encoder("resnet18")
    for groups, bound in ((4, 1e-6), (1, 0)):
        twin = copy.deepcopy(network)
        with torch.no_grad():
            outputs = network(pictures(8), groups=groups), pass_by_pass(twin, [pictures(8)], groups, 1)
        torch.testing.assert_close(*outputs, rtol=0, atol=bound)
        for mine, other in zip(network.buffers(), twin.buffers()):
            torch.testing.assert_close(mine, other, rtol=0, atol=bound)


def test_views_of_two_sizes_and_layers_of_two_momenta() -> None:
    network = encoder(dtype=torch.float64)
    next(layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)).momentum = 0.4
    twin = copy.deepcopy(network)
    images = [pictures(8, 32, torch.float64), pictures(12, 16, torch.float64), pictures(4, 8, torch.float64)]
    torch.testing.assert_close(network(images, groups=12, views=6), pass_by_pass(twin, images, 12, 6))
    torch.testing.assert_close(network(images, groups=6, views=6), pass_by_pass(twin, images, 6, 6))  # one of 8 pixels
    for mine, other in zip(network.buffers(), twin.buffers()):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    assert int(network.projector[1].num_batches_tracked) == 18


def test_other_layers_that_look_at_a_batch_get_a_pass_for_each_group() -> None:
    def network() -> Encoder:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 8, 3), EvoNorm2dB0(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Encoder(body, nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))).train()

    mine, other = network(), network()
    assert not mine.norms.complete and encoder().norms.complete
    images = [pictures(8, 8), pictures(4, 6)]
    torch.testing.assert_close(mine(images, groups=6, views=3), pass_by_pass(other, images, 6, 3))
    for one, two in zip(mine.buffers(), other.buffers()):
        torch.testing.assert_close(one, two)
    assert not ordinary_batchnorm(encoder()).norms.complete


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (12, 5)])
def test_all_groups_together_are_the_groups_in_turn(
    dtype: torch.dtype, affine: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(group_batchnorm, "compiled", lambda function, act: function)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(2, 5, dtype=wide) if affine else (None, None)
    input, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    if len(shape) == 4:
        input = input.to(memory_format=torch.channels_last)
    found = []
    for normalise in (together, in_turn):
        leaf = input.clone().requires_grad_()
        output, *statistics = normalise(leaf, weight, bias, 3, 1e-3)
        assert output.stride() == input.stride() and {one.dtype for one in statistics} == {wide}
        output.backward(grad)
        found.append(([output, leaf.grad], statistics))
    bound = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found[0][0], found[1][0], **bound)
    torch.testing.assert_close(found[0][1], found[1][1])


def activated(layer: nn.Module, *given) -> tuple[Tensor, ...]:
    """The slow twin of a layer with its activation."""
    output, *statistics = in_turn(*given)
    return layer(output), *statistics


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layer", [nn.ReLU(), nn.ReLU6(), LeanReLU6(), nn.Hardswish(), nn.SiLU()])
def test_an_activation_within_the_layer_is_the_one_behind_it(
    layer: nn.Module, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_batchnorm, "compiled", lambda function, act: function)
    torch.manual_seed(0)
    name, kept = type(layer).__name__, []
    assert name in group_batchnorm.ACTIVATIONS
    input, grad = (3 * torch.randn(8, 5, 4, 3, dtype=torch.float64) for _ in range(2))
    affine_of = [torch.randn(5, dtype=torch.float64).requires_grad_() if affine else None for _ in range(2)]
    found = []
    for call in (partial(activated, layer), lambda *given: Together.apply(*given, name)):
        leaf = input.clone().requires_grad_()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
            output, *statistics = call(leaf, *affine_of, 2, 1e-5)
        output.backward(grad)
        learned = [one for one in affine_of if one is not None]
        found.append([output, *statistics, leaf.grad, *(one.grad for one in learned)])
        for one in learned:
            one.grad = None
    torch.testing.assert_close(*found)
    assert kept.count(input.numel()) == 1  # its input alone


@pytest.mark.parametrize("arch", ["mobilenetv3_small", "mobilenetv2", "efficientnet_b0"])
def test_a_compiled_network_joins_its_activations(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients and statistics are those of the layers one by one."""
    joined, real = [], GroupBatchNorm._joined
    monkeypatch.setattr(GroupBatchNorm, "_joined", lambda self: joined.append(real(self)) or joined[-1])
    network = encoder(arch, torch.float64)
    twin = copy.deepcopy(network)
    twin.norms = BatchNorms(twin)
    torch._dynamo.reset()
    form = torch.compile(network, backend="eager", dynamic=False, fullgraph=True)
    images = [pictures(8, dtype=torch.float64), pictures(4, 16, torch.float64)]
    outputs = [one(images, groups=6, views=3) for one in (form, twin)]
    torch.testing.assert_close(*outputs)
    weights = torch.randn(outputs[0].shape, dtype=torch.float64)  # a plain sum is the same for any embeddings
    for output in outputs:
        (output * weights).sum().backward()
    for mine, other in zip(network.buffers(), twin.buffers()):
        torch.testing.assert_close(mine, other)
    mine, other = (torch.cat([one.grad.flatten() for one in form.parameters()]) for form in (network, twin))
    assert (mine - other).norm() <= 1e-4 * other.norm()  # groups of two pictures hardly determine it
    assert set(joined) > {""}


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("groups", [1, 3])
def test_statistics_and_counters_of_all_layers_move_in_one_go(groups: int) -> None:
    network = encoder()
    with Launches() as launches, torch.no_grad():
        network([pictures(8), pictures(4, 16)], groups=groups)
    names = launches.names
    assert names["add_.Tensor"] == 0 and names["_foreach_add_.ScalarList"] == 1
    assert (names["_foreach_mul_.Scalar"], names["_foreach_add_.List"]) == ((0, 0) if groups == 1 else (1, 1))
    assert int(network.backbone.bn1.num_batches_tracked) == max(2, groups)
    assert int(network.projector[1].num_batches_tracked) == groups


@pytest.mark.parametrize("normalise", [together, in_turn])
def test_the_backward_pass_keeps_the_input_and_little_else(
    normalise: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_batchnorm, "compiled", lambda function, act: function)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    maps, (weight, bias) = torch.randn(12, 6, 9, 9, requires_grad=True), torch.randn(2, 6, requires_grad=True).unbind()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        normalise(maps, weight, bias, 3, 1e-5)
    assert maps.nbytes < sum(kept.values()) < 1.1 * maps.nbytes


def test_blocks_that_are_computed_again_see_their_groups_and_move_nothing() -> None:
    network = encoder(dtype=torch.float64)
    twin = copy.deepcopy(network)
    twin.norms = BatchNorms(twin)
    assert recompute_blocks(twin.backbone) == ""
    for form in (network, twin):
        form([pictures(8, dtype=torch.float64), pictures(4, 16, torch.float64)], groups=6, views=3)[
            :, 0
        ].sum().backward()
    for mine, other in zip(network.parameters(), twin.parameters()):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, network.buffers(), twin.buffers()))


def test_outside_of_a_pass_and_in_evaluation_the_layers_are_plain() -> None:
    network = encoder()
    network.backbone(pictures(4))
    assert int(network.backbone.bn1.num_batches_tracked) == 1
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(pictures(4), groups=2), network(pictures(4)))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_network_in_training_can_be_pickled() -> None:
    network = encoder()
    loaded = pickle.loads(pickle.dumps(network))
    torch.testing.assert_close(loaded(pictures(4), groups=2), network(pictures(4), groups=2))


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    network = encoder()
    before = {name: value.clone() for name, value in network.named_buffers()}
    with pytest.raises(RuntimeError):
        network([pictures(4), torch.zeros(4, 1, 32, 32)], groups=2)
    assert network.norms.groups is None
    network(pictures(4), groups=2)
    assert int(network.backbone.bn1.num_batches_tracked) == int(before["backbone.bn1.num_batches_tracked"]) + 2


def test_copies_have_the_statistics_in_common_and_a_dropped_network_is_freed() -> None:
    network = encoder()
    half = Bf16Weights(network)
    with torch.autocast("cpu", torch.bfloat16):
        half.network(pictures(4), groups=2)
    assert int(network.backbone.bn1.num_batches_tracked) == 2
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(network.backbone.bn1)
        del network, half
        assert gone() is None
    finally:
        gc.enable()


@contextmanager
def counting_graphs() -> Iterator[list]:
    graphs: list = []
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def test_a_compiled_network_is_one_graph_for_all_steps() -> None:
    network = encoder(dtype=torch.float64)
    twin = copy.deepcopy(network)
    twin.norms = BatchNorms(twin)
    with counting_graphs() as graphs:

        def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        form = torch.compile(network, backend=backend, dynamic=False, fullgraph=True)
        for _ in range(3):
            outputs = [
                network_form(pictures(4, dtype=torch.float64), groups=2, views=2) for network_form in (form, twin)
            ]
            torch.testing.assert_close(*outputs)
            for output in outputs:
                output[:, 0].sum().backward()
    assert len(graphs) == 1
    for mine, other in zip([*network.buffers()], [*twin.buffers()]):
        torch.testing.assert_close(mine, other)
    for mine, other in zip(network.parameters(), twin.parameters()):
        torch.testing.assert_close(mine.grad, other.grad)


def test_without_a_compiler_the_function_runs_as_it_is_and_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: object, **options: object) -> object:
        def call(*arguments: object) -> None:
            raise RuntimeError("no compiler in /secret/folder/cc")

        return call

    monkeypatch.setattr(torch, "compile", fails)
    function = Compiled(forward)
    input = torch.randn(4, 3)
    output = function(input, None, None, 2, 1e-5)[0]
    torch.testing.assert_close(output.view(2, 2, 3).mean(1), torch.zeros(2, 3))
    assert function.reason == "RuntimeError: no compiler in cc"

    def no_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "compile", lambda function, **options: no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        Compiled(forward)(input, None, None, 2, 1e-5)


@pytest.mark.slow
def test_the_compiled_kernels_compute_the_same() -> None:
    """By Inductor for this CPU; the same functions are compiled for a GPU."""
    torch.manual_seed(0)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        for shape in ((8, 16, 5, 5), (16, 8, 7, 7), (24, 32)):
            input, grad = (torch.randn(shape).to(dtype) for _ in range(2))
            results = []
            for normalise in (together, in_turn):
                leaves = [input.clone(), *torch.randn(2, shape[1], generator=torch.Generator().manual_seed(1))]
                output, *statistics = normalise(*(leaf.requires_grad_() for leaf in leaves), 4, 1e-5)
                output.backward(grad)
                results.append([output, *statistics, *(leaf.grad for leaf in leaves)])
            torch.testing.assert_close(*results, rtol=bound, atol=bound)
    assert not_compiled() == ""
