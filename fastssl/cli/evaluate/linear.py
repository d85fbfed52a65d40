"""``fastssl evaluate linear``."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.common import finite, progress_bar
from fastssl.cli.evaluate.common import (
    FEATURE_OPTIONS,
    feature_batch_option,
    finish,
    network,
    options,
    percent,
    share_features,
    split_features,
)

if TYPE_CHECKING:
    from fastssl.evaluate.photos import LabelledSplit
    from fastssl.evaluate.protocols import LinearProtocol, Trial
    from fastssl.evaluate.session import Session

#: fastssl.evaluate.protocols.PROTOCOLS, written out: that module loads torch, which --help should not wait for.
PROTOCOLS = ("light-moco", "light-moco-lars", "sslight", "sslight-vit")
#: Photos a pass of the network where the batch size is the classifier's, or is not given.
_PASS = 256
#: Share of the training photos that --select held-out keeps from the training.
_HELD_OUT = 0.1


def _all_finite(ctx: click.Context, param: click.Parameter, values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(finite(ctx, param, value) for value in values)


@click.command()
@options(*(option for option in FEATURE_OPTIONS if option is not feature_batch_option))
@click.option(
    "--protocol",
    type=click.Choice(["fast", *PROTOCOLS]),
    default="fast",
    show_default=True,
    help="fast: logistic regression on features of one centre crop, to compare networks with each other. The others: published ones, SGD on random crops.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help=f"Of all processes together; the rate is scaled linearly. Default: the protocol's. Of `fast`: photos a pass of the network ({_PASS}).",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Default: the protocol's. Steps of its rate move with it.")
@click.option(
    "--lr",
    "lrs",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    callback=_all_finite,
    help="Rate per 256 photos. May be repeated: all are trained at once, the first is the headline. Default: the protocol's.",
)
@click.option(
    "--weight-decay",
    "decays",
    type=click.FloatRange(min=0),
    multiple=True,
    callback=_all_finite,
    help="May be repeated, likewise; every rate goes with every decay. Default: the protocol's, 0.",
)
@click.option(
    "--sweep", is_flag=True, help="Also 0.01, 0.03, 0.1, 0.3, 3 and 10 times the protocol's rate: the best one depends on the network."
)
@click.option(
    "--select",
    type=click.Choice(["val", "held-out"]),
    default=None,
    help="What the best epoch and the best of a grid are chosen on: the validation photos (as papers do), "
    f"or {100 * _HELD_OUT:.0f} % of the training photos, which are then not trained on. Default: val.",
)
@click.option(
    "--cached-epochs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Keep the features of the views of N epochs (float32, on the host) and go round them. Default: fresh views every epoch.",
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

    The default, `fast`, solves a logistic regression on cached features of one centre crop: no rate, no schedule, seconds. It compares networks with each
    other; published figures come from the other protocols, which train with SGD or LARS on random crops for 90 to 100 epochs.

    \b
    fastssl evaluate linear runs/mine --data train.beton --val val.beton --json linear.json
    fastssl evaluate linear runs/mine --data train.beton --val val.beton --protocol sslight --sweep --json linear.json
    """
    training = {
        "--epochs": epochs,
        "--lr": lrs,
        "--weight-decay": decays,
        "--sweep": sweep,
        "--select": select,
        "--cached-epochs": cached_epochs,
    }
    if protocol == "fast" and (given := [name for name, value in training.items() if value]):
        raise click.UsageError(f"{given[0]} belongs to a protocol that trains: --protocol {', '.join(PROTOCOLS)}")
    if sweep and lrs:
        raise click.UsageError("--sweep goes around the protocol's rate: give either --lr or --sweep")

    from fastssl.evaluate.photos import open_split
    from fastssl.evaluate.session import open_session

    with (
        open_session(checkpoint, which=which, device=device) as session,
        open_split(data, val, seed=how["seed"], workers=how["workers"]) as split,
    ):
        if protocol == "fast":
            line, figures = _fast(session, split, batch_size=batch_size or _PASS, **how)
        else:
            from fastssl.evaluate.protocols import PROTOCOLS as known
            from fastssl.evaluate.protocols import trials

            chosen = known[protocol]
            line, figures = _trained(
                session,
                split,
                chosen,
                trials(chosen, lrs, decays, sweep=sweep),
                epochs=epochs or chosen.epochs,
                batch_size=batch_size or chosen.batch_size,
                select=(select or "val").replace("-", "_"),
                cached_epochs=cached_epochs or 0,
                **how,
            )
        about = {**split.record(), **{name: how[name] for name in ("size", "crop", "reestimate_bn")}}
        finish(session, line, session.record("linear", **about, **figures), json_path)


def _fast(session: Session, split: LabelledSplit, **how: Any) -> tuple[str, dict[str, Any]]:
    """(what is said, what the record holds)."""
    from fastssl.evaluate.features import gathered
    from fastssl.evaluate.linear import linear_probe

    train, judged = map(gathered, split_features(session, split, **how))
    result = linear_probe(train, judged, device=session.device)
    line = (
        f"fast linear probe (cached features, L2 {result.l2:g}): {percent(result.accuracy, result.confidence)} of {result.val_samples:,} photos, "
        f"{result.classes} classes, {result.train_samples:,} photos to learn from"
    )
    return line, {"protocol": "fast", **asdict(result)}


def _trained(
    session: Session,
    split: LabelledSplit,
    protocol: LinearProtocol,
    grid: list[Trial],
    *,
    epochs: int,
    batch_size: int,
    select: str,
    cached_epochs: int,
    **how: Any,
) -> tuple[str, dict[str, Any]]:
    """(what is said, what the record holds) of a protocol that trains."""
    import torch

    from fastssl.evaluate.class_tokens import ClassTokens
    from fastssl.evaluate.feature_stream import FeatureStream
    from fastssl.evaluate.features import ProbeError, check_shared_input, split_indices
    from fastssl.evaluate.sgd_linear import Classifiers, Judged, summary, train_classifiers

    classes = len(split.classes)
    if classes < 2:
        raise ProbeError(f"{split.train.path}: the training photos are of one class only; a linear probe needs at least two")
    backbone = network(session, split.train, **how)
    if protocol.class_tokens:
        backbone = ClassTokens(backbone, protocol.class_tokens)
    learned, sets = split.train_index, {"val": (split.val, split.val_index)}
    if select == "held_out":
        kept, held_out = split_indices(split.train.labels[learned], len(learned), fraction=_HELD_OUT, seed=how["seed"])
        learned, sets["held_out"] = learned[kept], (split.train, learned[held_out])
    amp = session.device.type == "cuda"
    # Opened first: a batch that does not fit is said before any photo is read.
    with FeatureStream(
        backbone,
        split.train,
        learned,
        torch.from_numpy(split.targets(split.train.labels)),
        protocol.view(how["size"]),
        batch_size=batch_size,
        device=session.device,
        seed=how["seed"],
        workers=how["workers"],
        amp=amp,
        # As many as there are, or more, and none would be read again.
        cached_epochs=cached_epochs if cached_epochs < epochs else 0,
    ) as stream:
        judged = {}
        for name, (reader, index) in sets.items():
            view = {"size": how["size"], "crop": how["crop"], "interpolation": protocol.interpolation}
            label = {"val": "validation photos", "held_out": "held-out photos"}[name]
            found = share_features(session, backbone, label, reader, index, batch_size=_PASS, workers=how["workers"], amp=amp, **view)
            check_shared_input(found, found)
            targets = torch.from_numpy(split.targets(found.labels.numpy()))
            judged[name] = Judged(found.features.to(session.device), targets.to(session.device), len(index))
        width = judged["val"].features.shape[1]
        classifiers = Classifiers(protocol, grid, width, classes, device=session.device, seed=how["seed"])
        done = 0
        with progress_bar("training views", epochs * stream.steps * batch_size) if session.is_main else nullcontext() as advance:

            def count() -> None:
                nonlocal done
                done += batch_size
                if advance is not None:
                    advance(done)

            curves = train_classifiers(
                classifiers,
                protocol,
                grid,
                lambda epoch: stream.epoch(epoch, count),
                judged,
                epochs=epochs,
                batch_size=batch_size,
            )
    figures = summary(curves, grid, classes, choose_on=select)
    used = {"lr": grid[0].lr, "weight_decay": grid[0].weight_decay, "epochs": epochs, "batch_size": batch_size}
    changed = [name for name, value in used.items() if value != getattr(protocol, name)]
    changed += [name for name, usual in (("size", 224), ("crop", 0.875), ("reestimate_bn", None)) if how[name] != usual]
    changed += ["cached_epochs"] * (0 < cached_epochs < epochs) + ["select"] * (select != "val")
    record = {
        **protocol.record(),
        **used,
        "steps_per_epoch": stream.steps,
        "changed": changed,
        "cached_epochs": cached_epochs if cached_epochs < epochs else 0,
        "cache_dtype": "float32" if 0 < cached_epochs < epochs else None,
        "features": width,
        "train_samples": len(learned),
        "val_samples": judged["val"].total,
        "classes": classes,
        **figures,
    }
    return _line(record), record


def _line(record: dict[str, Any]) -> str:
    """What is said: the headline, and below it what was chosen, and on what."""

    def top(prefix: str = "") -> str:
        top5 = record[f"{prefix}top5_accuracy"]
        return percent(record[f"{prefix}accuracy"], record[f"{prefix}confidence"]) + ("" if top5 is None else f", top-5 {top5:.2f} %")

    changed = f"; not as published: {', '.join(record['changed'])}" if record["changed"] else ""
    lines = [
        f"linear probe, {record['protocol']} ({record['optimizer'].upper()}, lr {record['lr']:g} per 256, batch {record['batch_size']}, "
        f"{record['epochs']} epochs{changed}): {top()} of {record['val_samples']:,} photos, {record['classes']} classes, "
        f"{record['train_samples']:,} photos to learn from",
        f"  best epoch ({record['best_epoch']}), chosen on the {record['chosen_on']}: {top('best_')}",
    ]
    if len(record["grid"]) > 1:
        lines.append(
            f"  best of {len(record['grid'])} (lr {record['chosen_lr']:g}, weight decay {record['chosen_weight_decay']:g}), "
            f"chosen on the {record['chosen_on']}: {top('chosen_')}"
        )
    return "\n".join(lines)
