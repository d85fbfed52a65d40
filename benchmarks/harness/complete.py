"""What a record must have before it is published: a figure that nobody can place or repeat is no evidence."""

from __future__ import annotations

from collections.abc import Iterable

from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.timing import MIN_RUNS

#: The figures of a ``ceilings`` record, all in its details.
CEILING_FIGURES = (
    "decode_per_s_1_thread",
    "decode_per_s",
    "copy_bytes_per_s",
    "product_flop_per_s",
    "disk_read_bytes_per_s",
)


def missing_parts(record: Record) -> list[str]:
    """Names of what ``record`` lacks, in a fixed order; empty when it is complete.

    Every record needs its machine (processor and cores), the versions of Python and torch, at least five runs, the
    commit and the command that made it. A measured rate or time stands beside a ceiling; a ``ceilings`` record is one
    itself and needs one of CEILING_FIGURES instead, a ``soak`` its verdicts: it asks whether a rate stays what it is,
    not how high it could be.
    """
    details = record.details or {}
    checks = {
        "machine": bool(record.host.get("cpu")) and bool(record.host.get("cores")),
        "versions": bool(record.versions.get("python")) and bool(record.versions.get("torch")),
        "runs": (record.runs or 0) >= MIN_RUNS,
        "git": bool(record.git),
        "command": bool(details.get("command")),
    }
    if record.bench == "ceilings":
        checks["figure"] = any(details.get(name) for name in CEILING_FIGURES)
    elif record.bench == "soak":
        checks["verdicts"] = bool(details.get("verdicts"))
    else:
        checks["ceiling"] = bool(record.ceiling) and bool(record.ceiling_name)
        checks["rate or time"] = any((record.pair_per_s, record.view_per_s, record.median_s))
    return [name for name, there in checks.items() if not there]


def incomplete(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Each part that some records lack, with those records."""
    found: dict[str, list[Record]] = {}
    for record in records:
        for part in missing_parts(record):
            found.setdefault(part, []).append(record)
    return found
