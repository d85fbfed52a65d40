"""Recipes beside what was published: one list of differences, to which recipes, their headers and the docs are held."""

from __future__ import annotations

import configparser
import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest

from fastssl.cli import main
from fastssl.config import against
from fastssl.config.against import PUBLISHED, Comparison, compare, facts_of
from fastssl.config.recipe import Recipe, load_recipe, recipe_names, recipe_path
from fastssl.errors import FastSSLError

ROOT = Path(__file__).resolve().parents[2]
TOOL = runpy.run_path(str(ROOT / "tests" / "recipe_docs.py"))


def mistakes(found: Comparison) -> list[str]:
    """What is wrong with the list of one recipe's differences."""
    facts, keys = facts_of(found.recipe), [setting.key for setting in found.settings]
    ours = {setting.key: setting.reason for setting in found.settings if setting.state == "ours"}
    wrong = [f"{setting.key}: no line" for setting in found.settings if setting.reason == "not in published.yaml"]
    wrong += [f"{key}: differs without a reason" for key, reason in ours.items() if not reason]
    wrong += [f"{key}: marked as ours, does not differ" for key in facts["ours"] if key not in ours]
    wrong += [f"{key}: no such key" for key in facts["published"] if key not in keys]
    return wrong


@pytest.mark.parametrize("name", recipe_names())
def test_what_differs_has_a_reason_and_what_has_one_differs(name: str) -> None:
    found = compare(name)
    assert mistakes(found) == []
    assert found.beside and len(found.settings) > 30
    assert load_recipe(name)  # nothing of it is changed on the way


@pytest.mark.parametrize(
    ("section", "change", "wrong"),
    [
        ("optim", {"lr": 0.5}, ["optim.lr: differs without a reason"]),
        ("train", {"amp": "off"}, ["train.amp: marked as ours, does not differ"]),
        ("moco", {"queue": 32768}, ["moco.queue: differs without a reason"]),
    ],
)
def test_a_changed_recipe_is_found_out(
    section: str, change: dict, wrong: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "moco-mobilenetv2-sslight"

    def changed(name: str) -> Recipe:
        recipe = load_recipe(name)
        return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **change)})

    monkeypatch.setattr(against, "load_recipe", changed)
    assert mistakes(compare(name)) == wrong


def test_defaults_count_and_views_are_compared_wherever_the_recipe_says_them(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "dino-resnet18-sslight"
    before = {setting.key: setting.here for setting in compare(name).settings}
    assert before["views.augment.ratio"] == [3 / 4, 4 / 3] and before["views.local.blur"] == 0.5
    assert before["optim.nesterov"] is False and "views.augment.blur" not in before
    recipe = load_recipe(name)
    views = recipe.views
    own = {kind: {**views.augment, **getattr(views, kind)} for kind in ("global_1", "global_2", "local")}
    moved = dataclasses.replace(recipe, views=dataclasses.replace(views, augment={}, **own))
    assert moved.views != views
    monkeypatch.setattr(against, "load_recipe", lambda name: moved)
    assert {setting.key: setting.here for setting in compare(name).settings} == before


def test_the_published_values_are_the_papers() -> None:
    """Some of them, written down a second time."""
    for name, expected in {
        "dino-mobilenetv2-baseline": {
            "optim.lr": 0.48,
            "train.batch_size": 1024,
            "views.threshold": 0.14,
            "dino.out": 4096,
        },
        "dino-vit_tiny-sslight": {"optim.final_weight_decay": 0.4, "views.local_count": 10, "dino.out": 65536},
        "swav-mobilenetv2-sslight": {"optim.warmup_lr": 0.075, "swav.queue": 3840, "views.weights": [0.4, 0.6]},
        "moco-mobilenetv2-sslight": {"moco.temperature": 0.2, "moco.symmetric": False, "views.augment.saturation": 0.2},
        "moco-v2-resnet50": {"optim.lr": 0.03, "moco.symmetric": False, "init": "kaiming", "train.batch_size": 256},
        "light-moco-mobilenetv3": {"moco.temperature": 0.1, "optim.per_epoch": True, "photos": "as they are"},
        "simclr-mobilenetv3": {"optim.lr": 0.3, "train.batch_size": 4096, "simclr.temperature": 0.1},
    }.items():
        published = {setting.key: setting for setting in compare(name).settings}
        assert {key: published[key].published for key in expected} == expected
        assert all(published[key].source for key in expected)
        assert published["train.amp"].published == "off"
    unknown = {
        setting.key for settings in compare("light-moco-mobilenetv3").of("no source").values() for setting in settings
    }
    assert {"optim.lr", "train.batch_size", "train.epochs", "moco.smoothing"} <= unknown


@pytest.mark.parametrize("name", recipe_names())
def test_a_header_says_the_published_number_and_the_photos_as_the_list_does(name: str) -> None:
    found, text = compare(name), recipe_path(name).read_text()
    number = re.search(r"^# Published: ([\d.]+) % ImageNet-1k", text, re.MULTILINE)
    assert (float(number[1]) if number else None) == found.linear
    photos = [setting for setting in found.settings if setting.key == "photos" and found.linear]
    for command in re.findall(r"fastssl convert-imagenet .*", text):
        assert all(setting.state == ("as published" if "--keep-size" in command else "ours") for setting in photos)


def test_headers_and_docs_are_what_the_list_makes_of_them(capsys: pytest.CaptureFixture) -> None:
    """`python tests/recipe_docs.py` writes them."""
    assert TOOL["main"](["--check"]) == 0, capsys.readouterr().out
    header = TOOL["header"]("dino-mobilenetv2-sslight")
    assert "# Ours:\n" in header and "#   train.amp: bfloat16 on a GPU" in header
    assert header in recipe_path("dino-mobilenetv2-sslight").read_text()
    text = recipe_path("dino-mobilenetv2-sslight").read_text()
    damaged = text.replace("bfloat16 on a GPU", "float16")
    assert damaged != text and TOOL["with_header"]("dino-mobilenetv2-sslight", damaged) == text
    assert [line for line in TOOL["table"]().splitlines() if line.startswith("| [")] == [
        line
        for line in (ROOT / "docs" / "recipes.md").read_text().splitlines()
        if line.startswith("| [") and ".yaml): " in line
    ]


def test_the_list_is_no_recipe_and_installs() -> None:
    assert PUBLISHED.is_file() and "published" not in recipe_names()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"]["fastssl.config"] == "*.yaml"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["recipes", *arguments])
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("name", "columns"), [("simclr-mobilenetv3", 80), ("light-moco-mobilenetv3", 80), ("dino-vit_tiny-sslight", 120)]
)
def test_it_fits_the_terminal(
    name: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run(name, "--against", "--all") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns and "\x1b" not in text
    said = " ".join(text.split())
    assert all(" ".join(setting.reason.split()) in said for setting in compare(name).settings)
    monkeypatch.setenv("COLUMNS", "5")  # of a sliver of a window
    assert run(name, "--against") == 0


@pytest.mark.parametrize("columns", [80, 120])
def test_the_list_has_the_published_numbers_and_breaks_on_a_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def listed() -> str:
        assert run() == 0
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", str(columns))
    rows = {line.split()[0]: line.split()[1:3] for line in listed().splitlines()}
    assert list(rows) == list(recipe_names())  # a line each where other programs read them
    assert rows["light-moco-mobilenetv3"] == ["62.3", "%"] and rows["quickstart"][0] == "-"
    monkeypatch.setenv("FORCE_COLOR", "1")  # stands for a terminal
    lines = listed().splitlines()
    assert max(map(len, lines)) <= columns and len(lines) > len(rows)
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(rows)


def test_only_what_differs_unless_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    name = "light-moco-mobilenetv3"
    assert run(name, "--against") == 0
    brief = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in brief.splitlines() if line.startswith("  ") and line.strip()}
    assert rows["optim.lr"][1:] == ["0.06", "?"] and rows["train.amp"][1:3] == ["auto", "off"]
    assert "moco.temperature" not in rows and "ours: bfloat16 on a GPU" in brief and "62.3 %" in brief
    settings = compare(name).settings
    equal = [setting for setting in settings if setting.state == "as published"]
    assert f"{len(equal)} as published" in brief
    assert run(name, "--against", "--json", "-") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(record["key"], record["state"]) for record in records] == [(one.key, one.state) for one in settings]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(name, "--against") == 0
    assert "\x1b[33m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(name, "--against") == 0
    assert "\x1b[33m" not in capsys.readouterr().out


def test_wrong_use_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--against") == 2 and "goes with a NAME" in capsys.readouterr().err
    assert run("quickstart", "--all") == 2
    assert run("quickstat", "--against") == 1 and "nearest: quickstart" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("arch: resnet18\n")
    with pytest.raises(FastSSLError, match="published settings are known for the recipes of"):
        compare(str(tmp_path / "mine.yaml"))
