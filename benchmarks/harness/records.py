"""The one form in which every benchmark reports: a JSON object a line, with the machine and the versions beside the
figure.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastssl.errors import FastSSLError
from fastssl.utils.json_text import read_json_records
from fastssl.utils.versions import describe_git, describe_host, describe_versions


@dataclass
class Record:
    """One measured figure. Fields that do not apply stay None and are written as null, so that every line has the same
    keys in the same order.

    Attributes:
        bench: which benchmark (``loss``, ``loader``, ``views``, ...).
        recipe, arch, pipeline: what was configured.
        device: ``cpu`` or ``cuda``.
        batch_size: pairs a step and process.
        workers: threads that decode.
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

    bench: str
    recipe: str | None = None
    arch: str | None = None
    pipeline: str | None = None
    device: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    pair_per_s: float | None = None
    view_per_s: float | None = None
    median_s: float | None = None
    runs: int | None = None
    ceiling: float | None = None
    ceiling_name: str | None = None
    fraction_of_ceiling: float | None = None
    bottleneck: str | None = None
    peer: str | None = None
    ratio_to_peer: float | None = None
    host: dict[str, Any] = field(default_factory=describe_host)
    versions: dict[str, str] = field(default_factory=describe_versions)
    git: str | None = field(default_factory=describe_git)
    details: dict[str, Any] | None = None


def read_records(path: Path | str) -> list[Record]:
    """Records of a file of JSON lines, or of one JSON document (``--json FILE.json``).

    Raises:
        FastSSLError: something is not a record; the message names file and line, or the record's number.
        OSError: the file cannot be read.
    """
    names = {item.name for item in fields(Record)}
    records = []
    for where, values in read_json_records(path, "benchmark records"):
        if not isinstance(values, dict) or "bench" not in values:
            raise FastSSLError(f"{where}: not a benchmark record (an object with the key 'bench')")
        try:
            json.dumps(values, ensure_ascii=False).encode("utf-8")
        except (RecursionError, UnicodeEncodeError) as error:  # half a character, written as an escape
            raise FastSSLError(f"{where}: no benchmark record; it is damaged") from error
        unknown = sorted(values.keys() - names)
        if unknown:
            raise FastSSLError(f"{where}: unknown fields {', '.join(unknown)}; was it written by another version?")
        wrong = [name for name, value in values.items() if not _fits(name, value)]
        if wrong:
            raise FastSSLError(f"{where}: {', '.join(wrong)} holds no value of its kind; the record is damaged")
        # A field that an older file lacks is unknown for that run; this machine's value must not take its place.
        records.append(Record(**{"host": {}, "versions": {}, "git": None, **values}))
    return records


_WORDS = {"bench", "recipe", "arch", "pipeline", "device", "ceiling_name", "bottleneck", "peer", "git"}
_COUNTS = {"batch_size", "workers", "runs"}
_OBJECTS = {"host", "versions", "details"}


def _fits(name: str, value: object) -> bool:
    """Whether ``value`` can stand in the field ``name``: words, a count, an object, or a finite figure."""
    if value is None:
        return name not in ("bench", "host", "versions")
    if name in _WORDS:
        return isinstance(value, str)
    if name in _OBJECTS:
        return isinstance(value, dict)
    if name in _COUNTS:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (value == 0 or 1e-30 < abs(value) < 1e30)
