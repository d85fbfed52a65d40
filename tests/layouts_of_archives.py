"""Layouts of other archives, tables and lists; sets of ``.beton`` files; servers (layouts.py says how)."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from layouts import BUILDERS, CLASSES, layout, tar, write

from fastssl.pipelines.convert.conversion import convert


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


@contextmanager
def bucket() -> Iterator[Any]:
    """The file system of an S3 that has the bucket ``my-bucket``."""
    pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    from s3_server import s3_server

    with s3_server() as system:
        system.makedirs("my-bucket", exist_ok=True)
        yield system


@layout("several `.beton` files, as one set")
def _() -> None:
    for number, names in enumerate((("blue", "green"), ("red", "green"))):
        files = {name: data for name, data in CLASSES.items() if name.split("/")[0] in names}
        write({k: v for k, v in files.items() if "green" not in k or k == f"green/{number}.jpg"}, f"{number}")
        convert(f"{number}", f"part-{number}.beton")
