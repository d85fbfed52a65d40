"""From annotated pictures to batches: decode, scale, flip, pad; on threads, a few batches ahead.

What is random, the flip and the scale, is a function of (seed, epoch, image id): see ``draw``. Neither threads nor
processes change it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fastssl.evaluate.detection.annotations import DetectionError, Picture, Segmentation
from fastssl.evaluate.detection.average_precision import mask_tools
from fastssl.pipelines.convert.encode import encode_photo
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.plan.order import batch_indices, steps_per_epoch
from fastssl.pipelines.plan.philox import Stream, keyed_words
from fastssl.utils.cores import available_cores

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


def draw(
    pictures: Sequence[Picture], short_sides: Sequence[int], long_side: int, *, flip: bool, seed: int, epoch: int
) -> list[View]:
    """A view of each picture, its short side one of ``short_sides``: a function of (seed, epoch, image id)."""
    ids = np.array([picture.id for picture in pictures], np.int64)
    words = keyed_words(seed, Stream.DETECTION, epoch, ids)
    # The high half of a product, as for all ranges here: no division, no bias worth the name.
    chosen = (words[0].astype(np.uint64) * np.uint64(len(short_sides))) >> np.uint64(32)
    flips = (words[1] >> np.uint32(31)).astype(bool) & flip
    return [
        View(picture, *scaled_size(picture.height, picture.width, short_sides[int(side)], long_side), bool(turned))
        for picture, side, turned in zip(pictures, chosen, flips)
    ]


def training_requests(
    pictures: Sequence[Picture],
    iterations: range,
    *,
    batch_size: int,
    short_sides: Sequence[int],
    long_side: int,
    flip: bool = True,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[list[View]]:
    """This rank's part of the batch of every iteration: epoch after epoch in a new order, whole batches only.
    ``batch_size`` is this rank's.
    """
    steps = steps_per_epoch(len(pictures), batch_size, world)
    for iteration in iterations:
        epoch, step = divmod(iteration, steps)
        chosen = batch_indices(len(pictures), seed, epoch, step, batch_size, rank, world)
        yield draw([pictures[number] for number in chosen], short_sides, long_side, flip=flip, seed=seed, epoch=epoch)


def load_batches(
    requests: Iterable[list[View]], *, divisible: int, masks: bool = False, workers: int | None = None, ahead: int = 3
) -> Generator[DetectionBatch, None, None]:
    """The batches of ``requests``, in order, a picture a thread and at most ``ahead`` batches at a time. Close it, or
    run it to its end, to join the threads.

    Raises:
        DetectionError: a picture is damaged, or of another size than its annotation says.
    """
    Image.init()  # here, because loading plugins is not made for several threads at once
    waiting: deque[tuple[list[View], list[Future]]] = deque()
    pool = ThreadPoolExecutor(workers or available_cores(), thread_name_prefix="fastssl-detect")
    source = iter(requests)
    try:
        while True:
            while len(waiting) < ahead and (views := next(source, None)) is not None:
                waiting.append((views, [pool.submit(load_view, view, masks=masks) for view in views]))
            if not waiting:
                return
            views, parts = waiting.popleft()
            yield _together(views, [part.result() for part in parts], divisible)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
    pixels = read_picture(picture)
    image = torch.from_numpy(pixels)
    if (view.height, view.width) != (picture.height, picture.width):
        planes = image.permute(2, 0, 1)[None]  # channels-last in memory
        scaled = functional.interpolate(planes, (view.height, view.width), mode="bilinear", antialias=True)
        image = scaled[0].permute(1, 2, 0)
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
    pictures: Sequence[Picture],
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    *,
    masks: bool = True,
) -> None:
    """Decode all once, and with ``masks`` draw theirs: better now than in the midst of the training or behind it.

    Drawing goes one mask at a time and would be most of the work for COCO's 850,000.

    Raises:
        DetectionError: names the first that is damaged, of another size than its annotation says, or has a mask that
            cannot be drawn.
    """
    Image.init()
    # A few hundred at a time: pictures that nobody waits for should not fill the memory.
    with ThreadPoolExecutor(workers or available_cores(), thread_name_prefix="fastssl-detect") as pool:
        for first in range(0, len(pictures), 256):
            for _ in pool.map(_check if masks else read_picture, pictures[first : first + 256]):
                pass
            if progress is not None:
                progress(min(first + 256, len(pictures)))


def _check(picture: Picture) -> None:
    read_picture(picture)
    for segmentation in picture.segmentations:
        draw_mask(segmentation, View(picture, picture.height, picture.width))


#: pycocotools draws under the GIL anyway, and says nowhere that two threads may.
_DRAWING = threading.Lock()


def draw_mask(segmentation: Segmentation, view: View) -> np.ndarray:
    """(h, w) uint8 of 0 and 1, in the view's pixels. Polygons are scaled before they are drawn, run lengths after
    (nearest pixel).

    Raises:
        DetectionError: pycocotools cannot draw it.
    """
    tools, picture = mask_tools(), view.picture
    try:
        with _DRAWING:
            if isinstance(segmentation, Mapping):
                run_lengths = segmentation
                if isinstance(segmentation["counts"], list):
                    run_lengths = tools.frPyObjects(segmentation, *segmentation["size"])
                own = torch.from_numpy(tools.decode(run_lengths))[None, None]
                mask = functional.interpolate(own, (view.height, view.width), mode="nearest-exact")[0, 0].numpy()
            else:
                scale = view.width / picture.width, view.height / picture.height
                polygons = [
                    [value * scale[place % 2] for place, value in enumerate(polygon)] for polygon in segmentation
                ]
                mask = tools.decode(tools.merge(tools.frPyObjects(polygons, view.height, view.width)))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise DetectionError(
            f"{picture.path}: one of its segmentations cannot be drawn ({type(error).__name__}: {error})"
        ) from error
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
    return images, [
        {name: value.to(device, non_blocking=True) for name, value in target.items()} for target in batch.targets
    ]
