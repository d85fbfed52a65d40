"""Records as files: every form is JSON to any reader, and is read back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import pytest

from fastssl.cli.common import write_json
from fastssl.errors import FastSSLError
from fastssl.runs.metrics_file import MetricsFile
from fastssl.runs.status import write_status
from fastssl.utils.json_text import read_json_records, to_json

NAN, INFINITY = float("nan"), float("inf")


def strictly(text: str) -> object:
    """As the readers of other languages do it: NaN and Infinity are no JSON."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null_at_every_depth() -> None:
    assert strictly(to_json({"a": [1.5, (NAN, {"b": -INFINITY})], "c": "NaN", "d": True})) == {
        "a": [1.5, [None, {"b": None}]],
        "c": "NaN",
        "d": True,
    }
    assert to_json({"a": 1}, indent=2) == '{\n  "a": 1\n}'


@pytest.mark.parametrize("rows", [[], [{"a": NAN}], [{"a": 1}, {"a": 2}, {"a": 3}]])
def test_the_name_of_a_file_decides_between_one_document_and_lines(tmp_path: Path, rows: list[dict]) -> None:
    expected = [{"a": None if row["a"] != row["a"] else row["a"]} for row in rows]
    for name in ("out.json", "OUT.JSON"):
        write_json(str(tmp_path / name), rows)
        found = strictly((tmp_path / name).read_text())
        assert found == (expected[0] if len(rows) == 1 else expected)
    for name in ("out.jsonl", "out"):
        write_json(str(tmp_path / name), rows)
        assert [strictly(line) for line in (tmp_path / name).read_text().splitlines()] == expected
    for path in tmp_path.iterdir():
        assert [value for _, value in read_json_records(path, "records")] == expected, path.name


def test_one_record_on_its_own_is_an_object(tmp_path: Path) -> None:
    write_json(str(tmp_path / "out.json"), {"a": 1})
    assert (tmp_path / "out.json").read_text() == '{"a": 1}\n'


def test_what_is_wrong_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text('[{"a": 1},\n {"a": ')
    with pytest.raises(FastSSLError, match=r"out\.json, line 1: not JSON .*; expected records of mine"):
        list(read_json_records(path, "records of mine"))
    path.write_text('[{"a": 1},\n 3]')
    places = [where for where, _ in read_json_records(path, "records")]
    assert places == [f"{path}, record 1", f"{path}, record 2"]
    path.write_bytes(b"\xff")
    with pytest.raises(FastSSLError, match="not text"):
        list(read_json_records(path, "records"))


def test_a_runs_files_are_json_when_its_figures_are_not_finite(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"kind": "step", "step": 1, "loss": NAN})
    assert strictly(metrics.path.read_text()) == {"kind": "step", "step": 1, "loss": None}
    metrics.path.write_text('{"kind": "step", "step": 1, "loss": NaN}\n')  # as earlier versions wrote it
    metrics.cut(5, probed=True)
    assert strictly(metrics.path.read_text())["loss"] is None
    write_status(tmp_path, "failed", why="x", rate=INFINITY)
    assert strictly((tmp_path / "status.json").read_text())["rate"] is None
