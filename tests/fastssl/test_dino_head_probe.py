"""The part of a DINO run's head that is kept: its tensors, and what is no such run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import finished_run
from torch import nn

from fastssl.errors import FastSSLError
from fastssl.evaluate.classifier import load_half_head, run_file
from fastssl.runs.checkpoint import load_checkpoint, write_state


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("dino"), "dino-mobilenetv2-sslight")


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_the_layers_are_those_of_the_run(run: Path, which: str) -> None:
    head, width = load_half_head(run_file(run), which)
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.GELU] * 2 and width == 16
    stored = {
        name: value
        for name, value in load_checkpoint(run_file(run))["method"].items()
        if name.startswith(f"{which}.projector.mlp.")
    }
    kept = {f"{which}.projector.mlp.{name}": value for name, value in head.state_dict().items()}
    # What is left out is the third linear layer.
    assert set(stored) - set(kept) == {f"{which}.projector.mlp.6.weight", f"{which}.projector.mlp.6.bias"}
    assert all(torch.equal(value, stored[name]) for name, value in kept.items())
    assert kept[f"{which}.projector.mlp.1.running_mean"].abs().max() > 0, "a run that never trained proves nothing"


def test_student_and_teacher_differ(run: Path) -> None:
    student, teacher = (load_half_head(run_file(run), which)[0] for which in ("student", "teacher"))
    assert not torch.equal(student[0].weight, teacher[0].weight)


def test_fresh_layers_have_the_shape_and_not_the_weights(run: Path) -> None:
    torch.manual_seed(1)
    fresh, width = load_half_head(run_file(run), "student", fresh=True)
    head, _ = load_half_head(run_file(run), "student")
    assert width == 16 and {n: v.shape for n, v in fresh.state_dict().items()} == {
        n: v.shape for n, v in head.state_dict().items()
    }
    assert not torch.equal(fresh[0].weight, head[0].weight)
    assert fresh[0].weight.std().item() == pytest.approx(0.02, rel=0.1)  # truncated normal, as the run began


def test_the_run_is_found_by_folder_or_file(run: Path) -> None:
    last = run / "checkpoints" / "last.pt"
    assert run_file(run) == run_file(run / "checkpoints") == run_file(last) == last
    with pytest.raises(FastSSLError, match=r"last\.safetensors: holds a backbone alone"):
        run_file(run / "checkpoints" / "last.safetensors")
    with pytest.raises(FastSSLError, match=r"last\.pt: no such file"):
        run_file(run / "nothing" / "last.pt")


def test_other_runs_have_none(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "few-photos-moco", arch="resnet10t")
    with pytest.raises(FastSSLError, match=r"a run of moco has no DINO head; --head linear"):
        load_half_head(run_file(run))


def test_a_head_of_one_layer_leaves_nothing(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "dino-mobilenetv2-sslight", {"dino.projector.layers": "1"}, steps=0)
    with pytest.raises(FastSSLError, match="one linear layer"):
        load_half_head(run_file(run))


def test_a_head_without_batchnorm(tmp_path: Path) -> None:
    """As of a vision transformer's recipe."""
    run = finished_run(tmp_path, "dino-mobilenetv2-sslight", {"dino.projector.norm": "false"}, steps=0)
    assert [type(layer) for layer in load_half_head(run_file(run))[0]] == [nn.Linear, nn.GELU] * 2


@pytest.mark.parametrize(("key", "value"), [("hidden", 24), ("layers", 5)])
def test_tensors_that_do_not_fit(key: str, value: int, run: Path, tmp_path: Path) -> None:
    state = load_checkpoint(run_file(run))
    state["config"]["dino"]["projector"][key] = value
    write_state(tmp_path / "last.pt", state)
    with pytest.raises(FastSSLError, match=r"last.pt: the student's head does not fit: .*mlp\.\d\.weight") as error:
        load_half_head(tmp_path / "last.pt")
    assert "\n" not in str(error.value)
