"""report.html: one self-contained page about one run. No script, no network, nothing outside the file."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from fastssl.errors import duration
from fastssl.report.document import render_template
from fastssl.report.run_record import MARKS, RAW, TRAINED, RunRecord, get, number, probe_rows, read_run
from fastssl.utils.atomic_files import write_atomically

_ARCH_NAMES = {
    "mobilenetv3_large": "MobileNet-V3-Large",
    "mobilenetv2": "MobileNet-V2",
    "efficientnet_b0": "EfficientNet-B0",
    "efficientnet_b1": "EfficientNet-B1",
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "vit_tiny": "ViT-Tiny",
}


def write_report(run_dir: str | Path) -> Path:
    """Write ``run_dir/report.html``, whole, from what the run has left so far, and return its path. Raises as
    :func:`read_run`.
    """
    run = read_run(run_dir)
    path = run.folder / "report.html"
    page = render(run)
    write_atomically(path, lambda temporary: temporary.write_text(page, "utf-8", "backslashreplace"))
    return path


def render(run: RunRecord) -> str:
    """The whole page as html."""
    name = get(run.summary, "data", "name") or run.config.get("data") or "photos"
    data = Path(str(name.get("name", "photos") if isinstance(name, dict) else name)).name
    return render_template(
        "run.html.j2",
        run=run,
        summary=run.summary,
        title=f"{_arch(run)} on {data}",
        headline=headline(run),
        facts=_facts(run),
        marks=_marks(run),
        curves=_curves(run),
        rates=_rates(run),
        not_finite=sum(number(row.get("loss")) is None for row in run.steps),
        views=run.picture("views.png"),
        neighbours=run.picture("neighbours.png"),
    )


def headline(run: RunRecord) -> str:
    """The result in one or two plain sentences, without markup: good or bad, as it is."""
    arch, marked = _arch(run), _rows(run)[0]
    if not run.summary:
        if not run.steps:
            return f"{arch}: this run has not logged a step yet."
        step, epoch, seconds = (number(run.steps[-1].get(key)) for key in ("step", "epoch", "seconds"))
        took = "" if seconds is None else f" after {duration(seconds)} of training"
        return f"{arch}: not finished. The last logged step is {step or 0:,.0f} (epoch {epoch or 0:.1f}){took}."
    samples, seconds = get(run.summary, "data", "samples"), number(run.summary.get("train_seconds"))
    what = f"{samples:,} photos" if isinstance(samples, int) else "photos"
    done = f"{arch} was trained on {what} without labels" + ("" if seconds is None else f" in {duration(seconds)}")
    for kind, words in (("linear", "linear probe"), ("knn", "kNN")):
        values = {name: number(get(marked, name, kind)) for name in (TRAINED, *MARKS[:2:-1], RAW)}
        if values.pop(TRAINED) is not None:
            figures = [f"{words} {get(marked, TRAINED, kind):.1f} %"]
            figures += [f"{name} {value:.1f} %" for name, value in values.items() if value is not None]
            return f"{done}: {', '.join(figures)}."
    reason = str(get(run.summary, "probe", "note") or "the photos have no labels")
    return f"{done}. There are no probe figures: {reason.rstrip('. ')}."


def _rows(run: RunRecord) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    return probe_rows(get(run.summary, "probe", "rows"))


def _facts(run: RunRecord) -> dict[str, Any]:
    train_s, total_s = (number(run.summary.get(key)) for key in ("train_seconds", "total_seconds"))
    return {
        "recipe": run.summary.get("recipe") or run.config.get("recipe"),
        "photos": get(run.summary, "data", "samples"),
        "epochs": run.summary.get("epochs") or get(run.config, "train", "epochs"),
        "steps": run.summary.get("steps") or (run.steps[-1].get("step") if run.steps else None),
        "training time": None if train_s is None else duration(train_s),
        "whole run": None if total_s is None else duration(total_s),
        "device": run.summary.get("device") or run.config.get("device"),
        **{
            switch: how
            for switch in ("compile", "graph")
            if not str(how := get(run.summary, "switches", switch)).startswith("auto is for")  # another machine
        },
    }


def _marks(run: RunRecord) -> list[tuple[bool, Any, list[tuple[str, str]]]]:
    """A row for each mark, for the trained network and for its other forms; none without figures: (whether it is the
    trained network's, row of the summary, how far the trained network is above or below it: (better, worse or level, as
    the verdict has it; words)).
    """
    marked, others = _rows(run)
    found = []
    for mark in (mark for mark in (*MARKS, TRAINED) if mark in marked):
        against = []
        for kind, words in (("knn", "kNN"), ("linear", "linear")) if mark != TRAINED else ():
            ours, theirs = (number(get(marked, name, kind)) for name in (TRAINED, mark))
            low, high = (number(get(run.summary, "verdict", "against", mark, kind, end)) for end in ("low", "high"))
            if ours is not None and theirs is not None:
                word = "" if low is None or high is None else "better" if low > 0 else "worse" if high < 0 else "level"
                against.append((word, f"{words} {ours - theirs:+.1f}"))
        found.append((mark == TRAINED, marked[mark], against))
    return [*found, *((False, row, []) for row in others)] if found else []


def _curves(run: RunRecord) -> list[tuple]:
    step, probe = partial(_points, run.steps), partial(_points, run.probes)
    # The probes at the end use more photos than those in between: the dashed lines are a guide, not a finish line.
    figures = {name: number(get(_rows(run)[0], name, "knn")) for name in MARKS[1:]}
    marks = {name: value for name, value in figures.items() if value is not None}
    knn = "Online kNN accuracy" + " (dashed: the final probe's marks)" * bool(marks)
    spread = {"features": probe("feature_std"), "embedding": step("embedding_std")}
    entropy = {"target entropy": step("target_entropy")}
    return _drawn(
        ("Loss", "nats", {"loss": step("loss"), "KL to the target": step("kl")}),
        (knn, "percent", {"kNN": probe("knn")}, (), marks),
        ("Feature spread (1: even over the sphere, 0: collapsed)", "std x sqrt(D)", spread, [0]),
        ("Effective rank (directions in use)", "directions", {"effective rank": probe("effective_rank")}, [0]),
        ("Alignment (distance of two views, 0: equal)", "squared distance", {"alignment": step("alignment")}, [0]),
        ("Entropy of the target (1: says nothing, 0: always sure)", "share of ln K", entropy, [0, 1]),
        ("Uniformity (0: collapsed, -4: evenly spread)", "log mean exp", {"uniformity": probe("uniformity")}),
    )


def _rates(run: RunRecord) -> list[tuple]:
    waits = [(epoch, 100 * wait) for epoch, wait in _points(run.steps, "data_wait")]
    return _drawn(
        ("Photos per second", "photos/s", {"photos/s": _points(run.steps, "pair_per_s")}, [0]),
        ("Time spent waiting for data", "percent", {"percent": waits}, [0]),
    )


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(epoch, value or NaN)"""
    points = ((number(row.get("epoch")), number(row.get(key))) for row in rows)
    return [(epoch, math.nan if value is None else value) for epoch, value in points if epoch is not None]


def _drawn(*charts: tuple) -> list[tuple]:
    from fastssl.report.charts import line_chart  # matplotlib is loaded where a page is written, and nowhere else

    return [chart for arguments in charts if (chart := line_chart(*arguments))]


def _arch(run: RunRecord) -> str:
    name = str(run.summary.get("arch") or run.config.get("arch") or "network")
    return _ARCH_NAMES.get(name.removesuffix("_100").removesuffix("_patch16_224"), name)
