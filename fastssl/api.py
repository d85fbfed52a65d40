"""fastssl from Python: what the commands do, with what they write and without what they say.

Quiet: warnings come as Python's, notes by ``logging`` (``logging.getLogger("fastssl")``, level INFO). Whatever goes
wrong by the input's, the machine's or the caller's fault is a ``fastssl.FastSSLError`` that says what to do.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from torch import nn

import fastssl.pretrain as training
from fastssl.data.inputs import Wanted, choose_inputs
from fastssl.distributed.world import first_of_host_speaks, world_from_environment
from fastssl.errors import UsageError
from fastssl.evaluate.features import EVALUATION_CROP, EVALUATION_SIZE, Features, extract_features, silent
from fastssl.evaluate.frozen import PASS, Frozen, pictures
from fastssl.evaluate.photos import open_photos
from fastssl.evaluate.session import open_session
from fastssl.evaluate.trained import load_trained
from fastssl.evaluate.transform import Transform
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils.signals import StopRequest
from fastssl.weights.export import Exported, export_backbone

SomePath = str | os.PathLike[str]
Which = Literal["student", "teacher"]
#: Is told a line of metrics.jsonl with ``done`` and ``total``, the steps made and to be made.
OnRow = Callable[[dict[str, Any]], object]

_log = logging.getLogger("fastssl")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


@dataclass(frozen=True)
class RunResult:
    """A finished run. It stands for its folder wherever a path is wanted: ``fastssl.evaluate(run, ...)``.

    Attributes:
        out: the run's folder. summary: what its ``summary.json`` holds; empty in all processes but the first.
    """

    out: Path
    summary: dict[str, Any] = field(default_factory=dict, repr=False)

    def __fspath__(self) -> str:
        return os.fspath(self.out)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """``name``, ``knn`` and ``linear`` (percent) of the trained network and of what it is compared with."""
        return self.summary["probe"]["rows"] if self.summary else []

    @property
    def verdict(self) -> str:
        """What the report says first: whether it learned, in words."""
        return self.summary["verdict"]["text"] if self.summary else ""

    @property
    def report(self) -> Path:
        """A page to be looked at."""
        return self.out / "report.html"

    def backbone(self) -> nn.Module:
        """The trained network, see `load_backbone`."""
        return load_backbone(self)

    def teacher(self) -> nn.Module:
        """Its moving average. FastSSLError: the method has none (SwAV, SimCLR)."""
        return load_backbone(self, "teacher")


class _Told:
    """The progress of a run for those who call it."""

    def __init__(self, on_row: OnRow | None):
        self._on_row = on_row

    def row(self, row: dict[str, Any], done: int, total: int) -> None:
        if self._on_row is not None:
            self._on_row({**row, "done": done, "total": total})

    def message(self, text: str) -> None:
        _warn(text)

    def note(self, text: str) -> None:
        _log.info(text)


def pretrain(
    data: SomePath | None = None,
    *,
    arch: str | None = None,
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
    progress: OnRow | None = None,
    stop: StopRequest | None = None,
    **overrides: Any,
) -> RunResult:
    """Pre-train a backbone without labels: ``fastssl pretrain``, with the same choices, folder and report.

    Args:
        data, val, arch, recipe, out, epochs, ..., check: as `fastssl pretrain --help` says. Without ``data`` the sample
            photos. The same call goes on from where a run in ``out`` was stopped.
        progress: is told how it goes, some 50 steps at a time.
        stop: ``stop.set()`` in another thread, or in ``progress``, saves and ends the run.
        overrides: values of the recipe: ``**{"optim.lr": 0.1, "views.0.size": 64}``.

    Raises:
        Interrupted: by Ctrl-C or a notebook's stop button (in the main thread, which alone gets signals) or ``stop``,
            after a checkpoint was written. KeyboardInterrupt: before there was anything to save.
        FastSSLError: what was asked for cannot be done; the message says what to change.
    """
    places = {"data": data, "val": val}
    wanted = Wanted(
        arch=arch,
        recipe_name=recipe,
        overrides=overrides,
        epochs=epochs,
        batch_size=batch_size,
        pipeline=pipeline,
        device=device,
        workers=workers,
        **{name: None if path is None else _place(path) for name, path in places.items()},
    )
    with first_of_host_speaks():
        inputs = choose_inputs(wanted, world_from_environment().size, note=_log.info, warn=_warn)
    options = training.RunOptions(
        recipe_name=inputs.name,
        data=inputs.data,
        val=inputs.val,
        out=inputs.folder if out is None else Path(out),
        device=device,
        pipeline=pipeline,
        seed=seed,
        workers=workers,
        resume=resume,
        check=check,
    )
    return RunResult(options.out, training.pretrain(inputs.recipe, options, _Told(progress), stop) or {})


def evaluate(
    weights: SomePath,
    kind: Literal["knn", "linear"] = "knn",
    *,
    data: SomePath,
    val: SomePath | None = None,
    which: Which | None = None,
    size: int | None = None,
    crop: float | None = None,
    device: str = "auto",
    workers: int | None = None,
    seed: int = 0,
    protocol: str | None = None,
    batch_size: int | None = None,
    reestimate_bn: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What frozen features are worth, by labelled photos: ``fastssl evaluate knn`` or ``linear``.

    Args:
        weights: a run's folder or one of its files.
        data, val, ..., reestimate_bn: as `fastssl evaluate knn --help` says.
        options: of kNN ``k``, ``temperature``, ``leave_one_out``; of a linear protocol that trains ``epochs``, ``lr``
            and ``weight_decay`` (lists of numbers), ``sweep``, ``select``, ``cached_epochs``.

    Returns:
        the record that ``--json`` writes: ``accuracy``, ``confidence``, ... in percent.
    """
    known: dict[str, Any] = {"k": None, "temperature": None, "leave_one_out": False}
    if kind == "linear":
        known = {"epochs": None, "lr": (), "weight_decay": (), "sweep": False, "select": None, "cached_epochs": None}
    elif kind != "knn":
        raise UsageError(f"kind={kind!r}: knn or linear; for what fine-tunes there is the command, fastssl evaluate")
    protocol = protocol or ("fast" if kind == "linear" else "dino")
    if strange := sorted(options.keys() - known.keys()):
        raise UsageError(f"{strange[0]}: no such option of {kind}; there are {', '.join(known)}")
    if protocol == "fast" and options:
        raise UsageError(f"{next(iter(options))} belongs to a protocol that trains; fast is none")
    asked = SimpleNamespace(**known | options, **{"data": _place(data), "val": None if val is None else _place(val)})
    vars(asked).update(size=size, crop=crop, workers=workers, seed=seed, protocol=protocol, reestimate_bn=reestimate_bn)
    asked.batch_size = batch_size or (PASS if kind == "knn" else None)
    with open_session(os.fspath(weights), which=which, device=device) as session:
        frozen = Frozen(session, asked, silent, _warn)
        if kind == "linear":
            return frozen.linear()[1]
        asked.ks = (asked.k,) if asked.k else ()
        return frozen.knn()[1][0]


def embed(
    weights: SomePath,
    data: SomePath,
    *,
    which: Which | None = None,
    size: int | None = None,
    crop: float | None = None,
    device: str = "auto",
    workers: int | None = None,
) -> Features:
    """The features of all photos of ``data``, in their order; with labels where there are any. ``size``, ``crop``: of
    the centre crop, by default the run's own.
    """
    with open_session(os.fspath(weights), which=which, device=device) as session:
        seen = pictures(session, SimpleNamespace(size=size, crop=crop), _warn)
        with open_photos(_place(data), workers) as reader:
            return extract_features(session.trained.backbone, reader, device=session.device, workers=workers, **seen)


def export(
    weights: SomePath,
    destination: SomePath,
    format: str = "timm",
    *,
    which: Which | None = None,
    size: int | None = None,
) -> Exported:
    """Write the backbone for timm, torchvision or ONNX: ``fastssl export``, whose help says what is written and how it
    is checked.
    """
    return export_backbone(load_trained(os.fspath(weights), which), Path(destination), format, size=size)


def load_backbone(weights: SomePath, which: Which | None = None) -> nn.Module:
    """The backbone of a run's folder or of one of its files, as a timm module in evaluation mode, on the CPU.

    Raises:
        FastSSLError: no such file, not ours, or tensors missing, left over or of another kind.
    """
    return load_trained(os.fspath(weights), which).backbone


def transform(weights: SomePath, *, size: int | None = None, crop: float | None = None) -> Transform:
    """What makes of a photo what the network of a run is to see, see `Transform`; ``size`` and ``crop`` by default the
    run's own.
    """
    found = load_trained(os.fspath(weights))
    size, crop = size or found.size or EVALUATION_SIZE, crop or found.crop or EVALUATION_CROP
    return Transform(ViewSpec.evaluation(size, crop, found.normalisation))


def _place(path: SomePath) -> Path:
    """An address of a server stays the text that it is: pathlib would take one of the two slashes."""
    text = os.fspath(path)
    if not text:
        raise UsageError("the path is empty")
    return text if "://" in text else Path(text)  # type: ignore[return-value]
