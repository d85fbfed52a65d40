"""The figures of README and docs are those of the committed records, and of nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import fastssl.benchmarks
from fastssl.benchmarks.harness.readme import TABLES, fill, in_words, main
from fastssl.benchmarks.harness.records import Record, read_records
from fastssl.config.recipe import recipe_names
from fastssl.errors import FastSSLError

#: that hold tables of measured figures
PAGES = ("README.md", "docs/performance.md")
ROOT = Path(fastssl.benchmarks.__path__[0]).resolve().parent
MEASURED, COUNTED = (ROOT / "benchmarks" / "results" / name for name in ("cpu-2core-epyc", "counted"))
RESULTS = [*sorted(MEASURED.glob("*.jsonl")), *sorted(COUNTED.glob("*.jsonl"))]


def records() -> list[Record]:
    return [record for path in RESULTS for record in read_records(path)]


def test_the_pages_figures_are_those_of_the_records() -> None:
    found: list[str] = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        found += re.findall(r"<!-- figures: ([\w-]+) -->", text)
        files = "benchmarks/results/{cpu-2core-epyc,counted}/*.jsonl"
        assert fill(text, records()) == text, f"run: python -m fastssl.benchmarks.harness.readme {page} {files}"
    assert sorted(found) == sorted(TABLES)


def test_every_recipe_has_a_row_with_the_command_that_made_it() -> None:
    table = TABLES["recipes"](records())
    missing = re.search(r"\nNot measured yet: (.*)\.\n", table)
    unmeasured = missing[1].split(", ") if missing else []
    assert {"light-moco-mobilenetv3", "light-moco-efficientnet_b0", "few-photos-moco", "moco-v2-resnet50"}.isdisjoint(
        unmeasured
    )
    for name in recipe_names():
        if name in unmeasured:
            assert f"| {name} |" not in table
            continue
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
        assert "fastssl bench step" in row and "fastssl bench train" in row
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert all(cells), f"a cell of {name} is empty: {row}"


def test_every_row_of_parts_has_a_command() -> None:
    rows = TABLES["parts"](records()).splitlines()[2:]
    assert len(rows) >= 8
    for row in rows:
        assert re.search(r"\| `fastssl bench [a-z]+[^`]*` \|$", row), row


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures: parts -->\nold\n<!-- /figures -->\nafter\n")
    assert main([str(page), *map(str, RESULTS)]) == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("<!-- /figures -->\nafter\n")
    assert fill(text, records()) == text
    changed = [
        replace(r, fraction_of_ceiling=0.123) if r.bench == "loader" and r.fraction_of_ceiling else r for r in records()
    ]
    assert fill(text, changed) != text


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["README.md"]) == 2
    assert main([str(tmp_path / "absent.md"), *map(str, RESULTS)]) == 1
    assert "readme: " in capsys.readouterr().err
    with pytest.raises(FastSSLError, match="figures: nothing is not one of recipes, parts, loaders"):
        fill("<!-- figures: nothing -->\n<!-- /figures -->", [])
    assert in_words(Record(bench="views")) is None
