"""What the commands do, from Python: warnings come as Python's, notes by ``logging`` (``fastssl``, level INFO)."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from fastssl.distributed.world import first_of_host_speaks, world_from_environment
from fastssl.errors import UsageError
from fastssl.evaluate.embed import embed as write_features
from fastssl.evaluate.features import silent
from fastssl.evaluate.frozen import TRAINING, Frozen, require_linear
from fastssl.evaluate.protocols import KNN_PROTOCOLS
from fastssl.inputs import Told, Wanted, choose_inputs
from fastssl.pipelines.engines.base import PIPELINES
from fastssl.pretrain import RunOptions
from fastssl.pretrain import pretrain as make_run
from fastssl.runs.loggers import require_loggers
from fastssl.weights.export import ENDINGS, Exported, export_backbone
from fastssl.weights.int8 import Int8
from fastssl.weights.source import load_backbone, load_weights, open_session

SomePath = str | os.PathLike[str]
_log = logging.getLogger("fastssl")
#: Options of an evaluation, with what they are if nobody says.
_ALL = {"protocol": None, "size": None, "crop": None, "workers": None, "seed": 0, "reestimate_bn": None}
_OPTIONS: dict[str, dict[str, Any]] = {
    "knn": {**_ALL, "batch_size": 256, "k": None, "temperature": None, "leave_one_out": False},
    "linear": {**_ALL, "batch_size": None, **dict.fromkeys(TRAINING)},
}


@dataclass(frozen=True)
class RunResult:
    """A finished run; it stands for its folder wherever a path is wanted. Empty in all processes but the first.

    Attributes:
        out: the folder. report: its page. summary: what ``summary.json`` holds.
        rows: name, kNN and linear probe (percent) of the trained network and of what it is compared with.
        verdict: whether it learned, in words.
    """

    out: Path
    report: Path
    summary: dict[str, Any] = field(repr=False)
    rows: list[dict[str, Any]] = field(repr=False)
    verdict: str

    def __fspath__(self) -> str:
        return os.fspath(self.out)

    def backbone(self) -> nn.Module:
        """The trained network, see ``load_backbone``."""
        return load_backbone(self)

    def teacher(self) -> nn.Module:
        """Its moving average. FastSSLError: the method has none (SwAV, SimCLR)."""
        return load_backbone(self, "teacher")


def pretrain(
    data: SomePath | None = None,
    *,
    arch: str | None = None,
    init_from: SomePath | None = None,
    recipe: str | None = None,
    out: SomePath | None = None,
    val: SomePath | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    pipeline: str = "auto",
    workers: int | None = None,
    seed: int = 0,
    resume: str = "auto",
    check: bool = False,
    log: Sequence[str] = (),
    progress: Callable[[dict[str, Any]], object] = lambda row: None,
    **overrides: Any,
) -> RunResult:
    """``fastssl pretrain``, whose ``--help`` has the arguments: the same recipe, folder and report.

    Args:
        progress: is told each line of metrics, with ``done`` and ``total``, the steps.
        overrides: values of the recipe: ``**{"optim.lr": 0.1}``.

    Raises:
        Interrupted: by Ctrl-C or a notebook's stop button, after a checkpoint was written. The same call goes
            on from there. FastSSLError: says what to change.
    """
    where: dict[str, Any] = {"device": device, "pipeline": pipeline, "workers": workers}
    asked: dict[str, Any] = {"arch": arch, "recipe_name": recipe, "epochs": epochs, "batch_size": batch_size}
    first = None if init_from is None else os.fspath(init_from)
    wanted = Wanted(overrides=overrides, init_from=first, data=_place(data), val=_place(val), **asked, **where)
    _one_of(PIPELINES, pipeline=pipeline)
    out, log = _place(out), log.split(",") if isinstance(log, str) else log
    run = Path(out) if out is not None and resume != "never" else None
    with first_of_host_speaks():
        require_loggers(tuple(log))
        inputs = choose_inputs(wanted, Told(_log.info, _warn), world_from_environment().size, run)
    folder = inputs.folder if out is None else Path(out)
    where |= {"seed": seed, "resume": resume, "check": check, "log": tuple(log), "init": inputs.init}
    options = RunOptions(inputs.name, inputs.data, folder, inputs.val, **where)
    told: Any = SimpleNamespace(message=_warn, note=_log.info)
    told.row = lambda row, done, total: progress({**row, "done": done, "total": total})
    found = make_run(inputs.recipe, options, told) or {}
    rows, verdict = (found["probe"]["rows"], found["verdict"]["text"]) if found else ([], "")
    return RunResult(folder, folder / "report.html", found, rows, verdict)


def evaluate(
    weights: SomePath,
    kind: str = "knn",
    *,
    data: SomePath,
    val: SomePath | None = None,
    which: str | None = None,
    arch: str | None = None,
    device: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """``fastssl evaluate knn`` or ``linear`` (``kind``), whose ``--help`` has the options, by their long names.

    Returns:
        the record that ``--json`` writes: ``accuracy``, ``confidence``, ... in percent.
    """
    if kind not in _OPTIONS:
        raise UsageError(f"kind={kind!r}: knn or linear; what fine-tunes is the command's, fastssl evaluate")
    if strange := sorted(options.keys() - _OPTIONS[kind].keys()):
        raise UsageError(f"{strange[0]}: no such option of {kind}; there are {', '.join(_OPTIONS[kind])}")
    asked = SimpleNamespace(**{**_OPTIONS[kind], **options}, data=_place(data), val=_place(val))
    asked.protocol = asked.protocol or ("dino" if kind == "knn" else "fast")
    if kind == "linear":
        require_linear(asked)
    else:
        _one_of(KNN_PROTOCOLS, protocol=asked.protocol)
    with open_session(os.fspath(weights), which=which, arch=arch, device=device) as session:
        frozen = Frozen(session, asked, silent, _warn)
        if kind == "linear":
            return frozen.linear()[1]
        asked.ks = () if asked.k is None else (asked.k,)
        return frozen.knn()[1][0]


def embed(weights: SomePath, data: SomePath, out: SomePath, **options: Any) -> dict[str, Any]:
    """``fastssl embed``, whose ``--help`` has the options. Returns OUT.json but for its columns and ``made_from``."""
    asked = {name: options.pop(name) for name in ("which", "arch", "device") if name in options}
    with open_session(os.fspath(weights), **asked) as session:
        return write_features(session, _place(data), os.fspath(out), **options)


def export(
    weights: SomePath,
    dst: SomePath,
    format: str = "timm",
    *,
    which: str | None = None,
    arch: str | None = None,
    data: SomePath | None = None,
    max_drop: float = 1.0,
    **options: Any,
) -> Exported:
    """``fastssl export``, whose ``--help`` says what is written and how it is checked. ``data``: write int8, calibrated
    and judged on these photos; ``options``: ``size`` and ``input``.
    """
    _one_of(ENDINGS, format=format)
    _one_of(("raw", "normalised"), input=options.get("input") or "raw")
    int8 = None if data is None else Int8(_place(data), max_drop)
    return export_backbone(load_weights(os.fspath(weights), arch, which), Path(dst), format, int8=int8, **options)


def _one_of(known: Iterable[str], **given: str) -> None:
    """Raise UsageError for what is none of them."""
    if strange := [f"{name}={value!r}" for name, value in given.items() if value not in known]:
        raise UsageError(f"{strange[0]}: there are {', '.join(known)}")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _place(path: SomePath | None) -> Any:
    """An address of a server stays the text that it is: pathlib would take one of the two slashes."""
    if path == "":
        raise UsageError("the path is empty")
    return path if path is None or "://" in os.fspath(path) else Path(path)
