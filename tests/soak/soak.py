"""A long run, watched from outside: does it grow, slow down, or leave things behind?

    python tests/soak/soak.py --minutes 60 --arch lcnet_035 --data samples --batch-size 64 --workers 1 --json soak.jsonl

A real ``fastssl pretrain`` in a process of its own: epochs without end, a probe behind each, forty checkpoints or more.
Once a second it is looked at; at the end it is stopped as Ctrl-C does, and what was seen is judged, each line with its
numbers and its limit. The status is 1 when a line fails. The last line of ``--json`` is a record as of ``fastssl
bench``, which ``fastssl bench report`` reads.

What the limits stand on was measured on MobileNet-sized networks on a CPU (benchmarks/results/soak): behind the first
third of a run its memory is a flat line to 0.1 MB, but for steps of 0.5 to 2.5 MB, some minutes apart, when the heap
finds no gap for a block. So a leak of 1 MB a minute shows within two minutes, but only to a measure that steps do not
fool: see ``creep``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
import yaml

from fastssl.benchmarks.harness.photos import describe_data, find_data
from fastssl.benchmarks.harness.records import Record
from fastssl.config.recipe import Recipe, load_recipe, parse_overrides, recipe_to_dict
from fastssl.distributed.devices import choose_device
from fastssl.errors import FastSSLError, counted
from fastssl.models.backbones import resolve_arch
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.runs.checkpoint import load_checkpoint
from fastssl.utils.cores import available_cores

MB = 2**20
#: More epochs than any soak makes: it ends by the clock. Checkpoints in the whole time, at least. Steps a line of
#: metrics: progress should be seen every few seconds. Pictures of a probe: it should come often, not take the time.
_EPOCHS, _CHECKPOINTS, _LOG_EVERY, _PROBED = 1_000_000, 40, 5, 200
#: Seconds that a run which was told to stop may take for its step in hand and its last checkpoint.
_PATIENCE = 120.0
#: An hour's growth that a run of 100 hours can bear: 1 GB. That is what half an hour or more can tell; within minutes
#: some steps of the heap look like a slope of 10 to 20 MB an hour, and what passes 30 is none of them. A leak of 1 MB a
#: minute is 60.
MEMORY_MB_PER_HOUR, MEMORY_MB_PER_HOUR_SHORT, _LONG = 10.0, 30.0, 1800.0
#: Growth of the last third over the first, whatever its form: what leaks in a few large pieces has no slope to see.
MEMORY_SHARE = 0.03
#: Rate of the last third over that of the first (what remains of sharing the processor's caches and clock is below
#: that), and of the slowest window over the median.
RATE_LAST_OF_FIRST, RATE_WORST = 0.85, 0.5
#: Probes that belong to the warm-up; a run without so many was too short to judge.
PROBES = 2


# ---------------------------------------------------------------------- what is seen


@dataclass(frozen=True)
class Sample:
    """One look at the process.

    Attributes:
        seconds: since the watch began.
        own_bytes: memory that is its own. Pages of files (the photos, libraries) are left out: the kernel takes them
            back when it likes, and they grow until all photos were read once.
        threads, descriptors, files: how many there are; files: in the run's folder.
        waiting_s: how long its first thread stood ready to run while the cores worked for others; 0 where the system
            does not count.
        step, probes: the run's last step and the number of its probes.
        gpu_bytes: memory in use on the GPU, by whomever; None without one.
    """

    seconds: float
    own_bytes: int
    threads: int = 0
    descriptors: int = 0
    files: int = 0
    waiting_s: float = 0.0
    step: int | None = None
    probes: int = 0
    gpu_bytes: int | None = None


@dataclass
class Watched:
    """What was seen of one run.

    Attributes:
        rows: the lines of kind ``step`` in its metrics.jsonl.
        early: it ended before it was told to. status: its exit status; None: it did not end when it was told to, and
            was killed.
        last_words: the end of what it printed.
        saved_step: of the checkpoint that it left; None: there is none that can be read.
        left: files that should not be there any more: unfinished ones in its folder, anything in its folder for
            temporary files.
    """

    samples: list[Sample]
    rows: list[dict[str, Any]]
    early: bool
    status: int | None
    last_words: str
    saved_step: int | None
    left: list[str]


def observe(
    command: Sequence[str],
    folder: Path,
    seconds: float,
    *,
    interval: float = 1.0,
    each: Callable[[Sample], None] = lambda sample: None,
) -> Watched:
    """Start ``command``, which writes its run into ``folder / "run"``, look at it every ``interval`` seconds, and stop
    it with SIGINT after ``seconds``.
    """
    run, temporary, log = folder / "run", folder / "tmp", folder / "log.txt"
    temporary.mkdir()
    with log.open("wb") as output:
        # A session of its own: Ctrl-C at the terminal reaches this process alone, which then stops the run.
        process = psutil.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, "TMPDIR": str(temporary)},
            start_new_session=True,
        )
    samples: list[Sample] = []
    rows: list[dict[str, Any]] = []
    try:
        began, metrics = time.monotonic(), None
        while process.poll() is None and (now := time.monotonic() - began) < seconds:
            if metrics is None and (run / "metrics.jsonl").is_file():
                metrics = (run / "metrics.jsonl").open("rb")
            rows += _added(metrics)
            try:
                samples.append(_look(process, run, now, rows))
                each(samples[-1])
            except psutil.Error:
                pass  # it has just ended
            time.sleep(max(0.0, began + now + interval - time.monotonic()))
        early = process.poll() is not None
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGINT)
        try:
            status: int | None = process.wait(_PATIENCE)
        except psutil.TimeoutExpired:
            status = None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    unfinished = [path for path in sorted(run.rglob("*")) if path.suffix in (".tmp", ".partial", ".draft")]
    return Watched(
        samples=samples,
        rows=[row for row in rows + _added(metrics) if row["kind"] == "step"],
        early=early,
        status=status,
        last_words=" ".join(log.read_text(errors="replace").split())[-300:],
        saved_step=_saved_step(run),
        left=[str(path.relative_to(folder)) for path in (*unfinished, *sorted(temporary.rglob("*")))],
    )


def _look(process: psutil.Process, run: Path, seconds: float, rows: Sequence[dict[str, Any]]) -> Sample:
    with process.oneshot():
        memory = process.memory_info()
        found = Sample(
            seconds,
            memory.rss - memory.shared,
            process.num_threads(),
            process.num_fds(),
            sum(len(names) for _, _, names in os.walk(run)),
            step=next((row["step"] for row in reversed(rows) if row["kind"] == "step"), None),
            probes=sum(row["kind"] == "probe" for row in rows),
            gpu_bytes=_gpu_bytes(),
        )
    try:
        waiting = int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        waiting = 0.0
    return replace(found, waiting_s=waiting)


def _added(metrics: BinaryIO | None) -> list[dict[str, Any]]:
    """The whole lines that were added to the file since it was read before."""
    found = []
    while metrics is not None and (line := metrics.readline()):
        if not line.endswith(b"\n"):
            metrics.seek(-len(line), os.SEEK_CUR)
            break
        found.append(json.loads(line))
    return found


def _gpu_bytes() -> int | None:
    if shutil.which("nvidia-smi") is None:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", first]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return int(done.stdout.split()[0]) * MB if done.returncode == 0 else None


def _saved_step(run: Path) -> int | None:
    try:
        return load_checkpoint(run / "checkpoints" / "last.pt")["position"]["step"]
    except FastSSLError:
        return None


# ---------------------------------------------------------------------- the judgement


@dataclass(frozen=True)
class Verdict:
    """One line of the judgement: ``words`` has the numbers and the limit for a reader, ``figures`` the same by name."""

    name: str
    passed: bool
    words: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """Some seconds of training.

    Attributes:
        seconds: when it ended, since the watch began.
        pair_per_s: source pictures a second of training; probes between epochs are not part of it.
        denied: share of the time in which the first thread stood ready and the cores worked for others.
    """

    seconds: float
    pair_per_s: float
    denied: float

    @property
    def granted_pair_per_s(self) -> float:
        """The rate in the time that the process was given."""
        return self.pair_per_s / max(1e-9, 1 - self.denied)


def after_warmup(samples: Sequence[Sample]) -> list[Sample]:
    """The last two thirds of the watched time, or what follows the second probe if that came later: imports, the first
    steps and the first of everything that comes again and again are over by then.
    """
    return [
        sample
        for sample in samples
        if sample.seconds >= samples[-1].seconds / 3 and (sample.probes >= PROBES or samples[-1].probes < PROBES)
    ]


def _ends(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """The first and the last third."""
    cut = len(values) // 3
    return values[:cut], values[len(values) - cut :]


def creep(seconds: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(lower quartile, median) of the slopes between blocks, in units a second; the median is Theil's and Sen's line
    (Sen, JASA 63, 1968).

    24 blocks, each its median: that passes over what a checkpoint or a probe takes for a moment. What leaks at every
    step or epoch gives all slopes the same sign, and the quartile is the leak. One to three steps of the heap leave a
    quarter or more of the pairs without a step between them, and the quartile is 0; the median would already see two.
    """
    parts = np.array_split(np.arange(len(seconds)), min(24, len(seconds)))
    x, y = np.asarray(seconds, float), np.asarray(values, float)
    middle, level = np.array([(x[part].mean(), np.median(y[part])) for part in parts]).T
    first, second = np.triu_indices(len(parts), 1)
    slopes = (level[second] - level[first]) / (middle[second] - middle[first])
    return float(np.quantile(slopes, 0.25)), float(np.median(slopes))


def memory(samples: Sequence[Sample], name: str = "memory", attribute: str = "own_bytes") -> Verdict:
    """Flat: neither creeping nor grown by much. 30 MB an hour pass up to ten minutes, 10 from half an hour on."""
    seen = after_warmup(samples)
    if len(seen) < 6:
        return Verdict(name, False, f"{len(seen)} samples after warm-up tell nothing; let it run longer")
    seconds, values = [sample.seconds for sample in seen], [getattr(sample, attribute) / MB for sample in seen]
    lower, middle = (3600 * slope for slope in creep(seconds, values))
    size, grown = (float(np.median(part)) for part in _ends(values))
    grown -= size
    share = grown / max(size, 1e-9)
    watched = max(seconds[-1] - seconds[0], 1.0)
    limit = float(np.clip(MEMORY_MB_PER_HOUR * _LONG / watched, MEMORY_MB_PER_HOUR, MEMORY_MB_PER_HOUR_SHORT))
    return Verdict(
        name,
        lower <= limit and share <= MEMORY_SHARE,
        f"{size:.1f} MB after warm-up, creeps by {lower:+.1f} MB an hour (limit {limit:.0f}; Theil-Sen {middle:+.1f}); "
        f"last third {grown:+.2f} MB = {100 * share:+.2f} % over the first (limit {100 * MEMORY_SHARE:g} %)",
        {
            "mb": size,
            "mb_per_hour": lower,
            "limit_mb_per_hour": limit,
            "theil_sen_mb_per_hour": middle,
            "grown_mb": grown,
            "grown_share": share,
        },
    )


def count(samples: Sequence[Sample], name: str, attribute: str) -> Verdict:
    """The number of something is constant: what there is at least, in the last third, is no more than in the first.

    At least, because a probe has threads and files of its own while it lasts; what stays behind it raises the floor.
    """
    seen = [getattr(sample, attribute) for sample in after_warmup(samples)]
    if len(seen) < 6:
        return Verdict(name, False, f"{len(seen)} samples after warm-up tell nothing; let it run longer")
    first, last = _ends(seen)
    words = f"{min(first)} at least in the first third, {min(last)} in the last (limit: no more); at most {max(seen)}"
    return Verdict(name, min(last) <= min(first), words, {"first": min(first), "last": min(last), "most": max(seen)})


def windows(
    samples: Sequence[Sample], rows: Sequence[dict[str, Any]], batch_size: int, number: int = 30, least: float = 5.0
) -> list[Window]:
    """Cut the time after warm-up into at most ``number`` windows of at least ``least`` seconds, ends at lines of
    metrics.jsonl (``rows``, whose ``seconds`` are those of training).
    """
    trained = {row["step"]: row["seconds"] for row in rows}
    seen = [sample for sample in after_warmup(samples) if sample.step in trained]
    length = max(least, (seen[-1].seconds - seen[0].seconds) / number) if seen else 0.0
    edges = seen[:1]
    for sample in seen:
        if sample.seconds - edges[-1].seconds >= length and sample.step > edges[-1].step:
            edges.append(sample)
    found = []
    for one, other in itertools.pairwise(edges):
        pairs = batch_size * (other.step - one.step)
        denied = (other.waiting_s - one.waiting_s) / (other.seconds - one.seconds)
        seconds = max(1e-9, trained[other.step] - trained[one.step])
        found.append(Window(other.seconds, pairs / seconds, min(max(denied, 0.0), 0.99)))
    return found


def rate(found: Sequence[Window]) -> list[Verdict]:
    """Pictures a second in the time that the run was given: the last third against the first, and the slowest window
    against the median.
    """
    if len(found) < 6:
        words = f"{len(found)} windows with progress after warm-up tell nothing; let it run longer"
        return [Verdict("rate", False, words), Verdict("worst window", False, words)]
    granted, clock = [one.granted_pair_per_s for one in found], [one.pair_per_s for one in found]
    first, last = (float(np.median(part)) for part in _ends(granted))
    clock_first, clock_last = (float(np.median(part)) for part in _ends(clock))
    middle, denied = float(np.median(granted)), float(np.mean([one.denied for one in found]))
    kept, worst = last / max(first, 1e-9), min(granted) / max(middle, 1e-9)
    return [
        Verdict(
            "rate",
            kept >= RATE_LAST_OF_FIRST,
            f"{first:,.1f} pair/s in the first third, {last:,.1f} in the last: {kept:.3f} of it (limit "
            f"{RATE_LAST_OF_FIRST:g}); by the clock, waiting for cores that worked for others included "
            f"({100 * denied:.1f} % of the time): {clock_first:,.1f} and {clock_last:,.1f}",
            {
                "first": first,
                "last": last,
                "last_of_first": kept,
                "denied_share": denied,
                "clock_first": clock_first,
                "clock_last": clock_last,
                "windows": len(found),
            },
        ),
        Verdict(
            "worst window",
            worst >= RATE_WORST,
            f"{min(granted):,.1f} pair/s, {worst:.3f} of the median {middle:,.1f} (limit {RATE_WORST:g}); by the clock "
            f"{min(clock):,.1f}",
            {"worst": min(granted), "median": middle, "worst_of_median": worst, "clock_worst": min(clock)},
        ),
    ]


def judge(watched: Watched, batch_size: int, least: float = 5.0) -> tuple[list[Verdict], list[Window]]:
    """All verdicts, and the windows that the rate was read off (``batch_size`` pictures a step, ``least`` seconds)."""
    samples, found = watched.samples, windows(watched.samples, watched.rows, batch_size, least=least)
    on_gpu = bool(samples) and all(sample.gpu_bytes is not None for sample in samples)
    left = ", ".join(watched.left[:5]) or "no unfinished file, no temporary file"
    return [
        _life(watched),
        memory(samples),
        *([memory(samples, "GPU memory", "gpu_bytes")] if on_gpu else []),
        count(samples, "threads", "threads"),
        count(samples, "open files", "descriptors"),
        count(samples, "files in the run's folder", "files"),
        *rate(found),
        Verdict("nothing left", not watched.left, left, {"left": len(watched.left)}),
    ], found


def _life(watched: Watched) -> Verdict:
    """It ran until it was told to stop, stopped with the status of an interrupted command, and saved its last step."""
    last, probes = (
        watched.rows[-1]["step"] if watched.rows else None,
        max((s.probes for s in watched.samples), default=0),
    )
    passed = False
    if watched.early:
        words = f"ended by itself with status {watched.status}: {watched.last_words}"
    elif watched.status is None:
        words = f"did not stop within {_PATIENCE:g} s: {watched.last_words}"
    elif probes < PROBES:
        words = f"{probes} probes were made, {PROBES} are the least: let it run longer, or on fewer photos"
    else:
        passed = watched.status == 130 and watched.saved_step is not None and watched.saved_step == last
        words = (
            f"{last} steps, {counted(probes, 'probe')}; stopped with status {watched.status} (wanted 130), checkpoint "
            f"of step {watched.saved_step}"
        )
    figures = {"status": watched.status, "steps": last, "saved_step": watched.saved_step, "probes": probes}
    return Verdict("lives", passed, words, figures)


# ---------------------------------------------------------------------- the run


def soak_recipe(recipe: Recipe, minutes: float) -> Recipe:
    """``recipe`` without an end, with a checkpoint every fortieth of the time and a small probe behind every epoch."""
    train = replace(
        recipe.train,
        epochs=_EPOCHS,
        samples=None,
        log_every=min(recipe.train.log_every, _LOG_EVERY),
        checkpoint_minutes=min(recipe.train.checkpoint_minutes, minutes / _CHECKPOINTS),
    )
    probe = replace(recipe.probe, every_epochs=1, online_samples=min(recipe.probe.online_samples, _PROBED))
    return replace(recipe, train=train, probe=probe)


def soak(recipe: Recipe, name: str, data: str, device: str, workers: int, minutes: float) -> Record:
    """The rate in a record's usual fields, verdicts and curves in its details. ``data`` is what ``fastssl bench``
    takes.
    """
    path, source = find_data(data)
    place, chosen = choose_device(device), soak_recipe(recipe, minutes)
    with BetonReader(path) as reader:
        about = describe_data(reader, source)
    with tempfile.TemporaryDirectory(prefix="fastssl-soak-") as work:
        file = Path(work) / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe_to_dict(chosen)))
        options: Mapping[str, object] = {
            "arch": chosen.arch,
            "recipe": file,
            "data": path.resolve(),
            "out": Path(work) / "run",
            "device": place.type,
            "workers": workers,
            "batch-size": chosen.train.batch_size,  # it stays, however few photos there are
        }
        command = [sys.executable, "-m", "fastssl", "pretrain"]
        command += [str(word) for option, value in options.items() for word in (f"--{option}", value)]
        print(f"watching {chosen.arch} on {source} for {minutes:g} min: the first third is warm-up", flush=True)
        watched = observe(command, Path(work), 60 * minutes, each=_teller(minutes))
    verdicts, found = judge(watched, chosen.train.batch_size)
    failed = [f"{one.name}: {one.words}" for one in verdicts if not one.passed]
    pair_per_s = float(np.median([one.granted_pair_per_s for one in found])) if found else None
    return Record(
        bench="soak",
        recipe=name,
        arch=resolve_arch(chosen.arch),
        pipeline="native",
        device=place.type,
        batch_size=chosen.train.batch_size,
        workers=workers,
        pair_per_s=pair_per_s,
        view_per_s=pair_per_s and pair_per_s * sum(spec.count for spec in chosen.views),
        runs=len(found),
        bottleneck="; ".join(failed) or f"steady ({len(verdicts)} lines)",
        details={
            "data": about,
            "minutes": minutes,
            "passed": not failed,
            "verdicts": [asdict(verdict) for verdict in verdicts],
            "curves": _curves(watched.samples, found),
            "load_average": list(os.getloadavg()),
        },
    )


def _curves(samples: Sequence[Sample], found: Sequence[Window]) -> dict[str, list[float]]:
    """What a plot needs, thinned to some hundred points: a leak is a matter of minutes."""
    kept = samples[:: -(-len(samples) // 360) or 1]
    return {
        "seconds": [round(sample.seconds, 1) for sample in kept],
        "own_mb": [round(sample.own_bytes / MB, 2) for sample in kept],
        "threads": [sample.threads for sample in kept],
        "open_files": [sample.descriptors for sample in kept],
        "window_seconds": [round(window.seconds, 1) for window in found],
        "window_pair_per_s": [round(window.pair_per_s, 1) for window in found],
        "window_denied": [round(window.denied, 4) for window in found],
        "warm_from": [round(after_warmup(samples)[0].seconds, 1)] if samples else [],
    }


def _teller(minutes: float) -> Callable[[Sample], None]:
    """Print one sample a minute; of short soaks a dozen in all."""
    due = itertools.count(0.0, min(60.0, 5 * minutes))
    following = next(due)

    def tell(sample: Sample) -> None:
        nonlocal following
        if sample.seconds >= following:
            following = next(due)
            print(
                f"{sample.seconds / 60:.1f} of {minutes:g} min: step {sample.step}, {sample.own_bytes / MB:,.1f} MB of "
                f"its own, {counted(sample.threads, 'thread')}, {counted(sample.descriptors, 'open file')}",
                flush=True,
            )

    return tell


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="of watching, the first third is warm-up")
    parser.add_argument("--recipe", default="few-photos")
    parser.add_argument("--arch", help="another network than the recipe's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--data", default="synthetic", help="FILE.beton, 'synthetic' or 'samples'")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--workers", type=int, default=available_cores(), help="decoding threads")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write the record as a line of JSON")
    chosen = parser.parse_args(arguments)
    recipe = load_recipe(chosen.recipe, parse_overrides(chosen.overrides))
    recipe = replace(recipe, arch=chosen.arch or recipe.arch, train=replace(recipe.train, batch_size=chosen.batch_size))
    record = soak(recipe, Path(chosen.recipe).stem, chosen.data, chosen.device, chosen.workers, chosen.minutes)
    for verdict in record.details["verdicts"]:
        print(f"{'ok  ' if verdict['passed'] else 'FAIL'}  {verdict['name']}: {verdict['words']}", flush=True)
    if chosen.json:
        words = [Path(word).name if os.sep in word else word for word in arguments]
        record.details["command"] = shlex.join(["python", "tests/soak/soak.py", *words])
        chosen.json.write_text(json.dumps(asdict(record)) + "\n")
    return int(not record.details["passed"])


if __name__ == "__main__":
    sys.exit(main())
