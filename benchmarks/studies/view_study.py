"""Is an easier view better for a small network? Runs that differ in the views, in the target's smoothing and in the
seed alone, and a table of them.

    baseline   threshold 0.14, local views of 28 px, pairs weigh by their number        (of 64 px: as 96 is of 224)
    sslight    threshold 0.30, local views of 36 px, weights 0.4 and 0.6                (as 128 is of 224)
    smoothed   sslight, and the InfoNCE target smoothed over the nearest negatives

Every run is a `fastssl pretrain` of its own on one thread; a study that was stopped goes on where it stood. Written are
``runs.jsonl``, one line for each run with all its probes, and ``table.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastssl.config.recipe import load_recipe
from fastssl.errors import FastSSLError, counted
from fastssl.report.finish import RANDOM, RAW, REESTIMATED, TEACHER, TRAINED

DESIGNS: dict[str, tuple[str, ...]] = {
    "baseline": ("views.threshold=0.14", "views.local_size=28", "views.weights=null"),
    "sslight": ("views.threshold=0.3", "views.local_size=36", "views.weights=[0.4, 0.6]"),
}
#: light-moco's target: 0.2 of the mass on the nearest, in steps, growing by a cosine
SMOOTHED = ("smoothing=0.2", "weighting=stepped", "neighbors=5", "smoothing_schedule=cosine")
CONTRASTIVE = ("moco", "simclr")


@dataclass(frozen=True)
class Cell:
    """One kind of run: a method's recipe and what is changed in it."""

    method: str
    design: str

    @property
    def overrides(self) -> tuple[str, ...]:
        if self.design == "smoothed":
            return (*DESIGNS["sslight"], *(f"{self.method}.{change}" for change in SMOOTHED))
        return DESIGNS[self.design]


def cells(methods: Iterable[str], smoothed: Iterable[str]) -> list[Cell]:
    """Both designs for each method, and the smoothed target for those of ``smoothed``."""
    return [
        *itertools.starmap(Cell, itertools.product(methods, DESIGNS)),
        *(Cell(method, "smoothed") for method in smoothed),
    ]


def run(cell: Cell, seed: int, recipes: Path, data: Path, val: Path, out: Path, epochs: int | None) -> dict[str, Any]:
    """One run, or what it left behind if it is done already.

    Raises:
        FastSSLError: it failed, with the end of what it said; or what is there was made by another command.
    """
    recipe, folder = recipes / f"{cell.method}.yaml", out / f"{cell.method}-{cell.design}-{seed}"
    changes = [f"--epochs={epochs}"] if epochs else []
    changes += [argument for change in cell.overrides for argument in ("--set", change)]
    options = [
        "--arch",
        load_recipe(str(recipe)).arch,
        "--seed",
        str(seed),
        "--device",
        "cpu",
        "--workers",
        "1",
        *changes,
    ]
    names = f"--recipe {recipe.name} --data {data.name} --val {val.name}"  # names, not paths: records are passed on
    shown = f"OMP_NUM_THREADS=1 fastssl pretrain {names} {shlex.join(options)}"
    made_by, told = folder / "study.txt", f"{shown}\n{recipe.read_text()}"
    if (folder / "summary.json").is_file():
        if not made_by.is_file() or made_by.read_text() != told:
            raise FastSSLError(
                f"{folder}: holds a run of another command or recipe; remove it, or choose another --out"
            )
    else:
        files = ["--recipe", recipe, "--data", data, "--val", val, "--out", folder]
        command = [sys.executable, "-m", "fastssl", "pretrain", *map(str, files), *options]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise FastSSLError(f"{folder.name}: status {done.returncode}: {done.stderr[-500:].strip()}")
        made_by.write_text(told)
    summary = json.loads((folder / "summary.json").read_text())
    steps = [
        row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "step"
    ]
    ends = {
        name: (steps[0][name], steps[-1][name])
        for name in ("loss", "kl", "alignment", "embedding_std", "target_entropy")
        if name in steps[0]
    }
    kept = ("arch", "data", "host", "versions", "git", "epochs", "steps", "train_seconds")
    if not summary["probe"]["rows"]:
        raise FastSSLError(f"{data} and {val}: the photos have no labels to judge by")
    return {
        "method": cell.method,
        "design": cell.design,
        "seed": seed,
        "command": shown,
        "probe": {row["name"]: {kind: row[kind] for kind in ("knn", "linear")} for row in summary["probe"]["rows"]},
        "first_and_last": ends,
        **{name: summary[name] for name in kept},
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds; and, seed by seed, what a design gained over the baseline."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in sorted(runs, key=lambda one: one["seed"]):
        grouped.setdefault((one["method"], one["design"]), []).append(one)
    lines = [
        "| method | views, target | kNN | linear | kNN, BatchNorm of centre crops | kNN, teacher | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (method, design), some in grouped.items():
        probes = [one["probe"] for one in some]
        values = [
            _spread([probe[TRAINED]["knn"] for probe in probes]),
            _spread([probe[TRAINED]["linear"] for probe in probes]),
            _spread([probe[TRAINED + REESTIMATED]["knn"] for probe in probes if TRAINED + REESTIMATED in probe]),
            _spread([probe[TEACHER]["knn"] for probe in probes if TEACHER in probe]),
        ]
        lines.append(f"| {method} | {design} | {' | '.join(values)} | {len(some)} |")
    marks = [one["probe"] for one in runs]
    for name in (RANDOM, RAW):
        how_many = counted(len(marks), "run")
        lines.append(
            f"| | {name} | {_spread([m[name]['knn'] for m in marks])} | "
            f"{_spread([m[name]['linear'] for m in marks])} | | | {how_many} |"
        )
    lines += ["", "| method | difference, seed by seed | kNN | linear |", "| --- | --- | --- | --- |"]
    for method, (better, base) in itertools.product(
        dict.fromkeys(m for m, _ in grouped), (("sslight", "baseline"), ("smoothed", "sslight"))
    ):
        pairs = _pairs(grouped.get((method, better), []), grouped.get((method, base), []))
        if pairs:
            gains = [
                _spread([a[TRAINED][kind] - b[TRAINED][kind] for a, b in pairs], signed=True)
                for kind in ("knn", "linear")
            ]
            lines.append(f"| {method} | {better} - {base} | {' | '.join(gains)} |")
    return "\n".join(lines) + "\n"


def _pairs(some: Sequence[dict], others: Sequence[dict]) -> list[tuple[dict, dict]]:
    by_seed = {one["seed"]: one["probe"] for one in others}
    return [(one["probe"], by_seed[one["seed"]]) for one in some if one["seed"] in by_seed]


def _spread(values: Sequence[float], signed: bool = False) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m fastssl.benchmarks.studies.view_study``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", type=Path, required=True, help="folder with METHOD.yaml")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, of runs.jsonl and table.md")
    parser.add_argument("--methods", nargs="+", default=["moco", "simclr", "dino", "swav"])
    parser.add_argument(
        "--smoothed", nargs="*", default=list(CONTRASTIVE), help="methods that also run with a smoothed target"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    chosen = parser.parse_args(arguments)
    if wrong := set(chosen.smoothed) - set(CONTRASTIVE):
        parser.error(f"--smoothed {' '.join(wrong)}: only {' and '.join(CONTRASTIVE)} have a target to smooth")
    chosen.out.mkdir(parents=True, exist_ok=True)
    # Seed by seed, so that a study that is stopped early has whole rows.
    jobs = [(cell, seed) for seed in chosen.seeds for cell in cells(chosen.methods, chosen.smoothed)]
    pool = ThreadPoolExecutor(chosen.jobs)
    try:
        started = {
            pool.submit(run, *job, chosen.recipes, chosen.data, chosen.val, chosen.out, chosen.epochs): job
            for job in jobs
        }
        runs: dict[tuple[Cell, int], dict[str, Any]] = {}
        for future in as_completed(started):
            (cell, seed), one = started[future], future.result()
            runs[cell, seed] = one
            print(f"{cell.method} {cell.design} seed {seed}: kNN {one['probe'][TRAINED]['knn']:.1f}", flush=True)
            in_order = [runs[job] for job in jobs if job in runs]
            (chosen.out / "runs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in in_order))
            (chosen.out / "table.md").write_text(table(in_order))
    except FastSSLError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # runs in hand end, no other begins
    return 0


if __name__ == "__main__":
    sys.exit(main())
