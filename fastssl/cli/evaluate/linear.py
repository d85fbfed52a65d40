"""``fastssl evaluate linear``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.common import finite
from fastssl.cli.evaluate.common import (
    FEATURE_OPTIONS,
    bar,
    feature_batch_option,
    finish,
    network,
    options,
    percent,
    pictures,
    split_features,
)
from fastssl.errors import counted

if TYPE_CHECKING:
    from fastssl.evaluate.photos import LabelledSplit
    from fastssl.evaluate.session import Session

#: fastssl.evaluate.protocols.PROTOCOLS, written out: that module loads torch, which --help should not wait for.
_PROTOCOLS = ("light-moco", "light-moco-lars", "sslight", "sslight-vit")
#: Photos a pass of the network, of the fast probe.
_PASS = 256


@click.command()
@options(*(option for option in FEATURE_OPTIONS if option is not feature_batch_option))
@click.option(
    "--protocol",
    type=click.Choice(["fast", *_PROTOCOLS]),
    default="fast",
    show_default=True,
    help="fast: logistic regression on features of one centre crop, to compare networks with each other. The "
    "others: published ones, SGD on random crops.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Of all processes together; the rate is scaled linearly. Default: the protocol's. Of `fast`: photos a "
    f"pass of the network ({_PASS}).",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Default: the protocol's. Steps of its rate move with it.")
@click.option(
    "--lr",
    "lrs",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    callback=finite,
    help="Rate per 256 photos. May be repeated: all are trained at once, the first is the headline. Default: the "
    "protocol's.",
)
@click.option(
    "--weight-decay",
    "decays",
    type=click.FloatRange(min=0),
    multiple=True,
    callback=finite,
    help="May be repeated, likewise; every rate goes with every decay. Default: the protocol's, 0.",
)
@click.option(
    "--sweep",
    is_flag=True,
    help="Also 0.01, 0.03, 0.1, 0.3, 3 and 10 times the protocol's rate: the best one depends on the network.",
)
@click.option(
    "--select",
    type=click.Choice(["val", "held-out"]),
    default=None,
    help="What the best epoch and the best of a grid are chosen on: the validation photos (as papers do), "
    "or 10 % of the training photos, which are then not trained on. Default: val.",
)
@click.option(
    "--cached-epochs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Keep the features of the views of N epochs (float32, on the host) and go round them. Default: fresh views "
    "every epoch.",
)
def linear(
    checkpoint: Path,
    which: str | None,
    data: Path,
    val: Path | None,
    device: str,
    protocol: str,
    batch_size: int | None,
    json_path: str | None,
    epochs: int | None,
    lrs: tuple[float, ...],
    decays: tuple[float, ...],
    sweep: bool,
    select: str | None,
    cached_epochs: int | None,
    **how: Any,
) -> None:
    """Linear probe: a linear classifier on frozen features.

    The default, `fast`, solves a logistic regression on cached features of one centre crop: no rate, no schedule,
    seconds. It compares networks with each other; published figures come from the other protocols, which train with SGD
    or LARS on random crops for 90 to 100 epochs.

    \b
    fastssl evaluate linear runs/mine --data train.beton --val val.beton --json linear.json
    fastssl evaluate linear runs/mine --data train.beton --val val.beton --protocol sslight --sweep --json linear.json
    """
    training = {"--epochs": epochs, "--lr": lrs, "--weight-decay": decays, "--sweep": sweep, "--select": select}
    training["--cached-epochs"] = cached_epochs
    if protocol == "fast" and (given := [name for name, value in training.items() if value]):
        raise click.UsageError(f"{given[0]} belongs to a protocol that trains: --protocol {', '.join(_PROTOCOLS)}")
    if sweep and lrs:
        raise click.UsageError("--sweep goes around the protocol's rate: give either --lr or --sweep")

    from fastssl.evaluate.photos import open_split
    from fastssl.evaluate.session import open_session

    with (
        open_session(checkpoint, which=which, device=device) as session,
        open_split(data, val, seed=how["seed"], workers=how["workers"]) as split,
    ):
        how |= pictures(session, how["size"], how["crop"])
        if protocol == "fast":
            line, figures = _fast(session, split, batch_size=batch_size or _PASS, **how)
        else:
            grid = {"lrs": lrs, "weight_decays": decays, "sweep": sweep}
            chosen: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "cached_epochs": cached_epochs or 0}
            chosen["choose_on"] = (select or "val").replace("-", "_")
            line, figures = _published(session, split, protocol, grid, chosen, **how)
        about = {**split.record(), **{name: how[name] for name in ("size", "crop", "reestimate_bn")}}
        finish(session, line, session.record("linear", **about, **figures), json_path)


def _fast(session: Session, split: LabelledSplit, **how: Any) -> tuple[str, dict[str, Any]]:
    """(what is said, what the record holds)."""
    from fastssl.evaluate.features import gathered
    from fastssl.evaluate.linear import linear_probe

    train, judged = map(gathered, split_features(session, split, **how))
    result = linear_probe(train, judged, device=session.device)
    photos = counted(result.val_samples, "photo")
    line = (
        f"fast linear probe (cached features, L2 {result.l2:g}): "
        f"{percent(result.accuracy, result.confidence)} of {photos}, "
        f"{counted(result.classes, 'class')}, {counted(result.train_samples, 'photo')} to learn from, {how['size']} px"
    )
    return line, {"protocol": "fast", **asdict(result)}


def _published(
    session: Session, split: LabelledSplit, protocol: str, grid: dict[str, Any], chosen: dict[str, Any], **how: Any
) -> tuple[str, dict[str, Any]]:
    """(what is said, what the record holds) of a protocol that trains."""
    from fastssl.evaluate.protocols import PROTOCOLS, trials
    from fastssl.evaluate.published_probe import ProbeOptions, published_probe

    options = ProbeOptions(**chosen, **{name: how[name] for name in ("size", "crop", "seed", "workers")})
    numbers = PROTOCOLS[protocol]
    figures = published_probe(
        network(session, split.train, split.train_index, batch_size=_PASS, **how),
        split,
        numbers,
        trials(numbers, **grid),
        options,
        device=session.device,
        bar=bar(session),
    )
    if how["reestimate_bn"]:
        figures["changed"].append("reestimate_bn")
    return _line(figures, how["size"]), figures


def _line(record: dict[str, Any], size: int) -> str:
    """What is said: the headline, and below it what was chosen, and on what."""

    def top(prefix: str = "") -> str:
        top5 = record[f"{prefix}top5_accuracy"]
        return percent(record[f"{prefix}accuracy"], record[f"{prefix}confidence"]) + (
            "" if top5 is None else f", top-5 {top5:.2f} %"
        )

    changed = f"; not as published: {', '.join(record['changed'])}" if record["changed"] else ""
    photos = counted(record["val_samples"], "photo")
    lines = [
        f"linear probe, {record['protocol']} ({record['optimizer'].upper()}, lr {record['lr']:g} per 256, "
        f"batch {record['batch_size']}, "
        f"{counted(record['epochs'], 'epoch')}{changed}): {top()} of {photos}, {counted(record['classes'], 'class')}, "
        f"{counted(record['train_samples'], 'photo')} to learn from, {size} px",
        f"  best epoch ({record['best_epoch']}), chosen on the {record['chosen_on']}: {top('best_')}",
    ]
    if len(record["grid"]) > 1:
        end = "; its rate is an end of the grid: better ones may lie beyond (--lr)" if record["chosen_at_edge"] else ""
        lines.append(
            f"  best of {len(record['grid'])} (lr {record['chosen_lr']:g}, weight decay "
            f"{record['chosen_weight_decay']:g}), chosen on the {record['chosen_on']}: {top('chosen_')}{end}"
        )
    return "\n".join(lines)
