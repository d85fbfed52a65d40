"""The sample set: places that look as they should, two halves of the compass, the real converter, safe against other
processes and damage.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.data import sample_set
from fastssl.data.sample_set import (
    PARTS,
    SIZE,
    Cameras,
    directions,
    draw_cameras,
    ensure_sample_set,
    load_panorama,
    places,
    render,
)
from fastssl.errors import FastSSLError
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.utils.remote_cache import default_cache_dir


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    ensure_sample_set(folder)
    return folder


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A tiny set, so that it can be made many times: 2 + 1 views of each place."""
    monkeypatch.setattr(sample_set, "PARTS", {"train": 2, "val": 1})
    return tmp_path / "cache"


def camera(**changes: float) -> Cameras:
    values = {
        "yaw": 0.0,
        "pitch": 0.0,
        "roll": 0.0,
        "field_of_view": 60.0,
        "exposure": 0.0,
        "saturation": 1.0,
        "contrast": 1.0,
        **changes,
    }
    white = torch.tensor([values.pop("white_balance", (1.0, 1.0, 1.0))])
    return Cameras(white_balance=white, **{name: torch.tensor([value]) for name, value in values.items()})


# ---------------------------------------------------------------------- rendering


def one_ray(field_of_view: float, yaw: float, pitch: float, roll: float, x: float, y: float) -> tuple[float, float]:
    """Slowly and by matrices: longitude and latitude of the ray through (x, y) of the picture, both in -1 .. 1, y
    downwards.
    """
    a, b, c = np.deg2rad([roll, pitch, yaw])
    reach = np.tan(np.deg2rad(field_of_view) / 2)
    ray = np.array([x * reach, -y * reach, 1.0])  # right, up, forward
    turn_roll = np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_pitch = np.array([[1, 0, 0], [0, np.cos(b), np.sin(b)], [0, -np.sin(b), np.cos(b)]])
    turn_yaw = np.array([[np.cos(c), 0, np.sin(c)], [0, 1, 0], [-np.sin(c), 0, np.cos(c)]])
    right, up, forward = turn_yaw @ turn_pitch @ turn_roll @ ray
    return np.arctan2(right, forward), np.arcsin(up / np.linalg.norm([right, up, forward]))


@pytest.mark.parametrize("angles", [(60, 0, 0, 0), (40, 100, 20, 0), (50, -170, -25, 5), (35, 10, 17, -5)])
def test_rays_are_those_of_a_pinhole_camera(angles):
    field_of_view, yaw, pitch, roll = angles
    longitude, latitude = directions(camera(field_of_view=field_of_view, yaw=yaw, pitch=pitch, roll=roll), 7)
    for row in range(7):
        for column in range(7):
            expected = one_ray(field_of_view, yaw, pitch, roll, (column + 0.5) / 3.5 - 1, (row + 0.5) / 3.5 - 1)
            turned = (longitude[0, row, column].item() - expected[0] + np.pi) % (2 * np.pi) - np.pi
            assert abs(turned) < 1e-5 and abs(latitude[0, row, column].item() - expected[1]) < 1e-5


def test_a_camera_sees_what_lies_in_its_direction():
    panorama = torch.zeros(3, 64, 128, dtype=torch.uint8)
    panorama[0, :, :64] = 200  # red: the western half
    panorama[1, :32] = 100  # green: the sky
    east, west = (render(panorama, camera(yaw=yaw), 16)[0] for yaw in (90.0, -90.0))
    assert east[..., 0].max() == 0 and west[2:-2, :, 0].float().mean() > 195
    assert (west[:6, :, 1] > 90).all() and (west[-6:, :, 1] == 0).all()  # up is up
    north = render(panorama, camera(yaw=0.0), 16)[0]
    assert (north[:, :6, 0] > 190).all() and (north[:, -6:, 0] == 0).all()  # left is west
    behind = render(panorama, camera(yaw=180.0), 16)[0]  # across the seam
    assert (behind[:, :6, 0] == 0).all() and (behind[:, -6:, 0] > 190).all()


def test_light_is_multiplied_and_colour_taken_away():
    panorama = torch.tensor([120, 60, 30], dtype=torch.uint8)[:, None, None].expand(3, 8, 16).contiguous()
    light = (torch.tensor([120, 60, 30]) / 255.0) ** 2.2

    def expected(values: torch.Tensor) -> list[int]:
        return (values.clamp(0, 1) ** (1 / 2.2) * 255 + 0.5).to(torch.uint8).tolist()

    def seen(**changes) -> list[int]:
        return render(panorama, camera(**changes), 2)[0, 0, 0].tolist()

    assert seen() == [120, 60, 30]
    assert seen(exposure=1.0) == expected(2 * light) and seen(exposure=-1.0) == expected(light / 2)
    assert seen(white_balance=(0.7, 1.0, 1.3)) == expected(light * torch.tensor([0.7, 1.0, 1.3]))
    grey = (light * torch.tensor([0.2126, 0.7152, 0.0722])).sum()
    assert seen(saturation=0.0) == expected(grey.expand(3))
    assert seen(saturation=0.5) == expected((light + grey) / 2)
    pixels = torch.tensor([120, 60, 30]) / 255.0
    assert seen(contrast=1.5) == (pixels**1.5 * 255 + 0.5).to(torch.uint8).tolist()


# ---------------------------------------------------------------------- the set


def test_stored_panoramas_are_small_and_free_of_specks():
    assert len(places()) == 18 and len(set(places())) == 18
    assert sum(path.stat().st_size for path in sample_set._STORED.glob("*.jpg")) < 1e6
    for name in places():
        panorama = load_panorama(name)
        assert panorama.shape == (3, 256, 512)
        # The EXR files' compression left dark blue blocks in the sun: no dark pixel may stand where all around it is
        # light.
        light = panorama.float().mean(0)
        around = torch.nn.functional.avg_pool2d(light[None, None], 9, 1, 4)[0, 0]
        assert not ((light < 60) & (around > 235)).any(), name
    licence = (sample_set._STORED / "LICENSE.txt").read_text()
    assert "CC0 1.0" in licence and "Poly Haven" in licence


@pytest.mark.parametrize("place", range(0, 18, 4))
def test_training_and_judging_look_into_different_halves_of_the_compass(place):
    for part, middle in (("train", 90), ("val", -90)):
        cameras = draw_cameras(part, place)
        assert len(cameras) == PARTS[part]
        longitude, latitude = directions(cameras, 2 * SIZE)
        at_horizon = latitude.abs() < 0.02
        away = ((longitude.rad2deg() - middle + 180) % 360 - 180).abs()
        assert at_horizon.any() and away[at_horizon].max() < 90
        assert away[at_horizon].max() > 80  # nearly all of the half is looked at


def test_views_are_the_same_at_every_call_and_differ_by_place_and_part():
    first, again = draw_cameras("train", 3), draw_cameras("train", 3)
    assert torch.equal(first.yaw, again.yaw) and torch.equal(first.white_balance, again.white_balance)
    assert not torch.equal(first.pitch, draw_cameras("train", 4).pitch)
    assert not torch.equal(first.pitch[:80], draw_cameras("val", 3).pitch)
    assert torch.equal(first.yaw[:5], draw_cameras("train", 3, 5).yaw)
    for name, bounds in (
        ("pitch", sample_set.PITCH),
        ("exposure", sample_set.EXPOSURE),
        ("saturation", sample_set.SATURATION),
    ):
        values = getattr(first, name)
        assert bounds[0] <= values.min() and values.max() <= bounds[1] and values.std() > 0.2 * (bounds[1] - bounds[0])


def test_converted_set_holds_the_views_under_their_places(cache):
    found = ensure_sample_set(cache)
    for part, path in (("train", found.train), ("val", found.val)):
        with BetonReader(path) as reader:
            assert reader.classes == places()
            assert np.bincount(reader.labels).tolist() == [PARTS[part]] * 18
            for place in (0, 7, 17):
                views = render(load_panorama(places()[place]), draw_cameras(part, place, 3), SIZE).numpy()
                for number, view in enumerate(views):
                    stored = reader.decode(place * PARTS[part] + number)
                    assert stored.shape == (SIZE, SIZE, 3)
                    assert np.abs(stored.astype(int) - view).mean() < 3


def test_a_damaged_panorama_is_named(monkeypatch, tmp_path):
    (tmp_path / "lake.jpg").write_bytes(b"no picture")
    monkeypatch.setattr(sample_set, "_STORED", tmp_path)
    with pytest.raises(FastSSLError, match=r"lake\.jpg.*install fastssl-vision again"):
        load_panorama("lake")
    Image.new("RGB", (16, 8), (9, 9, 9)).save(tmp_path / "lake.jpg")
    assert load_panorama("lake").shape == (3, 8, 16)


def test_second_call_converts_nothing(cache, monkeypatch):
    monkeypatch.setattr(sample_set, "build_sample_set", lambda folder: pytest.fail("converted again"))
    first = ensure_sample_set(cache)
    assert first.train.is_file() and [p.name for p in cache.iterdir()] == [first.train.parent.name]


def test_damaged_and_short_files_are_made_again(small):
    found = ensure_sample_set(small)
    content = found.val.read_bytes()
    found.val.write_bytes(content[: len(content) // 2])
    again = ensure_sample_set(small)
    assert again == found
    with BetonReader(again.val) as reader:
        assert len(reader) == 18
    again.train.unlink()
    assert ensure_sample_set(small).train.is_file()
    assert [p.name for p in small.iterdir()] == [found.train.parent.name]  # nothing left lying about


def test_losing_the_race_uses_the_winners_files(small, monkeypatch):
    build = sample_set.build_sample_set

    def slow_build(folder):
        """While we convert, another process finishes."""
        monkeypatch.setattr(sample_set, "build_sample_set", build)
        ensure_sample_set(small)
        marker.append(os.stat(next(small.glob("samples-*"))).st_ino)
        build(folder)

    marker = []
    monkeypatch.setattr(sample_set, "build_sample_set", slow_build)
    found = ensure_sample_set(small)
    assert found.train.parent.stat().st_ino == marker[0]
    assert [p.name for p in small.iterdir()] == [found.train.parent.name]


def test_several_processes_at_once(small):
    # fork, so that the children have the tiny set too
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ensure_sample_set, args=(small,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(small.iterdir())) == 1
    with BetonReader(ensure_sample_set(small).train) as reader:
        assert len(reader) == 36


def test_a_folder_that_cannot_be_written_falls_back_with_a_notice(small, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.warns(UserWarning, match="cannot be written"):
        found = ensure_sample_set(blocked / "cache")
    assert found.train.is_file() and found.val.is_file() and blocked not in found.train.parents


def test_a_failed_conversion_leaves_nothing(small, monkeypatch):
    def broken(folder: Path):
        (folder / "train.beton").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_set, "build_sample_set", broken)
    with pytest.raises(OSError, match="No space"):
        ensure_sample_set(small)
    assert list(small.iterdir()) == []


def test_cache_dir_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "fastssl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "fastssl"
