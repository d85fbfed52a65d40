"""A backbone with a linear layer: its first weights, its precision, and the file that timm reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from tiny import TinyBackbone
from torch import nn

from fastssl.evaluate.classifier import Classifier, save_classifier, timm_classifier_name
from fastssl.evaluate.features import ProbeError
from fastssl.evaluate.finetune import FinetuneConfig
from fastssl.models.backbones import create_backbone

VIEW = FinetuneConfig(size=64, crop=1.0).test_view


def test_first_weights_are_of_the_seed_alone() -> None:
    backbone = TinyBackbone()
    before = torch.get_rng_state()
    first = Classifier(backbone, 4, seed=1).linear.weight
    assert torch.equal(before, torch.get_rng_state())
    torch.randn(3)
    assert torch.equal(first, Classifier(backbone, 4, seed=1).linear.weight)
    assert not torch.equal(first, Classifier(backbone, 4, seed=2).linear.weight)


def test_the_last_layer_is_never_bfloat16() -> None:
    network = Classifier(TinyBackbone(), 4, (nn.Linear(12, 8), 8))
    network.hidden.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    seen: list[torch.dtype] = []
    with torch.autocast("cpu", torch.bfloat16):
        assert network(torch.randn(2, 3, 9, 9)).dtype == torch.float32
    assert seen == [torch.bfloat16]
    assert network.double()(torch.randn(2, 3, 9, 9).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("arch", "name"),
    [("lcnet_035", "classifier"), ("resnet10t", "fc"), ("vit_tiny", "head"), ("mobilenetv3_large", "classifier")],
)
def test_timm_reads_the_file(arch: str, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Classifier(create_backbone(arch), 3).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    path = tmp_path / "hands.safetensors"
    save_classifier(network, path, arch=arch, classes=["a", "b", "c"], view=VIEW)
    assert timm_classifier_name(arch) == name
    with safe_open(str(path), framework="pt") as file:
        about = json.loads(file.metadata()["fastssl-classifier"])
    assert (about["classes"], about["size"], about["crop"], about["interpolation"]) == (
        ["a", "b", "c"],
        64,
        1.0,
        "bicubic",
    )
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    options = {"dynamic_img_size": True} if arch == "vit_tiny" else {}
    theirs = timm.create_model(about["arch"], num_classes=3, checkpoint_path=str(path), **options).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), network(images), rtol=1e-5, atol=1e-5)


def test_what_timm_has_no_place_for(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="no single classifier"):
        timm_classifier_name("deit_tiny_distilled_patch16_224")
    with pytest.raises(ProbeError, match="not written"):
        save_classifier(
            Classifier(create_backbone("lcnet_035"), 3),
            tmp_path / "no" / "a.safetensors",
            arch="lcnet_035",
            classes=["a"],
            view=VIEW,
        )
    assert not list(tmp_path.iterdir())
