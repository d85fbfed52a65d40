"""``fastssl views`` and ``fastssl report``."""

from __future__ import annotations

import json

import pytest
from conftest import need_engine
from PIL import Image

from fastssl.cli import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_views_draws_a_recipes_views(capsys, beton, tmp_path):
    out = tmp_path / "grid.png"
    status, printed, _ = run(capsys, "views", beton, "--recipe", "quickstart", "--out", out, "--samples", 2)
    assert status == 0 and str(out) in printed
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 300
        assert f"{picture.width}x{picture.height}" in printed


def test_views_follow_the_seed(capsys, beton, tmp_path):
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        # No suffix: the file is a PNG whatever its name.
        assert (
            run(
                capsys,
                "views",
                beton,
                "--recipe",
                "quickstart",
                "--out",
                tmp_path / name,
                "--samples",
                2,
                "--seed",
                seed,
            )[0]
            == 0
        )
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.engines
def test_engines_stand_side_by_side(capsys, beton, tmp_path):
    need_engine("dali")
    need_engine("ffcv")

    def width(*engines):
        arguments = [argument for engine in engines for argument in ("--pipeline", engine)]
        out = tmp_path / f"{len(engines)}.png"
        assert run(capsys, "views", beton, "--recipe", "quickstart", "--out", out, "--samples", 1, *arguments)[0] == 0
        with Image.open(out) as picture:
            return picture.width

    one, two, three = width("dali"), width("native", "dali"), width("native", "dali", "ffcv")
    # Stored photo and two views; photo and (view, view, difference); two columns more for the third engine.
    assert two - one == three - two - 120 == 120
    assert width("auto", "native", "dali", "native") == two  # auto is native: it does not stand beside itself
    assert (
        run(capsys, "views", beton, "--recipe", "quickstart", "--out", tmp_path / "x.png", "--pipeline", "tfdata")[0]
        == 2
    )


@pytest.mark.engines
def test_doctor_lists_the_engines(capsys, tmp_path):
    need_engine("dali")
    need_engine("ffcv")
    need_engine("torchcodec")
    status, printed, _ = run(capsys, "doctor", "--json", tmp_path / "doctor.json")
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert status == 0 and [engine["name"] for engine in found["engines"]] == ["native", "dali", "ffcv", "torchcodec"]
    assert all(engine["problem"] is None for engine in found["engines"])
    assert found["auto"]["engine"] == "native" and found["jpeg_hardware"]
    assert "auto        native: " in printed and "dali        ready (nvidia-dali-cuda" in printed


@pytest.mark.parametrize(
    ("recipe", "file", "message"),
    [("quickstrat", None, "quickstart"), ("quickstart", "missing.beton", "missing.beton")],
)
def test_views_failures_are_one_line(capsys, beton, tmp_path, recipe, file, message):
    status, _, err = run(
        capsys, "views", tmp_path / file if file else beton, "--recipe", recipe, "--out", tmp_path / "x.png"
    )
    assert status == 1 and message in err and "Traceback" not in err
    assert not (tmp_path / "x.png").exists()


def test_views_into_no_folder_is_found_out_first(capsys, beton, tmp_path):
    status, _, err = run(capsys, "views", beton, "--recipe", "quickstart", "--out", tmp_path / "none" / "x.png")
    assert status == 2 and "no such folder" in err


def test_report_is_written_again(capsys, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "step", "step": 1, "epoch": 0.1, "loss": 3.0}) + "\n")
    status, printed, _ = run(capsys, "report", tmp_path)
    assert status == 0 and printed.strip() == str(tmp_path / "report.html")
    assert "not finished" in (tmp_path / "report.html").read_text()


def test_report_of_no_run(capsys, tmp_path):
    status, _, err = run(capsys, "report", tmp_path / "nowhere")
    assert status == 1 and err.startswith("fastssl: ") and "no such run directory" in err


def test_a_multi_crop_is_drawn_named_and_described(capsys, beton, tmp_path):
    arguments = ["views", beton, "--recipe", "dino-mobilenetv2-sslight", "--samples", 2, "--out"]
    small = ["--set", "views.global_size=32", "--set", "views.local_size=16"]
    status, _, said = run(capsys, *arguments, tmp_path / "six.png", *small)
    assert (
        status == 0
        and "2 global views of 32 px, area 0.3 .. 1; 6 local views of 16 px" in said
        and "0.4 global-global" in said
    )
    status, _, said = run(
        capsys, *arguments, tmp_path / "two.png", *small, "--set", "views.local_count=2", "--set", "views.weights=null"
    )
    assert (
        status == 0
        and "2 local views" in said
        and "0.333 global-global, 0.667 global-local (by the number of pairs)" in said
    )
    widths = []
    for name in ("six", "two"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            widths.append(picture.width)
    assert widths[0] > widths[1]
    status, _, said = run(capsys, *arguments, tmp_path / "none.png", "--set", "views.treshold=0.2")
    assert status == 1 and "did you mean views.threshold?" in said and not (tmp_path / "none.png").exists()
