"""The sample photos that install with the package: views of eighteen places, made into ``.beton`` files on first use.

The package holds 18 panoramas (CC0, Poly Haven), equirectangular (width: longitude, height: latitude, 90 degrees at the
top). From each, 200 views are rendered for training and 80 for judging, 64 px wide, each as if by another pinhole
camera in another light, so that colours alone do not name a place:

    pixel grid -> rays of the field of view -> roll, pitch, yaw -> longitude, latitude
    -> bilinear look-up in linear light
    -> mean over 2 x 2 rays a pixel -> exposure, white balance, saturation -> gamma, contrast

Training looks into one half of the compass, judging into the other, and at the horizon their fields of view never meet.
The views go the way a user's own photos go: written as folders of JPEG files, then through the converter.

The ranges below were chosen by what can be learned: with fields of view of 35 to 60 degrees many views hold a wall or a
piece of sky alone, and the network ends at 55 % even with labels; with 60 to 90 degrees at 68 % (at contrast 1.5), and
a colour histogram where it was.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fastssl._version import __version__
from fastssl.errors import FastSSLError
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.utils.remote_cache import default_cache_dir

#: part -> views of each place
PARTS: dict[str, int] = {"train": 200, "val": 80}
#: pixels along each side of a view
SIZE = 64

#: Ranges that a view's camera is drawn from, evenly: degrees, stops, factors.
FIELD_OF_VIEW, PITCH, ROLL = (60.0, 90.0), (-30.0, 22.0), (-5.0, 5.0)
EXPOSURE, WHITE_BALANCE, SATURATION = (-1.3, 1.3), (0.4, 1.6), (0.0, 1.0)
#: The contrast lies between its inverse and it, in equal ratios.
CONTRAST = 1.6
#: Degrees between a field of view's edge at the horizon and the border of its half of the compass: a camera that rolls
#: sees a little farther.
MARGIN = 3.0

_QUALITY = 95
_STORED = Path(__file__).parent / "samples"
#: Of the stored pictures, so that exposure and white balance multiply light and not pixel values.
GAMMA = 2.2
SUPERSAMPLING = 2  # rays along each side of a pixel
LUMINANCE = (0.2126, 0.7152, 0.0722)  # weights of red, green and blue (ITU-R BT.709)


@dataclass(frozen=True)
class Cameras:
    """One camera a view; every field is a float tensor (N,), white_balance (N, 3). Angles in degrees.

    Attributes:
        yaw: compass direction; 0 is the panorama's middle column, positive to the right.
        pitch: above the horizon. roll: clockwise turn of the camera about its own axis.
        field_of_view: between the left and the right edge.
        exposure: in stops. white_balance: factors of red, green and blue. saturation: 1 as it is, 0 grey.
        contrast: exponent of the pixel values in 0 .. 1; above 1 shadows are darker.
    """

    yaw: Tensor
    pitch: Tensor
    roll: Tensor
    field_of_view: Tensor
    exposure: Tensor
    white_balance: Tensor
    saturation: Tensor
    contrast: Tensor

    def __len__(self) -> int:
        return len(self.yaw)


def directions(cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """(longitude, latitude) in radians, both (N, size, size), of the rays through the pixels' centres."""
    centres = (torch.arange(size) + 0.5) / size * 2 - 1
    half = (cameras.field_of_view.deg2rad() / 2).tan()[:, None, None]
    right, down = centres[None, None, :] * half, centres[None, :, None] * half
    roll, pitch = cameras.roll.deg2rad()[:, None, None], cameras.pitch.deg2rad()[:, None, None]
    x = right * roll.cos() - down * roll.sin()
    y = -(right * roll.sin() + down * roll.cos())
    up = y * pitch.cos() + pitch.sin()
    forward = pitch.cos() - y * pitch.sin()
    longitude = torch.atan2(x, forward) + cameras.yaw.deg2rad()[:, None, None]
    return longitude, torch.atan2(up, torch.hypot(x, forward))


def render(panorama: Tensor, cameras: Cameras, size: int) -> Tensor:
    """The views of ``cameras``, (N, size, size, 3) uint8, of an equirectangular ``panorama``, (3, H, W) uint8, whose
    width covers 360 degrees.
    """
    light = (panorama.float() / 255) ** GAMMA
    # One column more on each side: the left and the right edge are neighbours.
    light = torch.cat([light[:, :, -1:], light, light[:, :, :1]], 2)
    width = panorama.shape[2]
    longitude, latitude = directions(cameras, size * SUPERSAMPLING)
    column = (longitude / (2 * math.pi) + 0.5) % 1 * width  # in pixels from the left edge
    x = (column + 1) / (width + 2) * 2 - 1
    y = -latitude / (math.pi / 2)
    grid = torch.stack([x, y], -1)
    rays = functional.grid_sample(
        light[None].expand(len(cameras), -1, -1, -1), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    view = functional.avg_pool2d(rays, SUPERSAMPLING)
    view = view * (2**cameras.exposure)[:, None, None, None] * cameras.white_balance[:, :, None, None]
    grey = torch.einsum("nchw,c->nhw", view, view.new_tensor(LUMINANCE))[:, None]
    view = grey + (view - grey) * cameras.saturation[:, None, None, None]
    exponent = (cameras.contrast / GAMMA)[:, None, None, None]
    return (view.clamp(0, 1) ** exponent * 255 + 0.5).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class SampleSet:
    """Paths of the two ``.beton`` files: ``train`` (3,600 views) and ``val`` (1,440)."""

    train: Path
    val: Path


def places() -> list[str]:
    """Names of the places, sorted: the classes."""
    return sorted(path.stem for path in _STORED.glob("*.jpg"))


def draw_cameras(part: str, place: int, count: int | None = None) -> Cameras:
    """The cameras of one place's views (``place``: position in :func:`places`): the same numbers at every call.
    ``train`` looks into the compass's half around 90 degrees, ``val`` into the one around -90.
    """
    shape = PARTS[part] if count is None else count, 10
    words = np.random.default_rng([place, list(PARTS).index(part)]).random(shape)

    def between(column: int, bounds: tuple[float, float]) -> Tensor:
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


def load_panorama(name: str) -> Tensor:
    """The stored panorama of a place, (3, 256, 512) uint8. Raises FastSSLError where the file is damaged."""
    path = _STORED / f"{name}.jpg"
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError) as error:
        raise FastSSLError(f"{path}: not a whole picture ({error}); install fastssl-vision again") from error


def ensure_sample_set(cache_dir: Path | None = None) -> SampleSet:
    """The sample set as ``.beton`` files, converted on first use (a few seconds), found again later. Any number of
    processes may call this at once: each converts into a folder of its own, the first to finish renames it into place,
    the others use that one. A cached set whose files are damaged or short is made again. Where ``cache_dir`` (default:
    :func:`default_cache_dir`) cannot be written, a temporary folder is used and a warning says so. Raises FastSSLError
    where the package's own data are damaged.
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
        build_sample_set(final)
        return SampleSet(final / "train.beton", final / "val.beton")
    try:
        build_sample_set(building)
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


def build_sample_set(folder: Path, parts: Mapping[str, int] | None = None) -> None:
    """Render the views, write them as JPEG files and convert them into ``folder``: a ``.beton`` file for each of
    ``parts`` (default: :data:`PARTS`), which says how many views of each place. With more of them the first ones are
    the same.
    """
    for part, count in (PARTS if parts is None else parts).items():
        # Beside the result and not in /tmp: one disk, one clean-up when the caller removes the folder.
        with tempfile.TemporaryDirectory(prefix="views-", dir=folder) as views:
            for number, name in enumerate(places()):
                (Path(views) / name).mkdir()
                cameras = draw_cameras(part, number, count)
                for index, view in enumerate(render(load_panorama(name), cameras, SIZE).numpy()):
                    Image.fromarray(view).save(Path(views) / name / f"{index:03d}.jpg", quality=_QUALITY, subsampling=0)
            convert(Path(views), folder / f"{part}.beton", ConvertOptions(keep_size=True, on_bad="fail"))
