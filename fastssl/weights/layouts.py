"""Where in a checkpoint the network is: each project's wrapping, and what stands beside it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastssl.errors import FastSSLError


@dataclass(frozen=True)
class Layout:
    """How a project's training state names the backbone's tensors, once ``module.`` (DistributedDataParallel) is taken
    off.

    Attributes:
        roots: (begin of the names, network), the one with the gradient first.
        inner: what may follow: wrappers around the backbone.
        note: what it is, for messages.
    """

    roots: tuple[tuple[str, str | None], ...]
    inner: str
    note: str


#: name -> layout, the more particular first: SSLight's begin as those of MoCo and DINO do. Read in the projects' code
#: (SSLight: src/sslight/model, src/sslight/backbone/layer.py; light-moco: moco/builder.py; DINO: main_dino.py).
LAYOUTS: dict[str, Layout] = {
    "sslight": Layout(
        (
            ("student.backbone.", "student"),
            ("teacher.backbone.", "teacher"),
            ("encoder_q.backbone.", "student"),
            ("encoder_k.backbone.", "teacher"),
            ("network.backbone.", None),
        ),
        r"(?:encoder\.)?",
        "SSLight: student.backbone.*, encoder_q.backbone.* or network.backbone.* in a state_dict",
    ),
    "moco": Layout((("encoder_q.", "student"), ("encoder_k.", "teacher")), "", "MoCo: encoder_q.* and encoder_k.*"),
    "dino": Layout(
        (("student.", "student"), ("teacher.", "teacher")),
        r"(?:module\.)?(?:backbone\.)?",
        "DINO: a dict with student and teacher",
    ),
    "timm": Layout((("", None),), "", "a state dict under timm's names"),
    "torchvision": Layout((("", None),), "", "a state dict under torchvision's names"),
}
#: what people call the network with the gradient and the one that follows it
NETWORK = {"student": "student", "query": "student", "teacher": "teacher", "key": "teacher"}
#: dicts in which trainers keep a network's state
_CONTAINERS = ("state_dict.", "model.")
_WRAPPER = re.compile(r"^(?:module\.|_orig_mod\.)+")


@dataclass(frozen=True)
class Found:
    """A network in a checkpoint.

    Attributes:
        layouts: those it can have; more than one for a bare state dict, where only the names of the tensors tell.
        network: ``student``, ``teacher``, or None where there is only one.
        tensors: under the names that they have in the backbone there; heads are still among them.
        left_out: (group, tensors, why): all else in the file.
    """

    layouts: tuple[str, ...]
    network: str | None
    tensors: dict[str, Tensor]
    left_out: tuple[tuple[str, int, str], ...]


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
    inside, left_out = _unpacked(path, tensors)
    packed = any(name.startswith(_CONTAINERS[0]) for name in tensors)
    names = _fitting(inside, packed) if layout == "auto" else (layout,)
    chosen = LAYOUTS[names[0]]
    roots = [(root, network) for root, network in chosen.roots if any(name.startswith(root) for name in inside)]
    if not roots:
        first = ", ".join(list(tensors)[:3])
        why = f"({chosen.note}): the first tensors are {first}; try --layout auto"
        raise FastSSLError(f"{path}: not laid out as --layout {layout} {why}")
    wanted = NETWORK[which] if which else None
    picked = [(root, network) for root, network in roots if wanted is None or network == wanted]
    if not picked:
        there = " and ".join(sorted({f"the {network}'s" for _, network in roots if network}))
        there = there or "only one network; leave --which out"
        raise FastSSLError(f"{path}: does not hold the {which}'s network; it holds {there}")
    root, network = picked[0]
    lead = re.compile("^" + re.escape(root) + chosen.inner)
    others = Counter(name.split(".")[0] for name in inside if not lead.match(name))
    mine = {name: value for name, value in inside.items() if lead.match(name)}
    mine = _renamed(path, mine, lambda name: lead.sub("", name, count=1))
    rest = [(group, count, _reason(group, network, root)) for group, count in sorted(others.items())]
    return Found(names, network, mine, (*rest, *left_out))


def _renamed(path: Path, tensors: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The tensors under their new names, of which no two may be the same."""
    before: dict[str, str] = {}
    for name in tensors:
        if (other := before.setdefault(rename(name), name)) != name:
            raise FastSSLError(
                f"{path}: {other} and {name} would both be {rename(name)}: keep the one that the network is made of"
            )
    return {new: tensors[name] for new, name in before.items()}


def _unpacked(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[tuple[str, int, str]]]:
    """(the networks' tensors without container and ``module.``, what stands beside the container)."""
    container = next((one for one in _CONTAINERS if any(name.startswith(one) for name in tensors)), "")
    beside = Counter(name.split(".")[0] for name in tensors if not name.startswith(container))
    packed = {name: value for name, value in tensors.items() if name.startswith(container)}
    inside = _renamed(path, packed, lambda name: _WRAPPER.sub("", name.removeprefix(container)))
    return inside, [(group, count, "not a part of the network") for group, count in sorted(beside.items())]


def _fitting(names: dict[str, Tensor], packed: bool) -> tuple[str, ...]:
    """The layouts that the names can have."""
    for name in ("sslight", "moco", "dino") if packed else ("moco", "dino"):  # of DINO's two each is a dict of its own
        if any(tensor.startswith(root) for tensor in names for root, _ in LAYOUTS[name].roots):
            return (name,)
    return ("timm", "torchvision")


def _reason(group: str, network: str | None, root: str) -> str:
    other = {"student": "the student, or query, network", "teacher": "the teacher, or key, network"}
    if group in ("student", "teacher", "encoder_q", "encoder_k") and not root.startswith(f"{group}."):
        return other["student" if group in ("student", "encoder_q") else "teacher"]
    if root.startswith(f"{group}.") or group.endswith("_fc") or group == "classifier":
        return "projector or classifier"
    return "not a part of the network"
