"""Which network a checkpoint gives: from a run's folder, its weights, its whole state; and one clear line where it
gives none.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastssl.cli import main
from fastssl.errors import FastSSLError
from fastssl.evaluate.trained import load_trained
from fastssl.models.backbones import create_backbone, save_backbone
from fastssl.runs.checkpoint import write_state


@pytest.fixture(scope="module")
def run(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MoCo run of six steps, which has both networks."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    settings = [
        "views.0.size=32",
        "train.epochs=1",
        "train.batch_size=8",
        "moco.queue=64",
        "moco.projector.hidden=16",
        "moco.split_bn=2",
    ]
    settings += ["probe.size=32", "probe.online_samples=20"]
    command = [
        "pretrain",
        "--arch",
        "lcnet_035",
        "--recipe",
        "few-photos-moco",
        "--data",
        str(beton),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--workers",
        "1",
    ]
    with pytest.raises(SystemExit) as stop:
        main([*command, *(word for setting in settings for word in ("--set", setting))])
    assert stop.value.code == 0
    return out


def test_every_form_of_a_run_gives_the_same_network(run: Path) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for network, weights in (("student", "last.safetensors"), ("teacher", "last-teacher.safetensors")):
        places = [run, run / "checkpoints", run / "checkpoints" / "last.pt", run / "checkpoints" / "last.safetensors"]
        found = [load_trained(place, network) for place in places] + [load_trained(run / "checkpoints" / weights)]
        outputs = [one.backbone(images) for one in found]
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        assert {(one.arch, one.network, one.step) for one in found} == {("lcnet_035", network, 6)}
        assert found[2].name == "mine/last.pt" and found[-1].name == f"mine/{weights}"
        assert not found[0].backbone.training
    assert load_trained(run).network == load_trained(run / "checkpoints" / "last.pt").network == "student"
    assert not torch.equal(load_trained(run, "student").backbone(images), load_trained(run, "teacher").backbone(images))


def test_the_runs_pictures_come_with_every_form_of_it(run: Path, tmp_path: Path) -> None:
    places = [
        run,
        run / "checkpoints",
        run / "checkpoints" / "last.pt",
        run / "checkpoints" / "last-teacher.safetensors",
    ]
    assert {(one.size, one.crop) for one in map(load_trained, places)} == {(32, 1.0)}
    bare = tmp_path / "last.safetensors"
    bare.write_bytes((run / "checkpoints" / "last.safetensors").read_bytes())
    assert (load_trained(bare).size, load_trained(bare).crop) == (None, None)
    (tmp_path / "checkpoints").mkdir()
    inside = bare.rename(tmp_path / "checkpoints" / "last.safetensors")
    for text, found in (
        ("probe: {size: 64, crop: 0.5}", (64, 0.5)),
        ("probe: {size: 7, crop: 2.0}", (None, None)),
        ("probe: {size: true, crop: all}", (None, None)),
        ("probe: 3", (None, None)),
        ("- 3", (None, None)),
    ):
        (tmp_path / "config.yaml").write_text(text)
        assert (load_trained(inside).size, load_trained(inside).crop) == found
    (tmp_path / "config.yaml").write_text("probe: {")
    with pytest.warns(UserWarning, match="config.yaml"):
        assert load_trained(tmp_path).size is None


def test_what_is_not_there_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FastSSLError, match=r"no last\.safetensors"):
        load_trained(tmp_path)
    with pytest.raises(FastSSLError, match="no such checkpoint"):
        load_trained(tmp_path / "last.pt")
    with pytest.raises(FastSSLError, match="no such checkpoint"):
        load_trained(tmp_path / "last.safetensors")
    save_backbone(
        create_backbone("lcnet_035"), tmp_path / "last.safetensors", arch="lcnet_035", network="student", step="3"
    )
    with pytest.raises(FastSSLError, match="has no teacher"):
        load_trained(tmp_path, "teacher")
    with pytest.raises(
        FastSSLError, match="holds the student network, not the teacher's, and there is no last-teacher"
    ):
        load_trained(tmp_path / "last.safetensors", "teacher")
    save_backbone(create_backbone("lcnet_035"), tmp_path / "other.safetensors", arch="lcnet_035")
    assert load_trained(tmp_path / "other.safetensors").network == "imported"
    with pytest.raises(FastSSLError, match="holds the imported network"):
        load_trained(tmp_path / "other.safetensors", "student")
    state = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    state["method"] = {name: value for name, value in state["method"].items() if not name.startswith("teacher.")}
    write_state(tmp_path / "alone.pt", state)
    with pytest.raises(FastSSLError, match="has no teacher network"):
        load_trained(tmp_path / "alone.pt", "teacher")
    state["config"]["arch"] = "resnet18"
    write_state(tmp_path / "another.pt", state)
    with pytest.raises(FastSSLError, match="tensors do not fit resnet18"):
        load_trained(tmp_path / "another.pt")
    torch.save({"version": 1}, tmp_path / "odd.pt")
    with pytest.raises(FastSSLError, match=r"is not a whole checkpoint of a run \(no method\)$"):
        load_trained(tmp_path / "odd.pt")


def test_a_detector_is_no_run(tmp_path: Path) -> None:
    for more in ({"kind": "detector"}, {}):
        torch.save(
            {"version": 1, "config": {}, "detector": {"a": torch.zeros(1)}, "iteration": 5, **more},
            tmp_path / "detect.pt",
        )
        with pytest.raises(FastSSLError, match=r"detect\.pt: is a detector.*the run's own checkpoint"):
            load_trained(tmp_path / "detect.pt")


def test_a_header_is_believed_and_a_files_name_is_not(tmp_path: Path) -> None:
    def save(name: str, **header: str) -> None:
        save_backbone(create_backbone("lcnet_035"), tmp_path / name, arch="lcnet_035", **header)

    save("last.safetensors", network="student", step="3")
    save("last-teacher.safetensors", network="student", step="3")  # a copy
    for place in (tmp_path, tmp_path / "last.safetensors"):
        with pytest.raises(
            FastSSLError,
            match=r"last-teacher\.safetensors: holds the student network, not the teacher's, as its name says",
        ):
            load_trained(place, "teacher")
    save("last.safetensors", network="teacher", step="3")
    with pytest.raises(FastSSLError, match="holds the teacher network, not the student's"):
        load_trained(tmp_path)
    assert load_trained(tmp_path / "last.safetensors").network == "teacher"
    for step in ("\u00b2", "\u0663", "-1", "3.5", "9" * 5000):
        save("last.safetensors", network="student", step=step)
        assert load_trained(tmp_path).step is None
