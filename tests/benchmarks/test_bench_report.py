"""The report of records: its figures, its plots, and that nothing in a record gets out of hand."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from lines import write_records
from PIL import Image

from fastssl.benchmarks.harness import plots
from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.report import build, recipe_table, write_report
from fastssl.benchmarks.harness.table import COLUMNS, figure
from fastssl.cli import main

CPU = {"cpu": "Some CPU", "cores": 4}
GPU = {"cpu": "Other CPU", "cores": 16, "gpu": "Some GPU"}
ADVICE = "data-bound 37 %: add 3 decode threads (predicted 1.4x, measured 1.35x)"


def record(bench: str, recipe: str | None, pair_per_s: float | None, **values: object) -> Record:
    """A complete record of two views a pair; ``details`` are added to those that every record has."""
    details = {"command": f"fastssl bench {bench} --recipe {recipe}", **values.pop("details", {})}
    fraction = values.pop("fraction", 0.8)
    if pair_per_s is not None:
        rates = {"pair_per_s": pair_per_s, "view_per_s": 2 * pair_per_s, "ceiling": 2 * pair_per_s / fraction}
        values = {
            **rates,
            "median_s": 32 / pair_per_s,
            "ceiling_name": f"ceiling of {bench}",
            "fraction_of_ceiling": fraction,
            **values,
        }
    common = {
        "host": CPU,
        "versions": {"python": "3.11", "torch": "2.11"},
        "git": "abc",
        "runs": 5,
        "device": "cpu",
        "batch_size": 32,
    }
    return Record(bench=bench, recipe=recipe, **{**common, **values}, details=details)


def records_of(recipe: str, scale: float = 1.0, **values: object) -> list[Record]:
    """All that a report draws and says, for one recipe."""
    loader = {"pipeline": "native", **values}
    found = []
    for workers in (1, 2):
        rate = scale * workers * 987.0
        found += [
            record("loader", recipe, rate, workers=workers, bottleneck="decode", details={"part": "decode"}, **loader),
            record(
                *("loader", recipe, None),
                workers=workers,
                median_s=0.1,
                ceiling=1.0,
                ceiling_name="one",
                details={
                    "part": "host cost",
                    "host_cpu_ms": {"bare": 1.0, "1 view": 1.1, "2 views": 1.15, "2 + 6 views": 1.2},
                },
                **loader,
            ),
            record(
                *("loader", recipe, rate / 3),
                workers=workers,
                details={"part": "views", "share": {"decode": 0.5, "crop": 0.3, "colour and hand-over": 0.2}},
                **loader,
            ),
        ]
    network = {"arch": "resnet18", **values}
    return [
        *found,
        record("views", recipe, scale * 765.0, details={"stage": "whole"}, pipeline="native", **values),
        record(
            "step",
            recipe,
            scale * 43.21,
            bottleneck="arithmetic",
            details={"share": {"networks": 0.9, "loss": 0.1}},
            **network,
        ),
        record("step", recipe, scale * 20.0, peer="plain step", ratio_to_peer=2.16, **network),
        record(
            "train",
            recipe,
            scale * 34.56,
            bottleneck="data (20% of the time)",
            details={"advice": ADVICE},
            workers=2,
            **network,
        ),
    ]


CEILINGS = record(
    *("ceilings", None, None),
    details={
        "decode_per_s_1_thread": 1234.0,
        "decode_per_s": 4567.0,
        "decode_threads": 4,
        "copy_bytes_per_s": 18.5e9,
        "product_flop_per_s": {"float32": 1.25e11},
        "disk_read_bytes_per_s": None,
    },
)


def written(tmp_path: Path, records: list[Record]) -> Path:
    """The folder of the report."""
    write_records(tmp_path / "records.jsonl", records)
    write_report([tmp_path / "records.jsonl"], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes on a CPU, one of them on a GPU as well."""
    cpu = [*records_of("first"), *records_of("second", 0.5), CEILINGS]
    return written(tmp_path_factory.mktemp("report"), [*cpu, *records_of("first", 100.0, host=GPU, device="cuda")])


class Page(HTMLParser):
    """What a browser would see: tags, and whatever the page would fetch."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")
        ]

    def handle_data(self, data: str) -> None:
        self.words += data + "\n"


def rows_of(markdown: str) -> list[list[str]]:
    """Cells of all table rows; an escaped bar is no border."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]


def test_the_page_needs_nothing_but_itself(whole: Path) -> None:
    html = (whole / "report.html").read_text()
    page = Page(html)
    assert page.fetched and all(address.startswith("data:image/png;base64,") for address in page.fetched)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in html and "@import" not in html
    pictures = [base64.b64decode(address.split(",", 1)[1]) for address in page.fetched]
    names = [f"{name}{suffix}.png" for suffix in ("", "-2") for name in ("images_per_s", "share_of_time", "scaling")]
    assert pictures == [(whole / name).read_bytes() for name in names]
    assert "prefers-color-scheme: dark" in html


def test_the_pictures_show_something(whole: Path) -> None:
    paths = sorted(whole.glob("*.png"))
    assert len(paths) == 6
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 250 and (pixels[0, 0] == 255).all()
        # bars or lines in the first colour, and letters in ink
        assert ((pixels == (0x25, 0x63, 0xA8)).all(-1).sum() > 300) and (pixels.max(-1) < 90).sum() > 300
        # nothing is cut off: the border is white
        assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])), path.name


def test_it_opens_with_the_end_to_end_figures(whole: Path) -> None:
    text = (whole / "report.md").read_text()
    lead = text[: text.index("\n## ")]
    assert (
        "- **first, resnet18** trains end to end at 34.6 pair/s (69.1 view/s): 80% of its ceiling of 86.4 "
        "view/s (ceiling of train). " in lead
    )
    assert lead.count("Bottleneck: data (20% of the time). Advice: " + ADVICE + ".") == 3
    assert (
        lead.index("On Some CPU, 4 cores:")
        < lead.index("**second, resnet18**")
        < lead.index("On Some GPU, Other CPU, 16 cores:")
    )
    words = Page((whole / "report.html").read_text()).words
    for recipe in ("first", "second"):
        assert f"\n{recipe}, resnet18\n" in words


def test_every_record_is_in_the_tables_with_its_figures(whole: Path) -> None:
    records = [
        *records_of("first"),
        *records_of("second", 0.5),
        CEILINGS,
        *records_of("first", 100.0, host=GPU, device="cuda"),
    ]
    rows = [
        row
        for row in rows_of((whole / "report.md").read_text())
        if len(row) == len(COLUMNS) and row[0].split(":")[0] in ("loader", "views", "step", "train", "ceilings")
    ]
    assert len(rows) == len(records)
    for row, one in zip(rows, records):
        assert row[0].startswith(one.bench) and row[1] == (one.recipe or "")
        assert (row[3], row[4]) == (figure(one.pair_per_s), figure(one.view_per_s))
        assert row[5] == ("80.0%" if one.pair_per_s else "") and row[6] == (one.ceiling_name or "")


def test_recipe_rows() -> None:
    records = [*records_of("first"), *records_of("second", 0.5), *records_of("first", 100.0, host=GPU, device="cuda")]
    header, _, *rows = rows_of(recipe_table(records))
    assert header == [
        "recipe",
        "network",
        "step pair/s",
        "end to end pair/s",
        "of its ceiling",
        "bottleneck",
        "machine",
        "command",
    ]
    first = "`fastssl bench step --recipe first`<br>`fastssl bench train --recipe first`"
    assert rows == [
        ["first", "resnet18", "43.2", "34.6", "80%", "data (20% of the time)", "Some CPU, 4 cores", first],
        [
            "second",
            "resnet18",
            "21.6",
            "17.3",
            "80%",
            "data (20% of the time)",
            "Some CPU, 4 cores",
            first.replace("first", "second"),
        ],
        ["first", "resnet18", "4,321", "3,456", "80%", "data (20% of the time)", "Some GPU", first],
    ]
    assert recipe_table([CEILINGS]) == ""


def test_a_row_is_of_the_recipe_itself_at_its_fastest() -> None:
    def train(rate: float, **details: object) -> Record:
        return record("train", "first", rate, arch="resnet18", details={"amp": "off", "compiled": False, **details})

    def shown(*records: Record) -> str:
        return rows_of(recipe_table(records))[2][3]

    fast = train(50.0, amp="bf16")
    assert shown(train(40.0), fast) == shown(fast, train(40.0)) == "50"
    assert shown(fast, train(45.0, amp="bf16")) == "45"  # measured again
    changed = train(90.0, command="fastssl bench train --set views.0.size=32")
    assert shown(fast, changed) == shown(changed, fast) == "50"
    assert shown(changed) == "90"


def test_one_command_is_named_once_and_a_step_alone_says_so() -> None:
    (step,) = (one for one in records_of("first") if one.bench == "step" and one.peer is None)
    assert rows_of(recipe_table([step]))[2][3:] == [
        "",
        "",
        "step alone: arithmetic",
        "Some CPU, 4 cores",
        "`fastssl bench step --recipe first`",
    ]
    both = [replace(step, bench=bench, details={"command": "a | b"}) for bench in ("step", "train")]
    assert rows_of(recipe_table(both))[2][-1] == "`a \\| b`"


def test_peers_stand_beside_ours(whole: Path) -> None:
    text = (whole / "report.md").read_text()
    assert "| step, first, resnet18, cpu, batch 32 | plain step | 2.16 | 43.2 | 20 |" in text
    loss = record("loss", "first", 100.0, peer="dense", ratio_to_peer=2.5, median_s=0.2, details={"peer_median_s": 0.5})
    alone = record("loader", None, 30.0, peer="others", ratio_to_peer=3.0, details={"part": "crops"})
    table = next(block for block in build([loss, alone]) if getattr(block, "header", ("",))[1:2] == ("peer",))
    assert [row[1:] for row in table.rows] == [("dense", "2.50", "100", "40"), ("others", "3.00", "", "30")]


def test_ceilings_of_the_machine(whole: Path) -> None:
    text = (whole / "report.md").read_text()
    cpu, gpu = text.split("\n## ")[1:]
    for row in (
        "| JPEG decoding, 1 thread | 1,234 photos/s | cpu |",
        "| JPEG decoding, 4 threads | 4,567 photos/s | cpu |",
        "| memory copy, read and written | 18.5 GB/s | cpu |",
        "| matrix product, float32 | 0.125 TFLOP/s | cpu |",
        "| reading from disk | not measured | cpu |",
    ):
        assert row in cpu
    assert "Not measured: no record of ceilings." in gpu


def test_machines_are_kept_apart(whole: Path) -> None:
    cpu, gpu = (whole / "report.md").read_text().split("\n## ")[1:]
    assert cpu.startswith("Some CPU, 4 cores\n") and gpu.startswith("Some GPU, Other CPU, 16 cores\n")
    assert "(scaling.png)" in cpu and "(scaling-2.png)" in gpu
    assert "| second |" in cpu and "| second |" not in gpu
    assert (whole / "recipes.md").read_text().count("\n| first | resnet18 |") == 2


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    out = written(tmp_path, [record("loss", "first", 100.0)])
    assert sorted(path.name for path in out.iterdir()) == ["recipes.md", "report.html", "report.md"]
    text = (out / "report.md").read_text()
    assert "Not measured: training of first end to end." in text[: text.index("\n## ")]
    for reason in (
        "No plot images_per_s: no record of the loader, the views, the step or training has a rate.",
        "No plot share_of_time: no record has the shares of its time.",
        "No plot scaling: no record of our loader has the part",
        "No record has a peer.",
    ):
        assert reason in text
    assert "The one record is complete" in text


def test_incomplete_records_are_named(tmp_path: Path) -> None:
    lacking = [
        replace(record("loss", "first", 9.0), git=None),
        replace(record("step", "first", 9.0), git=None, ceiling=None),
    ]
    text = (written(tmp_path, [*lacking, record("step", "first", 9.0)]) / "report.md").read_text()
    assert "2 records lack: git and ceiling." in text
    assert "- **git:** 1 of loss, 1 of step\n- **ceiling:** 1 of step" in text


def test_shares_that_are_none_are_left_out() -> None:
    odd = {"a": 0.5, "b": -1.0, "c": "much", "d": None, "e": float("nan"), "f": True}
    assert plots.shares_of(record("step", "first", 1.0, details={"share": odd})) == {"a": 0.5}
    for share in (None, [0.5], "all", {}):
        assert plots.shares_of(record("step", "first", 1.0, details={"share": share})) == {}


def test_the_fastest_of_each_part_is_drawn() -> None:
    records = records_of("first")
    found = plots.measured_parts(
        [*records, record("loader", "first", 1e6, pipeline="native", details={"part": "decode"})]
    )
    assert [(key, one.pair_per_s) for key, one in found.items()] == [
        (("first", "loader"), 2 * 987.0 / 3),
        (("first", "views"), 765.0),
        (("first", "step"), 43.21),
        (("first", "train"), 34.56),
    ]
    two = plots.measured_parts([*records, *records_of("first", device="cuda")])
    odd = record("step", "first", 1.0, details={"part": ["a list"]})
    assert plots.measured_parts([odd]) == {}
    assert ("first", "step (cpu)") in two and ("first", "step (cuda)") in two


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    nasty = (
        "<script>alert(1)</script> | `x` [a](http://evil.example) ![b](http://evil.example/p.png) $\\frac{ \\| \n# "
        "line\x00"
    )
    records = [
        replace(
            one,
            recipe=nasty,
            arch=nasty,
            bottleneck=nasty,
            ceiling_name=nasty,
            peer=one.peer and nasty,
            device=nasty,
            git=nasty,
        )
        for one in records_of(
            "first", host={"cpu": nasty, "cores": nasty, "gpu": nasty}, versions={"python": nasty, "torch": nasty}
        )
    ]
    for one in records:
        one.details.update(command=nasty, advice=nasty, share={nasty: 0.7, "_hidden": 0.3})
    out = written(tmp_path, records)
    page = Page((out / "report.html").read_text())
    assert "script" not in page.tags and "a" not in page.tags and "alert(1)" in page.words
    assert all(address.startswith("data:") for address in page.fetched)
    for name in ("report.md", "recipes.md"):
        text = (out / name).read_text()
        # a tag, a link or a picture would begin with an unescaped mark
        assert "<script" not in text and not re.search(r"(?<!\\)\[[ab]\]\(", text)
        assert "\n# line" not in text
        widths = [len(row) for row in rows_of(text)]
        assert set(widths) <= {5, 8} and len(widths) > 2
    assert len(list(out.glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"\n\n", "holds no records"),
        (b'{"bench": "step"}\n{"bench": "st', "line 2: not JSON"),
        (b'{"kind": "step", "loss": 1.0}\n', "line 1: not a benchmark record"),
        (b'{"bench": "step", "pair_per_s": "fast"}\n', "line 1: pair_per_s holds no value of its kind"),
        (b'{"bench": "step", "pair_per_s": NaN, "runs": 2.5}\n', "line 1: pair_per_s, runs holds no value of its kind"),
        (b'{"bench": "step", "ceiling": 1' + b"0" * 400 + b"}\n", "line 1: ceiling holds no value of its kind"),
        (b'{"bench": "step", "host": "here"}\n', "line 1: host holds no value of its kind"),
        (b'{"bench": null}\n', "line 1: bench holds no value of its kind"),
        (b'{"bench": "step", "details": {"data": 3}}\n', "record 1: its details are damaged"),
        (b"\x89PNG\xff\xfe", "not text"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(
    tmp_path: Path, content: bytes, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_records(tmp_path / "good.jsonl", [CEILINGS])
    (tmp_path / "bad.jsonl").write_bytes(content)
    status = run_command(str(tmp_path / "good.jsonl"), str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "out"))
    errors = capfd.readouterr().err
    assert status == 1 and not (tmp_path / "out").exists()
    assert errors.startswith("fastssl: ") and "bad.jsonl" in errors and message in errors and errors.count("\n") == 1


def run_command(*arguments: str) -> int:
    """Exit status of ``fastssl bench report ARGUMENTS``."""
    with pytest.raises(SystemExit) as stop:
        main(["bench", "report", *arguments])
    return int(stop.value.code or 0)


def test_command(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_records("one.jsonl", [CEILINGS])
    write_records("two.jsonl", [record("loss", "first", 100.0)])
    assert run_command("one.jsonl", "two.jsonl", "one.jsonl") == 0
    assert capfd.readouterr().out.split() == [
        "bench-report/report.html",
        "bench-report/report.md",
        "bench-report/recipes.md",
    ]
    text = Path("bench-report/report.md").read_text()
    assert "| ceilings |" in text and "| loss | first |" in text and text.count("| ceilings |") == 1
    assert run_command("one.jsonl", "--out", "deep/er") == 0 and Path("deep/er/report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 2), (["absent.jsonl"], 1), (["."], 1), (["one.jsonl", "--out", "one.jsonl"], 1)]
)
def test_wrong_use(
    tmp_path: Path,
    arguments: list[str],
    status: int,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_records("one.jsonl", [CEILINGS])
    assert run_command(*arguments) == status
    errors = capfd.readouterr().err
    assert errors.strip() and "Traceback" not in errors


def test_help_has_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command("--help") == 0
    assert "fastssl bench report train.jsonl" in capfd.readouterr().out


def test_pictures_are_made_without_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "TkAgg")
    monkeypatch.delenv("DISPLAY", raising=False)
    drawn = plots.draw(plots.scaling, records_of("first"))
    assert isinstance(drawn, bytes) and Image.open(io.BytesIO(drawn)).format == "PNG"
