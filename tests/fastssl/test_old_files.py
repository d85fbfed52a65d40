"""Files that an earlier version wrote are read, gone on from and exported: ``tests/fixtures/old-files``."""

from __future__ import annotations

import copy
import gzip
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import Silent, rows, state
from timm.models import _registry as registry
from tiny import TinyBackbone
from torch import nn

from fastssl.config.recipe import load_recipe, parse_overrides
from fastssl.evaluate.trained import load_trained
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pretrain import pretrain
from fastssl.runs.checkpoint import load_checkpoint
from fastssl.training import trainer
from fastssl.training.setup import RunOptions, Setup
from fastssl.weights.export import export_backbone

OLD = Path(__file__).parent.parent / "fixtures" / "old-files"
#: name of the run -> (recipe, its own settings)
RUNS = {
    "moco": (
        "few-photos-moco",
        ["moco.queue=32", "moco.split_bn=1", "moco.projector.hidden=8", "moco.projector.out=4", "views.0.size=16"],
    ),
    "simclr": (
        "simclr-mobilenetv3",
        [
            "simclr.weighting=nearest",
            "simclr.neighbors=1",
            "simclr.projector.hidden=8",
            "simclr.projector.out=4",
            "views.0.size=16",
        ],
    ),
}
#: CRC-32 of the four JPEG files that went into the ``.beton`` file
SUMS = [2269929805, 500626475, 1095861089, 1786337222]
COMMON = [
    "arch=fastssl_tiny",
    "train.epochs=2",
    "train.samples=null",
    "train.batch_size=2",
    "train.log_every=1",
    "probe.every_epochs=0",
    "probe.size=16",
    "probe.crop=1.0",
    "optim.warmup_epochs=0",
]


def fastssl_tiny(**options: object) -> nn.Module:
    """A network of 348 numbers: timm's smallest has a thousand times as many."""
    network = TinyBackbone()
    network.pretrained_cfg = {}
    return network


@pytest.fixture(autouse=True)
def known_to_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny network be one of timm's."""
    monkeypatch.setitem(registry._model_entrypoints, "fastssl_tiny", fastssl_tiny)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The old ``.beton`` file: 2 MiB, nearly all of it zeros."""
    path = tmp_path / "photos.beton"
    path.write_bytes(gzip.decompress((OLD / "photos.beton.gz").read_bytes()))
    shutil.copy(OLD / "photos.beton.json", tmp_path)
    return path


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an old run's folder, which was killed behind step 2 of 4."""
    folder = tmp_path / request.param
    shutil.copytree(OLD / request.param, folder)
    (folder / "checkpoints" / "step-00000002.pt").hardlink_to(folder / "checkpoints" / "last.pt")
    return folder


def go_on(run: Path, photos: Path) -> tuple[list[str], dict]:
    """The same command once more: (what it said, the state of networks and optimiser before its first step)."""
    recipe, own = RUNS[run.name]
    original, said, found = trainer.make_step, Silent(), {}

    def look(run: Setup, batch: object) -> object:
        if not found:
            state = {"method": run.step.method.state_dict(), "optimizer": run.step.optimizer.state_dict()}
            found.update(copy.deepcopy({**state, "position": vars(run.position)}))
        return original(run, batch)

    options = RunOptions(recipe_name=recipe, data=photos, out=run, device="cpu", workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_step", look)
        pretrain(load_recipe(recipe, parse_overrides([*COMMON, *own])), options, said)
    return said.messages, found


def tensors(state: dict) -> dict[str, torch.Tensor]:
    """Of both networks, the queue and the optimiser."""
    moments = {
        f"{number}.{name}": value
        for number, kept in state["optimizer"]["state"].items()
        for name, value in kept.items()
    }
    return {**state["method"], **moments}


def require_old_end(run: Path) -> None:
    """The run's end is the one to which the earlier version came; other processors and versions of torch round
    differently.
    """
    mine, theirs = tensors(state(run)), tensors(torch.load(OLD / f"{run.name}-end.pt", weights_only=True))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            mine[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_run_goes_on_from_the_very_bits(run: Path, photos: Path) -> None:
    old = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    said, found = go_on(run, photos)
    assert any("resumed at step 2" in text for text in said)
    assert found["position"]["step"] == old["position"]["step"] == 2
    mine, theirs = tensors(found), tensors(old)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert [row["step"] for row in rows(run) if row["kind"] == "step"] == [1, 2, 3, 4]
    require_old_end(run)


def test_a_damaged_one_falls_back_to_the_one_before(run: Path, photos: Path) -> None:
    path = run / "checkpoints" / "last.pt"
    path.write_bytes(path.read_bytes()[:-100])
    said, _ = go_on(run, photos)
    assert any(text.startswith(f"passed over: {path}: damaged checkpoint") and "\n" not in text for text in said)
    assert any("resumed at step 1" in text for text in said)
    require_old_end(run)


def test_one_of_the_first_version_is_read(run: Path) -> None:
    """It had no digest, and no lists in its position."""
    path = run / "checkpoints" / "last.pt"
    old = torch.load(path, weights_only=True)
    del old["digest"], old["position"]["skipped"], old["position"]["passed_over"]
    torch.save({**old, "version": 1}, path)
    assert load_checkpoint(path)["position"]["step"] == 2


def test_its_backbone_is_exported(run: Path, tmp_path: Path) -> None:
    theirs = load_file(OLD / run.name / "checkpoints" / "last.safetensors")
    method = torch.load(OLD / run.name / "checkpoints" / "last.pt", weights_only=True)["method"]
    assert all(torch.equal(method[f"student.backbone.{name}"], value) for name, value in theirs.items())
    for source in (run, run / "checkpoints" / "last.pt", run / "checkpoints" / "last.safetensors"):
        for name, format in (("mine.pth", "timm"), ("mine.safetensors", "safetensors")):
            export_backbone(load_trained(source), tmp_path / name, format)
        for found in (torch.load(tmp_path / "mine.pth", weights_only=True), load_file(tmp_path / "mine.safetensors")):
            assert found.keys() == theirs.keys()
            assert all(torch.equal(found[name], value) for name, value in theirs.items())


def test_photos_are_read(photos: Path) -> None:
    with BetonReader(photos) as reader:
        reader.require_whole()
        assert len(reader) == 4 and reader.classes == ["left", "right"] and reader.labels.tolist() == [0, 0, 1, 1]
        sums = [zlib.crc32(reader.encoded(number)) for number in range(4)]
    assert sums == SUMS
