"""A backbone in the forms in which other programs take it; each gets to its place in one piece.

timm          a state dict under timm's names: timm.create_model(name, num_classes=0, checkpoint_path=FILE);
              or a folder in the style of the Hugging Face hub
torchvision   a state dict under torchvision's names, which gives the same features there
safetensors   timm's names, for programs that build the network themselves
onnx, executorch, coreml: a file with graph and weights for runtimes without PyTorch, see phone.py
"""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastssl._version import __version__
from fastssl.errors import FastSSLError
from fastssl.evaluate.features import EVALUATION_CROP, EVALUATION_SIZE
from fastssl.evaluate.trained import Trained
from fastssl.models.backbones import resizes_positions
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils.atomic_files import usual_mode
from fastssl.utils.suggest import some_names
from fastssl.weights.int8 import Int8, Judged
from fastssl.weights.phone import WRITERS, beside, size_of, write_phone
from fastssl.weights.to_onnx import check_features, require_onnx
from fastssl.weights.torchvision_names import TWINS, Twin, to_torchvision

#: the end of every export's description, by which it is known again: ``..., exported by fastssl 0.1.0``
SIGNATURE = "exported by fastssl"
#: format -> endings of the files that it writes; "" is a folder
ENDINGS: dict[str, tuple[str, ...]] = {
    "timm": (".safetensors", ".pth", ".pt", ""),
    "torchvision": (".pth", ".pt", ".safetensors"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
    "executorch": (".pte",),
    "coreml": (".mlpackage",),
}
#: Of timm's entry for an architecture: what is said there about weights that others trained.
_OF_OTHER_WEIGHTS = (
    *("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes"),
    *("label_names", "label_descriptions", "label_offset", "test_input_size", "test_crop_pct", "test_pool_size"),
)
#: endings that people give to weights: a DST with one of them is not meant to be a folder
_KNOWN = (".safetensors", ".pth", ".pt", ".onnx", ".pte", ".mlpackage", ".bin", ".ckpt", ".tar", ".npz")
#: how what ``phone.WRITERS`` write is used
_RECIPES = {
    "onnx": "features = onnxruntime.InferenceSession({target!r}).run(['features'], {{'images': images}})[0]",
    "executorch": "features = Runtime.get().load_program({target!r}).load_method('forward').execute([images])[0]",
    "coreml": "features = coremltools.models.MLModel({target!r}).predict({{'images': image}})['features']  # on a Mac",
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        format: a key of ``ENDINGS``.
        path: the file or folder.
        tensors: how many.
        size_bytes: of the file, or of the folder's files.
        difference: see ``check_features``; None: the format cannot be run here.
        recipe: a line of Python that uses it.
        fused: whether parallel branches and BatchNorms were merged, as is done for runtimes in networks made for that.
        input: of a file for a runtime: ``raw`` or ``normalised``, see phone.py.
        milliseconds: for one image on one thread of this machine, the median; None: not run.
        int8: what became of the features; None: float.
    """

    format: str
    path: Path
    tensors: int
    size_bytes: int
    difference: float | None
    recipe: str
    fused: bool = False
    input: str | None = None
    milliseconds: float | None = None
    int8: Judged | None = None


def export_backbone(
    trained: Trained,
    destination: Path,
    format: str = "timm",
    *,
    size: int | None = None,
    input: str | None = None,
    int8: Int8 | None = None,
) -> Exported:
    """Write the backbone to ``destination``, which is whole or as it was before, and compare its features with the
    backbone's.

    Networks that train with several branches and run with one go into ``onnx``, ``executorch`` and ``coreml`` in the
    form that runs (``fused``), into the other formats in the form that trains, which ``timm.create_model`` takes. What
    runs without PyTorch gets ``DST.json`` beside it.

    Args:
        trained: as ``load_trained`` gives it; on the CPU, in evaluation mode.
        destination: ends as ``ENDINGS[format]`` says; for what is replaced see ``require_replaceable``.
        format: a key of ``ENDINGS``.
        size: side of the pictures, for runtimes and for a folder of ``timm``; None: as the run was probed, or 224.
        input: ``raw`` or ``normalised``; None: the format's. int8: with what. Both for runtimes alone.

    Raises:
        FastSSLError: another ending, a network that the format does not know, something there that is no export,
            weights that are not finite, features that differ, or int8 that costs too much.
    """
    named = destination.suffix in _KNOWN and (destination.suffix == ".mlpackage" or not destination.is_dir())
    suffix = destination.suffix if named else ""
    if suffix not in ENDINGS[format]:
        fitting = [name for name, endings in ENDINGS.items() if suffix and suffix in endings]
        other = f"; or give --format {' or '.join(fitting)}" if fitting else ""
        wanted = " or ".join(filter(None, ENDINGS[format])) + (", or is a folder" if "" in ENDINGS[format] else "")
        raise FastSSLError(f"{destination}: --format {format} writes a file that ends in {wanted}{other}")
    runtimes = " or ".join(WRITERS)
    if size is not None and format not in WRITERS and suffix != "":
        raise FastSSLError(
            f"{destination}: --size is for --format {runtimes} and for a folder of --format timm; this export takes "
            "pictures of any size"
        )
    if format not in WRITERS and (input is not None or int8 is not None):
        raise FastSSLError(f"{destination}: --input and --int8 are for --format {runtimes}")
    if not all(value.isfinite().all() for value in trained.backbone.state_dict().values()):
        raise FastSSLError(
            f"{trained.name}: weights are NaN or infinite: its training has diverged; export an earlier checkpoint"
        )
    # Plain layout, as the networks have it that will take the tensors; the caller's network is left as it is.
    backbone, arch = copy.deepcopy(trained.backbone).to(memory_format=torch.contiguous_format), trained.arch
    about, side, target = _about(trained), size or trained.size or EVALUATION_SIZE, str(destination)
    if format == "torchvision" and arch not in TWINS:
        every = "--format timm takes every network"
        raise FastSSLError(f"torchvision has no counterpart of {arch}; it has those of {', '.join(TWINS)} ({every})")
    twin = TWINS[arch] if format == "torchvision" else None
    final, more = Path(os.path.abspath(destination)), dict[str, Any](tensors=len(backbone.state_dict()))
    require_replaceable(final)
    with ExitStack() as stack:
        if format in WRITERS:
            require_replaceable(beside(final))
            note = stack.enter_context(staged(beside(final)))
        place = stack.enter_context(staged(final))
        if format in WRITERS:
            plain = replace(trained, backbone=backbone)
            more, text = write_phone(plain, format, place, about, side, input, int8)
            note.write_text(text, encoding="utf-8")
            recipe = _RECIPES[format].format(target=target)
        elif suffix == "":
            view = ViewSpec.evaluation(side, trained.crop or EVALUATION_CROP, trained.normalisation)
            more["difference"] = _write_folder(backbone, arch, place, about, view)
            recipe = f"net = timm.create_model({f'local-dir:{destination}'!r}, pretrained=True)"
        else:
            more["difference"] = _write_file(backbone, arch, place, about, twin)
            loading = f"safetensors.torch.load_file({target!r})"
            recipe = f"net = timm.create_model({arch!r}, num_classes=0, checkpoint_path={target!r})"
            if format == "safetensors":
                recipe = f"tensors = {loading}"
            elif twin is not None:
                loading = loading if suffix == ".safetensors" else f"torch.load({target!r}, weights_only=True)"
                recipe = f"{twin.recipe}; net.load_state_dict({loading})"
        written = size_of(place)
    return Exported(format=format, path=destination, size_bytes=written, recipe=recipe, **more)


def _write_file(backbone: nn.Module, arch: str, path: Path, about: dict[str, str], twin: Twin | None = None) -> float:
    """Write ``path`` (.safetensors, .pth or .pt) for timm's ``arch``, or its ``twin``, and load it back as users will;
    returns the largest difference of features.

    Raises:
        FastSSLError: the network there has other tensors, or gives other features.
    """
    if twin is None:
        tensors, taker, name = backbone.state_dict(), timm.create_model(arch, num_classes=0), f"timm's {arch}"
    else:
        tensors, taker, name = to_torchvision(arch, backbone), twin.build(), f"torchvision's {twin.builder}"
    have, want = tensors.keys(), taker.state_dict().keys()
    odd = ((want - have, "missing"), (have - want, "left over"))
    if parts := [some_names(names, word) for names, word in odd if names]:
        raise FastSSLError(f"{path.name}: the tensors are not those of {name}: {'; '.join(parts)}")
    save_tensors(tensors, path, about)
    timm.models.load_checkpoint(taker, str(path), strict=True)
    config = getattr(taker, "pretrained_cfg", {})  # convolutions take anything; networks that do not say their size
    size = config["input_size"][1] if config.get("fixed_input_size") else 64
    return check_features(path, backbone, taker.eval(), size=size, tolerance=1e-5)


def _write_folder(backbone: nn.Module, arch: str, path: Path, about: dict[str, str], view: ViewSpec) -> float:
    """Write ``path/config.json``, by timm itself, and ``path/model.safetensors``; returns the largest difference of
    features.

    The configuration says how pictures are prepared, so that ``timm.data.resolve_model_data_config`` gives the
    transform with which ``fastssl evaluate`` judges.

    Args:
        view: that transform, for the configuration.
    """
    overlay = {
        **dict.fromkeys(_OF_OTHER_WEIGHTS),
        "input_size": (3, view.size, view.size),
        "interpolation": view.interpolation,
        "crop_pct": view.center,
        "crop_mode": "center",
        "mean": view.mean,
        "std": view.std,
        "custom_load": False,  # timm's ViT entries say True, which expects an .npz file
    }
    options: dict[str, Any] = {}
    if resizes_positions(arch):
        options, overlay["fixed_input_size"] = {"dynamic_img_size": True}, False
    described = timm.create_model(arch, num_classes=0, pretrained_cfg_overlay=overlay, **options)
    timm.models.save_for_hf(described, str(path), model_args=options, safe_serialization=True)
    # Over timm's file, which has no header that says what the tensors are.
    return _write_file(backbone, arch, path / "model.safetensors", about)


def _about(trained: Trained) -> dict[str, str]:
    """What the file says of itself, as far as its format has a place for that."""
    origin = "that others trained" if trained.network == "imported" else "pre-trained without labels"
    said: dict[str, Any] = {"description": f"backbone {origin}, {SIGNATURE} {__version__}", **trained.record()}
    said |= {name: list(values) for name, values in trained.normalisation._asdict().items()}  # such text is JSON, too
    return {name: str(value) for name, value in said.items() if value is not None}


# ---------------------------------------------------------------------- what may be replaced, and how


def save_tensors(tensors: dict[str, Tensor], path: Path, about: dict[str, str]) -> None:
    """Write ``tensors`` as ``path``'s ending says: safetensors, or a dict by ``torch.save``.

    ``about``, what the file says of itself (all strings; ``description`` is signed), goes into safetensors' header;
    ``torch.save`` has none, so there it is an attribute of the dict, as torch's own state dicts have ``_metadata``.
    """
    plain = OrderedDict((name, value.detach().cpu().contiguous()) for name, value in tensors.items())
    if path.suffix == ".safetensors":
        save_file(plain, str(path), metadata={"format": "pt", **about})
        return
    for name, value in plain.items():  # a tensor that is a part of a larger one would take all of it along
        plain[name] = value.clone()
    vars(plain)["about"] = about
    torch.save(plain, path)


def require_replaceable(destination: Path) -> None:
    """Refuse to write over what is not an earlier export: a file whose description says that it is an export of the
    same kind, a folder that is empty, or holds just the two files that ``--format timm`` writes.

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
    if destination.suffix == ".onnx":
        require_onnx()
    try:
        replaceable = _is_export(destination)
    except Exception:  # somebody else's file: each format's reader raises what it likes
        replaceable = False
    if not replaceable:
        raise FastSSLError(
            f"{destination}: exists and is no export of this kind; it is left alone: choose another name or remove it"
        )


def _is_export(path: Path) -> bool:
    if path.is_dir() and path.suffix != ".mlpackage":
        names = {entry.name for entry in path.iterdir()}
        if names != {"config.json", "model.safetensors"}:
            return not names
        config, path = json.loads((path / "config.json").read_bytes()), path / "model.safetensors"
        if not isinstance(config, dict) or "architecture" not in config:
            return False
    if path.suffix in (".pte", ".mlpackage", ".json"):
        about = json.loads((path if path.suffix == ".json" else beside(path)).read_bytes())
        if path.suffix != ".json" and about["size_bytes"] != size_of(path):  # of another file of that name
            return False
    elif path.suffix == ".safetensors":
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata()
    elif path.suffix == ".onnx":
        import onnx

        props = onnx.load(str(path), load_external_data=False).metadata_props
        about = {entry.key: entry.value for entry in props}
    else:
        about = torch.load(path, map_location="cpu", weights_only=True, mmap=True).about
    return re.search(rf"\b{SIGNATURE} \d", about["description"]) is not None


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A place with ``destination``'s name to write to; when the block ends well it is flushed to disk and renamed to
    ``destination``, which is as it was if the block fails or is interrupted.

    A folder cannot be renamed over one that holds files, so there an earlier export is put aside first, and back if the
    new one does not get its place.

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
        if not place.exists():
            raise FileNotFoundError(errno.ENOENT, "nothing was written")
        for file in (file for file in [place, *place.rglob("*")] if file.is_file()):
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
