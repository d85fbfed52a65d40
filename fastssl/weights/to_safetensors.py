"""``--format safetensors``: the plain tensors under timm's names, for programs that build the network themselves."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fastssl.errors import FastSSLError
from fastssl.weights.staging import save_tensors


def write_file(backbone: nn.Module, path: Path, about: dict[str, str]) -> float:
    """Write the tensors to ``path`` and read them back with ``safetensors.torch.load_file``; returns the largest
    difference, which is 0.

    Raises:
        FastSSLError: what is read is not what was written.
    """
    from safetensors.torch import load_file

    tensors = backbone.state_dict()
    save_tensors(tensors, path, about)
    found = load_file(str(path))
    if found.keys() != tensors.keys() or not all(
        torch.equal(found[name], value.cpu()) for name, value in tensors.items()
    ):
        raise FastSSLError(f"{path}: other tensors were read than were written: is the disk damaged?")
    return 0.0
