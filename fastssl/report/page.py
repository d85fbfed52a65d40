"""report.html: one self-contained page about one run. No script, no network, nothing outside the file."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fastssl.errors import FastSSLError
from fastssl.report.marks import COLOURS, MARKS, RANDOM, RAW, TRAINED, mark_of
from fastssl.report.style import CSS
from fastssl.report.svg import Mark, Series, line_chart
from fastssl.utils.atomic_files import write_atomically
from fastssl.utils.plain_file import read_plain
from fastssl.utils.yaml_file import MAX_BYTES, parse_yaml

#: Bytes of a run's other files: a line of metrics has 300, and comes once in many steps.
_LONGEST = 256 << 20
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


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds. Everything may be missing: a run can be stopped at any moment.

    Attributes:
        folder: the directory.
        summary: summary.json, or {} while the run is not finished.
        config: config.yaml, or {}.
        config_text: config.yaml as written.
        steps, probes: the two kinds of rows in metrics.jsonl, in order.
        unreadable: lines of metrics.jsonl that are no JSON object (a line may be cut off by a kill).
    """

    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    steps: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    unreadable: int


def read_run(folder: str | Path) -> RunRecord:
    """Read a run directory.

    Raises:
        FastSSLError: it does not exist, holds none of a run's files, or one of them is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FastSSLError(f"{folder}: no such run directory; `fastssl pretrain --out DIR` makes one")
    files = ("config.yaml", "metrics.jsonl", "summary.json")
    if not any((folder / name).is_file() for name in files):
        raise FastSSLError(f"{folder}: not a run directory (none of {', '.join(files)} is there)")
    config_text = _text(folder / "config.yaml", MAX_BYTES)
    config = parse_yaml(config_text, f"{folder / 'config.yaml'}: not valid yaml") or {}
    try:
        summary = json.loads(_text(folder / "summary.json") or "{}")
    except (ValueError, RecursionError) as error:
        raise FastSSLError(f"{folder / 'summary.json'}: not valid JSON ({error})") from error
    for name, value in (("config.yaml", config), ("summary.json", summary)):
        if not isinstance(value, dict):
            raise FastSSLError(f"{folder / name}: holds no mapping of keys to values")
    steps, probes, unreadable = [], [], 0
    for line in _text(folder / "metrics.jsonl").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            unreadable += bool(line.strip())
        elif row.get("kind") == "step":
            steps.append(row)
        elif row.get("kind") == "probe":
            probes.append(row)
    return RunRecord(
        folder, summary, config if isinstance(config, dict) else {}, config_text, steps, probes, unreadable
    )


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
    title = f"{_arch(run)} on {_data_name(run)}"
    sections = [_header(run, title), _marks(run), _curves(run), _pictures(run), _throughput(run), _details(run)]
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        'initial-scale=1">'
        f"<title>{escape(title)} - fastssl</title><style>{CSS}</style></head>\n"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


# What is said in words


def headline(run: RunRecord) -> str:
    """The result in one or two plain sentences, without markup: good or bad, as it is."""
    arch, probe = _arch(run), probe_rows(run)
    if not run.summary:
        if not run.steps:
            return f"{arch}: this run has not logged a step yet."
        last = run.steps[-1]
        took = f" after {duration(last['seconds'])} of training" if _number(last.get("seconds")) is not None else ""
        return (
            f"{arch}: not finished. The last logged step is {last.get('step', 0):,} (epoch "
            f"{_figure(last.get('epoch'), 1)}){took}."
        )
    samples, seconds = _get(run.summary, "data", "samples"), run.summary.get("train_seconds")
    what = f"{samples:,} photos without labels" if isinstance(samples, int) else "photos without labels"
    time = f" in {duration(seconds)}" if _number(seconds) is not None else ""
    kind = "linear" if _number(probe.get(TRAINED, {}).get("linear")) is not None else "knn"
    values = {name: _number(row.get(kind)) for name, row in probe.items()}
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


def verdict_of(run: RunRecord) -> tuple[str, str] | None:
    """(state, what is said of it); None: the run is not finished, or older than verdicts."""
    state, text = (_get(run.summary, "verdict", key) for key in ("state", "text"))
    if not isinstance(state, str) or not isinstance(text, str):
        return None
    return state, text.removeprefix(f"{state}: ")


def duration(seconds: float) -> str:
    """9 s, 4 min 10 s, 25 min, 3 h 20 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 10:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def probe_rows(run: RunRecord) -> dict[str, dict[str, Any]]:
    """The table's rows by mark (``MARKS`` and ``TRAINED``), those that are there."""
    found: dict[str, dict[str, Any]] = {}
    for row in _get(run.summary, "probe", "rows") or []:
        mark = mark_of(str(row.get("name", "")))
        if mark in (*MARKS, TRAINED):
            found[mark] = row
    return found


def other_rows(run: RunRecord) -> list[dict[str, Any]]:
    """The rows of the trained network's other forms: its teacher, BatchNorm statistics taken anew."""
    rows = _get(run.summary, "probe", "rows") or []
    marked = [id(row) for row in probe_rows(run).values()]
    return [row for row in rows if id(row) not in marked]


def _no_probe_reason(run: RunRecord) -> str:
    return str(_get(run.summary, "probe", "note") or "the photos have no labels")


# Sections


def _header(run: RunRecord, title: str) -> str:
    recipe = run.summary.get("recipe") or run.config.get("recipe")
    facts = [
        ("recipe", recipe),
        ("photos", _get(run.summary, "data", "samples")),
        ("epochs", run.summary.get("epochs") or _get(run.config, "train", "epochs")),
        ("steps", run.summary.get("steps") or (run.steps[-1].get("step") if run.steps else None)),
        ("training time", duration(s) if (s := _number(run.summary.get("train_seconds"))) is not None else None),
        ("whole run", duration(s) if (s := _number(run.summary.get("total_seconds"))) is not None else None),
        ("device", run.summary.get("device") or run.config.get("device")),
    ]
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(f'{value:,}' if isinstance(value, int) else str(value))}</dd></div>"
        for name, value in facts
        if value is not None
    )
    unfinished = (
        '<p class="notice">Interrupted or still running: run the same command again to go on where it stopped.</p>'
    )
    notice = "" if run.summary else unfinished
    return (
        f'<header><p class="kicker">fastssl pre-training report</p><h1>{escape(title)}</h1>'
        f'{_verdict(run)}<p class="lead">{escape(headline(run))}</p>{notice}<dl class="facts">{items}</dl></header>'
    )


def _verdict(run: RunRecord) -> str:
    found = verdict_of(run)
    if found is None:
        return ""
    state, text = found
    css = {"learned": " good", "collapsed": " bad", "no better than random": " bad"}.get(state, "")
    heading, words = (escape(part[:1].upper() + part[1:]) for part in (state, text))
    return f'<div class="verdict{css}"><b>{heading}</b><p>{words}</p></div>'


def _marks(run: RunRecord) -> str:
    """The table of the marks and of the network's other forms, how the trained network compares with each, and what
    share of a full recipe this was."""
    rows = probe_rows(run)
    if not run.summary:
        return ""
    parts = ["<section><h2>What the features are worth</h2>"]
    if rows:
        trained = rows.get(TRAINED, {})
        body = []
        for name in (*MARKS, TRAINED):
            if name not in rows:
                continue
            row = rows[name]
            cells = "".join(f"<td>{_bar(_number(row.get(kind)))}</td>" for kind in ("knn", "linear"))
            against = "" if name == TRAINED else _against(run, name, trained, row)
            css = ' class="ours"' if name == TRAINED else ""
            title = escape(str(row.get("name", name)))
            body.append(f"<tr{css}><th scope='row'>{title}</th>{cells}<td>{against}</td></tr>")
        for row in other_rows(run):
            cells = "".join(f"<td>{_bar(_number(row.get(kind)))}</td>" for kind in ("knn", "linear"))
            body.append(f"<tr><th scope='row'>{escape(str(row.get('name', '')))}</th>{cells}<td></td></tr>")
        parts.append(
            "<table class='marks'><thead><tr><th>features</th><th>kNN, %</th><th>linear probe, %</th>"
            "<th>the trained network, points</th></tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table>"
        )
        sizes = [
            f"{value:,} {what}"
            for key, what in (
                ("train_samples", "photos to learn from"),
                ("val_samples", "to be judged on"),
                ("classes", "classes"),
            )
            if isinstance(value := _get(run.summary, "probe", key), int)
        ]
        note = _get(run.summary, "probe", "note")
        text = " ".join(_sentence(part) for part in (", ".join(sizes), note) if part)
        parts.append(f'<p class="small">{escape(text)}</p>')
    else:
        parts.append(f"<p>No kNN or linear figures: {escape(_sentence(_no_probe_reason(run)))}</p>")
    parts.append(_share(run))
    return "".join(parts) + "</section>"


def _bar(value: float | None) -> str:
    if value is None:
        return '<span class="none">not measured</span>'
    return f'<div class="bar"><i style="width:{min(max(value, 0), 100):.1f}%"></i></div><b>{value:.1f}</b>'


def _against(run: RunRecord, mark: str, trained: dict[str, Any], row: dict[str, Any]) -> str:
    """How far the trained network is above or below a mark, a line for each kind. What is no more than chance, as the
    verdict has it, is called level."""
    lines = []
    for kind, words in (("knn", "kNN"), ("linear", "linear")):
        ours, theirs = _number(trained.get(kind)), _number(row.get(kind))
        if ours is None or theirs is None:
            continue
        points = ours - theirs
        low, high = (_number(_get(run.summary, "verdict", "against", mark, kind, end)) for end in ("low", "high"))
        judged = low is not None and high is not None
        if not judged:
            # Runs older than verdicts are judged here. A verdict that compares nothing says that these say nothing.
            low, high = (0.0, 0.0) if _get(run.summary, "verdict", "against") == {} else (points, points)
        css, sign = ("yes", "&#10003;") if low > 0 else ("no", "&#10007;") if high < 0 else ("none", "level" * judged)
        lines.append(f'<span class="{css}">{words} {points:+.1f} {sign}</span>')
    return "<br>".join(lines) or '<span class="none">-</span>'


def _share(run: RunRecord) -> str:
    share = run.summary.get("share")
    if not isinstance(share, dict):
        return ""
    seen, full, percent = (_number(share.get(key)) for key in ("samples_seen", "full_samples", "percent"))
    if seen is None or full is None or percent is None:
        return ""
    recipe = share.get("full_recipe", "a full recipe")
    text = _sentence(
        share.get("text") or f"this run saw {seen:,.0f} photos: {percent:.2g} % of the {full:,.0f} of {recipe}"
    )
    # A sliver stays visible where the share would round to nothing.
    width = min(max(percent, 0.3), 100)
    return (
        '<div class="card"><h3>Share of a full recipe</h3><div class="bar wide"><i '
        f'style="width:{width:.2f}%"></i></div>'
        f"<p>{escape(text[:1].upper() + text[1:])}</p></div>"
    )


def _curves(run: RunRecord) -> str:
    rows = probe_rows(run)
    figures = {name: _number(rows.get(name, {}).get("knn")) for name in (RAW, COLOURS, RANDOM)}
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
    charts = [chart for chart in charts if chart]
    if not charts:
        return '<section><h2>Curves</h2><p class="small">No finite values were logged yet.</p></section>'
    bad = sum(_number(row.get("loss")) is None for row in run.steps)
    warning = (
        f'<p class="notice">The loss is missing or not a finite number in {bad} of {len(run.steps)} logged rows.</p>'
        if bad
        else ""
    )
    return f'<section><h2>Curves</h2>{warning}<div class="charts">{"".join(charts)}</div></section>'


def _points(rows: list[dict[str, Any]]):
    """key -> [(epoch, value or None)]"""

    def points(key: str) -> list[tuple[float, float | None]]:
        return [(x, _number(row.get(key))) for row in rows if (x := _number(row.get("epoch"))) is not None]

    return points


def _pictures(run: RunRecord) -> str:
    parts = []
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
            content = read_plain(run.folder / name, _LONGEST)
        except FileNotFoundError:
            continue
        # A page is passed on: of a folder that came from elsewhere this name may lead to any file of ours.
        if content.startswith(_PNG):
            data = base64.b64encode(content).decode("ascii")
            parts.append(
                f'<section><h2>{heading}</h2><p class="small">{text}</p>'
                f'<div class="picture"><img alt="{escape(heading)}" src="data:image/png;base64,{data}"></div></section>'
            )
    return "".join(parts)


def _throughput(run: RunRecord) -> str:
    step = _points(run.steps)
    waits = [(x, None if y is None else 100 * y) for x, y in step("data_wait")]
    charts = [
        line_chart([Series(what, points)], title=title, x_label="epoch", y_label=what, y_range=(0.0, None))
        for title, what, points in (
            ("Photos per second", "photos/s", step("pair_per_s")),
            ("Time spent waiting for data", "percent", waits),
        )
    ]
    keys = ("pair_per_s", "view_per_s", "data_wait", "data_share")
    pair, view, wait, data = (_number(run.summary.get(key)) for key in keys)
    figures = "".join(
        f"<div><b>{text}</b><span>{what}</span></div>"
        for value, text, what in (
            (pair, f"{pair:,.0f}" if pair is not None else "", "photos/s (pairs of views)"),
            (view, f"{view:,.0f}" if view is not None else "", "views/s"),
            (wait, f"{100 * wait:.1f} %" if wait is not None else "", "of the time waiting for data"),
            (data, f"{100 * data:.0f} %" if data is not None else "", "of the time is the cost of data"),
        )
        if value is not None
    )
    bottleneck = run.summary.get("bottleneck")
    sentence = f"<p><b>Bottleneck:</b> {escape(_sentence(bottleneck))}</p>" if bottleneck else ""
    skipped = run.summary.get("skipped")
    if isinstance(skipped, int) and skipped:
        sentence += f'<p class="notice">{skipped:,} damaged photo{"s were" if skipped != 1 else " was"} skipped.</p>'
    passed = run.summary.get("passed_over_steps")
    if isinstance(passed, list) and passed:
        named = ", ".join(f"{step:,}" for step in passed[:10] if isinstance(step, int)) + (
            ", ..." if len(passed) > 10 else ""
        )
        steps = (
            f"{len(passed):,} step{'s were' if len(passed) != 1 else ' was'} passed over, because a loss or "
            "gradient was not finite"
        )
        sentence += f'<p class="notice">{steps}: {named}. Their batches are in <code>nonfinite/</code>.</p>'
    drawn = "".join(charts)
    if not (drawn or figures or sentence):
        return ""
    figures = f'<div class="figures">{figures}</div>' if figures else ""
    return f'<section><h2>Throughput</h2>{figures}{sentence}<div class="charts">{drawn}</div></section>'


def _details(run: RunRecord) -> str:
    machine = {**_flat(run.config.get("host")), **_flat(run.summary.get("host"))}
    versions = {**_flat(run.config.get("versions")), **_flat(run.summary.get("versions"))}
    tables = "".join(
        f"<div><h3>{heading}</h3><table class='plain'>"
        + "".join(
            f"<tr><th scope='row'>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>"
            for key, value in rows.items()
        )
        + "</table></div>"
        for heading, rows in (("Machine", machine), ("Versions", versions))
        if rows
    )
    made = run.summary.get("command")
    command = f"<pre><code>{escape(made)}</code></pre>" if isinstance(made, str) else ""
    config = ""
    if run.config_text:
        config = (
            "<details><summary>Resolved "
            f"configuration</summary><pre><code>{escape(run.config_text)}</code></pre></details>"
        )
    cut = (
        f'<p class="small">{run.unreadable} line(s) of metrics.jsonl were unreadable and left out.</p>'
        if run.unreadable
        else ""
    )
    if not (tables or config or cut or command):
        return ""
    return f'<section><h2>How to repeat it</h2>{command}<div class="pair">{tables}</div>{config}{cut}</section>'


# Small helpers


def _arch(run: RunRecord) -> str:
    name = str(run.summary.get("arch") or run.config.get("arch") or "network")
    return _ARCH_NAMES.get(name, name)


def _data_name(run: RunRecord) -> str:
    name = _get(run.summary, "data", "name") or run.config.get("data") or "photos"
    if isinstance(name, dict):
        name = name.get("name", "photos")
    return Path(str(name)).name


def _get(mapping: Any, *keys: str) -> Any:
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping


def _number(value: Any) -> float | None:
    """``value`` as a float, None when it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _sentence(text: Any) -> str:
    """``text`` with a full stop at its end."""
    return f"{str(text).rstrip().rstrip('.')}."


def _figure(value: Any, digits: int) -> str:
    number = _number(value)
    return "?" if number is None else f"{number:.{digits}f}"


def _flat(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    return {} if value is None else {"host": value}


def _text(path: Path, at_most: int = _LONGEST) -> str:
    try:
        return read_plain(path, at_most).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
