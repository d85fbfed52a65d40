"""What a terminal shows of a run: the rendered lines themselves, at several widths."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from small_run import Silent, options, small

from fastssl.cli import main
from fastssl.cli.progress import RunProgress
from fastssl.errors import counted
from fastssl.pretrain import pretrain

#: A long run with large numbers.
ROW = {
    "step": 1200,
    "epoch": 1.2,
    "loss": 11.3456,
    "kl": 10.123,
    "embedding_std": 0.981,
    "pair_per_s": 1234.5,
    "data_wait": 0.031,
    "lr": 0.061234,
    "seconds": 333.0,
    "knn": 41.23,
}
WORDS = ["loss 11.346", "1,234 pair/s", "kNN 41.2 %", "wait 3 %", "lr 0.0612", "spread 0.98", "kl 10.1"]


def terminal(file: io.StringIO, width: int) -> Console:
    environ = {"TERM": "xterm-256color"}
    return Console(width=width, force_terminal=True, file=file, color_system="truecolor", _environ=environ)


def shown(width: int, *rows: dict, total: int = 90_000, **how: bool) -> list[str]:
    """The lines on a terminal after the last of ``rows``, without colours."""
    file = io.StringIO()
    with RunProgress(terminal(file, width), **how) as progress:
        for row in rows:
            progress.row(row, row["step"], total)
    last = file.getvalue().rpartition("\x1b[2K")[2]
    return [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).splitlines() if line.strip()]


@pytest.mark.parametrize(("width", "words"), [(60, 1), (80, 3), (100, 5), (120, 7), (200, 7)])
def test_bar_step_and_time_left_stay_and_the_least_words_go_first(width: int, words: int) -> None:
    (line,) = shown(width, ROW)
    assert len(line) <= width, "it would wrap"
    assert re.match(r"step 1,200/90,000 [━╸╺]{6,24} 6:50:4\d left", line)
    assert [word for word in WORDS if word in line] == WORDS[:words]


@pytest.mark.parametrize("width", [5, 10, 25, 40])
def test_no_terminal_is_too_narrow_for_one_line(width: int) -> None:
    (line,) = shown(width, ROW)
    assert len(line) <= width


def test_what_was_not_measured_is_no_word_and_leaves_its_room() -> None:
    (line,) = shown(80, {**ROW, "knn": None})
    assert "kNN" not in line and "wait 3 %" in line
    (line,) = shown(120, {**ROW, "loss": float("nan"), "kl": float("nan")})
    assert "loss nan" in line and "kl nan" in line


def test_the_bar_shows_the_share_that_is_done() -> None:
    file = io.StringIO()
    with RunProgress(terminal(file, 80)) as progress:
        progress.row({**ROW, "step": 45_000}, 45_000, 90_000)
    last = file.getvalue().rpartition("\x1b[2K")[2]
    parts = re.findall("m([━╺╸]+)", last)  # of different colours
    assert abs(len(parts[0]) - len(parts[-1])) <= 1 and len(parts[0]) > 3, last


def test_before_the_first_row_and_at_the_end() -> None:
    assert shown(80) == ["starting, 0 s"]
    (line,) = shown(80, ROW, {**ROW, "step": 90_000})
    assert "step 90,000/90,000" in line and "0:00:00 left" in line


def test_a_dumb_terminal_and_a_log_get_plain_lines() -> None:
    for more in ({"force_terminal": True, "_environ": {"TERM": "dumb"}}, {"force_terminal": False}):
        file = io.StringIO()
        with RunProgress(Console(width=80, file=file, **more)) as progress:
            progress.row(ROW, 1200, 90_000)
        assert file.getvalue().startswith("step 1,200/90,000  epoch 1.2  loss 11.346 (kl 10.123)")
        assert file.getvalue().count("\n") == 1
        assert "data-wait 3 %  lr 0.06123  411 min left" in file.getvalue()


@pytest.mark.parametrize("live", [True, False])
def test_quiet_leaves_warnings_alone(live: bool) -> None:
    file = io.StringIO()
    with RunProgress(Console(width=80, file=file, force_terminal=live), quiet=True) as progress:
        progress.row(ROW, 90_000, 90_000)
        progress.note("epoch 1: kNN 41.2 %")
        progress.message("without graph: no GPU")
    assert file.getvalue() == "without graph: no GPU\n"


# ---------------------------------------------------------------------- a run


def test_a_run_begins_with_what_it_will_do_and_tells_its_online_probe(beton: Path, tmp_path: Path) -> None:
    said = Silent()
    pretrain(small(), options(beton, tmp_path / "run"), said)
    begin = said.messages.index("recipe few-photos-moco, 48 photos, cpu (1 thread), views 2 x 32 px")
    assert said.messages[begin + 1 : begin + 3] == [
        "training lcnet_035: 12 of 12 steps to make, 8 photos each; 2 epochs of 6 steps",
        f"into {tmp_path / 'run'}; Ctrl-C saves; the same command resumes",
    ]
    (probe,) = (text for text in said.messages if "online probe" in text)
    assert re.fullmatch(r"epoch 1: kNN \d+\.\d % of \d photos, effective rank \d+\.\d \(online probe\)", probe)
    knn = [row["knn"] for row in said.rows]
    assert knn[:2] == [None, None] and knn[2] is not None and f"kNN {knn[2]:.1f} %" in probe


@pytest.mark.slow
def test_quiet_on_the_command_line(beton: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--arch",
        "lcnet_035",
        "--recipe",
        "few-photos-moco",
        "--data",
        str(beton),
        "--device",
        "cpu",
        "--epochs",
        "1",
        "--batch-size",
        "8",
    ]
    changes = ["views.0.size=32", "probe.size=32", "probe.final_samples=40", "optim.warmup_epochs=0"]
    arguments += [word for one in changes for word in ("--set", one)]
    errors = {}
    for name, more in (("loud", []), ("quiet", ["-q"])):
        with pytest.raises(SystemExit) as stop:
            main(["pretrain", *arguments, "--out", str(tmp_path / name), *more])
        assert stop.value.code == 0
        errors[name] = capfd.readouterr().err
    for words in ("recipe few-photos-moco, 48 photos", "step 6/6", "probing:"):
        assert words in errors["loud"] and words not in errors["quiet"]
    assert "after pre-training" in errors["quiet"] and "report:" in errors["quiet"]


def test_quiet_conversion(photo_tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for more, lines in (([], True), (["--quiet"], False)):
        with pytest.raises(SystemExit):
            main(["convert-imagenet", str(photo_tree), str(tmp_path / "photos.beton"), *more])
        said = capfd.readouterr().err
        assert ("converting: 48/48 images" in said) == lines and "48 photos, 3 classes" in said


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (0, "photo", "0 photos"),
        (1, "photo", "1 photo"),
        (2, "photo", "2 photos"),
        (12_345, "step", "12,345 steps"),
        (1, "class", "1 class"),
        (3, "class", "3 classes"),
        (2, "batch", "2 batches"),
        (2, "epoch", "2 epochs"),
        (2, "process", "2 processes"),
        (1, "query", "1 query"),
        (2, "query", "2 queries"),
        (2, "labelled photo", "2 labelled photos"),
        (2, "key", "2 keys"),
        (2, "box", "2 boxes"),
    ],
)
def test_numbers_of_things(number: int, noun: str, words: str) -> None:
    assert counted(number, noun) == words
