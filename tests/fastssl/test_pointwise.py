"""1x1 convolutions by matrix products: against torch's convolution, which layers are taken, a whole network against
float64.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from fastssl.models.pointwise import is_taken, pointwise, use_matrix_products


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 7, 3, 4), (2, 32, 1, 1), (1, 3, 9, 2)])
def test_equals_torchs_convolution_in_float64(shape, bias, layout):
    generator = torch.Generator().manual_seed(sum(shape))
    maps = (
        torch.randn(shape, generator=generator, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    )
    weight = torch.randn(6, shape[1], 1, 1, generator=generator, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True) if bias else None
    inputs = [tensor for tensor in (maps, weight, offset) if tensor is not None]
    ours, theirs = pointwise(maps, weight, offset), functional.conv2d(maps, weight, offset)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, theirs)
    gradient = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(torch.autograd.grad(ours, inputs, gradient), torch.autograd.grad(theirs, inputs, gradient)):
        torch.testing.assert_close(one, other)


def test_which_layers_are_taken():
    def conv(**changes):
        return nn.Conv2d(**{"in_channels": 32, "out_channels": 64, "kernel_size": 1, **changes})

    assert is_taken(conv()) and is_taken(conv(bias=False)) and is_taken(conv(padding="same"))
    for other in (
        conv(in_channels=31),
        conv(out_channels=31),
        conv(kernel_size=3, padding=1),
        conv(kernel_size=(1, 3)),
        conv(stride=2),
        conv(groups=32),
        conv(padding=1),
        nn.ConvTranspose2d(32, 64, 1),
    ):
        assert not is_taken(other)


def test_a_network_is_as_near_to_float64_as_with_torchs_convolutions():
    torch.manual_seed(0)
    exact = (
        timm.create_model("mobilenetv3_small_100", num_classes=0).train().to(memory_format=torch.channels_last).double()
    )
    plain, own = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    assert use_matrix_products(own) > 0
    own = copy.deepcopy(own)  # as the teacher is made
    assert list(own.state_dict()) == list(plain.state_dict())
    images = torch.randn(8, 3, 48, 48).contiguous(memory_format=torch.channels_last)
    outputs = [network(images.to(next(network.parameters()).dtype)) for network in (exact, plain, own)]
    for output in outputs:
        output.square().mean().backward()

    def error(found: nn.Module) -> torch.Tensor:
        return torch.stack([(a.grad - b.grad).norm() for a, b in zip(found.parameters(), exact.parameters())]).norm()

    assert (outputs[2] - outputs[0]).norm() <= 2 * (outputs[1] - outputs[0]).norm()
    assert error(own) <= 2 * error(plain)


def test_a_training_step_on_a_cpu_uses_it():
    from fastssl.config.recipe import load_recipe
    from fastssl.training.step import TrainStep

    step = TrainStep(load_recipe("few-photos", {"train.batch_size": "8"}), torch.device("cpu"), amp=False, seed=0)
    layers = [layer for layer in step.method.student.modules() if is_taken(layer)]
    assert layers and all(layer._conv_forward is pointwise for layer in layers)


def test_it_can_be_compiled_whole():
    layer = nn.Conv2d(32, 32, 1)
    use_matrix_products(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(torch.randn(2, 32, 6, 6)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((32,), 72.0))
