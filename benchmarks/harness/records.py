"""The one form in which every benchmark reports: a JSON object a line, with machine and versions beside the figure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fastssl.benchmarks.harness.timing import MIN_RUNS
from fastssl.errors import FastSSLError
from fastssl.utils.json_text import read_json_records
from fastssl.utils.versions import describe_git, describe_host, describe_versions

# Sums and axes have room for such.
_Count = Annotated[int, Field(strict=True, gt=-(2**53), lt=2**53)]
_Figure = Annotated[float, Field(strict=True, gt=-1e30, lt=1e30, allow_inf_nan=False)]


@dataclass
class Record:
    """One measured figure. Fields that do not apply stay None and are written as null, so that every line has the same
    keys in the same order.

    Attributes:
        bench: which benchmark (``loss``, ``loader``, ``views``, ...).
        recipe, arch, pipeline, device: what was configured; the device is ``cpu`` or ``cuda``.
        batch_size: pairs a step and process. workers: threads that decode.
        pair_per_s, view_per_s: source images, and images through the network, a second. A conversion makes no views:
            its photos count as pairs.
        median_s: median time of one run, in seconds, of ``runs`` runs.
        ceiling, ceiling_name: view/s of the limit that applies, photos/s where no views are made, measured in the same
            process; and what that limit is.
        fraction_of_ceiling: ``view_per_s / ceiling``; ``pair_per_s / ceiling`` where no views are made.
        bottleneck: what the time goes into.
        peer, ratio_to_peer: what was run in turns with ours, and how many times as fast ours is (above 1: ours is
            faster).
        host, versions, git: machine, packages and commit; no paths, no host or user names. Filled in when not given.
        details: further figures of this benchmark.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    bench: str
    recipe: str | None = None
    arch: str | None = None
    pipeline: str | None = None
    device: str | None = None
    batch_size: _Count | None = None
    workers: _Count | None = None
    pair_per_s: _Figure | None = None
    view_per_s: _Figure | None = None
    median_s: _Figure | None = None
    runs: _Count | None = None
    ceiling: _Figure | None = None
    ceiling_name: str | None = None
    fraction_of_ceiling: _Figure | None = None
    bottleneck: str | None = None
    peer: str | None = None
    ratio_to_peer: _Figure | None = None
    host: dict[str, Any] = field(default_factory=describe_host)
    versions: dict[str, Any] = field(default_factory=describe_versions)
    git: str | None = field(default_factory=describe_git)
    details: dict[str, Any] | None = None


_ADAPTER = TypeAdapter(Record)


def read_records(path: Path | str) -> list[Record]:
    """Records of a file of JSON lines, or of one JSON document (``--json FILE.json``). Raises OSError, and FastSSLError
    that names file and line, or the record's number, of what is no record.
    """
    return [_record(where, values) for where, values in read_json_records(path, "benchmark records")]


def _record(where: str, values: Any) -> Record:
    if not isinstance(values, dict) or "bench" not in values:
        raise FastSSLError(f"{where}: not a benchmark record (an object with the key 'bench')")
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
        # A field that an older file lacks is unknown for that run; this machine's value must not take its place.
        return _ADAPTER.validate_python({"host": {}, "versions": {}, "git": None, **values})
    except ValidationError as error:
        faults = {str(fault["loc"][0]): fault["type"] for fault in error.errors()}
        unknown = sorted(name for name, kind in faults.items() if kind == "unexpected_keyword_argument")
        if unknown:
            words = f"unknown fields {', '.join(unknown)}; was it written by another version?"
        else:
            words = f"{', '.join(faults)} holds no value of its kind; the record is damaged"
        raise FastSSLError(f"{where}: {words}") from error
    except (RecursionError, UnicodeEncodeError) as error:  # half a character, written as an escape
        raise FastSSLError(f"{where}: no benchmark record; it is damaged") from error


def missing_parts(record: Record) -> list[str]:
    """Names of what ``record`` lacks, in a fixed order: a figure that nobody can place or repeat is no evidence.

    Every record needs its machine (processor and cores), the versions of Python and torch, at least five runs, the
    commit and the command that made it, and a rate or time beside a ceiling. A ``ceilings`` record is one itself and
    needs a rate in its details instead, a ``soak``, which asks whether a rate stays what it is, its verdicts; a
    ``count`` ran nothing on any machine, and needs what it counted.
    """
    details = record.details or {}
    checks: dict[str, Any] = {
        "machine": record.host.get("cpu") and record.host.get("cores"),
        "versions": record.versions.get("python") and record.versions.get("torch"),
        "runs": (record.runs or 0) >= MIN_RUNS,
        "git": record.git,
        "command": details.get("command"),
    }
    if record.bench == "ceilings":
        checks["figure"] = any(value for name, value in details.items() if "_per_s" in name)
    elif record.bench == "count":
        checks |= {"runs": True, "figure": details.get("launches") and details.get("bytes")}
    elif record.bench == "soak":
        checks["verdicts"] = details.get("verdicts")
    else:
        checks["ceiling"] = record.ceiling and record.ceiling_name
        checks["rate or time"] = any((record.pair_per_s, record.view_per_s, record.median_s))
    return [name for name, there in checks.items() if not there]


def incomplete(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Each part that some records lack, with those records."""
    found: dict[str, list[Record]] = {}
    for record in records:
        for part in missing_parts(record):
            found.setdefault(part, []).append(record)
    return found
