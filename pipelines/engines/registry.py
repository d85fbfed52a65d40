"""The engines by name: which can run here, what is missing for the others, and which ``auto`` takes."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastssl.errors import FastSSLError, counted
from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import Engine, EngineSettings
from fastssl.pipelines.engines.native import NativeEngine
from fastssl.pipelines.plan.draw import ViewSpec

#: DALI's mean difference to the other engines grows as views shrink: 0.2 grey levels at 32 px, 0.4 at 16, 1.0 at 8.
_DALI_SMALLEST = 16

#: The module and the distribution that each stands on, and what to type.
_NEEDS = {
    "dali": ("nvidia.dali", "nvidia-dali-cuda"),
    "ffcv": ("ffcv", "ffcv"),
    "torchcodec": ("torchcodec.decoders", "torchcodec"),
}
_HOW = {
    "dali": "pip install -e '.[dali]' where fastssl was checked out",
    "torchcodec": "pip install -e '.[torchcodec]' where fastssl was checked out",
    "ffcv": "apt-get install libopencv-dev libturbojpeg0-dev pkg-config g++ make, then pip install -e '.[ffcv]' where "
    "fastssl was checked out",
}


@dataclass(frozen=True)
class EngineState:
    """Whether an engine can run here: ``version`` of what it stands on, None where that is missing; the ``problem`` why
    it cannot run, None if it can; the ``remedy``, what to type about that.
    """

    name: str
    version: str | None
    problem: str | None = None
    remedy: str | None = None


def engine_state(name: str) -> EngineState:
    """Try the engine's imports, which takes some hundred milliseconds each."""
    if name == "native":
        return EngineState(name, f"simplejpeg {importlib.metadata.version('simplejpeg')}")
    package, version = _NEEDS[name][0], _version(_NEEDS[name][1])
    try:
        importlib.import_module(package)
    except Exception as error:  # whatever a half-installed extension module raises
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        missing = isinstance(error, ModuleNotFoundError) and f"{package}.".startswith(f"{error.name}.")
        problem = "not installed" if missing else f"installed, but does not load ({said})"
        return EngineState(name, version, problem, _HOW[name])
    return EngineState(name, version)


def _version(start: str) -> str | None:
    """Name and version of the first installed distribution whose name begins so."""
    for distribution in importlib.metadata.distributions():
        found = distribution.metadata["Name"]
        if found and found.startswith(start) and "nightly" not in found:
            return f"{found} {distribution.version}"
    return None


def choose_engine(device: torch.device) -> tuple[str, str]:
    """What ``auto`` stands for on ``device``, and why: (name, reason)."""
    if device.type == "cuda":
        others = "measure the others with `fastssl bench loader --pipeline dali`"
        return "native", f"decodes on the host's cores and crops on the GPU; {others}"
    return "native", "the fastest on a CPU, and it needs no further package (benchmarks/results/)"


def jpeg_hardware() -> str:
    """Whether the GPU has a unit of its own for JPEGs, in words."""
    if not torch.cuda.is_available():
        return "no GPU"
    capability = torch.cuda.get_device_capability()
    known = {(8, 0): "A100 class", (9, 0): "Hopper", (10, 0): "Blackwell data centre"}
    if capability in known:
        return f"{known[capability]}: hardware JPEG decoder, which the dali engine uses"
    return f"compute capability {capability[0]}.{capability[1]}: none known; the dali engine decodes with CUDA kernels"


def require_engine(name: str, reader: BetonReader, specs: Sequence[ViewSpec]) -> None:
    """``FastSSLError`` where `open_engine` will not take this engine, file and views: it is not installed (the message
    says what to type), or does not take them. Nothing is opened.
    """
    if name in ("auto", "native"):
        return
    state = engine_state(name)
    if state.problem:
        raise FastSSLError(f"--pipeline {name}: {state.problem}; {state.remedy}")
    if name == "ffcv" and (files := len(reader.files)) > 1:
        maps = f"FFCV maps one file, and these are {files:,}"
        raise FastSSLError(f"--pipeline ffcv: {reader.path}: {maps}; use --pipeline native")
    if name != "ffcv" and (raw := int((reader.take("modes", reader.some()) == MODE_RAW).sum())):
        stored = f"{counted(raw, 'picture')} of it stored raw"
        raise FastSSLError(f"{reader.path}: {stored}, which {name} cannot decode; use --pipeline native")
    if name == "dali" and (smallest := min(spec.size for spec in specs)) < _DALI_SMALLEST:
        raise FastSSLError(
            f"--pipeline dali: views of {smallest} px are below {_DALI_SMALLEST}; DALI's resize repeats the pixels at "
            "the border of a crop, which at such sizes is no longer what the other engines give; use --pipeline native"
        )


def open_engine(reader: BetonReader, specs: Sequence[ViewSpec], settings: EngineSettings) -> Engine:
    """Open the engine that ``settings`` name. ``FastSSLError``: as `require_engine`, or an option that it does not
    have.
    """
    name = choose_engine(settings.device)[0] if settings.pipeline == "auto" else settings.pipeline
    if name == "native":
        return NativeEngine(reader, specs, settings)
    if settings.crops != "auto":
        raise FastSSLError(f"crops={settings.crops!r} is a choice of the native engine; {name} has one way to crop")
    require_engine(name, reader, specs)
    module = importlib.import_module(f"fastssl.pipelines.engines.{name}")
    engine: Engine = getattr(module, f"{name.capitalize()}Engine")(reader, specs, settings)
    return engine
