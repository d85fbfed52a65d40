"""A backbone with a new linear layer on it, and the file that such a network goes into."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.evaluate.features import ProbeError
from fastssl.models.backbones import create_backbone, feature_dim, resolve_arch
from fastssl.models.heads import at_least_float32
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils.atomic_files import write_atomically


class Classifier(nn.Module):
    """Backbone, layers kept of a head, and a new linear layer: images (N, 3, S, S) -> logits (N, C), at least float32.

    The last layer is never computed in bfloat16: its 8 bits would make ties among a thousand classes.

    Args:
        backbone: images -> (N, F).
        classes: C.
        head: (N, F) -> (N, H) and H; None: the linear layer reads the feature itself.
        seed: of the linear layer's first weights (torch's default for such layers).
    """

    def __init__(self, backbone: nn.Module, classes: int, head: tuple[nn.Module, int] | None = None, *, seed: int = 0):
        super().__init__()
        self.backbone = backbone
        self.hidden, width = head if head is not None else (nn.Identity(), feature_dim(backbone))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = at_least_float32(self.hidden(self.backbone(images)))
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.linear(features)
        return logits


def timm_classifier_name(arch: str) -> str:
    """Where timm's network keeps the layer that ours calls ``linear``: ``classifier``, ``fc``, ``head``, ...

    Raises:
        ProbeError: it has none, or several.
    """
    name = getattr(create_backbone(arch), "default_cfg", {}).get("classifier")
    if not isinstance(name, str):
        raise ProbeError(
            f"{arch} has no single classifier in timm ({name}): a fine-tuned network of this kind cannot be written"
        )
    return name


def save_classifier(network: Classifier, path: Path, *, arch: str, classes: list[str], view: ViewSpec) -> None:
    """Write the network as timm's own: ``timm.create_model(arch, num_classes=C, checkpoint_path=path)`` reads it,
    without fastssl.

    Args:
        network: without hidden layers of a head, which timm's network has no place for.
        path: ends in ``.safetensors``. Whole or absent; an older file stays until the new one is whole.
        arch: short name or timm's.
        classes: names of the C outputs.
        view: what the network wants to see; with ``classes`` and ``arch`` in the file's metadata, as JSON under
            ``fastssl-classifier``.

    Raises:
        ProbeError: a network that timm has no place for, or a file that cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not isinstance(network.hidden, nn.Identity):
        raise ProbeError(
            f"{path}: a network with hidden layers of a DINO head is none that timm could read; fine-tune with "
            "--head linear"
        )
    name = timm_classifier_name(arch)
    tensors = {
        **network.backbone.state_dict(),
        f"{name}.weight": network.linear.weight,
        f"{name}.bias": network.linear.bias,
    }
    about = {
        "arch": resolve_arch(arch, tags=True),
        "classes": classes,
        "size": view.size,
        "crop": view.center,
        "interpolation": view.interpolation,
        "mean": view.mean,
        "std": view.std,
    }
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        write_atomically(
            path,
            lambda temporary: save_file(
                plain, str(temporary), {"format": "pt", "fastssl-classifier": json.dumps(about)}
            ),
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ProbeError(f"{path}: not written ({' '.join(str(error).split())[:200]})") from error


def is_classifier(path: Path) -> bool:
    """Whether ``save_classifier`` wrote this file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return "fastssl-classifier" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
