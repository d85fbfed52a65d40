"""Checkpoints of others, damaged or made to harm: a named error or a load, in bounded memory, and nothing in them is
run.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from children import in_child

from fastssl.errors import FastSSLError
from fastssl.models.backbones import create_backbone, load_backbone, save_backbone
from fastssl.weights.importing import import_backbone
from fastssl.weights.read import MOST, read_foreign

#: bytes by which reading a hostile file may let the process grow
ROOM = 300 << 20


def limit_memory() -> Callable[[], None]:
    """From now on a few gigabytes more are an error; returns a check that far less was taken."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (4 << 30), now + (4 << 30)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def check() -> None:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        assert grown < ROOM, f"{grown >> 20} MiB were taken"

    return check


def judged(load: Callable[[], object], path: Path) -> bool:
    """Whether it loads; otherwise the error must name the file on one line."""
    started = time.monotonic()
    try:
        load()
        return True
    except FastSSLError as error:
        said = str(error)
        assert str(path) in said and "\n" not in said and len(said) < 1500, said
        return False
    finally:
        assert time.monotonic() - started < 5


def corrupted(rng: np.random.Generator, whole: bytes, head: int) -> bytes:
    """Bits, bytes, words, cuts, growth; most of it in the first ``head`` bytes or the last 1000, where the numbers
    are.
    """
    changed = bytearray(whole)
    for _ in range(int(rng.choice([1, 1, 2, 6]))):
        near = [
            int(rng.integers(head)),
            len(whole) - 1 - int(rng.integers(min(1000, len(whole)))),
            int(rng.integers(len(whole))),
        ]
        at, how = int(rng.choice(near, p=[0.6, 0.3, 0.1])), int(rng.integers(6))
        if how == 0:
            changed[at % len(changed)] ^= 1 << int(rng.integers(8))
        elif how == 1:
            changed[at % len(changed)] = int(rng.choice([0, 255, 34, 44, 58, 91, 123, 125, rng.integers(256)]))
        elif how == 2:
            struct.pack_into(
                "<Q",
                changed,
                min(at, len(changed) - 8),
                int(rng.choice([0, 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 63)])),
            )
        elif how == 3:
            changed = changed[: max(8, at)]
        elif how == 4:
            changed[at:at] = rng.bytes(int(rng.integers(1, 20)))
        else:
            del changed[at : at + int(rng.integers(1, 20))]
        if len(changed) < 16:
            break
    return bytes(changed)


def corrupt_safetensors(folder: Path) -> None:
    path = folder / "last.safetensors"
    save_backbone(create_backbone("test_resnet"), path, arch="test_resnet", step="5")  # timm's smallest
    whole = path.read_bytes()
    head = 8 + struct.unpack("<Q", whole[:8])[0]
    check, rng, loaded = limit_memory(), np.random.default_rng(0), 0
    for _ in range(500):
        path.write_bytes(corrupted(rng, whole, head))
        loaded += judged(lambda: load_backbone(path), path)
    print(loaded)
    check()


@pytest.mark.slow
def test_five_hundred_corruptions_of_safetensors(tmp_path: Path) -> None:
    ended = in_child(corrupt_safetensors, tmp_path, seconds=100)
    assert ended.status == 0, ended
    assert 0 < int(ended.output) < 150  # what changes numbers alone is another network, and no file can say so


def a_moco_checkpoint(path: Path, **options: object) -> None:
    state = {f"module.encoder_{side}.layer{n}.weight": torch.randn(3, 4) for side in "qk" for n in range(6)}
    torch.save(
        {
            "epoch": 3,
            "arch": "x",
            "state_dict": state,
            "optimizer": {"state": {0: {"m": torch.ones(2)}}, "param_groups": []},
        },
        path,
        **options,
    )


def corrupt_torch(folder: Path, old: bool) -> None:
    path = folder / "checkpoint.pth.tar"
    a_moco_checkpoint(path, _use_new_zipfile_serialization=not old)
    whole = path.read_bytes()
    warnings.simplefilter("ignore")  # torch's, about another protocol of pickle
    check, rng, loaded = limit_memory(), np.random.default_rng(1), 0
    for _ in range(500):
        path.write_bytes(corrupted(rng, whole, len(whole)))
        loaded += judged(lambda: read_foreign(path), path)
    print(loaded)
    check()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
def test_five_hundred_corruptions_of_torch_files(old: bool, tmp_path: Path) -> None:
    ended = in_child(corrupt_torch, tmp_path, old, seconds=100)
    assert ended.status == 0, ended
    assert 10 < int(ended.output) < 450


# ---------------------------------------------------------------- made to harm


def zipped(pickled: bytes, parts: dict[str, bytes] | None = None, **options: object) -> bytes:
    """A file as ``torch.save`` writes it, of any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **(parts or {})}.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def doubling(levels: int) -> bytes:
    """A dict that holds one dict twice, and so on."""
    inner: object = {"a": 1}
    for _ in range(levels):
        inner = {"a": inner, "b": inner}
    return pickle.dumps({"model": inner, "w": 1}, 2)


def storage(numel: int, size: tuple, stride: tuple) -> bytes:
    """A pickle with one tensor over a storage of ``numel`` float32."""
    write = lambda values: b"(" + b"".join(b"L%dL\n" % n for n in values) + b"t"  # noqa: E731
    persistent = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuL%dL\ntQ" % numel
    )
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + persistent
        + b"I0\n"
        + write(size)
        + write(stride)
        + b"I00\nccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."


def header(text: str | dict, length: int | None = None, rest: bytes = b"") -> bytes:
    data = (json.dumps(text) if isinstance(text, dict) else text).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + rest


def claims(archive: bytes, size: int) -> bytes:
    """The directory at the end says that the first part has ``size`` bytes."""
    at = archive.index(b"PK\x01\x02")
    return archive[: at + 20] + struct.pack("<II", size, size) + archive[at + 28 :]


OURS = {"fastssl": json.dumps({"arch": "vit_giant_patch14_dinov2"})}
TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
GLOBAL = b"\x80\x02cposix\nsystem\n(X\x0c\x00\x00\x00touch brokentR."

#: name -> (its ending, content, what the message says)
BOMBS: dict[str, tuple[str, bytes, str]] = {
    "compressed": (
        ".pt",
        zipped(b"\x80\x02}.", {"data/0": bytes(200 << 20)}, compression=zipfile.ZIP_DEFLATED),
        "of its parts are compressed",
    ),
    "claims 4 GB": (".pt", claims(zipped(b"\x80\x02}."), 0xFFFFFF00), "its parts should have 4,29"),
    "a storage of terabytes": (".pt", zipped(storage(1 << 40, (1 << 40,), (1,)), {"data/0": b"\0" * 4}), "damaged"),
    "a tensor larger than its storage": (".pt", zipped(storage(1, (1 << 40,), (1,)), {"data/0": b"\0" * 4}), "damaged"),
    "negative": (".pt", zipped(storage(-1, (-1,), (1,)), {"data/0": b"\0" * 4}), "damaged"),
    "bytearray of terabytes": (
        ".pt",
        zipped(b"\x80\x02cbuiltins\nbytearray\n(L1099511627776L\ntR."),
        "damaged|refused",
    ),
    "dicts that double": (".pt", zipped(doubling(31)), f"more than {MOST:,} values"),
    "dicts that have no end": (".pt", zipped(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."), "deep in one another"),
    "lists without end": (".pt", zipped(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."), "."),
    "tuples without end": (".pt", zipped(b"\x80\x02)" + b"\x85" * 200_000 + b"."), "."),
    "a long string that is not there": (".pt", zipped(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x."), "damaged"),
    "runs a command": (".pt", zipped(GLOBAL), r"refused, because reading it means running posix.system"),
    "runs a command, before zip": (".pt", GLOBAL, "refused|damaged"),
    "header of 2^63 bytes": (".safetensors", header("{}", 1 << 63), "not a whole safetensors file"),
    "header of a terabyte": (".safetensors", header("{}", 1 << 40), "not a whole safetensors file"),
    "a tensor of terabytes": (
        ".safetensors",
        header({"w": {**TENSOR, "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}, rest=b"\0" * 4),
        "not a whole",
    ),
    "a shape that wraps around": (
        ".safetensors",
        header({"w": {**TENSOR, "shape": [1 << 32, 1 << 32]}}, rest=b"\0" * 4),
        "not a whole",
    ),
    "no end of brackets": (".safetensors", header("[" * 1_000_000), "not a whole"),
    "begins in another tensor": (
        ".safetensors",
        header({"w": TENSOR, "v": {**TENSOR, "data_offsets": [0, 4]}}, rest=b"\0" * 4),
        "not a whole|.",
    ),
    "nothing": (".safetensors", b"", "not a whole"),
    "nothing, torch": (".pt", b"", "damaged"),
}


def read_bombs(folder: Path) -> None:
    os.chdir(folder)
    check = limit_memory()
    for name, (ending, content, message) in BOMBS.items():
        path = folder / f"bomb{ending}"
        path.write_bytes(content)
        print(name, flush=True)
        for load in (
            lambda path=path: read_foreign(path),
            lambda path=path: import_backbone(path, folder / "out.safetensors", "lcnet_035"),
        ):
            try:
                load()
                raise AssertionError("was taken")
            except FastSSLError as error:
                assert str(path) in str(error) and re.search(message, str(error)) and "\n" not in str(error), error
        assert set(os.listdir(folder)) <= {"bomb.pt", "bomb.safetensors"}
        path.unlink()
    check()


@pytest.mark.slow
def test_files_that_are_made_to_harm(tmp_path: Path) -> None:
    ended = in_child(read_bombs, tmp_path, seconds=60)
    assert ended.status == 0, ended


def name_a_giant(folder: Path) -> None:
    path = folder / "giant.safetensors"
    path.write_bytes(header({"__metadata__": OURS, "w": TENSOR}, rest=b"\0" * 4))
    check = limit_memory()
    with pytest.raises(FastSSLError, match=r"giant.safetensors: tensors do not fit .*Missing key.*Unexpected key.*: w"):
        load_backbone(path)
    check()


def test_a_header_that_names_a_network_of_gigabytes(tmp_path: Path) -> None:
    """Four bytes of weights, and a network of 1.1 billion: known not to fit before memory is taken for it."""
    ended = in_child(name_a_giant, tmp_path)
    assert ended.status == 0, ended


def test_names_that_would_reach_the_network(tmp_path: Path) -> None:
    for arch in (
        "hf-hub:someone/model",
        "hf_hub:someone/model",
        "local-dir:/etc",
        "timm/resnet18",
        "https://x/y",
        "../resnet18",
        "",
    ):
        (tmp_path / "x.safetensors").write_bytes(
            header({"__metadata__": {"fastssl": json.dumps({"arch": arch})}, "w": TENSOR}, rest=b"\0" * 4)
        )
        with pytest.raises(FastSSLError, match=r"unknown network"):
            load_backbone(tmp_path / "x.safetensors")
