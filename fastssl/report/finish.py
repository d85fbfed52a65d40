"""After the last step: the probe, the summary, the pictures, the report."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastssl.evaluate import collapse as monitor
from fastssl.evaluate.batchnorm import has_batchnorm, reestimated
from fastssl.evaluate.features import Features
from fastssl.evaluate.online_probe import ProbeSplit, choose_split, probe_features
from fastssl.evaluate.references import colour_histogram_features, raw_pixel_features
from fastssl.report.page import write_report
from fastssl.report.pictures import neighbours_picture, views_picture
from fastssl.report.run_record import AS_IT_CAME, COLOURS, MAJORITY, RANDOM, RAW, TRAINED, number
from fastssl.report.verdict import Evidence, judge
from fastssl.training.bottleneck import WORTH, bottleneck, smaller_side
from fastssl.training.networks import initial_backbone
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.json_text import to_json
from fastssl.utils.versions import describe_host, describe_versions

if TYPE_CHECKING:
    from fastssl.training.setup import Setup

TEACHER = "its teacher"
REESTIMATED = ", BatchNorm statistics of centre crops"


def finish_run(run: Setup, started: float) -> dict[str, Any]:
    """Probe the network beside the marks that cost nothing, give the verdict, and write the rest of the run's folder;
    returns what ``summary.json`` holds.
    """
    probe = run.recipe.probe
    split = choose_split(run.reader, run.val, probe.final_samples, run.options.seed)
    features = _all_features(run, split)
    rows: list[dict[str, Any]] = []
    if split.labelled:
        rows = [*_majority(split), *(probe_features(name, *parts, True) for name, parts in features.items())]
    # Of some photos, evenly from all: whether the network has collapsed.
    some = torch.cat([part.features for part in features[TRAINED]])
    some = some[:: -(-len(some) // 2000)]
    collapse = {"feature_std": float(monitor.feature_std(some)), "effective_rank": float(monitor.effective_rank(some))}
    collapse["photos"] = len(some)
    evidence = Evidence(
        rows=rows if split.can_judge else [],
        judged=len(split.query_index),
        epochs=run.recipe.train.epochs,
        steps=_rows(run, "step"),
        probes=_rows(run, "probe"),
        online_judged=run.online_judged,
        features=collapse,
    )
    options, classes = run.options, run.reader.classes
    data = {"name": run.reader.path.name, "samples": len(run.reader), "classes": len(classes) if classes else None}
    summary = {
        "command": options.command,
        "arch": run.config["arch"],
        "recipe": options.recipe_name,
        "init_from": run.config["init_from"],
        "data": {**data, "val_name": options.val.name if options.val else None},
        "device": run.device.type,
        "fallbacks": run.step.fallbacks,
        "accumulate": run.step.parts.count,
        "switches": run.step.switches,
        "host": describe_host(),
        "versions": describe_versions(),
        "git": run.git,
        "epochs": run.recipe.train.epochs,
        "steps": run.length.total_steps,
        "samples_seen": run.length.total_steps * run.recipe.train.batch_size,
        **_throughput(run, time.monotonic() - started),
        "probe": {
            "note": _probe_note(split),
            "train_samples": len(split.bank_index),
            "val_samples": len(split.query_index),
            "classes": split.classes,
            "rows": rows,
        },
        "features": collapse,
        "verdict": judge(evidence),
        "share": _share(run),
        "skipped": len(run.position.skipped),
        "passed_over_steps": run.position.passed_over,
    }
    text = to_json(summary, indent=2) + "\n"
    write_atomically(options.out / "summary.json", lambda path: path.write_text(text))
    views_picture(run.reader, run.recipe.views, options.out / "views.png", seed=options.seed)
    first = AS_IT_CAME if AS_IT_CAME in features else RANDOM
    before, after = (_without_holes(features[name]) for name in (first, TRAINED))
    neighbours_picture(split, before=before, after=after, out=options.out / "neighbours.png", first=first)
    write_report(options.out)
    return summary


def _rows(run: Setup, kind: str) -> list[dict[str, Any]]:
    return [row for row in run.rows if row.get("kind") == kind]


def _all_features(run: Setup, split: ProbeSplit) -> dict[str, tuple[Features, Features]]:
    """(bank, queries) of raw pixels and colours, of a random network and of the one that the run began with, of the
    trained one, and of the forms of it that the recipe names.
    """
    options, probe = run.extraction, run.recipe.probe
    shared = {name: options[name] for name in ("workers", "crop", "on_bad")}
    parts = (split.bank, split.bank_index), (split.queries, split.query_index)
    found: dict[str, tuple[Features, Features]] = {}
    for name, function in ((f"{RAW} (16x16)", raw_pixel_features), (COLOURS, colour_histogram_features)):
        bank, queries = (function(reader, indices=index, **shared) for reader, index in parts)
        found[name] = bank, queries
    networks, others = {RANDOM: initial_backbone(run.recipe, run.options.seed).to(run.device)}, dict[str, Any]()
    if (init := run.options.init) is not None:
        networks[AS_IT_CAME] = init.backbone.to(run.device)
        others[AS_IT_CAME] = {"normalisation": init.normalisation}  # also where the views have another
    networks[TRAINED] = run.backbone
    if probe.teacher and (teacher := run.step.method.teacher) is not None:
        networks[TEACHER] = teacher.backbone
    if probe.reestimate_bn and has_batchnorm(run.backbone):
        estimate = partial(reestimated, data=run.reader, samples=probe.reestimate_bn, size=probe.size)
        for name in (name for name in (TRAINED, TEACHER) if name in networks):
            networks[name + REESTIMATED] = estimate(networks[name], seed=run.options.seed, **options)
    how = {name: {**options, **others.get(name, {})} for name in networks}
    return found | {name: split.features(network, probe.size, **how[name]) for name, network in networks.items()}


def _throughput(run: Setup, total_seconds: float) -> dict[str, Any]:
    """Rates over all training steps; the first block (warm-up of libraries and caches) is left out where there are
    more.
    """
    times = {"train_seconds": run.position.train_seconds, "total_seconds": total_seconds}
    wanted = ("step", "seconds", "data_wait")
    rows = [row for row in _rows(run, "step") if None not in (number(row.get(name)) for name in wanted)]
    if not rows:  # resumed from a checkpoint whose metrics are gone
        unknown = dict.fromkeys(("pair_per_s", "view_per_s", "data_wait", "data_share"))
        return {**times, **unknown, "bottleneck": "unknown: no metrics of this run are left"}
    before = rows[0] if len(rows) > 1 else {"step": 0, "seconds": 0.0}
    steady = rows[1:] or rows
    # Blocks have different lengths: a rate is pairs over seconds, not a mean of rates.
    seconds = np.maximum(np.diff([row["seconds"] for row in (before, *steady)]), 1e-9)
    pair_per_s = (steady[-1]["step"] - before["step"]) * run.recipe.train.batch_size / float(seconds.sum())
    wait = float(np.average([row["data_wait"] for row in steady], weights=seconds))
    # Older rows have the wait alone.
    share = float(np.average([row.get("data_share", row["data_wait"]) for row in steady], weights=seconds))
    return {
        **times,
        "pair_per_s": pair_per_s,
        "view_per_s": pair_per_s * sum(spec.count for spec in run.recipe.views),
        "data_wait": wait,
        "data_share": share,
        "bottleneck": _bottleneck(run, share, wait),
    }


def _bottleneck(run: Setup, share: float, wait: float) -> str:
    text = f"{bottleneck(share)}; the network waited for photos {100 * wait:.1f} % of the time"
    if share < WORTH:
        return f"{text}; a faster loader would win no more than that share"
    if run.device.type == "cpu":
        text += ", decoding beside it on the same cores made it slower"
    side = smaller_side(run.reader, run.recipe.views)
    smaller = f"photos converted with --short-side {side} decode faster, show less; " if side is not None else ""
    return f"{text}; {smaller}`fastssl bench train` says what would help, and tries it"


def _probe_note(split: ProbeSplit) -> str:
    if not split.labelled:
        left_out = "so kNN and linear probes were left out; neighbours.png shows what the network finds alike"
        return f"{split.obstacle}, {left_out}"
    where = split.queries.path.name
    if split.held_out and split.seen:
        where = "a held-out fifth of the probed photos (pre-training saw them too, without labels)"
    elif split.can_judge or split.held_out:
        where = f"{'a held-out fifth of ' * split.held_out}{where}, which pre-training never saw"
    else:
        where += ", the very photos it was fitted on: these figures say nothing"
    probes = "kNN (k 20, T 0.07) and the fast linear probe (logistic regression on cached centre-crop features)"
    return f"{probes}, judged on {where}"


def _share(run: Setup) -> dict[str, Any] | None:
    full, name = run.recipe.full_samples, run.recipe.full_recipe
    if not full:
        return None
    seen = run.length.total_steps * run.recipe.train.batch_size
    percent, size = 100 * seen / full, run.recipe.views[0].size
    text = f"this run saw {seen:,} photos: {percent:.2g} % of the {full:,} of {name} on ImageNet-1k, at {size} px"
    return {"samples_seen": seen, "full_samples": full, "percent": percent, "full_recipe": name, "text": text}


def _majority(split: ProbeSplit) -> list[dict[str, Any]]:
    """What a constant answer gets, the bank's most frequent class; where that is half as large again as it would be if
    all were equal, or more.
    """
    known, counts = np.unique(split.bank.labels_of(split.bank_index), return_counts=True)
    if counts.max() * len(known) < 1.5 * counts.sum():
        return []
    asked = split.queries.labels_of(split.query_index)
    share = 100 * float((asked == known[counts.argmax()]).mean())
    return [{"name": MAJORITY, "knn": share, "linear": share}]


def _without_holes(parts: tuple[Features, Features]) -> tuple[Features, Features]:
    """For the pictures: numbers that are not finite are 0."""
    bank, queries = (replace(part, features=part.features.nan_to_num(posinf=0.0, neginf=0.0)) for part in parts)
    return bank, queries
