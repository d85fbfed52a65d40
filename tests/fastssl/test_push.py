"""``fastssl push``: a run on a stand-in for the hub, and timm, which loads it from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import Hub
from small_run import Silent, options, small

import fastssl
from fastssl.cli import main
from fastssl.evaluate.trained import load_trained
from fastssl.pretrain import pretrain
from fastssl.report.hub import model_card
from fastssl.report.run_record import read_run

TOKEN = "hf_" + "t" * 30


@pytest.fixture(scope="module")
def run(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dr-secret") / "secret-clinic"
    pretrain(small("train.epochs=1", "probe.every_epochs=0"), options(beton, out), Silent())
    return out


def test_the_card_names_no_file_and_no_folder(run: Path) -> None:
    record = read_run(run)
    record.summary["probe"]["note"] = "kNN, judged on patients-val.beton, which pre-training never saw"
    record.config["val"], record.config["full_recipe"] = "patients-val.beton", "/home/secret/recipe.yaml"
    card = model_card(record, load_trained(run), "me/places", None, [])
    assert "judged on other photos, which" in card and "full_recipe: recipe.yaml" in card
    for private in ("secret", "patients", "photos.beton", "blue", "png", str(Path.home())):
        assert private not in card
    for began in ("hf-hub:you/theirs", f"{record.config['arch']}.tag", "secret.pth"):
        record.config["init_from"] = {"name": began}
        card = model_card(record, load_trained(run), "me/places", None, [])
        named = began.replace("secret.pth", "other weights")
        assert f". Training began with {named}, whose licence holds, too." in card and "secret" not in card
    del record.summary["probe"], record.summary["verdict"]
    assert "| kNN |" not in model_card(record, load_trained(run), "me/places", None, [])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub(TOKEN)
    for name in ("ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", hub.url, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in arguments])
    return stop.value.code or 0


def test_timm_loads_what_was_pushed(run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call("push", run, "me/places", "--private", "--license", "apache-2.0", "--json", tmp_path / "r.json") == 0
    assert sorted(hub.files["me/places"]) == ["README.md", "config.json", "model.safetensors"]
    assert hub.private["me/places"]
    assert f"{hub.url}/me/places: 3 files, " in capsys.readouterr().err
    record = json.loads((tmp_path / "r.json").read_text())
    assert (
        record["address"] == f"{hub.url}/me/places" and record["arch"] == "lcnet_035" and record["name"] == "me/places"
    )

    card = hub.files["me/places"]["README.md"].decode()
    _, header, text = card.split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["license"] == "apache-2.0" and header["library_name"] == "timm"
    assert header["pipeline_tag"] == "image-feature-extraction" and "fastssl" in header["tags"]
    summary = json.loads((run / "summary.json").read_text())
    trained = next(row for row in summary["probe"]["rows"] if row["name"] == "after pre-training")
    assert f"| after pre-training | {trained['knn']:.1f} % | {trained['linear']:.1f} % |" in text
    assert summary["verdict"]["text"] in text and "48 photos, of 3 classes" in text
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["optim"]["lr"] == 0.12 and recipe["views"][0]["size"] == 32

    # As somebody else does, who has nothing of this machine.
    load = """
import sys, timm, torch
net = timm.create_model("hf-hub:me/places", pretrained=True, num_classes=0).eval()
assert timm.data.resolve_model_data_config(net)["input_size"] == (3, 32, 32)
torch.save(net(torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)), sys.argv[1])
"""
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    subprocess.run([sys.executable, "-c", load, str(tmp_path / "features.pt")], env=environ, check=True, timeout=300)
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    backbone = fastssl.load_backbone(run / "checkpoints" / "last.safetensors")
    with torch.no_grad():
        ours = backbone(images)
    torch.testing.assert_close(torch.load(tmp_path / "features.pt").detach(), ours, rtol=1e-5, atol=1e-5)


def test_pictures_of_the_users_photos_are_sent_when_asked_for(run: Path, hub: Hub) -> None:
    assert call("push", run, "me/seen", "--pictures") == 0
    files = hub.files["me/seen"]
    assert {"views.png", "neighbours.png"} < files.keys() and not hub.private["me/seen"]
    card = files["README.md"].decode()
    assert "![views.png](views.png) ![neighbours.png](neighbours.png)" in card and "license:" not in card


def test_a_dry_run_sends_nothing(run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert call("push", run, "me/dry", "--dry-run", tmp_path / "dry", "--json", "-") == 0
    assert {file.name for file in (tmp_path / "dry").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert "nothing was sent" in (said := capsys.readouterr()).err and not hub.files
    assert json.loads(said.out)["address"] is None
    assert call("push", run, "me/dry", "--dry-run", tmp_path / "dry") == 1, "it is no folder of an export alone"


@pytest.mark.parametrize(
    ("name", "arguments", "token", "words"),
    [
        ("me/old", [], TOKEN, "me/old: exists already: choose another name, or write over it with --update"),
        ("you/places", [], TOKEN, "you/places: the token may not write there: the name is somebody else's"),
        ("me/new", ["--update"], TOKEN, "me/new: no such repository: leave out --update"),
        ("me/new", [], "hf_wrong", "me/new: no token that is valid: `hf auth login`, or set HF_TOKEN"),
        ("me/..new", [], TOKEN, "HFValidationError"),
    ],
)
def test_what_cannot_be_pushed_is_one_clear_line(
    run: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    name: str,
    arguments: list[str],
    token: str,
    words: str,
) -> None:
    hub.files["me/old"] = {"README.md": b"mine"}
    monkeypatch.setenv("HF_TOKEN", token)
    assert call("push", run, name, *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastssl: ") and words in line and token not in line
    assert hub.files == {"me/old": {"README.md": b"mine"}}


def test_one_that_is_there_is_written_over_when_asked_for(run: Path, hub: Hub) -> None:
    hub.files["me/old"], hub.private["me/old"] = {"README.md": b"mine", "notes.txt": b"kept"}, False
    assert call("push", run, "me/old", "--update") == 0
    assert hub.files["me/old"]["README.md"].startswith(b"---\n") and hub.files["me/old"]["notes.txt"] == b"kept"


def test_without_a_network_or_with_a_wrong_name(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert call("push", run, "me/places") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastssl: me/places: http://127.0.0.1:9: ConnectError")
    assert [call("push", run, name) for name in ("places", "/", "me/", "me/my places")] == [2] * 4
    assert call("push", run, "me/places", "--private", "--update") == 2
    assert call("push", tmp_path, "me/places") == 1
    assert "not a run directory" in capsys.readouterr().err
