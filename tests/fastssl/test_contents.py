"""What is in a set of photos: counts against what was put in, copies against a comparison of all with all."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import jpeg_bytes, make_photo
from PIL import Image

from fastssl.cli import cli
from fastssl.cli.common import PlainConsole
from fastssl.data.contents import Photos, count_copies, find_copies, kind_of_reason, look_into, open_photos
from fastssl.errors import FastSSLError
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert.conversion import convert, rejects_path
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.report.drawing import contact_sheet

COLOURS = {"blue": (20, 40, 220), "green": (20, 200, 40), "red": (220, 30, 20)}


def flat(colour: tuple[int, int, int], height: int = 40, width: int = 60) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """3, 2 and 1 photos of three classes, 240 and 40 pixels, two of them copies; two damaged; a file that is none."""
    files = {f"blue/{n}.jpg": jpeg_bytes(make_photo(n, 240, 300)) for n in range(3)}
    files |= {"green/0.jpg": files["blue/0.jpg"], "green/1.jpg": jpeg_bytes(make_photo(9, 40, 50))}
    files |= {"red/0.jpg": files["green/1.jpg"], "red/1.jpg": b"", "red/2.jpg": files["blue/0.jpg"][:5000]}
    for name, data in (files | {"notes.txt": b"x"}).items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "photos"


@pytest.fixture
def stored(photos: Path) -> Path:
    path = photos.with_suffix(".beton")
    convert(photos, path, ConvertOptions(keep_size=True))
    return path


@contextmanager
def one_set(path: Path) -> Iterator[Photos]:
    with open_photos(path) as (photos,):
        yield photos


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["data", *map(str, arguments)])


def test_what_is_in_a_file(stored: Path) -> None:
    with one_set(stored) as opened:
        found = look_into(opened)
    assert (found.photos, found.classes, found.raw) == (6, {"blue": 3, "green": 2, "red": 1}, 0)
    assert found.short_side == {"p5": 40, "median": 240, "p95": 240, "below_224": 2, "measured": 6}
    assert found.bytes == sum(path.stat().st_size for path in stored.with_suffix("").rglob("*.jpg")) - 5000
    assert sum(found.rejects.values()) == 2 and found.rejects["the file is empty"] == 1


def test_a_folder_is_listed_and_not_converted(photos: Path) -> None:
    before = sorted(photos.parent.iterdir())
    with one_set(photos) as opened:
        found = look_into(opened)
    assert (found.photos, found.classes) == (8, {"blue": 3, "green": 2, "red": 3})  # damage is not seen before decoding
    assert found.short_side is not None and found.short_side["measured"] == 7 and found.short_side["below_224"] == 2
    assert (found.raw, found.passed_over) == (None, {".txt": 1}) and sorted(photos.parent.iterdir()) == before


def test_labels_without_names_and_names_without_photos(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    with BetonWriter(path, 3) as writer:
        for label in (5, -1, 5):
            writer.add(flat(COLOURS["red"]).tobytes(), 40, 60, label, 1)
    with one_set(path) as opened:
        found = look_into(opened)
        assert (found.classes, found.raw) == ({"class -1": 1, "class 5": 2}, 3)
        Path(f"{path}.json").write_text(json.dumps({"bytes": path.stat().st_size, "classes": ["zero", "one"]}))
        found = look_into(opened)
        assert found.classes == {"zero": 0, "one": 0, "class -1": 1, "class 5": 2}


def test_a_set_of_files_is_one(photos: Path, stored: Path, tmp_path: Path) -> None:
    """Classes by name, rejects and copies of all its files."""
    (tmp_path / "more").mkdir()
    (photos / "red").rename(tmp_path / "more" / "red")
    for name in ("photos", "more"):
        convert(tmp_path / name, tmp_path / f"set-{name}.beton", ConvertOptions(keep_size=True))
    with one_set(tmp_path / "set-*.beton") as together, one_set(stored) as alone:
        found, one = look_into(together), look_into(alone)
        copies = find_copies([together])
    assert replace(found, path=one.path) == one
    assert count_copies(copies, 1) == ([2], [[0]])


def test_kinds_of_reasons_hold_neither_names_nor_numbers() -> None:
    kinds = {
        "cut off: the tar ends after 12 of 1,234 bytes": "cut off: the tar ends after N of N bytes",
        "OSError: [Errno 5] cannot read: '/home/me/a 2.jpg'": "OSError: [Errno N] cannot read: ...",
        "4 extraneous bytes before marker 0xd9": "N extraneous bytes before marker N",
        "1200x90000 pixels: no JPEG2000": "NxN pixels: no JPEG2000",
    }
    assert {reason: kind_of_reason(reason) for reason in kinds} == kinds
    assert len(kind_of_reason("x" * 10_000)) <= 120


def test_a_list_of_rejects_that_is_not_ours(stored: Path) -> None:
    lines = ['{"path": "a", "reason": "the file is empty"}', "[" * 9999, "null", '{"path": 1}', "\xff", ""]
    rejects_path(stored).write_text("\n".join(lines), "latin-1")
    with one_set(stored) as opened:
        assert look_into(opened).rejects == {"the file is empty": 1}


# ---- copies


def slow_copies(*files: list[bytes]) -> tuple[list[int], list[list[int]]]:
    within = [len(one) - len(set(one)) for one in files]
    return within, [[0 if a is b else sum(photo in b for photo in a) for b in files] for a in files]


@pytest.mark.parametrize("side_files", [True, False])
@pytest.mark.parametrize("kinds", ["folders", "files", "both"])
def test_copies_are_those_of_comparing_all_with_all(tmp_path: Path, kinds: str, side_files: bool) -> None:
    rng = np.random.default_rng(3)
    pool = [jpeg_bytes(make_photo(seed, 32, 32 + seed % 3)) for seed in range(12)]
    pool += [pool[0][:-40] + bytes(38) + pool[0][-2:]]  # of the same size, and another photo
    sets, paths = [], []
    for number in range(3):
        chosen, folder = [pool[k] for k in rng.integers(0, len(pool), 9)], tmp_path / f"{number}"
        folder.mkdir()
        for k, data in enumerate(chosen):
            (folder / f"{k}.jpg").write_bytes(data)
        if kinds == "files" or (kinds == "both" and number):
            path = tmp_path / f"{number}.beton"
            convert(folder, path, ConvertOptions(keep_size=True))
            Path(f"{path}.json").unlink() if not side_files else None
            with one_set(path) as opened:
                chosen = [opened.encoded(i).tobytes() for i in range(len(opened))]
            folder = path
        sets.append(chosen)
        paths.append(folder)
    said: list[tuple[int, int]] = []
    with ExitStack() as opened:
        every = [opened.enter_context(one_set(path)) for path in paths]
        found = find_copies(every, lambda *progress: said.append(progress))
    within, across = count_copies(found, len(sets))
    assert (
        (within, across) == slow_copies(*sets) and sum(within) and all(map(sum, across)) and said[-1][0] == said[-1][1]
    )
    for group in found:
        assert len({sets[place][i] for place, i in group}) == 1 < len(group)
    named = {place for group in found for place in group}
    every = [data for one in sets for data in one]
    assert named == {
        (place, i) for place, one in enumerate(sets) for i, data in enumerate(one) if every.count(data) > 1
    }


def test_pixels_of_another_shape_are_no_copy(tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    with BetonWriter(path, 3, labels=False) as writer:
        for height, width in ((10, 20), (20, 10), (10, 20)):
            writer.add(flat(COLOURS["red"], height, width).tobytes(), height, width, 0, 1)
    with one_set(path) as opened:
        assert find_copies([opened]) == [[(0, 0), (0, 2)]]


def test_with_checksums_only_what_may_be_a_copy_is_read(stored: Path) -> None:
    with one_set(stored) as opened:
        read, real = [], opened.encoded
        opened.encoded = lambda i: (read.append(i), real(i))[1]  # type: ignore[method-assign]
        assert sum(len(group) - 1 for group in find_copies([opened])) == 2
    assert sorted(read) == [0, 3, 4, 5]


# ---- the picture


def test_the_contact_sheet_shows_every_class(tmp_path: Path) -> None:
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(40):
            Image.fromarray(flat(colour, 64, 64)).save(tmp_path / "photos" / name / f"{number}.png")
    with one_set(tmp_path / "photos") as opened:
        picture = contact_sheet([opened], photos=6)
    pixels = np.asarray(picture, np.int16)
    for colour in COLOURS.values():
        share = (np.abs(pixels - np.array(colour)).max(2) < 8).mean() * picture.width * picture.height
        assert share == pytest.approx(2 * 256 * 256, rel=0.01)
    assert picture.width == 1400


def test_the_contact_sheet_of_damaged_photos_and_few(photos: Path, damaged: tuple[Path, int], tmp_path: Path) -> None:
    with one_set(photos) as opened, one_set(damaged[0]) as other:
        picture = contact_sheet([opened, other], tmp_path / "a.png", photos=100)
    assert Image.open(tmp_path / "a.png").size == picture.size


# ---- the command


def test_the_command(stored: Path, photos: Path, tmp_path: Path) -> None:
    for number in range(2):
        (photos / f"{number}.MOV").write_bytes(b"x")
    result = run(stored, photos, "--json", tmp_path / "a.json", "--sheet", tmp_path / "a.png")
    assert result.exit_code == 0, result.output
    for line in (
        f"{stored}: photos: 6",
        f"{stored}: classes: 3: blue (3), green (2), red (1)",
        f"{stored}: short side: median 240 px, nine in ten from 40 to 240 px; 2 photos below 224 px",
        f"{stored}: rejected: 2: ",
        f"{stored}: copies: 2 photos like an earlier one; 6 photos also in {photos}",
        f"{photos}: passed over: 2 .mov, 1 .txt; 2 .mov: extract frames (ffmpeg -i FILE %06d.jpg)",
    ):
        assert f"\n{line}" in f"\n{result.output}", line
    first, second = json.loads((tmp_path / "a.json").read_text())
    assert (first["path"], second["path"]) == ("photos.beton", "photos") and str(tmp_path) not in json.dumps(first)
    assert first["copies"]["within"] == 2 and first["copies"]["also_in"] == [{"path": "photos", "photos": 6}]
    assert Image.open(tmp_path / "a.png").width == 1400


def test_splits_of_a_folder_are_sets(photos: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "set" / split).mkdir(parents=True)
    for name, split in (("blue", "train"), ("green", "val")):
        shutil.copytree(photos / name, tmp_path / "set" / split / "blue")
    output = run(tmp_path / "set", "--json", tmp_path / "a.json").output
    assert f"{tmp_path}/set/val: copies: none within; 1 photo also in {tmp_path}/set/train\n" in output
    assert [record["path"] for record in json.loads((tmp_path / "a.json").read_text())] == ["train", "val"]


def test_nothing_in_common_is_said_and_sides_that_are_all_alike(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(jpeg_bytes(make_photo(ord(name), 300, 300)))
    assert f"{tmp_path}/a: copies: none within; none in the other\n" in run(tmp_path / "a", tmp_path / "b").output
    output = run(*(tmp_path / name for name in "abc")).output
    assert output.count("copies: none within; none in the others\n") == 3
    assert output.count("short side: median 300 px, as nine in ten have; none below 224 px\n") == 3
    assert output.count(" kB, ") == 3


def test_json_alone_on_standard_output_and_one_photo(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.jpg").write_bytes(jpeg_bytes(make_photo(0, 300, 300)))
    assert json.loads(run(tmp_path / "one", "--json", "-", "--no-copies").stdout)["copies"] is None
    lines = run(tmp_path / "one").output.splitlines()
    assert [line.split(": ", 2)[1] for line in lines] == ["photos", "classes", "short side", "bytes", "copies"]


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((1, 2), "2: c1 (2), c0 (1)"),
        ((2,) * 7, "7 of 2 photos each"),
        ((1, 2, 3, 4, 5, 6, 7, 8), "8: c7 (8), c6 (7), c5 (6), ..., c2 (3), c1 (2), c0 (1)"),
    ],
)
def test_many_classes_are_told_by_the_largest_and_the_smallest(
    tmp_path: Path, counts: tuple[int, ...], said: str
) -> None:
    for label, count in enumerate(counts):
        (tmp_path / "photos" / f"c{label}").mkdir(parents=True)
        for number in range(count):
            (tmp_path / "photos" / f"c{label}" / f"{number}.jpg").write_bytes(b"x")
    assert f": classes: {said}\n" in run(tmp_path / "photos").output


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_it_is_a_table_that_fits(stored: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastssl.cli import data

    shown = io.StringIO()
    monkeypatch.setattr(
        data, "PlainConsole", lambda: PlainConsole(file=shown, force_terminal=True, width=width, color_system=None)
    )
    assert run(stored).exit_code == 0
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width and any(line.split() == ["photos", "6"] for line in lines)


def test_what_cannot_be_looked_at_is_a_line(tmp_path: Path, stored: Path) -> None:
    assert run().exit_code == 2
    assert run(stored, "--sheet", tmp_path / "none" / "a.png").exit_code == 2
    assert run(stored, "--sheet", stored).exit_code == 2
    for path in (tmp_path / "none.beton", tmp_path / "a.beton"):
        (tmp_path / "a.beton").write_bytes(b"x" * 100)
        assert isinstance(run(path).exception, FastSSLError)


def test_a_set_larger_than_the_cache_is_refused(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    for number in range(2):
        memory.pipe(f"/set/{number}.beton", stored.read_bytes())
    assert "memory://set/*.beton: photos: 12\n" in run("memory://set/*.beton").output
    monkeypatch.setenv("FASTSSL_CACHE_GB", "0.003")
    assert "larger than the cache" in str(run("memory://set/*.beton").exception)
    memory.rm("/set", recursive=True)


def test_torch_is_not_loaded(stored: Path, tmp_path: Path) -> None:
    words = ["data", str(stored), f"--sheet={tmp_path / 'a.png'}"]
    script = f"import sys; from fastssl.cli import cli; cli.main({words}, standalone_mode=False)"
    command = [sys.executable, "-c", f"{script}; assert 'torch' not in sys.modules"]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0
