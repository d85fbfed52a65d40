"""The page of a study: every figure on it comes from the records beside the study's file.

    python -m fastssl.benchmarks.study.page benchmarks/results/study/study.yaml docs/results.md

Differences are taken seed by seed: runs of the same seed begin with the same weights and see the same photos in the
same order. The interval is Student's, at 95 %, over the seeds; it says how much training varies, and not how much the
judge would with other photos.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastssl.benchmarks.harness.plots import COLOURS, draw
from fastssl.benchmarks.study.definition import Claim, Row, Study, read_study
from fastssl.benchmarks.study.runs import read_runs
from fastssl.errors import FastSSLError, counted
from fastssl.report.document import Block, Bullets, Code, Heading, Paragraph, Picture, Table, to_markdown

Runs = dict[tuple[str, int], dict[str, Any]]
KINDS = {"knn": "kNN", "linear": "linear"}
TRAINED, RANDOM, RAW, COLOUR = "after pre-training", "random initialisation", "raw pixels (16x16)", "colour histogram"
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
    return {seed: run for (row, seed), run in sorted(runs.items(), key=lambda item: item[0]) if row == name}


def differences(runs: Runs, name: str, against: str, kind: str) -> list[float]:
    """Row ``name`` less row ``against`` in percentage points, for each seed that both have."""
    some, others = seeds_of(runs, name), seeds_of(runs, against)
    return [
        run["probe"][TRAINED][kind] - others[seed]["probe"][TRAINED][kind]
        for seed, run in some.items()
        if seed in others
    ]


def _mean(values: Sequence[float]) -> str:
    text = f"{statistics.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.1f}"


def _difference(values: Sequence[float]) -> str:
    if not values:
        return "no seed in common yet"
    one_by_one = ", ".join(f"{value:+.1f}" for value in values)
    if (reach := interval(values)) is None:
        return f"{one_by_one} (one seed)"
    return f"{statistics.mean(values):+.1f} ({reach[0]:+.1f} to {reach[1]:+.1f}; {one_by_one})"


def verdict(values: Sequence[float]) -> str:
    """What differences say, in a word or two."""
    reach = interval(values)
    if reach is None:
        return "one seed: a lead"
    if reach[0] > 0 or reach[1] < 0:
        return "better" if reach[0] > 0 else "worse"
    if min(values) > 0 or max(values) < 0:
        return f"{'better' if min(values) > 0 else 'worse'} with each seed, not beyond chance"
    return "undecided"


def claim_blocks(study: Study, claim: Claim, runs: Runs) -> list[Block]:
    """The section of one claim: question, figures, curves, answer."""
    names = [name for name in (claim.against, *claim.rows) if seeds_of(runs, name)]
    blocks: list[Block] = [Heading(claim.title), Paragraph(claim.words)]
    if not names:
        return [*blocks, Paragraph("No run has ended yet.")]
    rows = []
    for name in names:
        some = list(seeds_of(runs, name).values())
        cells = [study.rows[name].words + below_raw(study.rows[name], some)]
        cells += [_mean([run["probe"][TRAINED][kind] for run in some]) for kind in KINDS]
        minutes = statistics.mean(run["train_seconds"] for run in some) / 60
        rows.append([*cells, f"{some[0]['steps']:,} of {some[0]['batch_size']}", f"{minutes:.0f}", str(len(some))])
    header = ("", *KINDS.values(), "steps", "minutes", "seeds")
    blocks.append(Table(header, rows, (False, *[True] * 5)))
    rows = []
    for name in (name for name in names if name != claim.against and claim.against in names):
        found = {kind: differences(runs, name, claim.against, kind) for kind in KINDS}
        cells = [study.rows[name].words, *(_difference(found[kind]) for kind in KINDS)]
        if claim.minutes:
            cells.append(_time_ratio(runs, name, claim.against))
        cells.append("; ".join(f"{KINDS[kind]}: {verdict(values)}" for kind, values in found.items() if values))
        rows.append(cells)
    if rows:
        header = (f"against: {study.rows[claim.against].words}", *KINDS.values())
        header += ("times as fast",) * claim.minutes + ("",)
        blocks.append(Table(header, rows, (False,) * len(header)))
    png = draw(lambda drawn: curves(study, names, drawn), runs)
    assert isinstance(png, bytes)
    blocks.append(Picture(slug(claim) + ".png", f"{claim.title}: kNN over the steps", png))
    return [*blocks, Paragraph(claim.found)] if claim.found else blocks


def _time_ratio(runs: Runs, name: str, against: str) -> str:
    """How many times the training time of the row that of ``against`` is, for each seed."""
    some, others = seeds_of(runs, name), seeds_of(runs, against)
    ratios = [others[seed]["train_seconds"] / run["train_seconds"] for seed, run in some.items() if seed in others]
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def below_raw(row: Row, runs: Sequence[dict[str, Any]]) -> str:
    """Words behind a row whose linear figure is not above that of raw pixels. Raises FastSSLError where the study does
    not say why.
    """
    below = [run for run in runs if run["probe"][TRAINED]["linear"] <= run["probe"][RAW]["linear"]]
    if not below:
        return ""
    if not row.why:
        raise FastSSLError(f"{row.words}: {counted(len(below), 'run')} below raw pixels; the study must say why")
    return f" (below raw pixels: {row.why})"


def curves(study: Study, names: Sequence[str], runs: Runs) -> Figure:
    """kNN during training: a line a seed, a colour a row."""
    canvas = Figure(figsize=(9, 4.2), layout="constrained")
    axes = canvas.subplots()
    for number, name in enumerate(names):
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.6}
        look |= {"linestyle": "--" if number >= len(COLOURS) else "-"}
        for place, run in enumerate(seeds_of(runs, name).values()):
            photos = [step * run["batch_size"] / 1000 for step, _ in run["knn"]]
            look |= {"label": study.rows[name].words if place == 0 else None, "alpha": 1 if place == 0 else 0.5}
            axes.plot(photos, [value for _, value in run["knn"]], **look)
    axes.set_xlabel("thousand photos seen")
    axes.set_ylabel("kNN during training, percent")
    axes.grid(axis="y")
    canvas.legend(loc="outside lower center", ncols=2)
    return canvas


def slug(claim: Claim) -> str:
    """The claim's title as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", claim.title.lower()).strip("-")


def page_blocks(study: Study, runs: Runs) -> list[Block]:
    """The whole page."""
    blocks: list[Block] = [Heading(study.title, 1), Paragraph(study.words)]
    if not runs:
        raise FastSSLError("no run of this study has ended yet")
    wanted = len(study.order())
    if len(runs) < wanted:
        blocks.append(Paragraph(f"{len(runs)} of {wanted} runs have ended so far; the others are to come."))
    rows = []
    for name, what in ((RAW, "raw pixels, 16 x 16"), (COLOUR, "colour histogram")):
        probe = next(iter(runs.values()))["probe"][name]
        rows.append([what, *(f"{probe[kind]:.1f}" for kind in KINDS)])
    for arch in dict.fromkeys(run["arch"] for run in runs.values()):
        # Of one seed, network and initialisation all runs begin with the same weights.
        probes = [run["probe"][RANDOM] for run in runs.values() if run["arch"] == arch]
        rows.append([f"{arch} before training", *(_mean([probe[kind] for probe in probes]) for kind in KINDS)])
    blocks += [Heading("What there is to beat"), Table(("", *KINDS.values()), rows, (False, True, True))]
    for claim in study.claims:
        blocks += claim_blocks(study, claim, runs)
    return blocks


def made_blocks(study: Study, runs: Runs, command: str) -> list[Block]:
    """How it was made, and where."""
    last = max(runs.values(), key=lambda run: run["total_seconds"])
    hosts = dict.fromkeys(f"{run['host']['cores']}-core {run['host']['cpu']}" for run in runs.values())
    versions = ", ".join(f"{name} {last['versions'][name]}" for name in ("python", "torch", "torchvision", "timm"))
    commits = ", ".join(dict.fromkeys(str(run["git"]) for run in runs.values()))
    hours = sum(run["cpu_seconds"] for run in runs.values()) / 3600
    return [
        Heading("How it was made"),
        Paragraph("One command makes every run, goes on where it was stopped, and writes runs.jsonl:"),
        Table(("command",), [[Code((command,))]], (False,)),
        Bullets(
            [
                ("Machine:", f"{' and '.join(hosts)}, {hours:.0f} hours of one core in all; {versions}."),
                ("Commits of the runs:", f"{commits}."),
            ]
        ),
    ]


def write_page(study_file: Path, page: Path, more: Callable[[], list[Block]] = list) -> str:
    """Write the page and, beside the records, its pictures; returns the page."""
    study, folder = read_study(study_file), study_file.parent
    runs = read_runs(study, folder)
    command = f"python -m fastssl.benchmarks.study.runs {study_file} --scratch /tmp/study --jobs 2"
    blocks = [*page_blocks(study, runs), *more(), *made_blocks(study, runs, command)]
    for block in blocks:
        if isinstance(block, Picture):
            (folder / block.name).write_bytes(block.png)
    return to_markdown(blocks)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("page", type=Path)
    chosen = parser.parse_args(arguments)
    chosen.page.write_text(write_page(chosen.study, chosen.page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
