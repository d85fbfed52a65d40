"""What a result was measured with. No paths, no host or user names: results are passed on."""

from __future__ import annotations

import platform
import re
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import psutil
import torch

from fastssl._version import __version__
from fastssl.utils.cores import available_cores

_PACKAGES: tuple[str, ...] = ("torch", "torchvision", "timm", "numpy", "numba", "simplejpeg", "pillow")
_PACKAGES += ("ffcv", "nvidia-dali-cuda130", "torchcodec")


def describe_versions() -> dict[str, str]:
    """Versions of Python, of fastssl and of the packages that matter, those that are installed."""
    found = {"python": platform.python_version(), "fastssl": __version__}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def describe_host() -> dict[str, str | int]:
    """Processor, cores that this process may use, memory, GPU."""
    try:
        cpu, *_ = re.findall(r"^model name\s*:\s*(.*?)\s*$", Path("/proc/cpuinfo").read_text(), re.M)
    except (OSError, ValueError):
        cpu = platform.processor() or platform.machine()
    host: dict[str, str | int] = {"cpu": cpu, "cores": available_cores(), "system": platform.system()}
    host["memory_gib"] = round(psutil.virtual_memory().total / 2**30)
    if torch.cuda.is_available():
        host["gpu"] = torch.cuda.get_device_name()
        host["gpus"] = torch.cuda.device_count()
    return host


def describe_git() -> str | None:
    """Commit of the running code, ``-dirty`` if files differ from it; None when it does not come from a checkout."""
    here = Path(__file__).resolve()
    # A copy in site-packages may lie in somebody else's checkout: only a file that git tracks speaks for its commit.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None
