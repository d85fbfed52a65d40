"""Memory that a run needs and that a machine has, in bytes."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import psutil
import torch
from torch import Tensor

from fastssl.benchmarks.harness.photos import mean_pixels
from fastssl.benchmarks.suites.step import Step
from fastssl.config.recipe import Recipe
from fastssl.distributed.devices import use_amp
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.utils.transfer import pinned_bytes

#: Batches that the loader keeps ready (the native engine's ring), and float batches that are alive at once: the step's
#: and the next.
_RING, _FLOAT_BATCHES = 5, 2


def tensor_bytes(value: object) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def state_bytes(step: Step) -> tuple[int, int]:
    """(bytes of both networks, queue and optimiser, bytes of the backbone alone)."""
    method = step.method
    whole = tensor_bytes(method.state_dict()) + tensor_bytes(step.optimizer.state_dict()["state"])
    return whole, tensor_bytes(method.student.backbone.state_dict())


def half_bytes(step: Step) -> int:
    """Bytes of the bfloat16 weights that compute beside the float32 ones."""
    return sum(
        tensor_bytes([p for p in half.network.parameters() if p.dtype == torch.bfloat16])
        for half in step.inner.bf16_weights
    )


def image_bytes(recipe: Recipe, device: torch.device, size: int | None = None) -> int:
    """Bytes of one pair's views as the network reads them, or with ``size`` bytes a number."""
    size = size or (2 if use_amp(recipe.train.amp, device) else 4)
    return sum(spec.count * 3 * spec.size**2 for spec in recipe.views) * size


def loader_bytes(recipe: Recipe, reader: BetonReader, device: torch.device) -> tuple[int, int]:
    """(bytes a pair of the views on the device, bytes a pair of the host's ring), as the native engine works."""
    if device.type == "cuda":  # the decoded pictures wait in pinned memory, of batches up to a tenth above the mean
        batch = recipe.train.batch_size
        ring = _RING * pinned_bytes(1.1 * 3 * mean_pixels(reader) * batch)
        return _FLOAT_BATCHES * image_bytes(recipe, device), -(-ring // batch)
    return _FLOAT_BATCHES * image_bytes(recipe, device, 4), _RING * image_bytes(recipe, device, 1)


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """(bytes that a run could take now, bytes there are) of the GPU, or of the computer within a container's limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    return _within_group(memory.available, memory.total, Path("/sys/fs/cgroup"))


def _within_group(free: int, total: int, group: Path) -> tuple[int, int]:
    """(available, total) bytes, within the limit of a control group where there is one."""
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free, total  # no control group, or one without a limit ("max")
    # Cached files count as used, and go when somebody needs the room.
    cached = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
    return min(free, limit - used + cached), min(total, limit)


def resident_bytes(key: str) -> int | None:
    """Of this process, from Linux: ``VmRSS`` (now), ``VmHWM`` (the most since ``forget_peak``); else None."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(lines[key].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def forget_peak() -> None:
    """Give freed memory back to the system and let ``VmHWM`` begin again, where the system allows that."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        pass  # no glibc, or a sandbox: the peak may then be one of before, and `step_overhead` has a bound


def step_overhead(grown: int, expected: int, step: int) -> float:
    """How many times as much as its tensors a step takes from the system on a CPU (gaps in the heap, buffers of the
    convolution library), 1 to 3: beyond that the growth has other reasons. The process grew by ``grown`` bytes until
    the peak of its first steps, networks included; its tensors came with ``expected`` bytes, ``step`` of them the
    step's own.

    glibc keeps what is freed in pieces below 32 MiB: MobileNet-V3-Large at 224 px took 1.4 times its tensors, and 1.1
    times with MALLOC_MMAP_THRESHOLD_=1048576.
    """
    return min(3.0, max(1.0, 1 + (grown - expected) / max(step, 1)))
