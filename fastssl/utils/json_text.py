"""JSON that every reader takes: without NaN and Infinity; and records in both of their forms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastssl.errors import FastSSLError


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as JSON; numbers that are not finite become null."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), indent=indent)


def records_to_json(records: list[dict[str, Any]], name: str) -> str:
    """The content of the file ``name``: of ``*.json`` the record or an array of several; else a line each."""
    lines = [to_json(record) for record in records]
    if name.lower().endswith(".json") and len(lines) != 1:
        return "[" + ",".join(f"\n{line}" for line in lines) + "\n]\n"
    return "".join(f"{line}\n" for line in lines)


def read_json_records(path: Path | str, expected: str) -> Iterator[tuple[str, Any]]:
    """What `records_to_json` wrote, in either form: (file and place in it, for messages; value). Raises OSError where
    the file cannot be read, FastSSLError with file and line for what is not JSON; ``expected`` ("a benchmark record")
    ends the message.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FastSSLError(f"{path}: not text; expected {expected} in JSON") from error
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):  # more than one document: an object a line
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{path}, line {number}"
            try:
                if line.strip():
                    yield where, json.loads(line)
            except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
                why = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", error)
                raise FastSSLError(f"{where}: not JSON ({why}); expected {expected}") from error
        return
    if isinstance(whole, list):
        yield from ((f"{path}, record {number}", value) for number, value in enumerate(whole, 1))
    else:
        yield f"{path}, line 1", whole
