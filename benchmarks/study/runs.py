"""Make the runs of a study, side by side on one thread each, and a line of ``runs.jsonl`` of every one that ended.

    python -m fastssl.benchmarks.study.runs benchmarks/results/study/study.yaml --scratch /tmp/study --jobs 2

Every run is a ``fastssl pretrain`` of its own on rendered views of the sample set's places, more of them than install
with the package, or on a set that ``--photos NAME=FOLDER`` brings. Ctrl-C and SIGTERM save what is running; the same
command goes on. A run whose row was changed since is made again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fastssl.benchmarks.study.definition import Row, Study, fingerprint, read_study, recipe_of
from fastssl.data.sample_set import build_sample_set
from fastssl.errors import FastSSLError, counted
from fastssl.pipelines.beton.dataset import open_beton
from fastssl.report.run_record import TRAINED
from fastssl.utils.json_text import read_json_records, to_json

RECORDS = "runs.jsonl"
#: By row and seed.
Runs = dict[tuple[str, int], dict[str, Any]]
#: Points of a curve that a record keeps at most.
POINTS = 40


def read_runs(study: Study, folder: Path) -> Runs:
    """Records in ``folder`` of the rows and photos as they are now, by (row, seed); of two the later one. Raises
    FastSSLError for what is none.
    """
    path = folder / RECORDS
    if not path.is_file():
        return {}
    now = {name: fingerprint(row, folder) for name, row in study.rows.items()}
    found: Runs = {}
    for where, record in read_json_records(path, "runs of a study"):
        if not isinstance(record, dict) or not {"row", "seed", "fingerprint", "photos"} <= set(record):
            raise FastSSLError(f"{where}: not a run of a study")
        name = record["row"]
        if not isinstance(name, str) or not isinstance(seed := record["seed"], int):
            raise FastSSLError(f"{where}: not a run of a study")
        asked = now.get(name) == record["fingerprint"] and seed in range(study.rows[name].seeds)
        if asked and record["photos"] == study.photos_of(name):
            found[name, seed] = record
    return found


def ensure_photos(study: Study, scratch: Path) -> Path:
    """The folder of the study's views, train.beton and val.beton, rendered once; the runs on them lie there, too."""
    folder = scratch / ("places-" + "-".join(f"{part}-{count}" for part, count in study.photos.items()))
    if not folder.is_dir():
        building = folder.with_name(f"{folder.name}-building")
        building.mkdir(parents=True, exist_ok=True)
        build_sample_set(building, study.photos)
        building.rename(folder)
    return folder


class Runner:
    """Starts runs and, when asked to, stops them all. ``sets``: folders of other photos than the rendered ones."""

    def __init__(self, study: Study, folder: Path, scratch: Path, sets: dict[str, Path]) -> None:
        self._study, self._folder, self._scratch = study, folder, scratch
        self._photos = {"": ensure_photos(study, scratch), **sets}
        self._running: set[subprocess.Popen] = set()
        self._lock, self._stopping = threading.RLock(), threading.Event()  # a second signal meets the first

    def stop(self) -> None:
        """Ask every run to save and end, and start no more."""
        with self._lock:
            self._stopping.set()
            for process in self._running:
                os.kill(process.pid, signal.SIGTERM)  # not send_signal, which may take the status that `_run` waits for

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def make(self, name: str, seed: int) -> dict[str, Any] | None:
        """The record of a run, made or gone on with; None if it was stopped. Raises FastSSLError where it failed."""
        if self.stopped:
            return None
        row = self._study.rows[name]
        mark = fingerprint(row, self._folder)
        beside = self._scratch / row.photos if row.photos else self._photos[""]
        out = beside / f"{name}-{seed}-{mark}"
        arguments = ["--seed", str(seed), "--device", "cpu", "--workers", "1"]
        for key, value in row.changes.items():
            arguments += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
        if not (out / "summary.json").is_file() and not self._run(row, out, arguments):
            return None
        at = f"{row.photos}/" if row.photos else ""
        shown = f"--data {at}train.beton --val {at}val.beton --recipe {row.recipe} {shlex.join(arguments)}"
        command = f"OMP_NUM_THREADS=1 fastssl pretrain {shown}"
        asked = {"row": name, "seed": seed, "fingerprint": mark, "command": command}
        try:
            return {**asked, "photos": self._study.photos_of(name), **_record(out)}
        except (OSError, ValueError, LookupError) as error:
            raise FastSSLError(f"{out}: damaged ({error}); delete it, and the run is made again") from error

    def _run(self, row: Row, out: Path, arguments: list[str]) -> bool:
        photos = self._photos[row.photos]
        files = ["--recipe", recipe_of(row, self._folder), "--data", photos / "train.beton", "--out", out]
        files += ["--val", photos / "val.beton"]
        command = [sys.executable, "-m", "fastssl", "pretrain", *map(str, files), *arguments]
        out.mkdir(parents=True, exist_ok=True)
        with (out / "output.log").open("ab") as log:
            with self._lock:
                if self._stopping.is_set():
                    return False
                # A process group of its own: Ctrl-C of a terminal would reach it beside `stop`, and twice ends it hard.
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                with (out / "cpu-seconds.txt").open("a") as file:  # a line a start, whole where its end was seen
                    file.write(f"{_machine()} ")
                options: dict[str, Any] = {"stdout": log, "stderr": log, "start_new_session": True}
                process = subprocess.Popen(command, env=environment, **options)
                self._running.add(process)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            with self._lock:
                self._running.discard(process)
        with (out / "cpu-seconds.txt").open("a") as file:
            file.write(f"{usage.ru_utime + usage.ru_stime:.1f}\n")
        if process.returncode == 130 or (process.returncode and self.stopped):  # -15: before it could listen
            return False
        if process.returncode:
            said = (out / "output.log").read_text(errors="replace")[-600:].strip()
            raise FastSSLError(f"{out.name}: status {process.returncode}: {said}")
        return True


def _machine() -> str:
    """A name of this machine until it starts anew: those that are lent look alike and are not as fast."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text()[:8] if boot.is_file() else platform.node()


def _record(out: Path) -> dict[str, Any]:
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    starts = [line.split() for line in (out / "cpu-seconds.txt").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    thinned = steps[:: -(-len(steps) // POINTS)]
    kept = ("arch", "epochs", "steps", "samples_seen", "train_seconds", "total_seconds", "pair_per_s")
    return {
        **{name: summary[name] for name in kept},
        "cpu_seconds": round(sum(float(seconds) for _, seconds in starts), 1),
        "starts": len(starts),
        "machines": sorted({machine for machine, _ in starts}),
        "batch_size": round(summary["samples_seen"] / summary["steps"]),
        "probe": {
            row["name"]: {kind: round(row[kind], 2) for kind in ("knn", "linear")} for row in summary["probe"]["rows"]
        },
        "knn": [(line["step"], round(line["knn"], 2)) for line in lines if line["kind"] == "probe" and line["knn"]],
        "loss": [(line["step"], round(line["loss"], 4)) for line in thinned],
        "spread": [(line["step"], round(line["embedding_std"], 3)) for line in thinned],
        "state": summary["verdict"]["state"],
        **{name: summary[name] for name in ("host", "versions", "git")},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="study.yaml; runs.jsonl is written beside it")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the views and the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows alone")
    parser.add_argument(
        "--photos", nargs="+", default=[], metavar="NAME=FOLDER", help="train.beton, val.beton of a set"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="these seeds alone")
    chosen = parser.parse_args(arguments)
    if chosen.jobs < 1:
        parser.error(f"--jobs {chosen.jobs}: one at least")
    study, folder = read_study(chosen.study), chosen.study.parent
    if unknown := set(chosen.only or ()) - set(study.rows):
        parser.error(f"--only {' '.join(sorted(unknown))}: no such row; there are {', '.join(study.rows)}")
    sets = {name: Path(path) for name, _, path in (text.partition("=") for text in chosen.photos)}
    for name, path in sets.items():
        if name not in study.sets:
            parser.error(f"--photos {name}: no such set; there are {', '.join(study.sets) or 'none'}")
        for part in ("train", "val"):
            if not (file := path / f"{part}.beton").is_file():
                parser.error(f"--photos {name}={path}: there is no {part}.beton")
            with open_beton(file) as reader:
                if len(reader) != (wanted := study.sets[name][part]):
                    parser.error(f"{file}: {counted(len(reader), 'photo')}, where the study has {wanted:,}")
    done = read_runs(study, folder)
    left = [
        (name, seed)
        for name, seed in study.order()
        if (name, seed) not in done
        and (not chosen.only or name in chosen.only)
        and (chosen.seeds is None or seed in chosen.seeds)
    ]
    print(f"{len(done)} runs are on record, {len(left)} to make", flush=True)
    for name in [name for name in study.sets if name not in sets]:
        without = [one for one in left if study.rows[one[0]].photos == name]
        left = [one for one in left if one not in without]
        if without:
            print(f"{counted(len(without), 'run')} left out: --photos {name}=FOLDER brings their photos", flush=True)
    if not left:
        return 0
    runner, failed = Runner(study, folder, chosen.scratch, sets), 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: runner.stop())
    with ThreadPoolExecutor(chosen.jobs) as pool:
        jobs = {pool.submit(runner.make, *one): one for one in left}
        for job in as_completed(jobs):
            name, seed = jobs[job]
            try:
                record = job.result()
            except Exception as error:  # the others go on
                failed += 1
                print(f"{time.strftime('%H:%M')} {name}, seed {seed}: FAILED: {error}", file=sys.stderr, flush=True)
                continue
            if record is not None:
                with (folder / RECORDS).open("a") as file:
                    file.write(to_json(record) + "\n")
                after = record["probe"][TRAINED]
                words = f"kNN {after['knn']:.1f}, linear {after['linear']:.1f}, {record['cpu_seconds'] / 60:.0f} min"
                print(f"{time.strftime('%H:%M')} {name}, seed {seed}: {words}", flush=True)
    return 130 if runner.stopped else min(failed, 1)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (FastSSLError, OSError) as error:
        sys.exit(f"error: {error}")
