"""``fastssl export``: what timm, torchvision and onnxruntime read gives the same features; nothing is overwritten that
is not an export.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_torchvision_names import with_statistics
from torch import nn

from fastssl.cli import main
from fastssl.errors import FastSSLError
from fastssl.evaluate.trained import Trained, load_trained
from fastssl.models.backbones import create_backbone, load_backbone, save_backbone
from fastssl.weights.export import SIGNATURE, export_backbone, require_replaceable, save_tensors, staged
from fastssl.weights.to_onnx import check_features

ARCHS = {"lcnet_035": "lcnet_035", "mobilenetv3_large": "mobilenetv3_large_100", "vit_tiny": "vit_tiny_patch16_224"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run for each network; its student and teacher differ; lcnet_035 has a mean and std of its own."""
    root = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(ARCHS):
        (root / name / "checkpoints").mkdir(parents=True)
        for network, file in (("student", "last.safetensors"), ("teacher", "last-teacher.safetensors")):
            torch.manual_seed(2 * seed + (network == "teacher"))
            backbone = with_statistics(create_backbone(name), seed)
            seen = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)} if name == "lcnet_035" else {}
            save_backbone(backbone, root / name / "checkpoints" / file, arch=name, network=network, step="7", **seen)
    return root


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of ``fastssl export``."""
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def elsewhere(tmp_path: Path, script: str) -> list[torch.Tensor]:
    """What ``script`` puts into ``out`` from ``images``, in a process that has never imported fastssl."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.save(images, tmp_path / "images.pt")
    code = (
        f"import sys, torch, warnings\ntorch.set_num_threads(1)\nimages = torch.load('images.pt')\nout = []\n{script}\n"
    )
    code += "assert not any(name.split('.')[0] == 'fastssl' for name in sys.modules)\ntorch.save(out, 'out.pt')\n"
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    return torch.load(tmp_path / "out.pt")


def features(path: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    backbone = load_backbone(path).to(memory_format=torch.contiguous_format, dtype=dtype)
    with torch.no_grad():
        return backbone(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype))


@pytest.mark.slow
def test_timm_loads_the_file_and_the_folder(capsys: pytest.CaptureFixture, runs: Path, tmp_path: Path) -> None:
    script, wanted = "import timm\nwith torch.no_grad():\n", []
    for name, arch in ARCHS.items():
        for destination in (f"{name}.safetensors", f"{name}.pth", name):
            assert run(capsys, runs / name, tmp_path / destination)[0] == 0
        more = (
            ", dynamic_img_size=True" if name == "vit_tiny" else ""
        )  # without it timm's takes 224 px, as any of its ViTs
        for call in (
            f"{arch!r}, num_classes=0, checkpoint_path='{name}.safetensors'{more}",
            f"{arch!r}, num_classes=0, checkpoint_path='{name}.pth'{more}",
            f"{arch!r}, pretrained=True, num_classes=0, pretrained_cfg_overlay=dict(file='{name}.safetensors', "
            f"custom_load=False){more}",
            f"'local-dir:{name}', pretrained=True",
        ):
            script += f"    out.append(timm.create_model({call}).eval()(images))\n"
        wanted += [features(runs / name / "checkpoints" / "last.safetensors")] * 4
    script += (
        "    assert timm.create_model('vit_tiny_patch16_224', num_classes=0, "
        "checkpoint_path='vit_tiny.pth')(torch.zeros(1, 3, 224, 224)).shape[1] == 192\n"
    )
    for found, expected in zip(elsewhere(tmp_path, script), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_folder_says_how_pictures_are_prepared(capsys: pytest.CaptureFixture, runs: Path, tmp_path: Path) -> None:
    import timm

    status, out, _ = run(capsys, runs / "vit_tiny", tmp_path / "vit", "--size", 96, "--which", "teacher")
    assert status == 0 and "local-dir:" in out
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("vit_tiny_patch16_224", 0, 192)
    # timm's entry for it says 0.5, bicubic and 0.9, and whose weights those are.
    network = timm.create_model(f"local-dir:{tmp_path / 'vit'}")
    prepared = timm.data.resolve_model_data_config(network)
    assert tuple(prepared["mean"]) == (0.485, 0.456, 0.406) and tuple(prepared["std"]) == (0.229, 0.224, 0.225)
    assert (prepared["input_size"], prepared["interpolation"], prepared["crop_pct"]) == ((3, 96, 96), "bilinear", 0.875)
    assert not {"license", "paper_ids", "tag", "origin_url"} & config["pretrained_cfg"].keys()
    written = load_file(str(tmp_path / "vit" / "model.safetensors"))
    torch.testing.assert_close(
        written, dict(load_trained(runs / "vit_tiny", "teacher").backbone.state_dict()), rtol=0, atol=0
    )


@pytest.mark.slow
def test_torchvision_loads_strictly(capsys: pytest.CaptureFixture, runs: Path, tmp_path: Path) -> None:
    status, out, _ = run(capsys, runs / "mobilenetv3_large", tmp_path / "mine.pth", "--format", "torchvision")
    recipe = out.splitlines()[1]  # what the command says is what is run here
    # In float64: in float32 rounding alone makes these features, up to 15, uncertain by 1e-4.
    script = f"import torchvision\n{recipe}\nwith torch.no_grad(): out.append(net.eval().double()(images.double()))"
    assert status == 0 and "net.classifier[3] = torch.nn.Identity()" in recipe
    expected = features(runs / "mobilenetv3_large" / "checkpoints" / "last.safetensors", torch.float64)
    torch.testing.assert_close(elsewhere(tmp_path, script)[0], expected, rtol=1e-5, atol=1e-5)
    assert run(capsys, runs / "mobilenetv3_large", tmp_path / "mine.safetensors", "--format", "torchvision")[0] == 0
    tensors = load_file(str(tmp_path / "mine.safetensors"))
    torch.testing.assert_close(tensors, torch.load(tmp_path / "mine.pth", weights_only=True), rtol=0, atol=0)


def test_plain_safetensors_and_the_record(capsys: pytest.CaptureFixture, runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    status, out, _ = run(
        capsys, runs / "lcnet_035", path, "--format", "safetensors", "--which", "teacher", "--json", "-"
    )
    record = json.loads(out)  # nothing else on standard output
    assert status == 0 and record["network"] == "teacher" and record["step"] == 7 and record["format"] == "safetensors"
    assert record["path"] == "mine.safetensors" and str(tmp_path) not in out
    expected = load_trained(runs / "lcnet_035", "teacher").backbone.state_dict()
    torch.testing.assert_close(load_file(str(path)), dict(expected), rtol=0, atol=0)
    assert (
        record["tensors"] == len(expected) and record["size_bytes"] == path.stat().st_size and record["difference"] == 0
    )
    with safe_open(str(path), framework="pt") as file:
        about = file.metadata()
    assert (
        about["format"] == "pt"
        and "exported by fastssl" in about["description"]
        and about["arch"] == "lcnet_035"
        and "fastssl" not in about
    )
    assert (json.loads(about["mean"]), json.loads(about["std"])) == ([0, 0, 0], [1, 1, 1])


def test_pictures_are_prepared_as_the_run_took_them(capsys: pytest.CaptureFixture, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "lcnet_035", tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("probe: {size: 48, crop: 1.0}\n")

    def prepared(name: str) -> tuple[list[int], float]:
        config = json.loads((tmp_path / name / "config.json").read_text())["pretrained_cfg"]
        assert (config["mean"], config["std"]) == ([0, 0, 0], [1, 1, 1])
        return config["input_size"], config["crop_pct"]

    status, _, err = run(capsys, tmp_path / "run", tmp_path / "own")
    assert status == 0 and err == "" and prepared("own") == ([3, 48, 48], 1.0)
    status, _, err = run(capsys, tmp_path / "run", tmp_path / "other", "--size", 96)
    assert status == 0 and prepared("other") == ([3, 96, 96], 1.0)
    assert err == "--size 96: the run itself was probed with 48 (probe.size)\n"
    assert run(capsys, tmp_path / "run", tmp_path / "mine.pth")[0] == 0  # which has no place for a size
    about = torch.load(tmp_path / "mine.pth", weights_only=True).about
    assert (about["mean"], about["std"]) == ("[0.0, 0.0, 0.0]", "[1.0, 1.0, 1.0]")
    assert run(capsys, runs / "lcnet_035", tmp_path / "bare")[0] == 0 and prepared("bare") == ([3, 224, 224], 0.875)


@pytest.mark.slow
def test_onnx_runs_at_any_batch(capsys: pytest.CaptureFixture, runs: Path, tmp_path: Path) -> None:
    import onnxruntime

    path = tmp_path / "mine.onnx"
    status, out, err = run(capsys, runs / "lcnet_035", path, "--format", "onnx", "--size", 32)
    assert status == 0 and len(out.splitlines()) == 2 and err == ""  # torch's exporter would say more
    assert {entry.name for entry in tmp_path.iterdir()} == {"mine.onnx", "mine.onnx.json"}  # weights inside
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [one.name for one in (*session.get_inputs(), *session.get_outputs())] == ["images", "features"]
    backbone = load_trained(runs / "lcnet_035").backbone
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            expected = backbone(images)
        found = torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert (about["arch"], about["mean"], about["std"]) == ("lcnet_035", "[0.0, 0.0, 0.0]", "[1.0, 1.0, 1.0]")


@pytest.mark.slow
def test_an_onnx_file_that_differs_is_not_kept(
    capsys: pytest.CaptureFixture, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    describe = onnx.helper.set_model_props

    def damage(model: onnx.ModelProto, about: dict[str, str]) -> None:
        describe(model, about)
        weight = next(one for one in model.graph.initializer if len(one.dims) == 4)
        weight.raw_data = bytes(len(weight.raw_data))

    monkeypatch.setattr(onnx.helper, "set_model_props", damage)
    status, _, err = run(capsys, runs / "lcnet_035", tmp_path / "mine.onnx", "--format", "onnx", "--size", 32)
    assert_one_line(status, err, "mine.onnx", "differ by", "not written")
    assert list(tmp_path.iterdir()) == []


def test_onnx_says_what_is_missing(
    capsys: pytest.CaptureFixture, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find(name, *rest)
    )
    status, _, err = run(capsys, runs / "lcnet_035", tmp_path / "mine.onnx", "--format", "onnx")
    assert_one_line(status, err, "onnxscript", "pip install 'fastssl-vision[onnx]'")


def test_onnx_at_a_size_that_the_network_does_not_take(
    capsys: pytest.CaptureFixture, runs: Path, tmp_path: Path
) -> None:
    status, _, err = run(capsys, runs / "vit_tiny", tmp_path / "mine.onnx", "--format", "onnx", "--size", 50)
    assert_one_line(status, err, "vit_tiny_patch16_224", "50 px")
    assert list(tmp_path.iterdir()) == []


def assert_one_line(status: int, err: str, *words: str) -> None:
    lines = [
        line for line in err.splitlines() if line.startswith("fastssl:") and not line.startswith("fastssl: warning: ")
    ]
    assert status == 1 and len(lines) == 1 and "Traceback" not in err
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("destination", "arguments", "words"),
    [
        ("mine.onnx", (), ("--format timm", ".safetensors or .pth or .pt", "give --format onnx")),
        ("mine.pth", ("--format", "onnx"), (".onnx", "give --format timm or torchvision")),
        ("mine", ("--format", "torchvision"), ("ends in .pth",)),
        ("mine.pth", ("--format", "torchvision"), ("no counterpart of lcnet_035", "mobilenetv3_large_100", "resnet50")),
        ("mine.pth", ("--size", 64), ("--size is for",)),
        ("none/mine.pth", (), ("no such folder",)),
        ("mine.safetensors", ("--which", "student", "--format", "safetensors", "--size", 9), ("--size is for",)),
    ],
)
def test_what_cannot_be(
    capsys: pytest.CaptureFixture, runs: Path, tmp_path: Path, destination: str, arguments: tuple, words: tuple
) -> None:
    status, _, err = run(capsys, runs / "lcnet_035", tmp_path / destination, *arguments)
    assert_one_line(status, err, *words)
    assert list(tmp_path.iterdir()) == []


def test_only_exports_are_replaced(
    capsys: pytest.CaptureFixture, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder = runs / "lcnet_035"
    weights = run_folder / "checkpoints" / "last.safetensors"
    before = weights.read_bytes()
    assert_one_line(*run(capsys, run_folder, weights)[::2], "no export of this kind", "left alone")
    assert weights.read_bytes() == before
    torch.save({"version": 1, "method": {"a": torch.zeros(1)}}, tmp_path / "last.pt")  # as a run's
    (tmp_path / "text.pth").write_text("a diary")
    (tmp_path / "text.onnx").write_text("a diary")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").touch()
    (tmp_path / "link.pth").symlink_to(tmp_path / "text.pth")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert_one_line(*run(capsys, run_folder, ".")[::2], "is the current folder")
    tensors = {name: value.contiguous() for name, value in load_trained(run_folder).backbone.state_dict().items()}
    torch.save(tensors, tmp_path / "downloaded.pth")
    save_file(
        tensors,
        str(tmp_path / "downloaded.safetensors"),
        {"format": "pt", "description": "a network, exported by others"},
    )
    save_file(tensors, str(tmp_path / "classifier.safetensors"), {"format": "pt", "fastssl-classifier": "{}"})
    for name, config in (("foreign", None), ("hub", '{"architecture": "lcnet_035"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config or "{}")
        if config:
            save_file(tensors, str(tmp_path / name / "model.safetensors"), {"format": "pt"})
    theirs = (
        "downloaded.pth",
        "downloaded.safetensors",
        "classifier.safetensors",
        "foreign/config.json",
        "hub/model.safetensors",
    )
    contents = [(tmp_path / name).read_bytes() for name in theirs]
    for name in (
        "last.pt",
        "text.pth",
        "photos",
        "link.pth",
        "downloaded.pth",
        "downloaded.safetensors",
        "classifier.safetensors",
        "foreign",
        "hub",
    ):
        assert run(capsys, run_folder, tmp_path / name)[0] == 1
    assert [(tmp_path / name).read_bytes() for name in theirs] == contents
    assert run(capsys, run_folder, tmp_path / "text.onnx", "--format", "onnx")[0] == 1
    assert (tmp_path / "text.pth").read_text() == (tmp_path / "text.onnx").read_text() == "a diary"

    for name in ("mine.safetensors", "mine.pth", "mine"):
        for which in ("student", "teacher"):  # the second one takes the first one's place
            assert run(capsys, run_folder, tmp_path / name, "--which", which)[0] == 0
        file = tmp_path / name / "model.safetensors" if name == "mine" else tmp_path / name
        found = torch.load(file, weights_only=True) if file.suffix == ".pth" else load_file(str(file))
        expected = load_trained(run_folder, "teacher").backbone.state_dict()
        torch.testing.assert_close(found, dict(expected), rtol=0, atol=0)
    (tmp_path / "mask").touch()
    for name in ("mine.safetensors", "mine.pth", "mine/model.safetensors"):  # others may read it, as any new file
        assert (tmp_path / name).stat().st_mode == (tmp_path / "mask").stat().st_mode
    assert {entry.name for entry in (tmp_path / "mine").iterdir()} == {"config.json", "model.safetensors"}
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    for destination in (tmp_path / "file", tmp_path / "folder", tmp_path / "before"):
        if destination.name != "file":
            destination.mkdir()
            (destination / "config.json").write_text("before")
        else:
            destination.write_text("before")
        with pytest.raises(FastSSLError, match="in the middle"), staged(destination) as place:
            place.write_text("half")
            raise FastSSLError("in the middle")
        assert (destination / "config.json" if destination.is_dir() else destination).read_text() == "before"
        with pytest.raises(FastSSLError, match=r"not written .*untouched"), staged(destination):
            pass  # nothing was written
        assert (destination / "config.json" if destination.is_dir() else destination).read_text() == "before"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["before", "file", "folder"]


def test_an_export_is_known_again_by_what_it_says(tmp_path: Path) -> None:
    import onnx

    def replaceable(name: str) -> bool:
        try:
            require_replaceable(tmp_path / name)
        except FastSSLError as error:
            assert "no export of this kind" in str(error)
            return False
        return True

    about = {"description": f"backbone pre-trained without labels, {SIGNATURE} 0.1.0", "arch": "lcnet_035"}
    save_tensors({"a": torch.zeros(2)}, tmp_path / "a.pth", about)
    save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors", about)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert content.about == about and list(content) == ["a"]
    for folder, config in (
        ("folder", '{"architecture": "lcnet_035"}'),
        ("list", '["architecture"]'),
        ("none", '{"model_type": "x"}'),
    ):
        (tmp_path / folder).mkdir()
        assert replaceable(folder)  # an empty one
        save_tensors({"a": torch.zeros(2)}, tmp_path / folder / "model.safetensors", about)
        assert not replaceable(folder)
        (tmp_path / folder / "config.json").write_text(config)
    for name, props in (("a", about), ("theirs", {"arch": "x"})):
        model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
        onnx.helper.set_model_props(model, props)
        onnx.save(model, str(tmp_path / f"{name}.onnx"))
    assert [replaceable(name) for name in ("a.pth", "a.safetensors", "a.onnx", "folder")] == [True] * 4
    assert [replaceable(name) for name in ("theirs.onnx", "list", "none")] == [False] * 3


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_folder_is_back_when_the_exchange_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("before")
    entered = []

    def interrupted(self: Path, target: Path) -> None:
        entered.append(target.exists())  # False: the earlier one has been put aside
        raise stop

    monkeypatch.setattr(Path, "replace", interrupted)
    with (
        pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else FastSSLError),
        staged(tmp_path / "mine") as place,
    ):
        place.mkdir()
        (place / "config.json").write_text("after")
    assert entered == [False] and (tmp_path / "mine" / "config.json").read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_what_cannot_go_back_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("before")

    def interrupted(self: Path, target: Path) -> None:
        target.mkdir()  # somebody else was quicker
        (target / "theirs").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(FastSSLError, match="what was there before is in") as error, staged(tmp_path / "mine") as place:
        place.mkdir()
    (kept,) = tmp_path.glob(".mine.*/mine.before/config.json")
    assert kept.read_text() == "before" and str(kept.parent) in str(error.value)


def test_only_the_first_process_exports(
    capsys: pytest.CaptureFixture, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert run(capsys, runs / "lcnet_035", tmp_path / "mine.pth") == (0, "", "") and list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RANK", "0")
    assert run(capsys, runs / "lcnet_035", tmp_path / "mine.pth")[0] == 0 and (tmp_path / "mine.pth").is_file()


def test_a_tensor_too_many_or_too_few_is_named(tmp_path: Path) -> None:
    backbone = create_backbone("lcnet_035").eval()
    backbone.register_buffer("surplus", torch.zeros(1))
    trained = Trained(backbone, "lcnet_035", "student", 1, "mine")
    for format_, name in (("timm", "a.pth"), ("timm", "folder")):
        with pytest.raises(FastSSLError, match=r"not those of timm's lcnet_035: 1 left over \(surplus\)"):
            export_backbone(trained, tmp_path / name, format_)
    with pytest.raises(FastSSLError, match=r"timm's lcnet_050: \d+ missing|lcnet_050.*left over|size mismatch|surplus"):
        export_backbone(Trained(backbone, "lcnet_050", "student", 1, "mine"), tmp_path / "b.pth", "timm")
    narrow = create_backbone("resnet18").eval()
    del narrow.layer4[1].conv1
    with pytest.raises(FastSSLError, match=r"torchvision's resnet18: 1 missing \(layer4\.1\.conv1\.weight\)"):
        export_backbone(Trained(narrow, "resnet18", "student", 1, "mine"), tmp_path / "c.pth", "torchvision")
    assert list(tmp_path.iterdir()) == []


class Wide(nn.Module):
    """Two features of a picture, the second of which is what is left of two large numbers: rounding shows."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.mean((2, 3))
        return torch.stack((mean[:, 0], (mean[:, 1] + self.scale) - self.scale), dim=1)


def test_the_check_tells_rounding_from_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def check(network: nn.Module, other) -> float:
        return check_features(path, network, other, size=16, tolerance=1e-5)

    exact = Wide(0.0)
    assert check(exact, exact) == 0
    with pytest.raises(FastSSLError, match=r"x: gives features that differ by 0\.0\d+ of their spread"):
        check(exact, lambda images: exact(images) + 1e-3)
    with pytest.raises(FastSSLError, match="differ by nan"):
        check(exact, lambda images: exact(images) * torch.nan)
    with pytest.raises(FastSSLError, match=r"shape \(2, 1\), the backbone \(2, 2\)"):
        check(exact, lambda images: exact(images)[:, :1])
    constant = Wide(0.0)
    constant.forward = lambda images: 10 + 1e-2 * Wide.forward(constant, images)
    with pytest.raises(FastSSLError, match="differ by"):  # by a ten-thousandth of the features, but it reads no image
        check(constant, lambda images: torch.full((2, 2), 10.0))
    # One in which float32 loses the digits itself is not refused because another order of the sum loses others.
    assert check(Wide(1e4), exact) > 1e-5
    with pytest.raises(FastSSLError, match="differ by"):
        check(Wide(1e4), lambda images: Wide(1e4)(images) + 0.1)


def test_an_imported_backbone_can_be_exported(tmp_path: Path) -> None:
    save_backbone(create_backbone("lcnet_035"), tmp_path / "theirs.safetensors", arch="lcnet_035", network="imported")
    done = export_backbone(load_trained(tmp_path / "theirs.safetensors"), tmp_path / "out.safetensors")
    assert done.difference == 0 and (tmp_path / "out.safetensors").is_file()
    save_file({"a": torch.zeros(1)}, str(tmp_path / "plain.safetensors"))
    with pytest.raises(FastSSLError, match="no fastssl header"):
        load_trained(tmp_path / "plain.safetensors")


def test_help_has_an_example(capsys: pytest.CaptureFixture) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0 and "fastssl export runs/mine mine.pth --format torchvision" in out and "classifier[3]" in out
    assert run(capsys, "x")[0] == 2 and run(capsys, "x", "y", "--format", "caffe")[0] == 2
