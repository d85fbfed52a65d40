"""``fastssl evaluate semi``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.common import SomePath, finite
from fastssl.cli.evaluate.common import options
from fastssl.cli.evaluate.tuning import AFTER, BEFORE, fine_tune, labels_option

if TYPE_CHECKING:
    import numpy as np

    from fastssl.evaluate.photos import LabelledSplit

#: Published epochs: 60 for 1 % of the labels, 30 for 10 %. The border between them is ours.
FEW, EPOCHS_FEW, EPOCHS_MORE = 0.05, 60, 30


@click.command()
@options(*BEFORE, labels_option)
@click.option(
    "--list",
    "list_path",
    type=SomePath(),
    metavar="FILE",
    help="Instead of a draw: the photos that keep their label, one a line, as SimCLR or SSLight publish them, or "
    "positions in --data.",
)
@click.option(
    "--photos",
    type=SomePath(),
    metavar="DIR|TAR",
    help="What --data was converted from: the photos of a --list are then looked up by name.",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Default: 60 up to 5 % of the labels, 30 beyond.")
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    default=0.03,
    show_default=True,
    callback=finite,
    help="Learning rate for 256 photos a step; grows with the batch.",
)
@options(*AFTER)
def semi(
    labels: float | None, list_path: Path | None, photos: Path | None, epochs: int | None, lr: float, **how: Any
) -> None:
    """Fine-tune the whole network with a few of the labels, as the field reports it for 1 % and 10 % of ImageNet.

    SGD with Nesterov momentum 0.9, no weight decay, half a cosine to 1e-6 that changes once an epoch; random crops and
    flips. SSLight's published figures are those with --head dino, --batch-size 1024 and the published lists, of the
    best epoch.

    \b
    fastssl evaluate semi runs/mine --data train.beton --val val.beton --labels 1%
    fastssl evaluate semi runs/mine --data train.beton --val val.beton --list 1percent.txt \\
        --photos imagenet/train --head dino
    """
    from fastssl.evaluate.features import ProbeError
    from fastssl.evaluate.few_labels import draw_labels, listed_labels
    from fastssl.evaluate.finetune import SSLIGHT_OPTIM
    from fastssl.evaluate.photos import require_labels

    if (labels is None) == (list_path is None):
        raise click.UsageError("say which photos keep their label: --labels 1% for a draw, or --list FILE")
    if photos is not None and list_path is None:
        raise click.UsageError("--photos says where the names of a --list are looked up; a draw reads none")
    if list_path is not None and how["val"] is None:
        # A fifth that is held out could hold photos of the list.
        raise ProbeError(f"{list_path}: a list goes with photos of their own to judge on; give them with --val")

    def pick(split: LabelledSplit) -> tuple[np.ndarray, dict[str, Any]]:
        if list_path is not None:
            chosen = listed_labels(list_path, split.train, photos)
            return chosen, {"labels": len(chosen) / len(split.train_index), "list": list_path.name}
        assert labels is not None
        drawn = draw_labels(require_labels(split.train)[split.train_index], labels, how["seed"])
        return split.train_index[drawn], {"labels": labels, "list": None}

    fine_tune(
        "semi",
        pick=pick,
        epochs=lambda share: epochs or (EPOCHS_FEW if share <= FEW else EPOCHS_MORE),
        optim=dataclasses.replace(SSLIGHT_OPTIM, lr=lr),
        **how,
    )
