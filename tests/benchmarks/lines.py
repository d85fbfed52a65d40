"""Records as ``--json FILE.jsonl`` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from fastssl.benchmarks.harness.records import Record


def to_line(record: Record) -> str:
    """One line of JSON; a figure that is NaN or infinite is a ValueError."""
    return json.dumps(asdict(record), allow_nan=False)


def write_records(path: Path | str, records: Iterable[Record]) -> None:
    Path(path).write_text("".join(to_line(record) + "\n" for record in records))
