"""Backbones: timm networks under the short names that people use, without their classifier.

A backbone maps images (N, 3, S, S) to the F-wide vector that the classifier would read, as projectors and linear probes
do: for MobileNet-V3-Large 1280, after ``conv_head`` and its activation, not the 960 pooled channels before it.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fastssl.errors import FastSSLError
from fastssl.models.drop_path import drop_path_layers
from fastssl.models.initial import kaiming_init, zero_residual_branches
from fastssl.models.pointwise import guard_strided_pointwise
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.digest import digest
from fastssl.utils.suggest import nearest
from fastssl.utils.yaml_file import shown

#: short name -> timm name
SHORT_NAMES: dict[str, str] = {
    "mobilenetv3_large": "mobilenetv3_large_100",
    "mobilenetv3_small": "mobilenetv3_small_100",
    "mobilenetv4_small": "mobilenetv4_conv_small",
    "efficientnet_b0": "efficientnet_b0",
    "efficientnet_b1": "efficientnet_b1",
    "mobilenetv2": "mobilenetv2_100",
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "vit_tiny": "vit_tiny_patch16_224",
}

#: Side from which on pictures leave every network of timm without a fixed size some pixels, at a stride of 32.
_NOT_SMALL = 64


def resolve_arch(name: str) -> str:
    """The timm name of ``name`` (a short name or timm's own), with the tag of published weights
    (``mobilenetv3_large_100.ra_in1k``) where it has one.

    Raises:
        FastSSLError: no such network, or no such tag; the message names the nearest ones.
    """
    plain, dot, tag = name.partition(".")
    arch = SHORT_NAMES.get(plain, plain)
    if not timm.is_model(arch) or (dot and not tag):
        hint = nearest(name[:100], [*SHORT_NAMES, *timm.list_models()])
        raise FastSSLError(
            f"unknown network {shown(name)}{hint}; `fastssl archs` lists the short names, any timm name works too"
        )
    if dot and not timm.is_model_pretrained(f"{arch}.{tag}"):
        tags_of = [name.partition(".")[2] for name in timm.list_pretrained(f"{arch}.*")]
        raise FastSSLError(
            f"unknown tag {shown(tag)} of {plain}{nearest(tag[:100], tags_of)}; the plain network is {plain}"
        )
    return f"{arch}{dot}{tag}"


def plain_arch(name: str) -> str:
    """``resolve_arch`` without the tag: which network it is, whatever its weights."""
    return resolve_arch(name).partition(".")[0]


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def create_backbone(
    name: str,
    *,
    drop_path: float = 0.0,
    init: str = "timm",
    zero_init_residual: bool = False,
    say: Callable[[str], None] = _warn,
) -> nn.Module:
    """A randomly initialised backbone in channels-last layout.

    Args:
        name: short name or timm name.
        drop_path: stochastic depth rate of the deepest block, for networks that have it (0 elsewhere).
        init: ``timm``: as the network's definition there does; ``kaiming``: see ``kaiming_init``.
        zero_init_residual: see ``zero_residual_branches``.
        say: is told which of these changes nothing in this network, and why; by default a warning.

    Returns:
        a timm module; ``module(images (N, 3, S, S)) -> (N, F)``; ``feature_dim(module)`` is F. Vision transformers
        take any S that their patch size divides: the position embedding is interpolated.
    """
    arch = resolve_arch(name)
    options: dict[str, Any] = {"num_classes": 0}  # of any network's constructor
    if resizes_positions(arch):
        options["dynamic_img_size"] = True
    if drop_path > 0:
        options["drop_path_rate"] = drop_path
    try:
        backbone = timm.create_model(arch, pretrained=False, **options)
    except TypeError as error:  # its constructor does not know one of them
        if "drop_path_rate" in str(error):
            raise FastSSLError(f"{name} has no drop path: drop_path={drop_path} must be 0") from error
        raise FastSSLError(f"{name} cannot be built here: {error}") from error
    if drop_path > 0 and not drop_path_layers(backbone):
        say(f"drop_path={drop_path} changes nothing: {name} has no drop path")
    if init == "kaiming":
        kaiming_init(backbone)
    if zero_init_residual and getattr(backbone, "global_pool", "") == "token":
        # Silent blocks would leave the class token, which is what is read, the same for every photo.
        say(f"zero_init_residual is left out: {name} reads its feature from a class token")
        zero_init_residual = False
    if zero_init_residual:
        silenced, left = zero_residual_branches(backbone)
        if left:
            which = f"{left} of {silenced + left} residual branches of {name}"
            say(f"zero_init_residual leaves {which} as they are: how they end is not known here")
        elif not silenced:
            say(f"zero_init_residual changes nothing: {name} has no residual branches that are known here")
    guard_strided_pointwise(backbone)
    return backbone.to(memory_format=torch.channels_last)


def resizes_positions(arch: str) -> bool:
    """Whether it is made with ``dynamic_img_size``, without which timm's vision transformers take only one size."""
    return arch.startswith(("vit_", "deit"))


@torch.no_grad()
def of_one_size(backbone: nn.Module, size: int) -> nn.Module:
    """The same network for pictures of ``size`` alone, without the interpolation of its position embedding, which
    exported would run with every picture, and not everywhere can; itself where there is none. Raises whatever the
    network raises for a size that it does not take.
    """
    if not getattr(backbone, "dynamic_img_size", False):
        return backbone
    backbone(torch.zeros(1, 3, size, size))  # a size that its patches do not divide is refused; below it is cut
    resized = copy.deepcopy(backbone)
    resized.set_input_size(img_size=size)  # type: ignore[operator]
    fixed = timm.create_model(backbone.pretrained_cfg["architecture"], num_classes=0, img_size=size)  # type: ignore
    fixed.load_state_dict(resized.state_dict())
    return fixed.train(backbone.training)


@torch.no_grad()
def _takes(backbone: nn.Module, size: int) -> bool:
    """Whether a black picture of this size goes through the network, which is in evaluation mode."""
    try:
        backbone(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def require_sizes(backbone: nn.Module, name: str, sizes: Mapping[str, int]) -> None:
    """Refuse pictures of a size that ``backbone`` cannot compute.

    Tried where there is a doubt: in networks that timm lists with a fixed size, of which some take others too, and with
    pictures so small that a feature map may become empty.

    Args:
        backbone: on the CPU; left as it is.
        name: its name, for the message.
        sizes: sides of the pictures that it will see, by the key of the recipe that says so.

    Raises:
        FastSSLError: it does not take one of them; the message names sizes that were tried and are taken.
    """
    config, training = getattr(backbone, "pretrained_cfg", None) or {}, backbone.training
    fixed = config["input_size"][-1] if config.get("fixed_input_size") else None
    backbone.eval()
    try:
        doubtful = {size for size in sizes.values() if size != fixed and (fixed or size < _NOT_SMALL)}
        refused = {size for size in doubtful if not _takes(backbone, size)}
        if not refused:
            return

        def instead(size: int) -> int | None:
            candidates = [*(-(-size // multiple) * multiple for multiple in (16, 32)), _NOT_SMALL, fixed or _NOT_SMALL]
            return next((one for one in candidates if one not in refused and _takes(backbone, one)), None)

        changes = {key: instead(size) for key, size in sizes.items() if size in refused}
    finally:
        backbone.train(training)
    settings = " ".join(f"--set {key}={size}" for key, size in changes.items())
    way = f"try {settings}, or another network" if all(changes.values()) else "try another network"
    raise FastSSLError(f"{name} cannot take pictures of {' or '.join(map(str, sorted(refused)))} px; {way}")


def feature_dim(backbone: nn.Module) -> int:
    """Width F of the vector that ``backbone`` returns.

    timm's ``num_features`` is that of the last feature map; networks with a head after the pooling (MobileNet-V3) say
    theirs in ``head_hidden_size``.
    """
    widths = (getattr(backbone, name, None) for name in ("head_hidden_size", "num_features"))
    return int(next(width for width in widths if width))


def save_backbone(backbone: nn.Module, path: Path, *, arch: str, **notes: Any) -> None:
    """Write the backbone's tensors as safetensors with what is needed to rebuild it in the header.

    ``path`` is either whole or absent. ``notes``, what JSON can hold, go into the header.
    """
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    about = {
        "arch": resolve_arch(arch),
        "feature_dim": feature_dim(backbone),
        "digest": digest(dict(sorted(tensors.items()))),
        **notes,
    }
    header = {"format": "pt", "fastssl": json.dumps(about)}
    write_atomically(path, lambda temporary: save_file(tensors, str(temporary), metadata=header))


def read_header(path: str | Path) -> dict[str, Any]:
    """What a ``.safetensors`` checkpoint says of itself: ``arch`` and ``feature_dim``, as a rule ``step``, ``network``,
    and with which ``mean`` and ``std`` of pictures scaled to 0 .. 1 it was trained.

    Raises:
        FastSSLError: no such file, not safetensors, or not written by fastssl.
    """
    return _open_checkpoint(Path(path), tensors=False)[0]


def load_backbone(path: str | Path) -> nn.Module:
    """The backbone of a checkpoint as a timm module in evaluation mode, on the CPU.

    Args:
        path: a ``.safetensors`` file that a run (``checkpoints/last.safetensors``) or ``fastssl import`` wrote.

    Raises:
        FastSSLError: no such file, not ours, or tensors missing, left over or of another kind, such as int8.
    """
    header, tensors = _open_checkpoint(Path(path), tensors=True)
    try:
        if unfit := unfit_for(header["arch"], tensors):
            raise RuntimeError(unfit)
        backbone = create_backbone(header["arch"])
        if odd := other_kinds(tensors, backbone.state_dict()):
            raise FastSSLError(f"{path}: tensors are of another kind than in the network named in its header: {odd[0]}")
        backbone.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise FastSSLError(
            f"{path}: tensors do not fit the network named in its header: {' '.join(str(error).split())[:300]}"
        ) from error
    return backbone.eval()


def unfit_for(arch: str, tensors: dict[str, Tensor]) -> str:
    """What ``load_state_dict`` of the network ``arch`` would say of these tensors, in short; empty when they fit. Takes
    no memory: a file of a few bytes can name a network of gigabytes.
    """
    with torch.device("meta"):
        wanted = create_backbone(arch).state_dict()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    wrong = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    said = (("Missing key(s)", missing), ("Unexpected key(s)", extra), ("size mismatch", sorted(wrong)))
    return "; ".join(
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in said
        if names
    )


def other_kinds(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names and types of the tensors that are whole numbers where ``wanted`` has floating-point ones, complex, or the
    other way round. ``load_state_dict`` would cast them without a word, also quantised weights, which mean nothing
    without their scales.
    """
    return [
        f"{name} {str(value.dtype).removeprefix('torch.')} for {str(wanted[name].dtype).removeprefix('torch.')}"
        for name, value in tensors.items()
        if name in wanted
        and (value.is_floating_point(), value.is_complex())
        != (wanted[name].is_floating_point(), wanted[name].is_complex())
    ]


def _open_checkpoint(path: Path, *, tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors by name, if they are wanted)."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FastSSLError(f"{path}: no such checkpoint; a run writes checkpoints/last.safetensors")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("fastssl")
            found = {name: file.get_tensor(name) for name in (file.keys() if tensors else ())}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise FastSSLError(
            f"{path}: not a whole safetensors file ({' '.join(str(error).split())[:300]}); what other programs "
            "trained comes in by `fastssl import`"
        ) from error
    if text is None:
        raise FastSSLError(f"{path}: no fastssl header; checkpoints that others wrote come in by `fastssl import`")
    try:
        header = json.loads(text)
        if not isinstance(header["arch"], str):
            raise TypeError(f"arch is {header['arch']!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FastSSLError(
            f"{path}: its fastssl header does not name a network ({type(error).__name__}: {error})"
        ) from error
    # The format has no checksum. Files from before there was a digest are taken as they are.
    if tensors and "digest" in header and header["digest"] != digest(dict(sorted(found.items()))):
        raise FastSSLError(f"{path}: damaged: its tensors are not what was written")
    return header, found
