"""``fastssl evaluate knn``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fastssl.cli.common import finite
from fastssl.cli.evaluate.common import FEATURE_OPTIONS, finish, options, percent, split_features


@click.command()
@options(*FEATURE_OPTIONS)
@click.option("--k", type=click.IntRange(min=1), default=20, show_default=True, help="Neighbours that vote.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=0.07,
    show_default=True,
    callback=finite,
    help="Of the votes' weights.",
)
def knn(
    checkpoint: Path,
    which: str | None,
    data: Path,
    val: Path | None,
    device: str,
    k: int,
    temperature: float,
    json_path: str | None,
    **how: Any,
) -> None:
    """Weighted k-nearest-neighbour accuracy; nothing is trained.

    \b
    fastssl evaluate knn runs/mine --data train.beton --val val.beton --json knn.json
    """
    from fastssl.evaluate.features import gathered
    from fastssl.evaluate.knn import knn_accuracy
    from fastssl.evaluate.photos import open_split
    from fastssl.evaluate.session import open_session

    with (
        open_session(checkpoint, which=which, device=device) as session,
        open_split(data, val, seed=how["seed"], workers=how["workers"]) as split,
    ):
        train, judged = map(gathered, split_features(session, split, **how))
        result = knn_accuracy(train, judged, k=k, temperature=temperature, device=session.device)
        line = (
            f"kNN (k {result.k}, T {result.temperature:g}): {percent(result.accuracy, result.confidence)} of {result.val_samples:,} photos"
        )
        about = {**split.record(), **{name: how[name] for name in ("size", "crop", "reestimate_bn")}}
        finish(
            session,
            f"{line}, {result.classes} classes, {result.train_samples:,} photos to learn from",
            session.record("knn", **about, **asdict(result)),
            json_path,
        )
