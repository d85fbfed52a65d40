"""A backbone in the forms in which other programs take it.

timm          a state dict under timm's names: timm.create_model(name, num_classes=0, checkpoint_path=FILE);
              or a folder in the style of the Hugging Face hub
torchvision   a state dict under torchvision's names, which gives the same features there
safetensors   timm's names, for programs that build the network themselves
onnx          one file with graph and weights, see to_onnx.py
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fastssl._version import __version__
from fastssl.errors import FastSSLError
from fastssl.evaluate.features import EVALUATION_CROP, EVALUATION_SIZE
from fastssl.evaluate.trained import Trained
from fastssl.models.backbones import resizes_positions
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.weights.check import check_features, check_names
from fastssl.weights.staging import SIGNATURE, require_replaceable, save_tensors, staged
from fastssl.weights.to_onnx import fused, write_onnx
from fastssl.weights.torchvision_names import to_torchvision, twin_of

#: format -> endings of the files that it writes; "" is a folder
ENDINGS: dict[str, tuple[str, ...]] = {
    "timm": (".safetensors", ".pth", ".pt", ""),
    "torchvision": (".pth", ".pt", ".safetensors"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
}
#: Of timm's entry for an architecture: what is said there about weights that others trained.
_OF_OTHER_WEIGHTS = (
    *("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes"),
    *("label_names", "label_descriptions", "label_offset", "test_input_size", "test_crop_pct", "test_pool_size"),
)
#: endings that people give to weights: a DST with one of them is not meant to be a folder
_KNOWN = (".safetensors", ".pth", ".pt", ".onnx", ".bin", ".ckpt", ".tar", ".npz")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        format: ``timm``, ``torchvision``, ``safetensors`` or ``onnx``.
        path: the file or folder.
        tensors: how many.
        size_bytes: of the file, or of the folder's files.
        difference: the largest one found between the backbone's features and those of the export, right after it was
            written, as a share of how far features are from their mean.
        recipe: a line of Python that uses it.
        fused: whether parallel branches and BatchNorms were merged, as ``onnx`` does in networks made for that.
    """

    format: str
    path: Path
    tensors: int
    size_bytes: int
    difference: float
    recipe: str
    fused: bool = False


def export_backbone(trained: Trained, destination: Path, format: str = "timm", *, size: int | None = None) -> Exported:
    """Write the backbone to ``destination``, which is whole or as it was before, and compare its features with the
    backbone's.

    Networks that train with several branches and run with one go into ``onnx`` in the form that runs (``fused``), into
    the other formats in the form that trains, which ``timm.create_model`` takes.

    Args:
        trained: as ``load_trained`` gives it; on the CPU, in evaluation mode.
        destination: ends as ``ENDINGS[format]`` says; an earlier export of the same kind is replaced, see
            ``require_replaceable``.
        format: a key of ``ENDINGS``.
        size: side of the pictures, for ``onnx`` and for a folder of ``timm``; None: as the run was probed, or 224.

    Raises:
        FastSSLError: another ending, a network that the format does not know, something there that is no export, or
            features that differ.
    """
    suffix = destination.suffix if destination.suffix in _KNOWN and not destination.is_dir() else ""
    if suffix not in ENDINGS[format]:
        fitting = [name for name, endings in ENDINGS.items() if suffix and suffix in endings]
        other = f"; or give --format {' or '.join(fitting)}" if fitting else ""
        wanted = [ending for ending in ENDINGS[format] if ending]
        folder = ", or is a folder" if "" in ENDINGS[format] else ""
        raise FastSSLError(
            f"{destination}: --format {format} writes a file that ends in {' or '.join(wanted)}{folder}{other}"
        )
    if size is not None and not (format == "onnx" or (format == "timm" and suffix == "")):
        raise FastSSLError(
            f"{destination}: --size is for --format onnx and for a folder of --format timm; this export takes "
            "pictures of any size"
        )
    # Plain layout, as the networks have it that will take the tensors; the caller's network is left as it is.
    backbone, arch = copy.deepcopy(trained.backbone).to(memory_format=torch.contiguous_format), trained.arch
    about, side = _about(trained), size or trained.size or EVALUATION_SIZE
    if format == "torchvision":
        twin_of(arch)  # before anything is written
    final, merged = Path(os.path.abspath(destination)), None
    require_replaceable(final)
    with staged(final) as place:
        if format == "onnx":
            merged = fused(backbone, size=side)
            difference = write_onnx(backbone, arch, place, about, size=side, merged=merged)
            session = f"onnxruntime.InferenceSession({str(destination)!r})"
            recipe = f"features = {session}.run(['features'], {{'images': images}})[0]"
        elif suffix == "":
            crop = trained.crop or EVALUATION_CROP
            difference = _write_folder(backbone, arch, place, about, size=side, crop=crop)
            recipe = f"net = timm.create_model({f'local-dir:{destination}'!r}, pretrained=True)"
        else:
            tensors = to_torchvision(arch, backbone) if format == "torchvision" else backbone.state_dict()
            difference = _write_file(backbone, tensors, place, about, *_taker(format, arch))
            loading = f"safetensors.torch.load_file({str(destination)!r})"
            if format == "timm":
                recipe = f"net = timm.create_model({arch!r}, num_classes=0, checkpoint_path={str(destination)!r})"
            elif format == "safetensors":
                recipe = f"tensors = {loading}"
            else:
                if suffix != ".safetensors":
                    loading = f"torch.load({str(destination)!r}, weights_only=True)"
                recipe = f"{twin_of(arch).recipe}; net.load_state_dict({loading})"
        files = list(place.iterdir()) if place.is_dir() else [place]
        written = sum(file.stat().st_size for file in files)
    count = len((merged or backbone).state_dict())
    return Exported(format, destination, count, written, difference, recipe, fused=merged is not None)


def _taker(format: str, arch: str) -> tuple[nn.Module, str]:
    """The network that users will load a file into, freshly initialised, and its name for messages."""
    if format == "torchvision":
        twin = twin_of(arch)
        return twin.build(), f"torchvision's {twin.builder}"
    return timm.create_model(arch, num_classes=0), f"timm's {arch}"


def _write_file(
    backbone: nn.Module, tensors: dict[str, Tensor], path: Path, about: dict[str, str], taker: nn.Module, name: str
) -> float:
    """Write ``tensors`` to ``path`` (.safetensors, .pth or .pt) and load them back as users will; returns the largest
    difference of features.
    """
    check_names(path, tensors, taker.state_dict(), name)
    save_tensors(tensors, path, about)
    timm.models.load_checkpoint(taker, str(path), strict=True)
    return check_features(path, backbone, taker.eval(), size=_check_size(taker), tolerance=1e-5)


def _write_folder(
    backbone: nn.Module,
    arch: str,
    path: Path,
    about: dict[str, str],
    *,
    size: int,
    crop: float,
) -> float:
    """Write ``path/config.json``, by timm itself, and ``path/model.safetensors``; returns the largest difference of
    features.

    The configuration says how pictures are prepared, so that ``timm.data.resolve_model_data_config`` gives the
    transform with which ``fastssl evaluate`` judges.

    Args:
        size, crop: side of the pictures, and the centre crop's share of the short side, for the configuration.
    """
    view = ViewSpec()
    overlay = {
        **dict.fromkeys(_OF_OTHER_WEIGHTS),
        "input_size": (3, size, size),
        "interpolation": view.interpolation,
        "crop_pct": crop,
        "crop_mode": "center",
        "mean": view.mean,
        "std": view.std,
        "custom_load": False,  # timm's ViT entries say True, which expects an .npz file
    }
    options: dict[str, Any] = {}
    if resizes_positions(arch):
        options, overlay["fixed_input_size"] = {"dynamic_img_size": True}, False
    described = timm.create_model(arch, num_classes=0, pretrained_cfg_overlay=overlay, **options)
    timm.models.save_for_hf(described, str(path), model_args=options, safe_serialization=True)
    # Over timm's file, which has no header that says what the tensors are.
    tensors = backbone.state_dict()
    difference = _write_file(backbone, tensors, path / "model.safetensors", about, *_taker("timm", arch))
    described.load_state_dict(tensors, strict=True)
    return difference


def _check_size(network: nn.Module) -> int:
    """Convolutions take anything; networks that do not say their size."""
    config = getattr(network, "pretrained_cfg", {})
    return config["input_size"][1] if config.get("fixed_input_size") else 64


def _about(trained: Trained) -> dict[str, str]:
    """What the file says of itself, as far as its format has a place for that."""
    origin = "that others trained" if trained.network == "imported" else "pre-trained without labels"
    said: dict[str, Any] = {"description": f"backbone {origin}, {SIGNATURE} {__version__}", **trained.record()}
    return {name: str(value) for name, value in said.items() if value is not None}
