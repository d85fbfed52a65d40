"""The table of docs/data.md: every row is carried out. A builder makes the layout that the row's first cell names, the
command of its second cell runs on it, and the output is compared with its third cell.

To add a row: a line in the table, and here a builder with the first cell's very words, which writes what the command
takes into the current folder::

    @layout("a zip of class folders")
    def _():
        with zipfile.ZipFile("photos.zip", "w") as archive:
            for name, data in CLASSES.items():
                archive.writestr(name, data)

The third cell holds parts of the output, between semicolons; what is rejected, ignored or passed over must stand there.
Every picture is blue, green or red: where a label of that name (or its wnid) comes out, the pixels are of that colour.
A row that needs an optional package asks for it in its builder: ``pytest.importorskip("pyarrow")``. What has to go on
while the command runs (a server) is begun before a ``yield`` of the builder, and ended behind it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import shlex
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_photo
from PIL import Image
from profiles import ADOBE, with_primaries
from untidy import untidy

from fastssl.cli import cli
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.convert.conversion import convert
from tests.pipelines.test_labels import synsets

COLOURS = ("blue", "green", "red")
#: ImageNet's names for three classes, in its order
WNIDS = dict(zip(("n01440764", "n01443537", "n01484850"), COLOURS))
BUILDERS: dict[str, Callable[[], object]] = {}


def layout(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Register the builder of the row whose first cell is ``name``."""

    def register(builder: Callable[[], object]) -> Callable[[], object]:
        assert name not in BUILDERS, f"two builders for {name!r}"
        BUILDERS[name] = builder
        return builder

    return register


def picture(colour: str, seed: int = 0) -> Image.Image:
    """48 x 64 pixels, in which one channel leads clearly."""
    rgb = (make_photo(seed, 48, 64) * 0.4).astype(np.uint8)
    rgb[..., 2 - COLOURS.index(colour)] += 120
    return Image.fromarray(rgb)


def coded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    """The bytes of a picture file, by Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


#: two photos of each of three classes, by their paths
CLASSES = {f"{colour}/{n}.jpg": coded(picture(colour, n)) for colour in COLOURS for n in range(2)}
BLUE, GREEN, RED = (picture(colour) for colour in COLOURS)


def write(files: Mapping[str, bytes | Image.Image], root: str = "photos") -> None:
    """Files below ``root``; a picture as its ending says."""
    for name, content in files.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path)


def tar(files: Mapping[str, bytes], path: str | None = None) -> bytes:
    """A tar of ``files`` at ``path``; its bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    if path is not None:
        Path(path).write_bytes(buffer.getvalue())
    return buffer.getvalue()


# ---- layouts


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


# ---- other archives, tables and lists


@layout("a zip of class folders")
def _() -> None:
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for name, data in CLASSES.items():
            archive.writestr(f"photos/{name}", data)


@layout("a compressed tar: .tar.gz, .tar.bz2, .tar.xz")
def _() -> None:
    for number, packed in enumerate((gzip.compress, bz2.compress, lzma.compress)):
        some = dict(list(CLASSES.items())[number::3])
        Path(f"photos.tar.{('gz', 'bz2', 'xz')[number]}").write_bytes(packed(tar(some)))


@layout("WebDataset shards")
def _() -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter("train-%06d.tar", maxcount=2, verbose=0) as writer:
        for number, (name, data) in enumerate(CLASSES.items()):
            writer.write({"__key__": f"{number:06}", "jpg": data, "json": {"label": name.split("/")[0]}})


@layout("parquet of the Hugging Face hub, train and validation")
def _() -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = ["red", "green", "blue"]  # the hub's order
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    os.mkdir("data")
    for number, split in enumerate(("train", "validation")):
        rows = [(data, names.index(name.split("/")[0])) for name, data in CLASSES.items() if f"{number}" in name]
        images = [{"bytes": data, "path": None} for data, _ in rows]
        table = arrow.table({"image": images, "label": [label for _, label in rows]})
        parquet.write_table(table.replace_schema_metadata(about), f"data/{split}-00000-of-00001.parquet")


@layout("a CSV of paths and labels")
def _() -> None:
    write({name.replace("/", "-"): data for name, data in CLASSES.items()})
    with open("photos.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label"))
        rows.writerows((f"photos/{name.replace('/', '-')}", name.split("/")[0]) for name in CLASSES)


@layout("paths on standard input, of `find photos -name '*.jpg'`")
def _() -> None:
    write(CLASSES)
    Path("paths.txt").write_text("".join(f"photos/{name}\n" for name in CLASSES))


@layout("several folders and archives as one")
def _() -> None:
    write({name: data for name, data in CLASSES.items() if "0" in name}, "old")
    tar({name: data for name, data in CLASSES.items() if "1" in name}, "new.tar")


# ---- formats


@layout("JPEGs: progressive, grey, 4:4:4, with restart markers")
def _() -> None:
    kinds = {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}
    write({f"{n}.jpg": coded(BLUE, **options) for n, options in enumerate(kinds)})
    write({"3.jpg": coded(BLUE.getchannel("B"))})


@layout("PNG, BMP, TIFF, PPM, WebP without loss")
def _() -> None:
    write({f"green/{n}.{ending}": GREEN for n, ending in enumerate(("png", "bmp", "tif", "tiff", "ppm"))})
    write({"green/5.webp": coded(GREEN, "WEBP", lossless=True), "red/0.png": RED})


@layout("GIF, palettes, grey, two colours")
def _() -> None:
    write({"a.gif": BLUE.convert("P"), "b.png": BLUE.convert("P"), "c.jpg": BLUE.convert("L")})
    write({"d.png": BLUE.convert("L"), "e.pgm": BLUE.convert("L"), "f.tif": BLUE.convert("1")})


@layout("CMYK")
def _() -> None:
    write({"red/0.jpg": RED.convert("CMYK"), "red/1.tif": RED.convert("CMYK"), "green/0.jpg": GREEN.convert("CMYK")})


@layout("transparency")
def _() -> None:
    clear = RED.copy()
    clear.putalpha(Image.new("L", clear.size, 128))
    write({"red/0.png": clear, "red/1.webp": clear, "blue/0.png": BLUE.convert("RGBA")})


@layout("photos that a camera held sideways")
def _() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write({f"{n}.jpg": coded(GREEN, exif=exif.tobytes()) for n in range(3)})


@layout("endings that do not fit the contents")
def _() -> None:
    write({"0.jpg": coded(BLUE, "PNG"), "1.png": coded(BLUE), "2.jpeg": coded(BLUE, "WEBP")})


@layout("HEIC of phones (`pip install pillow-heif`)")
def _() -> None:
    pytest.importorskip("pillow_heif")
    write({f"{colour}/0.HEIC": coded(picture(colour), "HEIF") for colour in COLOURS})


@layout("AVIF, JPEG 2000")
def _() -> None:
    write({f"{colour}/0.{form}": picture(colour) for colour, form in zip(COLOURS, ("avif", "jp2", "j2k"))})


@layout("animations, TIFFs of several pages")
def _() -> None:
    frames = {"save_all": True, "append_images": [picture("red")]}
    forms = enumerate(("gif", "webp", "tiff"))
    write({f"blue/{n}.{form}": coded(picture("blue"), form, **frames) for n, form in forms})


@layout("PNG, TIFF and PGM of 16 bits that hold 12")
def _() -> None:
    grey = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))
    pgm = b"P5 64 64 65535\n" + np.asarray(grey).astype(">u2").tobytes()
    write({"a.png": grey, "b.tiff": grey, "c.pgm": pgm})


@layout("TIFF of 32 bits, floats")
def _() -> None:
    values = np.arange(4096).reshape(64, 64) / 16
    write({"a.tiff": Image.fromarray(values.astype(np.int32)), "b.tiff": Image.fromarray(values.astype(np.float32))})


@layout("JPEGs with headers that decoders complain of, Samsung's among them")
def _() -> None:
    write({f"{colour}/0.jpg": next(iter(untidy(coded(picture(colour))).values())) for colour in COLOURS})


@layout("photos with another colour profile than sRGB")
def _() -> None:
    data = with_primaries(ADOBE)
    write({f"{colour}/0.jpg": coded(picture(colour), icc_profile=data) for colour in COLOURS})


@layout("raw photos and films among the photos")
def _() -> None:
    write(CLASSES | {"blue/2.nef": b"II", "blue/3.mp4": b"ftyp"})


@layout("damaged and empty files among the photos")
def _() -> None:
    write(CLASSES | {"blue/2.jpg": CLASSES["blue/0.jpg"][:-300], "blue/3.jpg": b"", "red/2.png": b"no picture"})


# ---- sets of .beton files, and servers


@layout("class folders in a bucket")
def _() -> Iterator[None]:
    with bucket() as system:
        for name, data in CLASSES.items():
            system.pipe_file(f"my-bucket/photos/{name}", data)
        yield


@layout("`.beton` files in a bucket, as one set")
def _() -> Iterator[None]:
    BUILDERS["several `.beton` files, as one set"]()
    with bucket() as system:
        for path in Path().glob("part-*"):
            system.pipe_file(f"my-bucket/{path.name}", path.read_bytes())
        yield


@cache
def s3() -> str:
    """The address of an S3 on this machine, which ends with the process."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    return "http://{}:{}".format(*server.get_host_and_port())


@contextmanager
def bucket() -> Iterator[Any]:
    """The file system of an S3 that has the bucket ``my-bucket``."""
    s3fs = pytest.importorskip("s3fs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3())
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "made-up")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        s3fs.S3FileSystem.clear_instance_cache()  # those of other tests know other servers
        system = s3fs.S3FileSystem(skip_instance_cache=True)
        system.makedirs("my-bucket", exist_ok=True)
        yield system
        s3fs.S3FileSystem.clear_instance_cache()


@layout("several `.beton` files, as one set")
def _() -> None:
    for number, names in enumerate((("blue", "green"), ("red", "green"))):
        files = {name: data for name, data in CLASSES.items() if name.split("/")[0] in names}
        write({k: v for k, v in files.items() if "green" not in k or k == f"green/{number}.jpg"}, f"{number}")
        convert(f"{number}", f"part-{number}.beton")


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


# ---- the table


def rows() -> list[tuple[str, str, str]]:
    """(what you have, command, what comes out) of each row of the page."""
    lines = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text("utf-8").splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("| what you have |")) + 2
    end = next(n for n, line in enumerate([*lines[begin:], ""], begin) if not line.startswith("|"))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin:end]]
    assert all(len(row) == 3 for row in table), "a row has other than three cells"
    return [(what, command.strip("`"), out) for what, command, out in table]


def test_every_row_has_a_builder_and_every_builder_a_row() -> None:
    names = [what for what, _, _ in rows()]
    assert sorted(names) == sorted(BUILDERS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("what", "command", "out"), rows(), ids=[what for what, _, _ in rows()])
def test_a_row(what: str, command: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSSL_CACHE", "cache")
    if isinstance(built := BUILDERS[what](), Iterator):
        next(built)
    program, *arguments = shlex.split(command)
    assert program == "fastssl"
    *arguments, given = [*arguments, None] if "<" not in arguments else [*arguments[:-2], arguments[-1]]
    result = CliRunner().invoke(cli, arguments, input=given and Path(given).read_bytes())
    if isinstance(built, Iterator):
        assert next(built, None) is None
    said = " ".join(result.output.split())
    assert result.exit_code == 0, f"{said} {result.exception}"
    for part in out.split("; "):
        assert re.search(rf"(?<![\w,.]){re.escape(part)}(?!\w)", said), f"{part!r} is not in {said!r}"
    lost = [word for word in ("rejected", "ignored", "passed over") if word in said and word not in out]
    assert not lost, f"the row does not tell that something is {lost[0]}: {said}"
    made = sorted(tmp_path.glob("*.beton"))
    assert made, "no .beton file came out"
    for path in made:
        check_colours(path)


def check_colours(path: Path) -> None:
    """Of photos with a label that is a colour, the channel of that colour leads."""
    with BetonReader(path) as reader:
        for i in range(len(reader)):
            mean = reader.decode(i).mean((0, 1))
            name = reader.classes[reader.labels[i]] if reader.classes and reader.labels is not None else ""
            colour = WNIDS.get(name, name)
            if colour in COLOURS:
                assert COLOURS[2 - int(mean.argmax())] == colour, f"{path.name}: sample {i} is labelled {name}"
