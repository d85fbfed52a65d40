"""Backbones: the right feature, the right size, and a checkpoint that loads strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastssl
from fastssl.backbones import SHORT_NAMES, create_backbone, feature_dim, save_backbone
from fastssl.pipelines.errors import FastSSLError

#: short name -> (feature width, parameters without the classifier), as the papers count them
EXPECTED = {
    "mobilenetv3_large": (1280, 4_202_032),
    "efficientnet_b0": (1280, 4_007_548),
    "efficientnet_b1": (1280, 6_513_184),
    "mobilenetv2": (1280, 2_223_872),
    "resnet18": (512, 11_176_512),
    "resnet34": (512, 21_284_672),
    "resnet50": (2048, 23_508_032),
    "vit_tiny": (192, 5_524_416),
}


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_width_parameters_and_layout(name: str) -> None:
    width, parameters = EXPECTED[name]
    backbone = create_backbone(name).eval()
    assert feature_dim(backbone) == width
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    with torch.no_grad():
        features = backbone(torch.zeros(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert features.shape == (2, width)  # for MobileNet-V3 the 1280-wide input of the classifier, not the 960 pooled channels
    for parameter in backbone.parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)


def test_timm_names_work_and_wrong_names_get_a_hint() -> None:
    assert feature_dim(create_backbone("mobilenetv3_small_100")) == 1024
    with pytest.raises(FastSSLError, match="mobilenetv3_large"):
        create_backbone("mobilnetv3_large")


def test_saved_backbone_loads_as_a_timm_module(tmp_path: Path) -> None:
    backbone = create_backbone("mobilenetv3_large")
    backbone(torch.randn(4, 3, 32, 32))  # moves the BatchNorm statistics, which must be stored too
    save_backbone(backbone, tmp_path / "last.safetensors", arch="mobilenetv3_large")
    images = torch.randn(2, 3, 32, 32)
    loaded = fastssl.load_backbone(tmp_path / "last.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), backbone.eval()(images))
    assert not (tmp_path / "last.safetensors.tmp").exists()


def test_a_wrong_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    with pytest.raises(FastSSLError, match="no such checkpoint"):
        fastssl.load_backbone(path)
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(FastSSLError, match="not a whole safetensors file"):
        fastssl.load_backbone(path)
    save_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(FastSSLError, match="no fastssl header"):
        fastssl.load_backbone(path)
    save_backbone(create_backbone("resnet18"), path, arch="resnet18")
    tensors = load_file(str(path))
    tensors.pop("conv1.weight")
    save_file(tensors, str(path), metadata={"format": "pt", "fastssl": '{"arch": "resnet18"}'})
    with pytest.raises(FastSSLError, match=r"conv1\.weight"):
        fastssl.load_backbone(path)
