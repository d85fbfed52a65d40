"""The plan of ``fastssl bench scale`` in words: what is assumed, under which name it is changed, and what comes of it."""

from __future__ import annotations

from dataclasses import asdict

from fastssl.benchmarks.scale import Cluster, Outcome

#: The fields of ``Cluster`` in groups, each with what it is.
NAMES: dict[str, dict[str, str]] = {
    "machines": {
        "hosts": "machines",
        "gpus": "GPUs of a host, with a process each",
        "cores": "cores of a host",
        "others": "of them that other programs use",
        "workers": "decoding threads of a process; 0: its share of the cores but one",
        "slots": "batches that a process has ready or in hand",
    },
    "photos": {
        "images": "photos",
        "epochs": "how often each is seen",
        "batch": "samples of a process and step",
        "image_bytes": "bytes of a stored photo",
        "decode_s": "seconds of a core to decode one (1/1187 was measured here)",
        "read_s": "seconds that a thread waits for one that is not in memory yet",
        "cached": "share of the photos that a host has on its own disk",
        "disk_rate": "bytes/s of that disk",
        "storage_rate": "bytes/s of the storage that all share, for each host",
    },
    "steps": {
        "gpu_rate": "samples/s of a GPU in large batches (a guess: no GPU was measured)",
        "gpu_fixed_s": "seconds of a step that no batch, however small, saves",
        "colour_s": "seconds a sample of colour work on the host; 0: the GPU does it",
        "colour_threads": "threads of that work",
        "step_threads": "threads of the step itself; 0: it runs on a GPU",
        "jitter": "standard deviation of a step's time, as a share of it",
    },
    "network": {
        "reduced_bytes": "bytes that are summed over all processes in a step (gradients)",
        "gathered_bytes": "bytes that each process receives in a step from all others (keys, images)",
        "collectives": "small collectives in a step beside these (BatchNorm over all processes: two a layer)",
        "hop_s": "seconds of a message",
        "link_rate": "bytes/s of a process's link",
    },
    "failures": {
        "host_mtbf_s": "seconds between two failures of one host, on average",
        "checkpoint_s": "seconds for which a checkpoint stops all",
        "checkpoint_every_s": "seconds between two; 0: Young's interval",
        "restart_s": "seconds from a failure to the first step behind the last checkpoint",
    },
}


def assumptions(cluster: Cluster) -> list[str]:
    """A line for each field, ``NAME=VALUE`` as ``--set`` takes it, and what it is."""
    values, lines = asdict(cluster), ["what is assumed (--set NAME=VALUE changes one, --set NAME=VALUE,VALUE tries several):"]
    for group, names in NAMES.items():
        lines.append(f"  {group}")
        lines += [f"    {f'{name}={_value(values[name])}':<26}{words}" for name, words in names.items()]
    return lines


def consequences(cluster: Cluster, outcome: Outcome) -> list[str]:
    """What the simulation made of ``cluster``, line by line."""
    shares = ", ".join(f"{name} {share:.1%}" for name, share in outcome.shares.items() if share >= 0.0005)
    lost = ", ".join(f"{name} {share:.2%}" for name, share in outcome.lost.items())
    return [
        "what comes of it:",
        f"  speed       {outcome.images_per_s:,.0f} images/s by {cluster.processes:,} processes; a step of {cluster.batch * cluster.processes:,} samples takes {1000 * outcome.step_s:.1f} ms",
        f"  where to    {shares}; limit: {outcome.limit}",
        f"  time        {_duration(86400 * outcome.days)} for {cluster.images * cluster.epochs:,} samples; of it {lost}",
        f"  failures    one somewhere every {_duration(cluster.mtbf_s)}, a checkpoint every {_duration(cluster.interval_s)}",
        "tried on this machine instead: --check (the model against measured training), --parts (what docs/scale.md multiplies)",
    ]


def _value(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
