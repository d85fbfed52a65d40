"""The figures of a study's page: every one comes from the records beside the study's file.

    python -m fastssl.benchmarks.study.page docs/results.md benchmarks/results/study/study.yaml

Fills what stands between ``<!-- figures: CLAIM -->`` and ``<!-- /figures -->``, and draws a picture of each claim
beside the records.

Differences are taken seed by seed: runs of one seed begin with the same weights, as far as their networks are alike,
and see the same photos in the same order. The interval is Student's, at 95 %, over the seeds; it says how much training
varies, and not how much the judge would with other photos.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastssl.benchmarks import beside_lightly
from fastssl.benchmarks.harness.plots import COLOURS, draw
from fastssl.benchmarks.harness.readme import fill_places
from fastssl.benchmarks.study.definition import Claim, Row, Study, read_study
from fastssl.benchmarks.study.runs import Runs, read_runs
from fastssl.errors import FastSSLError, counted
from fastssl.report.document import Table, table_markdown
from fastssl.report.run_record import COLOURS as COLOUR
from fastssl.report.run_record import RANDOM, RAW, TRAINED

KINDS = {"knn": "kNN", "linear": "linear"}
NOTHING = "No run has ended yet.\n"
#: Student's t at 97.5 %, for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of two to ten differences; of one there is none."""
    if not 1 < len(differences) <= 1 + len(STUDENT):
        return None
    mean = statistics.mean(differences)
    reach = STUDENT[len(differences) - 2] * statistics.stdev(differences) / len(differences) ** 0.5
    return mean - reach, mean + reach


def seeds_of(runs: Runs, name: str) -> dict[int, dict[str, Any]]:
    """The runs of a row, by seed."""
    return {seed: runs[row, seed] for row, seed in sorted(runs) if row == name}


def pairs_of(runs: Runs, name: str, against: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The runs of both rows, for each seed that both have."""
    some, others = seeds_of(runs, name), seeds_of(runs, against)
    return [(run, others[seed]) for seed, run in some.items() if seed in others]


def after(run: dict[str, Any], kind: str) -> float:
    """What the trained network reached, percent."""
    reached: float = run["probe"][TRAINED][kind]
    return reached


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation."""
    values = list(values)
    text = f"{statistics.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.1f}"


def gain(differences: Sequence[float]) -> str:
    """Their mean, its interval, and each of them."""
    one_by_one = ", ".join(f"{value:+.1f}" for value in differences)
    reach = interval(differences)
    if reach is None:
        return one_by_one
    return f"{statistics.mean(differences):+.1f} ({reach[0]:+.1f} to {reach[1]:+.1f}): {one_by_one}"


def verdict(differences: Sequence[float]) -> str:
    """What differences say, in a word or two."""
    reach = interval(differences)
    if reach is None:
        return "one seed"
    if reach[0] > 0 or reach[1] < 0:
        return "better" if reach[0] > 0 else "worse"
    if min(differences) > 0 or max(differences) < 0:
        return f"{'better' if min(differences) > 0 else 'worse'} with each seed, which may be chance"
    return "undecided"


def faster(run: dict[str, Any], other: dict[str, Any]) -> str:
    """The processor time of ``other`` in times that of ``run``; a dash where they were not made on one machine. Records
    of before December 2026 do not name it: runs of one seed were then made side by side.
    """
    if run.get("machines") != other.get("machines"):
        return "-"
    return f"{other['cpu_seconds'] / run['cpu_seconds']:.2f}"


def claim_table(study: Study, claim: Claim, runs: Runs) -> str:
    """What each row reached, and what it gained."""
    rows = []
    for name in claim.names:
        some = list(seeds_of(runs, name).values())
        if some:
            minutes = statistics.mean(run["cpu_seconds"] for run in some) / 60
            cells = [study.rows[name].words + below_raw(study.rows[name], some)]
            cells += [spread(after(run, kind) for run in some) for kind in KINDS]
            rows.append([*cells, f"{some[0]['steps']:,} of {some[0]['batch_size']}", f"{minutes:.0f}", str(len(some))])
    if not rows:
        return NOTHING
    text = table_markdown(Table(("", *KINDS.values(), "steps", "core-minutes", "seeds"), rows, (False, *[True] * 5)))
    rows = []
    for name in claim.rows:
        pairs = pairs_of(runs, name, claim.against)
        if pairs:
            found = [[after(run, kind) - after(other, kind) for run, other in pairs] for kind in KINDS]
            cells = [study.rows[name].words]
            cells += [f"{gain(differences)}: {verdict(differences)}" for differences in found]
            if claim.minutes:
                cells.append(", ".join(faster(run, other) for run, other in pairs))
            rows.append(cells)
    if rows:
        header = (f"gain over {study.rows[claim.against].words}", *KINDS.values(), "times as fast")
        header = header[: 3 + claim.minutes]
        text += f"\n\n{table_markdown(Table(header, rows, (False,) * len(header)))}"
    return text


def below_raw(row: Row, runs: Sequence[dict[str, Any]]) -> str:
    """Words behind a row whose linear figure is not above that of raw pixels. Raises FastSSLError where the study does
    not say why.
    """
    below = [run for run in runs if after(run, "linear") <= run["probe"][f"{RAW} (16x16)"]["linear"]]
    if not below:
        return ""
    if not row.why:
        raise FastSSLError(f"{row.words}: {counted(len(below), 'run')} below raw pixels; the study must say why")
    return f" ({len(below)} of {counted(len(runs), 'run')} below raw pixels: {row.why})"


def references_table(study: Study, runs: Runs, photos: str = "") -> str:
    """What there is to beat on the rendered views, or on one of the study's sets."""
    runs = {(row, seed): run for (row, seed), run in runs.items() if study.rows[row].photos == photos}
    if not runs:
        return NOTHING
    any_probe = next(iter(runs.values()))["probe"]
    rows = [[name, *(f"{any_probe[name][kind]:.1f}" for kind in KINDS)] for name in (f"{RAW} (16x16)", COLOUR)]
    networks: dict[str, str] = {}  # the first row of each: of one seed it is the same network in most others
    for row, _ in runs:
        networks.setdefault(next(iter(seeds_of(runs, row).values()))["arch"], row)
    for arch, row in networks.items():
        probes = [run["probe"][RANDOM] for run in seeds_of(runs, row).values()]
        rows.append([f"{arch}, before training", *(spread(probe[kind] for probe in probes) for kind in KINDS)])
    return table_markdown(Table(("", *KINDS.values()), rows, (False, True, True)))


def made(study: Study, runs: Runs) -> str:
    """Machine, time, versions and commits."""
    versions = dict.fromkeys(
        ", ".join(f"{name} {run['versions'][name]}" for name in ("python", "torch", "torchvision", "timm"))
        for run in runs.values()
    )
    hosts = dict.fromkeys(f"{run['host']['cores']}-core {run['host']['cpu']}" for run in runs.values())
    commits = dict.fromkeys(str(run["git"]) for run in runs.values())
    hours = sum(run["cpu_seconds"] for run in runs.values()) / 3600
    words = f"{len(runs)} of {len(study.order())} runs have ended, {hours:.1f} hours of one core"
    words += f", on {' and '.join(hosts)}; {'; '.join(versions)}; commits {', '.join(commits)}."
    return textwrap.fill(words, 120)


def curves(study: Study, names: Sequence[str], runs: Runs) -> Figure | str:
    """kNN during training, of some photos, and behind it of all: a line and a dot a seed, a colour a row."""
    if not any(seeds_of(runs, name) for name in names):
        return NOTHING
    canvas = Figure(figsize=(9, 4.2), layout="constrained")
    axes = canvas.subplots()
    for number, name in enumerate(names):
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.6}
        look |= {"linestyle": "--" if number >= len(COLOURS) else "-"}
        for place, run in enumerate(seeds_of(runs, name).values()):
            photos = [step * run["batch_size"] / 1000 for step, _ in run["knn"]]
            look |= {"label": study.rows[name].words if place == 0 else None, "alpha": 1 if place == 0 else 0.5}
            axes.plot(photos, [value for _, value in run["knn"]], **look)
            end = {"x": run["steps"] * run["batch_size"] / 1000, "y": after(run, "knn")}
            axes.scatter(**end, color=look["color"], alpha=look["alpha"])
    axes.set_xlabel("thousand photos seen")
    axes.set_ylabel("kNN, percent (dots: all photos)")
    axes.grid(axis="y")
    canvas.legend(loc="outside lower center", ncols=2)
    return canvas


def fill_page(text: str, study: Study, runs: Runs, folder: Path, beside: Path) -> str:
    """``text`` with its places filled. ``folder``: of the pictures, as the page links to it; ``beside``: the record of
    ``beside_lightly``.
    """

    def claim_figures(name: str, claim: Claim) -> str:
        text, photos = claim_table(study, claim, runs), study.rows[claim.against].photos
        if text == NOTHING:
            return text
        text = f"{references_table(study, runs, photos)}\n\n{text}" if photos else text
        return f"{text}\n\n![kNN over the photos seen]({folder / name}.png)\n"

    tables: dict[str, Callable[[], str]] = {
        **{name: functools.partial(claim_figures, name, claim) for name, claim in study.claims.items()},
        "references": lambda: references_table(study, runs),
        "made": lambda: made(study, runs),
        "beside-lightly": lambda: beside_lightly.to_markdown(json.loads(beside.read_text())),
    }
    return fill_places(text, tables)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("study", type=Path)
    chosen = parser.parse_args(arguments)
    study, folder = read_study(chosen.study), chosen.study.parent
    runs = read_runs(study, folder)
    if not runs:
        raise SystemExit(f"{folder}: no run of this study has ended yet")
    linked = Path(os.path.relpath(folder, chosen.page.parent))
    beside = folder.parent / "beside-lightly" / "record.json"
    chosen.page.write_text(fill_page(chosen.page.read_text(), study, runs, linked, beside))
    for name, claim in study.claims.items():
        png = draw(functools.partial(curves, study, claim.names), runs)
        if isinstance(png, bytes):  # not the words of why there is none
            (folder / f"{name}.png").write_bytes(png)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FastSSLError, OSError) as error:
        sys.exit(f"error: {error}")
