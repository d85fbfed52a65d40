"""A run that begins with weights: where they go, what keeps them from being lost, and what the report says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from processes import run_processes
from small_run import Silent, options, small, state
from test_every_recipe import ALWAYS, SMALLER, cli
from test_torchvision_names import with_statistics
from torch import Tensor, nn

from fastssl.config.recipe import Recipe, load_recipe, parse_overrides
from fastssl.distributed.world import world_from_environment
from fastssl.errors import FastSSLError
from fastssl.evaluate.trained import Trained, load_trained
from fastssl.models.backbones import create_backbone, read_header, save_backbone
from fastssl.optim.schedules import RunLength
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.plan.draw import Normalisation
from fastssl.pretrain import pretrain
from fastssl.report.page import write_report
from fastssl.training.setup import prepare
from fastssl.training.step import TrainStep
from fastssl.training.trainer import train
from fastssl.weights import source as weights_source
from fastssl.weights.source import initial_weights

ARCH, CPU, RUN = "lcnet_035", torch.device("cpu"), RunLength(4, 2)
OWN = Normalisation((0.5, 0.25, 0.5), (0.5, 0.25, 0.5))
METHODS = {
    "moco": ("few-photos-moco", ["views.0.size=32"]),
    "simclr": ("adapt", ["views.0.size=32"]),
    "swav": ("swav-mobilenetv2-sslight", ["views.global_size=32", "views.local_size=16"]),
    "dino": ("dino-mobilenetv2-sslight", ["views.global_size=32", "views.local_size=16"]),
}


def theirs(folder: Path, seed: int = 1) -> Path:
    """Weights that others trained, in a file of ours."""
    backbone = with_statistics(create_backbone(ARCH), seed)
    path = folder / f"theirs-{seed}.safetensors"
    save_backbone(backbone, path, arch=ARCH, network="imported", mean=OWN.mean, std=OWN.std)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return theirs(tmp_path_factory.mktemp("weights"))


def recipe(method: str = "simclr", *changes: str) -> Recipe:
    name, sizes = METHODS[method]
    return load_recipe(name, parse_overrides([f"arch={ARCH}", *ALWAYS, *SMALLER[method], *sizes, *changes]))


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def views(step: TrainStep, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(spec.count * step.batch_size, 3, spec.size, spec.size) for spec in step.recipe.views]
    return [torch.randn(s, generator=generator).contiguous(memory_format=torch.channels_last) for s in shapes]


def make(step: TrainStep, number: int) -> None:
    step(views(step, number), step.noise(0, number), step.rates(number, RUN))


@pytest.mark.parametrize("method", METHODS)
def test_both_backbones_begin_with_the_weights_and_the_head_by_the_seed(method: str, weights: Path) -> None:
    init = initial_weights(str(weights))
    step = TrainStep(recipe(method), CPU, amp=False, seed=0, init=init)
    again, other = (TrainStep(recipe(method), CPU, amp=False, seed=seed, init=init).method.student for seed in (0, 1))
    for network in step.method.networks:
        assert same(tensors(network.backbone), tensors(init.backbone))
        assert same(tensors(network.projector), tensors(again.projector))
        assert not same(tensors(network.projector), tensors(other.projector))
    make(step, 0)
    assert same(tensors(init.backbone), tensors(load_trained(weights).backbone))  # the report's row is of these


def test_weights_of_another_network_are_refused(weights: Path) -> None:
    other = load_recipe("adapt", {"arch": "lcnet_050"})
    with pytest.raises(FastSSLError, match=rf"^the weights {weights.name} are those of lcnet_035, not of lcnet_050$"):
        TrainStep(other, CPU, amp=False, seed=0, init=initial_weights(str(weights)))


# ---------------------------------------------------------------------- what keeps them from being lost


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_the_backbone_has_its_share_of_the_rate(name: str, weights: Path) -> None:
    init, moved = initial_weights(str(weights)), {}
    for share in (1.0, 0.25):
        changes = (f"optim.name={name}", f"optim.backbone_lr={share}")
        chosen = recipe("simclr", *changes, "optim.warmup_epochs=0", "optim.lr=0.01", "optim.lr_batch=0")
        step = TrainStep(chosen, CPU, amp=False, seed=0, init=init)
        parts = step.method.student.backbone, step.method.student.projector
        before = [[one.detach().clone() for one in part.parameters()] for part in parts]
        make(step, 0)
        moved[share] = [[a - b for a, b in zip(part.parameters(), old)] for part, old in zip(parts, before)]
    for whole, part in zip(moved[1.0][0], moved[0.25][0]):
        torch.testing.assert_close(part, 0.25 * whole, rtol=1e-3, atol=1e-6)
    assert max(one.abs().max().item() for one in moved[0.25][0]) > 1e-4
    for whole, part in zip(moved[1.0][1], moved[0.25][1]):
        torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("method", METHODS)
def test_batchnorm_keeps_what_it_came_with(method: str, weights: Path) -> None:
    init = initial_weights(str(weights))
    steps = {
        kept: TrainStep(recipe(method, f"frozen_bn={kept}"), CPU, amp=False, seed=0, init=init)
        for kept in (True, False)
    }
    came = {name: value for name, value in init.backbone.state_dict().items() if "running" in name}
    for kept, step in steps.items():
        make(step, 2)
        for network in step.method.networks:
            found = network.backbone.state_dict()
            assert all(torch.equal(found[name], value) for name, value in came.items()) == kept, network
    backbone = steps[True].method.student.backbone
    one, many = views(steps[True], 0)[0][:1], views(steps[True], 0)[0][:4]
    assert torch.allclose(backbone(one), backbone(many)[:1], atol=1e-4)  # no picture sees the others of its batch
    assert any(layer.weight.requires_grad for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d))


def test_batchnorm_that_is_not_there_or_came_with_nothing(beton: Path, tmp_path: Path) -> None:
    step = TrainStep(recipe("simclr", "arch=vit_tiny"), CPU, amp=False, seed=0)
    assert "frozen_bn changes nothing: vit_tiny has no BatchNorm" in step.without_effect
    with pytest.raises(FastSSLError, match="frozen_bn keeps the statistics of weights: give some with --init-from"):
        pretrain(small("frozen_bn=true"), options(beton, tmp_path / "run"), Silent())


# ---------------------------------------------------------------------- whole runs


def arguments(beton: Path, out: Path, *more: str) -> list[str]:
    sets = [*ALWAYS, *SMALLER["simclr"], "views.0.size=32"]
    found = ["pretrain", "--data", str(beton), "--out", str(out), "--device", "cpu", "--workers", "1", *more]
    return found + [argument for item in sets for argument in ("--set", item)]


def test_a_run_says_what_it_began_with_and_goes_on_without_it(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file, out = theirs(tmp_path), tmp_path / "run"
    command = arguments(beton, out, "--init-from", str(file))
    assert cli(command) == 0
    said = capsys.readouterr().err
    assert "begins with theirs-1.safetensors (lcnet_035), which saw pictures of mean (0.5, 0.25" in said
    config, summary = yaml.safe_load((out / "config.yaml").read_text()), json.loads((out / "summary.json").read_text())
    assert (config["recipe"], config["arch"], config["init_from"]["name"]) == ("adapt", ARCH, "theirs-1.safetensors")
    assert str(tmp_path) not in (out / "config.yaml").read_text()
    assert [tuple(config["views"][0][name]) for name in ("mean", "std")] == list(OWN)
    assert load_trained(out).normalisation == OWN and summary["init_from"] == config["init_from"]
    names = [row["name"] for row in summary["probe"]["rows"]]
    assert [name for name in names if "16x16" not in name and "histogram" not in name and "frequent" not in name] == [
        *("random initialisation", "as it came", "after pre-training")
    ]
    assert "as they came" in summary["verdict"]["text"] and summary["verdict"]["state"] == "not judged"  # 6 photos
    assert set(summary["verdict"]["against"]["as it came"]) == {"knn", "linear"}
    page = (out / "report.html").read_text()
    assert page.count("as it came") >= 2  # in the table and in the line above it
    # It is finished: the same command does nothing, with or without the file; another one's weights are refused.
    ended = state(out)["method"]
    kept = out / "checkpoints" / "initial.safetensors"
    assert read_header(kept)["origin"] == file.name
    file.rename(tmp_path / "away")
    assert cli(command) == 0 and same(state(out)["method"], ended)
    theirs(tmp_path, 2).rename(file)
    capsys.readouterr()
    assert cli(command) == 1
    assert "belongs to a run with other settings (init_from.weights: " in capsys.readouterr().err
    (tmp_path / "away").rename(tmp_path / "moved.safetensors")  # the same weights under another name
    assert cli(arguments(beton, out, "--init-from", str(tmp_path / "moved.safetensors"))) == 0
    assert cli(arguments(beton, out, "--init-from", str(tmp_path / "nothing.safetensors"))) == 1
    assert "nothing.safetensors: no such file" in capsys.readouterr().err
    kept.unlink()
    write_report(out)


def test_a_tag_in_arch_means_the_same(
    beton: Path, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []

    def stand_in(source: str, arch: str | None = None, which: str | None = None) -> Trained:
        asked.append((source, arch))
        return load_trained(weights)

    monkeypatch.setattr(weights_source, "load_weights", stand_in)
    monkeypatch.setattr(weights_source, "_with_tag", lambda name: name)
    monkeypatch.setattr("timm.is_model_pretrained", lambda name: True)
    out = tmp_path / "run"
    command = arguments(beton, out, "--arch", f"{ARCH}.ours", "--recipe", "adapt", "--set", "optim.lr=0.1")
    assert cli(command) == 0 and asked == [(f"{ARCH}.ours", None)]
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["arch"], config["init_from"]["name"]) == (ARCH, f"{ARCH}.ours")
    assert read_header(out / "checkpoints" / "last.safetensors")["arch"] == ARCH
    kept = str(out / "checkpoints" / "initial.safetensors")
    assert cli(command) == 0 and asked[1:] == [(kept, None)]  # the hub is not asked again
    assert cli([*command, "--resume", "never"]) == 0 and asked[2:] == [(f"{ARCH}.ours", None)]
    assert cli([*command, "--init-from", str(weights)]) == 2
    assert "both name weights; give one" in capsys.readouterr().err
    with pytest.raises(FastSSLError, match=r"names weights, which have to be given as RunOptions\.init"):
        pretrain(small(f"arch={ARCH}.ours"), options(beton, tmp_path / "other"), Silent())


def test_the_recipes_own_mean_and_std_stay(weights: Path) -> None:
    assert load_recipe("adapt", normalisation=OWN).views[0].mean == OWN.mean
    assert load_recipe("adapt", {"views.0.std": "[1, 1, 1]"}, OWN).views[0].std == (1.0, 1.0, 1.0)
    crops = load_recipe("dino-mobilenetv2-sslight", normalisation=OWN).views
    assert {view.mean for view in crops} == {OWN.mean} and {view.std for view in crops} == {OWN.std}
    preset = load_recipe("dino-mobilenetv2-sslight", {"views.preset": "sslight-cnn"}, OWN).views
    assert {view.std for view in preset} == {OWN.std}


def run_small(data: Path, out: Path, weights: Path) -> dict[str, Tensor]:
    chosen, init = small("frozen_bn=true", "train.epochs=1"), initial_weights(str(weights))
    with BetonReader(data) as reader:
        how = options(data, out, init=init), reader, None, Silent(), world_from_environment(), CPU
        run = prepare(chosen, *how)
        try:
            assert same(tensors(run.backbone), tensors(init.backbone))
            train(run)
        finally:
            run.close()
    return tensors(run.step.method)


def test_two_processes_begin_with_the_same_weights(beton: Path, tmp_path: Path, weights: Path) -> None:
    first, second = run_processes(run_small, 2, beton, tmp_path / "two", weights, timeout=600)
    networks = [name for name in first if name.startswith(("student.backbone.", "teacher.backbone."))]
    assert networks and all(torch.equal(first[name], second[name]) for name in networks)
    assert len(list(tmp_path.rglob("initial.safetensors"))) == 1


def test_estimate_takes_the_same_options(beton: Path, weights: Path, capsys: pytest.CaptureFixture) -> None:
    command = arguments(beton, Path("unused"), "--init-from", str(weights))
    del command[3:5]
    assert cli(["estimate", *command[1:], "--seconds", "1"]) == 0
    assert "measuring adapt with lcnet_035 on this CPU" in capsys.readouterr().err
