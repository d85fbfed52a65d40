"""The sample photos that install with the package: a slice of Fashion-MNIST, made into ``.beton`` files on first use.

4,000 training and 2,000 test pictures (28x28, grey) in ten balanced classes. They are stored as Fashion-MNIST stores
them (idx, gzip) and go the way a user's own photos go: written as a folder of PNG files, then through the converter.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import struct
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastssl._version import __version__
from fastssl.pipelines.errors import FastSSLError

#: Fashion-MNIST's label k -> folder name. The converter numbers classes by sorted folder name, so its labels differ.
CLASS_NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")

#: part -> (name of the published files, pictures of each class that we keep)
PARTS: dict[str, tuple[str, int]] = {"train": ("train", 400), "val": ("t10k", 200)}

_QUALITY = 95
_STORED = Path(__file__).parent / "samples"


@dataclass(frozen=True)
class SampleSet:
    """Paths of the two ``.beton`` files: ``train`` (4,000 pictures) and ``val`` (2,000)."""

    train: Path
    val: Path


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes: (N, ...) uint8, C order.

    Layout: two zero bytes, type 0x08, number of dimensions, each dimension as a big-endian uint32, then the data.

    Raises:
        FastSSLError: the file is damaged or no idx file of bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes())
        zero, kind, ndim = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{ndim}I", data, 4)
        if (zero, kind) != (0, 8):
            raise ValueError(f"magic number {data[:4].hex()}")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise FastSSLError(f"{path}: not a whole idx file ({error}); install fastssl-vision again") from error


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write ``array`` (uint8) as a gzipped idx file; no name and no time in it, so equal input gives equal bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as file:
        file.write(header + np.ascontiguousarray(array, np.uint8).tobytes())


def cut_slice(source: Path, destination: Path) -> None:
    """Cut the shipped slice from the published data set: of each class the first 400 (train) or 200 (test), in file order.

    Args:
        source: folder with ``train-images-idx3-ubyte.gz`` and its three companions, as published (Debian:
            ``/usr/share/datasets/fashion-mnist`` of the package ``dataset-fashion-mnist``).
        destination: folder that gets files of the same names.
    """
    for published, per_class in PARTS.values():
        images = read_idx(source / f"{published}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{published}-labels-idx1-ubyte.gz")
        kept = np.sort(np.concatenate([np.flatnonzero(labels == k)[:per_class] for k in range(len(CLASS_NAMES))]))
        write_idx(destination / f"{published}-images-idx3-ubyte.gz", images[kept])
        write_idx(destination / f"{published}-labels-idx1-ubyte.gz", labels[kept])


def load_part(part: str) -> tuple[np.ndarray, np.ndarray]:
    """The stored pictures of ``part`` (``train`` or ``val``): (N, 28, 28) uint8 and (N,) uint8 Fashion-MNIST labels."""
    published, _ = PARTS[part]
    return read_idx(_STORED / f"{published}-images-idx3-ubyte.gz"), read_idx(_STORED / f"{published}-labels-idx1-ubyte.gz")


def default_cache_dir() -> Path:
    """Where the converted files are kept: ``$XDG_CACHE_HOME/fastssl``, or ``~/.cache/fastssl``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fastssl"


def ensure_sample_set(cache_dir: Path | None = None) -> SampleSet:
    """The sample set as ``.beton`` files, converted on first use (a few seconds), found again later.

    Any number of processes may call this at once: each converts into a folder of its own, the first to finish renames
    it into place, the others use that one. A cached set whose files are damaged or short is made again.

    Args:
        cache_dir: default :func:`default_cache_dir`. If it cannot be written, a temporary folder is used and a
            warning says so.

    Raises:
        FastSSLError: the package's own data are damaged.
    """
    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    # The name holds everything that the files depend on: an update never meets an older version's files.
    final = cache_dir / f"samples-{__version__}-{_fingerprint()}"
    if (found := _verified(final)) is not None:
        return found
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=cache_dir))
    except OSError as error:
        final = Path(tempfile.mkdtemp(prefix="fastssl-samples-"))
        warnings.warn(f"{cache_dir} cannot be written ({error.strerror}); the sample set goes to {final}", stacklevel=2)
        _build(final)
        return SampleSet(final / "train.beton", final / "val.beton")
    try:
        _build(building)
        _put_in_place(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    found = _verified(final)
    if found is None:
        raise FastSSLError(f"{final}: the converted sample set does not verify; delete this folder and try again")
    return found


def _put_in_place(building: Path, final: Path) -> None:
    """Rename ``building`` to ``final``, unless another process has put a good one there in the meantime."""
    for _ in range(3):
        try:
            building.rename(final)
            return
        except OSError:
            # A folder that is not empty is never replaced by a rename: somebody was first, or it is a damaged one.
            if _verified(final) is not None:
                return
            grave = Path(tempfile.mkdtemp(prefix=f".{final.name}-old-", dir=final.parent))
            try:
                final.rename(grave / "damaged")
            except FileNotFoundError:
                pass  # another process was clearing the same damage
            finally:
                shutil.rmtree(grave, ignore_errors=True)


def _fingerprint() -> str:
    digest = hashlib.sha256(f"quality={_QUALITY} keep_size".encode())
    for path in sorted(_STORED.glob("*.gz")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _verified(folder: Path) -> SampleSet | None:
    """The set in ``folder`` if both files are whole and have the number of samples they should have."""
    from fastssl.pipelines.beton import BetonReader

    for part, (_, per_class) in PARTS.items():
        path = folder / f"{part}.beton"
        if not path.is_file():
            return None
        try:
            with BetonReader(path) as reader:
                if len(reader) != per_class * len(CLASS_NAMES) or reader.classes != sorted(CLASS_NAMES):
                    return None
        except FastSSLError:
            return None
    return SampleSet(folder / "train.beton", folder / "val.beton")


def _build(folder: Path) -> None:
    """Write the pictures as PNG files and convert them, both parts, into ``folder``."""
    from PIL import Image

    from fastssl.pipelines.convert import ConvertOptions, convert

    for part in PARTS:
        images, labels = load_part(part)
        # Beside the result and not in /tmp: one disk, one clean-up when the caller removes the folder.
        with tempfile.TemporaryDirectory(prefix="png-", dir=folder) as png:
            for name in CLASS_NAMES:
                (Path(png) / name).mkdir()
            for number, (image, label) in enumerate(zip(images, labels)):
                # Little compression: these files live for a second.
                Image.fromarray(image).save(Path(png) / CLASS_NAMES[label] / f"{number:04d}.png", compress_level=1)
            convert(Path(png), folder / f"{part}.beton", ConvertOptions(keep_size=True, quality=_QUALITY, on_bad="fail"))
