"""docs/scale.md says what the code and the committed records make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastssl.benchmarks import scale_page
from fastssl.benchmarks.records import read_records
from fastssl.benchmarks.scale_page import TABLES, cluster, fill, main, seconds, sent, size
from fastssl.pipelines.errors import FastSSLError

ROOT = Path(__file__).resolve().parents[2]
PAGE, FOLDER = ROOT / "docs" / "scale.md", ROOT / "benchmarks" / "results"
RESULTS = [*sorted((FOLDER / "scale").glob("*.jsonl")), FOLDER / "cpu-2core-epyc" / "train.jsonl"]


def test_the_page_is_what_its_tables_make_it(tmp_path: Path) -> None:
    copy = tmp_path / "scale.md"
    copy.write_text(PAGE.read_text())
    assert main([str(copy), *map(str, RESULTS)]) == 0
    assert copy.read_text() == PAGE.read_text(), "make it anew: the page says how"


def test_every_table_is_on_the_page() -> None:
    assert {found[2] for found in scale_page._PLACE.finditer(PAGE.read_text())} == set(TABLES)


def test_links_lead_somewhere() -> None:
    import re

    for link in re.findall(r"\]\((\.\./[^)#]+)\)", PAGE.read_text()):
        assert (PAGE.parent / link).exists(), link


def test_constants_are_those_of_the_records() -> None:
    folder = FOLDER / "cpu-2core-epyc"
    (ceilings,) = read_records(folder / "ceilings.jsonl")
    assert round(ceilings.details["decode_per_s_1_thread"]) == scale_page.DECODE
    (small,) = [r for r in read_records(folder / "convert.jsonl") if r.details["part"] == "short side 256"]
    assert round(small.pair_per_s / small.workers) == scale_page.CONVERT
    assert round(scale_page.MTBF / 3600) == 6335


def test_what_is_built_sends_less_and_one_host_has_no_network() -> None:
    name = "light-moco-mobilenetv3"
    today, built = (cluster(name, 512, 4096, 4000, kind) for kind in (False, True))
    one = sent(name)
    assert today.gathered_bytes == one.gathered_bytes > 50 * built.gathered_bytes
    assert (
        today.collectives == one.collectives - 1
        and built.collectives == round(4 + 92 * 3 / 9)
        and today.reduced_bytes == built.reduced_bytes
    )
    alone = cluster(name, 8, 4096, 4000, True)
    assert (alone.hosts, alone.link_rate) == (1, scale_page.INSIDE) and today.hosts == 64


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (2.5e-8, "25 ns"), (6.1e-5, "61 µs"), (0.29, "290 ms"), (61, "61 s"), (240, "4 min"), (7200, "2 h"), (3 * 86400, "3 days")],
)
def test_times_in_words(value: float, words: str) -> None:
    assert seconds(value) == words


def test_sizes_in_words() -> None:
    assert [size(value) for value in (5, 1e3, 3.2e13, 2e15)] == ["5 B", "1 kB", "32 TB", "2 PB"]


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FastSSLError, match="no record of check"):
        fill("<!-- scale: check -->\n<!-- /scale -->", [])
    with pytest.raises(FastSSLError, match="bench train"):
        fill("<!-- scale: earlier -->\n<!-- /scale -->", [])
    with pytest.raises(FastSSLError, match="nothing is not one of"):
        fill("<!-- scale: nothing -->\n<!-- /scale -->", [])
    assert main(["page"]) == 2 and main([str(tmp_path / "none"), str(tmp_path / "none.jsonl")]) == 1
    assert "scale_page: " in capsys.readouterr().err
