"""The study: which runs are made, that they go on and are made again where a row was changed, and the figures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import jpeg_bytes, make_photo
from scipy import stats

import fastssl.benchmarks
from fastssl.benchmarks.study import page, runs
from fastssl.benchmarks.study.definition import Study, fingerprint, read_study
from fastssl.errors import FastSSLError
from fastssl.pipelines.beton.writer import BetonWriter

ROOT = Path(fastssl.benchmarks.__path__[0]).resolve().parent
FOLDER = ROOT / "benchmarks" / "results" / "study"
RECIPE = """
arch: lcnet_035
method: simclr
views: [{size: 16, count: 2, jitter: 0.0, blur: 0.0}]
simclr: {projector: {hidden: 8, out: 8, layers: 2}}
optim: {name: sgd, lr: 0.01}
train: {epochs: EPOCHS, batch_size: 12, log_every: 2, checkpoint_minutes: 0}
probe: {size: 16, crop: 1.0, every_epochs: 20, final_samples: 0}
"""
STUDY = """
photos: {train: 2, val: 2}
sets: {hands: {train: 24, val: 12}}
rows:
  plain: {words: plain, recipe: own.yaml, seeds: 2, why: five steps}
  warm: {words: warm, recipe: own.yaml, changes: {simclr.temperature: 0.5}, why: five steps}
claims:
  first: {against: plain, rows: [warm]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "own.yaml").write_text(RECIPE.replace("EPOCHS", "2"))
    (tmp_path / "study.yaml").write_text(STUDY)
    return tmp_path / "study.yaml"


def run(knn: float, linear: float, seed: int = 0, row: str = "plain", **more: object) -> dict:
    probe = {"after pre-training": {"knn": knn, "linear": linear}, "raw pixels (16x16)": {"knn": 20.0, "linear": 30.0}}
    more.setdefault("photos", {"train": 36, "val": 36})
    numbers = {"steps": 100, "batch_size": 64, "cpu_seconds": 120.0, "train_seconds": 100.0}
    return {"row": row, "seed": seed, "probe": probe, "knn": [(50, knn - 1), (100, knn)], **numbers, **more}


def test_what_is_compared_is_made_side_by_side(file: Path) -> None:
    assert read_study(file).order() == [("plain", 0), ("warm", 0), ("plain", 1), ("warm", 1), ("warm", 2)]


def test_a_row_like_another(file: Path) -> None:
    more = "  warmer: {words: warmer, like: warm, changes: {optim.lr: 0.02}}\n  hot: {words: hot, like: warmer}\n"
    file.write_text(STUDY.replace("claims:", f"{more}claims:").replace("[warm]", "[warm, warmer, hot]"))
    rows = read_study(file).rows
    assert rows["hot"].recipe == "own.yaml" and rows["hot"].words == "hot"
    assert rows["hot"].changes == {"simclr.temperature": 0.5, "optim.lr": 0.02} == rows["warmer"].changes
    assert rows["warm"].changes == {"simclr.temperature": 0.5}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("rows: [warm]", "rows: [cold]", "claim names cold, which is no row"),
        ("rows: [warm]", "rows: []", "no claim asks for warm"),
        ("against: plain", "versus: plain", "no key claims.first.versus"),
        ("words: warm, recipe: own.yaml", "words: warm", "warm has no recipe"),
        ("words: warm, recipe: own.yaml", "words: warm, like: warm", "warm is like warm, which is no other row"),
        ("seeds: 2", "seeds: two", "seeds must be a whole number"),
        ("seeds: 2", "seeds: 0", "seeds must be at least 1"),
        ("words: warm", "photos: feet, words: warm", "a row has photos of feet, which is none of its sets"),
        ("words: warm", "photos: hands, words: warm", "first compares rows with other photos"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(file: Path, old: str, new: str, said: str) -> None:
    file.write_text(STUDY.replace(old, new))
    with pytest.raises(FastSSLError, match=re.escape(said)):
        read_study(file)


def test_a_run_belongs_to_its_row_as_it_is_now(file: Path) -> None:
    study, folder = read_study(file), file.parent
    marks = {name: fingerprint(row, folder) for name, row in study.rows.items()}
    assert marks["plain"] != marks["warm"]
    lines = [{**run(40, 50, row=name), "fingerprint": mark} for name, mark in marks.items()]
    lines.append({**run(41, 50), "fingerprint": marks["plain"]})
    (folder / runs.RECORDS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = runs.read_runs(study, folder)
    assert set(found) == {("plain", 0), ("warm", 0)} and found["plain", 0]["knn"][-1] == [100, 41]
    # Words and comments change nothing, a value does, in the study and in its recipe.
    file.write_text(STUDY.replace("words: warm", "words: warmer"))
    (folder / "own.yaml").write_text("# a comment\n" + RECIPE.replace("EPOCHS", "2"))
    assert set(runs.read_runs(read_study(file), folder)) == {("plain", 0), ("warm", 0)}
    file.write_text(STUDY.replace("0.5", "0.4"))
    assert set(runs.read_runs(read_study(file), folder)) == {("plain", 0)}
    file.write_text(STUDY.replace("train: 2", "train: 3"))
    assert not runs.read_runs(read_study(file), folder)
    file.write_text(STUDY)
    (folder / "own.yaml").write_text(RECIPE.replace("EPOCHS", "3"))
    assert not runs.read_runs(read_study(file), folder)


def test_rows_on_photos_of_their_own(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(
        STUDY.replace("claims:", "  held: {words: held, like: warm, photos: hands}\nclaims:").replace(
            "{against: plain", "{against: held, rows: []}\n  second: {against: plain"
        )
    )
    study, folder = read_study(file), file.parent
    mark = fingerprint(study.rows["held"], folder)
    assert mark != fingerprint(study.rows["warm"], folder)
    lines = [run(40, 50, row="held", fingerprint=mark, photos={"train": 24, "val": val}) for val in (12, 13)]
    lines += [
        run(40, 50, 1, row="held", fingerprint=mark),
        run(30, 40, fingerprint=fingerprint(study.rows["plain"], folder)),
    ]
    (folder / runs.RECORDS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = runs.read_runs(study, folder)
    assert set(found) == {("held", 0), ("plain", 0)}
    # Each set has its own raw pixels to beat.
    found["held", 0]["probe"] |= {name: {"knn": 7.0, "linear": 8.0} for name in (page.COLOUR, page.RANDOM)}
    found["held", 0] |= {"arch": "lcnet_035"}
    text = page.references_table(study, found, "hands")
    assert "| lcnet_035, before training | 7.0 | 8.0 |" in text and "| raw pixels (16x16) | 20.0 | 30.0 |" in text
    # Runs whose photos nobody brings are left out, and it is said.
    assert runs.main([str(file), "--scratch", str(folder / "scratch"), "--only", "held"]) == 0
    assert "2 runs left out: --photos hands=FOLDER brings their photos" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        runs.main([str(file), "--scratch", str(folder / "scratch"), "--photos", f"hands={folder}"])
    assert f"--photos hands={folder}: there is no train.beton" in capsys.readouterr().err
    # Photos of another number than the study's would make runs that are none of it.
    for part in ("train", "val"):
        with BetonWriter(folder / f"{part}.beton", 1) as writer:
            writer.add(jpeg_bytes(make_photo(0, 16, 16)), 16, 16, 0)
    with pytest.raises(SystemExit):
        runs.main([str(file), "--scratch", str(folder / "scratch"), "--photos", f"hands={folder}"])
    assert "train.beton: 1 photo, where the study has 24" in capsys.readouterr().err
    # Nor is a seed that it does not ask for, or no more.
    (folder / runs.RECORDS).write_text(json.dumps({**lines[0], "seed": 7}) + "\n")
    assert not runs.read_runs(study, folder)


@pytest.mark.parametrize("line", ["{}", "[1]", "nothing", '{"row": "plain", "seed": 0}'])
def test_what_is_no_record_is_named(file: Path, line: str) -> None:
    (file.parent / runs.RECORDS).write_text(f"{line}\n")
    with pytest.raises(FastSSLError, match=re.escape(f"{runs.RECORDS}, ")):
        runs.read_runs(read_study(file), file.parent)


@pytest.mark.parametrize("differences", [(1.0, 2.0), (1.0, 2.0, 4.0), (-3.0, 0.5, 0.25, 9.0, 1.0)])
def test_the_interval_is_students(differences: tuple[float, ...]) -> None:
    mean, error = sum(differences) / len(differences), stats.sem(differences)
    assert page.interval(differences) == pytest.approx(
        stats.t.interval(0.95, len(differences) - 1, mean, error), rel=1e-3
    )
    assert page.interval(differences[:1]) is None


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ((3.0, 3.1, 2.9), "better"),
        ((-3.0, -3.1, -2.9), "worse"),
        ((0.1, 3.0, 9.0), "better with each seed, which may be chance"),
        ((-0.1, 3.0, 9.0), "undecided"),
        ((5.0,), "one seed"),
    ],
)
def test_the_verdict(differences: tuple[float, ...], word: str) -> None:
    assert page.verdict(differences) == word


def table(study: Study, *some: dict) -> str:
    return page.claim_table(study, study.claims["first"], {(one["row"], one["seed"]): one for one in some})


def test_times_are_compared_on_one_machine(file: Path) -> None:
    file.write_text(STUDY.replace("rows: [warm]}", "rows: [warm], minutes: true}"))
    study = read_study(file)
    slow, fast = run(40, 50), run(40, 50, row="warm", cpu_seconds=80.0)
    assert table(study, slow, fast).rstrip(" |\n").endswith("| 1.50")
    here = {"machines": ["one"]}
    assert table(study, slow | here, fast | here).rstrip(" |\n").endswith("| 1.50")
    for other in ({"machines": ["two"]}, {"machines": ["one", "two"]}, {}):
        assert table(study, slow | here, fast | other).rstrip(" |\n").endswith("| -")


def test_the_table_of_a_claim(file: Path) -> None:
    study = read_study(file)
    assert table(study) == "No run has ended yet.\n"
    assert "gain" not in table(study, run(40, 50))
    text = table(study, run(40, 50), run(44, 52, 1), run(43, 50, row="warm"), run(48, 53, 1, "warm"))
    assert "| plain | 42.0 ± 2.8 | 51.0 ± 1.4 | 100 of 64 | 2 | 2 |" in text
    assert "| warm | +3.5 (-2.9 to +9.9): +3.0, +4.0: better with each seed, which may be chance |" in text
    # A seed that one of them lacks is no pair.
    assert "+3.0: one seed" in table(study, run(40, 50), run(43, 50, row="warm"), run(99, 99, 2, "warm"))


def test_a_row_below_raw_pixels_says_why(file: Path) -> None:
    assert "| plain (1 of 1 run below raw pixels: five steps) | 40.0 | 30.0 |" in table(read_study(file), run(40, 30))
    file.write_text(STUDY.replace(", why: five steps", ""))
    with pytest.raises(FastSSLError, match="plain: 1 run below raw pixels; the study must say why"):
        table(read_study(file), run(40, 30))


def test_the_committed_page_is_that_of_the_committed_runs() -> None:
    study = read_study(FOLDER / "study.yaml")
    found = runs.read_runs(study, FOLDER)
    text = (ROOT / "docs" / "results.md").read_text()
    linked, beside = Path("../benchmarks/results/study"), FOLDER.parent / "beside-lightly" / "record.json"
    command = "python -m fastssl.benchmarks.study.page docs/results.md benchmarks/results/study/study.yaml"
    assert page.fill_page(text, study, found, linked, beside) == text, f"run: {command}"
    assert set(study.claims) <= set(re.findall(r"<!-- figures: ([\w-]+) -->", text))
    for name, claim in study.claims.items():
        if {row for row, _ in found} & set(claim.names):
            assert (FOLDER / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # Every run that is on the page tells its command, its commit and its machine.
    for one in found.values():
        assert one["command"].startswith("OMP_NUM_THREADS=1 fastssl pretrain ")
        assert re.fullmatch("[0-9a-f]{7,40}", one["git"]) and one["host"]["cpu"] and one["versions"]["torch"]


@pytest.mark.slow
def test_runs_are_made_stopped_gone_on_with_and_not_made_twice(file: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    command = [sys.executable, "-m", "fastssl.benchmarks.study.runs", str(file), "--scratch", str(scratch)]
    command += ["--jobs", "2", "--seeds", "0"]
    (tmp_path / "own.yaml").write_text(RECIPE.replace("EPOCHS", "60"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(scratch.glob("*/*/checkpoints/*"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "0 runs are on record, 2 to make\n"
    assert not (tmp_path / runs.RECORDS).exists()
    logs = list(scratch.glob("*/*/output.log"))
    assert len(logs) == 2

    assert runs.main(command[3:]) == 0
    found = runs.read_runs(read_study(file), tmp_path)
    assert set(found) == {("plain", 0), ("warm", 0)}
    for one in found.values():
        assert one["starts"] == 2 and one["steps"] == 180 and one["cpu_seconds"] > 1 and len(one["machines"]) == 1
        assert one["photos"] == {"train": 36, "val": 36} and len(one["loss"]) <= runs.POINTS
        assert set(one["probe"]) >= {"raw pixels (16x16)", "colour histogram", "random initialisation"}
    assert all("resumed at step" in log.read_text() for log in logs)
    assert found["warm", 0]["command"].endswith("--set simclr.temperature=0.5")

    before = (tmp_path / runs.RECORDS).read_bytes()
    assert runs.main(command[3:]) == 0 and (tmp_path / runs.RECORDS).read_bytes() == before

    # One that fails is named, and the others are made.
    file.write_text(STUDY.replace("simclr.temperature: 0.5", "train.batch_size: 9999"))
    assert runs.main(command[3:]) == 1
    assert (tmp_path / runs.RECORDS).read_bytes() == before
