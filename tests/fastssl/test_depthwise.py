"""The gradient of depth-wise filters on a CPU: against torch's own in float64, over shapes, strides, threads and whole
networks.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from fastssl.models import depthwise
from fastssl.models.depthwise import is_taken, use_own_gradient, weight_gradient


def reference(maps: torch.Tensor, gradient: torch.Tensor, side: int, stride: int, padding: int) -> torch.Tensor:
    """Torch's own, in float64."""
    weight = torch.zeros(maps.shape[1], 1, side, side, dtype=torch.float64, requires_grad=True)
    out = functional.conv2d(maps.double(), weight, None, stride, padding, groups=maps.shape[1])
    return torch.autograd.grad(out, weight, gradient.double())[0]


def random_layer(channels: int, side: int, stride: int, size: int, padding: int, batch: int = 5):
    generator = torch.Generator().manual_seed(channels * side + size)
    maps = torch.randn(batch, channels, size, size + 1, generator=generator)
    out = functional.conv2d(maps, torch.zeros(channels, 1, side, side), None, stride, padding, groups=channels)
    return maps, torch.randn(out.shape, generator=generator)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("channels", "side", "stride", "size", "padding"),
    [
        (1, 5, 1, 1, 2),
        (7, 5, 2, 3, 2),
        (64, 5, 1, 2, 2),
        (65, 5, 2, 9, 2),
        (130, 3, 1, 2, 1),
        (3, 7, 2, 12, 3),
        (8, 5, 1, 9, 0),
        (4, 3, 3, 7, 2),
    ],
)
def test_equals_torch_in_float64(channels, side, stride, size, padding, layout):
    maps, gradient = random_layer(channels, side, stride, size, padding)
    found = weight_gradient(
        maps.contiguous(memory_format=layout), gradient.contiguous(memory_format=layout), side, stride, padding
    )
    expected = reference(maps, gradient, side, stride, padding)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-6 * gradient[0].numel() ** 0.5


def test_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr(depthwise, "_WORTH_THREADS", 0)
    maps, gradient = random_layer(200, 5, 1, 6, 2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(weight_gradient(maps, gradient, 5, 1, 2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_which_layers_are_taken():
    def conv(**changes):
        return nn.Conv2d(
            **{"in_channels": 8, "out_channels": 8, "kernel_size": 5, "groups": 8, "padding": 2, **changes}
        )

    assert is_taken(conv()) and is_taken(conv(stride=2, bias=False)) and is_taken(conv(kernel_size=3, padding=1))
    for other in (
        conv(groups=1),
        conv(groups=4),
        conv(out_channels=16),
        conv(kernel_size=1, padding=0),
        conv(kernel_size=(5, 3)),
        conv(stride=(1, 2)),
        conv(padding="same"),
        conv(dilation=2),
        conv(padding_mode="reflect"),
        nn.ConvTranspose2d(8, 8, 5, groups=8),
    ):
        assert not is_taken(other)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "tf_efficientnet_lite0"])
def test_a_network_is_as_near_to_float64_as_with_torchs_own_gradient(name):
    torch.manual_seed(0)
    exact = timm.create_model(name, num_classes=0).train().to(memory_format=torch.channels_last).double()
    plain, own = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    assert use_own_gradient(own) > 0
    own = copy.deepcopy(own)  # as the teacher is made
    assert list(own.state_dict()) == list(plain.state_dict())
    images = torch.randn(4, 3, 48, 48).contiguous(memory_format=torch.channels_last)
    outputs = [network(images.to(next(network.parameters()).dtype)) for network in (exact, plain, own)]
    assert torch.equal(outputs[1], outputs[2])  # the forward pass is torch's
    for output in outputs:
        output.square().mean().backward()
    of_torch, of_ours, size = torch.zeros(3, len(list(exact.parameters())), dtype=torch.float64)
    for number, parameters in enumerate(zip(exact.parameters(), plain.parameters(), own.parameters())):
        truth, first, second = (parameter.grad.double() for parameter in parameters)
        of_torch[number], of_ours[number], size[number] = (first - truth).norm(), (second - truth).norm(), truth.norm()
    assert of_ours.norm() <= 2 * of_torch.norm() + 1e-6 * size.norm()


def test_the_kernel_is_used_where_it_helps_and_nowhere_else(monkeypatch):
    calls = []
    monkeypatch.setattr(depthwise, "weight_gradient", lambda *a: calls.append(a[2]) or weight_gradient(*a))

    def backward(side: int, size: int, **options) -> int:
        layer = nn.Conv2d(4, 4, side, padding=side // 2, groups=4)
        use_own_gradient(layer)
        images = torch.randn(2, 4, size, size, requires_grad=True)
        calls.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.get("amp", False)):
            out = layer(images)
        out.sum().backward()
        # by hand: the bias's gradient counts the places, the maps' one sums the filter
        assert torch.allclose(layer.bias.grad, torch.full((4,), 2.0 * size * size), rtol=1e-2)
        assert images.grad is not None and layer.weight.grad.abs().sum() > 0
        return len(calls)

    assert backward(5, 9) == 1 and backward(3, 2) == 1
    assert backward(3, 9) == 0 and backward(5, 9, amp=True) == 0
    layer = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    use_own_gradient(layer)
    with torch.no_grad():
        assert layer(torch.randn(1, 4, 6, 6)).grad_fn is None
    layer.weight.requires_grad_(False)
    images = torch.randn(1, 4, 6, 6, requires_grad=True)
    layer(images).sum().backward()
    assert images.grad is not None and not calls


def test_a_training_step_on_a_cpu_uses_it():
    from fastssl.config.recipe import load_recipe
    from fastssl.training.step import TrainStep

    step = TrainStep(load_recipe("few-photos", {"train.batch_size": "8"}), torch.device("cpu"), amp=False, seed=0)
    layers = [layer for layer in step.method.student.modules() if is_taken(layer)]
    assert layers and all(isinstance(layer._conv_forward, depthwise._Forward) for layer in layers)


def test_compiled_code_has_torchs_own_convolution(monkeypatch):
    """A call of ours in the middle of a layer would cut the compiled network into pieces."""
    monkeypatch.setattr(depthwise, "weight_gradient", lambda *a: pytest.fail("not in compiled code"))
    layer = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    use_own_gradient(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    compiled(torch.randn(2, 4, 6, 6)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
