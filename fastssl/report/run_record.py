"""What a run's folder holds, read for its report. Everything may be missing: a run can be stopped at any moment."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastssl.errors import FastSSLError
from fastssl.runs.metrics_file import rows_in
from fastssl.utils.plain_file import read_plain
from fastssl.utils.yaml_file import MAX_BYTES, parse_yaml

#: Bytes of a run's other files: a line of metrics has 300, and comes once in many steps.
LONGEST = 256 << 20

#: Names of the rows that a run is judged by: the trained network, and what it has to beat, in the table's order.
RAW, COLOURS, MAJORITY = "raw pixels", "colour histogram", "most frequent class"
RANDOM, AS_IT_CAME, TRAINED = "random initialisation", "as it came", "after pre-training"
MARKS = (MAJORITY, RAW, COLOURS, RANDOM, AS_IT_CAME)


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds.

    Attributes:
        summary: summary.json, or {} while the run is not finished.
        config: config.yaml, or {}. config_text: as written.
        steps, probes: the two kinds of rows in metrics.jsonl, in order.
        unreadable: lines of metrics.jsonl that are no JSON object (a line may be cut off by a kill).
    """

    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    steps: list[dict[str, Any]]
    probes: list[dict[str, Any]]
    unreadable: int

    def picture(self, name: str) -> bytes:
        """The content of a PNG file; empty where there is none. The page is passed on, and of a folder that came from
        elsewhere this name may lead to any file of ours.
        """
        with suppress(FileNotFoundError):
            content = read_plain(self.folder / name, LONGEST)
            return content if content.startswith(b"\x89PNG\r\n\x1a\n") else b""
        return b""


def read_run(folder: str | Path) -> RunRecord:
    """Read a run directory. Raises FastSSLError where there is none, or one of its files is damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FastSSLError(f"{folder}: no such run directory; `fastssl pretrain --out DIR` makes one")
    files = ("config.yaml", "metrics.jsonl", "summary.json")
    if not any((folder / name).is_file() for name in files):
        raise FastSSLError(f"{folder}: not a run directory (none of {', '.join(files)} is there)")
    config_text = _text(folder / "config.yaml", MAX_BYTES)
    config = parse_yaml(config_text, f"{folder / 'config.yaml'}: not valid yaml") or {}
    try:
        summary = json.loads(_text(folder / "summary.json") or "{}")
    except (ValueError, RecursionError) as error:
        raise FastSSLError(f"{folder / 'summary.json'}: not valid JSON ({error})") from error
    for name, value in (("config.yaml", config), ("summary.json", summary)):
        if not isinstance(value, dict):
            raise FastSSLError(f"{folder / name}: holds no mapping of keys to values")
    lines = list(filter(str.strip, _text(folder / "metrics.jsonl").splitlines()))
    rows = rows_in(lines)
    steps, probes = ([row for row in rows if row.get("kind") == kind] for kind in ("step", "probe"))
    return RunRecord(folder, summary, config, config_text, steps, probes, unreadable=len(lines) - len(rows))


def probe_rows(rows: Any) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Of a summary's ``probe.rows`` those by mark (``MARKS`` and ``TRAINED``) that are there; and those of the trained
    network's other forms: its teacher, re-estimated BatchNorm statistics.
    """
    marked, others = {}, []
    for row in rows if isinstance(rows, (list, tuple)) else []:
        name = str(get(row, "name"))
        mark = RAW if name.startswith(RAW) else name  # behind raw pixels stands their size
        if mark in (*MARKS, TRAINED):
            marked[mark] = row
        else:
            others.append(row)
    return marked, others


def get(mapping: Any, *keys: str) -> Any:
    """The value behind ``keys``, one in the other; None: there is none."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping


def number(value: Any) -> float | None:
    """``value`` as a float, None when it is no finite number."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if plain else None


def _text(path: Path, at_most: int = LONGEST) -> str:
    try:
        return read_plain(path, at_most).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
