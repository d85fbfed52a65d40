"""What a published record must have, and that the published ones have it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastssl.benchmarks.harness.records import Record, incomplete, missing_parts, read_records
from fastssl.benchmarks.harness.table import cells

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
#: metrics.jsonl is the log of a training run, and those of studies are no records of `fastssl bench`.
OTHERS = ("view-sampling", "photo-size", "study")
PUBLISHED = sorted(
    path for path in RESULTS.glob("*/*.jsonl") if path.name != "metrics.jsonl" and path.parent.name not in OTHERS
)

WHOLE = Record(
    bench="step",
    pair_per_s=10.0,
    view_per_s=20.0,
    median_s=3.2,
    runs=5,
    ceiling=25.0,
    ceiling_name="the networks' passes alone",
    host={"cpu": "Some CPU", "cores": 2},
    versions={"python": "3.11", "torch": "2.11"},
    git="abc",
    details={"command": "fastssl bench step"},
)


def test_records_are_published() -> None:
    assert PUBLISHED


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_published_records_are_complete(path: Path) -> None:
    lacking = [
        f"line {number} ({cells(record)[0]}, {record.peer or record.recipe}): {', '.join(parts)}"
        for number, record in enumerate(read_records(path), 1)
        if (parts := missing_parts(record))
    ]
    assert not lacking, "records without:\n" + "\n".join(lacking)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"host": {}}, "machine"),
        ({"host": {"cpu": "Some CPU"}}, "machine"),
        ({"versions": {"python": "3.11"}}, "versions"),
        ({"versions": {"torch": "2.11"}}, "versions"),
        ({"runs": None}, "runs"),
        ({"runs": 4}, "runs"),
        ({"git": None}, "git"),
        ({"details": None}, "command"),
        ({"details": {"command": ""}}, "command"),
        ({"ceiling": None}, "ceiling"),
        ({"ceiling": 0.0}, "ceiling"),
        ({"ceiling_name": None}, "ceiling"),
        ({"pair_per_s": None, "view_per_s": None, "median_s": None}, "rate or time"),
    ],
)
def test_a_doctored_record_is_found(change: dict, part: str) -> None:
    assert missing_parts(WHOLE) == []
    assert missing_parts(replace(WHOLE, **change)) == [part]


def test_one_figure_is_enough() -> None:
    for kept in ("pair_per_s", "view_per_s", "median_s"):
        others = {name: None for name in ("pair_per_s", "view_per_s", "median_s") if name != kept}
        assert missing_parts(replace(WHOLE, **others)) == []


def test_ceilings_are_their_own_ceiling() -> None:
    none = {"pair_per_s": None, "view_per_s": None, "median_s": None, "ceiling": None, "ceiling_name": None}
    details = {"command": "fastssl bench ceilings", "copy_bytes_per_s": 1e10, "disk_read_bytes_per_s": None}
    assert missing_parts(replace(WHOLE, bench="ceilings", details=details, **none)) == []
    assert missing_parts(replace(WHOLE, bench="ceilings", details={"command": "x"}, **none)) == ["figure"]
    assert missing_parts(replace(WHOLE, bench="ceilings", details=details, runs=None, **none)) == ["runs"]


def test_records_are_listed_by_what_they_lack() -> None:
    first, second = replace(WHOLE, git=None, runs=1), replace(WHOLE, runs=2)
    assert incomplete([first, WHOLE, second]) == {"runs": [first, second], "git": [first]}


def test_a_soak_has_verdicts_and_no_ceiling() -> None:
    soak = replace(
        WHOLE,
        bench="soak",
        ceiling=None,
        ceiling_name=None,
        details={"command": "fastssl bench soak", "verdicts": [{"name": "memory"}]},
    )
    assert missing_parts(soak) == []
    assert missing_parts(replace(soak, details={"command": "fastssl bench soak"})) == ["verdicts"]
