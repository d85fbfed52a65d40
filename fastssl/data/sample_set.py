"""The sample photos that install with the package: views of eighteen places, made into ``.beton`` files on first use.

The package holds 18 panoramas (CC0, Poly Haven). From each, 200 views are rendered for training and 80 for judging, 64
px wide, each as if by another camera in another light, so that colours alone do not name a place. Training looks into
one half of the compass, judging into the other, and at the horizon their fields of view never meet. The views go the
way a user's own photos go: written as folders of JPEG files, then through the converter.

The ranges below were chosen by what can be learned: with fields of view of 35 to 60 degrees many views hold a wall or a
piece of sky alone, and the network ends at 55 % even with labels; with 60 to 90 degrees at 68 % (at contrast 1.5), and
a colour histogram where it was.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastssl._version import __version__
from fastssl.data.panorama import Cameras, render
from fastssl.errors import FastSSLError
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions

#: part -> views of each place
PARTS: dict[str, int] = {"train": 200, "val": 80}
#: pixels along each side of a view
SIZE = 64

#: Ranges that a view's camera is drawn from, evenly: degrees, stops, factors.
FIELD_OF_VIEW = (60.0, 90.0)
PITCH = (-30.0, 22.0)
ROLL = (-5.0, 5.0)
EXPOSURE = (-1.3, 1.3)
WHITE_BALANCE = (0.4, 1.6)
SATURATION = (0.0, 1.0)
#: The contrast lies between its inverse and it, in equal ratios.
CONTRAST = 1.6
#: Degrees between a field of view's edge at the horizon and the border of its half of the compass: a camera that rolls
#: sees a little farther.
MARGIN = 3.0

_QUALITY = 95
_STORED = Path(__file__).parent / "samples"


@dataclass(frozen=True)
class SampleSet:
    """Paths of the two ``.beton`` files: ``train`` (3,600 views) and ``val`` (1,440)."""

    train: Path
    val: Path


def places() -> list[str]:
    """Names of the places, sorted: the classes."""
    return sorted(path.stem for path in _STORED.glob("*.jpg"))


def draw_cameras(part: str, place: int, count: int | None = None) -> Cameras:
    """The cameras of one place's views: the same numbers at every call.

    Args:
        part: ``train`` looks into the compass's half around 90 degrees, ``val`` into the one around -90.
        place: position in :func:`places`.
        count: views; default: as many as the sample set has.
    """
    shape = PARTS[part] if count is None else count, 10
    words = np.random.default_rng([place, list(PARTS).index(part)]).random(shape)

    def between(column: int, bounds: tuple[float, float]) -> torch.Tensor:
        return torch.from_numpy(bounds[0] + (bounds[1] - bounds[0]) * words[:, column]).float()

    field_of_view = between(0, FIELD_OF_VIEW)
    reach = 90 - MARGIN - field_of_view / 2
    return Cameras(
        yaw=(90.0 if part == "train" else -90.0) + reach * between(1, (-1.0, 1.0)),
        pitch=between(2, PITCH),
        roll=between(3, ROLL),
        field_of_view=field_of_view,
        exposure=between(4, EXPOSURE),
        white_balance=torch.stack([between(column, WHITE_BALANCE) for column in (5, 6, 7)], 1),
        saturation=between(8, SATURATION),
        contrast=CONTRAST ** between(9, (-1.0, 1.0)),
    )


def load_panorama(name: str) -> torch.Tensor:
    """The stored panorama of a place, (3, 256, 512) uint8.

    Raises:
        FastSSLError: the package's file is damaged.
    """
    path = _STORED / f"{name}.jpg"
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError) as error:
        raise FastSSLError(f"{path}: not a whole picture ({error}); install fastssl-vision again") from error


def default_cache_dir() -> Path:
    """Where the converted files are kept: ``$XDG_CACHE_HOME/fastssl``, or ``~/.cache/fastssl``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fastssl"


def ensure_sample_set(cache_dir: Path | None = None) -> SampleSet:
    """The sample set as ``.beton`` files, converted on first use (a few seconds), found again later. Any number of
    processes may call this at once: each converts into a folder of its own, the first to finish renames it into place,
    the others use that one. A cached set whose files are damaged or short is made again.

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
        for _ in range(2):
            # A folder that is not empty is never replaced by a rename: somebody was first, or it is a damaged one.
            with suppress(OSError):
                building.rename(final)
            if (found := _verified(final)) is not None:
                return found
            shutil.rmtree(final, ignore_errors=True)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    raise FastSSLError(f"{final}: the converted sample set does not verify; delete this folder and try again")


def _fingerprint() -> str:
    ranges = (FIELD_OF_VIEW, PITCH, ROLL, EXPOSURE, WHITE_BALANCE, SATURATION)
    settings = (PARTS, SIZE, *ranges, CONTRAST, MARGIN, _QUALITY)
    digest = hashlib.sha256(repr(settings).encode())
    for path in sorted(_STORED.glob("*.jpg")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _verified(folder: Path) -> SampleSet | None:
    """The set in ``folder`` if both files are whole and have the number of samples they should have."""
    found = SampleSet(folder / "train.beton", folder / "val.beton")
    try:
        for path, per_place in zip((found.train, found.val), PARTS.values()):
            with BetonReader(path) as reader:
                if len(reader) != per_place * len(places()) or reader.classes != places():
                    return None
    except FastSSLError:
        return None
    return found


def _build(folder: Path) -> None:
    """Render the views, write them as JPEG files and convert them, both parts, into ``folder``."""
    for part in PARTS:
        # Beside the result and not in /tmp: one disk, one clean-up when the caller removes the folder.
        with tempfile.TemporaryDirectory(prefix="views-", dir=folder) as views:
            for number, name in enumerate(places()):
                (Path(views) / name).mkdir()
                for index, view in enumerate(render(load_panorama(name), draw_cameras(part, number), SIZE).numpy()):
                    Image.fromarray(view).save(Path(views) / name / f"{index:03d}.jpg", quality=_QUALITY, subsampling=0)
            convert(Path(views), folder / f"{part}.beton", ConvertOptions(keep_size=True, on_bad="fail"))
