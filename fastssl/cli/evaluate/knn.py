"""``fastssl evaluate knn``."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.common import finite
from fastssl.cli.evaluate.common import (
    FEATURE_OPTIONS,
    finish,
    network,
    options,
    percent,
    pictures,
    share_features,
    split_features,
)
from fastssl.errors import counted

if TYPE_CHECKING:
    import numpy as np

    from fastssl.evaluate.features import Features
    from fastssl.evaluate.session import Session
    from fastssl.pipelines.beton.reader import BetonReader


@click.command()
@options(*FEATURE_OPTIONS)
@click.option(
    "--k",
    "ks",
    type=click.IntRange(min=1),
    multiple=True,
    default=(20,),
    show_default=True,
    help="Neighbours that vote. May be repeated: one search, a result for each.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=0.07,
    show_default=True,
    callback=finite,
    help="Of the votes' weights.",
)
@click.option(
    "--leave-one-out",
    is_flag=True,
    help="A monitor, not comparable with kNN figures: within --val (without it --data), each photo judged by all "
    "the others.",
)
def knn(
    checkpoint: Path,
    which: str | None,
    data: Path,
    val: Path | None,
    device: str,
    ks: tuple[int, ...],
    temperature: float,
    leave_one_out: bool,
    json_path: str | None,
    **how: Any,
) -> None:
    """Weighted k-nearest-neighbour accuracy; nothing is trained.

    The photos of --data vote on those of --val.

    \b
    fastssl evaluate knn runs/mine --data train.beton --val val.beton --k 20 --k 200 --json knn.json
    """
    from fastssl.evaluate.knn import knn_accuracies
    from fastssl.evaluate.session import open_session

    with open_session(checkpoint, which=which, device=device) as session:
        how |= pictures(session, how["size"], how["crop"])
        bank, judged, photos = (_one_set if leave_one_out else _two_sets)(session, data, val, **how)
        results = knn_accuracies(
            bank,
            judged,
            ks=list(dict.fromkeys(ks)),
            temperature=temperature,
            device=session.device,
            leave_one_out=leave_one_out,
            shared=True,
        )
        about = {**photos, **{name: how[name] for name in ("size", "crop", "reestimate_bn")}}
        lines, records = [], []
        for result in results:
            kind = "leave-one-out kNN, not comparable with kNN" if leave_one_out else "kNN"
            among = "among them" if leave_one_out else f"{counted(result.train_samples, 'photo')} to learn from"
            top5 = "" if result.top5_accuracy is None else f", top-5 {result.top5_accuracy:.2f} %"
            how_many = counted(result.val_samples, "photo")
            lines.append(
                f"{kind} (k {result.k}, T {result.temperature:g}): {percent(result.accuracy, result.confidence)}{top5} "
                f"of {how_many}, {counted(result.classes, 'class')}, {among}, {how['size']} px"
            )
            records.append(session.record("knn_leave_one_out" if leave_one_out else "knn", **about, **asdict(result)))
        finish(session, "\n".join(lines), records, json_path)


def _two_sets(session: Session, data: Path, val: Path | None, **how: Any) -> tuple[Features, Features, dict[str, Any]]:
    """This process's share of the bank, all that is judged, and what a record says of the photos."""
    from fastssl.evaluate.features import gathered
    from fastssl.evaluate.photos import open_split

    with open_split(data, val, seed=how["seed"], workers=how["workers"]) as split:
        _require_classes(split.classes, split.train)
        bank, judged = split_features(session, split, **how)
        return bank, gathered(judged), split.record()


def _one_set(session: Session, data: Path, val: Path | None, **how: Any) -> tuple[Features, Features, dict[str, Any]]:
    """The same for leave-one-out, where what is judged is the bank."""
    import numpy as np

    from fastssl.evaluate.features import gathered
    from fastssl.evaluate.photos import open_photos, require_labels

    with (
        open_photos(data, how["workers"]) as train,
        open_photos(val, how["workers"]) if val else nullcontext(train) as reader,
    ):
        _require_classes(np.unique(require_labels(reader)), reader)
        kept = {name: how[name] for name in ("size", "crop", "batch_size", "workers")}
        backbone = network(session, train, **how)
        bank = share_features(session, backbone, "photos", reader, np.arange(len(reader)), **kept)
        read = train.path.name if reader is train or how["reestimate_bn"] else None
        return bank, gathered(bank), {"data": read, "val": val and reader.path.name, "held_out_seed": None}


def _require_classes(classes: np.ndarray, reader: BetonReader) -> None:
    """Of one class alone every vote is right, which says nothing."""
    from fastssl.evaluate.features import ProbeError

    if len(classes) < 2:
        raise ProbeError(f"{reader.path}: the photos that vote are of one class only; kNN needs at least two")
