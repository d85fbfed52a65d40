from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V2
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images
from torchvision_views import torchvision_colour

from fastssl.pipelines.ops import compiled
from fastssl.pipelines.ops.augment import augment
from fastssl.pipelines.ops.device_colour import (
    DeviceColour,
    blur_by_matrices,
    blur_matrices,
    blur_radius,
    blur_taps,
    device_colour,
    jitter,
    luminance,
    parameter_table,
    turn_hue,
)
from fastssl.pipelines.plan.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewSpec, draw_plan

STRONG = ViewSpec(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, solarise=0.3, solarise_threshold=100)
RAW = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # the output is the picture in 0 .. 1


def photos(count: int, size: int) -> torch.Tensor:
    """(count, 3, size, size) uint8 channels-last pieces of two photographs."""
    pictures, rng = load_sample_images().images, np.random.default_rng(size)
    pieces = []
    for k in range(count):
        top, left = rng.integers(0, 427 - size), rng.integers(0, 640 - size)
        pieces.append(pictures[k % 2][top : top + size, left : left + size])
    return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2)


def draw(spec: ViewSpec, count: int, seed: int = 0) -> np.ndarray:
    return draw_plan(
        spec,
        first_view=0,
        seed=seed,
        epoch=0,
        sample_ids=np.arange(count),
        heights=np.full(count, 300),
        widths=np.full(count, 300),
    )[0]


def neutral(count: int) -> np.ndarray:
    """A plan that changes nothing."""
    return draw(ViewSpec(jitter=0.0, grey=0.0, blur=0.0), count)


def on_device(
    views: torch.Tensor, plan: np.ndarray, spec: ViewSpec, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The device driver on CPU tensors."""
    return DeviceColour(spec, dtype)(views, torch.from_numpy(parameter_table(plan)))


def on_host(views: torch.Tensor, plan: np.ndarray, spec: ViewSpec, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return augment(views, plan, spec, dtype)


DRIVERS = [on_host, on_device]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("size, count", [(48, 80), (33, 40), (130, 6), (7, 30), (200, 3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_random_plans_equal_torchvision(driver, size: int, count: int, dtype: torch.dtype, tolerance: float) -> None:
    """All operations together; far inside the promised 0.5/255 mean and 3/255 maximum."""
    spec = replace(STRONG, size=size)
    views, plan = photos(count, size), draw(spec, count)
    result = driver(views, plan, spec, dtype)
    assert result.dtype == dtype and result.shape == views.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    expected, margin = (
        torch.stack(part)
        for part in zip(*(torchvision_colour(view, record, spec) for view, record in zip(views, plan)))
    )
    expected = V2.normalize(expected, list(spec.mean), list(spec.std))
    # A value that lies on the threshold to a rounding error may fall on either side of it.
    clear = margin > 1e-5
    assert clear.float().mean() > 0.999
    error = (result.float() - expected).abs()[clear] / (expected.abs()[clear] + 1)
    assert error.max() < tolerance


@pytest.mark.parametrize("size, count", [(48, 80), (200, 5)])
def test_threads_that_share_the_work_change_no_bit(size: int, count: int) -> None:
    spec = replace(STRONG, size=size)
    views, plan = photos(count, size), draw(spec, count)
    with ThreadPoolExecutor(3) as pool:
        assert torch.equal(augment(views, plan, spec, pool=pool), augment(views, plan, spec))


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_the_samples_own_order_is_kept(driver, order: tuple[int, ...]) -> None:
    """Strong factors, where two orders differ visibly; contrast takes its mean after what came before."""
    spec, views = replace(STRONG, **RAW, size=40), photos(4, 40)
    plan = neutral(4)
    plan["jitter"], plan["order"] = True, order
    plan["brightness"], plan["contrast"], plan["saturation"], plan["hue"] = 1.7, 0.4, 1.6, [0.3, -0.4, 0.1, 0.5]
    expected = torch.stack([torchvision_colour(view, record, spec)[0] for view, record in zip(views, plan)])
    assert (driver(views, plan, spec) - expected).abs().max() < 1e-5
    other = plan.copy()
    other["order"] = order[::-1]
    assert (driver(views, other, spec) - expected).abs().max() > 0.05


OPERATIONS = {
    # name: (plan fields, on a Pillow image, bound of the mean and of the largest difference in grey levels)
    "brightness": ({"brightness": 1.3}, lambda image: ImageEnhance.Brightness(image).enhance(1.3), 0.5, 1),
    "contrast": (
        {"contrast": 0.5},
        lambda image: ImageEnhance.Contrast(image).enhance(0.5),
        0.75,
        1,
    ),  # Pillow rounds the mean, too
    "saturation": ({"saturation": 1.7}, lambda image: ImageEnhance.Color(image).enhance(1.7), 0.5, 3),
    "grey": ({"grey": True}, lambda image: image.convert("L").convert("RGB"), 0.5, 1),
    "solarise": ({"solarise": True}, lambda image: ImageOps.solarize(image, 100), 0.0, 0),
    "nothing": ({}, lambda image: image, 0.0, 0),
}


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_single_operations_equal_pillow(driver, name: str) -> None:
    """Pillow keeps 8 bits between steps; within rounding the pictures are the same."""
    fields, enhance, mean, most = OPERATIONS[name]
    spec, views, plan = replace(STRONG, **RAW, size=64), photos(6, 64), neutral(6)
    for field, value in fields.items():
        plan[field] = value
    plan["jitter"] = name in ("brightness", "contrast", "saturation")
    result = (driver(views, plan, spec) * 255).round().permute(0, 2, 3, 1).numpy()
    for view, ours in zip(views, result):
        theirs = np.asarray(enhance(Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())))
        error = np.abs(ours - theirs)
        assert error.mean() <= mean and error.max() <= most


@pytest.mark.parametrize("driver", DRIVERS)
def test_blur_is_close_to_pillows(driver) -> None:
    """Pillow's GaussianBlur is three box blurs, so this is no identity; equality is asked against torchvision."""
    spec, views, plan = replace(STRONG, **RAW, size=64), photos(4, 64), neutral(4)
    plan["blur_sigma"] = [0.5, 1.0, 1.5, 2.0]
    result = (driver(views, plan, spec) * 255).permute(0, 2, 3, 1).numpy()
    for view, ours, record in zip(views, result, plan):
        theirs = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy()).filter(
            ImageFilter.GaussianBlur(float(record["blur_sigma"]))
        )
        assert np.abs(ours - np.asarray(theirs))[6:-6, 6:-6].mean() <= 0.7


def test_every_sample_has_its_own_sigma() -> None:
    spec, view = replace(STRONG, **RAW, size=32), photos(1, 32)
    plan = neutral(3)
    plan["blur_sigma"] = [0.0, 0.6, 2.0]
    for driver in DRIVERS:
        sharp, soft, softer = driver(view.expand(3, -1, -1, -1), plan, spec)
        assert (sharp - view[0].float() / 255).abs().max() < 1e-6
        assert sharp.var() > soft.var() > softer.var()


def planes_of(picture: torch.Tensor) -> list[torch.Tensor]:
    return [picture[:, channel].flatten(1).contiguous() for channel in range(3)]


def test_hue_of_every_colour() -> None:
    """A cube of colours with all its edges (grey, black, white, pure, two channels equal), turned by many angles, to
    float accuracy.
    """
    levels = torch.tensor([0.0, 1 / 255, 0.2, 0.5, 0.5000001, 254 / 255, 1.0])
    cube = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 7, 49)
    for shift in (-0.5, -0.3, -1 / 6, 0.0, 1e-4, 0.1, 1 / 3, 0.5):
        planes = turn_hue(planes_of(cube), torch.full((1, 1), shift))
        expected = V2.adjust_hue(cube, shift)
        assert (torch.stack(planes, 1).view_as(cube) - expected).abs().max() < 3e-6, shift


def test_blends_with_factors_outside_zero_to_one_are_clamped() -> None:
    picture = photos(3, 20).float() / 255
    for factor in (0.0, 0.5, 1.0, 2.5):
        for place, to_luminance, to_mean, expected in [
            (0, 0, 0, V2.adjust_brightness(picture, factor)),
            (2, 1, 0, V2.adjust_saturation(picture, factor)),
            (5, 0, 1, V2.adjust_contrast(picture, factor)),
        ]:
            planes, columns = planes_of(picture), torch.tensor([1.0, 0, 0] * 6 + [0] * 5).repeat(3, 1)
            columns[:, 3 * place : 3 * place + 3] = torch.tensor([1, to_luminance, to_mean]) * (1 - factor)
            columns[:, 3 * place] = factor
            jitter(planes, columns.split(1, dim=1), STRONG, mean=None)
            assert (torch.stack(planes, 1).view_as(picture) - expected).abs().max() < 2e-6
    assert torch.allclose(luminance(planes_of(picture)).view(3, 1, 20, 20), V2.rgb_to_grayscale(picture), atol=1e-6)


def slow_blur(plane: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    """Direct sums with reflected indices, in float64."""
    size = len(plane)
    taps = np.array([np.exp(-(k**2) / (2 * sigma**2)) for k in range(-radius, radius + 1)])
    taps /= taps.sum()

    def along_rows(source: np.ndarray) -> np.ndarray:
        out = np.zeros_like(source)
        for place in range(size):
            for k in range(-radius, radius + 1):
                other = abs(place + k)
                out[place] += taps[k + radius] * source[2 * (size - 1) - other if other >= size else other]
        return out

    return along_rows(along_rows(plane).T).T


@pytest.mark.parametrize("size, radius", [(1, 0), (2, 1), (5, 4), (7, 6), (31, 6), (32, 6), (33, 6), (70, 12)])
def test_both_blurs_equal_direct_sums(size: int, radius: int) -> None:
    torch.manual_seed(0)
    plane = torch.rand(3, size * size)
    sigma = torch.tensor([[0.1], [0.9], [2.0]])
    falloff = 0.5 / sigma**2
    expected = np.stack(
        [slow_blur(plane[k].view(size, size).numpy().astype(np.float64), float(sigma[k]), radius) for k in range(3)]
    ).reshape(3, -1)
    for k in range(3):
        mine = plane[k].numpy().copy().reshape(size, size)
        half, line = np.empty((size, size), np.float32), np.empty(size + 2 * radius, np.float32)
        compiled._blur(mine, compiled._gaussian(float(sigma[k]), radius), half, line)
        assert np.abs(mine.ravel() - expected[k]).max() < 5e-6
    for dtype, tolerance in [(torch.float32, 1e-6), (torch.float16, 0.3 / 255)]:
        result = blur_by_matrices(
            plane.to(dtype), blur_matrices(falloff, *blur_taps(size, radius, falloff.device, dtype))
        )
        assert result.dtype == torch.float32
        assert np.abs(result.numpy() - expected).max() < tolerance


def test_the_kernel_is_cut_for_tiny_views() -> None:
    spec = ViewSpec(blur_sigma=(0.1, 2.0))
    assert [blur_radius(spec, size) for size in (224, 7, 6, 2, 1)] == [6, 6, 5, 1, 0]
    plan = neutral(2)
    plan["blur_sigma"] = 1.5
    for size in (1, 2, 3):
        views = photos(2, size)
        for driver in DRIVERS:
            result = driver(views, plan, replace(spec, **RAW, size=size))
            assert torch.isfinite(result).all()
            if size == 1:
                assert (result - views.float() / 255).abs().max() < 1e-6


def test_what_the_spec_rules_out_is_left_out() -> None:
    """The device driver skips by the spec; the same numbers come out where nothing was drawn."""
    views = photos(5, 24)
    for without in ({"jitter": 0.0}, {"hue": 0.0}, {"grey": 0.0}, {"blur": 0.0}, {"solarise": 0.0}):
        spec = replace(STRONG, **without)
        plan = draw(spec, 5)
        assert (on_device(views, plan, spec) - on_host(views, plan, spec)).abs().max() < 0.05
    evaluation = ViewSpec.evaluation(24)
    expected = V2.normalize(views.float() / 255, list(evaluation.mean), list(evaluation.std))
    for driver in DRIVERS:
        assert (driver(views, draw(evaluation, 5), evaluation) - expected).abs().max() < 1e-6


def test_a_sample_does_not_depend_on_its_company() -> None:
    views, plan = photos(40, 32), draw(STRONG, 40)
    together = augment(views, plan, STRONG)
    for driver in DRIVERS:
        for sample in (0, 7, 39):
            alone = driver(views[sample : sample + 1], plan[sample : sample + 1], STRONG)
            assert ((alone[0] - together[sample]).abs() > 1e-5).float().mean() < 1e-3


def test_input_is_untouched_and_layout_does_not_matter() -> None:
    views, plan = photos(9, 20), draw(STRONG, 9)
    before = views.clone()
    for driver in DRIVERS:
        result = driver(views, plan, STRONG)
        assert torch.equal(views, before)
        other = driver(views.contiguous(), plan, STRONG)
        assert torch.equal(result, other) and other.is_contiguous(memory_format=torch.channels_last)


def test_empty_batch_and_wrong_arguments() -> None:
    views, plan = photos(3, 8), draw(STRONG, 3)
    for driver in DRIVERS:
        assert driver(views[:0], plan[:0], STRONG).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="3 views, but parameters for 2"):
        augment(views, plan[:2], STRONG)
    with pytest.raises(ValueError, match="uint8"):
        augment(views.float(), plan, STRONG)
    with pytest.raises(ValueError, match="uint8"):
        augment(views[:, :, :4], plan, STRONG)
    with pytest.raises(ValueError, match="VIEW_DTYPE"):
        augment(views, plan["jitter"], STRONG)


def test_parameter_table_places_every_order() -> None:
    """All 24 orders: reading the blends and hue back in sequence gives the order."""
    spec = replace(STRONG, jitter=1.0)
    plan = draw(spec, 300)
    assert len(np.unique(plan["order"], axis=0)) == 24
    for record, row in zip(plan, parameter_table(plan)):
        found = []
        for step in range(7):
            if step == 3:
                found.append((HUE, row[18]))
                continue
            factor, to_luminance, to_mean = row[3 * (step - (step > 3)) :][:3]
            if factor != 1 or to_luminance or to_mean:
                found.append((SATURATION if to_luminance else CONTRAST if to_mean else BRIGHTNESS, factor))
        names = ("brightness", "contrast", "saturation", "hue")
        assert found == [(operation, record[names[operation]]) for operation in record["order"]]


def test_host_driver_from_several_threads() -> None:
    views, plan = photos(30, 32), draw(STRONG, 30)
    expected, found = augment(views, plan, STRONG), {}
    threads = [
        threading.Thread(target=lambda k=k: found.__setitem__(k, augment(views, plan, STRONG))) for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(result, expected) for result in found.values())


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [True, False])
def test_gpu_equals_the_host_without_a_sync_and_in_a_graph(compiled: bool) -> None:
    spec = replace(STRONG, **RAW, size=64)
    views, plan = photos(64, 64), draw(spec, 64)
    expected = augment(views, plan, spec)
    on_gpu, table = views.cuda(), torch.from_numpy(parameter_table(plan)).cuda()
    colour = device_colour(spec, torch.float32, on_gpu.device) if compiled else DeviceColour(spec, torch.float32)
    colour(on_gpu, table)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = colour(on_gpu, table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    error = (result.cpu() - expected).abs()
    assert not colour.fallback and result.is_contiguous(memory_format=torch.channels_last)
    assert error.mean() < 0.5 / 255 and error.quantile(0.999) < 1 / 255

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = colour(on_gpu, table)
    other = torch.from_numpy(parameter_table(draw(spec, 64, seed=1))).cuda()
    table.copy_(other)
    graph.replay()
    assert torch.equal(captured, colour(on_gpu, other))
