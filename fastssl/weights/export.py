"""A backbone in the forms in which other programs take it. One module for each; the table of torchvision's names is
``fastssl.weights.importing``'s.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastssl._version import __version__
from fastssl.errors import FastSSLError
from fastssl.evaluate.features import EVALUATION_CROP, EVALUATION_SIZE
from fastssl.evaluate.trained import Trained

#: format -> endings of the files that it writes; "" is a folder
ENDINGS: dict[str, tuple[str, ...]] = {
    "timm": (".safetensors", ".pth", ".pt", ""),
    "torchvision": (".pth", ".pt", ".safetensors"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
}
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

    Networks that train with several branches and run with one (MobileOne, FastViT, RepViT, ...) go into ``onnx`` in the
    form that runs. The other formats keep the form that trains: its names are those that ``timm.create_model`` takes,
    its branches those that fine-tuning needs, and ``timm.utils.reparameterize_model`` merges them in one call when that
    is done.

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
    from fastssl.weights.staging import require_replaceable, staged

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
    merged = None
    if format == "torchvision":
        from fastssl.weights.to_torchvision import twin_of

        twin_of(arch)  # before anything is written
    require_replaceable(Path(os.path.abspath(destination)))
    with staged(Path(os.path.abspath(destination))) as place:
        if format == "timm" and suffix:
            from fastssl.weights.to_timm import write_file

            difference = write_file(backbone, arch, place, about)
            recipe = f"net = timm.create_model({arch!r}, num_classes=0, checkpoint_path={str(destination)!r})"
        elif format == "timm":
            from fastssl.weights.to_timm import write_folder

            difference = write_folder(backbone, arch, place, about, size=side, crop=trained.crop or EVALUATION_CROP)
            recipe = f"net = timm.create_model({f'local-dir:{destination}'!r}, pretrained=True)"
        elif format == "torchvision":
            from fastssl.weights.to_torchvision import twin_of, write_file

            difference = write_file(backbone, arch, place, about)
            load = (
                "safetensors.torch.load_file({})" if suffix == ".safetensors" else "torch.load({}, weights_only=True)"
            )
            recipe = f"{twin_of(arch).recipe}; net.load_state_dict({load.format(repr(str(destination)))})"
        elif format == "safetensors":
            from fastssl.weights.to_safetensors import write_file

            difference = write_file(backbone, place, about)
            recipe = f"tensors = safetensors.torch.load_file({str(destination)!r})"
        else:
            from fastssl.weights.fuse import fused
            from fastssl.weights.to_onnx import write_file

            merged = fused(backbone, size=side)
            difference = write_file(backbone, arch, place, about, size=side, merged=merged)
            recipe = (
                f"features = onnxruntime.InferenceSession({str(destination)!r}).run(['features'], {{'images': "
                f"images}})[0]"
            )
        files = list(place.iterdir()) if place.is_dir() else [place]
        written = sum(file.stat().st_size for file in files)
    tensors = len((merged or backbone).state_dict())
    return Exported(format, destination, tensors, written, difference, recipe, fused=merged is not None)


def _about(trained: Trained) -> dict[str, str]:
    """What the file says of itself, as far as its format has a place for that."""
    from fastssl.weights.staging import SIGNATURE

    origin = "that others trained" if trained.network == "imported" else "pre-trained without labels"
    said: dict[str, Any] = {"description": f"backbone {origin}, {SIGNATURE} {__version__}", **trained.record()}
    return {name: str(value) for name, value in said.items() if value is not None}
