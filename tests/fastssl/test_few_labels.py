"""Which photos keep their label: the draw, the three forms of a list, and what each refuses."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import jpeg_bytes, make_photo

from fastssl.evaluate.features import ProbeError
from fastssl.evaluate.photos import ListedPhoto, draw_labels, listed_labels, parse_share, read_list, stored_names
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import side_path
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.convert.sources.classes import ListingRules

AS_IS = ConvertOptions(keep_size=True, short_side=None)

# ---------------------------------------------------------------------- the draw


@pytest.mark.parametrize(
    ("text", "share"), [("1%", 0.01), ("10 %", 0.1), (" 0.05 ", 0.05), ("100%", 1.0), ("0.5%", 0.005)]
)
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["1", "10", "0", "0%", "101%", "-1%", "nan", "inf", "", "%", "ten", "1.0"])
def test_no_shares(text: str) -> None:
    with pytest.raises(ProbeError, match="write a percentage as 1%"):
        parse_share(text)


def test_the_draw_is_the_same_share_of_every_class() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 9], [1000, 130, 14, 3]))
    drawn = draw_labels(labels, 0.1, 5)
    assert [int((labels[drawn] == label).sum()) for label in (0, 1, 2, 9)] == [100, 13, 1, 1]  # of three at least one
    assert len(np.unique(drawn)) == len(drawn) and np.array_equal(drawn, np.sort(drawn)) and drawn.dtype == np.int64
    assert np.array_equal(draw_labels(labels, 1.0, 5), np.arange(len(labels)))


def test_the_draw_never_changes() -> None:
    labels = np.arange(60) % 3
    assert draw_labels(labels, 0.1, 7).tolist() == [5, 10, 14, 39, 51, 58]
    assert draw_labels(labels, 0.2, 7).tolist() == [
        5,
        10,
        14,
        25,
        27,
        28,
        36,
        39,
        41,
        50,
        51,
        58,
    ]  # the smaller one is in it
    assert draw_labels(labels, 0.1, 8).tolist() == [8, 27, 29, 33, 34, 46]


def test_the_draw_is_uniform_within_a_class() -> None:
    labels = np.repeat([0, 1], [40, 10])
    counts = np.zeros(50, int)
    for seed in range(800):
        counts[draw_labels(labels, 0.25, seed)] += 1
    # Binomial, 800 draws: 200 and 160 are expected (round(2.5) is 2), with deviations of 12 and 11.
    assert np.all(np.abs(counts[:40] - 200) < 60) and np.all(np.abs(counts[40:] - 160) < 56)


# ---------------------------------------------------------------------- lists


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes named as ImageNet's; 11.JPEG sorts before 2.JPEG; one name is in two classes."""
    root = tmp_path_factory.mktemp("imagenet") / "train"
    for label, (name, numbers) in enumerate({"n01": (2, 11, 3), "n02": (5, 40), "n03": (7, 8, 2)}.items()):
        (root / name).mkdir(parents=True)
        for number in numbers:
            file = f"{name}_{number}.JPEG" if number != 2 else "same.JPEG"
            (root / name / file).write_bytes(jpeg_bytes(make_photo(10 * label + number, 16 + number, 20)))
    return root


ORDER = [
    "n01/n01_11.JPEG",
    "n01/n01_3.JPEG",
    "n01/same.JPEG",
    "n02/n02_40.JPEG",
    "n02/n02_5.JPEG",
    "n03/n03_7.JPEG",
    "n03/n03_8.JPEG",
    "n03/same.JPEG",
]


@pytest.fixture(scope="module")
def reader(photos: Path) -> BetonReader:
    path = photos.parent / "train.beton"
    convert(photos, path, AS_IS)
    with BetonReader(path) as reader:
        yield reader


def write(folder: Path, *lines: str) -> Path:
    path = folder / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_order_is_that_of_an_image_folder(photos: Path, reader: BetonReader) -> None:
    folders = sorted(entry.name for entry in photos.iterdir())
    assert [f"{name}/{file.name}" for name in folders for file in sorted((photos / name).iterdir())] == ORDER
    assert stored_names(reader, photos) == ORDER


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf12\n13\n")
    assert [photo.position for photo in read_list(path)] == [12, 13]
    path.write_text("1" * 5000)
    assert read_list(path)[0].position is None


def test_the_forms_of_a_line(tmp_path: Path) -> None:
    assert read_list(write(tmp_path, "4", "", " 17 ")) == [ListedPhoto(1, position=4), ListedPhoto(3, position=17)]
    assert read_list(write(tmp_path, "n01440764_10026.JPEG")) == [ListedPhoto(1, name="n01440764_10026.JPEG")]
    assert read_list(write(tmp_path, "1812,1,n01443537,n01443537_18335.JPEG")) == [
        ListedPhoto(1, 1812, 1, "n01443537", "n01443537_18335.JPEG")
    ]


@pytest.mark.parametrize("photos_given", [False, True])
def test_sslights_lists(photos_given: bool, photos: Path, reader: BetonReader, tmp_path: Path) -> None:
    path = write(tmp_path, "6,2,n03,n03_8.JPEG", "1,0,n01,n01_3.JPEG", "7,2,n03,same.JPEG")
    assert listed_labels(path, reader, photos if photos_given else None).tolist() == [1, 6, 7]


def test_simclrs_lists_need_the_photos(photos: Path, reader: BetonReader, tmp_path: Path) -> None:
    path = write(tmp_path, "n03_8.JPEG", "n01_11.JPEG", "n03/same.JPEG")
    assert listed_labels(path, reader, photos).tolist() == [0, 6, 7]
    with pytest.raises(ProbeError, match=r"--photos"):
        listed_labels(path, reader)


def test_positions_in_the_file_itself(photos: Path, reader: BetonReader, tmp_path: Path) -> None:
    path = write(tmp_path, "5", "0")
    assert listed_labels(path, reader).tolist() == listed_labels(path, reader, photos).tolist() == [0, 5]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["8"], r"line 1: photo 8, but .*train\.beton has 8, counted from 0"),
        (["1", "", "1"], r"line 3: sample 1 of .* stands in line 1 already"),
        (
            ["6,1,n03,n03_8.JPEG"],
            r"line 1: says class 1 \(n03\), but sample 6 of .* is of class 2 \(n03\): the list belongs to other photos",
        ),
        (["6,2,n02,n03_8.JPEG"], r"line 1: says class 2 \(n02\), but"),
        (["1", "n01_3.JPEG"], r"line 2: 'n01_3.JPEG' is not a photo as the list should name it"),
        (["1,2"], r"line 1: '1,2' is not a photo"),
        (["x,0,n01,a.JPEG"], r"line 1: .* is not a photo"),
        (["-1,0,n01,a.JPEG"], r"line 1: .* is not a photo"),
        (["", " "], r"the list names no photo"),
    ],
)
def test_lists_that_do_not_fit(lines: list[str], message: str, reader: BetonReader, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=rf"list\.txt.*{message}") as error:
        listed_labels(write(tmp_path, *lines), reader)
    assert "\n" not in str(error.value)


def test_names_that_do_not_fit(photos: Path, reader: BetonReader, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"line 1: n09_1\.JPEG: not among the 8 photos"):
        listed_labels(write(tmp_path, "n09_1.JPEG"), reader, photos)
    with pytest.raises(ProbeError, match=r"line 2: same\.JPEG: several photos have this name; write CLASS/NAME"):
        listed_labels(write(tmp_path, "n01_3.JPEG", "same.JPEG"), reader, photos)
    with pytest.raises(ProbeError, match=r"line 1: says class 1 \(n01\), but sample 1 .* class 0"):
        listed_labels(write(tmp_path, "1,1,n01,n01_3.JPEG"), reader, photos)


def test_no_list(reader: BetonReader, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="no such list"):
        read_list(tmp_path / "none.txt")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ProbeError, match="not a list of photos"):
        read_list(tmp_path / "photo.jpg")


def test_photos_of_another_file(photos: Path, reader: BetonReader, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    # One photo more in one class, one less in the other: the number agrees.
    shutil.move(other / "n01" / "same.JPEG", other / "n02" / "same.JPEG")
    with pytest.raises(ProbeError, match=r"other: not the photos that .*train\.beton was converted from"):
        stored_names(reader, other)
    shutil.move(other / "n02" / "same.JPEG", other / "n01" / "same.JPEG")
    (other / "n01" / "n01_3.JPEG").write_bytes(jpeg_bytes(make_photo(99, 30, 30)))
    with pytest.raises(ProbeError, match="not the photos"):
        stored_names(reader, other)


def test_where_positions_are_not_those_of_the_folder(photos: Path, tmp_path: Path) -> None:
    """A rejected photo moves all behind it; a part of the photos, or a tar, has an order of its own. By name all of
    them can be read.
    """
    line = write(tmp_path, "6,2,n03,n03_8.JPEG")
    broken = tmp_path / "broken"
    shutil.copytree(photos, broken)
    (broken / "n01" / "n01_3.JPEG").write_bytes(b"\xff\xd8\xff nothing")
    archive = tmp_path / "train.tar"
    with tarfile.open(archive, "w") as tar:
        for name in reversed(ORDER):
            tar.add(photos / name, name)
    for source, options, reason, sample in (
        (broken, AS_IS, "lacks 1 rejected photo", 5),
        (photos, ConvertOptions(keep_size=True, short_side=None, limit=4), r"holds a part of its source's photos", 3),
        (archive, AS_IS, "was made from an archive, a table or a list", 1),
    ):
        path = tmp_path / f"{source.stem}.beton"
        convert(source, path, options)
        with BetonReader(path) as reader:
            with pytest.raises(ProbeError, match=reason):
                listed_labels(line, reader)
            names = stored_names(reader, source)
            assert len(names) == len(reader)
            if "n03/n03_8.JPEG" in names:
                assert listed_labels(line, reader, source).tolist() == [names.index("n03/n03_8.JPEG")] == [sample]


def test_the_rules_that_found_the_classes_are_found_again(photos: Path, tmp_path: Path) -> None:
    labels = write(tmp_path, *(f"{name},{name[:2]}{k % 2}" for k, name in enumerate(ORDER[1:])))
    for number, rules in enumerate((ListingRules(label_from=r"n0(\d)"), ListingRules(labels=labels))):
        path = tmp_path / f"{number}.beton"
        convert(photos, path, AS_IS, rules=rules)
        with BetonReader(path) as reader:
            assert stored_names(reader, photos) == ORDER[number:]
    side_path(path).write_text(side_path(path).read_text().replace('"label_from": null', '"label_from": 7'))
    with BetonReader(path) as reader, pytest.raises(ProbeError, match="unreadable rules"):
        stored_names(reader, photos)


def test_a_file_without_side_file_is_read_by_position(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.beton"
    convert(photos, path, AS_IS)
    side_path(path).unlink()
    with BetonReader(path) as reader:
        assert listed_labels(write(tmp_path, "6,2,n03,n03_8.JPEG"), reader).tolist() == [6]
        with pytest.raises(ProbeError, match="says class 1"):
            listed_labels(write(tmp_path, "6,1,n03,n03_8.JPEG"), reader)
