"""From annotated pictures to batches: decode, scale, flip, pad; on threads, a few pictures ahead."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fastssl.evaluate.detection.annotations import DetectionError, Picture, Segmentation
from fastssl.pipelines.convert.encode import encode_photo
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.utils.cores import available_cores
from fastssl.utils.deadline import Deadline

#: Any picture file -> upright RGB bytes of its own size: the converter's decoding, and its complaints.
_DECODE = ConvertOptions(keep_size=True, short_side=None, store="raw")


@dataclass(frozen=True)
class View:
    """What is done to one picture.

    Attributes:
        picture: whose.
        height, width: after scaling, in pixels.
        flip: left and right exchanged, after scaling.
    """

    picture: Picture
    height: int
    width: int
    flip: bool = False


@dataclass
class DetectionBatch:
    """Scaled pictures, padded to one size.

    Attributes:
        views: what was done to each of the B pictures.
        images: (B, H, W, 3) uint8 RGB on the host; H and W are multiples of ``divisible``; behind a picture's own edge
            anything.
        targets: B of ``boxes`` (n, 4) float32, left, top, right, bottom in pixels of the view; ``labels`` (n,) int64;
            with masks ``masks`` (n, h, w) uint8.
    """

    views: list[View]
    images: Tensor
    targets: list[dict[str, Tensor]]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each picture without its padding."""
        return [(view.height, view.width) for view in self.views]


def scaled_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """(height, width) whose short side is ``short_side``, or less where the long one would pass ``long_side``."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def load_batches(
    requests: Iterable[list[View]], *, divisible: int, masks: bool = False, workers: int | None = None
) -> Generator[DetectionBatch, None, None]:
    """The batches of ``requests``, in order, a picture a thread. Close it, or run it to its end, to join the threads.

    Raises:
        DetectionError: a picture is damaged, or of another size than its annotation says.
        Stalled: the file system does not answer.
    """
    requests, ahead = itertools.tee(requests)
    with closing(_load(itertools.chain.from_iterable(ahead), masks, workers)) as parts:
        for views in requests:
            yield _together(views, list(itertools.islice(parts, len(views))), divisible)


def _load(
    views: Iterable[View], masks: bool, workers: int | None
) -> Generator[tuple[Tensor, dict[str, Tensor]], None, None]:
    Image.init()  # here, because loading plugins is not made for several threads at once
    work = partial(load_view, masks=masks)
    return Deadline("pictures").map(work, views, workers or available_cores(), lambda view: f"at {view.picture.path}")


def _together(views: list[View], parts: list[tuple[Tensor, dict[str, Tensor]]], divisible: int) -> DetectionBatch:
    height = -(-max(view.height for view in views) // divisible) * divisible
    width = -(-max(view.width for view in views) // divisible) * divisible
    images = torch.zeros(len(views), height, width, 3, dtype=torch.uint8)
    for place, view, (pixels, _) in zip(images, views, parts):
        place[: view.height, : view.width] = pixels
    return DetectionBatch(views, images, [target for _, target in parts])


def load_view(view: View, *, masks: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """(pixels (h, w, 3) uint8, target): one entry of a ``DetectionBatch``. Antialiased bilinear scaling, as Pillow's
    and Detectron2's.

    Raises:
        DetectionError: names the file.
    """
    picture = view.picture
    image = torch.from_numpy(read_picture(picture))
    if (view.height, view.width) != (picture.height, picture.width):
        planes = image.permute(2, 0, 1)[None]  # channels-last in memory
        planes = functional.interpolate(planes, (view.height, view.width), mode="bilinear", antialias=True)
        image = planes[0].permute(1, 2, 0)
    scale = np.array([view.width / picture.width, view.height / picture.height] * 2, np.float32)
    boxes = picture.boxes * scale
    if view.flip:
        image = image.flip(1)
        boxes = np.stack([view.width - boxes[:, 2], boxes[:, 1], view.width - boxes[:, 0], boxes[:, 3]], 1)
    target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(picture.labels)}
    if masks:
        drawn = [draw_mask(segmentation, view) for segmentation in picture.segmentations]
        target["masks"] = torch.from_numpy(
            np.stack(drawn) if drawn else np.zeros((0, view.height, view.width), np.uint8)
        )
    return image, target


def read_picture(picture: Picture) -> np.ndarray:
    """(height, width, 3) uint8 RGB, upright.

    Raises:
        DetectionError: missing, damaged, or of another size than the annotation says.
    """
    try:
        found = encode_photo(picture.path.read_bytes(), _DECODE)
    except Exception as error:  # decoders raise anything at all for damaged input
        raise DetectionError(
            f"{picture.path}: cannot decode the picture: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    if (found.height, found.width) != (picture.height, picture.width):
        raise DetectionError(
            f"{picture.path}: has {found.height}x{found.width} pixels (upright), its annotation says "
            f"{picture.height}x{picture.width}: are these the pictures that were annotated?"
        )
    # The bytes belong to nobody else, and torch wants memory that it may write to.
    return np.frombuffer(bytearray(found.data), np.uint8).reshape(found.height, found.width, 3)


def check_pictures(
    pictures: Sequence[Picture], workers: int | None = None, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Decode all once: better now than in the midst of the training or behind it.

    Raises:
        DetectionError: names the first that is damaged, or of another size than its annotation says.
        Stalled: the file system does not answer.
    """
    whole = (View(picture, picture.height, picture.width) for picture in pictures)
    with closing(_load(whole, False, workers)) as checked:
        for done, _ in enumerate(checked, start=1):
            progress(done)


#: pycocotools draws under the GIL anyway, and says nowhere that two threads may.
_DRAWING = threading.Lock()


def draw_mask(segmentation: Segmentation, view: View) -> np.ndarray:
    """(h, w) uint8 of 0 and 1, in the view's pixels. Polygons are scaled before they are drawn, run lengths after
    (nearest pixel).
    """
    from pycocotools import mask as tools

    with _DRAWING:
        if isinstance(segmentation, Mapping):
            run_lengths = segmentation
            if isinstance(segmentation["counts"], list):
                run_lengths = tools.frPyObjects(segmentation, *segmentation["size"])
            own = torch.from_numpy(tools.decode(run_lengths))[None, None]
            mask = functional.interpolate(own, (view.height, view.width), mode="nearest-exact")[0, 0].numpy()
        else:
            scale = view.width / view.picture.width, view.height / view.picture.height
            polygons = [[value * scale[place % 2] for place, value in enumerate(polygon)] for polygon in segmentation]
            mask = tools.decode(tools.merge(tools.frPyObjects(polygons, view.height, view.width)))
    return np.ascontiguousarray(mask[:, ::-1] if view.flip else mask)


def to_device(
    batch: DetectionBatch, device: torch.device, normalise: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """(images (B, 3, H, W) float, channels-last, normalised, 0 in the padding; targets), on ``device``."""
    pinned = batch.images.pin_memory() if device.type == "cuda" else batch.images
    images = normalise(pinned.to(device, non_blocking=True).permute(0, 3, 1, 2))
    for image, (height, width) in zip(images, batch.sizes):
        image[:, height:] = 0
        image[:, :, width:] = 0
    targets = [{name: part.to(device, non_blocking=True) for name, part in each.items()} for each in batch.targets]
    return images, targets
