"""Which split and which class a photo belongs to, by its folders."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from torchvision.datasets import ImageFolder

from fastssl.cli.convert import convert_imagenet
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import read_side_file
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.convert.sources import ListingRules, SourceError, list_source, list_splits
from fastssl.pipelines.convert.splits import convert_splits
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
        SourceError, match=r"holds train \(2 photos\) and val \(1 photo\) and test.*with --split train of one"
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


def test_tars_of_splits_in_a_tar(tmp_path):
    inner = {f"{split}.tar": tar_bytes(tree("cat/1.jpg", "dog/2.jpg")) for split in ("train", "val")}
    (tmp_path / "all.tar").write_bytes(tar_bytes(inner))
    found, _ = split_up(tmp_path / "all.tar")
    assert list(found) == ["train", "val"] and all(list(one.values()) == ["cat", "dog"] for one in found.values())
    # But vehicles are classes.
    vehicles = {f"{name}.tar": tar_bytes(tree(f"{name}.jpg")) for name in ("train", "bus")}
    (tmp_path / "classes.tar").write_bytes(tar_bytes(vehicles))
    assert list(split_up(tmp_path / "classes.tar")[0][""].values()) == ["train", "bus"]


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
    assert split_up(tmp_path, split="val")[1] == notes[:1]


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


def test_a_rule_that_finds_no_class_at_all_is_an_error(tmp_path):
    for rules, name in (({"depth": 9}, "--depth 9"), ({"label_from": "x(y)"}, "--label-from x(y)")):
        with pytest.raises(SourceError, match=rf"{re.escape(name)} finds no class in any path"):
            list_source(grow(tmp_path, NESTED), rules=ListingRules(**rules))


def test_the_rule_is_for_each_split_and_test_may_have_no_classes(tmp_path):
    files = tree("train/1/cat/a.jpg", "train/2/dog/b.jpg", "val/3/cat/c.jpg", "test/d.jpg")
    found, notes = split_up(grow(tmp_path, files), label_from="parent")
    assert [list(one.values()) for one in found.values()] == [["cat", "dog"], ["cat"], [None]] and notes == []


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


def test_photos_without_a_label_among_labelled_ones(tmp_path):
    files = {"1.jpg": b"x", "1.cls": b"3", "2.jpg": b"x", "3.jpg": b"x", "3.cls": b"5"}
    (tmp_path / "x.tar").write_bytes(tar_bytes(files))
    with list_source(tmp_path / "x.tar") as listing:
        assert of(listing) == {"1.jpg": "3", "3.jpg": "5"} and [name for name, _ in listing.rejected] == ["2.jpg"]
    with list_source(tmp_path / "x.tar", rules=ListingRules(keep_all=True)) as listing:
        assert len(listing) == 3 and listing.classes is None
        assert listing.notes == ["1 photo without a label: all are taken, without classes"]
    with pytest.raises(SourceError, match="--label-from txt finds no class"):
        list_source(tmp_path / "x.tar", rules=ListingRules(label_from="txt"))


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


def test_one_of_several_splits_may_be_preferred(tmp_path):
    with list_source(grow(tmp_path, TREE), prefer="val") as listing:
        assert listing.names == ["val/dog/3.jpg"] and listing.splits == ["train", "val", "test"]
        holds = f"{tmp_path}: holds train (2 photos) and val (1 photo) and test (2 photos): val is taken"
        assert listing.notes == [holds]
    with list_source(tmp_path / "train", prefer="val") as listing:
        assert listing.splits == [] and listing.notes == [] and listing.classes == ["cat", "dog"]


def test_labels_are_torchvisions(tmp_path):
    names = [f"n0{k:02}/{k}-{i}.jpg" for k in (3, 11, 20, 1) for i in range(2)] + ["10/a.jpg", "9/a.jpg", "Z/a.jpg"]
    grow(tmp_path, tree(*names))
    expected = ImageFolder(str(tmp_path))
    with list_source(tmp_path) as listing:
        assert listing.classes == expected.classes
        assert [(str(tmp_path / name), label) for name, label in zip(listing.names, listing.labels)] == expected.samples
        assert listing.labels.dtype == np.int64


# ---- files


@pytest.fixture
def photo_splits(tmp_path, photo_tree):
    """24 photos of 3 classes to learn from, 4 of 2 to be judged on, 2 unlabelled ones."""
    source = tmp_path / "src"
    for split, name, numbers in (
        *(("train", name, range(8)) for name in ("blue", "green", "red")),
        *(("val", name, range(8, 10)) for name in ("green", "red")),
        ("test", "", range(10, 12)),
    ):
        (source / split / name).mkdir(parents=True)
        for number in numbers:
            photo = photo_tree / (name or "blue") / f"{number:02}.jpg"
            (source / split / name / photo.name).write_bytes(photo.read_bytes())
    return source


def run(*arguments):
    result = CliRunner().invoke(convert_imagenet, list(map(str, arguments)))
    return result.exit_code, result.stderr, result.exception


def test_a_file_for_each_split(photo_splits, tmp_path):
    status, said, _ = run(photo_splits, tmp_path / "x.beton", "--json", tmp_path / "x.json", "--keep-size")
    assert status == 0 and not (tmp_path / "x.beton").exists()
    paths = [tmp_path / f"x-{split}.beton" for split in ("train", "val", "test")]
    assert [line.split(" copied")[0] for line in said.splitlines() if "copied" in line] == [
        f"{paths[0]}: 24 photos, 3 classes: 24",
        f"{paths[1]}: 4 photos, 3 classes: 4",
        f"{paths[2]}: 2 photos, no labels: 2",
    ]
    records = json.loads((tmp_path / "x.json").read_text())
    assert [(one["path"], one["split"], one["written"]) for one in records] == [
        ("x-train.beton", "train", 24),
        ("x-val.beton", "val", 4),
        ("x-test.beton", "test", 2),
    ]
    with BetonReader(paths[0]) as train, BetonReader(paths[1]) as val, BetonReader(paths[2]) as test:
        assert train.classes == val.classes == ["blue", "green", "red"] and not test.labelled
        assert train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8 and val.labels.tolist() == [1, 1, 2, 2]
    assert read_side_file(paths[1])["split"] == "val"


def test_one_split_goes_into_dst_itself(photo_splits, tmp_path):
    assert run(photo_splits, tmp_path / "v.beton", "--split", "val")[0] == 0
    assert run(photo_splits, tmp_path / "n.beton", "--split", "none")[0] == 0
    assert sorted(path.name for path in tmp_path.glob("*.beton")) == ["n.beton", "v.beton"]
    with BetonReader(tmp_path / "v.beton") as val, BetonReader(tmp_path / "n.beton") as none:
        assert len(val) == 4 and val.labels.tolist() == [1, 1, 2, 2]
        assert len(none) == 30 and none.classes == ["test", "train", "val"]


def test_splits_resume_and_limit(photo_splits, tmp_path):
    """Stopped behind the first file: it stays as it is, the others follow, and all is as if nothing happened."""
    dst, options = tmp_path / "x.beton", ConvertOptions(workers=1)
    convert_splits(photo_splits, tmp_path / "whole.beton", options)

    def stop(done, total):
        if done == 24 and (tmp_path / "x-train.beton").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_splits(photo_splits, dst, options, stop)
    first = (tmp_path / "x-train.beton").stat()
    assert not (tmp_path / "x-val.beton").exists()
    ticks = []
    train, *_ = convert_splits(photo_splits, dst, options, lambda done, total: ticks.append((done, total)))
    assert (tmp_path / "x-train.beton").stat() == first and train.resumed == 24
    assert ticks[-1] == (30, 30) and ticks == sorted(ticks)
    for split in ("train", "val", "test"):
        assert (tmp_path / f"x-{split}.beton").read_bytes() == (tmp_path / f"whole-{split}.beton").read_bytes()
    # Other options: nothing is taken over.
    assert [one.written for one in convert_splits(photo_splits, dst, ConvertOptions(limit=3))] == [3, 3, 2]


def test_shards_of_splits(photo_splits, tmp_path):
    assert run(photo_splits, tmp_path / "x.beton", "--shards", 2)[0] == 0
    names = [f"x-{split}-0000{k}-of-00002.beton" for split in ("test", "train", "val") for k in range(2)]
    assert sorted(path.name for path in tmp_path.glob("*.beton")) == names
    assert run(photo_splits, tmp_path / "y.beton", "--shard", "1/2")[0] == 0
    for split in ("train", "val", "test"):
        name = f"{split}-00001-of-00002.beton"
        assert (tmp_path / f"x-{name}").read_bytes() == (tmp_path / f"y-{name}").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--split", "all"], 2, "say auto, none, train, val, test"),
        (["--depth", "2", "--label-from", "parent"], 2, "goes without --label-from"),
        (["--label-from", "["], 2, "nor a regular expression"),
        (["--labels", "nowhere.csv"], 2, "does not exist"),
    ],
)
def test_wrong_usage(photo_splits, tmp_path, arguments, status, words):
    found, said, _ = run(photo_splits, tmp_path / "x.beton", *arguments)
    assert found == status and words in said and not list(tmp_path.glob("*.beton"))


def test_what_was_taken_as_the_class_is_said(photo_tree, tmp_path):
    shutil.copytree(photo_tree, tmp_path / "src" / "a" / "colours")
    shutil.copytree(photo_tree / "red", tmp_path / "src" / "b" / "red")
    _, said, _ = run(tmp_path / "src", tmp_path / "x.beton")
    assert "classes are the first folders (a, b); --label-from parent would make 3 of the folders that hold" in said
    _, said, _ = run(tmp_path / "src", tmp_path / "y.beton", "--label-from", "parent")
    assert "64 photos, 3 classes" in said and "would make" not in said


@pytest.mark.parametrize("only", [None, 0])
def test_the_bar_of_shards_ends_where_they_do(photo_splits, tmp_path, only):
    ticks = []
    done = convert_splits(photo_splits, tmp_path / "x.beton", None, lambda *tick: ticks.append(tick), shards=(only, 2))
    photos = sum(one.written for one in done)
    assert {total for _, total in ticks} == {photos} and max(now for now, _ in ticks) == photos
