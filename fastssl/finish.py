"""After the last step: the probe, the summary, the pictures, the report."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from fastssl.evaluate.batchnorm import has_batchnorm, reestimated
from fastssl.evaluate.features import Features
from fastssl.evaluate.raw_pixels import raw_pixel_features
from fastssl.files import write_atomically
from fastssl.json_text import to_json
from fastssl.probe import ProbeSplit, choose_split, probe_features
from fastssl.report.page import write_report
from fastssl.report.pictures import neighbours_picture, views_picture
from fastssl.step import initial_backbone
from fastssl.versions import describe_host, describe_versions

if TYPE_CHECKING:
    from fastssl.train import Run

RAW = "raw pixels (16x16)"
RANDOM = "random initialisation"
TRAINED = "after pre-training"
TEACHER = "its teacher"
REESTIMATED = ", BatchNorm statistics of centre crops"


def finish_run(run: Run, started: float) -> dict[str, Any]:
    """Probe the network beside the two marks that cost nothing, and write the rest of the run's folder.

    Returns:
        what ``summary.json`` holds.
    """
    run.progress.note("probing: the trained network, the same network before training, raw pixels")
    probe = run.recipe.probe
    split = choose_split(run.reader, run.val, probe.final_samples, run.options.seed)
    features = _all_features(run, split)
    rows = [probe_features(name, *parts, split.labelled) for name, parts in features.items()]
    summary = {
        **_identity(run),
        **_throughput(run, time.monotonic() - started),
        "probe": {
            "note": _probe_note(split),
            "train_samples": len(split.bank_index),
            "val_samples": len(split.query_index),
            "classes": split.classes,
            "rows": rows if split.labelled else [],
        },
        "share": _share(run),
        "next_mark": _next_mark(run, rows) if split.labelled else None,
        "skipped": len(run.position.skipped),
        "passed_over_steps": run.position.passed_over,
    }
    text = to_json(summary, indent=2) + "\n"
    write_atomically(run.out / "summary.json", lambda path: path.write_text(text))
    views_picture(run.reader, run.recipe.views, run.out / "views.png", seed=run.options.seed)
    neighbours_picture(split, before=features[RANDOM], after=features[TRAINED], out=run.out / "neighbours.png")
    write_report(run.out)
    return summary


def _all_features(run: Run, split: ProbeSplit) -> dict[str, tuple[Features, Features]]:
    """(bank, queries) of raw pixels, of the network as it was before the first step, of the trained one, and of the forms of it that the recipe names."""
    options, probe = run.extraction, run.recipe.probe
    raw = tuple(
        raw_pixel_features(reader, indices=index, **{name: options[name] for name in ("workers", "crop", "on_bad")})
        for reader, index in ((split.bank, split.bank_index), (split.queries, split.query_index))
    )
    networks = {RANDOM: initial_backbone(run.recipe, run.options.seed).to(run.device), TRAINED: run.backbone}
    if probe.teacher and run.step.method.teacher is not None:
        networks[TEACHER] = run.step.method.teacher.backbone
    if probe.reestimate_bn and has_batchnorm(run.backbone):
        for name in (TRAINED, TEACHER):
            if name in networks:
                networks[name + REESTIMATED] = reestimated(
                    networks[name], run.reader, samples=probe.reestimate_bn, size=probe.size, seed=run.options.seed, **options
                )
    return {RAW: raw, **{name: split.features(network, probe.size, **options) for name, network in networks.items()}}


def _identity(run: Run) -> dict[str, Any]:
    return {
        "arch": run.config["arch"],
        "recipe": run.options.recipe_name,
        "data": {
            "name": run.options.data.name,
            "samples": len(run.reader),
            "classes": len(run.reader.classes) if run.reader.classes else None,
            "val_name": run.options.val.name if run.options.val else None,
        },
        "device": run.device.type,
        "fallbacks": run.step.fallbacks,
        "host": describe_host(),
        "versions": describe_versions(),
        "git": run.git,
        "epochs": run.recipe.train.epochs,
        "steps": run.total_steps,
        "samples_seen": run.total_steps * run.batch_size,
    }


def _throughput(run: Run, total_seconds: float) -> dict[str, Any]:
    """Rates over all training steps; the first block (warm-up of libraries and caches) is left out where there are more."""
    wanted = ("step", "seconds", "data_wait")
    rows = [
        row
        for row in run.folder.metrics.rows()
        if row.get("kind") == "step" and all(type(row.get(name)) in (int, float) and math.isfinite(row[name]) for name in wanted)
    ]
    if not rows:  # resumed from a checkpoint whose metrics are gone
        unknown = dict.fromkeys(("pair_per_s", "view_per_s", "data_wait"))
        return {
            "train_seconds": run.position.train_seconds,
            "total_seconds": total_seconds,
            **unknown,
            "bottleneck": "unknown: no metrics of this run are left",
        }
    steady = rows[1:] or rows
    # Blocks have different lengths: a rate is pairs over seconds, not a mean of rates.
    seconds = pairs = waited = 0.0
    before = rows[0] if len(rows) > 1 else {"step": 0, "seconds": 0.0}
    for row in steady:
        duration = max(row["seconds"] - before["seconds"], 1e-9)
        seconds += duration
        pairs += (row["step"] - before["step"]) * run.batch_size
        waited += row["data_wait"] * duration
        before = row
    views = sum(spec.count for spec in run.recipe.views)
    wait = waited / seconds
    return {
        "train_seconds": run.position.train_seconds,
        "total_seconds": total_seconds,
        "pair_per_s": pairs / seconds,
        "view_per_s": views * pairs / seconds,
        "data_wait": wait,
        "bottleneck": _bottleneck(wait),
    }


def _bottleneck(wait: float) -> str:
    if wait >= 0.05:
        return f"data-bound: the network stood waiting for photos {100 * wait:.0f} % of the time"
    return f"compute-bound: the network waited for photos {100 * wait:.1f} % of the time; a faster loader would win no more than that"


def _probe_note(split: ProbeSplit) -> str:
    if not split.labelled:
        return "the photos have no labels (or one class), so kNN and linear probes were left out; neighbours.png shows what the network finds alike"
    if split.held_out:
        where = "a held-out fifth of the probed photos (pre-training saw them too, without labels)"
    elif split.queries.path.samefile(split.bank.path):
        where = f"{split.queries.path.name}, the very photos it was fitted on: these figures say nothing"
    else:
        where = f"{split.queries.path.name}, which pre-training never saw"
    return f"kNN (k 20, T 0.07) and the fast linear probe (logistic regression on cached centre-crop features), judged on {where}"


def _share(run: Run) -> dict[str, Any] | None:
    full = run.recipe.full_samples
    if not full:
        return None
    seen = run.total_steps * run.batch_size
    percent = 100 * seen / full
    return {
        "samples_seen": seen,
        "full_samples": full,
        "percent": percent,
        "full_recipe": run.recipe.full_recipe,
        "text": f"this run saw {seen:,} photos: {percent:.2g} % of the {full:,} of {run.recipe.full_recipe} on ImageNet-1k, at {run.recipe.views[0].size} px",
    }


def _next_mark(run: Run, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first mark that the trained network has not passed, and the recipe's command that does."""
    marks = {row["name"]: row for row in rows}
    trained = marks[TRAINED]["linear"]
    for name in (RANDOM, RAW):
        if trained <= marks[name]["linear"]:
            if run.recipe.next_mark is None:
                return None
            return {"name": name, "command": run.recipe.next_mark.command, "note": run.recipe.next_mark.note}
    return None
