"""The linear probe by a published protocol, from photos to figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fastssl.evaluate.class_tokens import ClassTokens
from fastssl.evaluate.feature_stream import FeatureStream
from fastssl.evaluate.features import (
    EVALUATION_CROP,
    Bar,
    ProbeError,
    check_shared_input,
    extract_features,
    shard,
    silent,
    split_indices,
)
from fastssl.evaluate.photos import LabelledSplit, require_labels
from fastssl.evaluate.protocols import LinearProtocol, Trial
from fastssl.evaluate.sgd_linear import Classifiers, Judged, summary, train_classifiers
from fastssl.pipelines.beton.reader import BetonReader

#: Photos a pass of the network, of the validation photos.
_PASS = 256
#: Share of the training photos that is kept from the training where the choice is made on them.
HELD_OUT = 0.1


@dataclass(frozen=True)
class ProbeOptions:
    """What may be chosen beside the protocol and the grid.

    Attributes:
        epochs, batch_size (of all processes together): None: the protocol's.
        choose_on: ``val`` or ``held_out``: what the best epoch and the best trial are chosen on: the photos that are
            judged, or a tenth of the training photos, which are then not trained on.
        cached_epochs: 0: fresh views every epoch; n: features of n epochs are kept, and gone round (see
            ``FeatureStream``).
        size: pixels of both views. crop: of the test view, its share of the short side.
        seed: of the order, the views, the classifiers' weights and what is held out.
        workers: decoding threads.
    """

    epochs: int | None = None
    batch_size: int | None = None
    choose_on: Literal["val", "held_out"] = "val"
    cached_epochs: int = 0
    size: int = 224
    crop: float = EVALUATION_CROP
    seed: int = 0
    workers: int | None = None


def published_probe(
    backbone: nn.Module,
    split: LabelledSplit,
    protocol: LinearProtocol,
    grid: list[Trial],
    options: ProbeOptions,
    *,
    device: torch.device,
    bar: Bar = silent,
) -> dict[str, Any]:
    """Train the grid's classifiers on the split's first part, judge them on the second after every epoch.

    Under several processes all must call this; each reads its share of the photos. On a GPU the network runs under
    autocast to bfloat16.

    Args:
        backbone: frozen, on ``device``. It is put into evaluation mode.
        grid: see ``protocols.trials``; its first is the headline.

    Returns:
        the record's values: the protocol's numbers, or those that were used in their place (``changed`` names them),
        sizes, and ``sgd_linear.summary``.

    Raises:
        FastSSLError: one class only, fewer photos than a batch, a network that the protocol cannot read, features that
            are not finite.
    """
    classes = len(split.classes)
    if classes < 2:
        raise ProbeError(
            f"{split.train.path}: the training photos are of one class only; a linear probe needs at least two"
        )
    network = ClassTokens(backbone, protocol.class_tokens) if protocol.class_tokens else backbone
    epochs, batch_size = options.epochs or protocol.epochs, options.batch_size or protocol.batch_size
    # As many as there are, or more: none would be read again.
    cached = options.cached_epochs if options.cached_epochs < epochs else 0
    learned, labels = split.train_index, require_labels(split.train)
    sets = {"val": ("validation photos", split.val, split.val_index)}
    if options.choose_on == "held_out":
        kept, held_out = split_indices(labels[learned], len(learned), fraction=HELD_OUT, seed=options.seed)
        learned, sets["held_out"] = learned[kept], ("held-out photos", split.train, learned[held_out])
    how: dict[str, Any] = {"device": device, "workers": options.workers, "amp": device.type == "cuda"}
    targets = torch.from_numpy(split.targets(labels))
    view = protocol.view(options.size)
    # Opened first: a batch that does not fit is said before any photo is read.
    with FeatureStream(
        network,
        split.train,
        learned,
        targets,
        view,
        batch_size=batch_size,
        seed=options.seed,
        cached_epochs=cached,
        **how,
    ) as stream:
        how |= {"size": options.size, "crop": options.crop, "interpolation": protocol.interpolation}
        judged = {name: _judged(network, split, *part, bar, how) for name, part in sets.items()}
        width = judged["val"].features.shape[1]
        classifiers = Classifiers(protocol, grid, width, classes, device=device, seed=options.seed)
        with bar("training views", epochs * stream.steps * batch_size) as advance:

            def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
                for step, batch in enumerate(stream.epoch(epoch)):
                    advance((epoch * stream.steps + step + 1) * batch_size)
                    yield batch

            curves = train_classifiers(
                classifiers, protocol, grid, batches, judged, epochs=epochs, batch_size=batch_size
            )
    used = {**asdict(grid[0]), "epochs": epochs, "batch_size": batch_size}
    more = {"size": options.size, "crop": options.crop, "cached_epochs": cached, "choose_on": options.choose_on}
    changed = [name for name, value in used.items() if value != getattr(protocol, name)]
    return {
        **protocol.record(),
        **used,
        "changed": changed + [name for name, value in more.items() if value != getattr(ProbeOptions, name)],
        "steps_per_epoch": stream.steps,
        "cached_epochs": cached,
        "cache_dtype": "float32" if cached else None,
        "features": width,
        "train_samples": len(learned),
        "val_samples": len(split.val_index),
        "classes": classes,
        **summary(curves, grid, classes, choose_on=options.choose_on),
    }


def _judged(
    network: nn.Module,
    split: LabelledSplit,
    label: str,
    reader: BetonReader,
    index: np.ndarray,
    bar: Bar,
    how: dict[str, Any],
) -> Judged:
    """This process's share of the features of centre crops."""
    mine = shard(index)
    with bar(label, len(mine)) as advance:
        found = extract_features(network, reader, indices=mine, batch_size=_PASS, progress=advance, **how)
    check_shared_input(found, found)
    targets = torch.from_numpy(split.targets(found.labels.numpy()))
    return Judged(found.features.to(how["device"]), targets.to(how["device"]), len(index))
