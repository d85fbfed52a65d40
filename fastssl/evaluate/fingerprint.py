"""Which weights these are, in eight characters: file names and steps say little of a network that was copied or trained again."""

from __future__ import annotations

import zlib

import torch
from torch import nn


@torch.no_grad()
def weights_fingerprint(network: nn.Module) -> str:
    """CRC-32 over names and bytes of all tensors, as eight hexadecimal digits: alike for alike networks, wherever they lie and however their maps are laid out."""
    found = 0
    for name, tensor in sorted(network.state_dict().items()):
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), found)
    return f"{found:08x}"
