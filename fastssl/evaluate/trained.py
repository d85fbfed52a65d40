"""The network of a checkpoint, in whatever form a run left it: a run's folder, ``last.safetensors``, ``last-teacher.safetensors`` or ``last.pt``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastssl.backbones import create_backbone, load_backbone, read_header
from fastssl.checkpoint import load_checkpoint
from fastssl.pipelines.errors import FastSSLError

NETWORKS = ("student", "teacher")


@dataclass
class Trained:
    """A trained backbone and where it comes from.

    Attributes:
        backbone: a timm module in evaluation mode, on the CPU.
        arch: its timm name.
        network: ``student``, ``teacher``, or ``imported`` where the file says neither.
        step: how many steps it was trained; None where the file does not say.
        name: the checkpoint for people: at most the run's folder and the file, no path to it.
    """

    backbone: nn.Module
    arch: str
    network: str
    step: int | None
    name: str

    def record(self) -> dict[str, Any]:
        """What a result says of the network that it is about."""
        return {"checkpoint": self.name, "arch": self.arch, "network": self.network, "step": self.step}


def load_trained(path: str | Path, which: str | None = None) -> Trained:
    """The backbone of a checkpoint.

    Args:
        path: a run's folder, its ``checkpoints/``, a ``.safetensors`` file of fastssl, or a ``last.pt``.
        which: ``student`` or ``teacher``; None: the one in the file, and of a folder or a ``last.pt``, which hold both, the student.

    Raises:
        FastSSLError: no such file, not a checkpoint of fastssl, no teacher in it, or tensors that do not fit the network it names.
    """
    path = Path(path)
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        path = folder / ("last-teacher.safetensors" if which == "teacher" else "last.safetensors")
        if not path.is_file():
            raise FastSSLError(_missing(folder, which))
    if path.suffix == ".pt":
        return _from_run(path, which or "student")
    header = read_header(path)
    network = header.get("network", "imported")
    if which is not None and network != which:
        other = path.with_name("last-teacher.safetensors" if which == "teacher" else "last.safetensors")
        if network not in NETWORKS or not other.is_file():
            raise FastSSLError(
                f"{path}: holds the {network} network, not the {which}'s"
                + ("" if network == "imported" else f", and there is no {other.name} beside it")
            )
        path, header, network = other, read_header(other), which
    step = header.get("step")
    return Trained(load_backbone(path), header["arch"], network, int(step) if str(step).isdigit() else None, _short(path))


def _from_run(path: Path, which: str) -> Trained:
    state = load_checkpoint(path)
    prefix = f"{which}.backbone."
    tensors = {name.removeprefix(prefix): value for name, value in state["method"].items() if name.startswith(prefix)}
    if not tensors:
        raise FastSSLError(f"{path}: the run has no {which} network ({state['config'].get('method')} has none)")
    arch = state["config"]["arch"]
    backbone = create_backbone(arch)
    try:
        backbone.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise FastSSLError(f"{path}: tensors do not fit {arch}: {' '.join(str(error).split())[:300]}") from error
    return Trained(backbone.eval(), arch, which, int(state["position"]["step"]), _short(path))


def _missing(folder: Path, which: str | None) -> str:
    if which == "teacher" and (folder / "last.safetensors").is_file():
        return f"{folder}: the run has no teacher network (SwAV and SimCLR have none)"
    return f"{folder}: no last.safetensors in it; give a run's folder or a checkpoint file"


def _short(path: Path) -> str:
    """``.../runs/mine/checkpoints/last.pt`` -> ``mine/last.pt``: results are passed on, folders tell where somebody works."""
    parent = path.resolve().parent
    run = parent.parent if parent.name == "checkpoints" else parent
    return f"{run.name}/{path.name}" if run.name else path.name
