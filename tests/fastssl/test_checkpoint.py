"""Checkpoints: whole or absent, strict, and nothing in them is executed."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.config.resolved import differences
from fastssl.errors import FastSSLError
from fastssl.losses.pairs import PairWeights
from fastssl.methods.base import Views
from fastssl.methods.moco import MoCo, MoCoConfig
from fastssl.models.backbones import create_backbone, load_backbone
from fastssl.models.heads import ProjectorConfig
from fastssl.optim.optimizers import OptimConfig, create_optimizer
from fastssl.runs.checkpoint import (
    DamagedCheckpoint,
    NotSaved,
    Position,
    find_checkpoint,
    is_detector,
    load_checkpoint,
    load_optimizer,
    restore,
    save_checkpoint,
    set_aside,
    write_state,
)


def make(seed: int = 0) -> tuple[MoCo, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    config = MoCoConfig(queue=16, neighbors=5, split_bn=1, projector=ProjectorConfig(hidden=8, out=4))
    method = MoCo(create_backbone("mobilenetv3_small_050"), config, views=Views(4, PairWeights(0, 1.0, 0.0)))
    return method, create_optimizer(method, OptimConfig(lr=0.1))


def step(method: MoCo, optimizer: torch.optim.Optimizer, seed: int) -> None:
    views = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    keys = method.targets([views], {"permutation": torch.arange(8)}, {})
    method([views], keys, {"smoothing": 0.2}).loss.backward()
    method.after_step(keys, [], {})
    optimizer.step()
    optimizer.zero_grad()
    method.update_teacher(0.9)


def test_a_restored_run_makes_the_very_same_step(tmp_path: Path) -> None:
    method, optimizer = make()
    for seed in range(3):
        step(method, optimizer, seed)
    position = Position(step=3, epoch=1, step_in_epoch=2, train_seconds=1.5)
    save_checkpoint(
        tmp_path, method=method, optimizer=optimizer, position=position, config={"a": 1}, arch="mobilenetv3_small_050"
    )
    other, other_optimizer = make(seed=9)
    state = load_checkpoint(tmp_path / "last.pt")
    assert restore(state, method=other, optimizer=other_optimizer) == position and state["config"] == {"a": 1}
    step(method, optimizer, 7)
    step(other, other_optimizer, 7)
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "last-teacher.safetensors",
        "last.pt",
        "last.safetensors",
        "step-00000003.pt",
    ]


def test_student_and_teacher_are_both_kept(tmp_path: Path) -> None:
    method, optimizer = make()
    step(method, optimizer, 0)
    save_checkpoint(
        tmp_path, method=method, optimizer=optimizer, position=Position(), config={}, arch="mobilenetv3_small_050"
    )
    for name, network in (("last", method.student), ("last-teacher", method.teacher)):
        loaded = load_backbone(tmp_path / f"{name}.safetensors").state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in network.backbone.state_dict().items())
    assert not torch.equal(method.student.backbone.conv_stem.weight, method.teacher.backbone.conv_stem.weight)


def test_damaged_and_foreign_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(FastSSLError, match="no such checkpoint"):
        load_checkpoint(path)
    method, optimizer = make()
    save_checkpoint(
        tmp_path, method=method, optimizer=optimizer, position=Position(), config={}, arch="mobilenetv3_small_050"
    )
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
    place = {"method": method, "optimizer": optimizer, "config": {}, "arch": "lcnet_035"}
    save_checkpoint(tmp_path, position=Position(3, 1, 2, 0.5), **place)
    whole = load_checkpoint(path)
    for missing in ("method", "position", "config"):
        write_state(path, {name: value for name, value in whole.items() if name != missing})
        with pytest.raises(FastSSLError, match=rf"is not a whole checkpoint of a run \(no {missing}\); start over"):
            load_checkpoint(path, advice="start over")
    torch.save(whole, path)
    with pytest.raises(DamagedCheckpoint, match="its digest is missing"):
        load_checkpoint(path)
    torch.save([whole], path)
    with pytest.raises(DamagedCheckpoint, match=r"or no last\.pt at all"):
        load_checkpoint(path)


def test_what_does_not_fit_the_run_is_one_line(tmp_path: Path) -> None:
    method, optimizer = make()
    step(method, optimizer, 0)
    whole = {"method": method.state_dict(), "optimizer": optimizer.state_dict(), "position": vars(Position())}
    stem = "student.backbone.conv_stem.weight"
    for change, words in (
        ({"optimizer": None}, "TypeError"),
        ({"method": {**whole["method"], stem: whole["method"][stem][:1]}}, rf"size mismatch for {stem}"),
        ({"method": {name: value for name, value in whole["method"].items() if name != stem}}, rf"Missing key.*{stem}"),
        ({"method": {**whole["method"], "more": torch.zeros(1)}}, 'Unexpected key.*"more"'),
        ({"position": {"steps": 1}}, "unexpected keyword argument 'steps'"),
    ):
        with pytest.raises(FastSSLError, match=rf"does not fit this run .*{words}.*never starts over") as error:
            restore({**whole, **change}, method=method, optimizer=optimizer)
        assert "\n" not in str(error.value)


def test_settings_of_the_optimiser_are_the_runs() -> None:
    """What the file says of them makes no other step; momentum keeps its bits and its layout."""
    method, optimizer = make()
    step(method, optimizer, 0)
    found = copy.deepcopy(optimizer.state_dict())
    for group in found["param_groups"]:
        group.update(weight_decay=1e9, maximize=True, momentum="much", lr=[], params="none")
    other, mine = make(seed=9)
    load_optimizer(mine, found)
    assert [group["momentum"] for group in mine.param_groups] == [0.9] * len(mine.param_groups)
    for one, two in zip(method.parameters(), other.parameters()):
        if one.requires_grad:
            ours, theirs = mine.state[two]["momentum_buffer"], optimizer.state[one]["momentum_buffer"]
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


def test_a_detectors_state_is_told_from_a_runs(tmp_path: Path) -> None:
    for state in (
        {"version": 1, "config": {}, "detector": {}},
        {"version": 1, "config": {"a": 1}, "kind": "detector", "iteration": 2},
    ):
        torch.save(state, tmp_path / "detect.pt")
        assert load_checkpoint(tmp_path / "detect.pt") == state and is_detector(state)
    torch.save({"version": 1, "kind": "detector"}, tmp_path / "detect.pt")
    with pytest.raises(FastSSLError, match=r"is not a whole checkpoint of a detector \(no config\)"):
        load_checkpoint(tmp_path / "detect.pt")
    assert not is_detector({"version": 1, "method": {}, "detector": {}}) and not is_detector(
        {"version": 1, "kind": "run", "detector": {}}
    )


def test_differences_are_named() -> None:
    found = differences({"a": 1, "b": {"c": 2}, "e": 5}, {"a": 1, "b": {"c": 3}, "d": 4, "e": 5})
    assert found == ["b.c: 3 there, 2 here", "d: 4 there, None here"]
    views = [{"size": 32, "ratio": [0.75, 1.3], "std": [1, 1, 1]}]
    assert differences({"views": views}, {"views": [{**views[0], "std": [2, 2, 2]}]}) == [
        "views.0.std: [2, 2, 2] there, [1, 1, 1] here"
    ]
    assert differences({"views": views}, {"views": {"size": 3}}) == [
        "views.0: only here",
        "views.size: 3 there, None here",
    ]
    assert differences({"moco": {"queue": 64}}, {"dino": {"out": 4}}) == ["dino: only there", "moco: only here"]


# ------------------------------------------------------------------ what is kept, and what is read


@pytest.fixture(scope="module")
def run() -> tuple[MoCo, torch.optim.Optimizer]:
    method, optimizer = make()
    step(method, optimizer, 0)
    return method, optimizer


@pytest.fixture
def save(run: tuple[MoCo, torch.optim.Optimizer], tmp_path: Path) -> Callable[..., None]:
    """``save(step, ...)`` into ``tmp_path``."""

    def at(step: int, **options: object) -> None:
        place = {"method": run[0], "optimizer": run[1], "config": {}, "arch": "mobilenetv3_small_050"}
        save_checkpoint(tmp_path, position=Position(step=step), **place, **options)

    return at


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pt"))


def flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def test_the_newest_are_kept_and_last_is_one_of_them(save: Callable, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(number, keep=2)
    assert names(tmp_path) == ["last.pt", "step-00000002.pt", "step-00000003.pt"]
    assert (tmp_path / "last.pt").samefile(tmp_path / "step-00000003.pt"), "not stored twice"
    save(3, keep=2)  # the same step once more
    assert (
        names(tmp_path) == ["last.pt", "step-00000002.pt", "step-00000003.pt"]
        and load_checkpoint(tmp_path / "last.pt")["position"]["step"] == 3
    )
    save(4, keep=1)
    assert names(tmp_path) == ["last.pt", "step-00000004.pt"] and not list(tmp_path.glob("*.tmp"))


def test_milestones_stay(save: Callable, tmp_path: Path) -> None:
    save(10, keep=1, milestone=5)
    save(20, keep=1)
    assert names(tmp_path) == ["epoch-0005.pt", "last.pt", "step-00000020.pt"]
    assert load_checkpoint(tmp_path / "epoch-0005.pt")["position"]["step"] == 10
    assert load_backbone(tmp_path / "epoch-0005.safetensors") and load_backbone(
        tmp_path / "epoch-0005-teacher.safetensors"
    )


def test_checkpoints_of_later_steps_are_set_aside(save: Callable, tmp_path: Path) -> None:
    for number in (10, 20, 30):
        save(number, keep=3)
    said: list[str] = []
    set_aside(tmp_path, 30, say=said.append)
    assert len(names(tmp_path)) == 4 and said == []
    set_aside(tmp_path, 10, say=said.append)
    (line,) = said
    assert (
        line.startswith(f"{tmp_path / 'step-00000030.pt.aside'}: set aside, as the run goes on from step 10")
        and "it may be deleted" in line
    )
    assert "(1 older than it, and also behind that step, were deleted)" in line
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000010.pt", "step-00000030.pt.aside"]
    save(15, keep=2)
    assert names(tmp_path) == ["last.pt", "step-00000010.pt", "step-00000015.pt"]
    set_aside(tmp_path, 12, say=said.append)
    assert len(said) == 2 and "were deleted" not in said[1]
    assert [path.name for path in tmp_path.glob("*.aside")] == ["step-00000015.pt.aside"], "the newest one alone"


def test_where_files_have_one_name_last_is_a_copy(
    save: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    save(1)
    assert (tmp_path / "last.pt").read_bytes() == (tmp_path / "step-00000001.pt").read_bytes()
    assert not (tmp_path / "last.pt").samefile(tmp_path / "step-00000001.pt")


@pytest.mark.slow
def test_any_flipped_bit_is_noticed_or_means_nothing(save: Callable, tmp_path: Path) -> None:
    """torch itself would load most of these without a word."""
    save(1)
    path = tmp_path / "step-00000001.pt"
    whole, size = load_checkpoint(path), path.stat().st_size
    rng = np.random.default_rng(0)
    silent = noticed = 0
    for at, bit in zip(rng.integers(0, size, 150).tolist(), rng.integers(0, 8, 150).tolist()):
        flip(path, at, bit)
        try:
            found = load_checkpoint(path)
            same = all(torch.equal(found["method"][name], value) for name, value in whole["method"].items())
            assert (
                same and found["position"] == whole["position"] and str(found["optimizer"]) == str(whole["optimizer"])
            )
            silent += 1  # padding, or a date of the archive
        except DamagedCheckpoint as error:
            assert "\n" not in str(error)
            noticed += 1
        flip(path, at, bit)
    assert noticed > 100 and load_checkpoint(path)["position"] == whole["position"]
    print(f"{noticed} noticed, {silent} without effect")


def test_resume_passes_over_what_is_damaged_and_says_so(save: Callable, tmp_path: Path) -> None:
    said: list[str] = []
    assert find_checkpoint(tmp_path, say=said.append) is None
    for number in (10, 20, 30):
        save(number, keep=3)
    assert find_checkpoint(tmp_path, say=said.append)[1]["position"]["step"] == 30 and said == []
    size = (tmp_path / "last.pt").stat().st_size
    flip(tmp_path / "last.pt", size // 2)  # step-00000030.pt is the same file: it is not tried twice
    path, state = find_checkpoint(tmp_path, say=said.append)
    assert path.name == "step-00000020.pt" and state["position"]["step"] == 20
    assert len(said) == 1 and said[0].startswith(f"passed over: {tmp_path / 'last.pt'}: damaged checkpoint")
    (tmp_path / "last.pt").unlink()  # killed between the file and its second name
    assert find_checkpoint(tmp_path)[0].name == "step-00000020.pt"
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(
        FastSSLError, match=r"damaged checkpoint.*no other to go on from; start over with --resume never"
    ):
        find_checkpoint(tmp_path)


def test_a_checkpoint_of_another_version_is_not_passed_over(save: Callable, tmp_path: Path) -> None:
    """It is whole: going back to an older one would throw away what was learned since."""
    save(10)
    write_state(tmp_path / "last.pt", {"version": 3, "method": {}, "position": {}, "config": {}})
    with pytest.raises(FastSSLError, match="not a checkpoint of this version"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("CUDA error: an illegal memory access\nCompile with"), "an illegal memory access Compile with"),
    ],
)
def test_a_gpu_that_fails_is_no_disk_that_is_full(
    error: RuntimeError, says: str, save: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(3)

    def broken(*args: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(FastSSLError, match=f"the GPU failed .*{says}") as found:
        save(4)
    assert not isinstance(found.value, NotSaved), "the run would go on"
    error.args = ("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0",)
    if type(error) is RuntimeError:
        with pytest.raises(NotSaved, match="unexpected pos"):
            save(4)
    assert names(tmp_path) == ["last.pt", "step-00000003.pt"]


def test_a_full_disk_takes_the_oldest_never_the_newest(
    save: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 3):
        save(number, keep=3)
    original = torch.save

    def full(state: dict, path: Path) -> None:
        if len(list(tmp_path.glob("step-*.pt"))) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(state, path)

    monkeypatch.setattr(torch, "save", full)
    save(4, keep=3)
    assert names(tmp_path) == ["last.pt", "step-00000003.pt", "step-00000004.pt"]

    def fuller(state: dict, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fuller)
    with pytest.raises(NotSaved, match=r"the disk is full.*the one before it is untouched"):
        save(5, keep=3)
    assert names(tmp_path) == ["last.pt", "step-00000004.pt"] and not list(tmp_path.glob("*.tmp"))
    assert find_checkpoint(tmp_path)[1]["position"]["step"] == 4
