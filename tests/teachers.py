"""A small trained network in a file, as a teacher of distillations in tests."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from test_torchvision_names import with_statistics

from fastssl.models.backbones import create_backbone, save_backbone


@functools.cache
def teacher_file(arch: str = "resnet10t", *, broken: bool = False) -> Path:
    """Another normalisation than ImageNet's, and BatchNorm statistics that are not those of a fresh network."""
    path = Path(tempfile.mkdtemp()) / f"{arch}.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = with_statistics(create_backbone(arch))
    if broken:
        next(network.parameters()).data.fill_(float("nan"))
    save_backbone(network, path, arch=arch, network="imported", mean=[0.5] * 3, std=[0.5] * 3)
    return path
