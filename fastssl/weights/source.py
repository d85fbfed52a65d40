"""Weights by whatever name people have for them: a run, a file, a tag of timm's, a repository of the hub; and those
that a run begins with.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import timm
from torch import nn

from fastssl.distributed.devices import choose_device
from fastssl.distributed.group import joined
from fastssl.distributed.world import first_of_host_speaks, world_from_environment
from fastssl.errors import FastSSLError, without_folders
from fastssl.evaluate.trained import Trained, checkpoints_of, load_trained
from fastssl.models.backbones import create_backbone, plain_arch, read_header, resolve_arch
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation
from fastssl.runs.checkpoint import INITIAL
from fastssl.utils import addresses
from fastssl.utils.yaml_file import shown
from fastssl.weights.importing import Found, foreign_backbone, match
from fastssl.weights.read import OwnCheckpoint, notes_of, read_foreign

if TYPE_CHECKING:
    from fastssl.evaluate.session import Session

#: What timm takes before the name of a repository, or of a folder laid out as one (``fastssl export --format timm``).
HUB, FOLDER = "hf-hub:", "local-dir:"
#: Ends of the names of files with weights: no network's name ends so.
_FILES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")


def load_weights(source: str | Path, arch: str | None = None, which: str | None = None) -> Trained:
    """The backbone that ``source`` names, ready to be used: in evaluation mode, on the CPU, without its classifier.

    Args:
        source: a run's folder or file, as ``load_trained`` takes it; a file of other programs, as ``fastssl import``
            reads it; a folder with timm's ``config.json``; ``hf-hub:user/name``; or a network of timm's with the tag of
            weights (``mobilenetv3_large_100.ra_in1k``; without a tag timm's first choice). What comes from the hub is
            taken from the local cache where it is there.
        arch: the network that it should be, whatever tag stands behind it; needed for files of other programs that do
            not say it.
        which: ``student`` or ``teacher`` of a file with both; None: the student.

    Raises:
        FastSSLError: no such weights, none without a network connection, of another network than ``arch``, damaged, or
            without a value for each of the network's tensors.
    """
    text, wanted = str(source), None if arch is None else plain_arch(arch)
    if not text or addresses.is_remote(text):
        where = addresses.shown(text) or "no name"
        raise FastSSLError(f"{where}: weights are read from this machine; name a copy of them here")
    if not _is_path(text):
        found = _from_timm(text if text.startswith(HUB) else _with_tag(text), which)
    else:
        found = _from_path(Path(text.removeprefix(FOLDER)), wanted, which)
    if wanted is not None and plain_arch(found.arch) != wanted:
        raise FastSSLError(f"{text}: holds {found.arch}, not {wanted}; leave --arch out, or give {found.arch}")
    return found


def load_backbone(weights: str | os.PathLike[str], which: str | None = None, *, arch: str | None = None) -> nn.Module:
    """The network of ``load_weights``: a timm module in evaluation mode, on the CPU."""
    return load_weights(os.fspath(weights), arch, which).backbone


@contextmanager
def open_session(
    source: str | Path, *, which: str | None = None, arch: str | None = None, device: str = "auto"
) -> Iterator[Session]:
    """The network of ``load_weights`` on its device, and the processes (of torchrun or srun) as one group, inside the
    block. Raises FastSSLError, see ``load_weights``, ``choose_device`` and ``joined``.
    """
    from fastssl.evaluate.session import Session, weights_fingerprint  # loads what Windows does not have

    world, started = world_from_environment(), time.monotonic()
    with first_of_host_speaks():
        chosen, trained = choose_device(device, world), load_weights(source, arch, which)
    session = Session(str(source), trained, chosen, world, weights_fingerprint(trained.backbone), started)
    with joined(world, chosen):
        trained.backbone.to(chosen)
        yield session


def initial_weights(source: str, arch: str | None = None, run: Path | None = None) -> Trained:
    """Those that a run begins with, under a name without folders.

    Args:
        source, arch: see ``load_weights``, with its errors.
        run: folder of the run if it may have begun already: its own copy of the weights of this name is taken where
            they are gone, or would have to be fetched. A file that is there is read: it may hold others by now.
    """
    there = _is_path(source)
    name = Path(source).name if there else source if source.startswith(HUB) else _with_tag(source)
    kept = run / "checkpoints" / INITIAL if run is not None and not Path(source).exists() else None
    if kept and kept.is_file() and read_header(kept).get("origin") == name:
        source = str(kept)
    return replace(load_weights(source, arch), name=name)


def _is_path(source: str) -> bool:
    named_so = source.startswith(FOLDER) or source.endswith(_FILES) or "/" in source or Path(source).exists()
    return named_so and not source.startswith(HUB)


def _from_path(path: Path, arch: str | None, which: str | None) -> Trained:
    """A run's, or one of another program."""
    if not path.exists():
        as_named = f"; of a repository of the hub give {HUB}{path}" if str(path).count("/") == 1 else ""
        raise FastSSLError(f"{path}: no such file or folder{as_named}")
    if path.is_dir():
        laid_out = (path / "config.json").is_file() and not any(checkpoints_of(path).glob("last*"))
        return _from_timm(f"{FOLDER}{path}", which) if laid_out else load_trained(path, which)
    try:
        tensors = read_foreign(path)
    except OwnCheckpoint:
        return load_trained(path, which)
    arch = arch or notes_of(path).get("arch")
    if arch is None:
        raise FastSSLError(f"{path}: does not say which network it holds; name it with --arch, or `fastssl import` it")
    backbone, matched, seen = foreign_backbone(path, tensors, arch, which=which)
    return Trained(backbone.eval(), plain_arch(matched.arch), "imported", None, path.name, normalisation=seen)


def _with_tag(name: str) -> str:
    """A network's name with a tag of published weights."""
    try:
        arch = resolve_arch(name)
    except FastSSLError as error:
        raise FastSSLError(f"{shown(name)}: no such file or folder, and no weights of timm's: {error}") from error
    if "." not in arch and (config := timm.get_pretrained_cfg(arch, allow_unregistered=False)) and config.tag:
        arch = f"{arch}.{config.tag}"
    if not timm.is_model_pretrained(arch):
        raise FastSSLError(f"{name}: timm has no published weights of this network; give a file of your own")
    return arch


def _from_timm(source: str, which: str | None) -> Trained:
    """By timm's own reader, then into a backbone as we make them."""
    if which is not None:
        raise FastSSLError(f"{source}: holds one network; only of a run's two a {which} can be asked for")
    with _in_one_line(source):
        network = timm.create_model(source, pretrained=True, num_classes=0)
    config = getattr(network, "pretrained_cfg")  # noqa: B009 (to a type checker it is a tensor)
    arch = plain_arch(config["architecture"])
    backbone = create_backbone(arch)
    match(Path(source), Found(("timm",), None, dict(network.state_dict()), []), arch, backbone)
    seen = Normalisation(*(tuple(config.get(name) or getattr(IMAGENET, name)) for name in Normalisation._fields))
    name = Path(source).name if source.startswith(FOLDER) else source
    size = (config.get("input_size") or (None,))[-1]
    return Trained(backbone.eval(), arch, "imported", None, name, size, config.get("crop_pct"), seen, published=True)


@contextmanager
def _in_one_line(source: str) -> Iterator[None]:
    """What timm and the hub's library say in many lines, and in an error of any kind."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    offline = constants.HF_HUB_OFFLINE
    if not source.startswith(FOLDER):
        try:  # once: without a network the library would ask for every file five times, for most of a minute
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception:  # of whatever library makes its requests: what is in the cache is there without them
            constants.HF_HUB_OFFLINE = True
    speaker = logging.getLogger("huggingface_hub")
    level = speaker.level
    speaker.setLevel(logging.ERROR)  # a line for each of ten tries without a network
    try:
        yield
    except Exception as error:
        said = f"cannot be loaded ({type(error).__name__}: {without_folders(' '.join(str(error).split()))[:200]})"
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
            said = "not in the cache of this machine, and the hub cannot be reached; fetch it elsewhere, or give a file"
        raise FastSSLError(f"{source}: {said}") from error
    finally:
        speaker.setLevel(level)
        constants.HF_HUB_OFFLINE = offline
