"""A long run, watched from outside: does it grow, slow down, or leave things behind?

A real ``fastssl pretrain`` in a process of its own, over and over the same photos, with a probe behind every epoch and
a checkpoint every now and then. Once a second it is looked at (``vitals.py``); at the end it is stopped as Ctrl-C does,
and what was seen is judged (``steadiness.py``).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fastssl.benchmarks.harness.photos import describe_data, find_data
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.studies.steadiness import (
    MB,
    PROBES,
    Verdict,
    Window,
    after_warmup,
    count,
    memory,
    rate,
    windows,
)
from fastssl.benchmarks.studies.vitals import Sample, watch
from fastssl.config.recipe import Recipe, recipe_to_dict
from fastssl.errors import FastSSLError, counted
from fastssl.models.backbones import resolve_arch
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.runs.checkpoint import load_checkpoint
from fastssl.utils.cores import available_cores

#: More than any soak makes: it ends by the clock.
_EPOCHS = 1_000_000
#: Checkpoints in the whole time, at least.
_CHECKPOINTS = 40
#: Steps a line of metrics: progress should be seen every few seconds.
_LOG_EVERY = 5
#: Pictures of the probe behind every epoch: it should come often, not take the time.
_PROBED = 200
#: Seconds that a run which was told to stop may take for its step in hand and its last checkpoint.
_PATIENCE = 120.0
#: Most points of each curve in the record.
_POINTS = 360


@dataclass
class Watched:
    """What was seen of one run.

    Attributes:
        samples: see ``vitals.Sample``.
        rows: the lines of kind ``step`` in its metrics.jsonl.
        early: it ended before it was told to. status: its exit status; None: it did not end when it was told to, and
            was killed.
        last_words: the end of what it printed.
        saved_step: of the checkpoint that it left; None: there is none that can be read.
        left: files that should not be there any more: unfinished ones in its folder, anything in its folder for
            temporary files.
        probes: how many there were.
    """

    samples: list[Sample]
    rows: list[dict[str, Any]]
    early: bool
    status: int | None
    last_words: str
    saved_step: int | None
    left: list[str]
    probes: int = 0


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


def observe(
    command: Sequence[str],
    folder: Path,
    seconds: float,
    *,
    interval: float = 1.0,
    environment: Mapping[str, str] | None = None,
    each: Callable[[Sample], None] | None = None,
) -> Watched:
    """Start ``command``, watch it for ``seconds``, and stop it with SIGINT.

    Args:
        command: writes its run into ``folder / "run"``, as ``fastssl pretrain --out`` does.
        folder: an empty one; the command's folder for temporary files lies in it, too.
        environment: on top of this process's.
    """
    run, temporary, log = folder / "run", folder / "tmp", folder / "log.txt"
    temporary.mkdir()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, "TMPDIR": str(temporary), **(environment or {})},
            # Ctrl-C at the terminal reaches this process alone, which then stops the run in its own way.
            start_new_session=True,
        )
        try:
            samples = watch(process, run, seconds, interval, each)
            early = process.poll() is not None
            process.send_signal(signal.SIGINT)
            try:
                status: int | None = process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                status = None
        finally:
            process.kill()
            process.wait()
    rows = _rows(run / "metrics.jsonl")
    return Watched(
        samples=samples,
        rows=[row for row in rows if row.get("kind") == "step"],
        early=early,
        status=status,
        last_words=" ".join(log.read_text(errors="replace").split())[-300:],
        saved_step=_saved_step(run),
        left=_left(run, temporary),
        probes=sum(row.get("kind") == "probe" for row in rows),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]


def _saved_step(run: Path) -> int | None:
    try:
        return load_checkpoint(run / "checkpoints" / "last.pt")["position"]["step"]
    except FastSSLError:
        return None


def _left(run: Path, temporary: Path) -> list[str]:
    unfinished = [path for path in sorted(run.rglob("*")) if path.suffix in (".tmp", ".partial", ".draft")]
    return [str(path.relative_to(run.parent)) for path in (*unfinished, *sorted(temporary.rglob("*")))]


def judge(watched: Watched, batch_size: int, least: float = 5.0) -> tuple[list[Verdict], list[Window]]:
    """All verdicts, and the windows that the rate was read off.

    Args:
        batch_size: source pictures a step.
        least: seconds of a window.
    """
    found = windows(watched.samples, watched.rows, batch_size, least=least)
    verdicts = [_life(watched), memory(watched.samples)]
    if any(sample.gpu_bytes is not None for sample in watched.samples):
        verdicts.append(memory(watched.samples, "GPU memory", "gpu_bytes"))
    verdicts += [
        count(watched.samples, "threads", "threads"),
        count(watched.samples, "open files", "descriptors"),
        count(watched.samples, "files in the run's folder", "files"),
        *rate(found),
        Verdict(
            "nothing left",
            not watched.left,
            ", ".join(watched.left[:5]) or "no unfinished file, no temporary file",
            {"left": len(watched.left)},
        ),
    ]
    return verdicts, found


def _life(watched: Watched) -> Verdict:
    """It ran until it was told to stop, stopped with the status of an interrupted command, and saved its last step."""
    last = watched.rows[-1]["step"] if watched.rows else None
    figures = {"status": watched.status, "steps": last, "saved_step": watched.saved_step, "probes": watched.probes}
    if watched.early:
        return Verdict("lives", False, f"ended by itself with status {watched.status}: {watched.last_words}", figures)
    if watched.status is None:
        return Verdict("lives", False, f"did not stop within {_PATIENCE:g} s: {watched.last_words}", figures)
    if watched.probes < PROBES:
        return Verdict(
            "lives",
            False,
            f"{watched.probes} probes were made, {PROBES} are the least: let it run longer, or on fewer photos",
            figures,
        )
    passed = watched.status == 130 and watched.saved_step is not None and watched.saved_step == last
    made = f"{counted(last, 'step')}, {counted(watched.probes, 'probe')}"
    words = f"{made}; stopped with status {watched.status} (wanted 130), checkpoint of step {watched.saved_step}"
    return Verdict("lives", passed, words, figures)


def run(
    recipe: Recipe,
    recipe_name: str,
    data: str,
    device: str,
    workers: int | None,
    minutes: float,
    photos: int = 512,
    folder: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Record]:
    """One record: the rate in its usual fields, verdicts and curves in the details.

    Args:
        data, photos: see :func:`fastssl.benchmarks.harness.photos.find_data`.
        device: ``auto``, ``cpu`` or ``cuda``.
        minutes: of watching, the start of the process included.
        folder: where the run lies while it lasts; None: the system's folder for temporary files.
        say: told what is about to be done, how it stands (once a minute, in short soaks more often), and when it is
            stopped.
    """
    from fastssl.distributed.devices import choose_device

    if say is not None and data == "synthetic":
        say(f"{photos:,} synthetic photos are looked up, or made, which takes some seconds")
    path, name = find_data(data, photos)
    place = choose_device(device)
    chosen = soak_recipe(recipe, minutes)
    with BetonReader(path) as reader:
        about = describe_data(reader, name)
        if len(reader) < chosen.train.batch_size:
            how_many = counted(len(reader), "photo")
            raise FastSSLError(
                f"{name}: {how_many}, fewer than one batch of {chosen.train.batch_size}; lower it with --batch-size"
            )
    with tempfile.TemporaryDirectory(prefix="fastssl-soak-", dir=folder) as work:
        file = Path(work) / f"{recipe_name}.yaml"
        file.write_text(yaml.safe_dump(recipe_to_dict(chosen)))
        command = [
            sys.executable,
            "-m",
            "fastssl",
            "pretrain",
            "--arch",
            chosen.arch,
            "--recipe",
            str(file),
            "--data",
            str(path.resolve()),
        ]
        command += [
            "--out",
            str(Path(work) / "run"),
            "--device",
            place.type,
            "--workers",
            str(workers or available_cores()),
        ]
        command += ["--batch-size", str(chosen.train.batch_size)]  # it stays, however few photos there are
        if say is not None:
            say(
                f"watching a pre-training of {chosen.arch} on {name} for {minutes:g} min, batch "
                f"{chosen.train.batch_size}: the first third or more is warm-up, the rest is judged"
            )
        watched = observe(command, Path(work), 60 * minutes, each=_telling(say, minutes))
    if say is not None and not watched.early:
        say("told to stop, as by Ctrl-C; the judgement:")
    verdicts, found = judge(watched, chosen.train.batch_size)
    views = sum(spec.count for spec in chosen.views)
    by_name = {verdict.name: verdict for verdict in verdicts}
    pair_per_s = by_name["worst window"].figures.get("median")
    return [
        Record(
            bench="soak",
            recipe=recipe_name,
            arch=resolve_arch(chosen.arch),
            pipeline="native",
            device=place.type,
            batch_size=chosen.train.batch_size,
            workers=workers or available_cores(),
            pair_per_s=pair_per_s,
            view_per_s=None if pair_per_s is None else views * pair_per_s,
            runs=len(found),
            bottleneck=words(verdicts),
            details={
                "data": about,
                "minutes": minutes,
                "passed": all(verdict.passed for verdict in verdicts),
                "verdicts": [asdict(verdict) for verdict in verdicts],
                "curves": curves(watched.samples, found),
                "load_average": list(os.getloadavg()),
            },
        )
    ]


def words(verdicts: Sequence[Verdict]) -> str:
    """One sentence: steady, or which lines failed and with what numbers."""
    failed = [f"{verdict.name}: {verdict.words}" for verdict in verdicts if not verdict.passed]
    return "; ".join(failed) if failed else f"steady ({len(verdicts)} lines)"


def require_steady(record: Record) -> None:
    """Raises:
    FastSSLError: a line of the judgement failed; the message names all that did, with their numbers.
    """
    if not record.details["passed"]:
        raise FastSSLError(f"not steady: {record.bottleneck}")


def curves(samples: Sequence[Sample], found: Sequence[Window]) -> dict[str, list]:
    """What a plot needs, thinned to some hundred points: a leak is a matter of minutes."""
    kept = samples[:: max(1, -(-len(samples) // _POINTS))]
    return {
        "seconds": [round(sample.seconds, 1) for sample in kept],
        "own_mb": [round(sample.own_bytes / MB, 2) for sample in kept],
        "resident_mb": [round(sample.resident_bytes / MB, 1) for sample in kept],
        "threads": [sample.threads for sample in kept],
        "open_files": [sample.descriptors for sample in kept],
        "window_seconds": [round(window.seconds, 1) for window in found],
        "window_pair_per_s": [round(window.pair_per_s, 1) for window in found],
        "window_denied": [round(window.denied, 4) for window in found],
        "warm_from": [round(after_warmup(samples)[0].seconds, 1)] if samples else [],
    }


def _telling(say: Callable[[str], None] | None, minutes: float) -> Callable[[Sample], None]:
    """Pass on one sample a minute, in words; of short soaks a dozen in all."""
    due, every = 0.0, min(60.0, 5 * minutes)

    def tell(sample: Sample) -> None:
        nonlocal due
        if say is not None and sample.seconds >= due:
            due = sample.seconds + every
            warm = sample.seconds >= 20 * minutes and sample.probes >= PROBES
            threads = counted(sample.threads, "thread")
            files = counted(sample.descriptors, "open file")
            say(
                f"{_clock(sample.seconds)} of {_clock(60 * minutes)}, {'judged' if warm else 'warm-up'}: "
                f"{'no step yet' if sample.step is None else f'step {sample.step:,}'}, "
                f"{sample.own_bytes / MB:,.1f} MB of its own, {threads}, {files}"
            )

    return tell


def _clock(seconds: float) -> str:
    """``3:07``: minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
