"""Where an export goes: what may be replaced, and how it gets there in one piece."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastssl.files import usual_mode
from fastssl.pipelines.errors import FastSSLError

#: what a folder of ``--format timm`` holds
FOLDER_FILES = frozenset({"config.json", "model.safetensors"})
TORCH_ENDINGS = (".pth", ".pt")


def save_tensors(tensors: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
    """Write ``tensors`` as ``path``'s ending says: safetensors, with ``about`` (all strings) in its header, or a dict by ``torch.save``."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if path.suffix in TORCH_ENDINGS:
        # A tensor that is a part of a larger one would take all of it along.
        torch.save({name: value.clone() for name, value in plain.items()}, path)
        return
    save_file(plain, str(path), metadata={"format": "pt", **about})


def require_replaceable(destination: Path) -> None:
    """Refuse to write over what is not an earlier export.

    A file may be replaced by an export if it is one of the same kind: tensors in a safetensors file without fastssl's header, a flat
    dict of tensors by ``torch.save``, an ONNX file. A folder may be, if it holds nothing but what ``--format timm`` writes, or nothing.

    Raises:
        FastSSLError: ``destination`` is something else, or is in a folder that does not exist.
    """
    if not destination.parent.is_dir():
        raise FastSSLError(f"{destination.parent}: no such folder; create it first")
    if destination.is_symlink():
        raise FastSSLError(f"{destination}: is a link; name the place that it leads to")
    if not destination.exists():
        return
    if destination.is_dir() and destination.samefile(Path.cwd()):
        raise FastSSLError(f"{destination}: is the current folder, which would be replaced; name a new one")
    kind = "folder" if destination.is_dir() else {".safetensors": "safetensors", ".onnx": "onnx"}.get(destination.suffix, "torch")
    known = {"folder": _is_exported_folder, "safetensors": _is_plain_safetensors, "onnx": _is_onnx, "torch": _is_plain_torch}
    if not known[kind](destination):
        raise FastSSLError(f"{destination}: exists and is no export of this kind; it is left alone: choose another name or remove it")


def _is_exported_folder(path: Path) -> bool:
    return {entry.name for entry in path.iterdir()} <= FOLDER_FILES


def _is_plain_safetensors(path: Path) -> bool:
    try:
        with safe_open(str(path), framework="pt") as file:
            return "fastssl" not in (file.metadata() or {})
    except SafetensorError:
        return False


def _is_plain_torch(path: Path) -> bool:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError):
        return False
    return isinstance(content, dict) and bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _is_onnx(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x08"  # an ONNX file is a protobuf that begins with field 1, its version


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A place with ``destination``'s name to write to; when the block ends well it is flushed to disk and renamed to ``destination``.

    If the block fails, ``destination`` is as it was. A folder cannot be renamed over one that holds files, so there an earlier export is
    put aside first, and back if the last step fails.

    Raises:
        FastSSLError: the folder cannot be written, or the disk is full.
    """
    try:
        beside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise FastSSLError(f"{destination.parent}: cannot be written ({error.strerror})") from error
    place, aside = beside / destination.name, beside / "before"
    try:
        yield place
        for file in place.iterdir() if place.is_dir() else [place]:
            file.chmod(usual_mode())  # safetensors writes for its owner's eyes only
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if destination.is_dir():
            destination.rename(aside)
        try:
            place.replace(destination)
        except OSError:
            if aside.exists():
                aside.rename(destination)
            raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch says a full disk in a RuntimeError, safetensors in its own
        reason = " ".join(str(error).split())[:300]
        raise FastSSLError(f"{destination}: not written ({reason}); what was there before is untouched") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
