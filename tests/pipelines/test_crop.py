from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V2
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision_views import pillow_crop, torchvision_crop

from fastssl.pipelines.ops import crop
from fastssl.pipelines.ops.crop import boxes_of, crop_resize_device, crop_resize_host, filter_matrices, plan_chunks
from fastssl.pipelines.plan.draw import VIEW_DTYPE, ViewSpec, draw_plan, draw_plans

SIZES = [
    (427, 640),
    (240, 320),
    (320, 213),
    (64, 64),
    (65, 63),
    (30, 200),
    (200, 24),
    (2, 30),
    (1, 1),
    (3, 2),
    (131, 97),
    (28, 28),
]


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    """Pieces of two real photographs, in many sizes."""
    china, flower = load_sample_images().images
    rng = np.random.default_rng(0)
    pieces = []
    for k, (height, width) in enumerate(SIZES):
        source = (china, flower)[k % 2]
        top, left = rng.integers(0, 427 - height + 1), rng.integers(0, 640 - width + 1)
        pieces.append(source[top : top + height, left : left + width].copy())
    return pieces


def pack(pictures: list[np.ndarray], slack: int = 0) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    heights, widths = (np.array([picture.shape[axis] for picture in pictures]) for axis in (0, 1))
    offsets = np.concatenate([[0], np.cumsum(heights * widths * 3)[:-1]])
    packed = np.concatenate([picture.ravel() for picture in pictures] + [np.full(slack, 77, dtype=np.uint8)])
    return torch.from_numpy(packed), offsets, heights, widths


def plans_for(specs: list[ViewSpec], heights: np.ndarray, widths: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    return draw_plans(specs, seed, 0, np.arange(len(heights)), heights, widths)


def host(picture: np.ndarray, record: np.void, spec: ViewSpec) -> np.ndarray:
    views = np.zeros((1, 1, spec.size, spec.size, 3), np.uint8)
    crop_resize_host(picture, boxes_of(np.array([[record]]))[0], spec, views, 0)
    return views[0, 0]


def pillow(picture: np.ndarray, record: np.void, spec: ViewSpec) -> np.ndarray:
    return np.asarray(pillow_crop(picture, record, spec))


def pillow_in_passes(picture: np.ndarray, record: np.void, spec: ViewSpec) -> np.ndarray:
    """Pillow along the rows, then along the columns, as it always did until version 13 chose by the shape."""
    top, left, height, width = (int(record[name]) for name in ("top", "left", "height", "width"))
    how = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[spec.interpolation]
    narrow = Image.fromarray(picture[top : top + height, left : left + width]).resize((spec.size, height), how)
    view = np.asarray(narrow.resize((spec.size, spec.size), how))
    return view[:, ::-1] if record["flip"] else view


def torchvision(picture: np.ndarray, record: np.void, spec: ViewSpec) -> np.ndarray:
    return torchvision_crop(picture, record, spec).permute(1, 2, 0).numpy()


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    error = np.abs(a.astype(int) - b.astype(int))
    return float(error.mean()), int(error.max())


def box(top: int, left: int, height: int, width: int, flip: bool = False) -> np.void:
    record = np.zeros((), dtype=VIEW_DTYPE)
    record["top"], record["left"], record["height"], record["width"], record["flip"] = top, left, height, width, flip
    return record


def device(
    pictures: list[np.ndarray], plans: list[np.ndarray], specs: list[ViewSpec], slack: int = 0
) -> list[np.ndarray]:
    """crop_resize_device as (count, B, S, S, 3) arrays."""
    outputs = crop_resize_device(*pack(pictures, slack), plans, specs)
    return [
        output.permute(0, 2, 3, 1).numpy().reshape(*plan.shape, spec.size, spec.size, 3)
        for output, plan, spec in zip(outputs, plans, specs)
    ]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_both_paths_equal_torchvision_and_pillow(photos: list[np.ndarray], interpolation: str) -> None:
    """Global and local views of every picture: reductions, enlargements, flips, pictures of a few pixels."""
    specs = [
        ViewSpec(size=96, count=2, interpolation=interpolation),
        ViewSpec(size=33, count=3, area=(0.05, 0.3), interpolation=interpolation),
    ]
    _, _, heights, widths = pack(photos)
    plans = plans_for(specs, heights, widths)
    on_device = device(photos, plans, specs)
    for spec, plan, views in zip(specs, plans, on_device):
        for (view, sample), record in np.ndenumerate(plan):
            expected = torchvision(photos[sample], record, spec)
            on_host = host(photos[sample], record, spec)
            for ours in (on_host, views[view, sample]):
                mean, most = difference(ours, pillow(photos[sample], record, spec))
                # The cubic overshoots and is cut to 8 bits between the passes; which pass is first then matters.
                assert mean <= 0.5 and most <= (1 if interpolation == "bilinear" else 12), (
                    photos[sample].shape,
                    record,
                )
            for ours, bound in ((on_host, 0.2), (views[view, sample], 0.5)):
                mean, most = difference(ours, expected)  # torchvision's uint8 cubic keeps its weights in 16 bits
                assert most <= 3 and mean <= bound, (photos[sample].shape, record)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_host_path_equals_pillow_whatever_the_box(interpolation: str) -> None:
    """Few rows, one column, boxes up to the last pixel, enlarged and reduced: every way through the compiled loops."""
    rng = np.random.default_rng(0)
    for trial in range(300):
        height, width = rng.integers(1, 90, 2)
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        spec = ViewSpec(size=int(rng.integers(8, 60)), interpolation=interpolation)
        high, wide = rng.integers(1, height + 1), rng.integers(1, width + 1)
        record = box(
            rng.integers(0, height - high + 1), rng.integers(0, width - wide + 1), high, wide, flip=bool(trial % 2)
        )
        mean, most = difference(host(picture, record, spec), pillow_in_passes(picture, record, spec))
        # What lies half way between two grey levels may round otherwise, in both passes.
        assert most <= 2 and mean < 0.2, (picture.shape, record, spec.size)


def test_the_host_path_reads_and_writes_nothing_else() -> None:
    """Its vectors are a byte longer than a pixel: neighbours in the batch and the bytes behind the picture are left
    alone.
    """
    spec = ViewSpec(size=9, count=2)
    picture = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    boxes = boxes_of(np.array([[box(0, 0, 7, 11)], [box(3, 5, 4, 6, flip=True)]]))[0]
    views = np.full((2, 3, 9, 9, 3), 77, np.uint8)
    crop_resize_host(picture, boxes, spec, views, 1)
    assert (views[:, [0, 2]] == 77).all()
    guarded = np.full(picture.size + 64, 255, np.uint8)
    guarded[: picture.size] = picture.ravel()
    again = np.zeros_like(views)
    crop_resize_host(guarded[: picture.size].reshape(picture.shape), boxes, spec, again, 1)
    assert np.array_equal(views[:, 1], again[:, 1])


def test_the_host_path_refuses_what_would_leave_its_memory() -> None:
    spec, picture, views = ViewSpec(size=8), np.zeros((10, 12, 3), np.uint8), np.zeros((1, 2, 8, 8, 3), np.uint8)
    for wrong in (
        [2**63 - 10, 0, 20, 12, 0],
        [-1, 0, 5, 5, 0],
        [0, -1, 5, 5, 0],
        [6, 0, 5, 5, 0],
        [0, 8, 5, 5, 0],
        [0, 0, 0, 5, 0],
        [0, 0, 5, 0, 0],
    ):
        with pytest.raises(ValueError, match="outside its picture"):
            crop_resize_host(picture, np.array([wrong]), spec, views, 0)
    box_ = np.array([[0, 0, 5, 5, 0]])
    frozen = views.copy()
    frozen.setflags(write=False)
    for image, boxes, target in (
        (picture[..., :1].copy(), box_, views),
        (np.zeros((10, 12, 4), np.uint8), box_, views),
        (picture[None], box_, views),
        (picture[:, ::2], box_, views),
        (picture.astype(np.float32), box_, views),
        (picture, box_[:, :4], views),
        (picture, box_[0], views),
        (picture, box_.astype(np.int32), views),
        (picture, box_, frozen),
        (picture, box_, views[0]),
    ):
        with pytest.raises(ValueError, match="must be"):
            crop_resize_host(image, boxes, spec, target, 0)
    for place, sizes in ((2, (1, 2, 8, 8, 3)), (-1, (1, 2, 8, 8, 3)), (0, (2, 2, 8, 8, 3)), (0, (1, 2, 9, 9, 3))):
        with pytest.raises(ValueError, match="do not go to place"):
            crop_resize_host(picture, np.array([[0, 0, 5, 5, 0]]), spec, np.zeros(sizes, np.uint8), place)


def test_an_extreme_reduction_keeps_its_many_small_weights() -> None:
    """60,000 pixels become one: each weighs less than a unit of the weights' 14 bits."""
    rng = np.random.default_rng(0)
    for width, size in ((60_000, 1), (60_000, 7), (9_000, 16)):
        picture = (rng.random((3, width, 3)) * np.linspace(0, 255, width)[:, None]).astype(np.uint8)
        for interpolation in ("bilinear", "bicubic"):
            spec, record = ViewSpec(size=size, interpolation=interpolation), box(0, 0, 3, width)
            assert difference(host(picture, record, spec), pillow_in_passes(picture, record, spec))[1] <= 2, (
                width,
                size,
                interpolation,
            )


@pytest.mark.slow
def test_the_compiled_loops_read_only_memory_that_is_theirs() -> None:
    """What the C library writes over freed memory must not show: numba frees an array behind the last line that names
    it.
    """
    code = """
import zlib
import numpy as np
from fastssl.pipelines.ops.augment import augment
from fastssl.pipelines.ops.crop import boxes_of, crop_resize_host
from fastssl.pipelines.plan.draw import ViewSpec, draw_plan
import torch
rng, check = np.random.default_rng(0), 0
for trial in range(120):
    height, width, size = (int(n) for n in rng.integers((4, 4, 8), (400, 400, 100)))
    spec = ViewSpec(size=size, count=2, interpolation=("bilinear", "bicubic")[trial % 2], solarise=0.3)
    plan = draw_plan(spec, first_view=0, seed=0, epoch=0, sample_ids=[trial], heights=[height], widths=[width])
    views = np.zeros((2, 1, size, size, 3), np.uint8)
    crop_resize_host(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), boxes_of(plan)[0], spec, views, 0)
    check = zlib.crc32(plan.tobytes(), zlib.crc32(views.tobytes(), check))
    coloured = augment(torch.from_numpy(views[:, 0]).permute(0, 3, 1, 2), plan[:, 0], spec)
    check = zlib.crc32(coloured.contiguous().numpy().tobytes(), check)
print(check)
"""
    found = set()
    for byte in ("0", "85", "170"):
        environment = {**os.environ, "MALLOC_PERTURB_": byte, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
        found.add(
            subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
            ).stdout
        )
    assert len(found) == 1


def test_device_path_with_half_precision(photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of the GPU, on the CPU: float16 weights and intermediate stay within one grey level."""
    for interpolation in ("bilinear", "bicubic"):
        spec = ViewSpec(size=64, interpolation=interpolation)
        picture = photos[1]
        record = box(10, 20, 190, 250)
        source = torch.from_numpy(picture).half().permute(0, 2, 1)[None].contiguous()  # (1, H, 3, W)
        boxes = torch.tensor([[[10, 20, 190, 250, 0]]])
        plan = np.array([[record]], dtype=VIEW_DTYPE)
        output = torch.zeros((1, 1, 64, 64, 3), dtype=torch.uint8)
        crop._crop_group(source, boxes, plan, spec, torch.tensor([0]), output)
        mean, most = difference(output[0, 0].numpy(), torchvision(picture, record, spec))
        assert most <= (1 if interpolation == "bilinear" else 2) and mean <= 0.3


def slow_weights(start: int, length: int, flip: bool, spec: ViewSpec, extent: int) -> np.ndarray:
    """Pillow's precompute_coeffs, one output pixel at a time in float64."""
    radius = 1.0 if spec.interpolation == "bilinear" else 2.0

    def kernel(x: float) -> float:
        x = abs(x)
        if spec.interpolation == "bilinear":
            return max(0.0, 1.0 - x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    scale = length / spec.size
    stretch = max(scale, 1.0)
    matrix = np.zeros((spec.size, extent))
    for row in range(spec.size):
        center = (row + 0.5) * scale
        for pixel in range(
            max(0, int(center - radius * stretch + 0.5)), min(length, int(center + radius * stretch + 0.5))
        ):
            matrix[spec.size - 1 - row if flip else row, start + pixel] = kernel((pixel - center + 0.5) / stretch)
    return matrix / matrix.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_filter_matrices_equal_the_slow_weights(interpolation: str) -> None:
    rng = np.random.default_rng(3)
    for size, extent in [(7, 1), (7, 3), (16, 16), (16, 200), (5, 333), (64, 40)]:
        spec = ViewSpec(size=size, interpolation=interpolation)
        length = rng.integers(1, extent + 1, (4, 2))
        length[0], length[1, 0] = extent, 1
        start = rng.integers(0, extent - length + 1)
        flip = rng.integers(0, 2, (4, 2))
        matrices = filter_matrices(
            *(torch.from_numpy(a) for a in (start, length, flip)), spec, extent, int(length.max()), torch.float32
        )
        for place in np.ndindex(4, 2):
            expected = slow_weights(int(start[place]), int(length[place]), bool(flip[place]), spec, extent)
            assert np.abs(matrices[place].numpy() - expected).max() < 2e-5


def test_pixels_outside_the_box_play_no_part(photos: list[np.ndarray]) -> None:
    picture, other = photos[1].copy(), photos[1].copy()
    other[:50], other[170:], other[:, :60], other[:, 260:] = 0, 255, 255, 0
    record, spec = box(50, 60, 120, 200), ViewSpec(size=40)
    assert np.array_equal(host(picture, record, spec), host(other, record, spec))
    plan = np.array([[record, record]], dtype=VIEW_DTYPE)
    views = device([picture, other], [plan], [spec])[0]
    assert np.array_equal(views[0, 0], views[0, 1])


@pytest.mark.parametrize("size", [1, 5, 64, 224])
def test_flip_mirrors(photos: list[np.ndarray], size: int) -> None:
    spec = ViewSpec(size=size)
    plain, flipped = box(5, 9, 150, 170), box(5, 9, 150, 170, flip=True)
    assert np.array_equal(host(photos[1], flipped, spec), host(photos[1], plain, spec)[:, ::-1])
    views = device([photos[1]], [np.array([[plain], [flipped]], dtype=VIEW_DTYPE)], [ViewSpec(size=size, count=2)])[0]
    assert np.array_equal(views[1, 0], views[0, 0][:, ::-1])


def test_enlarging_one_pixel(photos: list[np.ndarray]) -> None:
    for interpolation in ("bilinear", "bicubic"):
        spec, record = ViewSpec(size=9, interpolation=interpolation), box(3, 4, 1, 1, flip=True)
        expected = np.broadcast_to(photos[0][3, 4], (9, 9, 3))
        assert np.array_equal(host(photos[0], record, spec), expected)
        assert np.array_equal(device([photos[0]], [np.array([[record]], dtype=VIEW_DTYPE)], [spec])[0][0, 0], expected)


def test_read_only_pictures_are_welcome(photos: list[np.ndarray]) -> None:
    """A raw sample may be a view of a memory-mapped file, and nobody is warned of it."""
    picture = photos[3].copy()
    picture.setflags(write=False)
    # Of our own warnings only: what else is collected meanwhile may warn of a file that another test left open.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert np.array_equal(host(picture, box(0, 0, 64, 64), ViewSpec(size=64)), picture)


def test_layout_order_and_spare_bytes(photos: list[np.ndarray]) -> None:
    """View-major channels-last output; the same pixels whether or not bytes follow the last picture."""
    specs = [ViewSpec(size=20, count=2), ViewSpec(size=12, count=1)]
    _, _, heights, widths = pack(photos)
    plans = plans_for(specs, heights, widths)
    tight, spare = (
        crop_resize_device(*pack(photos), plans, specs),
        crop_resize_device(*pack(photos, slack=4000), plans, specs),
    )
    for spec, a, b in zip(specs, tight, spare):
        assert a.shape == (spec.count * len(photos), 3, spec.size, spec.size) and a.dtype == torch.uint8
        assert a.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a, b)


def test_a_sample_does_not_depend_on_its_company(photos: list[np.ndarray]) -> None:
    spec = ViewSpec(size=24, count=2)
    _, _, heights, widths = pack(photos)
    plan = plans_for([spec], heights, widths)[0]
    together = device(photos, [plan], [spec])[0]
    for sample in range(len(photos)):
        alone = device([photos[sample]], [plan[:, sample : sample + 1]], [spec])[0]
        assert difference(alone[:, 0], together[:, sample])[1] <= 1  # another padding, another order of summation


def test_many_small_chunks_give_the_same(photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ViewSpec(size=24, count=2)
    _, _, heights, widths = pack(photos)
    plan = plans_for([spec], heights, widths)[0]
    together = device(photos, [plan], [spec])[0]
    monkeypatch.setattr(
        crop, "plan_chunks", lambda *args, **kwargs: [np.array([k]) for k in reversed(range(len(photos)))]
    )
    assert difference(device(photos, [plan], [spec])[0], together)[1] <= 1


def test_chunks_hold_every_sample_once_and_bound_memory() -> None:
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(30, 600, 300), rng.integers(30, 600, 300)
    heights[17], widths[17] = 3024, 3024
    specs = [ViewSpec(size=224, count=2), ViewSpec(size=96, count=6)]
    budget = 2**27
    chunks = plan_chunks(heights, widths, specs, 4, budget)
    assert np.array_equal(np.sort(np.concatenate(chunks)), np.arange(300))
    for chunk in chunks:
        height, width = heights[chunk].max(), widths[chunk].max()
        padded, own = len(chunk) * height * width, (heights[chunk] * widths[chunk]).sum()
        assert padded <= max(1.4 * own, 2e6)
        if len(chunk) > 1:
            assert len(chunk) * (3 * height * width * 5) < budget
    assert [17] in [chunk.tolist() for chunk in chunks]
    # Pictures of one size are cut by the budget alone, and a batch of thumbnails is one chunk.
    assert len(plan_chunks(np.full(64, 28), np.full(64, 28), specs, 4, 2**30)) == 1
    assert 2 <= len(plan_chunks(np.full(64, 400), np.full(64, 400), specs, 4, budget)) <= 16
    assert plan_chunks(np.empty(0, int), np.empty(0, int), specs, 4, budget) == []


def test_evaluation_equals_resize_and_center_crop(photos: list[np.ndarray]) -> None:
    spec = ViewSpec.evaluation(224)

    def expected(picture: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(picture).permute(2, 0, 1)
        return V2.center_crop(V2.resize(tensor, [256], antialias=True), [224]).permute(1, 2, 0).numpy()

    china = load_sample_images().images[0]
    same = china[:256, :340].copy()  # 256 high: nothing to resize, so the crop is exact
    # 427 high: the box would begin at 26.7 and is put at 26: 0.4 of an output pixel, on a picture full of roof tiles.
    for picture, bound in [(same, 0.0), (china[:, :512].copy(), 5.0)]:
        height, width, _ = picture.shape
        plan = draw_plan(spec, first_view=0, seed=0, epoch=0, sample_ids=[0], heights=[height], widths=[width])
        for view in (host(picture, plan[0, 0], spec), device([picture], [plan], [spec])[0][0, 0]):
            assert difference(view, expected(picture))[0] <= bound
    # With a box that is a whole number of pixels only the border differs, where Resize has seen one pixel more.
    smooth = (
        V2.resize(torch.from_numpy(china[:, :640].copy()).permute(2, 0, 1), [512, 640], antialias=True)
        .permute(1, 2, 0)
        .contiguous()
        .numpy()
    )
    plan = draw_plan(spec, first_view=0, seed=0, epoch=0, sample_ids=[0], heights=[512], widths=[640])
    for view in (host(smooth, plan[0, 0], spec), device([smooth], [plan], [spec])[0][0, 0]):
        assert difference(view[1:-1, 1:-1], expected(smooth)[1:-1, 1:-1])[1] <= 1


def test_wrong_arguments_are_refused(photos: list[np.ndarray]) -> None:
    spec = ViewSpec(size=8)
    packed, offsets, heights, widths = pack(photos)
    plan = plans_for([spec], heights, widths)[0]
    with pytest.raises(ValueError, match="outside the packed buffer"):
        crop_resize_device(packed[:-1], offsets, heights, widths, [plan], [spec])
    with pytest.raises(ValueError, match="one plan of shape"):
        crop_resize_device(packed, offsets, heights, widths, [plan[:, 1:]], [spec])
    with pytest.raises(ValueError, match="one shape"):
        crop_resize_device(packed, offsets, heights[1:], widths, [plan], [spec])


def test_empty_batch() -> None:
    spec = ViewSpec(size=8, count=2)
    none = np.empty(0, dtype=np.int64)
    views = crop_resize_device(
        torch.empty(0, dtype=torch.uint8), none, none, none, [np.empty((2, 0), dtype=VIEW_DTYPE)], [spec]
    )
    assert views[0].shape == (0, 3, 8, 8)


def test_host_path_from_several_threads(photos: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """Same pixels as from one thread, and torch's own threads are left alone."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail("a crop changed torch's number of threads"))
    spec = ViewSpec(size=128)
    _, _, heights, widths = pack(photos)
    plan = draw_plan(
        spec, first_view=0, seed=1, epoch=0, sample_ids=np.arange(len(photos)), heights=heights, widths=widths
    )[0]
    expected = [host(photo, record, spec) for photo, record in zip(photos, plan)]
    found: dict[tuple[int, int], np.ndarray] = {}

    def work(thread: int) -> None:
        for sample, (photo, record) in enumerate(zip(photos, plan)):
            found[thread, sample] = host(photo, record, spec)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 * len(photos)
    for (_, sample), view in found.items():
        assert np.array_equal(view, expected[sample])


@pytest.mark.gpu
def test_gpu_equals_the_host_path_without_a_sync(photos: list[np.ndarray]) -> None:
    for interpolation in ("bilinear", "bicubic"):
        specs = [
            ViewSpec(size=96, count=2, interpolation=interpolation),
            ViewSpec(size=33, count=3, area=(0.05, 0.3), interpolation=interpolation),
        ]
        packed, offsets, heights, widths = pack(photos)
        plans = plans_for(specs, heights, widths)
        packed = packed.cuda()
        crop_resize_device(packed, offsets, heights, widths, plans, specs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = crop_resize_device(packed, offsets, heights, widths, plans, specs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for spec, plan, output in zip(specs, plans, outputs):
            views = output.cpu().permute(0, 2, 3, 1).numpy().reshape(*plan.shape, spec.size, spec.size, 3)
            for (view, sample), record in np.ndenumerate(plan):
                mean, most = difference(views[view, sample], torchvision(photos[sample], record, spec))
                assert most <= 3 and mean <= 0.5, (photos[sample].shape, record)
