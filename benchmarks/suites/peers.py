"""Other people's ways to make two views of a photo, beside our engines, in one alternating run.

Two tables. ``crops``: decode, two antialiased random crops, flip; uint8. ``augmented``: MoCo-v2's whole augmentation,
normalised float32. Every contender reads the same ``.beton`` file, from the page cache, with the same number of threads
or worker processes, and gives batches of the same size.

Peers are written here in the way that their documentation shows, or are installed packages (lightly: ``pip install
'fastssl-vision[peers]'``). One that is not installed is named in the result, not left out silently.
"""

from __future__ import annotations

import importlib.util
import io
import random
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset, RandomSampler

from fastssl.benchmarks.harness.records import Record
from fastssl.benchmarks.harness.setting import CPU_BATCH, Setting, rates
from fastssl.benchmarks.harness.timing import Contender, measure_windows, rate, ratio, stream_window
from fastssl.benchmarks.suites.loader import BareLoop, endless, open_loader, requests_of
from fastssl.errors import counted
from fastssl.pipelines.beton.dataset import open_beton
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.engines.base import EngineStats
from fastssl.pipelines.engines.registry import engine_state
from fastssl.pipelines.plan.draw import ViewSpec

#: The two views of MoCo-v2, and the same without colour.
AUGMENTED = ViewSpec(size=224, count=2, area=(0.2, 1.0))
CROPS = replace(AUGMENTED, jitter=0.0, grey=0.0, blur=0.0)
ENGINES = ("native", "dali", "ffcv")

Stream = Callable[[], Generator[Any, None, None]]


class PillowPhotos(Dataset):
    """Photos of a ``.beton`` file through Pillow, as of a folder of JPEGs; ``transform`` makes the views of one."""

    def __init__(self, path: Path, transform: Callable[[Image.Image], Any]):
        self.path, self.transform = path, transform
        self._reader: BetonReader | None = None
        with open_beton(path) as reader:
            self._length = len(reader)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if self._reader is None:  # in the worker: this is how a careful user writes it
            self._reader = open_beton(self.path)
        return self.transform(Image.open(io.BytesIO(self._reader.encoded(index).tobytes())).convert("RGB"))


def _twice(transform: Callable[[Image.Image], Any], picture: Image.Image) -> tuple[Any, Any]:
    return transform(picture), transform(picture)


def _blurred(picture: Image.Image) -> Image.Image:
    """MoCo's blur: Pillow's, sigma uniform in 0.1 .. 2."""
    return picture.filter(ImageFilter.GaussianBlur(random.uniform(*AUGMENTED.blur_sigma)))


def torchvision_crops(size: int) -> Any:
    """Two of torchvision's random crops and flips of a Pillow picture."""
    transforms = [T.RandomResizedCrop(size, scale=CROPS.area), T.RandomHorizontalFlip(), T.PILToTensor()]
    return partial(_twice, T.Compose(transforms))


def torchvision_moco(size: int) -> Any:
    """MoCo-v2's augmentation from torchvision's transforms, twice."""
    transforms = [
        T.RandomResizedCrop(size, scale=AUGMENTED.area),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([T.Lambda(_blurred)], p=0.5),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize(AUGMENTED.mean, AUGMENTED.std),
    ]
    return partial(_twice, T.Compose(transforms))


class Workers:
    """A ``DataLoader`` without end, whose worker processes live from the first stream to ``close``: they take seconds
    to start, which is not what is measured. Between streams they fill their queue and sleep.
    """

    def __init__(self, dataset: PillowPhotos, batch_size: int, workers: int):
        sampler = RandomSampler(dataset, replacement=True, num_samples=2**40)
        # Not by fork, for our engines have threads by then.
        options: dict[str, Any] = {"multiprocessing_context": "forkserver", "persistent_workers": True}
        self._loader = DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers, **options)

    def __call__(self) -> Generator[Any, None, None]:
        yield from self._loader

    def close(self) -> None:
        if self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()  # type: ignore[attr-defined]  # private


def _ffcv_per_view(path: Path, size: int, batch_size: int, workers: int) -> Stream:
    """FFCV's loader with one pipeline a view: each decodes the photo again."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    def pipeline() -> list:
        return [RandomResizedCropRGBImageDecoder((size, size), scale=CROPS.area), RandomHorizontalFlip(), ToTensor()]

    with BetonReader(path) as reader:
        image, fields = reader.image_field, reader.field_names
        repeated = np.tile(np.arange(len(reader)), max(1, -(-64 * batch_size // len(reader))))
    second = PipelineSpec(image, decoder=None, transforms=pipeline())
    pipelines = {**dict.fromkeys(fields), image: pipeline(), "second": second}
    options = {"os_cache": True, "order": OrderOption.RANDOM, "indices": repeated, "pipelines": pipelines, "seed": 0}
    threads = torch.get_num_threads()
    loader = Loader(str(path), batch_size, workers, **options)
    torch.set_num_threads(threads)

    def stream() -> Generator[Any, None, None]:
        try:
            while True:
                yield from loader
        finally:
            torch.set_num_threads(threads)

    return stream


def _dali_per_view(path: Path, size: int, batch_size: int, workers: int) -> Stream:
    """DALI with a decoding random crop for each view."""
    from nvidia.dali import fn, pipeline_def, types

    def stream() -> Generator[Any, None, None]:
        with open_beton(path) as reader:
            order = np.random.default_rng(0)

            def encoded() -> list[np.ndarray]:
                return [reader.encoded(int(sample)) for sample in order.integers(0, len(reader), batch_size)]

            @pipeline_def(batch_size=batch_size, num_threads=workers, device_id=None, prefetch_queue_depth=2)
            def graph() -> tuple:
                source = fn.external_source(source=encoded, batch=True, dtype=types.UINT8, ndim=1)
                views = []
                for seed in (1, 2):
                    crop = fn.decoders.image_random_crop(
                        source, device="cpu", output_type=types.RGB, random_area=list(CROPS.area), seed=seed
                    )
                    view = fn.resize(crop, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)
                    views.append(fn.flip(view, horizontal=fn.random.coin_flip()))
                return tuple(views)

            pipeline = graph()
            pipeline.build()
            while True:
                yield [torch.from_dlpack(view.as_tensor()) for view in pipeline.run()]

    return stream


def missing() -> dict[str, str]:
    """What cannot take part here, and why."""
    found = {name: problem for name in ("dali", "ffcv") if (problem := engine_state(name).problem)}
    return found if importlib.util.find_spec("lightly") else {**found, "lightly": "not installed"}


def left_out() -> list[str]:
    """`missing` in words: an engine stands for our use of it and for that of its documentation."""
    lines = {name: f"{name}, ours and as its documentation has it ({why})" for name, why in missing().items()}
    if "lightly" in lines:
        lines["lightly"] = "lightly (not installed; pip install -e '.[peers]')"
    return list(lines.values())


def run(setting: Setting) -> list[Record]:
    """Measure all contenders of both tables on the CPU, each with as many threads or worker processes.

    Returns:
        One record for each of our engines and peer: ``details["part"]`` is ``crops`` or ``augmented``; a peer's
        ``ratio_to_peer`` is how many times as fast `native` is in the same rounds.
    """
    threads, batch, device, size = setting.threads, setting.batch_size or CPU_BATCH, torch.device("cpu"), AUGMENTED.size
    absent = missing()
    contenders: dict[tuple[str, str], Contender] = {}

    def add(part: str, name: str, stream: Stream, stats: EngineStats | None = None) -> None:
        window: Contender = partial(stream_window, stream, lambda _: None, stats or EngineStats(), batch, device)
        contenders[part, name] = window

    with ExitStack() as opened:
        reader, about = opened.enter_context(setting.open())
        path = reader.path
        if len(reader.files) > 1:
            absent["ffcv"] = "maps one file"
        for part, spec in (("crops", CROPS), ("augmented", AUGMENTED)):
            for engine in (name for name in ENGINES if name not in absent):
                options: dict[str, Any] = {"workers": threads, "pipeline": engine}
                loader = opened.enter_context(open_loader(reader, [spec], batch, device, **options))
                if part == "crops":  # the engine's own work: uint8 views, as the peers give them
                    add(part, engine, partial(lambda one: one.engine.run(requests_of(one)), loader), loader.stats)
                else:
                    add(part, engine, partial(endless, loader), loader.stats)
        pillow = "torchvision on Pillow in a DataLoader"
        by_pillow: list[tuple[str, str, Callable[[int], Any]]]
        by_pillow = [("crops", pillow, torchvision_crops), ("augmented", pillow, torchvision_moco)]
        if "lightly" not in absent:
            from lightly.transforms import MoCoV2Transform

            by_pillow.append(("augmented", "lightly's MoCoV2Transform in a DataLoader", MoCoV2Transform))
        for part, name, transform in by_pillow:
            add(part, name, opened.enter_context(closing(Workers(PillowPhotos(path, transform(size)), batch, threads))))
        if "ffcv" not in absent:
            add("crops", "FFCV, a pipeline for each view", _ffcv_per_view(path, size, batch, threads))
        if "dali" not in absent:
            add("crops", "DALI, decoding for each view", _dali_per_view(path, size, batch, threads))
        # What no loader on as many threads can pass: the same photos decoded and cropped, and nothing else.
        contenders["bare", ""] = BareLoop(reader, threads, [CROPS])
        windows = measure_windows(contenders, seconds=setting.seconds, runs=setting.runs)
    bare = windows.pop(("bare", ""))
    common = {"data": about, "size": size, "seconds": setting.seconds, "missing": absent}
    return [
        setting.record(
            "loader",
            device="cpu",
            pipeline=name if name in ENGINES else None,
            workers=threads,
            ceiling_name=f"bare decode and crop loop, {counted(threads, 'thread')}",
            peer=None if name == "native" else name,
            ratio_to_peer=None if name == "native" else ratio(windows[part, "native"], found),
            details={"part": part, "loader": name, **common},
            **rates(rate(found), batch, 2, ratio(found, bare)),
        )
        for (part, name), found in windows.items()
    ]
