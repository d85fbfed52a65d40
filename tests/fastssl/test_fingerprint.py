"""The fingerprint of weights: equal for equal ones, another for every change."""

from __future__ import annotations

import torch

from fastssl.evaluate.session import weights_fingerprint
from fastssl.models.backbones import create_backbone


def test_layout_does_not_matter_and_every_tensor_does() -> None:
    network = create_backbone("lcnet_035")
    found = weights_fingerprint(network)
    assert len(found) == 16 and found == weights_fingerprint(network.to(memory_format=torch.contiguous_format))
    network.bn1.running_mean[0] += 1  # no parameter, but of the network
    assert weights_fingerprint(network) != found
