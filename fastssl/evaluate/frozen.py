"""What the features of a frozen network are worth, from photos to records: kNN and the linear probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn

from fastssl.errors import UsageError, counted
from fastssl.evaluate import features, photos
from fastssl.evaluate.batchnorm import reestimated
from fastssl.evaluate.features import Bar, Features
from fastssl.evaluate.knn import knn_accuracies
from fastssl.evaluate.linear import linear_probe
from fastssl.evaluate.protocols import KNN_PROTOCOLS, PROTOCOLS, Pictures, differing, trials
from fastssl.evaluate.published_probe import published_probe
from fastssl.evaluate.session import Session
from fastssl.pipelines.beton.reader import BetonReader

_OF_FEATURES = ("size", "crop", "normalisation", "batch_size", "workers")
#: Photos a pass of the network, where nothing else is asked for.
PASS = 256
#: Options of the linear protocols that train.
TRAINING = ("epochs", "lr", "weight_decay", "sweep", "select", "cached_epochs")


class Frozen:
    """The frozen network of ``session``, judged as is ``asked``: by the options of ``fastssl evaluate knn`` or
    ``linear``, under their names in Python. ``bar`` shows how far it is; ``say`` is told where the pictures are others
    than the run's.
    """

    def __init__(self, session: Session, asked: SimpleNamespace, bar: Bar, say: Callable[[str], None]):
        self.session, self.asked, self.bar = session, asked, bar
        vars(asked).update(pictures(session, asked, say))

    def knn(self) -> tuple[str, list[dict[str, Any]]]:
        """What is said, and a record for each number of neighbours."""
        asked, session = self.asked, self.session
        k, temperature = KNN_PROTOCOLS[asked.protocol]
        ks, temperature = asked.ks or (k,), asked.temperature or temperature
        bank, judged, of_photos = self._bank_and_judged()
        search: dict[str, Any] = {"ks": ks, "temperature": temperature, "device": session.device}
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
            used = {**of_photos, **self._pictures(), "bfloat16": False, **found}
            used |= {"protocol": names.get((found["k"], found["temperature"])), "changed": differing(used, usual)}
            records.append(session.record(evaluation, **used))
        return "\n".join(lines), records

    def linear(self) -> tuple[str, dict[str, Any]]:
        """What is said, and the record."""
        asked = self.asked
        with photos.open_split(asked.data, asked.val, seed=asked.seed, workers=asked.workers) as split:
            line, figures = (self._fast if asked.protocol == "fast" else self._published)(split)
            return line, self.session.record("linear", **{**split.record(), **self._pictures(), **figures})

    def _bank_and_judged(self) -> tuple[Features, Features, dict[str, Any]]:
        """This process's share of the bank, all that is judged (for leave-one-out the bank), and what a record says of
        the photos.
        """
        asked = self.asked
        if not asked.leave_one_out:
            with photos.open_split(asked.data, asked.val, seed=asked.seed, workers=asked.workers) as split:
                photos.require_classes(split.classes, split.train, "photos that vote", "kNN")
                bank, judged = self._split_features(split)
                return bank, features.gathered(judged), split.record()
        with (
            photos.open_photos(asked.data, asked.workers) as train,
            photos.open_photos(asked.val, asked.workers, "val") if asked.val else nullcontext(train) as reader,
        ):
            photos.require_classes(np.unique(photos.require_labels(reader)), reader, "photos that vote", "kNN")
            bank = self._features(self._network(train), "photos", reader, np.arange(len(reader)))
            read = train.path.name if reader is train or asked.reestimate_bn else None
            names = {"data": read, "val": asked.val and reader.path.name, "held_out_seed": None}
            names |= dict.fromkeys(("scaled_to", "val_scaled_to"), photos.scaled_to(reader))
            return bank, features.gathered(bank), names

    def _fast(self, split: photos.LabelledSplit) -> tuple[str, dict[str, Any]]:
        """(what is said, what the record holds)."""
        self.asked.batch_size = self.asked.batch_size or PASS
        train, judged = map(features.gathered, self._split_features(split))
        found = asdict(linear_probe(train, judged, device=self.session.device))
        line = f"fast linear probe (cached features, L2 {found['l2']:g}): {percent(found)} of "
        return line + photos_of(found, self.asked.size), {"protocol": "fast", **found}

    def _published(self, split: photos.LabelledSplit) -> tuple[str, dict[str, Any]]:
        """The same of a protocol that trains: the headline, and below it what was chosen, and on what."""
        asked, protocol = self.asked, PROTOCOLS[self.asked.protocol]
        grid = trials(protocol, asked.lr or (), asked.weight_decay or (), sweep=bool(asked.sweep))
        names = (*_OF_FEATURES, "epochs", "cached_epochs", "reestimate_bn", "seed")
        chosen = {name: value for name in names if (value := getattr(asked, name)) is not None}
        chosen["choose_on"] = (asked.select or "val").replace("-", "_")
        asked.batch_size = PASS  # of what is left
        backbone = self._network(split.train, split.train_index)
        chosen |= {"device": self.session.device, "bar": self.bar}
        found = published_probe(backbone, split, protocol, grid, **chosen)
        changed = f"; not as published: {', '.join(found['changed'])}" if found["changed"] else ""
        steps = f"lr {found['lr']:g} per 256, batch {found['batch_size']}, {counted(found['epochs'], 'epoch')}{changed}"
        lines = [
            f"linear probe, {found['protocol']} ({found['optimizer'].upper()}, {steps}): {percent(found)} of "
            + photos_of(found, asked.size),
            f"  best epoch ({found['best_epoch']}), chosen on the {found['chosen_on']}: {percent(found, 'best_')}",
        ]
        if len(grid) > 1:
            edge = (
                "; its rate is an end of the grid: better ones may lie beyond (--lr)" if found["chosen_at_edge"] else ""
            )
            trial = f"lr {found['chosen_lr']:g}, weight decay {found['chosen_weight_decay']:g}"
            chosen_on = f"chosen on the {found['chosen_on']}"
            lines.append(f"  best of {len(grid)} ({trial}), {chosen_on}: {percent(found, 'chosen_')}{edge}")
        return "\n".join(lines), found

    def _network(self, reader: BetonReader, indices: np.ndarray | None = None) -> nn.Module:
        """The session's; if that is asked for, with BatchNorm statistics of these photos (see ``reestimated``)."""
        asked, device, backbone = self.asked, self.session.device, self.session.trained.backbone
        features.require_size(backbone, asked.size, device)
        if not asked.reestimate_bn:
            return backbone
        how = {name: getattr(asked, name) for name in (*_OF_FEATURES, "seed")}
        return reestimated(backbone, reader, samples=asked.reestimate_bn, device=device, indices=indices, **how)

    def _features(self, backbone: nn.Module, label: str, reader: BetonReader, index: np.ndarray) -> Features:
        """This process's share of the features of the samples ``index``."""
        how = {name: getattr(self.asked, name) for name in _OF_FEATURES}
        return features.share_features(backbone, reader, index, label, self.bar, device=self.session.device, **how)

    def _split_features(self, split: photos.LabelledSplit) -> tuple[Features, Features]:
        """``_features`` of both parts."""
        backbone = self._network(split.train, split.train_index)
        bank = self._features(backbone, "training photos", split.train, split.train_index)
        return bank, self._features(backbone, "validation photos", split.val, split.val_index)

    def _pictures(self) -> dict[str, Any]:
        """What a record says of them."""
        return {name: getattr(self.asked, name) for name in ("size", "crop", "reestimate_bn")}


def require_linear(asked: SimpleNamespace) -> None:
    """Raise UsageError, before anything is loaded, for options of ``linear`` that do not go together."""
    if given := [name for name in TRAINING if asked.protocol == "fast" and getattr(asked, name)]:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option} belongs to a protocol that trains: --protocol {', '.join(PROTOCOLS)}")
    if asked.sweep and asked.lr:
        raise UsageError("--sweep goes around the protocol's rate: give either --lr or --sweep")
    if asked.protocol not in ("fast", *PROTOCOLS):
        raise UsageError(f"no protocol {asked.protocol!r}; there are fast, {', '.join(PROTOCOLS)}")


def pictures(session: Session, asked: SimpleNamespace, say: Callable[[str], None]) -> dict[str, Any]:
    """``size`` and ``crop`` of the pictures: as asked for, which is said where the run's differ, or the run's, or the
    usual ones; and the network's ``normalisation``.
    """
    found: dict[str, Any] = {"normalisation": session.trained.normalisation}
    for name, usual in (("size", features.EVALUATION_SIZE), ("crop", features.EVALUATION_CROP)):
        wanted, own = getattr(asked, name), getattr(session.trained, name)
        if session.is_main and (said := session.trained.differs(name, wanted)):
            say(said)
        found[name] = wanted or own or usual
    return found


def percent(figures: Mapping[str, Any], prefix: str = "") -> str:
    """``68.30 % (95 %: 67.9 to 68.7), top-5 88.10 %``; without the end where there is no top-5."""
    low, high = figures[f"{prefix}confidence"]
    top5 = figures.get(f"{prefix}top5_accuracy")
    end = "" if top5 is None else f", top-5 {top5:.2f} %"
    return f"{figures[f'{prefix}accuracy']:.2f} % (95 %: {low:.1f} to {high:.1f}){end}"


def photos_of(figures: Mapping[str, Any], size: int, learned: str | None = None) -> str:
    """``9 photos, 3 classes, 39 photos to learn from, 224 px``; ``learned`` in place of the photos to learn from."""
    learned = learned or f"{counted(figures['train_samples'], 'photo')} to learn from"
    judged, classes = counted(figures["val_samples"], "photo"), counted(figures["classes"], "class")
    return f"{judged}, {classes}, {learned}, {size} px"
