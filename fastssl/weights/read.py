"""Checkpoints of other programs, read as data: nothing that is in the file is run."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastssl.errors import FastSSLError

#: Stand-ins for ``CfgNode``, the dict of settings of these packages, which need not be here: making one makes an
#: OrderedDict, of which torch knows how to fill it.
_SETTINGS = tuple(
    type("CfgNode", (), {"__module__": module, "__qualname__": "CfgNode", "__new__": lambda cls: OrderedDict()})
    for module in ("fvcore.common.config", "yacs.config")
)
#: Classes that these projects keep beside their tensors and that can do no harm: reading one sets attributes or keys,
#: and runs no code of its own. ``argparse.Namespace`` (DINO's ``args``) is Python's.
HARMLESS = (argparse.Namespace, *_SETTINGS)

#: Dicts in dicts: trainers' settings are a few levels deep. Values in all of them, each counted as often as it is held:
#: a dict that holds one dict twice, which holds one twice, and so on, is 4 billion values at 32 levels.
DEEPEST, MOST = 32, 1_000_000


class OwnCheckpoint(FastSSLError):
    """A checkpoint that fastssl wrote."""


def read_foreign(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, on the CPU: nested dicts become names with dots, and what is not a tensor or stands
    in a list is left out.

    Args:
        path: what ``torch.save`` wrote, whatever its ending, or a ``.safetensors`` file.

    Raises:
        OwnCheckpoint: written by fastssl.
        FastSSLError: no such file, damaged, without tensors, in need of classes that reading would
            have to trust, with two tensors that have the same name, or with dicts that have no end.
    """
    if not path.is_file():
        raise FastSSLError(f"{path}: no such file")
    content, ours = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if ours:
        raise OwnCheckpoint(f"{path}: is a checkpoint of fastssl, which every command takes as it is")
    found: dict[str, tuple[tuple[str, ...], Tensor]] = {}
    waiting: list[tuple[tuple[str, ...], object]] = [((), content)]  # (keys of the dicts on the way, value)
    left = MOST
    while waiting:
        keys, value = waiting.pop()
        left -= 1
        if left < 0:
            raise FastSSLError(f"{path}: more than {MOST:,} values in its dicts; save the network's state_dict() alone")
        if isinstance(value, Tensor):
            name = ".".join(keys)
            if name in found:
                both = f"{_shown(found[name][0])} and {_shown(keys)}"
                raise FastSSLError(f"{path}: two tensors are called {name}: {both}; keep one of them")
            found[name] = keys, value
        elif isinstance(value, Mapping):
            if len(keys) > DEEPEST:
                raise FastSSLError(
                    f"{path}: dicts lie more than {DEEPEST} deep in one another, or one in itself "
                    f"({_shown(keys[:3])}...); save the network's state_dict() alone"
                )
            # optimisers number their states
            waiting += reversed([((*keys, name), each) for name, each in value.items() if isinstance(name, str)])
    if not found:
        raise FastSSLError(
            f"{path}: holds no dict of tensors (a {type(content).__name__}); save the network's state_dict() there"
        )
    return {name: tensor for name, (_, tensor) in found.items()}


def notes_of(path: Path) -> Mapping[str, Any]:
    """What an export of ours says of itself, as strings, in a file that ``read_foreign`` takes; others may say less."""
    if path.suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}
    about = getattr(_read_torch(path)[0], "about", None)
    return about if isinstance(about, Mapping) else {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    """(content, whether fastssl wrote it)."""
    try:
        with safe_open(str(path), framework="pt") as file:
            ours = "fastssl" in (file.metadata() or {})
            return {} if ours else {name: file.get_tensor(name) for name in file.keys()}, ours  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
        raise FastSSLError(f"{path}: not a whole safetensors file ({' '.join(str(error).split())[:300]})") from error


def _read_torch(path: Path) -> tuple[object, bool]:
    """(content, whether fastssl wrote it)."""
    _require_stored_as_is(path)
    damaged = f"{path}: neither what torch.save writes nor safetensors, or damaged"
    try:
        with torch.serialization.safe_globals(list(HARMLESS)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own words would advise to load it without weights_only, which runs whatever code the file holds.
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise FastSSLError(damaged) from error
        raise FastSSLError(
            f"{path}: refused, because reading it means running {wanted[1]}, which is not a tensor; "
            "where you trust the file, save its state_dict alone with the program that wrote it, and import that"
        ) from error
    except Exception as error:  # a damaged file makes torch raise anything at all
        raise FastSSLError(f"{damaged} ({type(error).__name__})") from error
    ours = isinstance(content, Mapping) and isinstance(content.get("method"), Mapping) and "position" in content
    return content, ours


def _require_stored_as_is(path: Path) -> None:
    """``torch.save`` packs its parts into a zip archive without compressing them. One that is compressed can become a
    thousand times as large in memory.

    Raises:
        FastSSLError: a compressed or encrypted part, or parts that are larger in all than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except Exception:  # another format, or damaged: the reader itself will say
        return
    if odd := [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1]:
        why = "which torch.save never does; save it again with torch.save"
        raise FastSSLError(f"{path}: {len(odd)} of its parts are compressed, {why}")
    if (claimed := sum(part.file_size for part in parts)) > (size := path.stat().st_size):
        raise FastSSLError(f"{path}: damaged: its parts should have {claimed:,} bytes, the file has {size:,}")


def _shown(keys: tuple[str, ...]) -> str:
    """``['model']['conv.weight']``"""
    return "".join(f"[{key!r}]" for key in keys)
