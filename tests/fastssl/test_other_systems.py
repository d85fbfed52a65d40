"""Systems that nobody has here: an Apple GPU, and Windows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastssl
from fastssl.config.recipe import load_recipe
from fastssl.distributed.devices import choose_device, use_amp
from fastssl.distributed.world import World
from fastssl.errors import is_out_of_memory, require_posix
from fastssl.optim.schedules import RunLength
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.training.step import TrainStep

MPS = torch.device("mps")
HIDDEN = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None; "


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


def test_an_apple_gpu_has_to_be_asked_for(mac: None) -> None:
    assert choose_device("auto").type == "cpu" and choose_device("mps") == MPS
    assert [use_amp(amp, MPS) for amp in ("auto", "bf16", "off")] == [False] * 3
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 8.87 GB, ...)"))


def test_without_one_it_is_said() -> None:
    for name, words in (("mps", "torch sees no Apple GPU here"), ("npu", "there are auto, cpu, cuda and mps")):
        with pytest.raises(fastssl.FastSSLError, match=words):
            choose_device(name, World())


def test_the_cpu_makes_its_views(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []
    real = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if args and args[0] == MPS:
            moved.append(tensor.device)
            return tensor
        return real(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", to)
    spec = ViewSpec(size=16, count=2)
    with ViewLoader(beton, [spec], 8, MPS) as loader, ViewLoader(beton, [spec], 8, "cpu") as other:
        assert loader.device == MPS and loader.engine.device.type == "cpu"
        assert torch.equal(next(loader.epoch(0)).views[0], next(other.epoch(0)).views[0])
    assert moved == [torch.device("cpu")]


class Float64(TorchDispatchMode):
    """Notes operations that give float64, which Apple's GPUs do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(one, torch.Tensor) and one.dtype == torch.float64 for one in tree_leaves(result)):
            self.found.add(str(func))
        return result


SMALL = {
    "few-photos": {"simclr.projector.hidden": 16, "simclr.projector.out": 8, "views.0.size": 32},
    "few-photos-moco": {"moco.projector.hidden": 16, "moco.projector.out": 8, "moco.queue": 64, "views.0.size": 32},
    "dino-mobilenetv2-sslight": {"dino.out": 32, "views.global_size": 32, "views.local_size": 16},
    "swav-mobilenetv2-sslight": {
        "swav.prototypes": 16,
        "swav.queue": 0,
        "views.global_size": 32,
        "views.local_size": 16,
    },
}


@pytest.mark.parametrize("name", SMALL)
def test_a_step_needs_no_float64(name: str) -> None:
    recipe = load_recipe(name, {**SMALL[name], "arch": "lcnet_035", "train.batch_size": 8})
    step = TrainStep(recipe, torch.device("cpu"), amp=False, seed=0)
    views = [torch.randn(v.count * 8, 3, v.size, v.size).to(memory_format=torch.channels_last) for v in recipe.views]
    with Float64() as seen:
        for number in range(2):
            noise = step.noise(0, number)
            step(views, noise, step.rates(number, RunLength(10, 5)))
    tensors = {**noise, **step.tensors()}
    assert not seen.found and not [name for name, one in tensors.items() if one.dtype == torch.float64]


def test_what_an_apple_gpu_does_without_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **options: self)
    changes = {"arch": "lcnet_035", "train.batch_size": 8, **SMALL["few-photos"]}
    for more, told in (
        ({}, set()),
        ({"train.amp": "bf16", "train.compile": "true", "train.graph": "true"}, {"bfloat16", "compile", "graph"}),
    ):
        step = TrainStep(load_recipe("few-photos", {**changes, **more}), MPS, amp=False, seed=0)
        assert set(step.fallbacks) == told and not step.takes_crops
        assert "on" not in step.switches.values()


def lines(code: str) -> Iterator[str]:
    done = subprocess.run([sys.executable, "-c", HIDDEN + code], capture_output=True, text=True)
    yield str(done.returncode)
    yield from done.stderr.splitlines()


def test_windows_is_told_at_once() -> None:
    require_posix()
    status, said = lines("from fastssl.cli import main; main(['pretrain', '--help'])")
    assert status == "1" and said.startswith("fastssl: fastssl trains on Linux and macOS") and "WSL 2" in said
    code = "import fastssl\nfor name in ('pretrain', 'evaluate'):\n try: getattr(fastssl, name)('x')\n"
    (status,) = lines(code + " except fastssl.FastSSLError as error: assert 'WSL 2' in str(error)\n else: sys.exit(3)")
    assert status == "0"


def test_windows_may_use_what_was_trained(tmp_path: Path) -> None:
    from fastssl.models.backbones import create_backbone, save_backbone

    save_backbone(create_backbone("lcnet_035"), tmp_path / "net.safetensors", arch="lcnet_035")
    code = f"import fastssl; place = {str(tmp_path / 'net.safetensors')!r}; fastssl.load_backbone(place); "
    status, *said = lines(code + "fastssl.transform(place)(__import__('numpy').zeros((9, 9, 3), 'uint8'))")
    assert status == "0", said
