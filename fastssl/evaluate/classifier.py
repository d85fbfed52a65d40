"""A backbone with a new linear layer on it, and the file that such a network goes into.

Between the two may stand the first part of a DINO run's head, which SSLight's fine-tuning keeps (Tan et al., arXiv
2210.02808, and their public code): everything before the last linear layer of its MLP.

    Linear F-2048, BatchNorm, GELU, Linear 2048-2048, BatchNorm, GELU | Linear 2048-256, unit length, cosines: left out
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.config.recipe import Recipe, build_recipe
from fastssl.errors import FastSSLError
from fastssl.evaluate.features import ProbeError
from fastssl.evaluate.trained import checkpoints_of, load_part
from fastssl.methods.dino import DINOConfig, DINOHead
from fastssl.models.backbones import create_backbone, feature_dim, resolve_arch
from fastssl.models.heads import at_least_float32
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.runs.checkpoint import load_checkpoint
from fastssl.utils.atomic_files import write_atomically


class Classifier(nn.Module):
    """Backbone, layers kept of a head, and a new linear layer: images (N, 3, S, S) -> logits (N, C), at least float32.

    The last layer is never computed in bfloat16: its 8 bits would make ties among a thousand classes.

    Args:
        backbone: images -> (N, F). classes: C.
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
        ProbeError: a network without a single classifier in timm, or a file that cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    name = timm_classifier_name(arch)
    tensors = {**network.backbone.state_dict(), **network.linear.state_dict(prefix=f"{name}.")}
    seen = {"crop": view.center, **{name: getattr(view, name) for name in ("interpolation", "mean", "std")}}
    about = {"arch": resolve_arch(arch), "classes": classes, "size": view.size, **seen}
    notes = {"format": "pt", "fastssl-classifier": json.dumps(about)}
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    try:
        write_atomically(path, lambda temporary: save_file(plain, str(temporary), notes))
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


def run_file(checkpoint: str | Path) -> Path:
    """The ``last.pt`` of a run: heads are kept there alone.

    Args:
        checkpoint: a run's folder, its ``checkpoints/``, or the ``last.pt`` itself.

    Raises:
        FastSSLError: something else, or no such file.
    """
    path = Path(checkpoint)
    path = checkpoints_of(path) / "last.pt" if path.is_dir() else path
    if path.suffix != ".pt":
        raise FastSSLError(
            f"{path}: holds a backbone alone; the DINO head is in the run's last.pt: give that, or the run's folder"
        )
    if not path.is_file():
        raise FastSSLError(f"{path}: no such file; the DINO head is kept in a run's last.pt")
    return path


def load_half_head(path: Path, which: str = "student", *, fresh: bool = False) -> tuple[nn.Sequential, int]:
    """The hidden layers of a DINO head, features (N, F) -> (N, H), and H.

    Args:
        path: the ``last.pt`` of a DINO run.
        which: ``student`` or ``teacher``.
        fresh: the same layers with new weights, as the run itself began with (drawn from torch's global generator).

    Raises:
        FastSSLError: no DINO run, or a head without hidden layers, or tensors that do not fit what the run says of
            itself.
    """
    state = load_checkpoint(path)
    config = state["config"]
    if config.get("method") != "dino":
        raise FastSSLError(f"{path}: a run of {config.get('method')} has no DINO head; --head linear needs none")
    keys = [field.name for field in dataclasses.fields(Recipe)]
    recipe = build_recipe({key: config[key] for key in keys if key in config}, where=str(path))
    settings = recipe.settings
    assert isinstance(settings, DINOConfig)
    if settings.projector.layers < 2:
        raise FastSSLError(
            f"{path}: its DINO head has one linear layer, of which nothing is kept; --head linear does the same"
        )
    with torch.device("meta"):  # the width alone is wanted of it
        width = feature_dim(create_backbone(recipe.arch))
    head = DINOHead(width, settings)
    if not fresh and (unfit := load_part(head, state, f"{which}.projector.")):
        raise FastSSLError(f"{path}: the {which}'s head does not fit: {unfit}")
    layers = list(head.mlp)
    last = max(place for place, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    return nn.Sequential(*layers[:last]), settings.projector.hidden
