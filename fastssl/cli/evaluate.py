"""``fastssl evaluate``: how good a checkpoint's features are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from fastssl.cli.common import SomePath, finite, json_option, progress_bar, write_json

if TYPE_CHECKING:
    from fastssl.evaluate.features import Features
    from fastssl.pipelines.beton import BetonReader


@click.group()
def evaluate() -> None:
    """Probe the frozen features of a checkpoint with labelled photos.

    \b
    fastssl evaluate linear runs/mine/checkpoints/last.safetensors --data train.beton --val val.beton
    """


def _shared_options(command: Callable) -> Callable:
    for option in reversed(
        (
            click.argument("checkpoint", type=SomePath()),
            click.option("--data", required=True, type=SomePath(), metavar="FILE.beton", help="Labelled photos to learn from."),
            click.option(
                "--val",
                type=SomePath(),
                metavar="FILE.beton",
                help="Labelled photos to judge on. Default: a fifth of --data is held out, the same one every time.",
            ),
            click.option(
                "--size",
                type=click.IntRange(min=8),
                default=224,
                show_default=True,
                help="Pixels of the centre crop that the network sees.",
            ),
            click.option(
                "--crop", type=click.FloatRange(0.1, 1.0), default=0.875, show_default=True, help="Centre crop's share of the short side."
            ),
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
            click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True),
            click.option("--workers", type=click.IntRange(min=1), help="Decoding threads. Default: the cores this process may use."),
            click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the held-out fifth."),
            click.option(
                "--reestimate-bn",
                type=click.IntRange(min=2),
                metavar="N",
                help="First take the BatchNorm statistics anew from the centre crops of N photos of --data.",
            ),
            json_option,
        )
    ):
        command = option(command)
    return command


@evaluate.command()
@_shared_options
@click.option("--k", type=click.IntRange(min=1), default=20, show_default=True, help="Neighbours that vote.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=0.07,
    show_default=True,
    callback=finite,
    help="Of the votes' weights.",
)
def knn(k: int, temperature: float, json_path: str | None, **options: Any) -> None:
    """Weighted k-nearest-neighbour accuracy; nothing is trained.

    \b
    fastssl evaluate knn runs/mine/checkpoints/last.safetensors --data train.beton --val val.beton --json knn.json
    """
    from fastssl.evaluate.knn import knn_accuracy

    train, val, device, record = _extract(**options)
    result = knn_accuracy(train, val, k=k, temperature=temperature, device=device)
    _report("knn", f"kNN (k {result.k}, T {result.temperature:g})", asdict(result), record, json_path)


@evaluate.command()
@_shared_options
def linear(json_path: str | None, **options: Any) -> None:
    """Fast linear probe: logistic regression on cached features of one centre crop.

    It compares networks with each other. Published figures come from another protocol (SGD on random crops).

    \b
    fastssl evaluate linear runs/mine/checkpoints/last.safetensors --data train.beton --val val.beton --json linear.json
    """
    from fastssl.evaluate.linear import linear_probe

    train, val, device, record = _extract(**options)
    result = linear_probe(train, val, device=device)
    _report("linear", f"fast linear probe (cached features, L2 {result.l2:g})", asdict(result), record, json_path)


def _extract(
    checkpoint: Path,
    data: Path,
    val: Path | None,
    size: int,
    crop: float,
    device: str,
    batch_size: int,
    workers: int | None,
    seed: int,
    reestimate_bn: int | None,
) -> tuple[Features, Features, str, dict[str, Any]]:
    """Features of both parts, the device they were made on, and what the JSON record says of all this."""
    from contextlib import ExitStack

    from fastssl.backbones import load_backbone
    from fastssl.evaluate.batchnorm import reestimated
    from fastssl.evaluate.features import extract_features, split_indices
    from fastssl.pipelines.beton import BetonReader
    from fastssl.probe import require_same_classes
    from fastssl.train import choose_device

    started = time.monotonic()
    with ExitStack() as stack:
        train_reader = stack.enter_context(BetonReader(data))
        _require_labels(train_reader)
        if val is None:
            val_reader = train_reader
            train_index, val_index = split_indices(train_reader.labels, len(train_reader), seed=seed)
        else:
            val_reader = stack.enter_context(BetonReader(val))
            _require_labels(val_reader)
            require_same_classes(train_reader, val_reader)
            train_index, val_index = np.arange(len(train_reader)), np.arange(len(val_reader))
        chosen = choose_device(device)
        backbone = load_backbone(checkpoint).to(chosen)
        if reestimate_bn:
            how = {"samples": reestimate_bn, "size": size, "seed": seed, "batch_size": batch_size, "indices": train_index}
            backbone = reestimated(backbone, train_reader, device=chosen, workers=workers, crop=crop, **how)
        features = []
        for label, reader, index in (("training photos", train_reader, train_index), ("validation photos", val_reader, val_index)):
            with progress_bar(label, len(index)) as advance:
                features.append(
                    extract_features(
                        backbone,
                        reader,
                        size=size,
                        indices=index,
                        batch_size=batch_size,
                        device=chosen,
                        workers=workers,
                        crop=crop,
                        progress=advance,
                    )
                )
    record = {
        "checkpoint": str(checkpoint),
        "data": data.name,
        "val": val.name if val else None,
        "held_out_seed": None if val else seed,
        "size": size,
        "crop": crop,
        "reestimate_bn": reestimate_bn,
        "device": chosen.type,
        "extract_seconds": time.monotonic() - started,
    }
    return features[0], features[1], str(chosen), record


def _require_labels(reader: BetonReader) -> None:
    from fastssl.evaluate.features import ProbeError

    if reader.labels is None or (reader.labels < 0).any():
        raise ProbeError(f"{reader.path}: has no labels; convert a class/file folder tree to evaluate on")


def _report(kind: str, title: str, result: dict[str, Any], record: dict[str, Any], json_path: str | None) -> None:
    low, high = result["confidence"]
    line = (
        f"{title}: {result['accuracy']:.2f} % (95 %: {low:.1f} to {high:.1f}) of {result['val_samples']:,} photos, "
        f"{result['classes']} classes, {result['train_samples']:,} photos to learn from"
    )
    click.echo(line, err=json_path == "-")
    write_json(json_path, {"evaluation": kind, **record, **result})
