"""``fastssl evaluate``: how good a checkpoint's features are."""

from __future__ import annotations

from pathlib import Path

import click

from fastssl.cli.common import SomePath
from fastssl.cli.lazy import LazyCommand, LazyGroup

EVALUATIONS = {
    "knn": LazyCommand("fastssl.cli.evaluate.frozen", "knn", "Nearest neighbours vote; nothing is trained."),
    "linear": LazyCommand("fastssl.cli.evaluate.frozen", "linear", "A linear classifier on frozen features."),
    "semi": LazyCommand("fastssl.cli.evaluate.tuning", "semi", "The whole network fine-tuned with few of the labels."),
    "finetune": LazyCommand(
        "fastssl.cli.evaluate.tuning", "finetune", "The whole network fine-tuned on a data set of its own."
    ),
    "detect": LazyCommand(
        "fastssl.cli.evaluate.detect", "detect", "Object detection, fine-tuned; with --masks instance segmentation."
    ),
    "compare": LazyCommand("fastssl.cli.evaluate", "compare", "Several evaluations side by side."),
}


@click.group(cls=LazyGroup, lazy=EVALUATIONS)
def evaluate() -> None:
    """What a checkpoint is worth, by labelled photos.

    \b
    fastssl evaluate linear runs/mine --data train.beton --val val.beton
    """


@click.command()
@click.argument("records", nargs=-1, required=True, type=SomePath(), metavar="RECORD.json...")
@click.option(
    "--out", type=SomePath(), required=True, metavar="DIR", help="Folder for evaluations.md and evaluations.html."
)
def compare(records: tuple[Path, ...], out: Path) -> None:
    """Put evaluations side by side: a row for each network, a column for each kind of figure.

    \b
    fastssl evaluate knn runs/a --data train.beton --val val.beton --json a.json
    fastssl evaluate knn runs/b --data train.beton --val val.beton --json b.json
    fastssl evaluate compare a.json b.json --out comparison
    """
    from fastssl.report.compare import comparison, read_evaluations, write_comparison
    from fastssl.report.document import to_markdown

    found = read_evaluations(records)
    paths = write_comparison(found, out)
    click.echo(to_markdown(comparison(found)))
    for path in paths:
        click.echo(path)
