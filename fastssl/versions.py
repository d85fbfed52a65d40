"""What a result was measured with. No paths, no host or user names: results are passed on."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from fastssl._version import __version__

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "numba", "simplejpeg", "pillow", "ffcv", "nvidia-dali-cuda130")


def describe_versions() -> dict[str, str]:
    """Versions of Python, of fastssl and of the packages that matter, those that are installed."""
    found = {"python": platform.python_version(), "fastssl": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def describe_host() -> dict[str, str | int]:
    """Processor, cores that this process may use, memory, GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    host: dict[str, str | int] = {"cpu": _cpu_model(), "cores": cores, "system": platform.system()}
    if hasattr(os, "sysconf"):
        host["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    if torch.cuda.is_available():
        host["gpu"] = torch.cuda.get_device_name()
        host["gpus"] = torch.cuda.device_count()
    return host


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
