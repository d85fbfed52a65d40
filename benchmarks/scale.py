"""Training on many hosts, on paper: a small model of what a cluster makes of decoding, steps, collectives, checkpoints and failures.

    processes of a host   decoding threads fill a ring of batches; a consumer colours a batch and makes the step
    all processes         meet in every step: it ends with the slowest one, and with the collectives behind it
    the run               writes checkpoints, is struck by failures, starts again from the last checkpoint

Work is fluid: a batch that is half decoded is half a batch. Everything else is arithmetic on the fields of ``Cluster``, and seeded. What the model knows of one
machine is held against measurements by ``fastssl bench scale --check`` (``scale_check.py``); the page docs/scale.md says where its other figures come from.

Formulas: checkpoint intervals as in Young 1974 (Communications of the ACM 17) and Daly 2006 (Future Generation Computer Systems 22); collectives by the usual
latency-and-bandwidth model (Thakur et al. 2005, International Journal of High Performance Computing Applications 19).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from fastssl.benchmarks.records import Record
from fastssl.pipelines.errors import FastSSLError

#: Steps that are simulated, and those at the beginning that are not counted: the rings fill meanwhile.
_STEPS, _WARM = 600, 100
#: Runs with failures whose mean is taken.
_RUNS = 50
#: Of a step's time: what is below it is not called the limit.
_WORTH = 0.05


@dataclass(frozen=True)
class Cluster:
    """Machines and a run on them. Bytes, seconds, photos; none of the defaults that begin with ``gpu`` or describe a network was measured by us.

    Attributes:
        hosts, gpus: hosts, and processes (one a GPU) on each.
        cores: of a host. others: of them that other programs use. workers: decoding threads of a process; 0: the cores that are left when each process keeps one for itself.
        slots: batches in a process's ring, the one in the consumer's hands included (the native engine: prefetch + 2).
        images, epochs, batch: photos, how often they are seen, samples of a process and step.
        image_bytes: of a stored photo. decode_s: processor seconds of a photo on a decoding thread.
        read_s: for which a decoding thread waits for a photo that is not in the page cache.
        cached: share of the photos that the host's own disk holds. disk_rate, storage_rate: bytes a second that a host reads from its disk, and from
            the storage that all share.
        gpu_rate: samples a second of one GPU in large batches. gpu_fixed_s: seconds of a step that no batch, however small, saves.
        colour_s: seconds a sample that the consumer computes on the host before the step, on ``colour_threads`` threads; 0 where the GPU does it.
        step_threads: threads on which the step itself runs; 0: a GPU, whose step the decoders do not slow down.
        jitter: standard deviation of a step's time, as a share of it.
        reduced_bytes: summed over all processes in a step (gradients). gathered_bytes: that each process receives in a step from all others (keys, images).
        collectives: small ones in a step beside these two, whose time is all latency (BatchNorm over all processes: two a layer).
        hop_s, link_rate: latency of a message, and bytes a second of a process's link.
        host_mtbf_s: mean time between failures of one host. checkpoint_s: for which a checkpoint stops all. checkpoint_every_s: between two; 0: Young's interval.
        restart_s: from a failure to the first step behind the last checkpoint.
    """

    hosts: int = 64
    gpus: int = 8
    cores: int = 96
    others: float = 0.0
    workers: int = 0
    slots: int = 5
    images: int = 1_000_000_000
    epochs: int = 1
    batch: int = 64
    image_bytes: float = 40e3
    decode_s: float = 1 / 1187
    read_s: float = 0.0
    cached: float = 1.0
    disk_rate: float = 5e9
    storage_rate: float = 1e9
    gpu_rate: float = 2000.0
    gpu_fixed_s: float = 0.01
    colour_s: float = 0.0
    colour_threads: int = 0
    step_threads: int = 0
    jitter: float = 0.02
    reduced_bytes: float = 20e6
    gathered_bytes: float = 0.0
    collectives: int = 0
    hop_s: float = 1e-5
    link_rate: float = 25e9
    host_mtbf_s: float = 1e7
    checkpoint_s: float = 2.0
    checkpoint_every_s: float = 0.0
    restart_s: float = 300.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value, whole = getattr(self, item.name), isinstance(item.default, int)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or (whole and value != int(value)):
                raise FastSSLError(f"scale: {item.name} must be a {'whole number' if whole else 'number'}, not {value!r}")
            if value < 0 or (item.name in _POSITIVE and value == 0):
                raise FastSSLError(f"scale: {item.name} must be {'positive' if item.name in _POSITIVE else 'at least 0'}, not {value:g}")
            if math.isinf(value) and item.name not in _ENDLESS:
                raise FastSSLError(f"scale: {item.name} cannot be endless")
        if self.others >= self.cores:
            raise FastSSLError("scale: others leave none of the cores")
        if self.cached > 1 or self.jitter > 1:
            raise FastSSLError("scale: cached and jitter are shares, at most 1")
        if self.slots < 2:
            raise FastSSLError("scale: slots must be at least 2, one to fill and one in the consumer's hands")

    @property
    def processes(self) -> int:
        return self.hosts * self.gpus

    @property
    def decoders(self) -> int:
        """Decoding threads of a process."""
        return self.workers or max(1, self.cores // self.gpus - 1)

    @property
    def load_s(self) -> float:
        """Seconds in which a process's threads render a batch, when nothing else takes their cores: by cores, by own disk or by the storage of all."""
        cores = min(self.decoders, (self.cores - self.others) / self.gpus)
        share = self.batch * self.image_bytes * self.gpus
        threads = self.batch * (self.decode_s / cores + self.read_s / self.decoders)
        return max(threads, share * self.cached / self.disk_rate, share * (1 - self.cached) / self.storage_rate)

    @property
    def step_s(self) -> float:
        """Seconds of a step on a batch that is there, colour and collectives left out."""
        return self.gpu_fixed_s + self.batch / self.gpu_rate

    @property
    def collective_s(self) -> float:
        """Seconds of a step's collectives, none of them hidden behind the backward pass: fastssl has one plain all-reduce behind it."""
        n = self.processes
        return (
            reduce_s(self.reduced_bytes, n, self.hop_s, self.link_rate)
            + gather_s(self.gathered_bytes, n, self.hop_s, self.link_rate)
            + self.collectives * reduce_s(0, n, self.hop_s, self.link_rate)
        )

    @property
    def mtbf_s(self) -> float:
        """Mean time between two failures anywhere."""
        return self.host_mtbf_s / self.hosts

    @property
    def interval_s(self) -> float:
        """Seconds of work between two checkpoints."""
        return self.checkpoint_every_s or young_s(self.checkpoint_s, self.mtbf_s)


_POSITIVE = {"hosts", "gpus", "cores", "images", "epochs", "batch", "disk_rate", "storage_rate", "gpu_rate", "link_rate", "host_mtbf_s"}
_ENDLESS = {"disk_rate", "storage_rate", "gpu_rate", "link_rate", "host_mtbf_s"}


# ---------------------------------------------------------------------- closed forms


def reduce_s(size: float, processes: int, hop_s: float, rate: float) -> float:
    """Seconds of an all-reduce of ``size`` bytes over a pair of trees: 2 log2 n messages deep, each byte twice through the link."""
    return 0.0 if processes == 1 else 2 * math.ceil(math.log2(processes)) * hop_s + 2 * size / rate


def gather_s(size: float, processes: int, hop_s: float, rate: float) -> float:
    """Seconds of an all-gather of which each process receives ``size`` bytes; nothing where there is nothing to receive."""
    return 0.0 if processes == 1 or size == 0 else math.ceil(math.log2(processes)) * hop_s + size / rate


def young_s(checkpoint_s: float, mtbf_s: float) -> float:
    """Young's interval between checkpoints, sqrt(2 C M)."""
    return math.sqrt(2 * checkpoint_s * mtbf_s)


def daly_s(work_s: float, every_s: float, checkpoint_s: float, mtbf_s: float, restart_s: float) -> float:
    """Daly's expected time of a run: M e^(R/M) (e^((tau + C)/M) - 1) work / tau."""
    return mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((every_s + checkpoint_s) / mtbf_s) * work_s / every_s


def pace(cores: int, step_threads: int, decoders: int, others: float = 0.0) -> tuple[float, float]:
    """How fast step and decoders go on cores that they share, 1 being undisturbed.

    A step on one thread takes its even share of the cores, as every decoder does. The threads of a step that has several wait for each other at the end of every
    layer: they are dealt to the cores in turn, the decoders behind them, a core's time is shared out evenly among its threads, and the step goes as fast as
    the slowest of its own. A step that gives up half of one core loses half of its pace then and not a quarter: what its other thread does meanwhile is waiting.
    Other programs take their part of all cores alike.
    """
    threads, left = step_threads + decoders, cores - others
    if step_threads < 2:
        even = min(1.0, left / max(1, threads))
        return even, even
    load = [max(1.0, len(range(core, threads, cores)) * cores / left) if threads > left else 1.0 for core in range(cores)]
    shares = [1 / load[number % cores] for number in range(step_threads, threads)]
    return 1 / load[0], sum(shares) / len(shares) if shares else 1.0


def worlds(batch: int, gpus: int = 8, least: int = 1) -> list[int]:
    """Numbers of processes on whole hosts that share a global batch evenly, ``least`` samples or more each; largest first."""
    return [n for n in range(batch // least // gpus * gpus, 0, -gpus) if batch % n == 0]


# ---------------------------------------------------------------------- the simulation


@dataclass(frozen=True)
class Outcome:
    """What a cluster makes of a run.

    Attributes:
        images_per_s: of all processes in the steady state, checkpoints and failures left out.
        step_s: seconds from one step's end to the next one's.
        shares: of ``step_s``: ``step`` (undisturbed), ``contention`` (decoders, and others, on the step's cores), ``data`` (waiting for a batch), ``stragglers`` (waiting for
            the slowest process), ``collectives``; they sum to 1.
        limit: the largest of the shares but the step's, or ``step``, in words.
        days: of all epochs with checkpoints and failures. lost: shares of them: ``checkpoints``, ``rework`` (done again), ``restarts``.
    """

    images_per_s: float
    step_s: float
    shares: dict[str, float]
    limit: str
    days: float
    lost: dict[str, float]


def simulate(cluster: Cluster, seed: int = 0, steps: int = _STEPS) -> Outcome:
    """Simulate ``steps`` steps, and the run with failures. The same cluster and seed give the same outcome."""
    rng = np.random.default_rng(seed)
    step_s, shares = _steady(cluster, rng, steps)
    work_s = max(1, cluster.images // (cluster.batch * cluster.processes)) * step_s * cluster.epochs
    total, lost = with_failures(work_s, cluster.interval_s, cluster.checkpoint_s, cluster.mtbf_s, cluster.restart_s, rng)
    return Outcome(
        images_per_s=cluster.batch * cluster.processes / step_s,
        step_s=step_s,
        shares=shares,
        limit=_limit(cluster, shares),
        days=total / 86400,
        lost={name: seconds / total for name, seconds in lost.items()},
    )


def _steady(cluster: Cluster, rng: np.random.Generator, steps: int) -> tuple[float, dict[str, float]]:
    """(seconds a step, shares of it). Arrays are (processes,)."""
    load, room = cluster.load_s, cluster.slots - 1.0
    colour = np.full(cluster.processes, cluster.batch * cluster.colour_s)
    colour_paces, step_paces = _paces(cluster, cluster.colour_threads), _paces(cluster, cluster.step_threads)
    ready = np.zeros(cluster.processes)
    spent = dict.fromkeys(("step", "contention", "data", "stragglers", "collectives"), 0.0)
    spread = math.sqrt(math.log1p(cluster.jitter**2))  # a log-normal factor of mean 1 and this standard deviation
    for number in range(_WARM + steps):
        wait = np.maximum(0.0, 1 - ready) * load
        ready = np.maximum(ready, 1.0) - 1
        step = cluster.step_s * np.exp(spread * rng.standard_normal(cluster.processes) - spread**2 / 2)
        coloured, ready = _work(colour, colour_paces, ready, room, load)
        stepped, ready = _work(step, step_paces, ready, room, load)
        own = wait + coloured + stepped
        idle = own.max() - own
        if load:
            ready = np.minimum(room, ready + (idle + cluster.collective_s) / load)
        if number >= _WARM:
            parts = {"step": colour + step, "contention": coloured + stepped - colour - step, "data": wait, "stragglers": idle}
            for name, value in parts.items():
                spent[name] += float(value.mean())
            spent["collectives"] += cluster.collective_s
    total = sum(spent.values())
    return total / steps, {name: seconds / total for name, seconds in spent.items()}


def _paces(cluster: Cluster, threads: int) -> tuple[float, float, float]:
    """Paces of a host whose processes each compute on ``threads``: the consumers' beside the decoders, the decoders' against what they have alone, which
    ``load_s`` knows, and the consumers' when the decoders rest."""
    decoders = cluster.decoders * cluster.gpus
    if not threads:  # a GPU's
        return 1.0, 1.0, 1.0
    work, load = pace(cluster.cores, threads * cluster.gpus, decoders, cluster.others)
    alone, _ = pace(cluster.cores, threads * cluster.gpus, 0, cluster.others)
    return work, load / pace(cluster.cores, 0, decoders, cluster.others)[1], alone


def _work(
    work: np.ndarray, paces: tuple[float, float, float], ready: np.ndarray, room: float, load: float
) -> tuple[np.ndarray, np.ndarray]:
    """(seconds that the consumer's ``work`` takes, batches ready behind it): both run until the ring is full or the work is done; a full ring leaves the cores
    to the consumer."""
    beside, loading, alone = paces
    if not load:
        return work / alone, np.full_like(ready, room)
    together = np.minimum(work / beside, (room - ready) * load / loading)
    return together + (work - beside * together) / alone, np.minimum(room, ready + loading * together / load)


def _limit(cluster: Cluster, shares: dict[str, float]) -> str:
    name = max((name for name in shares if name != "step"), key=lambda name: shares[name])
    if shares[name] < _WORTH:
        return "step"
    if name != "data":
        return name
    threads = cluster.batch * (
        cluster.decode_s / min(cluster.decoders, (cluster.cores - cluster.others) / cluster.gpus) + cluster.read_s / cluster.decoders
    )
    if cluster.load_s == threads:
        return "data: decoding threads"
    share = cluster.batch * cluster.image_bytes * cluster.gpus
    return "data: own disk" if cluster.load_s == share * cluster.cached / cluster.disk_rate else "data: shared storage"


def with_failures(
    work_s: float, every_s: float, checkpoint_s: float, mtbf_s: float, restart_s: float, rng: np.random.Generator, runs: int = _RUNS
) -> tuple[float, dict[str, float]]:
    """(mean seconds of a run, what of them went to ``checkpoints``, ``rework`` and ``restarts``); failures come at exponential intervals, in restarts too."""
    if math.isinf(mtbf_s) and math.isinf(every_s):
        return work_s, {"checkpoints": 0.0, "rework": 0.0, "restarts": 0.0}
    lost = {"checkpoints": 0.0, "rework": 0.0, "restarts": 0.0}
    pieces = max(1, math.ceil(work_s / every_s)) if every_s > 0 else 1
    need = work_s / pieces + checkpoint_s
    # Pieces are alike and failures have no memory: how often each is tried is a geometric draw, and so it is for restarts.
    survive, restarted = math.exp(-need / mtbf_s), math.exp(-restart_s / mtbf_s)
    if survive < 1e-6 or restarted < 1e-6:
        raise FastSSLError(
            f"scale: a failure every {mtbf_s:.0f} s lets no piece of {need:.0f} s or restart of {restart_s:.0f} s end; checkpoint more often"
        )
    for _ in range(runs):
        failures = int((rng.geometric(survive, pieces) - 1).sum())
        lost["rework"] += float(_before(need, mtbf_s, failures, rng).sum())
        broken = int((rng.geometric(restarted, failures) - 1).sum()) if failures else 0
        lost["restarts"] += failures * restart_s + float(_before(restart_s, mtbf_s, broken, rng).sum())
        lost["checkpoints"] += pieces * checkpoint_s
    lost = {name: seconds / runs for name, seconds in lost.items()}
    return work_s + sum(lost.values()), lost


def _before(limit: float, mean: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` exponential times of this mean, given that they end before ``limit``."""
    return -mean * np.log1p(rng.random(count) * math.expm1(-limit / mean))


# ---------------------------------------------------------------------- for the command


def clusters(overrides: Iterable[str], base: Cluster | None = None) -> Iterator[tuple[str, Cluster]]:
    """(what differs from ``base``, cluster) for each combination of ``NAME=VALUE[,VALUE...]``.

    Raises:
        FastSSLError: no such name, or no number.
    """
    base, names = base or Cluster(), {item.name: isinstance(item.default, int) for item in fields(Cluster)}
    choices: dict[str, list[float]] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if name not in names or not equals:
            raise FastSSLError(f"--set {override}: give NAME=VALUE, the names being {', '.join(names)}")
        try:
            values = [float(word) for word in text.split(",")]
        except ValueError:
            raise FastSSLError(f"--set {override}: {text!r} is no number, and no list of numbers with commas") from None
        choices[name] = [int(value) if names[name] and value == value // 1 and not math.isinf(value) else value for value in values]
    for combination in itertools.product(*choices.values()):
        changes = dict(zip(choices, combination))
        yield ", ".join(f"{name} {value:g}" for name, value in changes.items()), replace(base, **changes)


def run(words: str, cluster: Cluster, seed: int = 0) -> list[Record]:
    """One record of a simulation. It holds no rate of its own where a measured one stands: all of it is in ``details``."""
    outcome = simulate(cluster, seed)
    said = (
        f"simulated{f' ({words})' if words else ''}: {outcome.images_per_s:,.0f} images/s, {outcome.days:.3g} days, limit: {outcome.limit}"
    )
    details = {"part": "simulated", "cluster": _finite(asdict(cluster)), "seed": seed, "outcome": asdict(outcome)}
    return [Record(bench="scale", bottleneck=said, details=details)]


def _finite(values: dict) -> dict:
    """JSON has no word for endless rates."""
    return {name: "endless" if isinstance(value, float) and math.isinf(value) else value for name, value in values.items()}
