"""The device of this process, and how strictly it computes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fastssl.distributed.world import World
from fastssl.errors import FastSSLError


def choose_device(name: str, world: World = World(), environ: Mapping[str, str] = os.environ) -> torch.device:  # noqa: B008 (frozen)
    """``auto`` is the NVIDIA GPU when there is one; of several processes on a machine each has its own. An Apple GPU
    (``mps``) has to be asked for: nobody has tried it yet.

    srun with ``--gpus-per-task`` or ``--gpu-bind`` shows each process no other GPU than its own, which is then number
    0. (Where several are shown the same one, NCCL refuses it.)

    Raises:
        FastSSLError: a GPU was asked for and torch sees none, or there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise FastSSLError(f"device {name!r}: there are auto, cpu, cuda and mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise FastSSLError("--device mps: torch sees no Apple GPU here; --device cpu works anywhere")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise FastSSLError(
            "--device cuda: torch sees no NVIDIA GPU here; `fastssl doctor` says what is missing, --device cpu "
            "works anywhere"
        )
    if name != "cuda" or world.size == 1:
        return torch.device(name)
    count, started_by_srun = torch.cuda.device_count(), "SLURM_LOCALID" in environ and "LOCAL_RANK" not in environ
    index = 0 if count == 1 and started_by_srun else world.local_rank
    if index >= count:
        raise FastSSLError(
            f"process {world.local_rank} of this machine has no GPU: there are {count}; start as many processes"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def only_deterministic() -> Iterator[None]:
    """Let torch take only algorithms that give the same bits at every call, and fail where there is none."""
    # Read by cuBLAS when it starts: with workspaces of its own choice the same product may differ from call to call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        # Of cuBLAS torch says only behind 300 characters what to do.
        raise FastSSLError(f"train.deterministic: {' '.join(str(error).split())[:500]}") from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic = before[1]


def use_amp(amp: str, device: torch.device) -> bool:
    """Whether to compute in bfloat16: ``auto`` does on a GPU, not on a CPU, where float32 is often faster. Apple's GPUs
    compute in float32.
    """
    return device.type != "mps" and (amp == "bf16" or (amp == "auto" and device.type == "cuda"))
