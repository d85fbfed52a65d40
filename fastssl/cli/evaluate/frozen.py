"""``fastssl evaluate knn`` and ``linear``: what the features of a frozen network are worth."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.evaluate import common
from fastssl.cli.evaluate.common import COUNT, NOT_NEGATIVE, POSITIVE, choice, option, options, percent, photos_of
from fastssl.errors import counted

if TYPE_CHECKING:
    from fastssl.evaluate.features import Features
    from fastssl.evaluate.photos import LabelledSplit
    from fastssl.evaluate.session import Session

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
    from fastssl.evaluate.knn import knn_accuracies
    from fastssl.evaluate.protocols import KNN_PROTOCOLS, Pictures, differing
    from fastssl.evaluate.session import open_session

    asked = SimpleNamespace(**values)
    k, temperature = KNN_PROTOCOLS[asked.protocol]
    asked.ks, asked.temperature = asked.ks or (k,), asked.temperature or temperature
    with open_session(asked.checkpoint, which=asked.which, device=asked.device) as session:
        vars(asked).update(common.pictures(session, asked))
        bank, judged, photos = _bank_and_judged(session, asked)
        search: dict[str, Any] = {"ks": asked.ks, "temperature": asked.temperature, "device": session.device}
        results = knn_accuracies(bank, judged, leave_one_out=asked.leave_one_out, shared=True, **search)
        evaluation, kind, among = (
            ("knn_leave_one_out", "leave-one-out kNN, not comparable with kNN", "among them")
            if asked.leave_one_out
            else ("knn", "kNN", None)
        )
        names = {vote: name for name, vote in KNN_PROTOCOLS.items()}
        usual = {**asdict(Pictures()), "reestimate_bn": None}
        lines, records = [], []
        for found in map(asdict, results):
            vote = f"k {found['k']}, T {found['temperature']:g}"
            lines.append(f"{kind} ({vote}): {percent(found)} of {photos_of(found, asked.size, among)}")
            used = {**photos, **_pictures(asked), "bfloat16": False, **found}
            used |= {"protocol": names.get((found["k"], found["temperature"])), "changed": differing(used, usual)}
            records.append(session.record(evaluation, **used))
        common.finish(session, "\n".join(lines), records, asked.json_path)


def _bank_and_judged(session: Session, asked: SimpleNamespace) -> tuple[Features, Features, dict[str, Any]]:
    """This process's share of the bank, all that is judged (for leave-one-out the bank), and what a record says of the
    photos.
    """
    import numpy as np

    from fastssl.evaluate.features import gathered
    from fastssl.evaluate.photos import open_photos, open_split, require_classes, require_labels, scaled_to

    if not asked.leave_one_out:
        with open_split(asked.data, asked.val, seed=asked.seed, workers=asked.workers) as split:
            require_classes(split.classes, split.train, "photos that vote", "kNN")
            bank, judged = common.split_features(session, asked, split)
            return bank, gathered(judged), split.record()
    with (
        open_photos(asked.data, asked.workers) as train,
        open_photos(asked.val, asked.workers, "val") if asked.val else nullcontext(train) as reader,
    ):
        require_classes(np.unique(require_labels(reader)), reader, "photos that vote", "kNN")
        backbone = common.network(session, asked, train)
        bank = common.features_of(session, asked, backbone, "photos", reader, np.arange(len(reader)))
        read = train.path.name if reader is train or asked.reestimate_bn else None
        names = {"data": read, "val": asked.val and reader.path.name, "held_out_seed": None}
        return bank, gathered(bank), {**names, **dict.fromkeys(("scaled_to", "val_scaled_to"), scaled_to(reader))}


def _pictures(asked: SimpleNamespace) -> dict[str, Any]:
    """What a record says of them."""
    return {name: getattr(asked, name) for name in ("size", "crop", "reestimate_bn")}


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
    asked = SimpleNamespace(**values)
    training = ("epochs", "lr", "weight_decay", "sweep", "select", "cached_epochs")
    if asked.protocol == "fast" and (given := [name for name in training if values[name]]):
        name = given[0].replace("_", "-")
        raise click.UsageError(f"--{name} belongs to a protocol that trains: --protocol {', '.join(_PROTOCOLS)}")
    if asked.sweep and asked.lr:
        raise click.UsageError("--sweep goes around the protocol's rate: give either --lr or --sweep")

    from fastssl.evaluate.photos import open_split
    from fastssl.evaluate.session import open_session

    with (
        open_session(asked.checkpoint, which=asked.which, device=asked.device) as session,
        open_split(asked.data, asked.val, seed=asked.seed, workers=asked.workers) as split,
    ):
        vars(asked).update(common.pictures(session, asked))
        line, figures = (_fast if asked.protocol == "fast" else _published)(session, asked, split)
        record = session.record("linear", **{**split.record(), **_pictures(asked), **figures})
        common.finish(session, line, record, asked.json_path)


def _fast(session: Session, asked: SimpleNamespace, split: LabelledSplit) -> tuple[str, dict[str, Any]]:
    """(what is said, what the record holds)."""
    from fastssl.evaluate.features import gathered
    from fastssl.evaluate.linear import linear_probe

    asked.batch_size = asked.batch_size or _PASS
    train, judged = map(gathered, common.split_features(session, asked, split))
    found = asdict(linear_probe(train, judged, device=session.device))
    line = f"fast linear probe (cached features, L2 {found['l2']:g}): {percent(found)} of "
    return line + photos_of(found, asked.size), {"protocol": "fast", **found}


def _published(session: Session, asked: SimpleNamespace, split: LabelledSplit) -> tuple[str, dict[str, Any]]:
    """The same of a protocol that trains: the headline, and below it what was chosen, and on what."""
    from fastssl.evaluate.protocols import PROTOCOLS, trials
    from fastssl.evaluate.published_probe import published_probe

    protocol = PROTOCOLS[asked.protocol]
    grid = trials(protocol, asked.lr, asked.weight_decay, sweep=asked.sweep)
    names = (*common.OF_FEATURES, "epochs", "cached_epochs", "reestimate_bn", "seed")
    chosen = {name: value for name in names if (value := getattr(asked, name)) is not None}
    chosen["choose_on"] = (asked.select or "val").replace("-", "_")
    asked.batch_size = _PASS  # of what is left
    backbone = common.network(session, asked, split.train, split.train_index)
    chosen |= {"device": session.device, "bar": common.bar(session)}
    found = published_probe(backbone, split, protocol, grid, **chosen)
    changed = f"; not as published: {', '.join(found['changed'])}" if found["changed"] else ""
    steps = f"lr {found['lr']:g} per 256, batch {found['batch_size']}, {counted(found['epochs'], 'epoch')}{changed}"
    lines = [
        f"linear probe, {found['protocol']} ({found['optimizer'].upper()}, {steps}): {percent(found)} of "
        + photos_of(found, asked.size),
        f"  best epoch ({found['best_epoch']}), chosen on the {found['chosen_on']}: {percent(found, 'best_')}",
    ]
    if len(grid) > 1:
        end = "; its rate is an end of the grid: better ones may lie beyond (--lr)" if found["chosen_at_edge"] else ""
        trial = f"lr {found['chosen_lr']:g}, weight decay {found['chosen_weight_decay']:g}"
        lines.append(
            f"  best of {len(grid)} ({trial}), chosen on the {found['chosen_on']}: {percent(found, 'chosen_')}{end}"
        )
    return "\n".join(lines), found
