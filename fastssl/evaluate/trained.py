"""The network of a checkpoint, in whatever form a run left it: a run's folder, ``last.safetensors``,
``last-teacher.safetensors`` or ``last.pt``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastssl.config.resolved import normalisation_of
from fastssl.errors import FastSSLError
from fastssl.models import backbones
from fastssl.models.backbones import create_backbone, read_header
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation
from fastssl.runs.checkpoint import is_detector, load_checkpoint
from fastssl.utils.yaml_file import read_yaml

#: The networks of a run -> the file in its ``checkpoints/``.
FILES = {"student": "last.safetensors", "teacher": "last-teacher.safetensors"}


@dataclass
class Trained:
    """A trained backbone and where it comes from.

    Attributes:
        backbone: a timm module in evaluation mode, on the CPU. arch: its timm name.
        network: ``student``, ``teacher``, or ``imported`` where the file says neither.
        step: how many steps it was trained; None where the file does not say.
        name: the checkpoint for people: at most the run's folder and the file, no path to it.
        size, crop: with which its run was probed (``probe.size``, ``probe.crop``), or what published weights say of
            themselves; None where neither is known.
        normalisation: of the pictures that it was trained on; ImageNet's where neither file nor run says one.
        published: whether timm or the hub has it, and no run is known.
    """

    backbone: nn.Module
    arch: str
    network: str
    step: int | None
    name: str
    size: int | None = None
    crop: float | None = None
    normalisation: Normalisation = IMAGENET
    published: bool = False

    def record(self) -> dict[str, Any]:
        """What a result says of the network that it is about."""
        return {"checkpoint": self.name, "arch": self.arch, "network": self.network, "step": self.step}

    def differs(self, option: str, wanted: float | None) -> str:
        """What to say of pictures of another ``size`` or ``crop`` than the network's own; empty: nothing."""
        own = getattr(self, option)
        if None in (wanted, own) or wanted == own:
            return ""
        whose = f"the run itself was probed with {own:g} (probe.{option})"
        if self.published:
            whose = f"these weights were published for {own:g}"
        return f"--{option} {wanted:g}: {whose}"


def load_trained(path: str | Path, which: str | None = None) -> Trained:
    """The backbone of a checkpoint.

    Args:
        path: a run's folder, its ``checkpoints/``, a ``.safetensors`` file of fastssl, or a ``last.pt``.
        which: ``student`` or ``teacher``; None: the one in the file, and of a folder or a ``last.pt``, which hold both,
            the student.

    Raises:
        FastSSLError: no such file, not a checkpoint of fastssl, no teacher in it, or tensors that do not fit the
            network it names.
    """
    path = Path(path)
    if which not in (None, *FILES):
        raise FastSSLError(f"which={which!r}: there are {' and '.join(FILES)}")
    if from_folder := path.is_dir():
        folder = checkpoints_of(path)
        path = folder / FILES[which or "student"]
        if not path.is_file():
            if which == "teacher" and (folder / FILES["student"]).is_file():
                raise FastSSLError(f"{folder}: the run has no teacher network (SwAV and SimCLR have none)")
            raise FastSSLError(f"{folder}: no last.safetensors in it; give a run's folder or a checkpoint file")
    if path.suffix == ".pt":
        return _from_run(path, which or "student")
    network = _network(path)
    if which is None and from_folder and network != "imported":
        which = "student"
    if which is not None and network != which:
        other = path.with_name(FILES[which])
        if network == "imported" or not other.is_file():
            beside = "" if network == "imported" else f", and there is no {other.name} beside it"
            raise FastSSLError(f"{path}: holds the {network} network, not the {which}'s{beside}")
        path, network = other, _network(other)
        if network != which:  # a file's name says what a run writes there, its header what is in it
            raise FastSSLError(f"{path}: holds the {network} network, not the {which}'s, as its name says")
    header = read_header(path)
    step = str(header.get("step"))
    made = int(step) if step.isascii() and step.isdigit() and len(step) <= 18 else None
    config = _config_beside(path)
    told = not header.keys().isdisjoint(Normalisation._fields)  # by older files it is not
    seen = normalisation_of({"views": [header]} if told else config)
    return Trained(backbones.load_backbone(path), header["arch"], network, made, _short(path), *_probed(config), seen)


def checkpoints_of(run: Path) -> Path:
    """A run's folder, or its ``checkpoints/`` -> its ``checkpoints/``."""
    return run / "checkpoints" if (run / "checkpoints").is_dir() else run


def load_part(module: nn.Module, state: dict[str, Any], part: str) -> str | None:
    """Fill ``module`` with the tensors of a run's state whose names begin with ``part``.

    Returns:
        what does not fit, in one line; None: all is well.
    """
    tensors = {name.removeprefix(part): value for name, value in state["method"].items() if name.startswith(part)}
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        return " ".join(str(error).split())[:300]
    return None


def _config_beside(path: Path) -> Any:
    """What the config.yaml of the run says whose ``checkpoints/`` the file lies in; None: none can be read."""
    folder = path.resolve().parent
    config = folder.parent / "config.yaml"
    try:
        return read_yaml(config) if folder.name == "checkpoints" and config.is_file() else None
    except FastSSLError as error:
        warnings.warn(f"{error}; pictures are taken as of no run", stacklevel=3)
        return None


def _probed(config: Any) -> tuple[int | None, float | None]:
    """(size, crop) of a run's probe, as far as a stranger's configuration says them in numbers that can be."""
    probe = config.get("probe") if isinstance(config, dict) else None
    size, crop = (probe.get("size"), probe.get("crop")) if isinstance(probe, dict) else (None, None)
    fits = isinstance(size, int) and not isinstance(size, bool) and 8 <= size <= 4096
    return size if fits else None, float(crop) if isinstance(crop, (int, float)) and 0.1 <= crop <= 1 else None


def _network(path: Path) -> str:
    """What the header says that it is."""
    network = read_header(path).get("network")
    return network if network in list(FILES) else "imported"  # a stranger's may be no text


def _from_run(path: Path, which: str) -> Trained:
    state = load_checkpoint(path)
    if is_detector(state):
        raise FastSSLError(
            f"{path}: is a detector, which `fastssl evaluate detect` keeps; give the run's own checkpoint, "
            "from which it was trained"
        )
    arch = state["config"]["arch"]
    if not any(name.startswith(f"{which}.backbone.") for name in state["method"]):
        raise FastSSLError(f"{path}: the run has no {which} network ({state['config'].get('method')} has none)")
    backbone = create_backbone(arch)
    if unfit := load_part(backbone, state, f"{which}.backbone."):
        raise FastSSLError(f"{path}: tensors do not fit {arch}: {unfit}")
    pictures = *_probed(state["config"]), normalisation_of(state["config"])
    return Trained(backbone.eval(), arch, which, state["position"]["step"], _short(path), *pictures)


def _short(path: Path) -> str:
    """``.../runs/mine/checkpoints/last.pt`` -> ``mine/last.pt``: results are passed on, and folders are private."""
    run = path.resolve().parent
    run = run.parent if run.name == "checkpoints" else run
    return f"{run.name}/{path.name}" if run.name else path.name
