"""The study of view sampling: its cells, its table, and one small study from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fastssl.benchmarks.studies import view_study
from fastssl.benchmarks.studies.view_study import Cell, cells, main, table
from fastssl.config.recipe import load_recipe, parse_overrides
from fastssl.errors import FastSSLError
from fastssl.report.finish import RANDOM, RAW, REESTIMATED, TEACHER, TRAINED

STUDY = Path(view_study.__file__).parents[1] / "results" / "view-sampling"
RECIPES = STUDY / "recipes"


def made(method: str, design: str, seed: int, knn: float) -> dict:
    probe = {RAW: 80.0, RANDOM: 30.0, TRAINED: knn, TRAINED + REESTIMATED: knn + 1, TEACHER: knn + 2}
    return {
        "method": method,
        "design": design,
        "seed": seed,
        "probe": {name: {"knn": v, "linear": v + 5} for name, v in probe.items()},
    }


def test_a_study_has_both_designs_of_each_method_and_the_smoothed_ones() -> None:
    found = cells(["moco", "dino"], ["moco"])
    assert [(cell.method, cell.design) for cell in found] == [
        ("moco", "baseline"),
        ("moco", "sslight"),
        ("dino", "baseline"),
        ("dino", "sslight"),
        ("moco", "smoothed"),
    ]


@pytest.mark.parametrize("method", ["moco", "simclr", "dino", "swav"])
def test_the_designs_differ_in_what_the_study_is_about_alone(method: str) -> None:
    def recipe(design: str):
        return load_recipe(str(RECIPES / f"{method}.yaml"), parse_overrides(Cell(method, design).overrides))

    baseline, sslight = recipe("baseline"), recipe("sslight")
    assert baseline.views.threshold == 0.14 and baseline.views.pair_weights == pytest.approx((0.2, 0.8))
    assert sslight.views.threshold == 0.3 and sslight.views.pair_weights == (0.4, 0.6)
    # As 96 and 128 are of 224.
    assert (baseline.views.local_size, sslight.views.local_size) == (
        round(64 * 96 / 224 / 4) * 4,
        round(64 * 128 / 224 / 4) * 4,
    )
    assert baseline.settings == sslight.settings and baseline.optim == sslight.optim and baseline.train == sslight.train
    if method in view_study.CONTRASTIVE:
        smoothed = recipe("smoothed")
        assert (
            smoothed.views == sslight.views and smoothed.settings.smoothing == 0.2 and sslight.settings.smoothing == 0.0
        )


def test_the_table_has_means_spreads_and_gains_seed_by_seed() -> None:
    runs = [made("moco", "baseline", seed, knn) for seed, knn in enumerate((50.0, 52.0, 54.0))]
    runs += [made("moco", "sslight", seed, knn) for seed, knn in ((2, 57.0), (0, 55.0), (1, 56.0))]
    text = table(runs)
    assert "| moco | baseline | 52.0 ± 2.0 | 57.0 ± 2.0 | 53.0 ± 2.0 | 54.0 ± 2.0 | 3 |" in text
    assert "| moco | sslight | 56.0 ± 1.0 |" in text
    assert "| moco | sslight - baseline | +4.0 ± 1.0 | +4.0 ± 1.0 |" in text  # 5, 4, 3
    assert "| | raw pixels (16x16) | 80.0 ± 0.0 |" in text and "smoothed - sslight" not in text


def test_the_published_study_is_whole_and_its_page_shows_its_runs() -> None:
    """Three seeds of every cell, each run with what it takes to place and repeat it, and no figure on the page that the
    runs do not give.
    """
    runs = [json.loads(line) for line in (STUDY / "runs.jsonl").read_text().splitlines()]
    wanted = {
        (cell.method, cell.design, seed)
        for cell in cells(["moco", "simclr", "dino", "swav"], view_study.CONTRASTIVE)
        for seed in range(3)
    }
    assert {(one["method"], one["design"], one["seed"]) for one in runs} == wanted and len(runs) == len(wanted)
    for one in runs:
        assert one["host"]["cpu"] and one["versions"]["torch"] and f"--seed {one['seed']} " in one["command"]
        assert all(change in one["command"] for change in Cell(one["method"], one["design"]).overrides[:2])
    # Those from before runs named their commit; the page says so, and how they are known to be alike.
    assert (
        sum(one["git"] is None for one in runs) == 15
        and "Fifteen lines of runs.jsonl name no commit" in (STUDY / "README.md").read_text()
    )
    assert table(runs).strip() in (STUDY / "README.md").read_text()


def test_a_small_study_runs_and_goes_on_where_it_stood(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tree = yaml.safe_load((RECIPES / "simclr.yaml").read_text())
    tree["arch"], tree["views"]["global_size"] = "lcnet_035", 32
    tree["train"].update(batch_size=8, log_every=3)
    tree["probe"].update(size=32, online_samples=20, final_samples=24, reestimate_bn=16)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "simclr.yaml").write_text(yaml.safe_dump(tree))
    out = tmp_path / "study"
    command = [
        "--recipes",
        tmp_path / "recipes",
        "--data",
        beton,
        "--val",
        beton,
        "--out",
        out,
        "--methods",
        "simclr",
        "--smoothed",
        "simclr",
    ]
    command = [*map(str, command), "--seeds", "0", "--epochs", "1"]
    assert main(command) == 0
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [(one["method"], one["design"], one["seed"]) for one in runs] == [
        ("simclr", name, 0) for name in ("baseline", "sslight", "smoothed")
    ]
    assert all(0 <= one["probe"][TRAINED]["knn"] <= 100 and one["steps"] == 6 for one in runs)
    assert str(tmp_path) not in (out / "runs.jsonl").read_text(), "a record is passed on: it holds names, no paths"
    first = (out / "table.md").read_text()
    assert "simclr | sslight - baseline" in first and "simclr | smoothed - sslight" in first
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}
    assert main(command) == 0 and (out / "table.md").read_text() == first
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")} == stamps
    # What was made by other settings is neither taken for this study's nor written over.
    capsys.readouterr()
    assert main([*command[:-1], "2"]) == 1
    assert (
        "holds a run of another command or recipe" in capsys.readouterr().err
        and (out / "table.md").read_text() == first
    )
    with pytest.raises(SystemExit):
        main([*command, "--smoothed", "dino"])
    assert "only moco and simclr have a target to smooth" in capsys.readouterr().err


def test_a_run_that_fails_ends_the_study_at_once(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def fails(cell: Cell, seed: int, *rest: object) -> dict:
        tried.append(cell.design)
        raise FastSSLError("no such thing")

    monkeypatch.setattr(view_study, "run", fails)
    arguments = ["--recipes", RECIPES, "--data", beton, "--val", beton, "--out", tmp_path / "out"]
    assert main([*map(str, arguments), "--seeds", "0", "1", "2"]) == 1
    assert "no such thing" in capsys.readouterr().err and len(tried) <= 2
