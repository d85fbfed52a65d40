"""Backbones that others trained: the network is found in the file, each tensor's place in the backbone by name and
shape, or one line says why not; kept as our own ``.safetensors``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastssl.config.resolved import normalisation_of
from fastssl.errors import FastSSLError
from fastssl.models.backbones import (
    SHORT_NAMES,
    create_backbone,
    other_kinds,
    read_header,
    resolve_arch,
    save_backbone,
)
from fastssl.pipelines.plan.draw import Normalisation, ViewSpec
from fastssl.utils.suggest import some_names
from fastssl.weights.efficientnet_names import efficientnet_names
from fastssl.weights.read import notes_of, read_foreign
from fastssl.weights.torchvision_names import TIMM_EPS, TWINS, torchvision_names, with_eps

#: How a project's training state names the backbone's tensors, once ``module.`` (DistributedDataParallel) is taken off:
#: (begin of the names -> network, the one with the gradient first; what may follow: wrappers around the backbone). The
#: more particular first: SSLight's begin as those of MoCo and DINO do. Read in the projects' code (SSLight:
#: src/sslight/model, src/sslight/backbone/layer.py; light-moco: moco/builder.py; DINO: main_dino.py). timm's and
#: torchvision's and efficientnet_pytorch's are bare state dicts.
LAYOUTS: dict[str, tuple[dict[str, str | None], str]] = {
    "sslight": (
        {
            "student.backbone.": "student",
            "teacher.backbone.": "teacher",
            "encoder_q.backbone.": "student",
            "encoder_k.backbone.": "teacher",
            "network.backbone.": None,
        },
        r"(?:encoder\.)?",
    ),
    "moco": ({"encoder_q.": "student", "encoder_k.": "teacher"}, ""),
    "dino": ({"student.": "student", "teacher.": "teacher"}, r"(?:module\.)?(?:backbone\.)?"),
    "timm": ({"": None}, ""),
    "torchvision": ({"": None}, ""),
    "efficientnet": ({"": None}, ""),
}
#: what people call the network with the gradient and the one that follows it
NETWORK = {"student": "student", "query": "student", "teacher": "teacher", "key": "teacher"}
#: dicts in which trainers keep a network's state
_CONTAINERS = ("state_dict.", "model.")
_WRAPPER = re.compile(r"^(?:module\.|_orig_mod\.)+")
#: why the networks that are not taken are left out, by the first part of their tensors' names
_OTHERS = dict.fromkeys(("student", "encoder_q"), "the student, or query, network")
_OTHERS |= dict.fromkeys(("teacher", "encoder_k"), "the teacher, or key, network")

_HEAD, _NO_PART = "projector or classifier", "not a part of the network"
#: first parts of names that belong to what stands behind a backbone
HEADS = frozenset(
    ("fc", "_fc", "classifier", "head", "head_dist", "last_layer")
    + ("projector", "projection", "predictor", "prototypes", "mlp")
)
#: SSLight wraps torchvision's ResNets in a Sequential, which numbers the layers; 2 and 3 are the activation and the
#: pooling.
_NUMBERED = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


class Found(NamedTuple):
    """A network in a checkpoint.

    Attributes:
        layouts: those it can have; more than one for a bare state dict, where only the names of the tensors tell.
        network: ``student``, ``teacher``, or None where there is only one.
        tensors: under the names that they have in the backbone there; heads are still among them.
        left_out: see ``Matched``.
    """

    layouts: tuple[str, ...]
    network: str | None
    tensors: dict[str, Tensor]
    left_out: list[dict[str, Any]]


@dataclass(frozen=True)
class Matched:
    """What was taken from where.

    Attributes:
        arch: timm name.
        layout: of the file.
        network: ``student``, ``teacher``, or None where the file holds only one.
        names: whose names the tensors had: ``timm``, ``torchvision``, ``sslight`` or ``efficientnet``.
        taken: tensors that were in the file.
        counters: how many were not, because they only count batches: evaluation never reads them, and they begin at 0.
        eps: of the BatchNorms there, if it was another than here and the weights were scaled for it; or None.
        left_out: all else in the file: ``group`` (first part of the names), ``tensors`` (how many), ``why``.
    """

    arch: str
    layout: str
    network: str | None
    names: str
    taken: int
    counters: int
    eps: float | None
    left_out: list[dict[str, Any]]


def import_backbone(
    source: Path, destination: Path, arch: str, *, layout: str = "auto", which: str | None = None, **seen: Any
) -> Matched:
    """Write the backbone in ``source`` to ``destination``, for ``fastssl.load_backbone``, ``fastssl evaluate`` and
    ``fastssl export``.

    Args:
        source: a checkpoint of MoCo, light-moco, DINO or SSLight, or weights for timm or torchvision; ``torch.save``'s
            format or safetensors.
        destination: ends in ``.safetensors``; replaced if it was imported too, or else left alone.
        arch: short name or timm name of the network that is in there.
        layout, which: see ``find_network``.
        seen: ``mean``, ``std`` with which it was trained; default: as one of our exports says, or else ImageNet's.

    Raises:
        FastSSLError: see ``read_foreign``, ``find_network`` and ``match``; or something at ``destination`` that was not
            imported.
    """
    arch = resolve_arch(arch)
    if destination.suffix != ".safetensors":
        raise FastSSLError(f"{destination}: an imported backbone is a .safetensors file: end its name so")
    if not destination.parent.is_dir():
        raise FastSSLError(f"{destination.parent}: no such folder; create it first")
    replaceable = not destination.exists()
    with suppress(FastSSLError):
        replaceable = replaceable or read_header(destination).get("network") == "imported"
    if not replaceable:
        left_alone = "it is left alone: choose another name or remove it"
        raise FastSSLError(f"{destination}: exists and was not imported; {left_alone}")
    tensors = read_foreign(source)
    backbone, matched, view = foreign_backbone(source, tensors, arch, layout=layout, which=which, **seen)
    which = matched.network or "the only one"
    origin = {"origin": source.name, "origin_layout": matched.layout, "origin_network": which}
    try:
        save_backbone(backbone, destination, arch=arch, network="imported", mean=view.mean, std=view.std, **origin)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FastSSLError(f"{destination}: not written ({error})") from error
    return matched


def foreign_backbone(
    source: Path, tensors: dict[str, Tensor], arch: str, *, layout: str = "auto", which: str | None = None, **seen: Any
) -> tuple[nn.Module, Matched, Normalisation]:
    """(backbone, what was taken from where, how its pictures are normalised) of the ``tensors`` of ``source``; see
    ``import_backbone``.
    """
    found = find_network(source, tensors, layout=layout, which=which)
    backbone = create_backbone(arch)
    matched = match(source, found, arch, backbone)
    notes = notes_of(source)
    told = {name: _parsed(notes[name]) for name in Normalisation._fields if name in notes and name not in seen}
    view = ViewSpec(**{**normalisation_of({"views": [told]})._asdict(), **seen})
    return backbone, matched, Normalisation(view.mean, view.std)


def _parsed(text: Any) -> Any:
    """JSON's value, or what is none as it is."""
    with suppress(ValueError, TypeError, RecursionError):
        return json.loads(text)
    return text


# ---------------------------------------------------------------------- where in the file the network is


def find_network(path: Path, tensors: dict[str, Tensor], *, layout: str = "auto", which: str | None = None) -> Found:
    """The tensors of one network.

    Args:
        path: for messages.
        tensors: as ``read_foreign`` gives them.
        layout: a key of ``LAYOUTS``, or ``auto``: the first whose names are there.
        which: a key of ``NETWORK``; None: the one with the gradient, or the only one.

    Raises:
        FastSSLError: nothing is named as ``layout`` has it, it holds no such network, or two tensors have the same name
            once what is wrapped around the network is taken off.
    """
    container = next((one for one in _CONTAINERS if any(name.startswith(one) for name in tensors)), "")
    packed = {name: value for name, value in tensors.items() if name.startswith(container)}
    inside = _renamed(path, packed, lambda name: _WRAPPER.sub("", name.removeprefix(container)))
    layouts: tuple[str, ...] = (layout,)
    if layout == "auto":
        # Of DINO's two networks each is a dict of its own, and in no container.
        known = ("sslight", "moco", "dino") if container == "state_dict." else ("moco", "dino")
        fitting = [one for one in known if any(name.startswith(tuple(LAYOUTS[one][0])) for name in inside)]
        bare = ("efficientnet",) if any(name.startswith("_blocks.") for name in inside) else ("timm", "torchvision")
        layouts = tuple(fitting[:1]) or bare
    roots, inner = LAYOUTS[layouts[0]]
    there = [root for root in roots if any(name.startswith(root) for name in inside)]
    if not there:
        names, first = " or ".join(f"{root}*" for root in roots), ", ".join(list(tensors)[:3])
        raise FastSSLError(
            f"{path}: not laid out as --layout {layout} ({names}): the first tensors are {first}; try --layout auto"
        )
    picked = [root for root in there if which is None or roots[root] == NETWORK[which]]
    if not picked:
        held = " and ".join(sorted({f"the {roots[root]}'s" for root in there if roots[root]}))
        held = held or "only one network; leave --which out"
        raise FastSSLError(f"{path}: does not hold the {which}'s network; it holds {held}")
    root = picked[0]
    lead = re.compile("^" + re.escape(root) + inner)
    mine = _renamed(path, {name: inside[name] for name in inside if lead.match(name)}, lambda name: lead.sub("", name))
    others = (name for name in inside if not lead.match(name))
    beside = (name for name in tensors if not name.startswith(container))
    left_out = _grouped(others, lambda group: _reason(group, root)) + _grouped(beside, lambda group: _NO_PART)
    return Found(layouts, roots[root], mine, left_out)


def _renamed(path: Path, tensors: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors under their new names, of which no two may be the same."""
    before: dict[str, str] = {}
    for name in tensors:
        if (other := before.setdefault(rename(name), name)) != name:
            raise FastSSLError(
                f"{path}: {other} and {name} would both be {rename(name)}: keep the one that the network is made of"
            )
    return {new: tensors[name] for new, name in before.items()}


def _grouped(names: Iterable[str], why: Callable[[str], str]) -> list[dict[str, Any]]:
    groups = Counter(name.split(".")[0] for name in names)
    return [{"group": group, "tensors": count, "why": why(group)} for group, count in sorted(groups.items())]


def _reason(group: str, root: str) -> str:
    own = root.startswith(f"{group}.")
    if group in _OTHERS and not own:
        return _OTHERS[group]
    return _HEAD if own or group.endswith("_fc") or group == "classifier" else _NO_PART


# ---------------------------------------------------------------------- each tensor's place in the backbone


def match(path: Path, found: Found, arch: str, backbone: nn.Module) -> Matched:
    """Fill ``backbone``, freshly made, with the tensors that were found.

    Args:
        path: for messages.
        found: as ``find_network`` gives it.
        arch: timm name of the network that they should be.

    Raises:
        FastSSLError: tensors are missing, have another shape, or are neither the backbone's nor a head's; the message
            names the first few and, if there is one, the network with a short name that they fit. Or they are not what
            a network computes with: whole numbers, complex, sparse, quantised, without values, NaN or infinite.
    """
    begun = backbone.state_dict()
    tables = _tables(found, arch, begun)
    if not tables:
        raise FastSSLError(
            f"{path}: torchvision has no counterpart of {arch}, only of {', '.join(TWINS)}; try --layout timm"
        )
    odd = {names: _odd(table, found.tensors, begun) for names, table in tables.items()}
    # In a bare state dict both libraries' ResNets are called the same; the first is meant.
    names = min(odd, key=lambda one: len(odd[one]["missing"]) + len(odd[one]["of another shape"]))
    if parts := [some_names(them, word) for word, them in odd[names].items() if them]:
        raise FastSSLError(f"{path}: does not fit {arch}: {'; '.join(parts)}{_guess(found, arch)}")
    table = tables[names]
    theirs = {name: found.tensors[table[name]] for name in begun if table[name] in found.tensors}
    for state, bad in (
        ("on the meta device, without values", [name for name, value in theirs.items() if value.is_meta]),
        ("sparse", [name for name, value in theirs.items() if value.layout != torch.strided]),
        ("quantised", [name for name, value in theirs.items() if value.is_quantized]),
        ("of another kind", other_kinds(theirs, begun)),
    ):
        if bad:  # torch.save can write it, but no copy makes weights of it
            raise FastSSLError(
                f"{path}: {some_names(bad, state)}: save the network in float32, with all its values, and import that"
            )
    tensors = begun | {name: value.reshape(begun[name].shape).to(begun[name].dtype) for name, value in theirs.items()}
    if broken := [table[name] for name, value in tensors.items() if not value.isfinite().all()]:
        raise FastSSLError(
            f"{path}: {some_names(broken, 'tensors with NaN or infinite values')}: no network that computes anything"
        )
    eps = TWINS[arch].eps if names in ("torchvision", "sslight") and TWINS[arch].eps != TIMM_EPS else None
    if eps is not None:
        tensors = with_eps(tensors, eps, TIMM_EPS)
    backbone.load_state_dict(tensors, strict=True)
    heads = _grouped(found.tensors.keys() - {table[name] for name in theirs}, lambda group: _HEAD)
    layout = found.layouts[0] if len(found.layouts) == 1 else names
    counters = len(begun) - len(theirs)
    return Matched(arch, layout, found.network, names, len(theirs), counters, eps, heads + found.left_out)


def _tables(found: Found, arch: str, wanted: dict[str, Tensor]) -> dict[str, dict[str, str]]:
    """Whose names the file may use for ``arch`` -> {timm's name: theirs}."""
    tables = {"timm": {name: name for name in wanted}}
    if arch in TWINS:
        tables["torchvision"] = torchvision = torchvision_names(arch)
        # SSLight keeps torchvision's ``features`` alone, or the layers of a ResNet up to the pooling as a list.
        tables["sslight"] = {ours: theirs.removeprefix("features.") for ours, theirs in torchvision.items()}
        if "conv1.weight" in torchvision:
            parts = {ours: theirs.partition(".") for ours, theirs in torchvision.items()}
            tables["sslight"] = {ours: f"{_NUMBERED[layer]}.{rest}" for ours, (layer, _, rest) in parts.items()}
    tables["efficientnet"] = efficientnet_names(wanted)
    usable: tuple[str, ...] = ("timm", "torchvision")
    if found.layouts == ("sslight",):
        # Its vision transformers are named as timm's are, its other networks number what torchvision names.
        usable = ("sslight" if arch in TWINS else "timm",)
    elif found.layouts in (("timm",), ("torchvision",), ("efficientnet",)):
        usable = found.layouts
    return {name: tables[name] for name in usable if name in tables}


def _odd(table: dict[str, str], tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, list[str]]:
    """What does not fit, by what is wrong with it."""
    missing, wrong = [], []
    for ours, theirs in table.items():
        if theirs not in tensors:
            if not ours.endswith(".num_batches_tracked"):  # torch did not always write it
                missing.append(theirs)
        elif wanted[ours].shape not in ((shape := tensors[theirs].shape), (*shape, 1, 1)):  # a Linear is a convolution
            wrong.append(f"{theirs} {tuple(shape)} for {tuple(wanted[ours].shape)}")
    extra = [name for name in tensors.keys() - set(table.values()) if name.split(".")[0] not in HEADS]
    return {"missing": missing, "of another shape": wrong, "left over": extra}


def _guess(found: Found, arch: str) -> str:
    """The networks with a short name that the tensors fit; only shapes are made, no weights."""
    fitting = []
    for short, name in SHORT_NAMES.items():
        if name != arch:
            with torch.device("meta"):
                wanted = create_backbone(name).state_dict()
            tables = _tables(found, name, wanted).values()
            if any(not any(_odd(table, found.tensors, wanted).values()) for table in tables):
                fitting.append(short)
    return f"; it fits --arch {' or '.join(fitting)}" if fitting else ""
