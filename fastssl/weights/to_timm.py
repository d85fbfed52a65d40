"""``--format timm``: a bare state dict, or a folder in the style of the Hugging Face hub.

The file is read by ``timm.create_model(name, num_classes=0, checkpoint_path=FILE)``, or with ``pretrained=True,
pretrained_cfg_overlay=dict(file=FILE, custom_load=False)``. (timm's ViT entries say ``custom_load=True``, which expects
an .npz file.) The folder is read by ``timm.create_model("local-dir:FOLDER", pretrained=True)``, and is what
``timm.create_model("hf-hub:USER/NAME", pretrained=True)`` expects when it is uploaded.
"""

from __future__ import annotations

from pathlib import Path

import timm
from torch import nn

from fastssl.models.backbones import resizes_positions
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.weights.check import check_features, check_names
from fastssl.weights.staging import save_tensors

#: Of timm's entry for the architecture: what is said there about weights that others trained.
_OF_OTHER_WEIGHTS = (
    "tag",
    "license",
    "description",
    "origin_url",
    "paper_name",
    "paper_ids",
    "notes",
    "label_names",
    "label_descriptions",
    "label_offset",
    "test_input_size",
    "test_crop_pct",
    "test_pool_size",
)


def write_file(backbone: nn.Module, arch: str, path: Path, about: dict[str, str]) -> float:
    """Write the state dict to ``path`` (.safetensors, .pth or .pt) and load it back as users will; returns the largest
    difference of features.
    """
    plain = timm.create_model(arch, num_classes=0)
    tensors = backbone.state_dict()
    check_names(path, tensors, plain.state_dict(), f"timm's {arch}")
    save_tensors(tensors, path, about)
    loaded = timm.create_model(arch, pretrained=False, num_classes=0, checkpoint_path=str(path))
    return check_features(path, backbone, loaded.eval(), size=_check_size(loaded), tolerance=1e-5)


def write_folder(backbone: nn.Module, arch: str, path: Path, about: dict[str, str], *, size: int, crop: float) -> float:
    """Write ``path/config.json``, by timm itself, and ``path/model.safetensors``; returns the largest difference of
    features.

    The configuration says how pictures are prepared, so that ``timm.data.resolve_model_data_config`` gives the
    transform with which ``fastssl evaluate`` judges: bilinear, a centre crop, and the mean and deviation of the views
    that the network was trained on.

    Args:
        size, crop: side of the pictures, and the centre crop's share of the short side, for the configuration.
    """
    view = ViewSpec()
    prepared = {
        "input_size": (3, size, size),
        "interpolation": view.interpolation,
        "crop_pct": crop,
        "crop_mode": "center",
        "mean": view.mean,
        "std": view.std,
        "custom_load": False,
    }
    options = {"dynamic_img_size": True} if resizes_positions(arch) else {}
    if options:
        prepared["fixed_input_size"] = False
    overlay = {**dict.fromkeys(_OF_OTHER_WEIGHTS), **prepared}
    described = timm.create_model(arch, num_classes=0, pretrained_cfg_overlay=overlay, **options)
    tensors = backbone.state_dict()
    check_names(path, tensors, described.state_dict(), f"timm's {arch}")
    described.load_state_dict(tensors, strict=True)
    timm.models.save_for_hf(described, path, model_args=options, safe_serialization=True)
    save_tensors(
        tensors, path / "model.safetensors", about
    )  # timm leaves out the header that says what the tensors are
    loaded = timm.create_model(arch, num_classes=0, checkpoint_path=str(path / "model.safetensors"), **options)
    return check_features(path, backbone, loaded.eval(), size=64 if options else _check_size(loaded), tolerance=1e-5)


def _check_size(network: nn.Module) -> int:
    """Convolutions take anything; networks that do not say their size."""
    config = network.pretrained_cfg
    return config["input_size"][1] if config.get("fixed_input_size") else 64
