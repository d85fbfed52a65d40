"""Kill the real commands at random moments, start them again, and compare the end with that of a run that nobody
disturbed.

    python tests/soak/kills.py --kills 50 --what all --seed 0 --json kills.json

    conversion      convert-imagenet: the .beton and what stands beside it, byte for byte
    training        pretrain, killed at random steps: weights, optimiser, queue or centre bit for bit, each
                    step's line of metrics once and the same
    bfloat16        the same with bfloat16 networks and the optimiser's float32 weights beside them
    checkpointing   pretrain, killed inside the writing of a checkpoint: at the n-th fsync, rename, link, removal,
                    or while an unfinished file grows
    processes       pretrain in float64 by one process, two, one, ...: against one process that was not killed, to
                    1e-5; two all the time, against two: bit for bit

SIGKILL, so that nothing is tidied up. The children are forked from a process that has the imports done, which makes a
start cheap. Everything is a function of the seed but the moment at which the kernel kills; what failed is printed with
its seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fault import Fault, child
from processes import free_port

#: Seconds for one command, start included: a machine that is shared with others takes long.
PATIENCE = 300.0
_PRELOAD = [
    "fault",
    "fastssl.training.trainer",
    "fastssl.report.finish",
    "fastssl.cli.pretrain",
    "fastssl.cli.convert",
    "fastssl.pipelines.convert.conversion",
    "fastssl.pipelines.engines.native",
]
_COMMON = [
    "train.batch_size=8",
    "train.log_every=1",
    "train.checkpoint_minutes=0",
    "probe.size=32",
    "probe.online_samples=24",
    "probe.final_samples=24",
]
_CROPS = ["views.global_size=32", "views.local_size=16", "views.local_count=2"]
#: Its checkpoints are 60 MB, and take a while to be written. And its steps do not blow differences up as those of LCNet
#: do with batches of 8: there 1e-16 becomes 1 within 20 steps, with nobody killed, in double precision too.
LARGE = "resnet10t"
#: Per method: recipe, network, what makes it small. 48 photos: 6 steps an epoch.
METHODS = {
    "moco": (
        "few-photos-moco",
        "lcnet_035",
        ["views.0.size=32", "moco.queue=64", "moco.projector.hidden=16", "moco.split_bn=2"],
    ),
    "swav": (
        "swav-mobilenetv2-sslight",
        "lcnet_035",
        [
            *_CROPS,
            "swav.prototypes=24",
            "swav.queue=16",
            "swav.queue_epoch=0",
            "swav.projector.hidden=16",
            "swav.projector.out=16",
        ],
    ),
    "dino": (
        "dino-mobilenetv2-sslight",
        "lcnet_035",
        [*_CROPS, "dino.out=32", "dino.projector.hidden=16", "dino.projector.out=16"],
    ),
}
#: Fields of a line of metrics that the clock decides.
_BY_THE_CLOCK = {"pair_per_s", "view_per_s", "data_wait", "data_share", "seconds"}


@dataclass
class Outcome:
    """What became of one series of kills.

    Attributes:
        what, seed: how to make it again.
        kills: how many fell. where: into what, with counts.
        difference: largest difference of any weight, statistic, queue or centre; 0.0 where bytes were compared and are
            equal.
        problems: what was not as it should be; empty: all equal.
        restarts: how often a command ended by itself before it was killed, or was started for the end.
    """

    what: str
    seed: int
    kills: int = 0
    where: Counter = field(default_factory=Counter)
    difference: float = 0.0
    problems: list[str] = field(default_factory=list)
    restarts: int = 0
    seconds: float = 0.0


class Lab:
    """Starts commands in forked children; a context manager that leaves none behind.

    Args:
        folder: for everything that the commands write.
        say: is told of every kill and every start, in a line.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda text: None):
        self.folder, self.say = folder, say
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._running: list = []
        self._logs = 0

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._running:
            process.kill()
            process.join()

    def start(
        self, command: Sequence[str], *, world: int = 1, float64: bool = False, fault: Fault | None = None
    ) -> list:
        """The processes of ``command``, by rank. ``fault`` strikes rank 0."""
        port = str(free_port())
        started = []
        for rank in range(world):
            environment = {"OMP_NUM_THREADS": "1"}
            if world > 1:
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            self._logs += 1
            log = self.folder / f"log-{self._logs:04}.txt"
            process = self._context.Process(
                target=child, args=(list(command), environment, str(log), float64, fault if rank == 0 else None)
            )
            process.log = log
            process.start()
            started.append(process)
        self._running += started
        return started

    def finish(self, processes: list, timeout: float = PATIENCE) -> list[int | None]:
        """Wait for all; exit statuses, None for one that had to be killed because it did not end."""
        deadline, statuses = time.monotonic() + timeout, []
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            ended = process.exitcode is not None
            if not ended:
                process.kill()
                process.join()
            statuses.append(process.exitcode if ended else None)
            self._running.remove(process)
        return statuses

    def run(self, command: Sequence[str], **options: Any) -> None:
        """To the end, which must be a good one.

        Raises:
            RuntimeError: it was not; with what was printed.
        """
        processes = self.start(command, **options)
        statuses = self.finish(processes)
        if any(statuses):
            raise RuntimeError(
                f"{' '.join(command[:1])} ended with {statuses}:\n"
                + "\n".join(process.log.read_text()[-2000:] for process in processes)
            )


def kill(processes: list, rng: random.Random) -> None:
    """SIGKILL for one of them; the others must notice."""
    os.kill(rng.choice(processes).pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], processes: list, timeout: float = PATIENCE, every: float = 0.002) -> bool:
    """Whether ``condition`` came true while all of ``processes`` lived."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and all(process.exitcode is None for process in processes):
        if condition():
            return True
        time.sleep(every)
    return False


# ---------------------------------------------------------------------- training


def pretrain(
    method: str, data: Path, out: Path, epochs: int, *, probe: bool, amp: str = "off", arch: str | None = None
) -> list[str]:
    """The command line."""
    recipe, usual, small = METHODS[method]
    arch = arch or usual
    command = [
        "pretrain",
        "--arch",
        arch,
        "--recipe",
        recipe,
        "--data",
        str(data),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--workers",
        "1",
    ]
    settings = [*_COMMON, *small, f"train.epochs={epochs}", f"train.amp={amp}", f"probe.every_epochs={int(probe)}"]
    return [*command, *itertools.chain.from_iterable(("--set", setting) for setting in settings)]


def rows(out: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = out / "metrics.jsonl"
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_step(out: Path) -> int:
    return max((row["step"] for row in rows(out) if row.get("kind") == "step"), default=0)


def unfinished(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*.tmp"))


def compare_runs(whole: Path, killed: Path, outcome: Outcome, tolerance: float | None) -> None:
    """Note in ``outcome`` where the killed run differs; ``tolerance`` None: nothing may, to the last bit."""
    import torch

    from fastssl.runs.checkpoint import load_checkpoint

    mine, theirs = (load_checkpoint(out / "checkpoints" / "last.pt") for out in (killed, whole))
    for part in ("method", "optimizer"):
        if part == "optimizer" and tolerance is not None:
            continue  # what it moved is compared
        here, there = dict(tensors(mine[part])), dict(tensors(theirs[part]))
        if here.keys() != there.keys():
            outcome.problems.append(f"{part}: other entries: {sorted(here.keys() ^ there.keys())[:3]}")
            continue
        for name, value in there.items():
            if tolerance is not None and name.startswith("teacher") and ("running" in name or "num_batches" in name):
                # Statistics of the BatchNorm groups that the processes shared out among them; training never reads
                # them.
                continue
            found = here[name]
            if value.is_floating_point() and value.numel():
                outcome.difference = max(outcome.difference, float((found.double() - value.double()).abs().max()))
            equal = (
                torch.equal(found, value)
                if tolerance is None or not value.is_floating_point()
                else bool(((found - value).abs() < tolerance).all())
            )
            if not equal:
                outcome.problems.append(
                    f"{part} {name} differs by {float((found.double() - value.double()).abs().max()):.3g}"
                )
    if mine["position"]["step"] != theirs["position"]["step"]:
        outcome.problems.append(f"step {mine['position']['step']} and {theirs['position']['step']}")
    _compare_rows(rows(whole), rows(killed), outcome, tolerance)
    if left := unfinished(killed):
        outcome.problems.append(f"left behind: {left}")


def _compare_rows(whole: list[dict], killed: list[dict], outcome: Outcome, tolerance: float | None) -> None:
    for kind in ("step", "probe"):
        there, here = ([row for row in some if row["kind"] == kind] for some in (whole, killed))
        if [row["step"] for row in here] != [row["step"] for row in there]:
            outcome.problems.append(
                f"lines of kind {kind} are of steps {[row['step'] for row in here]}, wanted "
                f"{[row['step'] for row in there]}"
            )
            continue
        for mine, theirs in zip(here, there):
            for name in theirs.keys() - _BY_THE_CLOCK:
                # Spreads over a part of the photos are other numbers with another number of processes; the loss is not.
                exact = tolerance is None
                if (exact and mine.get(name) != theirs[name]) or (
                    name == "loss" and abs(mine["loss"] - theirs["loss"]) > (tolerance or 0)
                ):
                    outcome.problems.append(
                        f"{kind} {theirs['step']}: {name} is {mine.get(name)}, wanted {theirs[name]}"
                    )


def tensors(value: Any, name: str = ""):
    """(name, tensor) of all tensors in nested dicts and lists."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for key, item in enumerate(value):
            yield from tensors(item, f"{name}.{key}")


def training(
    lab: Lab,
    data: Path,
    method: str,
    kills: int,
    seed: int,
    *,
    sizes: Sequence[int] = (1,),
    float64: bool = False,
    amp: str = "off",
    epochs: int = 8,
    tolerance: float | None = None,
    probe: bool = True,
    arch: str | None = None,
) -> Outcome:
    """Kill at ``kills`` random steps; start ``sizes`` processes in turn. Against a run of ``sizes[0]`` processes that
    nobody disturbs.

    ``tolerance`` None: equal to the last bit; infinite: the difference is noted and not judged.
    """
    rng, steps = random.Random(f"training {method} {seed}"), 6 * epochs
    form = (
        f"{'-'.join(map(str, sizes))} processes, {'float64' if float64 else 'bfloat16' if amp == 'bf16' else 'float32'}"
    )
    outcome = Outcome(f"training {method}, {form}", seed)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(dir=lab.folder))
    whole, killed = folder / "whole", folder / "killed"
    options = {"float64": float64}
    lab.say(
        f"{outcome.what}: first the run that nobody disturbs, {steps} steps; then up to {min(kills, steps - 1)} kills"
    )
    lab.run(pretrain(method, data, whole, epochs, probe=probe, amp=amp, arch=arch), world=sizes[0], **options)
    command, turns = pretrain(method, data, killed, epochs, probe=probe, amp=amp, arch=arch), itertools.cycle(sizes)
    for target in sorted(rng.sample(range(1, steps), min(kills, steps - 1))):
        pause = rng.uniform(0, 0.1)
        processes = lab.start(command, world=next(turns), **options)
        if wait_for(lambda target=target: last_step(killed) >= target, processes):
            time.sleep(pause)
            kill(processes, rng)
        statuses = lab.finish(processes, 60)
        _note(lab, outcome, statuses, processes, killed, steps)
    lab.say("  started for the last time")
    lab.run(command, world=next(turns), **options)
    outcome.restarts += 1
    compare_runs(whole, killed, outcome, tolerance)
    outcome.seconds = time.monotonic() - began
    return outcome


def _note(
    lab: Lab, outcome: Outcome, statuses: list, processes: list, out: Path, steps: int, where: str | None = None
) -> None:
    """Count a kill that fell, and into what; tell of it, as the command is started again."""
    if None in statuses:
        outcome.problems.append(f"a process did not end within 60 s of another's death: {statuses}")
    if -signal.SIGKILL not in statuses:
        outcome.restarts += 1
        lab.say(f"  ended by itself with {statuses}, not killed")
        if any(status not in (0, None) for status in statuses):
            outcome.problems.append(f"ended with {statuses}: {processes[0].log.read_text()[-300:]}")
        return
    outcome.kills += 1
    at = last_step(out)
    epoch_end = at and at % 6 == 0
    found = (
        "in a file"
        if unfinished(out)
        else "start"
        if at == 0
        else "after the last step"
        if at >= steps
        else "epoch's end"
        if epoch_end
        else "step"
    )
    outcome.where[where or found] += 1
    lab.say(f"  kill {outcome.kills}: behind step {at} of {steps}, {where or found}")


def checkpointing(
    lab: Lab, data: Path, kills: int, seed: int, *, method: str = "moco", epochs: int = 3, arch: str = LARGE
) -> Outcome:
    """Kill inside the writing of checkpoints: at calls of the system, and while an unfinished file is there."""
    rng, steps = random.Random(f"checkpointing {seed}"), 6 * epochs
    outcome = Outcome(f"checkpointing {method}", seed)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(dir=lab.folder))
    whole, killed = folder / "whole", folder / "killed"
    lab.say(f"{outcome.what}: first the run that nobody disturbs, {steps} steps; then {kills} kills")
    lab.run(pretrain(method, data, whole, epochs, probe=False, arch=arch))
    command, rounds = pretrain(method, data, killed, epochs, probe=False, arch=arch), 0
    while outcome.kills < kills and rounds < 4 * kills:
        rounds += 1
        kind = rng.choice(["fsync", "replace", "link", "unlink", "chmod", "write"])
        if kind == "write":
            processes = lab.start(command)
            if wait_for(lambda: bool(unfinished(killed)), processes, every=0.0005):
                kill(processes, rng)
            where = "while an unfinished file grows" if unfinished(killed) else None
        else:
            fault = Fault(kind, rng.randint(1, 8), rng.random() < 0.5)
            processes = lab.start(command, fault=fault)
            where = f"{'behind' if fault.behind else 'at'} {kind}"
        statuses = lab.finish(processes)
        _note(lab, outcome, statuses, processes, killed, steps, where)
        if 0 in statuses:  # it reached the end
            lab.say("  at the end: compared, and started over")
            compare_runs(whole, killed, outcome, None)
            shutil.rmtree(killed)
    lab.say("  started for the last time")
    lab.run(command)
    outcome.restarts += 1
    compare_runs(whole, killed, outcome, None)
    outcome.seconds = time.monotonic() - began
    return outcome


# ---------------------------------------------------------------------- conversion


def conversion(lab: Lab, photos: Path, kills: int, seed: int) -> Outcome:
    """Kill conversions at random moments and at calls of the system, until ``kills`` fell."""
    rng = random.Random(f"conversion {seed}")
    outcome = Outcome("conversion", seed)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(dir=lab.folder))
    lab.say(f"{outcome.what}: first the one that nobody disturbs; then {kills} kills")
    at = time.monotonic()
    lab.run(["convert-imagenet", str(photos), str(folder / "whole.beton"), "--workers", "2"])
    whole, duration = _beside(folder / "whole.beton"), time.monotonic() - at
    target, rounds = folder / "killed.beton", 0
    command = ["convert-imagenet", str(photos), str(target), "--workers", "2"]
    while outcome.kills < kills and rounds < 4 * kills:
        rounds += 1
        kind = rng.choice(["time", "time", "add", "fsync", "replace", "unlink"])
        if kind == "time":
            fault, pause = Fault("often", 0), rng.uniform(0, duration)
            processes = lab.start(command, fault=fault)
            processes[0].join(pause)
            if processes[0].exitcode is None:
                kill(processes, rng)
        else:
            processes = lab.start(
                command, fault=Fault(kind, rng.randint(1, 40 if kind in ("add", "fsync") else 4), rng.random() < 0.5)
            )
        statuses = lab.finish(processes)
        if statuses == [-signal.SIGKILL]:
            outcome.kills += 1
            where = "at a random moment" if kind == "time" else f"at or behind {kind}"
            outcome.where[where] += 1
            lab.say(f"  kill {outcome.kills}: {where}")
            if target.exists() and target.read_bytes() != whole[""]:
                outcome.problems.append(f"round {rounds}, {kind}: the file is there and not whole")
        elif statuses == [0]:
            outcome.restarts += 1
            lab.say("  at the end: compared, and started over")
            _compare_beside(whole, target, outcome)
            for path in folder.glob("killed.beton*"):
                path.unlink()
        else:
            outcome.problems.append(
                f"round {rounds}, {kind}: ended with {statuses}: {processes[0].log.read_text()[-300:]}"
            )
    lab.say("  started for the last time")
    lab.run(command)
    outcome.restarts += 1
    _compare_beside(whole, target, outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def _beside(path: Path) -> dict[str, bytes]:
    return {file.name[len(path.name) :]: file.read_bytes() for file in sorted(path.parent.glob(f"{path.name}*"))}


def _compare_beside(whole: dict[str, bytes], target: Path, outcome: Outcome) -> None:
    found = _beside(target)
    if found != whole:
        outcome.problems.append(
            f"files {sorted(found)} instead of {sorted(whole)}, or other bytes in "
            f"{[n for n in whole if found.get(n) != whole[n]]}"
        )


# ---------------------------------------------------------------------- all of it


def make_photos(folder: Path, count: int, *, bad: Sequence[int] = (), side: int = 64) -> Path:
    """A class tree of ``count`` JPEGs, those of ``bad`` damaged."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 3}" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number in bad:
            path.write_bytes(b"no picture")
            continue
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((side + number % 7, side), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def run_all(what: str, kills: int, seed: int, say: Callable[[str], None] = print) -> list[Outcome]:
    """The series that ``what`` names, one after the other."""
    outcomes = []

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        where = ", ".join(f"{count} {name}" for name, count in sorted(outcome.where.items()))
        say(
            f"{'ok  ' if not outcome.problems else 'FAIL'} {outcome.what} (seed {outcome.seed}): "
            f"{outcome.kills} kills ({where}), largest difference "
            f"{outcome.difference:.3g}, {outcome.seconds:.0f} s"
            + "".join(f"\n     {problem}" for problem in outcome.problems[:10])
        )

    with tempfile.TemporaryDirectory(prefix="fastssl-kills-") as work, Lab(Path(work), say) as lab:
        data = Path(work) / "photos.beton"
        say("loading what the commands need, once for all of them; 48 photos are converted")
        lab.run(["convert-imagenet", str(make_photos(Path(work) / "photos", 48)), str(data), "--keep-size"])
        if what in ("conversion", "all"):
            add(conversion(lab, make_photos(Path(work) / "more", 40, bad=(7, 33), side=280), kills, seed))
        # MoCo as often as asked, the others half as often: what they share is most of it.
        at_steps = {method: min(kills, 20) if method == "moco" else min(-(-kills // 2), 10) for method in METHODS}
        if what in ("training", "all"):
            for method, number in at_steps.items():
                add(training(lab, data, method, number, seed))
        if what in ("bfloat16", "all"):
            for method in METHODS:
                add(training(lab, data, method, min(kills, 10), seed, amp="bf16"))
        if what in ("checkpointing", "all"):
            add(checkpointing(lab, data, kills, seed))
        if what in ("processes", "all"):
            for method, number in at_steps.items():
                add(
                    training(
                        lab,
                        data,
                        method,
                        number,
                        seed,
                        sizes=(1, 2),
                        float64=True,
                        tolerance=1e-5,
                        probe=False,
                        arch=LARGE,
                    )
                )
            # What single precision makes of it in the same steps: told, not judged.
            add(training(lab, data, "moco", 5, seed, sizes=(1, 2), tolerance=math.inf, probe=False, arch=LARGE))
            add(training(lab, data, "moco", at_steps["moco"], seed, sizes=(2,), probe=False))
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--kills",
        type=int,
        default=50,
        help="of each series; of those at random steps at most 20, 10 for all methods but MoCo",
    )
    parser.add_argument(
        "--what", choices=["conversion", "training", "bfloat16", "checkpointing", "processes", "all"], default="all"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write what came out, with machine and versions")
    chosen = parser.parse_args(arguments)
    outcomes = run_all(chosen.what, chosen.kills, chosen.seed, lambda text: print(text, flush=True))
    if chosen.json:
        from fastssl.utils.versions import describe_git, describe_host, describe_versions

        about = {"host": describe_host(), "versions": describe_versions(), "git": describe_git()}
        command = f"python tests/soak/kills.py --kills {chosen.kills} --what {chosen.what} --seed {chosen.seed}"
        series = [{**asdict(outcome), "where": dict(outcome.where)} for outcome in outcomes]
        total = sum(outcome.kills for outcome in outcomes)
        chosen.json.write_text(
            json.dumps({"command": command, "kills": total, "series": series, **about}, indent=1) + "\n"
        )
    return int(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
