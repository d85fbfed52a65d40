"""The networks that people choose for phones: each pre-trains two steps as `fastssl pretrain` makes them, and is exported.

Each in a process of its own: what crashes there, as MobileOne and FastViT did, fails its test and leaves the others alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from children import in_child
from runs import finished_run

from fastssl.evaluate.trained import load_trained
from fastssl.export import export_backbone

#: timm's names, by family; at 32 px
NETWORKS = ["mobilenetv2_050", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100", "mobilenetv3_small_050", "mobilenetv4_conv_small", "mobilenetv4_conv_medium", "mobilenetv4_hybrid_medium", "efficientnet_b0", "efficientnet_lite0", "tf_efficientnetv2_b0", "efficientvit_b0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "mobilevit_xxs", "mobilevitv2_050", "edgenext_xx_small", "swiftformer_xs", "shvit_s1", "starnet_s1", "deit_tiny_patch16_224", "ghostnet_100", "ghostnetv3_100", "lcnet_050", "tinynet_e", "mnasnet_small", "mixnet_s", "fbnetc_100", "hardcorenas_a", "semnasnet_075", "resnet18", "resnet34", "resnet50", "regnetx_002", "regnety_002", "convnext_atto"]


def pretrain_and_export(name: str, size: int, folder: Path) -> None:
    run = finished_run(folder / "run", "few-photos", {"views.0.size": str(size)}, arch=name)
    student, teacher = (load_trained(run, which).backbone.state_dict() for which in ("student", "teacher"))
    assert all(bool(torch.isfinite(value).all()) for value in student.values())
    # They began as one: where they differ, the optimiser has been.
    assert sum(not torch.equal(student[key], teacher[key]) for key in student if student[key].dim() == 4) > 1
    assert export_backbone(load_trained(run), folder / "mine.safetensors").difference < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_it_trains_and_is_exported(name: str, tmp_path: Path) -> None:
    ended = in_child(pretrain_and_export, name, 32, tmp_path, seconds=300)
    assert (ended.status, ended.signal) == (0, None), ended.output
