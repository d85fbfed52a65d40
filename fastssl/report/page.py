"""report.html: one self-contained page about one run. No script, no network, nothing outside the file."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fastssl.errors import counted
from fastssl.report.marks import COLOURS, MARKS, RANDOM, RAW, TRAINED
from fastssl.report.render import render_template
from fastssl.report.run_record import LONGEST, RunRecord, get, number, other_rows, probe_rows, read_run, verdict_of
from fastssl.report.svg import Mark, Series, line_chart
from fastssl.report.words import duration
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.plain_file import read_plain

_PNG = b"\x89PNG\r\n\x1a\n"

_ARCH_NAMES = {
    "mobilenetv3_large": "MobileNet-V3-Large",
    "mobilenetv3_large_100": "MobileNet-V3-Large",
    "mobilenetv2": "MobileNet-V2",
    "mobilenetv2_100": "MobileNet-V2",
    "efficientnet_b0": "EfficientNet-B0",
    "efficientnet_b1": "EfficientNet-B1",
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "vit_tiny": "ViT-Tiny",
    "vit_tiny_patch16_224": "ViT-Tiny",
}


def write_report(run_dir: str | Path) -> Path:
    """Write ``run_dir/report.html`` from what the run has left so far, and return its path.

    The page is written to a temporary name and renamed. Raises as :func:`read_run`.
    """
    run = read_run(run_dir)
    path = run.folder / "report.html"
    page = render(run)
    write_atomically(path, lambda temporary: temporary.write_text(page, "utf-8", "backslashreplace"))
    return path


def render(run: RunRecord) -> str:
    """The whole page as html."""
    command = run.summary.get("command")
    return render_template(
        "run.html.j2",
        title=f"{_arch(run)} on {_data_name(run)}",
        finished=bool(run.summary),
        verdict=_verdict(run),
        headline=headline(run),
        facts=_facts(run),
        marks=_marks(run),
        probed=_probed(run),
        no_probe=_sentence(_no_probe_reason(run)),
        share=_share(run),
        curves=_curves(run),
        not_finite=_not_finite(run),
        pictures=_pictures(run),
        rates=_rates(run),
        figures=_figures(run),
        bottleneck=_sentence(run.summary["bottleneck"]) if run.summary.get("bottleneck") else "",
        notices=_notices(run),
        command=command if isinstance(command, str) else "",
        machine={**_flat(run.config.get("host")), **_flat(run.summary.get("host"))},
        versions={**_flat(run.config.get("versions")), **_flat(run.summary.get("versions"))},
        config=run.config_text,
        unreadable=run.unreadable,
    )


# ---------------------------------------------------------------------- what is said in words


def headline(run: RunRecord) -> str:
    """The result in one or two plain sentences, without markup: good or bad, as it is."""
    arch, probe = _arch(run), probe_rows(run)
    if not run.summary:
        if not run.steps:
            return f"{arch}: this run has not logged a step yet."
        last = run.steps[-1]
        took = f" after {duration(last['seconds'])} of training" if number(last.get("seconds")) is not None else ""
        return (
            f"{arch}: not finished. The last logged step is {last.get('step', 0):,} (epoch "
            f"{_figure(last.get('epoch'), 1)}){took}."
        )
    samples, seconds = get(run.summary, "data", "samples"), run.summary.get("train_seconds")
    what = f"{samples:,} photos without labels" if isinstance(samples, int) else "photos without labels"
    time = f" in {duration(seconds)}" if number(seconds) is not None else ""
    kind = "linear" if number(probe.get(TRAINED, {}).get("linear")) is not None else "knn"
    values = {name: number(row.get(kind)) for name, row in probe.items()}
    trained = values.get(TRAINED)
    if trained is None:
        return f"{arch} trained on {what}{time}. There are no probe figures: {_sentence(_no_probe_reason(run))}"
    figures = f"{'linear probe' if kind == 'linear' else 'kNN'} {trained:.1f} %"
    for name in (RANDOM, RAW):
        if values.get(name) is not None:
            figures += f", {name} {values[name]:.1f} %"
    if verdict_of(run):  # which says what these figures mean
        return f"{arch} was trained on {what}{time}: {figures}."
    beaten = [name for name in (RANDOM, RAW) if values.get(name) is not None and trained > values[name]]
    missed = [name for name in (RANDOM, RAW) if values.get(name) is not None and trained <= values[name]]
    verb = "learned from" if RANDOM in beaten else "was trained on"
    sentence = f"{arch} {verb} {what}{time}: {figures}."
    if missed and beaten:
        sentence += f" It passes {' and '.join(beaten)}, not yet {' and '.join(missed)}."
    elif missed:
        sentence += f" It is not above {' or '.join(missed)} yet."
    return sentence


def _no_probe_reason(run: RunRecord) -> str:
    return str(get(run.summary, "probe", "note") or "the photos have no labels")


# ---------------------------------------------------------------------- what stands in tables


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    train_s, total_s = (number(run.summary.get(key)) for key in ("train_seconds", "total_seconds"))
    facts = [
        ("recipe", run.summary.get("recipe") or run.config.get("recipe")),
        ("photos", get(run.summary, "data", "samples")),
        ("epochs", run.summary.get("epochs") or get(run.config, "train", "epochs")),
        ("steps", run.summary.get("steps") or (run.steps[-1].get("step") if run.steps else None)),
        ("training time", None if train_s is None else duration(train_s)),
        ("whole run", None if total_s is None else duration(total_s)),
        ("device", run.summary.get("device") or run.config.get("device")),
    ]
    return [
        (name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in facts if value is not None
    ]


def _verdict(run: RunRecord) -> dict[str, str] | None:
    found = verdict_of(run)
    if found is None:
        return None
    state, text = found
    css = {"learned": " good", "collapsed": " bad", "no better than random": " bad"}.get(state, "")
    return {"css": css, "heading": state[:1].upper() + state[1:], "text": text[:1].upper() + text[1:]}


def _marks(run: RunRecord) -> list[dict[str, Any]]:
    """A row for each mark, for the trained network and for its other forms; none without figures."""
    rows = probe_rows(run)
    found = [
        {
            "name": str(rows[name].get("name", name)),
            "knn": number(rows[name].get("knn")),
            "linear": number(rows[name].get("linear")),
            "ours": name == TRAINED,
            "against": [] if name == TRAINED else _against(run, name, rows.get(TRAINED, {}), rows[name]),
        }
        for name in (*MARKS, TRAINED)
        if name in rows
    ]
    others = [
        {
            "name": str(row.get("name", "")),
            "knn": number(row.get("knn")),
            "linear": number(row.get("linear")),
            "ours": False,
            "against": [],
        }
        for row in other_rows(run)
    ]
    return [*found, *others] if found else []


def _against(run: RunRecord, mark: str, trained: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """How far the trained network is above or below a mark, a line for each kind. What is no more than chance, as the
    verdict has it, is called level."""
    lines = []
    for kind, words in (("knn", "kNN"), ("linear", "linear")):
        ours, theirs = number(trained.get(kind)), number(row.get(kind))
        if ours is None or theirs is None:
            continue
        points = ours - theirs
        low, high = (number(get(run.summary, "verdict", "against", mark, kind, end)) for end in ("low", "high"))
        judged = low is not None and high is not None
        if not judged:
            # Runs older than verdicts are judged here. A verdict that compares nothing says that these say nothing.
            low, high = (0.0, 0.0) if get(run.summary, "verdict", "against") == {} else (points, points)
        css, sign = ("yes", "&#10003;") if low > 0 else ("no", "&#10007;") if high < 0 else ("none", "level" * judged)
        lines.append({"css": css, "words": f"{words} {points:+.1f}", "sign": Markup(sign)})
    return lines or [{"css": "none", "words": "-", "sign": ""}]


def _probed(run: RunRecord) -> str:
    """On how many photos the rows were judged, and how."""
    sizes = [
        f"{value:,} {what}"
        for key, what in (
            ("train_samples", "photos to learn from"),
            ("val_samples", "to be judged on"),
            ("classes", "classes"),
        )
        if isinstance(value := get(run.summary, "probe", key), int)
    ]
    return " ".join(_sentence(part) for part in (", ".join(sizes), get(run.summary, "probe", "note")) if part)


def _share(run: RunRecord) -> dict[str, str] | None:
    share = run.summary.get("share")
    if not isinstance(share, dict):
        return None
    seen, full, percent = (number(share.get(key)) for key in ("samples_seen", "full_samples", "percent"))
    if seen is None or full is None or percent is None:
        return None
    recipe = share.get("full_recipe", "a full recipe")
    text = _sentence(
        share.get("text") or f"this run saw {seen:,.0f} photos: {percent:.2g} % of the {full:,.0f} of {recipe}"
    )
    # A sliver stays visible where the share would round to nothing.
    return {"width": f"{min(max(percent, 0.3), 100):.2f}", "text": text[:1].upper() + text[1:]}


def _figures(run: RunRecord) -> list[tuple[str, str]]:
    shown = (
        ("pair_per_s", "{:,.0f}", 1, "photos/s (pairs of views)"),
        ("view_per_s", "{:,.0f}", 1, "views/s"),
        ("data_wait", "{:.1f} %", 100, "of the time waiting for data"),
        ("data_share", "{:.0f} %", 100, "of the time is the cost of data"),
    )
    return [
        (form.format(times * value), what)
        for key, form, times, what in shown
        if (value := number(run.summary.get(key))) is not None
    ]


def _notices(run: RunRecord) -> list[str]:
    """Damaged photos and steps that were passed over."""
    found, skipped, passed = [], run.summary.get("skipped"), run.summary.get("passed_over_steps")
    if isinstance(skipped, int) and skipped:
        found.append(f"{counted(skipped, 'damaged photo')} {'was' if skipped == 1 else 'were'} skipped.")
    if isinstance(passed, list) and passed:
        named = ", ".join(f"{step:,}" for step in passed[:10] if isinstance(step, int))
        more = ", ..." if len(passed) > 10 else ""
        found.append(
            f"{counted(len(passed), 'step')} {'was' if len(passed) == 1 else 'were'} passed over, because a loss or "
            f"gradient was not finite: {named}{more}. Their batches are in nonfinite/."
        )
    return found


# ---------------------------------------------------------------------- pictures and curves


def _curves(run: RunRecord) -> list[Markup]:
    rows = probe_rows(run)
    figures = {name: number(rows.get(name, {}).get("knn")) for name in (RAW, COLOURS, RANDOM)}
    marks = [Mark(name, value) for name, value in figures.items() if value is not None]
    # The probes at the end use more photos than those in between, so the reference lines are a guide, not a finish
    # line.
    step, probe = _points(run.steps), _points(run.probes)
    charts = [
        line_chart(
            [Series("loss", step("loss")), Series("KL to the target", step("kl"))],
            title="Loss",
            x_label="epoch",
            y_label="nats",
        ),
        line_chart(
            [Series("kNN", probe("knn"))],
            title="Online kNN accuracy (dashed: the final probe's marks)" if marks else "Online kNN accuracy",
            x_label="epoch",
            y_label="percent",
            marks=marks,
        ),
        line_chart(
            [Series("features", probe("feature_std")), Series("embedding", step("embedding_std"))],
            title="Feature spread (1: even over the sphere, 0: collapsed)",
            x_label="epoch",
            y_label="std x sqrt(D)",
            y_range=(0.0, None),
        ),
        line_chart(
            [Series("effective rank", probe("effective_rank"))],
            title="Effective rank (directions in use)",
            x_label="epoch",
            y_label="directions",
            y_range=(0.0, None),
        ),
        line_chart(
            [Series("alignment", step("alignment"))],
            title="Alignment (distance of two views, 0: equal)",
            x_label="epoch",
            y_label="squared distance",
            y_range=(0.0, None),
        ),
        line_chart(
            [Series("target entropy", step("target_entropy"))],
            title="Entropy of the target (1: says nothing, 0: always sure)",
            x_label="epoch",
            y_label="share of ln K",
            y_range=(0.0, 1.0),
        ),
        line_chart(
            [Series("uniformity", probe("uniformity"))],
            title="Uniformity (0: collapsed, -4: evenly spread)",
            x_label="epoch",
            y_label="log mean exp",
        ),
    ]
    return [Markup(chart) for chart in charts if chart]


def _rates(run: RunRecord) -> list[Markup]:
    step = _points(run.steps)
    waits = [(x, None if y is None else 100 * y) for x, y in step("data_wait")]
    charts = [
        line_chart([Series(what, points)], title=title, x_label="epoch", y_label=what, y_range=(0.0, None))
        for title, what, points in (
            ("Photos per second", "photos/s", step("pair_per_s")),
            ("Time spent waiting for data", "percent", waits),
        )
    ]
    return [Markup(chart) for chart in charts if chart]


def _not_finite(run: RunRecord) -> str:
    bad = sum(number(row.get("loss")) is None for row in run.steps)
    return f"The loss is missing or not a finite number in {bad} of {len(run.steps)} logged rows." if bad else ""


def _points(rows: list[dict[str, Any]]) -> Callable[[str], list[tuple[float, float | None]]]:
    """key -> [(epoch, value or None)]"""

    def points(key: str) -> list[tuple[float, float | None]]:
        return [(x, number(row.get(key))) for row in rows if (x := number(row.get("epoch"))) is not None]

    return points


def _pictures(run: RunRecord) -> list[dict[str, str]]:
    found = []
    for name, heading, text in (
        (
            "views.png",
            "What the network was shown",
            "Photos as stored, and the random views that training made of them.",
        ),
        (
            "neighbours.png",
            "What it finds alike",
            "A query photo with its nearest photos by the features of the untrained and of the trained network. "
            "Labels only colour the frames; training never saw them.",
        ),
    ):
        try:
            content = read_plain(run.folder / name, LONGEST)
        except FileNotFoundError:
            continue
        # A page is passed on: of a folder that came from elsewhere this name may lead to any file of ours.
        if content.startswith(_PNG):
            found.append({"heading": heading, "text": text, "data": base64.b64encode(content).decode("ascii")})
    return found


# ---------------------------------------------------------------------- small helpers


def _arch(run: RunRecord) -> str:
    name = str(run.summary.get("arch") or run.config.get("arch") or "network")
    return _ARCH_NAMES.get(name, name)


def _data_name(run: RunRecord) -> str:
    name = get(run.summary, "data", "name") or run.config.get("data") or "photos"
    if isinstance(name, dict):
        name = name.get("name", "photos")
    return Path(str(name)).name


def _sentence(text: Any) -> str:
    """``text`` with a full stop at its end."""
    return f"{str(text).rstrip().rstrip('.')}."


def _figure(value: Any, digits: int) -> str:
    found = number(value)
    return "?" if found is None else f"{found:.{digits}f}"


def _flat(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    return {} if value is None else {"host": value}
