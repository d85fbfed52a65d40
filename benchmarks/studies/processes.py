"""Do two processes make the run that one makes? The weights behind a whole run, and MoCo's loss curves with and without
shuffle-BN.

    weights    every method through the real loop and loader, in float64: the largest difference of any value
               behind the last step
    curves     MoCo in float32: one process without BatchNorm groups, one with them, two with them; "noise" is
               the spread between seeds

Two processes are started by torchrun over gloo on this machine. Written are ``processes.json`` with everything, and
``processes.md``, the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl.config.recipe import load_recipe, parse_overrides
from fastssl.distributed.collectives import broadcast_object
from fastssl.distributed.group import joined
from fastssl.distributed.world import world_from_environment
from fastssl.errors import FastSSLError, counted
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.training.setup import RunOptions, prepare
from fastssl.training.trainer import train
from fastssl.utils.versions import describe_git, describe_host, describe_versions

_SMALL = (
    "views.global_size=32",
    "views.local_size=16",
    "views.local_count=2",
    "probe.every_epochs=0",
    "train.log_every=1",
)
_SMALL_PLAIN = ("views.0.size=32", "probe.every_epochs=0", "train.log_every=1")
#: method -> recipe, and what makes it small
EXACT: dict[str, tuple[str, tuple[str, ...]]] = {
    "moco": ("light-moco-mobilenetv3-sslight", (*_SMALL, "moco.projector.hidden=32", "moco.split_bn=1")),
    "moco, shuffle-BN": ("light-moco-mobilenetv3-sslight", (*_SMALL, "moco.projector.hidden=32", "moco.split_bn=4")),
    "simclr": (
        "simclr-mobilenetv3",
        (*_SMALL_PLAIN, "simclr.projector.hidden=32", "simclr.neighbors=1", "simclr.weighting=nearest"),
    ),
    "swav": (
        "swav-mobilenetv2-sslight",
        (*_SMALL, "swav.prototypes=24", "swav.queue_epoch=0", "swav.projector.hidden=32", "swav.projector.out=16"),
    ),
    "dino": ("dino-mobilenetv2-sslight", (*_SMALL, "dino.out=48", "dino.projector.hidden=32", "dino.projector.out=16")),
}
#: name -> (processes, moco.split_bn)
CURVES: dict[str, tuple[int, int]] = {
    "one process, off": (1, 1),
    "one process, on": (1, 4),
    "two processes, on": (2, 4),
}


@dataclass(frozen=True)
class Job:
    """One run: a recipe with changes, a seed, and whether it is made in float64."""

    recipe: str
    arch: str
    overrides: tuple[str, ...]
    seed: int = 0
    exact: bool = False


def exact_jobs(arch: str, batch: int, epochs: int) -> dict[str, Job]:
    """A run of each method, by name; the queues hold two batches."""
    found = {}
    for method, (recipe, small) in EXACT.items():
        own = {"moco": (f"moco.queue={4 * batch}",), "swav": (f"swav.queue={2 * batch}",)}.get(
            method.partition(",")[0], ()
        )
        length = (
            f"train.batch_size={batch}",
            f"train.epochs={epochs}",
            f"optim.warmup_epochs={min(1, epochs - 1)}",
            "optim.warmup_lr=null",
        )
        found[method] = Job(recipe, arch, (*small, *own, *length), exact=True)
    return found


def curve_job(arch: str, split_bn: int, batch: int, epochs: int, seed: int) -> Job:
    """A run of few-photos-moco in small."""
    length = (f"train.batch_size={batch}", f"train.epochs={epochs}", f"moco.queue={2 * batch}", "optim.warmup_epochs=1")
    return Job(
        "few-photos-moco",
        arch,
        (*_SMALL_PLAIN, *length, f"moco.split_bn={split_bn}", "moco.projector.hidden=128"),
        seed,
    )


def run_here(jobs: Iterable[Job], data: Path) -> list[dict[str, Any]]:
    """The runs one after the other, as one of the processes that the environment says: ``state`` and ``start`` (values
    by name), ``losses`` of each step.
    """
    world, found = world_from_environment(), []
    with joined(world, torch.device("cpu")):
        for job in jobs:
            torch.set_default_dtype(torch.float64 if job.exact else torch.float32)
            try:
                with tempfile.TemporaryDirectory() as folder:
                    found.append(_run(job, data, Path(broadcast_object(folder)) / "run"))  # one folder, as of any run
            finally:
                torch.set_default_dtype(torch.float32)
    return found


class _Silence:
    def row(self, row: dict[str, Any], done: int, total: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    note = message


def _run(job: Job, data: Path, out: Path) -> dict[str, Any]:
    recipe = load_recipe(job.recipe, parse_overrides([f"arch={job.arch}", *job.overrides]))
    options = RunOptions(recipe_name=job.recipe, data=data, out=out, device="cpu", seed=job.seed, workers=1)
    with BetonReader(data) as reader:
        run = prepare(recipe, options, reader, None, _Silence(), world_from_environment(), torch.device("cpu"))
        try:
            start = {name: value.clone() for name, value in run.step.method.state_dict().items()}
            train(run)
        finally:
            run.close()
    rows = run.folder.metrics.rows() if run.folder else []
    losses = [row["loss"] for row in rows if row["kind"] == "step"]
    return {"state": run.step.method.state_dict(), "start": start, "losses": losses, "steps": run.position.step}


def run_under_torchrun(jobs: Iterable[Job], data: Path, processes: int = 2) -> list[dict[str, Any]]:
    """``run_here`` in several processes of this machine; what the first one found.

    Raises:
        FastSSLError: they failed; with the last lines of what they said.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.json"
        file.write_text(json.dumps([asdict(job) for job in jobs]))
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "-m",
            "fastssl.benchmarks.studies.processes",
        ]
        found = subprocess.run(
            [sys.executable, *command, "--data", str(data), "--worker", str(file)],
            stderr=subprocess.PIPE,
            text=True,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        if found.returncode:
            raise FastSSLError(f"{counted(processes, 'process')} failed: {' '.join(found.stderr.split())[:2000]}")
        return torch.load(file.with_suffix(".result"), weights_only=True)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest absolute difference of two states' values; infinite where whole numbers (counters, pointers)
    differ.
    """
    found = 0.0
    for name, value in one.items():
        apart = (value.double() - other[name].double()).abs().max().item() if value.numel() else 0.0
        found = max(found, apart if value.is_floating_point() or not apart else float("inf"))
    return found


def compare_weights(jobs: dict[str, Job], alone: Sequence[dict], together: Sequence[dict]) -> list[dict[str, Any]]:
    """A row for each method."""
    return [
        {
            "method": method,
            "steps": one["steps"],
            "values": sum(value.numel() for value in one["state"].values()),
            "max_difference": difference(one["state"], two["state"]),
            "moved": difference(
                {name: value for name, value in one["state"].items() if value.is_floating_point()},
                {name: value for name, value in one["start"].items() if value.is_floating_point()},
            ),
        }
        for method, one, two in zip(jobs, alone, together)
    ]


def summarise(curves: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean loss of the last quarter of each run; its spread between seeds, and the differences between the kinds of
    run, seed by seed.
    """
    ends = {
        (row["name"], row["seed"]): statistics.fmean(row["losses"][-(len(row["losses"]) // 4 or 1) :]) for row in curves
    }
    names, seeds = list(dict.fromkeys(name for name, _ in ends)), sorted({seed for _, seed in ends})
    kinds = [
        {
            "name": name,
            "end": statistics.fmean(ends[name, seed] for seed in seeds),
            "between_seeds": statistics.stdev(ends[name, seed] for seed in seeds) if len(seeds) > 1 else None,
        }
        for name in names
    ]
    by_run = {(row["name"], row["seed"]): row["losses"] for row in curves}
    pairs = []
    for first, second in ((names[1], names[2]), (names[0], names[2])) if len(names) == 3 else ():
        apart = [ends[second, seed] - ends[first, seed] for seed in seeds]
        steps = [max(abs(a - b) for a, b in zip(by_run[first, seed], by_run[second, seed])) for seed in seeds]
        pairs.append(
            {
                "first": first,
                "second": second,
                "mean": statistics.fmean(apart),
                "largest": max(map(abs, apart)),
                "largest_step": max(steps),
            }
        )
    return {"kinds": kinds, "pairs": pairs}


def to_markdown(record: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "| method | steps | values | largest difference of any value, 1 against 2 processes | training moved "
        "values by up to |"
    ]
    lines += ["| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row['method']} | {row['steps']} | {row['values']:,} | {row['max_difference']:.1e} | {row['moved']:.2g} |"
        for row in record["weights"]
    ]
    lines += [
        "",
        "| MoCo, shuffle-BN | mean loss of the last quarter | between seeds (standard deviation) |",
        "| --- | --- | --- |",
    ]
    lines += [
        f"| {row['name']} | {row['end']:.4f} | {row['between_seeds']:.4f} |" for row in record["summary"]["kinds"]
    ]
    lines += [
        "",
        "| difference, same seed | of the last quarter, mean | largest | of any step, largest |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['second']} - {row['first']} | {row['mean']:+.4f} | {row['largest']:.4f} | {row['largest_step']:.4f} |"
        for row in record["summary"]["pairs"]
    ]
    return "\n".join(lines) + "\n"


def measure(
    data: Path, *, exact_arch: str, arch: str, exact_batch: int, batch: int, epochs: int, seeds: int
) -> dict[str, Any]:
    """Everything, as it is written to ``processes.json``."""
    exact = exact_jobs(exact_arch, exact_batch, 1)
    kinds = {
        (name, seed): curve_job(arch, split, batch, epochs, seed)
        for name, (_, split) in CURVES.items()
        for seed in range(seeds)
    }
    single = {key: job for key, job in kinds.items() if CURVES[key[0]][0] == 1}
    double = {key: job for key, job in kinds.items() if CURVES[key[0]][0] == 2}
    together = run_under_torchrun([*exact.values(), *double.values()], data)
    alone = run_here([*exact.values(), *single.values()], data)
    losses = {
        **{key: found["losses"] for key, found in zip(single, alone[len(exact) :])},
        **{key: found["losses"] for key, found in zip(double, together[len(exact) :])},
    }
    curves = [
        {
            "name": name,
            "processes": CURVES[name][0],
            "split_bn": CURVES[name][1],
            "seed": seed,
            "losses": [round(v, 6) for v in losses[name, seed]],
        }
        for name, seed in kinds
    ]
    weights = compare_weights(exact, alone[: len(exact)], together[: len(exact)])
    return {
        "weights": weights,
        "curves": curves,
        "summary": summarise(curves),
        "jobs": {m: asdict(job) for m, job in exact.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastssl.benchmarks.studies.processes", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="a .beton file")
    parser.add_argument("--out", type=Path, default=Path("processes"), help="folder to write to; default: processes/")
    parser.add_argument(
        "--exact-arch", default="resnet10t", help="network where weights are compared; default: resnet10t"
    )
    parser.add_argument("--arch", default="lcnet_035", help="of the curves; default: lcnet_035")
    parser.add_argument(
        "--exact-batch",
        type=int,
        default=128,
        help="photos a step where weights are compared, for one epoch; default: 128",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="photos a step of the curves; default: 64")
    parser.add_argument("--epochs", type=int, default=4, help="of the curves; default: 4")
    parser.add_argument("--seeds", type=int, default=3, help="of the curves, at least 2; default: 3")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        if options.worker:
            jobs = [
                Job(**{**job, "overrides": tuple(job["overrides"])}) for job in json.loads(options.worker.read_text())
            ]
            found = run_here(jobs, options.data)
            if world_from_environment().is_main:
                torch.save(found, options.worker.with_suffix(".result"))
            return 0
        if options.seeds < 2:
            raise FastSSLError("--seeds must be at least 2: their spread is what is compared with")
        sizes = {
            "exact_arch": options.exact_arch,
            "arch": options.arch,
            "exact_batch": options.exact_batch,
            "batch": options.batch_size,
            "epochs": options.epochs,
            "seeds": options.seeds,
        }
        with BetonReader(options.data) as reader:
            about = {"name": options.data.name, "samples": len(reader)}
        record = measure(options.data, **sizes)
    except FastSSLError as error:
        print(f"processes: {error}", file=sys.stderr)
        return 1
    shown = (
        f"python -m fastssl.benchmarks.studies.processes --data {options.data.name} --exact-arch "
        f"{options.exact_arch} --exact-batch {options.exact_batch} --arch {options.arch} "
        f"--batch-size {options.batch_size} --epochs {options.epochs} --seeds {options.seeds}"
    )
    record = {
        "command": shown,
        "data": about,
        "host": describe_host(),
        "versions": describe_versions(),
        "git": describe_git(),
        **record,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "processes.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "processes.md").write_text(to_markdown(record))
    print(to_markdown(record), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
