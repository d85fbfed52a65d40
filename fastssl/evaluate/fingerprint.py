"""Which weights these are, in sixteen characters: file names and steps say little of a network that was copied or
trained again.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from fastssl.utils.digest import add_tensor


@torch.no_grad()
def weights_fingerprint(network: nn.Module) -> str:
    """Of names, types, shapes and values of all tensors, as 16 hexadecimal digits: alike for alike networks, on any
    device and in any memory layout.
    """
    total = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        total.update(f"{name} ".encode())
        add_tensor(total, value)
    return total.hexdigest()[:16]
