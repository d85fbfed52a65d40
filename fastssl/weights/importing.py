"""Backbones that others trained: read without running what is in the file, matched by name and shape, kept as our own
``.safetensors``.

``read`` opens the file, ``layouts`` finds the network in it, ``match`` finds each tensor's place in the backbone,
``torchvision_names`` knows what torchvision calls it.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from fastssl.errors import FastSSLError
from fastssl.models.backbones import create_backbone, read_header, resolve_arch, save_backbone
from fastssl.weights.layouts import find_network
from fastssl.weights.match import Matched, match
from fastssl.weights.read import read_foreign


def import_backbone(
    source: Path, destination: Path, arch: str, *, layout: str = "auto", which: str | None = None
) -> Matched:
    """Write the backbone in ``source`` to ``destination``, for ``fastssl.load_backbone``, ``fastssl evaluate`` and
    ``fastssl export``.

    Args:
        source: a checkpoint of MoCo, light-moco, DINO or SSLight, or weights for timm or torchvision; ``torch.save``'s
            format or safetensors.
        destination: ends in ``.safetensors``; replaced if it was imported too, or else left alone.
        arch: short name or timm name of the network that is in there.
        layout: see ``find_network``.
        which: ``student`` or ``query``, ``teacher`` or ``key``; None: the student, or the only network.

    Raises:
        FastSSLError: see ``read_foreign``, ``find_network`` and ``match``; or something at ``destination`` that was not
            imported.
    """
    arch = resolve_arch(arch, tags=True)
    _require_replaceable(destination)
    found = find_network(source, read_foreign(source), layout=layout, which=which)
    matched = match(source, found, arch)
    backbone = create_backbone(arch)
    backbone.load_state_dict(matched.tensors, strict=True)
    origin = {"origin": source.name, "origin_layout": matched.layout, "origin_network": found.network or "the only one"}
    try:
        save_backbone(backbone, destination, arch=arch, network="imported", **origin)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FastSSLError(f"{destination}: not written ({error})") from error
    return matched


def _require_replaceable(destination: Path) -> None:
    if destination.suffix != ".safetensors":
        raise FastSSLError(f"{destination}: an imported backbone is a .safetensors file: end its name so")
    if not destination.parent.is_dir():
        raise FastSSLError(f"{destination.parent}: no such folder; create it first")
    imported = not destination.exists()
    with suppress(FastSSLError):
        imported = imported or read_header(destination).get("network") == "imported"
    if not imported:
        left_alone = "it is left alone: choose another name or remove it"
        raise FastSSLError(f"{destination}: exists and was not imported; {left_alone}")
