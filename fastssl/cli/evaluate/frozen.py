"""``fastssl evaluate knn`` and ``linear``: what the features of a frozen network are worth."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import click

from fastssl.cli.evaluate import common
from fastssl.cli.evaluate.common import COUNT, NOT_NEGATIVE, POSITIVE, choice, option, options

#: fastssl.evaluate.protocols.PROTOCOLS, written out: that module loads torch, which --help should not wait for.
_PROTOCOLS = ("light-moco", "light-moco-lars", "moco", "sslight", "sslight-vit")
#: The same of KNN_PROTOCOLS.
_KNN_PROTOCOLS = ("dino", "light-moco", "light-moco-200", "wu")
#: Photos a pass of the network, where nothing else is asked for.
_PASS = 256


@click.command()
@options(*common.FEATURES_OF)
@option("--batch-size", "Photos a pass of the network.", default=_PASS, **COUNT)
@options(*common.FEATURES_BY)
@option("--protocol", "Whose number of neighbours and temperature.", default="dino", **choice(*_KNN_PROTOCOLS))
@option(
    "--k",
    "Neighbours that vote; repeated: a result for each. Default: protocol's.",
    variable="ks",
    multiple=True,
    **COUNT,
)
@option("--temperature", "Of the votes' weights. Default: protocol's.", **POSITIVE)
@option(
    "--leave-one-out",
    "A monitor, not comparable with kNN figures: within --val (without it --data), each photo judged by all the "
    "others.",
    is_flag=True,
)
def knn(**values: Any) -> None:
    """Weighted k-nearest-neighbour accuracy; nothing is trained.

    The photos of --data vote on those of --val.

    \b
    fastssl evaluate knn runs/mine --data train.beton --val val.beton --k 20 --k 200 --json knn.json
    """
    from fastssl.evaluate.frozen import Frozen
    from fastssl.weights.source import open_session

    asked = SimpleNamespace(**values)
    with open_session(asked.checkpoint, which=asked.which, arch=asked.arch, device=asked.device) as session:
        line, records = Frozen(session, asked, common.bar(session), common.tell).knn()
        common.finish(session, line, records, asked.json_path)


@click.command()
@options(*common.FEATURES_OF, *common.FEATURES_BY)
@option(
    "--protocol",
    "fast: logistic regression on features of one centre crop, to compare networks with each other. The others: "
    "published ones, SGD on random crops.",
    default="fast",
    **choice("fast", *_PROTOCOLS),
)
@option(
    "--batch-size",
    "Of all processes together; the rate is scaled linearly. Default: the protocol's. Of `fast`: photos a pass of the "
    f"network ({_PASS}).",
    **COUNT,
)
@option("--epochs", "Default: the protocol's. Steps of its rate move with it.", **COUNT)
@option(
    "--lr",
    "Rate per 256 photos. May be repeated: all are trained at once, the first is the headline. Default: the "
    "protocol's.",
    multiple=True,
    **POSITIVE,
)
@option(
    "--weight-decay",
    "May be repeated, likewise; every rate goes with every decay. Default: the protocol's, 0.",
    multiple=True,
    **NOT_NEGATIVE,
)
@option(
    "--sweep",
    "Also 0.01, 0.03, 0.1, 0.3, 3 and 10 times the protocol's rate: the best one depends on the network.",
    is_flag=True,
)
@option(
    "--select",
    "What the best epoch and the best of a grid are chosen on: the validation photos (as papers do), or 10 % of the "
    "training photos, which are then not trained on. Default: val.",
    **choice("val", "held-out"),
)
@option(
    "--cached-epochs",
    "Keep the features of the views of N epochs (float32, on the host) and go round them. Default: fresh views every "
    "epoch.",
    metavar="N",
    **COUNT,
)
def linear(**values: Any) -> None:
    """Linear probe: a linear classifier on frozen features.

    The default, `fast`, solves a logistic regression on cached features of one centre crop: no rate, no schedule,
    seconds. It compares networks with each other; published figures come from the other protocols, which train with SGD
    or LARS on random crops for 90 to 100 epochs.

    \b
    fastssl evaluate linear runs/mine --data train.beton --val val.beton --json linear.json
    fastssl evaluate linear runs/mine --data train.beton --val val.beton --protocol sslight --sweep --json linear.json
    """
    from fastssl.evaluate.frozen import Frozen, require_linear
    from fastssl.weights.source import open_session

    asked = SimpleNamespace(**values)
    require_linear(asked)
    with open_session(asked.checkpoint, which=asked.which, arch=asked.arch, device=asked.device) as session:
        line, record = Frozen(session, asked, common.bar(session), common.tell).linear()
        common.finish(session, line, record, asked.json_path)
