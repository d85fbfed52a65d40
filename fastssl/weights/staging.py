"""Where an export goes: what may be replaced, and how it gets there in one piece."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastssl.errors import FastSSLError
from fastssl.utils.atomic_files import usual_mode

#: what a folder of ``--format timm`` holds
FOLDER_FILES = frozenset({"config.json", "model.safetensors"})
#: the end of every export's description, by which it is known again: ``..., exported by fastssl 0.1.0``
SIGNATURE = "exported by fastssl"


def save_tensors(tensors: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
    """Write ``tensors`` as ``path``'s ending says: safetensors, or a dict by ``torch.save``.

    Args:
        about: what the file says of itself, all strings; ``description`` is signed. It goes into safetensors' header;
            ``torch.save`` has none, so there it is an attribute of the dict, ``torch.load(path).about``, as torch's own
            state dicts have ``_metadata``.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if path.suffix != ".safetensors":
        # A tensor that is a part of a larger one would take all of it along.
        content = OrderedDict((name, value.clone()) for name, value in plain.items())
        vars(content)["about"] = about
        torch.save(content, path)
        return
    save_file(plain, str(path), metadata={"format": "pt", **about})


def require_replaceable(destination: Path) -> None:
    """Refuse to write over what is not an earlier export.

    A file may be replaced if its description says that it is an export of the same kind; a folder if it is empty, or
    holds just the two files that ``--format timm`` writes.

    Raises:
        FastSSLError: ``destination`` is something else, or is in a folder that does not exist; or it is an ONNX file,
            and onnx is missing.
    """
    if not destination.parent.is_dir():
        raise FastSSLError(f"{destination.parent}: no such folder; create it first")
    if destination.is_symlink():
        raise FastSSLError(f"{destination}: is a link; name the place that it leads to")
    if not destination.exists():
        return
    if destination.is_dir() and destination.samefile(Path.cwd()):
        raise FastSSLError(f"{destination}: is the current folder, which would be replaced; name a new one")
    if not (_is_exported_folder(destination) if destination.is_dir() else _is_signed(destination)):
        raise FastSSLError(
            f"{destination}: exists and is no export of this kind; it is left alone: choose another name or remove it"
        )


def _is_exported_folder(path: Path) -> bool:
    names = {entry.name for entry in path.iterdir()}
    if names != FOLDER_FILES:
        return not names
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "architecture" in config and _is_signed(path / "model.safetensors")


def _is_signed(path: Path) -> bool:
    """Whether the file's description says that it is an export."""
    if path.suffix == ".onnx":
        from fastssl.weights.to_onnx import require_onnx

        require_onnx()
    try:
        description = _description(path)
    except Exception:  # somebody else's file: each format's reader raises what it likes
        return False
    return isinstance(description, str) and re.search(rf"\b{SIGNATURE} \d", description) is not None


def _description(path: Path) -> object:
    if path.suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as file:
            return file.metadata()["description"]
    if path.suffix == ".onnx":
        import onnx

        props = onnx.load(str(path), load_external_data=False).metadata_props
        return next(entry.value for entry in props if entry.key == "description")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True).about["description"]


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A place with ``destination``'s name to write to; when the block ends well it is flushed to disk and renamed to
    ``destination``.

    If the block fails or is interrupted, ``destination`` is as it was. A folder cannot be renamed over one that holds
    files, so there an earlier export is put aside first, and back if the new one does not get its place.

    Raises:
        FastSSLError: the folder cannot be written, or the disk is full. Should the earlier export not get back, it is
            kept, and said where.
    """
    try:
        beside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise FastSSLError(f"{destination.parent}: cannot be written ({error.strerror})") from error
    place, aside = beside / destination.name, beside / f"{destination.name}.before"
    try:
        mode = usual_mode(beside / "mode")
        yield place
        for file in place.iterdir() if place.is_dir() else [place]:
            file.chmod(mode)  # safetensors writes for its owner's eyes only
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if destination.is_dir():
            destination.rename(aside)
        place.replace(destination)
    # torch says a full disk in a RuntimeError, safetensors in its own
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FastSSLError(f"{destination}: not written ({reason}); what was there before is untouched") from error
    finally:
        if aside.exists() and place.exists():  # stopped between the two renames, by whatever it was
            try:
                aside.rename(destination)
            except OSError as error:
                raise FastSSLError(
                    f"{destination}: not written, and what was there before is in {aside} now ({error.strerror})"
                ) from error
        shutil.rmtree(beside, ignore_errors=True)  # not reached while the earlier export is still in there
