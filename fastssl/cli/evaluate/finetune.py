"""``fastssl evaluate finetune``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from fastssl.cli.common import finite
from fastssl.cli.evaluate.common import options
from fastssl.cli.evaluate.tuning import AFTER, BEFORE, fine_tune, labels_option

if TYPE_CHECKING:
    import numpy as np

    from fastssl.evaluate.photos import LabelledSplit

#: (learning rate for 256 photos, weight decay) by optimiser: ours, of no paper.
DEFAULTS = {"sgd": (0.03, 0.0), "adamw": (5e-4, 0.05)}


@click.command()
@options(*BEFORE, labels_option)
@click.option("--epochs", type=click.IntRange(min=1), default=100, show_default=True)
@click.option(
    "--optimizer",
    type=click.Choice(list(DEFAULTS)),
    default="sgd",
    show_default=True,
    help="sgd: Nesterov momentum 0.9. adamw: for vision transformers.",
)
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    callback=finite,
    help="Learning rate for 256 photos a step; grows with the batch. Default: 0.03 (AdamW: 0.0005).",
)
@click.option(
    "--weight-decay",
    type=click.FloatRange(min=0),
    callback=finite,
    help="On all weights but biases and norms. Default: 0 (AdamW: 0.05).",
)
@options(*AFTER)
def finetune(
    labels: float | None,
    epochs: int,
    optimizer: Literal["sgd", "adamw"],
    weight_decay: float | None,
    lr: float | None,
    **how: Any,
) -> None:
    """Fine-tune the whole network on a labelled data set, as a rule another one than it was pre-trained on.

    Half a cosine to 1e-6 that changes once an epoch; random crops and flips. With --from-scratch the same network
    begins with random weights: the difference is what pre-training is worth. The frozen half of a transfer is `fastssl
    evaluate linear` on the same photos.

    \b
    fastssl evaluate finetune runs/mine --data flowers/train --val flowers/test --json finetune.json
    fastssl evaluate finetune runs/mine --data flowers/train --val flowers/test --from-scratch
    """
    from fastssl.evaluate.few_labels import draw_labels
    from fastssl.evaluate.photos import require_labels
    from fastssl.optim.optimizers import OptimConfig

    default_lr, default_decay = DEFAULTS[optimizer]

    def pick(split: LabelledSplit) -> tuple[np.ndarray, dict[str, Any]]:
        if labels is None:
            return split.train_index, {"labels": 1.0}
        drawn = draw_labels(require_labels(split.train)[split.train_index], labels, how["seed"])
        return split.train_index[drawn], {"labels": labels}

    fine_tune(
        "finetune",
        pick=pick,
        epochs=lambda share: epochs,
        optim=OptimConfig(
            name=optimizer,
            lr=default_lr if lr is None else lr,
            nesterov=optimizer == "sgd",
            weight_decay=default_decay if weight_decay is None else weight_decay,
            decay_1d=False,
            final_lr=1e-6,
            per_epoch=True,
        ),
        **how,
    )
