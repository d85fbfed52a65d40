"""``fastssl evaluate``: how good a checkpoint's features are. One module for each command."""

from __future__ import annotations

import click

from fastssl.cli.lazy import LazyCommand, LazyGroup

EVALUATIONS = {
    "knn": LazyCommand("fastssl.cli.evaluate.knn", "knn", "Nearest neighbours vote; nothing is trained."),
    "linear": LazyCommand("fastssl.cli.evaluate.linear", "linear", "A linear classifier on frozen features."),
    "detect": LazyCommand("fastssl.cli.evaluate.detect", "detect", "Object detection, fine-tuned; with --masks instance segmentation."),
}


@click.group(cls=LazyGroup, lazy=EVALUATIONS)
def evaluate() -> None:
    """What a checkpoint is worth, by labelled photos.

    \b
    fastssl evaluate linear runs/mine --data train.beton --val val.beton
    """
