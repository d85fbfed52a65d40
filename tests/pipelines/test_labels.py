"""Files of labels and of classes, and which photo a line belongs to."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from scipy.io import savemat

from fastssl.errors import FastSSLError
from fastssl.pipelines.convert.sources import ListingRules, list_source
from fastssl.pipelines.convert.sources.labels import LabelError, Labels, read_classes, read_labels, read_table
from fastssl.pipelines.convert.sources.matlab import read_synsets
from tests.pipelines.test_sources import grow
from tests.pipelines.test_splits import of, tree

PHOTOS = ["val/b.jpg", "val/a.jpg"]


def synsets(wnids, **how):
    """meta.mat as the devkit has it: the numbers count in an order of their own, inner nodes follow the classes."""
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    table = np.zeros((len(wnids) + 1, 1), [(name, "O") for name in names])
    for k, wnid in enumerate([*wnids, "n00001740"]):
        children = np.array([[1.0, 2.0]]) if k == len(wnids) else np.zeros((1, 0))
        table[k, 0] = (float(k + 1), wnid, f"words {k}", "a gloss", float(children.size), children, 3.0)
    file = io.BytesIO()
    savemat(file, {"other": np.arange(3.0), "synsets": table}, **how)
    return file.getvalue()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jpg,cat\nb.jpg,dog\n", (["a.jpg", "b.jpg"], ["cat", "dog"])),
        ("path,label\r\na.jpg,cat\r\n", (["a.jpg"], ["cat"])),
        ("\ufefflabel;image_path\n'dog';x/b.png\n", (["x/b.png"], ["'dog'"])),
        ('"a, b.jpg",cat\n', (["a, b.jpg"], ["cat"])),
        ("a.jpg\tn01\t0\t0\t62\t62\n", (["a.jpg"], ["n01"])),
        ("ILSVRC2012_val_00000001.JPEG 65\nILSVRC2012_val_00000002.JPEG 970\n",
         (["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"], ["65", "970"])),
        ("my cat.jpg 3\n", (["my cat.jpg"], ["3"])),
        ("ImageId,PredictionString\nval_1,n02 1 2 3 4 n02 5 6 7 8 \n", (["val_1"], ["n02"])),
        ("polar bear\n\ncat\n", (None, ["polar bear", "cat"])),
        ('"tench, Tinca"\ncat\n', (None, ["tench, Tinca", "cat"])),
        ("490\n361\n", (None, ["490", "361"])),
        ("id,species,when\n7,owl,x\n", (["7"], ["owl"])),
        ("a.jpg,cat\nb.jpg,-1\n", (["a.jpg", "b.jpg"], ["cat", ""])),
        ("a\x85.jpg,cat\n\u2028.jpg,dog\n", (["a\x85.jpg", ".jpg"], ["cat", "dog"])),
        ("label\ncat\ndog\n", (None, ["cat", "dog"])),
    ],
)  # fmt: skip
def test_tables(text, expected):
    assert read_table(text.encode()) == expected


def test_a_table_in_another_encoding():
    for encoding in ("latin-1", "utf-16"):
        assert read_table("a.jpg,Käfer\n".encode(encoding)) == (["a.jpg"], ["Käfer"])
    assert read_table(b"\xfe\xff" + "a.jpg\tKäfer\r\n".encode("utf-16-be")) == (["a.jpg"], ["Käfer"])


@pytest.mark.parametrize(
    "names",
    [["val/a.jpg", "val/b.jpg"], ["/data/x/val/a.jpg", "/data/x/val/b.jpg"], ["a.jpg", "b.jpg"], ["./a", "b"],
     ["a.png", "b.png", "a.jpg", "b.jpg"][2:], ["train/a.jpg", "a.jpg", "val/b.jpg"][1:]],
)  # fmt: skip
def test_a_line_finds_its_photo(tmp_path, names):
    assert Labels(tmp_path, ["A", "B"], names).of(PHOTOS) == ["B", "A"]


def test_the_surest_name_decides(tmp_path):
    labels = Labels(tmp_path, ["val's", "train's"], ["val/a.jpg", "train/a.jpg"])
    assert labels.of(["x/train/a.jpg", "val/a.jpg"]) == ["train's", "val's"]
    # A line that was found by its path is not taken again by a photo of the same name elsewhere.
    assert Labels(tmp_path, ["val's"], ["val/a.jpg"]).of(["train/a.jpg", "val/a.jpg"]) == ["", "val's"]


def test_names_that_fit_twice_are_errors(tmp_path):
    with pytest.raises(LabelError, match=r"a.jpg, which 2/a.jpg is found by, is also 1/a.jpg: write the photos' paths"):
        Labels(tmp_path, ["A"], ["a.jpg"]).of(["1/a.jpg", "2/a.jpg"])
    with pytest.raises(LabelError, match=r"a.jpg, which a.jpg is found by, has several classes"):
        Labels(tmp_path, ["A", "B"], ["x/a.jpg", "y/a.jpg"]).of(["a.jpg"])
    assert Labels(tmp_path, ["A", "A"], ["x/a.jpg", "y/a.jpg"]).of(["a.jpg"]) == ["A"]


def test_one_label_a_line_is_in_the_order_of_sorted_names(tmp_path):
    assert Labels(tmp_path, ["A", "B"]).of(PHOTOS) == ["B", "A"]
    with pytest.raises(LabelError, match="3 labels for 2 photos"):
        Labels(tmp_path, ["A", "B", "C"]).of(PHOTOS)


@pytest.mark.parametrize(("text", "first"), [("a.jpg 0\nb.jpg 2\n", 0), ("a.jpg 1\nb.jpg 3\n", 1)])
def test_numbers_are_places_in_the_class_list(tmp_path, text, first):
    (tmp_path / "val.txt").write_text(text)
    assert read_labels(tmp_path / "val.txt", ["x", "y", "z"]).classes == ["x", "z"]
    assert read_labels(tmp_path / "val.txt").classes == [f"{first}", f"{first + 2}"]


@pytest.mark.parametrize("text", ["a.jpg 1\nb.jpg 2\n", "a.jpg 0\nb.jpg 3\n", "a.jpg 4\n"])
def test_numbers_that_may_count_from_0_or_1_are_asked_for(tmp_path, text):
    (tmp_path / "val.txt").write_text(text)
    with pytest.raises(LabelError, match="do not say which of 3 classes are meant; write names"):
        read_labels(tmp_path / "val.txt", ["x", "y", "z"])


# ---- ImageNet's own files

WNIDS = ["n03", "n01", "n02"]  # the devkit's order is not the sorted one


@pytest.mark.parametrize("compressed", [False, True])
def test_meta_mat(compressed):
    data = synsets(WNIDS, do_compression=compressed)
    assert read_synsets(data) == {1: "n03", 2: "n01", 3: "n02", 4: "n00001740"}
    for damaged in (data[:300], data[:128], b"", b"x" * 500, data[:200] + bytes(100) + data[300:]):
        with pytest.raises(ValueError, match=r"damaged|not a MATLAB|has no"):
            read_synsets(damaged)


def test_random_damage_to_meta_mat_ends():
    data, draw = synsets(WNIDS), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for at in draw.integers(128, len(data), 3):
            damaged[at] = draw.integers(256)
        try:
            read_synsets(bytes(damaged))
        except ValueError:
            pass


def devkit(folder, packed):
    """As it comes, or unpacked."""
    inside = "ILSVRC2012_devkit_t12/data"
    truth, meta = f"{inside}/ILSVRC2012_validation_ground_truth.txt", f"{inside}/meta.mat"
    files = {f"{inside}/readme.txt": b"", truth: b"2\n1\n", meta: synsets(WNIDS)}
    if packed == "file":
        return grow(folder, files) / truth
    if packed == "folder":
        return grow(folder, files) / "ILSVRC2012_devkit_t12"
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return folder / "ILSVRC2012_devkit_t12.tar.gz"


@pytest.mark.parametrize("packed", ["file", "folder", "tar.gz"])
def test_the_devkit(tmp_path, packed):
    labels = read_labels(devkit(tmp_path, packed))
    assert (labels.names, labels.classes) == (None, ["n01", "n03"])


def test_the_devkits_numbers_alone_say_nothing(tmp_path):
    path = devkit(tmp_path, "file")
    path.with_name("meta.mat").unlink()
    with pytest.raises(LabelError, match=r"counts classes in an order that meta.mat of the devkit says; put it beside"):
        read_labels(path, ["n01", "n02", "n03"])


def test_a_number_that_the_devkit_does_not_know(tmp_path):
    path = devkit(tmp_path, "file")
    path.write_bytes(b"2\n9\n")
    with pytest.raises(LabelError, match=r"class 9 is none of those in meta\.mat"):
        read_labels(path)


def test_kaggles_solution(tmp_path):
    text = b"ImageId,PredictionString\nval_2,n02 1 2 3 4 \nval_1,n01 5 6 7 8 n01 1 2 3 4 \n"
    (tmp_path / "LOC_val_solution.csv").write_bytes(text)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("LOC_val_solution.csv", text)
        archive.writestr("LOC_train_solution.csv", "ImageId,PredictionString\nn01_1,n01\n")
    for path in (tmp_path, tmp_path / "x.zip", tmp_path / "LOC_val_solution.csv"):
        assert read_labels(path).of(["val/val_1.JPEG", "val/val_2.JPEG"]) == ["n01", "n02"]


def test_classes_of_a_list_and_of_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("polar bear\ncat\n")
    (tmp_path / "synsets.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    (tmp_path / "x.beton").write_bytes(bytes(100))
    (tmp_path / "x.beton.json").write_text(json.dumps({"classes": ["b", "a"], "bytes": 100}))
    assert read_classes(tmp_path / "names.txt") == ["polar bear", "cat"]
    assert read_classes(tmp_path / "synsets.txt") == ["n01440764", "n01443537"]
    assert read_classes(tmp_path / "x.beton") == ["b", "a"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.csv", None, "no labels can be read|No such file"),
        ("empty.txt", b"\n", "no labels in it"),
        ("short.csv", b"path,label\na.jpg\n", "a line without photo or label: a.jpg"),
        ("blank.csv", b"path,label\na.jpg,\n", "a line without photo or label: a.jpg"),
        ("x.zip", b"PK\3\4 no zip", "no labels can be read: BadZipFile"),
        ("x.csv", b"a.jpg,\0", "not a text file"),
        ("quote.csv", b'a.jpg,cat\n"b.jpg,dog\nc.jpg,dog\n', "no labels can be read: Error: unexpected end of data"),
        ("x.tar.gz", b"\x1f\x8b no tar", "no labels can be read"),
    ],
)
def test_files_that_say_nothing(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FastSSLError, match=words) as caught:
        read_labels(tmp_path / name).of(PHOTOS)
    assert name in str(caught.value)


def test_random_damage_to_files_of_labels_ends(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        lines = "".join(f"val_{k},n{k} 1 2 3 4\n" for k in range(50))
        archive.writestr("x/LOC_val_solution.csv", f"ImageId,PredictionString\n{lines}")
    (tmp_path / "x.csv").write_bytes(b'ImageId,label\n"a, b.jpg",cat\nx/b.jpg,dog\n')
    draw = np.random.default_rng(1)
    for path in (tmp_path / "x.zip", tmp_path / "x.csv", devkit(tmp_path, "tar.gz")):
        whole = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(whole[: draw.integers(1, len(whole) * 2)])
            for at in draw.integers(0, len(damaged), 2):
                damaged[at] = draw.integers(256)
            path.write_bytes(damaged)
            try:
                read_labels(path)
            except FastSSLError as error:
                assert path.name in str(error)


def test_class_lists_that_say_nothing(tmp_path):
    for name, text, words in (("a", "", "names no classes"), ("b", "x\nx\n", "stands in it twice")):
        (tmp_path / name).write_text(text)
        with pytest.raises(LabelError, match=words):
            read_classes(tmp_path / name)
    with pytest.raises(FastSSLError, match="nowhere"):
        read_classes(tmp_path / "nowhere")


# ---- on a list of photos


def listed(root, **rules):
    with list_source(root, rules=ListingRules(**rules)) as listing:
        return listing


def test_a_flat_folder_gets_its_labels(tmp_path):
    grow(tmp_path / "photos", tree("1.jpg", "2.jpg", "3.jpg", "4.jpg"))
    (tmp_path / "x.csv").write_text("1.jpg,dog\n3.jpg,cat\n2,dog\n9.jpg,cow\n8.jpg,cow\n")
    listing = listed(tmp_path / "photos", labels=tmp_path / "x.csv")
    assert of(listing) == {"1.jpg": "dog", "2.jpg": "dog", "3.jpg": "cat"} and listing.classes == ["cat", "dog"]
    assert listing.rejected == [("4.jpg", "x.csv has no label for it")]
    assert listing.notes == [f"{tmp_path / 'x.csv'}: 2 labels without a photo here"]


def test_labels_that_all_have_a_photo_are_not_counted(tmp_path):
    """A label a line has no names to count."""
    grow(tmp_path / "photos", tree("1.jpg", "2.jpg"))
    (tmp_path / "x.txt").write_text("dog\ncat\n")
    listing = listed(tmp_path / "photos", labels=tmp_path / "x.txt")
    assert of(listing) == {"1.jpg": "dog", "2.jpg": "cat"} and listing.notes == []


def test_numbers_are_sorted_by_value(tmp_path):
    grow(tmp_path / "photos", tree(*(f"{k}.jpg" for k in range(12))))
    (tmp_path / "x.csv").write_text("".join(f"{k}.jpg,{k}\n" for k in range(12)))
    listing = listed(tmp_path / "photos", labels=tmp_path / "x.csv")
    assert listing.labels.tolist() == [int(name.split(".")[0]) for name in listing.names]


def test_a_class_list_gives_the_order(tmp_path):
    grow(tmp_path / "photos", tree("a/1.jpg", "c/2.jpg"))
    (tmp_path / "classes.txt").write_text("c\nb\na\n")
    listing = listed(tmp_path / "photos", classes=tmp_path / "classes.txt")
    assert listing.classes == ["c", "b", "a"] and listing.labels.tolist() == [2, 0]
    (tmp_path / "classes.txt").write_text("b\nc\n")
    with pytest.raises(LabelError, match=r"classes.txt: does not list the class a$"):
        listed(tmp_path / "photos", classes=tmp_path / "classes.txt")


def test_labels_that_belong_to_other_photos(tmp_path):
    grow(tmp_path / "photos", tree("1.jpg", "2.jpg") | tree("val/3.jpg"))
    (tmp_path / "x.csv").write_text("7.jpg,dog\n")
    with pytest.raises(LabelError, match=r"names none of the photos; the first that it names is 7.jpg"):
        listed(tmp_path / "photos", labels=tmp_path / "x.csv")
    grow(tmp_path / "splits", tree("train/1.jpg", "val/2.jpg"))
    (tmp_path / "x.txt").write_text("dog\n")
    with pytest.raises(LabelError, match="labels without names are of one split; say --split val"):
        listed(tmp_path / "splits", labels=tmp_path / "x.txt")
    assert of(listed(tmp_path / "splits", labels=tmp_path / "x.txt", split="val")) == {"val/2.jpg": "dog"}


def test_names_of_other_systems_are_found(tmp_path):
    """Backslashes, accents taken apart, Latin-1: of lists from Windows, of disks of Macs, of old archives."""
    photos = ["x/cafe\u0301.jpg", "x/caf\udce9 2.jpg", "y/a.jpg"]
    lines = ".\\x\\café.jpg,cat\nx\\café 2.jpg,dog\ny\\a.jpg,owl\n"
    for encoding in ("utf-8", "latin-1", "utf-16"):
        (tmp_path / "x.csv").write_bytes(lines.encode(encoding))
        assert read_labels(tmp_path / "x.csv").of(photos) == ["cat", "dog", "owl"]


def test_numbers_that_are_none_and_unused_labels(tmp_path):
    """01 and 1 are two classes, always in one order; -1 is no class; a label a line leaves none over."""
    grow(tmp_path / "p", {f"{k}.jpg": b"x" for k in range(4)})
    (tmp_path / "x.csv").write_text("0.jpg,1\n1.jpg,01\n2.jpg,10\n3.jpg,-1\n")
    with listed(tmp_path / "p", labels=tmp_path / "x.csv") as found:
        assert found.classes == ["01", "1", "10"] and found.labels.tolist() == [1, 0, 2] and found.notes == []
        assert found.rejected == [("3.jpg", "x.csv has no label for it")]
    (tmp_path / "c.txt").write_text("cat\ndog\n")
    (tmp_path / "n.csv").write_text("0.jpg,0\n1.jpg,1\n2.jpg,-1\n3.jpg,-1\n")
    with listed(tmp_path / "p", labels=tmp_path / "n.csv", classes=tmp_path / "c.txt") as found:
        assert found.classes == ["cat", "dog"] and len(found) == 2
    (tmp_path / "x.txt").write_text(f"cat\ndog\ncat\n{'9' * 5000}\n")
    with listed(tmp_path / "p", labels=tmp_path / "x.txt") as found:
        assert len(found.classes) == 3 and found.notes == []
    (tmp_path / "x.txt").write_text(f"1\n2\n3\n{'9' * 5000}\n")
    with listed(tmp_path / "p", labels=tmp_path / "x.txt") as found:
        assert found.classes == ["1", "2", "3", "9" * 5000]


def test_matlab_files_that_unpack_without_end():
    """Compressed in itself, which no program writes: time and memory would be a power of the file's size."""

    def packed(content):
        content = zlib.compress(content)
        return struct.pack("<II", 15, len(content)) + content

    start = bytes(124) + b"\x00\x01IM"
    for data in (packed(packed(bytes(100)) * 3), packed(bytes(33 << 20)) * 2 + packed(bytes(100))):
        with pytest.raises(ValueError, match="more compressed than such a file holds"):
            read_synsets(start + data)
