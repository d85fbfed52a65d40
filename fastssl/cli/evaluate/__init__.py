"""``fastssl evaluate``: how good a checkpoint's features are. One module for each command."""

from __future__ import annotations

import click

from fastssl.cli.lazy import LazyCommand, LazyGroup

EVALUATIONS = {
    "knn": LazyCommand("fastssl.cli.evaluate.knn", "knn", "Nearest neighbours vote; nothing is trained."),
    "linear": LazyCommand("fastssl.cli.evaluate.linear", "linear", "A linear classifier on frozen features."),
    "semi": LazyCommand("fastssl.cli.evaluate.semi", "semi", "The whole network fine-tuned with few of the labels."),
    "finetune": LazyCommand(
        "fastssl.cli.evaluate.finetune", "finetune", "The whole network fine-tuned on a data set of its own."
    ),
    "detect": LazyCommand(
        "fastssl.cli.evaluate.detect", "detect", "Object detection, fine-tuned; with --masks instance segmentation."
    ),
    "compare": LazyCommand("fastssl.cli.evaluate.compare", "compare", "Several evaluations side by side."),
}


@click.group(cls=LazyGroup, lazy=EVALUATIONS)
def evaluate() -> None:
    """What a checkpoint is worth, by labelled photos.

    \b
    fastssl evaluate linear runs/mine --data train.beton --val val.beton
    """
