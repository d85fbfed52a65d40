"""``fastssl import``: other projects' checkpoints, laid out as their code writes them, give the features that their
networks gave.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_export import assert_one_line
from test_torchvision_names import with_statistics
from torch import Tensor, nn

import fastssl
from fastssl.cli import main
from fastssl.errors import FastSSLError
from fastssl.evaluate.trained import load_trained
from fastssl.models.backbones import create_backbone, read_header, save_backbone
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation
from fastssl.weights.export import export_backbone
from fastssl.weights.importing import LAYOUTS, NETWORK, find_network, import_backbone
from fastssl.weights.read import read_foreign

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def features(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network.eval().to(memory_format=torch.contiguous_format)(IMAGES)


def with_prefix(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in network.state_dict().items()}


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of ``fastssl import``."""
    with pytest.raises(SystemExit) as stop:
        main(["import", *map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def imported(path: Path, arch: str, **how: str) -> Tensor:
    """The features of what ``import_backbone`` makes of ``path``."""
    destination = path.with_name("imported.safetensors")
    import_backbone(path, destination, arch, **how)
    return features(fastssl.load_backbone(destination))


class MoCo(nn.Module):
    """light-moco's and MoCo's: two encoders that end in a projector in the classifier's place, and a queue."""

    def __init__(self, encoder, last: str) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = with_statistics(encoder(), 1), with_statistics(encoder(), 2)
        for one in (self.encoder_q, self.encoder_k):
            width = getattr(one, last).in_features
            setattr(one, last, nn.Sequential(nn.Linear(width, width), nn.ReLU(), getattr(one, last)))
        self.register_buffer("queue", torch.randn(8, 16))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))


class Wrapped(nn.Module):
    """DINO's and SSLight's: a backbone and a head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Module()
        self.head.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))


class Encoder(nn.Module):
    """SSLight's backbone: what is left of torchvision's network without pooling and classifier."""

    def __init__(self, arch: str, seed: int) -> None:
        super().__init__()
        network = with_statistics(getattr(torchvision.models, arch)(), seed)
        self.encoder = network.features if arch == "mobilenet_v2" else nn.Sequential(*list(network.children())[:-2])

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images).mean((2, 3))


class SSLight(nn.Module):
    """The networks of one of its methods by their names there, with the online probe."""

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, backbone in networks.items():
            setattr(self, name, Wrapped(backbone))
        self.classifier = nn.Linear(4, 3)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> object:
    """SSLight's settings as fvcore pickles them: a dict with attributes; the class is gone when the file is read."""
    module = types.ModuleType("fvcore.common.config")

    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__ = module.__name__, "CfgNode"
    module.CfgNode = CfgNode
    for name in ("fvcore", "fvcore.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    inner, outer = CfgNode(LR=0.1, CROPS=[2, 6]), CfgNode(NAME="DINO")
    outer["SOLVER"] = inner
    outer.__dict__["__immutable__"] = inner.__dict__["__immutable__"] = True
    return outer


def test_light_moco(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MoCo(lambda: timm.create_model("lcnet_035", num_classes=8), "classifier")
    content = {"epoch": 3, "arch": "mobilenetv3", "state_dict": with_prefix("module.", model)}
    content["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict()
    torch.save(content, tmp_path / "checkpoint_0199.pth.tar")
    for network, (student, teacher) in (("encoder_q", ("student", "query")), ("encoder_k", ("teacher", "key"))):
        encoder = getattr(model, network)
        encoder.classifier = nn.Identity()
        for which in (student, teacher):
            found = imported(tmp_path / "checkpoint_0199.pth.tar", "lcnet_035", which=which)
            torch.testing.assert_close(found, features(encoder))
    assert not torch.allclose(features(model.encoder_q), features(model.encoder_k))

    status, out, _ = run(
        capsys, tmp_path / "checkpoint_0199.pth.tar", tmp_path / "imported.safetensors", "--arch", "lcnet_035"
    )
    lines = [line.split() for line in out.splitlines()]
    count = len(model.encoder_q.state_dict())
    assert status == 0 and "student network, layout moco" in out
    assert ["backbone", str(count), "taken,", "by", "timm's", "names"] in lines
    for group, number in (("classifier", 4), ("encoder_k", count + 4), ("queue", 1), ("queue_ptr", 1)):
        assert any(line[:2] == [group, str(number)] for line in lines)


def test_moco_with_a_network_of_torchvision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MoCo(lambda: torchvision.models.resnet18(num_classes=8), "fc")
    torch.save({"state_dict": with_prefix("module.", model)}, tmp_path / "moco.pth.tar")
    model.encoder_q.fc = nn.Identity()
    torch.testing.assert_close(
        imported(tmp_path / "moco.pth.tar", "resnet18", layout="moco"), features(model.encoder_q)
    )


def test_dino(tmp_path: Path) -> None:
    """As its main_dino.py saves: the student's names with ``module.``, the teacher's of a transformer without, and the
    command's arguments.
    """
    torch.manual_seed(0)
    student, teacher = (
        Wrapped(with_statistics(timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True), s))
        for s in (1, 2)
    )
    arguments = argparse.Namespace(arch="vit_tiny", lr=0.1, crops=(0.05, 0.4))
    content = {
        "student": with_prefix("module.", student),
        "teacher": teacher.state_dict(),
        "args": arguments,
        "epoch": 3,
    }
    torch.save({**content, "dino_loss": {"center": torch.zeros(1, 4)}}, tmp_path / "checkpoint.pth")
    torch.testing.assert_close(imported(tmp_path / "checkpoint.pth", "vit_tiny"), features(student.backbone))
    torch.testing.assert_close(
        imported(tmp_path / "checkpoint.pth", "vit_tiny", which="teacher"), features(teacher.backbone)
    )
    torch.save(teacher.backbone.state_dict(), tmp_path / "dino_pretrain.pth")  # as it publishes them
    torch.testing.assert_close(imported(tmp_path / "dino_pretrain.pth", "vit_tiny"), features(teacher.backbone))


@pytest.mark.parametrize(
    ("networks", "arch", "ours", "which"),
    [
        (("student", "teacher"), "mobilenet_v2", "mobilenetv2", "teacher"),
        (("student", "teacher"), "resnet18", "resnet18", None),
        (("network",), "mobilenet_v2", "mobilenetv2", None),
        (("encoder_q", "encoder_k"), "mobilenet_v2", "mobilenetv2", "key"),
    ],
)
def test_sslight(tmp_path: Path, settings: object, networks: tuple, arch: str, ours: str, which: str | None) -> None:
    torch.manual_seed(0)
    model = SSLight(**{name: Encoder(arch, seed) for seed, name in enumerate(networks)})
    torch.save({"config": settings, "steps": 5, "state_dict": with_prefix("module.", model)}, tmp_path / "last.pth.tar")
    for name in [name for name in sys.modules if name.split(".")[0] == "fvcore"]:
        del sys.modules[name]
    wanted = getattr(model, networks[-1 if which else 0]).backbone
    torch.testing.assert_close(
        imported(tmp_path / "last.pth.tar", ours, **({"which": which} if which else {})), features(wanted)
    )
    assert float((features(wanted)[0] - features(wanted)[1]).abs().max()) > 0.1
    assert read_header(tmp_path / "imported.safetensors")["origin_layout"] == "sslight"


def test_sslight_transformer(tmp_path: Path) -> None:
    backbone = with_statistics(timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True))
    torch.save(
        {"state_dict": with_prefix("module.", SSLight(student=backbone, teacher=nn.Identity()))},
        tmp_path / "last.pth.tar",
    )
    torch.testing.assert_close(imported(tmp_path / "last.pth.tar", "vit_tiny", layout="sslight"), features(backbone))


def test_torchvision_there_and_back(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Our MobileNet-V3 through torchvision's file, and torchvision's own with its classifier."""
    torch.manual_seed(0)
    backbone = with_statistics(create_backbone("mobilenetv3_large"))
    save_backbone(backbone, tmp_path / "mine.safetensors", arch="mobilenetv3_large", network="student", step="1")
    export_backbone(load_trained(tmp_path / "mine.safetensors"), tmp_path / "theirs.pth", "torchvision")
    torch.testing.assert_close(
        imported(tmp_path / "theirs.pth", "mobilenetv3_large"), features(backbone), rtol=1e-5, atol=1e-5
    )

    network = with_statistics(torchvision.models.mobilenet_v3_large(weights=None))
    save_file(network.state_dict(), str(tmp_path / "with-classes.safetensors"))
    network.classifier[3] = nn.Identity()
    json_path = tmp_path / "record.json"
    arguments = (
        tmp_path / "with-classes.safetensors",
        tmp_path / "out.safetensors",
        "--arch",
        "mobilenetv3_large",
        "--json",
        json_path,
    )
    status, out, _ = run(capsys, *arguments)
    record = json.loads(json_path.read_text())
    assert status == 0 and "scaled from eps 0.001" in out and str(tmp_path) not in json_path.read_text()
    assert (record["layout"], record["names"], record["eps"], record["taken"]) == (
        "torchvision",
        "torchvision",
        1e-3,
        310,
    )
    assert record["left_out"] == [{"group": "classifier", "tensors": 2, "why": "projector or classifier"}]
    trained = load_trained(tmp_path / "out.safetensors")
    assert (trained.network, trained.arch, trained.step) == ("imported", "mobilenetv3_large_100", None)
    torch.testing.assert_close(features(trained.backbone), features(network), rtol=1e-5, atol=1e-5)


def test_timm_with_its_classifier_and_without_counters(tmp_path: Path) -> None:
    network = with_statistics(timm.create_model("lcnet_035"))
    tensors = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(
        {"model": {f"_orig_mod.module.{name}": value for name, value in tensors.items()}, "epoch": 1},
        tmp_path / "old.pth",
    )
    network.reset_classifier(0)
    torch.testing.assert_close(imported(tmp_path / "old.pth", "lcnet_035", layout="timm"), features(network))
    matched = import_backbone(tmp_path / "old.pth", tmp_path / "imported.safetensors", "lcnet_035")
    assert matched.counters == sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    assert matched.taken + matched.counters == len(network.state_dict())


def test_mean_and_std_are_kept(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Those that are given; of an export those of its run; else ImageNet's."""
    theirs, mine, arch = tmp_path / "theirs.pth", tmp_path / "mine.safetensors", ("--arch", "lcnet_035")
    torch.save(timm.create_model("lcnet_035").state_dict(), theirs)
    assert run(capsys, theirs, mine, *arch)[0] == 0 and load_trained(mine).normalisation == IMAGENET
    assert run(capsys, theirs, mine, *arch, "--std", 0.5, 0.25, 1)[0] == 0
    assert load_trained(mine).normalisation == Normalisation(IMAGENET.mean, (0.5, 0.25, 1.0))
    export_backbone(load_trained(mine), tmp_path / "export.safetensors")
    back = tmp_path / "back.safetensors"
    assert run(capsys, tmp_path / "export.safetensors", back, *arch, "--mean", 0, 0, 0.5)[0] == 0
    assert load_trained(back).normalisation == Normalisation((0.0, 0.0, 0.5), (0.5, 0.25, 1.0))
    status, _, err = run(capsys, theirs, mine, *arch, "--mean", 123.675, 116.28, 103.53)
    assert status == 1 and err == "fastssl: mean.0 must be at most 1, got 123.675\n"


def test_evaluate_takes_it(capsys: pytest.CaptureFixture, tmp_path: Path, beton: Path) -> None:
    torch.save(timm.create_model("lcnet_035").state_dict(), tmp_path / "theirs.pth")
    assert run(capsys, tmp_path / "theirs.pth", tmp_path / "mine.safetensors", "--arch", "lcnet_035")[0] == 0
    command = [
        "evaluate",
        "knn",
        tmp_path / "mine.safetensors",
        "--data",
        beton,
        "--size",
        32,
        "--device",
        "cpu",
        "--workers",
        1,
        "--json",
        "-",
    ]
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, command)))
    record = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and (record["network"], record["arch"]) == ("imported", "lcnet_035")


@pytest.mark.slow
def test_what_does_not_fit_is_named_and_the_right_network_guessed(
    capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    def refused(content: object, arch: str, *arguments: str) -> tuple[int, str]:
        torch.save(content, tmp_path / "theirs.pth")
        status, _, err = run(capsys, tmp_path / "theirs.pth", tmp_path / "mine.safetensors", "--arch", arch, *arguments)
        assert not (tmp_path / "mine.safetensors").exists()
        return status, err

    small = torchvision.models.resnet18().state_dict()
    assert_one_line(
        *refused(small, "resnet34"),
        "does not fit resnet34",
        "missing (layer1.2.bn1.bias, layer1.2.bn1",
        "it fits --arch resnet18",
    )
    assert_one_line(
        *refused(small, "resnet50"),
        "another shape (layer1.0.conv1.weight (64, 64, 3, 3) for (64, 64, 1, 1)",
        "fits --arch resnet18",
    )
    assert_one_line(*refused(small, "mobilenetv2"), "missing", "left over", "fits --arch resnet18")
    tensors = timm.create_model("lcnet_035", num_classes=0).state_dict()
    fewer = {name: value for name, value in tensors.items() if name != "conv_stem.weight"}
    status, err = refused(fewer, "lcnet_035")
    assert_one_line(status, err, "does not fit lcnet_035: 1 missing (conv_stem.weight)")
    assert "--arch" not in err
    assert_one_line(*refused({**tensors, "neck.weight": torch.zeros(1)}, "lcnet_035"), "1 left over (neck.weight)")
    assert_one_line(
        *refused(tensors, "lcnet_035", "--layout", "torchvision"), "torchvision has no counterpart of lcnet_035"
    )
    assert_one_line(
        *refused(tensors, "lcnet_035", "--layout", "moco"),
        "not laid out as --layout moco",
        "encoder_q",
        "conv_stem.weight",
    )
    assert_one_line(
        *refused(tensors, "lcnet_035", "--which", "key"), "does not hold the key's network", "leave --which out"
    )
    assert_one_line(
        *refused({"state_dict": {"encoder_q.a": torch.zeros(1)}}, "lcnet_035", "--which", "key"),
        "it holds the student's",
    )
    assert_one_line(*refused(tensors, "lcnet_53"), "unknown network 'lcnet_53'")


def test_two_tensors_for_one_place_are_both_named(tmp_path: Path) -> None:
    one = torch.zeros(1)
    for content, words in (
        (
            {"module.conv.weight": one, "conv.weight": one + 1},
            "module.conv.weight and conv.weight would both be conv.weight",
        ),
        (
            {"state_dict": {"module.encoder_q.a": one, "encoder_q.a": one}},
            "state_dict.module.encoder_q.a and state_dict.encoder_q.a",
        ),
        (
            {"student": {"module.backbone.a": one, "backbone.a": one}},
            "student.module.backbone.a and student.backbone.a would both be a",
        ),
        ({"conv": {"weight": one}, "conv.weight": one}, "['conv']['weight'] and ['conv.weight']"),
    ):
        torch.save(content, tmp_path / "theirs.pth")
        with pytest.raises(FastSSLError) as error:
            find_network(tmp_path / "theirs.pth", read_foreign(tmp_path / "theirs.pth"))
        assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")  # torch's, about sparse and quantised tensors
def test_tensors_that_are_no_weights_are_named(tmp_path: Path) -> None:
    tensors = timm.create_model("lcnet_035", num_classes=0).state_dict()
    name = "conv_stem.weight"
    weight = tensors[name]
    holed = weight.clone()
    holed[0, 0, 0, 0] = torch.nan
    for odd, words in (
        (weight.to(torch.int8), f"of another kind ({name} int8 for float32)"),
        (weight.to(torch.complex64), f"of another kind ({name} complex64 for float32)"),
        (weight.to("meta"), f"on the meta device, without values ({name})"),
        (weight.to_sparse(), f"sparse ({name})"),
        (torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), f"quantised ({name})"),
        (holed, f"NaN or infinite values ({name})"),
        (weight / 0, f"NaN or infinite values ({name})"),
    ):
        torch.save({**tensors, name: odd}, tmp_path / "theirs.pth")
        with pytest.raises(FastSSLError) as error:
            import_backbone(tmp_path / "theirs.pth", tmp_path / "mine.safetensors", "lcnet_035")
        assert words in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "mine.safetensors").exists()
    torch.save(
        {name: value.half() if value.is_floating_point() else value.int() for name, value in tensors.items()},
        tmp_path / "half.pth",
    )
    import_backbone(tmp_path / "half.pth", tmp_path / "mine.safetensors", "lcnet_035")
    assert torch.equal(fastssl.load_backbone(tmp_path / "mine.safetensors").conv_stem.weight, weight.half().float())


def test_a_dict_without_end(tmp_path: Path) -> None:
    content: dict = {"conv.weight": torch.zeros(1)}
    content["settings"] = {"all": content}
    torch.save(content, tmp_path / "theirs.pth")
    with pytest.raises(FastSSLError, match="or one in itself"):
        read_foreign(tmp_path / "theirs.pth")


def test_only_the_first_process_imports(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(timm.create_model("lcnet_035").state_dict(), tmp_path / "theirs.pth")
    for name, value in {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    command = (tmp_path / "theirs.pth", tmp_path / "mine.safetensors", "--arch", "lcnet_035")
    assert run(capsys, *command) == (0, "", "") and not (tmp_path / "mine.safetensors").exists()
    monkeypatch.setenv("RANK", "0")
    assert run(capsys, *command)[0] == 0 and (tmp_path / "mine.safetensors").is_file()


class Executed:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_nothing_in_the_file_is_run(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Executed(tmp_path / "run")}, tmp_path / "theirs.pth")
    status, _, err = run(capsys, tmp_path / "theirs.pth", tmp_path / "mine.safetensors", "--arch", "lcnet_035")
    assert_one_line(status, err, "theirs.pth: refused", "mkdir", "save its state_dict alone")
    assert not (tmp_path / "run").exists() and "weights_only" not in err
    torch.save(timm.create_model("lcnet_035"), tmp_path / "module.pth")  # a whole module
    assert_one_line(
        *run(capsys, tmp_path / "module.pth", tmp_path / "x.safetensors", "--arch", "lcnet_035")[::2],
        "refused",
        "timm.models",
    )


def test_what_is_no_checkpoint_of_others(tmp_path: Path) -> None:
    def why(name: str) -> str:
        with pytest.raises(FastSSLError) as error:
            read_foreign(tmp_path / name)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such file" in why("none.pth")
    for name in ("garbage.pth", "garbage.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint" * 50)
    (tmp_path / "empty.pth").touch()
    assert (
        "damaged" in why("garbage.pth")
        and "damaged" in why("empty.pth")
        and "not a whole safetensors" in why("garbage.safetensors")
    )
    torch.save({"epoch": 3, "list": [torch.zeros(1)]}, tmp_path / "without.pth")
    assert "holds no dict of tensors" in why("without.pth")
    save_backbone(create_backbone("lcnet_035"), tmp_path / "ours.safetensors", arch="lcnet_035", network="student")
    torch.save({"version": 1, "method": {"a": torch.zeros(1)}, "position": {}}, tmp_path / "last.pt")
    assert "is a checkpoint of fastssl" in why("ours.safetensors") and "is a checkpoint of fastssl" in why("last.pt")


def full_disk(*arguments: object, **options: object) -> None:
    raise SafetensorError("No space left on device")


def test_only_what_was_imported_is_replaced(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(timm.create_model("lcnet_035").state_dict(), tmp_path / "theirs.pth")
    save_backbone(create_backbone("lcnet_035"), tmp_path / "last.safetensors", arch="lcnet_035", network="student")
    (tmp_path / "text.safetensors").write_text("a diary")
    for name, words in (
        ("last.safetensors", "left alone"),
        ("text.safetensors", "left alone"),
        ("mine.pth", ".safetensors"),
        ("a/b.safetensors", "no such folder"),
    ):
        assert_one_line(*run(capsys, tmp_path / "theirs.pth", tmp_path / name, "--arch", "lcnet_035")[::2], words)
    assert read_header(tmp_path / "last.safetensors")["network"] == "student"
    for _ in range(2):
        assert run(capsys, tmp_path / "theirs.pth", tmp_path / "mine.safetensors", "--arch", "lcnet_035")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full_disk)
        assert_one_line(
            *run(capsys, tmp_path / "theirs.pth", tmp_path / "mine.safetensors", "--arch", "lcnet_035")[::2],
            "not written",
        )
    header = read_header(tmp_path / "mine.safetensors")
    assert (header["network"], header["origin"], header["origin_layout"]) == ("imported", "theirs.pth", "timm")


def test_help_has_an_example_and_knows_the_layouts(capsys: pytest.CaptureFixture) -> None:
    from fastssl.cli import weights as command

    status, out, _ = run(capsys, "--help")
    assert status == 0 and "fastssl import checkpoint_0199.pth.tar moco.safetensors --arch mobilenetv3_large" in out
    assert "tf_efficientnet_b0" in out
    assert sorted(command.LAYOUTS) == sorted(["auto", *LAYOUTS]) and set(command.WHICH) == NETWORK.keys()
    assert run(capsys, "x", "y.safetensors")[0] == 2
