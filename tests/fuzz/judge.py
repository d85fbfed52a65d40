"""Is what became of a corrupted file right? The right pixels, a named error, or a skip that is counted; all else is a
`Wrong`.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fuzz.files import Beton
from fuzz.guarded import Guarded, GuardedReader

from fastssl.errors import BetonError, FastSSLError, JpegError, WorkerError
from fastssl.pipelines.beton.format import MODE_JPEG
from fastssl.pipelines.convert.encode import encode_photo
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.ops import jpeg
from fastssl.pipelines.plan.draw import ViewSpec

VIEW = [ViewSpec.evaluation(16)]


class Wrong(Exception):
    """What no corruption may lead to."""


@dataclass(frozen=True)
class Verdict:
    """What became of a case: ``refused``, ``exact`` (all pictures are the originals), ``damaged`` (some are named
    errors) or ``altered`` (some are others, of the size that the file promises); and the first message, with its
    numbers taken out.
    """

    kind: str
    message: str = ""


class Judge:
    """Judges files at ``path``, which it writes.

    Args:
        files: the originals.
    """

    def __init__(self, files: list[Beton], path: Path):
        self.path, self._out = path, Guarded()
        self._deadline = 10.0  # the loader's inner loops may have to be compiled first
        #: what stands in whole files: (mode, height, width, bytes) -> (pixels, the view's pixels), None where they
        #: cannot be decoded
        self.pictures: dict[tuple, tuple[np.ndarray | None, np.ndarray | None]] = {}
        self.whole: set[tuple] = set()
        for file in files:
            path.write_bytes(file.layout().content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader = GuardedReader(path)
            with reader:
                found, failed = self._decode(reader)
                views, _ = self._views(reader, failed, "host")
                self.whole.add(tuple(self._key(reader, i) for i in range(len(reader))))
                for i, picture in enumerate(found):
                    self.pictures[self._key(reader, i)] = (picture, None if picture is None else views[i])
        self._deadline = 0.05

    def __call__(self, content: bytes, crops: str = "host") -> Verdict:
        """Judge one file. Raises ``Wrong``."""
        self.path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a changed type id makes a field one that is skipped
                reader = GuardedReader(self.path)
        except BetonError as error:
            return Verdict("refused", self._named(error, f"{self.path}: "))
        with reader:
            table = _table(content)
            for i in range(len(reader)):
                if (i, int(reader.offsets[i]), int(reader.sizes[i])) not in table:
                    raise Wrong(
                        f"sample {i}: read from byte {reader.offsets[i]}, which the allocation table does not "
                        "give to it"
                    )
            found, failed = self._decode(reader)
            keys = tuple(self._key(reader, i) for i in range(len(reader)))
            known = [self.pictures.get(key) for key in keys]
            for i, (picture, original) in enumerate(zip(found, known)):
                if original is not None and not _same(picture, original[0]):
                    raise Wrong(f"sample {i}: its bytes are the original's, its pixels are not")
            views, skipped = self._views(reader, failed, crops)
            if skipped != sorted(failed):
                raise Wrong(f"skipped {skipped}, but those that cannot be decoded are {sorted(failed)}")
            for i, original in enumerate(known):
                if (
                    views is not None
                    and i not in failed
                    and original is not None
                    and crops == "host"
                    and not _same(views[i], original[1])
                ):
                    raise Wrong(f"sample {i}: its bytes are the original's, its view is not")
        kind = "damaged" if failed else "exact" if keys in self.whole else "altered"
        return Verdict(kind, next(iter(failed.values()), ""))

    def _decode(self, reader: GuardedReader) -> tuple[list[np.ndarray | None], dict[int, str]]:
        """(pixels or None of each sample, messages of those that failed)."""
        found: list[np.ndarray | None] = []
        failed = {}
        for i in range(len(reader)):
            shape = (int(reader.heights[i]), int(reader.widths[i]), 3)
            out = self._out.last(shape[0] * shape[1] * 3).reshape(shape)
            try:
                reader.decode_into(i, out)
                found.append(out.copy())
            except (JpegError, BetonError) as error:
                found.append(None)
                failed[i] = self._named(error, f"{self.path}: sample {i}: ")
        return found, failed

    def _views(self, reader: GuardedReader, failed: dict[int, str], crops: str) -> tuple[np.ndarray | None, list[int]]:
        """(views (N, 3, S, S) uint8 or None, samples that were skipped), through the loader."""
        count = len(reader)
        with ViewLoader(
            reader,
            VIEW,
            count,
            shuffle=False,
            drop_last=False,
            on_bad="skip",
            colour=False,
            workers=1,
            crops=crops,
            stall_minutes=self._deadline,
        ) as loader:
            try:
                (batch,) = loader.epoch(0)
            except WorkerError as error:
                raise Wrong(str(error)) from error
            except FastSSLError as error:
                if len(failed) != count or "every picture of a batch is damaged" not in str(error):
                    raise Wrong(f"{len(failed)} of {count} are damaged, and the loader says: {error}") from error
                return None, sorted(loader.stats.skipped)
            index, views = batch.index.tolist(), batch.views[0].numpy()
            good = [i for i in range(count) if i not in failed]
            if [index[i] for i in good] != good or not set(index) <= set(good):
                raise Wrong(f"asked for samples 0 to {count - 1} without {sorted(failed)}, the loader gave {index}")
            if not np.isfinite(views).all() or views.shape != (count, 3, 16, 16):
                raise Wrong(f"views of {views.shape}")
            return views.copy(), sorted(loader.stats.skipped)

    @staticmethod
    def _key(reader: GuardedReader, i: int) -> tuple:
        return int(reader.modes[i]), int(reader.heights[i]), int(reader.widths[i]), reader.encoded(i).tobytes()

    def _named(self, error: Exception, begin: str) -> str:
        message = str(error)
        if not message.startswith(begin) or "\n" in message:
            raise Wrong(f"a message that does not begin with {begin!r} on one line: {message!r}")
        return re.sub(r"\d[\d,]*|0x\w+|'.*?'", "#", message.removeprefix(f"{self.path}: "))


def _table(content: bytes) -> set[tuple[int, int, int]]:
    """(sample, offset, size) of all entries of a file's allocation table, as the bytes say it."""
    (at,) = struct.unpack_from("<Q", content, 16)
    return set(struct.iter_unpack("<QQQ", content[at:]))


def judge_photo(data: bytes) -> Verdict:
    """One file through the converter: a picture of the size it says, or an error."""
    for options in (ConvertOptions(keep_size=True, short_side=None), ConvertOptions(short_side=8)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = encode_photo(data, options)
        except MemoryError as error:
            raise Wrong("memory ran out") from error
        except Exception as error:  # as the converter takes them
            return Verdict("refused", re.sub(r"\d+|0x\w+|'.*?'", "#", f"{type(error).__name__}: {error}")[:80])
        if found.mode != MODE_JPEG or jpeg.decode(found.data).shape != (found.height, found.width, 3):
            raise Wrong(f"encoded as {found.height}x{found.width}, which is not what is in there")
    return Verdict("converted")


def photos() -> dict[str, bytes]:
    """Small pictures of every format that the converter reads."""
    from fuzz.files import _picture, kinds_of_jpeg
    from PIL import Image

    found = dict(kinds_of_jpeg())
    for name, form, options in [
        *[
            ("png", "PNG", {}),
            ("png, grey", "PNG", {"mode": "L"}),
            ("png, alpha", "PNG", {"mode": "RGBA"}),
            ("png, palette", "PNG", {"mode": "P"}),
        ],
        *[
            ("webp", "WEBP", {}),
            ("webp, lossless", "WEBP", {"lossless": True}),
            ("gif", "GIF", {"mode": "P"}),
            ("bmp", "BMP", {}),
            ("ppm", "PPM", {}),
        ],
        *[
            ("tiff", "TIFF", {}),
            ("tiff, lzw", "TIFF", {"compression": "tiff_lzw"}),
            ("tiff, deflate", "TIFF", {"compression": "tiff_adobe_deflate"}),
        ],
        *[("tiff, jpeg", "TIFF", {"compression": "jpeg"}), ("tiff, packbits", "TIFF", {"compression": "packbits"})],
    ]:
        buffer = io.BytesIO()
        mode = options.pop("mode", "RGB")
        Image.fromarray(_picture(5, 24, 16)).convert(mode).save(buffer, form, **options)
        found[name] = buffer.getvalue()
    return found


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return (one is None) == (other is None) and (one is None or np.array_equal(one, other))
