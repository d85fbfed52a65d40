"""Layouts of folders and tars, splits and labels (layouts.py says how)."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

from layouts import BLUE, CLASSES, COLOURS, WNIDS, layout, tar, write

from fastssl.pipelines.convert.conversion import convert
from tests.pipelines.test_labels import synsets


@layout("class folders")
def _() -> None:
    write(CLASSES)


@layout("a folder of photos")
def _() -> None:
    write({Path(name).parent.name + Path(name).name: data for name, data in CLASSES.items()})


@layout("class folders, to be dealt to three files")
def _() -> None:
    write(CLASSES)


@layout("class folders with folders inside")
def _() -> None:
    write({name.replace("/", "/2024/summer/"): data for name, data in CLASSES.items()})


@layout("a folder of photos, some edited ones in a folder of their own")
def _() -> None:
    write({f"{n}.jpg": BLUE for n in range(5)} | {"edited/0.jpg": BLUE})


@layout("class folders that are links")
def _() -> None:
    write(CLASSES, "elsewhere")
    os.mkdir("photos")
    for colour in COLOURS:
        os.symlink(f"../elsewhere/{colour}", f"photos/{colour}")


@layout("two class folders that are links to one")
def _() -> None:
    write(CLASSES, "elsewhere")
    os.mkdir("photos")
    for name in ("cat", "dog"):
        os.symlink("../elsewhere/red", f"photos/{name}")


@layout("hidden files and the folders of macOS, Jupyter and network disks")
def _() -> None:
    other = {".DS_Store": b"x", "blue/._0.jpg": b"x", "blue/.ipynb_checkpoints/0.jpg": CLASSES["blue/0.jpg"]}
    write(CLASSES | other | {"__MACOSX/0.jpg": b"x", "@eaDir/0.jpg/thumb.jpg": b"x"})


@layout("other files among the photos")
def _() -> None:
    write(CLASSES | {"readme.txt": b"x", "blue/labels.json": b"{}", "blue/x.xmp": b"x"})


@layout("links to photos, one of which leads nowhere")
def _() -> None:
    write({"a.jpg": CLASSES["red/0.jpg"]})
    os.symlink("a.jpg", "photos/b.jpg")
    os.symlink("none.jpg", "photos/c.jpg")


@layout("the folder of a training run beside the photos")
def _() -> None:
    run = {"runs/mine/config.yaml": b"", "runs/mine/checkpoints/last.pt": b"", "runs/mine/views.png": BLUE}
    write(CLASSES | run)


@layout("names beyond ASCII, spaces, endings in capitals")
def _() -> None:
    write({f"Österreich/sept {n} 写真.{ending}": BLUE for n, ending in enumerate(("JPG", "Jpeg", "PNG"))})


# ---- tars


@layout("a tar of class folders")
def _() -> None:
    tar({f"set/v2/{name}": data for name, data in CLASSES.items()}, "photos.tar")


@layout("a tar of photos")
def _() -> None:
    tar({f"set/{name.replace('/', '-')}": data for name, data in CLASSES.items()}, "photos.tar")


@layout("ImageNet's training tar")
def _() -> None:
    inner = {
        f"{wnid}.tar": tar({f"{wnid}_{n}.JPEG": CLASSES[f"{colour}/{n}.jpg"] for n in range(2)})
        for wnid, colour in WNIDS.items()
    }
    tar(inner, "ILSVRC2012_img_train.tar")


@layout("three tars joined into one (`cat a.tar b.tar c.tar`)")
def _() -> None:
    parts = ({name: data for name, data in CLASSES.items() if name.startswith(colour)} for colour in COLOURS)
    Path("photos.tar").write_bytes(b"".join(map(tar, parts)))


@layout("hidden folders in a tar")
def _() -> None:
    hidden = {f"{name}/0.jpg": CLASSES["red/0.jpg"] for name in (".ipynb_checkpoints", "__MACOSX", "blue/.hidden")}
    tar(CLASSES | hidden, "photos.tar")


@layout("two members of one name in a tar")
def _() -> None:
    with tarfile.open("photos.tar", "w") as archive:
        for n in (0, 1, 1):
            member = tarfile.TarInfo(f"{n}.jpg")
            member.size = len(CLASSES[f"red/{n}.jpg"])
            archive.addfile(member, io.BytesIO(CLASSES[f"red/{n}.jpg"]))


# ---- splits and labels

FLAT = {name.replace("/", ""): data for name, data in CLASSES.items()}
JUDGED = {"blue/7.jpg": CLASSES["blue/0.jpg"], "red/8.jpg": CLASSES["red/0.jpg"]}
SPLITS = {f"train/{name}": data for name, data in CLASSES.items()} | {
    f"val/{name}": one for name, one in JUDGED.items()
}
SPLITS |= {"test/1.jpg": CLASSES["green/0.jpg"], "test/2.jpg": CLASSES["green/1.jpg"]}


@layout("class folders inside one folder")
def _() -> None:
    write(CLASSES, "photos/imagenet")


@layout("folders of class folders")
@layout("folders of class folders, of which the second level counts")
def _() -> None:
    write({f"{'warm' if name[0] == 'r' else 'cold'}/{name}": data for name, data in CLASSES.items()})


@layout("class folders with a few photos beside them")
def _() -> None:
    write(CLASSES | {"loose.jpg": BLUE})


@layout("the class as a part of names")
def _() -> None:
    write(FLAT)


@layout("train, val and test folders")
@layout("train, val and test folders, of which one is wanted")
def _() -> None:
    write(SPLITS)


@layout("train and test in each class folder")
def _() -> None:
    write({f"{name[:-5]}{('train', 'test')[int(name[-5])]}/{name[-5:]}": data for name, data in CLASSES.items()})


@layout("Tiny ImageNet")
def _() -> None:
    names = {f"train/{Path(name).parent}/images/{Path(name).name}": data for name, data in CLASSES.items()}
    names |= {f"val/images/val_{k}.jpg": data for k, data in enumerate(JUDGED.values())}
    boxes = b"val_0.jpg\tblue\t0\t0\t63\t63\nval_1.jpg\tred\t0\t0\t63\t63\n"
    tests = {f"test/images/test_{k}.jpg": BLUE for k in range(2)}
    write(names | tests | {"val/val_annotations.txt": boxes}, "tiny")


@layout("a folder of photos and a CSV of their labels")
def _() -> None:
    write(FLAT)
    lines = [f"{name},{name[:-5]}" for name in FLAT][1:]
    Path("labels.csv").write_text("\n".join(["filename,label", *lines, "gone.jpg,red"]))


@layout("a folder of photos and a label a line")
def _() -> None:
    write(FLAT)
    Path("labels.txt").write_text("blue\nblue\ngreen\ngreen\nred\nred\n")


@layout("photos and numbers of their classes, and the classes of another file")
def _() -> None:
    write(CLASSES, "train")
    convert("train", "train.beton")
    write({Path(name).name: data for name, data in JUDGED.items()})
    Path("val.txt").write_text("7.jpg 0\n8.jpg 2\n")


@layout("ImageNet's validation tar and the devkit")
def _() -> None:
    names = {f"ILSVRC2012_val_{k:08}.JPEG": data for k, data in enumerate(CLASSES.values(), 1)}
    tar(dict(reversed(names.items())), "ILSVRC2012_img_val.tar")
    truth = b"".join(b"%d\n" % number for number in (3, 3, 1, 1, 2, 2))
    order = [list(WNIDS)[k] for k in (1, 2, 0)]
    files = {"ILSVRC2012_validation_ground_truth.txt": truth, "meta.mat": synsets(order)}
    data = tar({f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in files.items()})
    Path("ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(data))
