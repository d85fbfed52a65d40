"""Checkpoints: whole or absent, strict, and nothing in them is executed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastssl.backbones import create_backbone, load_backbone
from fastssl.checkpoint import Position, differences, is_detector, load_checkpoint, restore, save_checkpoint
from fastssl.heads import ProjectorConfig
from fastssl.losses.pairs import PairWeights
from fastssl.methods.method import Views
from fastssl.methods.moco import MoCo, MoCoConfig
from fastssl.optim import OptimConfig, create_optimizer
from fastssl.pipelines.errors import FastSSLError


def make(seed: int = 0) -> tuple[MoCo, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    config = MoCoConfig(queue=16, neighbors=5, split_bn=1, projector=ProjectorConfig(hidden=8, out=4))
    method = MoCo(create_backbone("mobilenetv3_small_050"), config, views=Views(4, PairWeights(0, 1.0, 0.0)))
    return method, create_optimizer(method, OptimConfig(lr=0.1))


def step(method: MoCo, optimizer: torch.optim.Optimizer, seed: int) -> None:
    views = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    keys = method.targets([views], {"permutation": torch.arange(8)}, {})
    method.part_loss([views], keys, {"smoothing": 0.2}).loss.backward()
    method.after_step(keys, [])
    optimizer.step()
    optimizer.zero_grad()
    method.update_teacher(0.9)


def test_a_restored_run_makes_the_very_same_step(tmp_path: Path) -> None:
    method, optimizer = make()
    for seed in range(3):
        step(method, optimizer, seed)
    position = Position(step=3, epoch=1, step_in_epoch=2, train_seconds=1.5)
    save_checkpoint(tmp_path, method=method, optimizer=optimizer, position=position, config={"a": 1}, arch="mobilenetv3_small_050")
    other, other_optimizer = make(seed=9)
    state = load_checkpoint(tmp_path / "last.pt")
    assert restore(state, method=other, optimizer=other_optimizer) == position and state["config"] == {"a": 1}
    step(method, optimizer, 7)
    step(other, other_optimizer, 7)
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last-teacher.safetensors", "last.pt", "last.safetensors"]


def test_student_and_teacher_are_both_kept(tmp_path: Path) -> None:
    method, optimizer = make()
    step(method, optimizer, 0)
    save_checkpoint(tmp_path, method=method, optimizer=optimizer, position=Position(), config={}, arch="mobilenetv3_small_050")
    for name, network in (("last", method.student), ("last-teacher", method.teacher)):
        loaded = load_backbone(tmp_path / f"{name}.safetensors").state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in network.backbone.state_dict().items())
    assert not torch.equal(method.student.backbone.conv_stem.weight, method.teacher.backbone.conv_stem.weight)


def test_damaged_and_foreign_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(FastSSLError, match="no such checkpoint"):
        load_checkpoint(path)
    method, optimizer = make()
    save_checkpoint(tmp_path, method=method, optimizer=optimizer, position=Position(), config={}, arch="mobilenetv3_small_050")
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(FastSSLError, match="damaged checkpoint"):
            load_checkpoint(path)
    torch.save({"version": 0}, path)
    with pytest.raises(FastSSLError, match="not a checkpoint of this version"):
        load_checkpoint(path)
    torch.save(Path("x"), path)  # an object that would have to be executed to be read
    with pytest.raises(FastSSLError, match="damaged checkpoint"):
        load_checkpoint(path)


def test_what_is_not_whole_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    method, optimizer = make()
    save_checkpoint(tmp_path, method=method, optimizer=optimizer, position=Position(3, 1, 2, 0.5), config={"a": {"b": 1}}, arch="lcnet_035")
    whole = torch.load(path, weights_only=True)
    endless: dict = {}
    endless["again"] = endless
    place = whole["position"]
    for change, words in (
        ({"method": 5}, "method is no dict"),
        ({"method": {0: torch.zeros(1)}}, "method is no dict with names"),
        ({"config": {"optim": {1: 2}}}, "config is no dict with names"),
        ({"config": endless}, "config is no dict with names"),
        ({"position": {**place, "step": "x"}}, r"position\.step is no number"),
        ({"position": {**place, "step": torch.tensor(3)}}, r"position\.step is no number"),
        ({"position": {**place, "train_seconds": float("nan")}}, r"position\.train_seconds is no number of seconds"),
        ({"position": {"step": 3}}, r"position\.epoch is no number"),
        ({"version": torch.tensor([1, 2])}, "not a checkpoint of this version"),
        ({"version": True}, "not a checkpoint of this version"),
        ({"kind": torch.zeros(2), "method": None}, "method is no dict"),
    ):
        torch.save({**whole, **change}, path)
        with pytest.raises(FastSSLError, match=words) as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value) and "--resume" not in str(error.value)
    for missing in ("method", "position", "config"):
        torch.save({name: value for name, value in whole.items() if name != missing}, path)
        with pytest.raises(FastSSLError, match=rf"is not a whole checkpoint of a run \(no {missing}\); start anew"):
            load_checkpoint(path, advice="start anew")
    for odd in ({**whole, "optimizer": 5}, {**whole, "method": {**whole["method"], "student.backbone.conv_stem.weight": 5}}):
        with pytest.raises(FastSSLError, match="does not fit this run"):
            restore(odd, method=method, optimizer=optimizer)


def test_a_detectors_state_is_told_from_a_runs(tmp_path: Path) -> None:
    for state in ({"version": 1, "config": {}, "detector": {}}, {"version": 1, "config": {"a": 1}, "kind": "detector", "iteration": 2}):
        torch.save(state, tmp_path / "detect.pt")
        assert load_checkpoint(tmp_path / "detect.pt") == state and is_detector(state)
    torch.save({"version": 1, "kind": "detector"}, tmp_path / "detect.pt")
    with pytest.raises(FastSSLError, match=r"is not a whole checkpoint of a detector \(no config\)"):
        load_checkpoint(tmp_path / "detect.pt")
    assert not is_detector({"version": 1, "method": {}, "detector": {}}) and not is_detector({"version": 1, "kind": "run", "detector": {}})


def test_differences_are_named() -> None:
    found = differences({"a": 1, "b": {"c": 2}, "e": 5}, {"a": 1, "b": {"c": 3}, "d": 4, "e": 5})
    assert found == ["b.c: 3 there, 2 here", "d: 4 there, None here"]
    assert differences({"moco": {"queue": 64}}, {"dino": {"out": 4}}) == ["dino: only there", "moco: only here"]
