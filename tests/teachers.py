"""A small trained network in a file, as a teacher of distillations in tests."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import torch
from test_torchvision_names import with_statistics

from fastssl.models.backbones import create_backbone, save_backbone

_FOLDER = "FASTSSL_TEST_TEACHERS"


@functools.cache
def teacher_file(arch: str = "resnet10t", *, broken: bool = False) -> Path:
    """Another normalisation than ImageNet's, and BatchNorm statistics that are not those of a fresh network."""
    if _FOLDER not in os.environ:  # processes that this one starts find the same files
        os.environ[_FOLDER] = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, os.environ[_FOLDER], ignore_errors=True)
    path = Path(os.environ[_FOLDER]) / f"{arch}{'-broken' * broken}.safetensors"
    if path.is_file():
        return path
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = with_statistics(create_backbone(arch))
    if broken:
        next(network.parameters()).data.fill_(float("nan"))
    save_backbone(network, path, arch=arch, network="imported", mean=[0.5] * 3, std=[0.5] * 3)
    return path
