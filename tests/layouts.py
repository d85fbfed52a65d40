"""What the rows of the table in docs/data.md are made of. A builder makes the layout that a row's first cell names; the
row's command runs on it, and what it says is compared with the third cell (fastssl/test_data_table.py).

To add a row: a line in the table, and in one of the modules ``layouts_of_*`` a builder with the first cell's very
words, which writes what the command takes into the current folder::

    @layout("a zip of class folders")
    def _() -> None:
        with zipfile.ZipFile("photos.zip", "w") as archive:
            for name, data in CLASSES.items():
                archive.writestr(name, data)

The third cell holds parts of the output, between semicolons; what is rejected, ignored or passed over must stand there.
Every picture is blue, green or red: where a label of that name (or its wnid) comes out, the pixels are of that colour.
A row that needs an optional package asks for it in its builder: ``pytest.importorskip("pyarrow")``. What has to go on
while the command runs (a server) is begun before a ``yield`` of the builder, and ended behind it.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from conftest import make_photo
from PIL import Image

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
