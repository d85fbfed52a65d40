"""The networks that people choose for phones: each pre-trains two steps by `TrainStep`, as `fastssl pretrain` does, and
is exported.

Each in a process of its own: what crashes there, as MobileOne and FastViT did, fails its test and leaves the others
alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from children import in_child
from runs import finished_run
from test_torchvision_names import with_statistics
from torch import nn

from fastssl.errors import FastSSLError
from fastssl.evaluate.trained import Trained, load_trained
from fastssl.models.backbones import create_backbone
from fastssl.weights import to_onnx
from fastssl.weights.export import export_backbone

#: timm's names; at 32 px
NETWORKS = (
    *("mobilenetv2_050", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100", "mobilenetv3_small_050"),
    *("mobilenetv4_conv_small", "mobilenetv4_conv_medium", "mobilenetv4_hybrid_medium"),
    *("efficientnet_b0", "efficientnet_lite0", "tf_efficientnetv2_b0", "mobileone_s0", "fastvit_t8", "repvit_m0_9"),
    *("ghostnet_100", "lcnet_050", "tinynet_e", "mnasnet_small", "mixnet_s", "fbnetc_100", "hardcorenas_a"),
    *("semnasnet_075", "mobilevit_xxs", "mobilevitv2_050", "edgenext_xx_small", "efficientvit_b0", "swiftformer_xs"),
    *("shvit_s1", "starnet_s1", "tiny_vit_5m_224", "deit_tiny_patch16_224", "convnext_atto"),
    *("resnet18", "resnet34", "resnet50", "regnetx_002", "regnety_002"),
)
#: in `make test`
QUICK = ("mobilenetv3_small_050", "resnet18")
SLOW = pytest.mark.slow


def pretrain_and_export(name: str, size: int, folder: Path) -> None:
    run = finished_run(
        folder / "run", "few-photos-moco", {"views.0.size": str(size), "probe.size": str(size)}, arch=name
    )
    trained = load_trained(run, "student")
    student, teacher = trained.backbone.state_dict(), load_trained(run, "teacher").backbone.state_dict()
    assert all(bool(torch.isfinite(value).all()) for value in student.values())
    # They began as one: where they differ, the optimiser has been.
    assert sum(not torch.equal(student[key], teacher[key]) for key in student if student[key].dim() >= 2) > 1
    assert export_backbone(trained, folder / "mine.safetensors").difference < 1e-5


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in NETWORKS])
def test_it_trains_and_is_exported(name: str, tmp_path: Path) -> None:
    ended = in_child(pretrain_and_export, name, 32, tmp_path, seconds=300)
    assert (ended.status, ended.signal) == (0, None), ended.output


def pretrain_at_a_size_that_fits(name: str, size: int, folder: Path) -> None:
    wanted = (
        rf"{name} cannot take pictures of 32 px; try --set views\.0\.size={size} --set probe\.size={size}, or "
        r"another network"
    )
    with pytest.raises(FastSSLError, match=wanted):
        pretrain_and_export(name, 32, folder)
    pretrain_and_export(name, size, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"), [("levit_128s", 224), ("efficientformerv2_s0", 224), ("pit_ti_224", 224), ("ghostnetv3_100", 64)]
)
def test_a_size_that_does_not_fit_is_one_line(name: str, size: int, tmp_path: Path) -> None:
    ended = in_child(pretrain_at_a_size_that_fits, name, size, tmp_path, seconds=300)
    assert (ended.status, ended.signal) == (0, None), ended.output


def export_fused(name: str, folder: Path) -> None:
    import onnx

    torch.manual_seed(0)
    backbone = with_statistics(create_backbone(name))
    trained = Trained(backbone, name, "student", 1, "mine")
    done = export_backbone(trained, folder / "mine.onnx", "onnx", size=64)
    assert done.fused and done.difference < 1e-3 and done.tensors < len(backbone.state_dict())
    convolutions = sum(node.op_type == "Conv" for node in onnx.load(str(folder / "mine.onnx")).graph.node)
    assert convolutions < sum(isinstance(layer, nn.Conv2d) for layer in backbone.modules())
    # The others keep the names that timm loads.
    kept = export_backbone(trained, folder / "mine.safetensors")
    assert not kept.fused and kept.tensors == len(backbone.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileone_s0", "fastvit_t8", "repvit_m0_9"])
def test_onnx_gets_the_fused_form(name: str, tmp_path: Path) -> None:
    ended = in_child(export_fused, name, tmp_path, seconds=300)
    assert (ended.status, ended.signal) == (0, None), ended.output


def test_a_network_that_timm_merges_wrongly_is_exported_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, merge = with_statistics(create_backbone("repvit_m0_9")), to_onnx.reparameterize_model
    assert to_onnx.fused(backbone, size=32) is not None
    assert to_onnx.fused(create_backbone("lcnet_035").eval(), size=32) is None  # nothing to merge

    def wrong(network: nn.Module) -> nn.Module:
        merged = merge(network)
        next(layer for layer in merged.modules() if isinstance(layer, nn.Conv2d)).weight.data.mul_(1.1)
        return merged

    monkeypatch.setattr(to_onnx, "reparameterize_model", wrong)
    assert to_onnx.fused(backbone, size=32) is None
