"""Pictures and files that several tests need, made on the spot: binary are only those of old versions (fixtures/)."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# One thread: the tests' tensors are small, and a pool of spinning threads that has to share its cores with anything
# else makes a step of milliseconds take seconds. Set for the processes that tests start, too.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# torch looks once in a process, at its first product on a GPU, whether cuBLAS was told to be deterministic: a test that
# wants it may come later.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


_running: pytest.Item | None = None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, None, None]:
    """Keep the test that runs, for `need_engine`."""
    global _running
    _running = item
    yield
    _running = None


def need_engine(name: str) -> None:
    """Skip the test, or the file, where an optional engine is not installed.

    Where FASTSSL_ALL_ENGINES says that all must be there it fails. Whatever asks must bear the mark ``engines``: by it
    the tests are found that have to run once more where the engines are installed.
    """
    from fastssl.pipelines.engines.registry import engine_state

    if _running is not None and _running.get_closest_marker("engines") is None:
        pytest.fail(f"{_running.name} needs an engine: mark it with `engines`, so that it runs where there is one")
    if problem := engine_state(name).problem:
        if os.environ.get("FASTSSL_ALL_ENGINES"):
            pytest.fail(f"{name}: {problem}")
        pytest.skip(f"{name}: {problem}", allow_module_level=True)


def make_photo(seed: int, height: int, width: int) -> np.ndarray:
    """A picture (height, width, 3) uint8 with the spectrum of a photo: smooth shapes, some edges, a little grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    grain = rng.integers(-6, 7, (height, width, 1))
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


def jpeg_bytes(rgb: np.ndarray, quality: int = 90, **options: object) -> bytes:
    """``rgb`` as JPEG, encoded by Pillow (not by the code under test)."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def signals() -> Generator[None, None, None]:
    """The command line sets handlers for the whole process; the tests' process wants its own back (a socket
    whose other end is gone would end it)."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGPIPE)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def photo_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: 3 classes x 16 photos of several sizes. The classes differ in colour, so they can be told
    apart.
    """
    root = tmp_path_factory.mktemp("photos")
    sizes = [(48, 64), (64, 48), (56, 56), (50, 71)]
    for label, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir()
        for number in range(16):
            rgb = make_photo(100 * label + number, *sizes[number % 4])
            rgb = (rgb * 0.6).astype(np.uint8)
            rgb[..., 2 - label] += 90
            (root / name / f"{number:02}.jpg").write_bytes(jpeg_bytes(rgb))
    return root


@pytest.fixture(scope="session")
def beton(photo_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photo_tree`` through the real converter."""
    from fastssl.pipelines.convert.conversion import convert
    from fastssl.pipelines.convert.options import ConvertOptions

    path = tmp_path_factory.mktemp("beton") / "photos.beton"
    convert(photo_tree, path, ConvertOptions(keep_size=True, short_side=None))
    return path


@pytest.fixture
def damaged(beton: Path, tmp_path: Path) -> tuple[Path, int]:
    """A copy of ``beton`` in which the entropy-coded data of one sample is cut short, and that sample's number."""
    from fastssl.pipelines.beton.reader import BetonReader

    path, sample = tmp_path / "damaged.beton", 13
    with BetonReader(beton) as reader:
        start, size = int(reader.offsets[sample]), int(reader.sizes[sample])
    content = bytearray(beton.read_bytes())
    content[start + size // 2 : start + size] = b"\xff\xd9" + bytes(size - size // 2 - 2)
    path.write_bytes(content)
    return path, sample
