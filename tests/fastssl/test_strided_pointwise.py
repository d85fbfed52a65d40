"""A 1x1 convolution with a stride: the same features and gradients as torch's, and no crash where torch's own has
one.
"""

from __future__ import annotations

import pytest
import torch
from children import in_child
from torch import nn

from fastssl.models.pointwise import StridedPointwise, guard_strided_pointwise


def compare(channels: int, stride: int, size: int) -> None:
    """In channels-last memory against torch's in plain layout, which has no fault."""
    torch.manual_seed(0)
    ours = nn.Conv2d(channels, 10, 1, stride, bias=channels != 3).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(channels, 10, 1, stride, bias=channels != 3)
    plain.load_state_dict(ours.state_dict())
    weight = ours.weight
    assert guard_strided_pointwise(nn.Sequential(ours)) == 1
    assert type(ours) is StridedPointwise and ours.weight is weight
    images = torch.randn(4, channels, size, size)
    first = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    second = images.clone().requires_grad_()
    found, wanted = ours(first), plain(second)
    torch.testing.assert_close(found, wanted)
    assert found.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(wanted)
    found.backward(upstream)
    wanted.backward(upstream)
    for mine, theirs in ((first, second), *zip(ours.parameters(), plain.parameters())):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "stride", "size"), [(3, 2, 32), (2, 2, 34), (7, 4, 32), (3, 3, 33), (3, 2, 33), (15, 2, 32)]
)
def test_features_and_gradients_are_torchs(channels: int, stride: int, size: int) -> None:
    ended = in_child(
        compare, channels, stride, size, seconds=120
    )  # without the guard most of these end in a segmentation fault
    assert (ended.status, ended.signal) == (0, None), ended.output


def test_only_such_layers_are_changed() -> None:
    layers = [
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.Conv2d(3, 8, 1, 2, padding=1),
        nn.Conv2d(6, 6, 1, 2, groups=6),
        nn.Conv2d(64, 128, 1, 2),
    ]
    network = nn.Sequential(*layers, nn.Conv2d(3, 8, 1, (1, 2)))
    assert guard_strided_pointwise(network) == 1
    assert [type(layer) for layer in network] == [nn.Conv2d] * 5 + [StridedPointwise]
    assert network[5](torch.zeros(1, 3, 4, 4)).shape == (1, 8, 4, 2)
