"""``fastssl evaluate linear``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fastssl.cli.evaluate.common import FEATURE_OPTIONS, finish, options, percent, split_features


@click.command()
@options(*FEATURE_OPTIONS)
def linear(checkpoint: Path, which: str | None, data: Path, val: Path | None, device: str, json_path: str | None, **how: Any) -> None:
    """Fast linear probe: logistic regression on cached features of one centre crop.

    It compares networks with each other. Published figures come from another protocol (SGD on random crops).

    \b
    fastssl evaluate linear runs/mine --data train.beton --val val.beton --json linear.json
    """
    from fastssl.evaluate.features import gathered
    from fastssl.evaluate.linear import linear_probe
    from fastssl.evaluate.photos import open_split
    from fastssl.evaluate.session import open_session

    with (
        open_session(checkpoint, which=which, device=device) as session,
        open_split(data, val, seed=how["seed"], workers=how["workers"]) as split,
    ):
        train, judged = map(gathered, split_features(session, split, **how))
        result = linear_probe(train, judged, device=session.device)
        line = f"fast linear probe (cached features, L2 {result.l2:g}): {percent(result.accuracy, result.confidence)} of {result.val_samples:,} photos"
        about = {**split.record(), **{name: how[name] for name in ("size", "crop", "reestimate_bn")}}
        finish(
            session,
            f"{line}, {result.classes} classes, {result.train_samples:,} photos to learn from",
            session.record("linear", **about, **asdict(result)),
            json_path,
        )
