"""Which split and which class a photo belongs to, by its folders."""

from __future__ import annotations

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from fastssl.pipelines.convert.sources import ListingRules, SourceError, list_source, list_splits
from tests.pipelines.test_sources import grow, tar_bytes


def tree(*names):
    return dict.fromkeys(names, b"x")


def of(listing):
    """{path: class name or None}"""
    classes = listing.classes
    return {name: None if classes is None else classes[label] for name, label in zip(listing.names, listing.labels)}


def split_up(source, **rules):
    """{split: {path: class}}, notes"""
    listings = list_splits(source, rules=ListingRules(**rules))
    found, notes = {name: of(listing) for name, listing in listings.items()}, next(iter(listings.values())).notes
    next(iter(listings.values())).close()
    return found, notes


TREE = tree("train/dog/1.jpg", "train/cat/2.jpg", "val/dog/3.jpg", "test/4.jpg", "test/5.jpg")


@pytest.mark.parametrize("above", ["", "ILSVRC/Data/CLS-LOC/"])
@pytest.mark.parametrize("packed", [False, True])
def test_splits_are_no_classes(tmp_path, above, packed):
    files = {f"{above}{name}": data for name, data in TREE.items()} | {f"{above or 'x'}readme.txt": b""}
    source = grow(tmp_path / "src", files)
    if packed:
        source = tmp_path / "x.tar"
        source.write_bytes(tar_bytes(files))
    assert split_up(source) == (
        {
            "train": {f"{above}train/cat/2.jpg": "cat", f"{above}train/dog/1.jpg": "dog"}
            if not packed
            else {f"{above}train/dog/1.jpg": "dog", f"{above}train/cat/2.jpg": "cat"},
            "val": {f"{above}val/dog/3.jpg": "dog"},
            "test": {f"{above}test/4.jpg": None, f"{above}test/5.jpg": None},
        },
        [],
    )
    # One list of classes, with which the labels of all splits count.
    listings = list_splits(source)
    assert listings["train"].classes == listings["val"].classes == ["cat", "dog"] and listings["val"].labels == [1]
    assert list_source(source, rules=ListingRules(split="validation")).names == [f"{above}val/dog/3.jpg"]
    with pytest.raises(
        SourceError, match=r"holds train \(2 photos\) and val \(1 photo\) and test.*--split train takes"
    ):
        list_source(source)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Training", "Testing"),
        ("train2017", "val2017"),
        ("train", "dev"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
    ],
)
def test_names_that_splits_have(tmp_path, first, second):
    found, _ = split_up(grow(tmp_path, tree(f"{first}/a/1.jpg", f"{first}/b/1.jpg", f"{second}/a/1.jpg")))
    assert list(found) == ["train", "test" if second == "Testing" else "val"]
    assert found["train"] == {f"{first}/a/1.jpg": "a", f"{first}/b/1.jpg": "b"}


@pytest.mark.parametrize(
    "names", [("trains", "cars"), ("train", "bus"), ("train", "test", "a", "b", "c"), ("valley", "b")]
)
def test_folders_that_are_classes_in_spite_of_their_names(tmp_path, names):
    found, _ = split_up(grow(tmp_path, tree(*(f"{name}/1.jpg" for name in names))))
    assert found == {"": {f"{name}/1.jpg": name for name in sorted(names)}}


def test_split_none_takes_the_folders_as_classes(tmp_path):
    found, _ = split_up(grow(tmp_path, TREE), split="none")
    assert set(found[""].values()) == {"train", "val", "test"} and len(found[""]) == 5


def test_one_split_alone_is_no_class(tmp_path):
    assert split_up(grow(tmp_path / "a", tree("train/cat/1.jpg", "train/dog/2.jpg")))[0] == {
        "train": {"train/cat/1.jpg": "cat", "train/dog/2.jpg": "dog"}
    }
    assert split_up(grow(tmp_path / "b", tree("test/1.jpg", "test/2.jpg")))[0] == {
        "test": {"test/1.jpg": None, "test/2.jpg": None}
    }


def test_splits_inside_class_folders(tmp_path):
    names = ("cat/train/1.jpg", "cat/test/2.jpg", "dog/train/3.jpg", "dog/test/4.jpg")
    found, _ = split_up(grow(tmp_path, tree(*names)))
    assert found == {"train": dict(zip(names[::2], ("cat", "dog"))), "test": dict(zip(names[1::2], ("cat", "dog")))}


def test_what_lies_beside_splits_is_said(tmp_path):
    found, notes = split_up(grow(tmp_path, TREE | tree("unlabeled/6.jpg", "teaser.jpg")))
    assert list(found) == ["train", "val", "test"] and sum(map(len, found.values())) == 5
    assert notes == ["left out, as they are in no split: 2 photos, first teaser.jpg (--split none takes all)"]


def test_tiny_imagenet(tmp_path):
    """Its class folders have a folder of images in them, its val one folder for all."""
    names = ("train/n1/images/1.jpg", "train/n2/images/2.jpg", "val/images/3.jpg", "test/images/4.jpg")
    files = tree(*names) | {"val/val_annotations.txt": b"3.jpg\tn2\t0\t0\t62\t62\n"}
    found, notes = split_up(grow(tmp_path, files))
    assert found == {
        "train": {names[0]: "n1", names[1]: "n2"},
        "val": {names[2]: None},
        "test": {names[3]: None},
    }
    assert notes == []
    found, _ = split_up(tmp_path, labels=tmp_path / "val/val_annotations.txt")
    assert found["val"] == {names[2]: "n2"} and found["test"] == {names[3]: None} and found["train"][names[0]] == "n1"


def test_classes_of_val_that_train_lacks_are_said(tmp_path):
    files = tree("train/b/1.jpg", "train/c/1.jpg", "val/a/1.jpg", "val/b/1.jpg", "test/part1/1.jpg", "test/part2/1.jpg")
    found, notes = split_up(grow(tmp_path, files))
    assert found["val"] == {"val/a/1.jpg": "a", "val/b/1.jpg": "b"} and set(found["test"].values()) == {None}
    assert notes == ["val: 1 class that train lacks (a)", "test: its folders are no classes of train: no labels"]


def test_a_split_that_is_not_there(tmp_path):
    grow(tmp_path, TREE | {"a.txt": b""})
    (tmp_path / "test").rename(tmp_path / "x")
    with pytest.raises(SourceError, match=r"no split test: it has train and val"):
        list_source(tmp_path, rules=ListingRules(split="test"))
    with pytest.raises(SourceError, match=r"no split val: no folders are called train, val, test"):
        list_source(grow(tmp_path / "y", tree("a/1.jpg")), rules=ListingRules(split="val"))
    with pytest.raises(SourceError, match="--split all: say auto, none, train, val, test"):
        ListingRules(split="all")
    with pytest.raises(SourceError, match="some of the sources hold train and val, some hold no splits"):
        list_source([tmp_path, tmp_path / "y"])


def test_rejects_are_listed_with_their_split(tmp_path):
    grow(tmp_path, TREE)
    for name in ("val/dog/dead.jpg", "gone.jpg"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    listings = list_splits(tmp_path)
    assert [[name for name, _ in one.rejected] for one in listings.values()] == [["gone.jpg"], ["val/dog/dead.jpg"], []]


# ---- which folder is the class

NESTED = tree("animals/cat/1.jpg", "animals/dog/2.jpg", "plants/tree/3.jpg", "plants/tree/old/4.jpg")


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, ["animals", "animals", "plants", "plants"]),
        ({"label_from": "top"}, ["animals", "animals", "plants", "plants"]),
        ({"depth": 2}, ["cat", "dog", "tree", "tree"]),
        ({"label_from": "parent"}, ["cat", "dog", "tree", "old"]),
        ({"label_from": r"/(\w)\w*/"}, ["c", "d", "t", "t"]),
        ({"label_from": r"\d"}, ["1", "2", "3", "4"]),
    ],
)
def test_nested_class_folders(tmp_path, rules, expected):
    found, notes = split_up(grow(tmp_path, NESTED), **rules)
    assert list(found[""].values()) == expected
    said = "classes are the first folders (animals, plants); --label-from parent would make 4 of the folders that hold "
    assert notes == ([] if rules else [said + "the photos"])


def test_photos_for_which_the_rule_finds_no_class(tmp_path):
    grow(tmp_path, NESTED)
    with list_source(tmp_path, rules=ListingRules(depth=3)) as listing:
        assert of(listing) == {"plants/tree/old/4.jpg": "old"}
        assert len(listing.rejected) == 3 and "--depth 3 finds no class in its path" in listing.rejected[0][1]
    with list_source(tmp_path, rules=ListingRules(label_from="t(r)ee")) as listing:
        assert set(of(listing).values()) == {"r"} and len(listing.rejected) == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"label_from": "("}, r"--label-from \(: neither top, parent nor txt, nor a regular expression"),
        ({"depth": 0}, "counts folder levels from 1"),
        ({"depth": 2, "label_from": "parent"}, "without --label-from"),
    ],
)
def test_rules_that_say_nothing(wrong, words):
    with pytest.raises(SourceError, match=words):
        ListingRules(**wrong)


def test_one_folder_around_class_folders_is_no_class(tmp_path):
    found, notes = split_up(grow(tmp_path, tree("photos/imagenet/cat/1.jpg", "photos/imagenet/dog/2.jpg")))
    assert list(found[""].values()) == ["cat", "dog"]
    assert notes == ["classes are the folders of photos/imagenet (cat, dog)"]
    # But a single class is one, as for torchvision.
    root = grow(tmp_path / "one", tree("cat/1.jpg", "cat/2.jpg"))
    assert set(split_up(root)[0][""].values()) == {"cat"} and ImageFolder(str(root)).classes == ["cat"]


def test_loose_photos_beside_class_folders(tmp_path):
    """Left out as torchvision does, and listed; where no labels are needed, none is lost."""
    files = tree(*(f"{name}/{k}.jpg" for name in ("cat", "dog") for k in range(4)), "loose.jpg")
    with list_source(grow(tmp_path, files)) as listing:
        assert len(ImageFolder(str(tmp_path))) == len(listing) == 8
        assert listing.rejected == [("loose.jpg", "not inside a class folder, unlike other photos here")]
    with list_source(tmp_path, rules=ListingRules(keep_all=True)) as listing:
        assert len(listing) == 9 and listing.classes is None and listing.rejected == []
        assert listing.notes == ["1 photo beside the folders cat, dog: all are taken, without classes"]


def test_a_hundred_loose_photos_beside_a_folder_of_three(tmp_path):
    files = tree(*(f"{k}.jpg" for k in range(100)), "a/1.jpg", "a/2.jpg", "a/3.jpg")
    found, notes = split_up(grow(tmp_path, files))
    assert len(found[""]) == 103 and set(found[""].values()) == {None}
    assert notes == ["a among the photos: no classes"]


def test_the_fingerprint_knows_labels(tmp_path):
    """The same photos with other labels are another file."""
    grow(tmp_path, tree("a/b/1.jpg", "a/b/2.jpg"))
    (tmp_path / "x.csv").write_text("1.jpg,a\n2.jpg,b\n")
    (tmp_path / "y.csv").write_text("1.jpg,b\n2.jpg,a\n")
    prints = [
        list_source(tmp_path, rules=ListingRules(labels=tmp_path / name)).fingerprint for name in ("x.csv", "y.csv")
    ]
    assert prints[0] != prints[1]


def test_labels_are_torchvisions(tmp_path):
    names = [f"n0{k:02}/{k}-{i}.jpg" for k in (3, 11, 20, 1) for i in range(2)] + ["10/a.jpg", "9/a.jpg", "Z/a.jpg"]
    grow(tmp_path, tree(*names))
    expected = ImageFolder(str(tmp_path))
    with list_source(tmp_path) as listing:
        assert listing.classes == expected.classes
        assert [(str(tmp_path / name), label) for name, label in zip(listing.names, listing.labels)] == expected.samples
        assert listing.labels.dtype == np.int64
