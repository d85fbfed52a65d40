"""Which device a process takes, and that strictness is taken back."""

from __future__ import annotations

import pytest
import torch

from fastssl.distributed.devices import choose_device, only_deterministic
from fastssl.distributed.world import World
from fastssl.errors import FastSSLError


def test_cuda_is_refused_where_there_is_none() -> None:
    if torch.cuda.is_available():
        assert choose_device("auto").type == "cuda"
    else:
        assert choose_device("auto").type == "cpu"
        with pytest.raises(FastSSLError, match="no NVIDIA GPU"):
            choose_device("cuda")


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert choose_device("auto", World()) == torch.device("cuda")
    assert choose_device("auto", World(5, 8, 1)) == torch.device("cuda", 1) and taken == [1]
    assert choose_device("cpu", World(5, 8, 1)) == torch.device("cpu")
    with pytest.raises(FastSSLError, match="process 2 of this machine has no GPU: there are 2"):
        choose_device("auto", World(2, 8, 2))


def test_a_process_of_srun_that_is_shown_one_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--gpus-per-task=1``: eight processes of a machine, each with a GPU 0 of its own."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert choose_device("auto", World(5, 8, 5), {"SLURM_LOCALID": "5"}) == torch.device("cuda", 0) and taken == [0]
    with pytest.raises(FastSSLError, match="process 5 of this machine has no GPU: there are 1"):
        choose_device(
            "auto", World(5, 8, 5), {"SLURM_LOCALID": "0", "LOCAL_RANK": "5"}
        )  # torchrun, itself started by srun


def test_what_to_do_about_cublas_is_said_to_the_end() -> None:
    words = (
        "Deterministic behavior was enabled, but this operation is not deterministic because it uses CuBLAS. "
        + "x" * 250
    )
    with pytest.raises(FastSSLError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"), only_deterministic():
        raise RuntimeError(f"{words} CUBLAS_WORKSPACE_CONFIG=:4096:8")


def test_strictness_is_taken_back_also_behind_an_error() -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    with pytest.raises(FastSSLError, match=r"train\.deterministic: some_op does not have"), only_deterministic():
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        raise RuntimeError("some_op does not have a deterministic implementation")
    with pytest.raises(RuntimeError, match="of another kind"), only_deterministic():
        raise RuntimeError("of another kind")
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic) == before
