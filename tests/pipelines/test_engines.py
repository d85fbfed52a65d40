"""The three engines: one plan, one picture, whoever renders it; and the same manners."""

from __future__ import annotations

import gc
import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jpeg_bytes, make_photo, need_engine
from PIL import Image
from untidy import untidy

from fastssl.pipelines import BetonReader, BetonWriter, FastSSLError, JpegError, ViewLoader, ViewSpec
from fastssl.pipelines.beton.format import MODE_RAW
from fastssl.pipelines.engines.base import EngineStats, thread_initializer
from fastssl.pipelines.engines.damaged import SampleCheck
from fastssl.pipelines.engines.registry import choose_engine, engine_state
from fastssl.pipelines.ops import jpeg

pytestmark = pytest.mark.engines

TWO = [ViewSpec(size=32, count=2, area=(0.2, 1.0))]
TWO_AND_SIX = [
    ViewSpec(size=40, count=2, area=(0.3, 1.0), interpolation="bicubic"),
    ViewSpec(size=24, count=6, area=(0.05, 0.3), solarise=0.2),
]
OTHERS = ["dali", "ffcv", "torchcodec"]


@pytest.fixture(autouse=True)
def installed(request: pytest.FixtureRequest) -> None:
    engine = getattr(request.node, "callspec", None) and request.node.callspec.params.get("engine")
    if engine in OTHERS:
        need_engine(engine)


def views(path: Path, specs: list[ViewSpec], **options: object) -> list[tuple[list[int], list[torch.Tensor]]]:
    with ViewLoader(path, specs, 12, seed=5, **options) as loader:
        return [(batch.index.tolist(), [v.clone() for v in batch.views]) for batch in loader.epoch(2)]


def grey_levels(made: list, reference: list, specs: list[ViewSpec]) -> tuple[float, float]:
    """Mean and largest difference in 1/255, over all views, before normalisation."""
    scale = 255 * torch.tensor(specs[0].std).view(3, 1, 1)
    pairs = [(a, b) for (_, mine), (_, theirs) in zip(made, reference) for a, b in zip(mine, theirs)]
    apart = [((a - b) * scale).abs().flatten() for a, b in pairs]
    return float(torch.cat(apart).mean()), float(torch.cat(apart).max())


@pytest.mark.parametrize("specs", [TWO, TWO_AND_SIX], ids=["2 views", "2 + 6 views"])
@pytest.mark.parametrize("engine", OTHERS)
def test_the_views_are_natives(engine: str, specs: list[ViewSpec], beton: Path) -> None:
    reference, made = views(beton, specs), views(beton, specs, pipeline=engine)
    assert [index for index, _ in made] == [index for index, _ in reference]
    for (_, mine), spec in zip(made, [specs] * len(made)):
        for view, group in zip(mine, spec):
            assert view.shape == (12 * group.count, 3, group.size, group.size)
            assert view.is_contiguous(memory_format=torch.channels_last)
    mean, _ = grey_levels(made, reference, specs)
    assert mean <= 0.5  # the pictures' own noise apart: the promise is 1


@pytest.mark.parametrize("engine", OTHERS)
def test_the_crops_are_natives_to_a_few_grey_levels(engine: str, beton: Path) -> None:
    """Without colour, which can amplify a rounding (hue of a near-grey pixel)."""
    plain = [ViewSpec(size=32, count=2, area=(0.1, 1.0), jitter=0, grey=0, blur=0)]
    mean, largest = grey_levels(views(beton, plain, pipeline=engine), views(beton, plain), plain)
    assert mean <= 0.3 and largest <= (12 if engine == "dali" else 1.01)


@pytest.mark.parametrize("engine", OTHERS)
def test_batches_of_any_size_and_kept_ones(engine: str, beton: Path) -> None:
    with ViewLoader(beton, [ViewSpec.evaluation(32)], 20, shuffle=False, drop_last=False, pipeline=engine) as loader:
        for _ in range(2):  # a second epoch on the same loader
            kept, copies = [], []
            for batch in loader.epoch(0):
                kept.append(batch)
                copies.append(batch.views[0].clone())
            assert torch.cat([b.index for b in kept]).tolist() == list(range(48))
            assert all(torch.equal(b.views[0], c) for b, c in zip(kept, copies))


@pytest.mark.parametrize("engine", OTHERS)
def test_leaving_early_leaves_nothing(engine: str, beton: Path) -> None:
    before, torch_threads = set(threading.enumerate()), torch.get_num_threads()
    with ViewLoader(beton, TWO, 8, pipeline=engine, seed=5) as loader:
        for _ in loader.epoch(2):
            break
        again = [batch.index.tolist() for batch in loader.epoch(2, start_step=3)]
        assert again == [loader.request(2, step).index.tolist() for step in range(3, 6)]
        loader.epoch(2).close()
        assert torch.get_num_threads() == torch_threads
        iterator = loader.epoch(0)
        next(iterator)
        with pytest.raises(FastSSLError, match="still running"):
            next(iter(loader.epoch(0)))
        del iterator
    with pytest.raises(FastSSLError, match="closed"):
        next(iter(loader.epoch(0)))
    del loader
    gc.collect()
    assert set(threading.enumerate()) <= before
    assert torch.get_num_threads() == torch_threads


@pytest.mark.parametrize("side_file", [False, True], ids=["no checksums", "checksums"])
@pytest.mark.parametrize("engine", ["native", *OTHERS])
def test_a_damaged_picture_is_named_or_passed_over(
    engine: str, side_file: bool, beton: Path, damaged: tuple[Path, int]
) -> None:
    path, sample = damaged
    if side_file:
        Path(f"{path}.json").write_text(Path(f"{beton}.json").read_text())
    with pytest.raises(JpegError, match=rf"sample {sample}\b"):
        views(path, TWO, pipeline=engine)
    with ViewLoader(path, TWO, 24, seed=5, pipeline=engine, on_bad="skip") as loader:
        made = [(b.index.tolist(), b.views[0].clone()) for b in loader.epoch(0)]
        assert loader.stats.skipped == [sample]
    for index, pixels in made:
        assert sample not in index
        for twice in {n for n in index if index.count(n) > 1}:
            first, second = [p for p, n in enumerate(index) if n == twice]
            assert torch.equal(pixels[first], pixels[second])


@pytest.mark.parametrize(
    ("engine", "crops"), [("native", "host"), ("native", "device"), *((engine, "auto") for engine in OTHERS)]
)
def test_who_stands_in_does_not_depend_on_the_number_of_processes(
    engine: str, crops: str, beton: Path, tmp_path: Path
) -> None:
    """A third of the photos is damaged, so that many lie at the edge of a process's part, and some parts have no good
    one at all.
    """
    path, content = tmp_path / "damaged.beton", bytearray(beton.read_bytes())
    with BetonReader(beton) as reader:
        broken = set(range(0, len(reader), 3))
        for sample in broken:
            start, size = int(reader.offsets[sample]), int(reader.sizes[sample])
            content[start + size // 2 : start + size] = b"\xff\xd9" + bytes(size - size // 2 - 2)
    path.write_bytes(content)

    def of(world: int) -> tuple[list[np.ndarray], list[torch.Tensor], list[int]]:
        """(samples of each batch, first group's views of each, (2, B, ...), what was passed over) of all processes
        together.
        """
        parts, skipped = [], []
        for rank in range(world):
            with ViewLoader(
                path, TWO, 16 // world, rank=rank, world=world, pipeline=engine, crops=crops, on_bad="skip", workers=1
            ) as loader:
                parts.append(
                    [(b.index.numpy().copy(), b.views[0].clone().unflatten(0, (2, -1))) for b in loader.epoch(0)]
                )
                skipped += loader.stats.skipped
        batches = list(zip(*parts))
        return (
            [np.concatenate([i for i, _ in b]) for b in batches],
            [torch.cat([v for _, v in b], 1) for b in batches],
            sorted(skipped),
        )

    index, views, skipped = of(1)
    assert len(index) == 3 and set(skipped) == broken and not broken & set(np.concatenate(index).tolist())
    for world in (2, 4, 8):
        others, pixels, passed_over = of(world)
        assert passed_over == skipped
        np.testing.assert_array_equal(np.stack(others), np.stack(index))
        for mine, whole in zip(pixels, views):
            torch.testing.assert_close(mine, whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("engine", ["native", *OTHERS])
def test_pictures_that_only_warn_are_pictures(engine: str, tmp_path: Path) -> None:
    """In a file as FFCV writes it, without checksums. With the same views as the pictures had before."""
    tidy = [jpeg_bytes(make_photo(k, 48, 64), progressive=k == 1) for k in range(2)]
    made = {name: [data, whole] for whole in tidy for name, data in untidy(whole).items()}
    for which, path in enumerate([tmp_path / "untidy.beton", tmp_path / "tidy.beton"]):
        with BetonWriter(path, len(made)) as writer:
            for pair in made.values():
                writer.add(pair[which], 48, 64)
    for mine, theirs in zip(*[views(tmp_path / f"{kind}.beton", TWO, pipeline=engine) for kind in ("untidy", "tidy")]):
        assert mine[0] == theirs[0] and all(torch.equal(a, b) for a, b in zip(mine[1], theirs[1]))


def test_other_decoders_are_given_pictures_that_do_not_warn(tmp_path: Path) -> None:
    good = jpeg_bytes(make_photo(0, 48, 64))
    with BetonWriter(tmp_path / "untidy.beton", 2) as writer:
        for data in (good, next(iter(untidy(good).values()))):
            writer.add(data, 48, 64)
    with BetonReader(tmp_path / "untidy.beton") as reader, ThreadPoolExecutor(1) as pool:
        check = SampleCheck(reader, "fail", EngineStats(), pool)
        check._look_at([0, 1])
        assert check.encoded(0).tobytes() == good
        jpeg.decode(check.encoded(1), repair=False)


@pytest.mark.parametrize("engine", OTHERS)
def test_no_engine_turns_pictures_by_exif(engine: str, tmp_path: Path) -> None:
    """The converter has done it; a file of other origin is as the other engines take it."""
    exif = Image.Exif()
    exif[0x0112] = 3
    for name, options in (("turned", {"exif": exif}), ("plain", {})):
        with BetonWriter(tmp_path / f"{name}.beton", 12) as writer:
            for k in range(12):
                writer.add(jpeg_bytes(make_photo(k, 48, 64), **options), 48, 64)
    (_, (turned,)), (_, (plain,)) = [
        views(tmp_path / f"{name}.beton", TWO, pipeline=engine)[0] for name in ("turned", "plain")
    ]
    assert torch.equal(turned, plain)


@pytest.mark.parametrize("engine", ["native", *OTHERS])
def test_a_batch_of_nothing_but_damage_is_an_error(engine: str, damaged: tuple[Path, int]) -> None:
    path, sample = damaged
    with (
        ViewLoader(path, TWO, 1, indices=[sample], pipeline=engine, on_bad="skip") as loader,
        pytest.raises(FastSSLError, match="every picture of a batch is damaged"),
    ):
        list(loader.epoch(0))


def test_raw_pictures(tmp_path: Path) -> None:
    need_engine("ffcv")
    need_engine("dali")
    path = tmp_path / "raw.beton"
    with BetonWriter(path, 12) as writer:
        for k in range(12):
            pixels = make_photo(k, 40, 50)
            writer.add(np.ascontiguousarray(pixels), 40, 50, label=k, mode=MODE_RAW)
    mean, _ = grey_levels(views(path, TWO, pipeline="ffcv"), views(path, TWO), TWO)
    assert mean <= 0.5
    for engine in ("dali", "torchcodec"):
        need_engine(engine)
        with pytest.raises(FastSSLError, match=f"12 pictures of it stored raw, which {engine} cannot decode"):
            ViewLoader(path, TWO, 4, pipeline=engine)


def test_what_is_missing_is_said_with_its_remedy(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, *rest: object):
        if name == "ffcv":
            raise ModuleNotFoundError("No module named 'ffcv'", name="ffcv")
        if name == "nvidia.dali":
            raise OSError("libnvjpeg.so.13: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    assert engine_state("native").problem is None
    with pytest.raises(
        FastSSLError,
        match=r"--pipeline ffcv: not installed; apt-get install .*libopencv-dev.*pip install -e '\.\[ffcv\]'",
    ):
        ViewLoader(beton, TWO, 4, pipeline="ffcv")
    with pytest.raises(
        FastSSLError,
        match=r"--pipeline dali: installed, but does not load \(OSError: libnvjpeg.*pip install -e '\.\[dali\]'",
    ):
        ViewLoader(beton, TWO, 4, pipeline="dali")


def test_dali_refuses_views_that_it_would_render_otherwise(beton: Path) -> None:
    need_engine("dali")
    with pytest.raises(FastSSLError, match="views of 15 px are below 16"):
        ViewLoader(beton, [*TWO, ViewSpec(size=15)], 4, pipeline="dali")
    smallest = [ViewSpec(size=16, count=2, area=(0.2, 1.0))]
    mean, _ = grey_levels(views(beton, smallest, pipeline="dali"), views(beton, smallest), smallest)
    assert mean <= 1.0


def test_options_that_do_not_belong_together(beton: Path) -> None:
    with pytest.raises(FastSSLError, match="crops='device' is a choice of the native engine"):
        ViewLoader(beton, TWO, 4, pipeline="dali", crops="device")
    with pytest.raises(FastSSLError, match="pipeline='tfdata' is not one of auto, native, dali, ffcv, torchcodec"):
        ViewLoader(beton, TWO, 4, pipeline="tfdata")


def test_auto_chooses_and_says_why(beton: Path) -> None:
    name, why = choose_engine(torch.device("cpu"))
    assert name == "native" and "fastest" in why
    assert choose_engine(torch.device("cuda"))[0] == "native"
    with ViewLoader(beton, TWO, 4) as loader:
        assert loader.engine.name == "native"


def test_a_thread_that_talks_to_a_gpu_begins_at_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """To CUDA a new thread is at GPU 0; of a machine's eight processes seven would each take half a gigabyte of it."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for device in (torch.device("cpu"), torch.device("cuda", 3), torch.device("cuda")):
        thread_initializer(device)()
    assert taken == [3, 5]


@pytest.mark.parametrize("engine", ["native", "ffcv"])
def test_every_thread_of_an_engine_is_told_its_device(
    engine: str, beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, torch.device]] = []
    module = importlib.import_module(f"fastssl.pipelines.engines.{'native' if engine == 'native' else 'ahead'}")
    monkeypatch.setattr(
        module, "thread_initializer", lambda device: lambda: told.append((threading.get_ident(), device))
    )
    views(beton, TWO, pipeline=engine, workers=2)
    assert {device for _, device in told} == {torch.device("cpu")}
    assert len({thread for thread, _ in told} - {threading.get_ident()}) == (2 if engine == "native" else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["native", *OTHERS])
@pytest.mark.parametrize("colour", [True, False])
def test_views_are_whole_where_the_host_is_ahead_of_the_gpu(engine: str, colour: bool, beton: Path) -> None:
    """Each batch is read some tens of milliseconds after the host went on to the next ones, as in training."""
    specs, busy = [ViewSpec(size=64), ViewSpec(size=48, count=3)], torch.randn(8192, 8192, device="cuda")

    def read(work: int) -> list[torch.Tensor]:
        found = []
        with ViewLoader(beton, specs, 12, seed=5, pipeline=engine, device="cuda", colour=colour, workers=2) as loader:
            for epoch in range(6):
                for batch in loader.epoch(epoch):
                    for _ in range(work):
                        busy @ busy
                    found += [view.clone() for view in batch.views]
                    if not work:
                        torch.cuda.synchronize()
        return found

    expected, found = read(0), read(4)
    assert len(found) == len(expected) > 24
    for one, other in zip(found, expected):
        assert (one.float() - other.float()).abs().mean() < (0.02 if colour else 1)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["native", *OTHERS])
def test_the_views_on_a_gpu_are_the_ones_on_a_cpu(engine: str, beton: Path) -> None:
    reference = views(beton, TWO_AND_SIX)
    made = [
        (index, [v.cpu() for v in mine]) for index, mine in views(beton, TWO_AND_SIX, pipeline=engine, device="cuda")
    ]
    mean, _ = grey_levels(made, reference, TWO_AND_SIX)
    assert mean <= 1


def test_readers_know_their_fields(beton: Path) -> None:
    with BetonReader(beton) as reader:
        assert reader.field_names == ["image", "label"] and reader.image_field == "image"
