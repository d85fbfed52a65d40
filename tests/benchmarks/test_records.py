"""The form of a benchmark record, and how it gets to a file and back."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from lines import to_line, write_records

from fastssl.benchmarks.harness.records import Record, read_records
from fastssl.errors import FastSSLError

PUBLIC_FIELDS = [
    "bench",
    "recipe",
    "arch",
    "pipeline",
    "device",
    "batch_size",
    "workers",
    "pair_per_s",
    "view_per_s",
    "median_s",
    "runs",
    "ceiling",
    "ceiling_name",
    "fraction_of_ceiling",
    "bottleneck",
    "peer",
    "ratio_to_peer",
    "host",
    "versions",
    "git",
]


def test_a_line_has_the_public_fields_in_order_and_null_where_nothing_applies() -> None:
    values = json.loads(to_line(Record(bench="loader")))
    assert list(values) == [*PUBLIC_FIELDS, "details"]
    assert [name for name, value in values.items() if value is None] == [*PUBLIC_FIELDS[1:17], "details"] + (
        [] if values["git"] else ["git"]
    )
    assert values["host"]["cores"] >= 1
    assert "torch" in values["versions"]


def test_nothing_in_a_line_tells_where_or_who() -> None:
    line = to_line(Record(bench="loader"))
    for secret in (str(Path.home()), str(Path(__file__).resolve().parents[2]), os.getcwd()):
        if len(secret) > 1:
            assert secret not in line
    if len(socket.gethostname()) > 3:
        assert socket.gethostname() not in line


def test_written_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, second = Record(bench="loss", view_per_s=12.5, details={"queue": 7}), Record(bench="loader", workers=2)
    write_records(path, [first, second])
    assert read_records(path) == [first, second]


def test_an_older_line_does_not_borrow_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"bench": "loss", "view_per_s": 3.0}\n\n')
    (record,) = read_records(path)
    assert (record.host, record.versions, record.git, record.view_per_s) == ({}, {}, None, 3.0)


def test_a_document_is_read_as_lines_are(tmp_path: Path) -> None:
    lines = tmp_path / "results.jsonl"
    write_records(lines, [Record(bench="loss"), Record(bench="step")])
    document, indented = tmp_path / "results.json", tmp_path / "indented.json"
    document.write_text("[" + ",".join(lines.read_text().splitlines()) + "]")
    indented.write_text(json.dumps(json.loads(to_line(Record(bench="loss"))), indent=2))
    assert read_records(document) == read_records(lines) and len(read_records(document)) == 2
    assert [record.bench for record in read_records(indented)] == ["loss"]
    document.write_text('[{"bench": "loss"}, {"bench": "x", "speed": 1}]')
    with pytest.raises(FastSSLError, match=r"results\.json, record 2: unknown fields speed"):
        read_records(document)
    document.write_text('{"bench": "\\ud800"}')
    with pytest.raises(FastSSLError, match="it is damaged"):
        read_records(document)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("9" * 5000, "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a benchmark record"),
        ('{"bench": "x", "speed": 1}', "unknown fields speed"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"bench": "loss"}\n' + line + "\n")
    with pytest.raises(FastSSLError, match=rf"results\.jsonl, line 2: {message}"):
        read_records(path)
