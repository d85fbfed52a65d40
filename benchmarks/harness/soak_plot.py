"""A soak's record as a picture: memory, threads and open files, and rate over the watched time."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from fastssl.benchmarks.harness.records import Record

_WATCHED, _WINDOWS = (
    ("seconds", "own_mb", "threads", "open_files"),
    ("window_seconds", "window_pair_per_s", "window_denied"),
)
_BLUE, _ORANGE, _WARM = "#2563a8", "#d1632f", "#eef1f4"


def soak(records: Sequence[Record]) -> Figure | str:
    """The last soak among ``records``: three panels over the minutes, the warm-up (not judged) in grey.

    The rate is drawn twice where the machine had other work: in the time that the run was given, which is what is
    judged, and by the clock.
    """
    found = [(record, curves) for record in records if record.bench == "soak" and (curves := _curves(record))]
    if not found:
        return "no record of a soak with curves"
    record, curves = found[-1]
    minutes = [seconds / 60 for seconds in curves["seconds"]]
    page = Figure(figsize=(9, 7), layout="constrained")
    memory, counts, rate = page.subplots(3, 1, sharex=True)
    memory.set_title(f"{minutes[-1]:.0f} minutes of {record.recipe}, {record.arch}, {record.device}")
    memory.plot(minutes, curves["own_mb"], color=_BLUE)
    memory.set_ylabel("memory of its own, MB")
    counts.plot(minutes, curves["threads"], color=_BLUE, label="threads")
    counts.plot(minutes, curves["open_files"], color=_ORANGE, label="open files")
    counts.set_ylabel("number")
    ends = [seconds / 60 for seconds in curves["window_seconds"]]
    by_clock, denied = curves["window_pair_per_s"], curves["window_denied"]
    given = [pairs / max(1e-9, 1 - share) for pairs, share in zip(by_clock, denied)]
    rate.plot(ends, given, "o-", color=_BLUE, markersize=4, label="in the time that it was given")
    if any(share > 0.02 for share in denied):
        rate.plot(ends, by_clock, "o-", color=_ORANGE, markersize=4, label="by the clock")
    rate.set_ylabel("pair/s")
    rate.set_xlabel("minutes")
    for axes in (memory, counts, rate):
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        if warm := curves.get("warm_from"):
            axes.axvspan(0, warm[0] / 60, color=_WARM, zorder=0)
    counts.legend(loc="lower right")
    rate.legend(loc="lower left")
    return page


def _curves(record: Record) -> dict[str, list[float]] | None:
    """The curves of a record; None where there are none, or none that fit together."""
    curves = (record.details or {}).get("curves")
    if not isinstance(curves, dict):
        return None
    for names in (_WATCHED, _WINDOWS):
        lists = [curves.get(name) for name in names]
        if not all(
            isinstance(values, list) and all(isinstance(value, (int, float)) for value in values) for values in lists
        ):
            return None
        if len({len(values) for values in lists}) != 1:
            return None
    return {name: values for name, values in curves.items() if isinstance(values, list)} if curves["seconds"] else None
