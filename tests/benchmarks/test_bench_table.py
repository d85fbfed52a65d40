"""Records as a table."""

from __future__ import annotations

from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.table import COLUMNS, cells, line

HOST = {"cpu": "Some CPU", "cores": 16, "gpu": "Some GPU"}
STEP = Record(
    bench="step",
    recipe="quickstart",
    device="cuda",
    batch_size=256,
    pair_per_s=12345.6,
    view_per_s=24691.2,
    ceiling=30000.0,
    ceiling_name="the networks' passes alone",
    fraction_of_ceiling=0.823,
    bottleneck="launches",
    host=HOST,
    versions={"torch": "2.11"},
    git="abc",
    details={
        "amp": "bf16",
        "compiled": False,
        "fallbacks": {"compile": "RuntimeError: a | b"},
        "asked_batch_size": 512,
    },
)
COST = Record(
    bench="loader",
    device="cpu",
    workers=4,
    host={"cpu": "Other CPU", "cores": 2},
    versions={},
    git=None,
    details={
        "part": "host cost",
        "data": {"name": "photos.beton"},
        "times_1_view": {"1 view": 1.0, "2 + 6 views": 1.057},
    },
)


def test_cells_say_what_ran_and_what_limited_it() -> None:
    assert cells(STEP) == (
        "step",
        "quickstart",
        "cuda, batch 256, bf16",
        "12,346",
        "24,691",
        "82.3%",
        "the networks' passes alone",
        "launches; without compile: RuntimeError: a | b; batch 512 was too large for the memory",
    )
    assert cells(COST) == (
        "loader: host cost",
        "",
        "cpu, 4 threads, photos.beton",
        "",
        "",
        "",
        "",
        "2 + 6 views: 1.06x the host time of one",
    )
    peer = Record(
        bench="loss",
        peer="dense",
        ratio_to_peer=1.5,
        pair_per_s=3.14159,
        host={},
        versions={},
        git=None,
        details={"queue": 64},
    )
    assert cells(peer)[2:4] == ("queue 64", "3.14") and cells(peer)[-1] == "1.50x dense"


def test_terminal_lines_align() -> None:
    header, row = line(COLUMNS), line(cells(STEP))
    for name, text in (
        ("recipe", "quickstart"),
        ("setting", "cuda, batch"),
        ("ceiling", "the networks'"),
        ("bottleneck", "launches;"),
    ):
        # "ceiling" also ends the heading "of ceiling"
        assert header.rindex(name) == row.index(text)
    assert header.index("pair/s") + len("pair/s") == row.index("12,346") + len("12,346")
