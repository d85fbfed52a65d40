"""Each tensor's place in the backbone, by name and shape, or one line that says why not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.errors import FastSSLError
from fastssl.models.backbones import SHORT_NAMES, create_backbone, other_kinds
from fastssl.utils.suggest import some_names
from fastssl.weights.layouts import Found
from fastssl.weights.torchvision_names import TWINS, torchvision_names, with_eps

#: first parts of names that belong to what stands behind a backbone
HEADS = frozenset(
    {"fc", "classifier", "head", "head_dist", "projector", "projection", "predictor", "prototypes", "mlp", "last_layer"}
)
#: SSLight wraps torchvision's ResNets in a Sequential, which numbers the layers; 2 and 3 are the activation and the
#: pooling.
_NUMBERED = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


@dataclass(frozen=True)
class Matched:
    """A backbone's tensors, taken from somewhere else.

    Attributes:
        arch: timm name.
        layout: of the file.
        network: ``student``, ``teacher``, or None where the file holds only one.
        names: whose names the tensors had: ``timm``, ``torchvision`` or ``sslight``.
        tensors: under timm's names, complete.
        taken: how many were in the file.
        counters: how many were not, because they only count batches: evaluation never reads them, and they begin at 0.
        eps: of the BatchNorms there, if it was another than here and the weights were scaled for it; or None.
        left_out: (group, tensors, why): all else in the file.
    """

    arch: str
    layout: str
    network: str | None
    names: str
    tensors: dict[str, Tensor]
    taken: int
    counters: int
    eps: float | None
    left_out: tuple[tuple[str, int, str], ...]

    def record(self) -> dict:
        """All but the tensors, as JSON has it."""
        kept = {name: value for name, value in vars(self).items() if name != "tensors"}
        return {**kept, "left_out": [dict(zip(("group", "tensors", "why"), entry)) for entry in self.left_out]}


@dataclass(frozen=True)
class _Attempt:
    """How the tensors of a file fit one network under one set of names."""

    names: str
    table: dict[str, str]  # timm's name -> theirs
    missing: list[str]
    wrong: list[str]  # wrong shape
    extra: list[str]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.wrong or self.extra)


def match(path: Path, found: Found, arch: str) -> Matched:
    """The backbone's tensors from those that were found.

    Args:
        path: for messages.
        found: as ``find_network`` gives it.
        arch: timm name of the network that they should be.

    Raises:
        FastSSLError: tensors are missing, have another shape, or are neither the backbone's nor a head's; the message
            names the first few and, if there is one, the network with a short name that they fit. Or they are not what
            a network computes with: whole numbers, complex, sparse, quantised, without values, NaN or infinite.
    """
    backbone = create_backbone(arch)
    attempts = _attempts(found, arch, backbone.state_dict())
    if not attempts:
        raise FastSSLError(
            f"{path}: torchvision has no counterpart of {arch}, only of {', '.join(TWINS)}; try --layout timm"
        )
    # In a bare state dict both libraries' ResNets are called the same; the first is meant.
    best = min(attempts, key=lambda one: len(one.missing) + len(one.wrong))
    if not best.fits:
        odd = ((best.missing, "missing"), (best.wrong, "of another shape"), (best.extra, "left over"))
        parts = filter(None, (some_names(names, word) for names, word in odd))
        raise FastSSLError(f"{path}: does not fit {arch}: {'; '.join(parts)}{_guess(found, arch)}")
    begun = backbone.state_dict()
    theirs = {name: found.tensors[best.table[name]] for name in begun if best.table[name] in found.tensors}
    _require_usable(path, theirs, begun)
    tensors = begun | {name: value.reshape(begun[name].shape).to(begun[name].dtype) for name, value in theirs.items()}
    if broken := [best.table[name] for name, value in tensors.items() if not value.isfinite().all()]:
        raise FastSSLError(
            f"{path}: {some_names(broken, 'tensors with NaN or infinite values')}: no network that computes anything"
        )
    eps = TWINS[arch].eps if best.names != "timm" else None
    if eps is not None and all(layer.eps == eps for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d)):
        eps = None
    if eps is not None:
        tensors = with_eps(tensors, backbone, have=eps)
    used = {best.table[name] for name in tensors} & found.tensors.keys()
    heads = Counter(name.split(".")[0] for name in found.tensors.keys() - used)
    left_out = tuple((group, count, "projector or classifier") for group, count in sorted(heads.items()))
    layout = found.layouts[0] if len(found.layouts) == 1 else best.names
    counters = len(tensors) - len(used)
    return Matched(
        arch, layout, found.network, best.names, tensors, len(used), counters, eps, (*left_out, *found.left_out)
    )


def _require_usable(path: Path, theirs: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuse what torch.save can write but no copy makes weights of; names are timm's."""
    for state, names in (
        ("on the meta device, without values", [name for name, value in theirs.items() if value.is_meta]),
        ("sparse", [name for name, value in theirs.items() if value.layout != torch.strided]),
        ("quantised", [name for name, value in theirs.items() if value.is_quantized]),
        ("of another kind", other_kinds(theirs, wanted)),
    ):
        if names:
            raise FastSSLError(
                f"{path}: {some_names(names, state)}: save the network in float32, with all its values, and import that"
            )


def _attempts(found: Found, arch: str, wanted: dict[str, Tensor]) -> list[_Attempt]:
    """One for each set of names that the file may use for ``arch``."""
    tables = {"timm": {name: name for name in wanted}}
    if arch in TWINS:
        tables["torchvision"] = torchvision_names(arch)
        tables["sslight"] = _sslight_names(tables["torchvision"])
    if found.layouts == ("sslight",):
        # Its vision transformers are named as timm's are, its other networks number what torchvision names.
        usable = ["sslight" if "sslight" in tables else "timm"]
    elif found.layouts in (("timm",), ("torchvision",)):
        usable = [found.layouts[0]]
    else:
        usable = ["timm", "torchvision"]
    return [_attempt(name, tables[name], found.tensors, wanted) for name in usable if name in tables]


def _sslight_names(torchvision: dict[str, str]) -> dict[str, str]:
    """SSLight keeps torchvision's ``features`` alone, or the layers of a ResNet up to the pooling as a list."""
    if "conv1.weight" not in torchvision:
        return {ours: theirs.removeprefix("features.") for ours, theirs in torchvision.items()}
    parts = {ours: theirs.partition(".") for ours, theirs in torchvision.items()}
    return {ours: f"{_NUMBERED[layer]}.{rest}" for ours, (layer, _, rest) in parts.items()}


def _attempt(names: str, table: dict[str, str], tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> _Attempt:
    missing, wrong = [], []
    for ours, theirs in table.items():
        if theirs not in tensors:
            if not ours.endswith(".num_batches_tracked"):  # torch did not always write it
                missing.append(theirs)
        elif wanted[ours].shape not in ((shape := tensors[theirs].shape), (*shape, 1, 1)):  # a Linear is a convolution
            wrong.append(f"{theirs} {tuple(shape)} for {tuple(wanted[ours].shape)}")
    extra = [name for name in tensors.keys() - set(table.values()) if name.split(".")[0] not in HEADS]
    return _Attempt(names, table, missing, wrong, extra)


def _guess(found: Found, arch: str) -> str:
    """The networks with a short name that the tensors fit; only shapes are made, no weights."""
    fitting = []
    for short, name in SHORT_NAMES.items():
        if name != arch:
            with torch.device("meta"):
                wanted = create_backbone(name).state_dict()
            if any(attempt.fits for attempt in _attempts(found, name, wanted)):
                fitting.append(short)
    return f"; it fits --arch {' or '.join(fitting)}" if fitting else ""
