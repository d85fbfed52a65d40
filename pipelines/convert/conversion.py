"""Turn a folder or tar of photos into one ``.beton`` file.

Every photo is decoded once, strictly, so that a damaged one is found now and not in the middle of a training run. A
JPEG that needs no change goes into the file byte for byte; anything else becomes upright 8-bit RGB and is encoded anew.

While it works, there are two files beside DST: ``DST.partial``, the growing file, and ``DST.partial.journal``, one line
for every photo that is safely on the disk. DST itself appears by renaming, so it is whole or absent. A conversion that
was stopped goes on behind the journal's last line; the bytes of the result do not depend on stops, nor on the number of
workers.

All of it, listing and writing included, is done in threads that the caller waits for with a limit (stall.py): SRC and
DST often lie on one network disk, and that may be gone for ever.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import logging
import os
import re
import time
import warnings
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import PIL
import simplejpeg
from PIL import Image

from fastssl._version import __version__
from fastssl.errors import FastSSLError, JpegError, counted, printable, worker_error
from fastssl.pipelines.beton.format import DEFAULT_PAGE_SIZE, MIN_PAGE_SIZE, MODE_JPEG, MODE_RAW, RECORD_DTYPE
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import side_path
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert.sources import Listing, list_source
from fastssl.pipelines.ops import jpeg
from fastssl.utils.atomic_files import sync_folder, write_atomically
from fastssl.utils.cores import available_cores
from fastssl.utils.deadline import STALL_MINUTES, Patience, Step

logger = logging.getLogger(__name__)

SIDE_FORMAT, SIDE_VERSION = "fastssl-beton-side-file", 1
#: How much work a kill may cost. Each checkpoint waits for the disk twice.
CHECKPOINT_SECONDS = 2.0
#: Bytes that are left to the system's memory, at most, where no journal asks for more.
_MOST_UNSYNCED = 1 << 30
#: Below this many photos the small page keeps the file small: the metadata alone takes a whole page.
SMALL_SET = 10_000
#: Only formats that Pillow decodes by itself: EPS, for one, would start Ghostscript on a stranger's program.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ConvertError(FastSSLError):
    """A conversion cannot start, or was stopped by a bad photo or by the disk."""


@dataclass(frozen=True)
class ConvertOptions:
    """What becomes of each photo.

    Attributes:
        short_side: photos whose shorter side is longer are scaled down to it; None: no scaling. Nothing is ever scaled
            up.
        max_side: the same for the longer side, instead of ``short_side``.
        keep_size: no scaling at all.
        quality: JPEG quality, 1 to 100, of what has to be encoded anew (4:2:0; 4:4:4 from 95).
        store: 'jpeg', or 'raw' for decoded pixels (10 to 20 times larger, nothing to decode in training).
        workers: threads; None: as many as this process has CPUs.
        limit: convert only this many photos, evenly spaced over the source.
        resume: go on where a stopped conversion of the same photos with the same options stood, and keep what is needed
            for that.
        on_bad: 'skip' lists bad photos in DST.rejects.jsonl, 'fail' stops at the first.
        stall_minutes: how long one photo, or the disk under DST, is waited for; a warning comes after the first minute,
            ``Stalled`` at the end. ``math.inf``: for ever.
        automatic: no person asked for this file: who made it may make it again. Noted in the side file, no more.
    """

    short_side: int | None = 256
    max_side: int | None = None
    keep_size: bool = False
    quality: int = 90
    store: str = "jpeg"
    workers: int | None = None
    limit: int | None = None
    resume: bool = True
    on_bad: str = "skip"
    stall_minutes: float = STALL_MINUTES
    automatic: bool = False

    def __post_init__(self) -> None:
        for name in ("short_side", "max_side", "workers", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConvertError(f"{name} is at least 1, not {value}")
        if not 1 <= self.quality <= 100:
            raise ConvertError(f"quality is 1 to 100, not {self.quality}")
        if self.store not in ("jpeg", "raw"):
            raise ConvertError(f"store is 'jpeg' or 'raw', not {self.store!r}")
        if self.on_bad not in ("skip", "fail"):
            raise ConvertError(f"on_bad is 'skip' or 'fail', not {self.on_bad!r}")
        if self.keep_size and self.max_side is not None:
            raise ConvertError("give max_side or keep_size, not both")

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that a photo of this size gets; the aspect ratio is kept to the nearest pixel."""
        if self.keep_size or (self.max_side is None and self.short_side is None):
            return height, width
        side, limit = (
            (max(height, width), self.max_side) if self.max_side is not None else (min(height, width), self.short_side)
        )
        if side <= limit:
            return height, width
        return max(1, round(height * limit / side)), max(1, round(width * limit / side))

    def deciding(self) -> dict:
        """The options that decide about the bytes of the result."""
        free = ("workers", "resume", "on_bad", "stall_minutes", "automatic")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass(frozen=True)
class ConvertSummary:
    """What :func:`convert` did.

    Attributes:
        path: the file. written: photos in it = copied (byte for byte) + reencoded.
        rejected: bad photos, listed in DST.rejects.jsonl. ignored: files that are no photos.
        resumed: photos, good or bad, that an earlier, stopped run had done already.
        classes: names, or None for photos without labels. bytes: size of the file. seconds: what this run took.
    """

    path: Path
    written: int
    copied: int
    reencoded: int
    rejected: int
    ignored: int
    resumed: int
    classes: list[str] | None
    bytes: int
    seconds: float


class Encoded(NamedTuple):
    """A photo as it goes into the file."""

    data: bytes
    height: int
    width: int
    mode: int
    copied: bool
    crc32: int


def chosen_photos(count: int, limit: int | None) -> np.ndarray:
    """Which of a listing's ``count`` photos are converted: all, or ``limit`` of them, evenly spaced. Ascending int64
    positions.
    """
    total = count if limit is None else min(limit, count)
    return np.arange(total) * count // max(1, total)


def rejects_path(dst: str | os.PathLike) -> Path:
    """Where the rejected photos of a conversion to ``dst`` are listed."""
    return Path(f"{os.fspath(dst)}.rejects.jsonl")


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    options: ConvertOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertSummary:
    """Convert the photos of ``src`` (see :func:`fastssl.pipelines.convert.sources.list_source`) into the ``.beton``
    file ``dst``.

    An existing ``dst`` is replaced, at the very end. ``progress(done, total)`` is called from one other thread, ten
    times a second.

    Raises:
        ConvertError, SourceError: nothing to convert, every photo rejected, a bad photo with ``on_bad='fail'``, no
            space, ...
        WorkerError: no memory was left for a photo.
        Stalled: the disk or network file system did not answer; the same conversion goes on where it stood, in a new
            process.
    """
    options = options or ConvertOptions()
    with warnings.catch_warnings():
        # Pillow warns about odd metadata, which does not concern the pixels, in the middle of the progress bar.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return Patience(src, options.stall_minutes, "read or written").watch(
            partial(_convert, src, Path(dst), options, progress)
        )


def _convert(
    src: str | os.PathLike, dst: Path, options: ConvertOptions, progress: Callable[[int, int], None] | None, step: Step
) -> ConvertSummary:
    if dst.is_dir():
        raise ConvertError(f"{dst}: is a folder; name the .beton file to write")
    if not dst.parent.is_dir():
        raise ConvertError(f"{dst.parent}: no such folder; create it first")
    # The result takes its name by renaming, which would put a plain file in the place of a device, or of the photos
    # themselves.
    if dst.exists() and not dst.is_file():
        raise ConvertError(f"{dst}: exists and is not a plain file; name another DST")
    if dst.exists() and os.path.samefile(src, dst):
        raise ConvertError(f"{dst}: SRC and DST are one file; the photos would be overwritten by the result")
    started = time.monotonic()
    with list_source(src, step) as listing, _reserve(dst) as unfinished:
        job = _Conversion(listing, dst, unfinished, options, step)
        job.run(progress)
        num_bytes = job.publish()
    written, rejected = job.writer.num_samples, len(job.rejects)
    seconds = time.monotonic() - started
    return ConvertSummary(
        dst,
        written,
        job.num_copied,
        written - job.num_copied,
        rejected,
        listing.ignored,
        job.resumed,
        listing.classes,
        num_bytes,
        seconds,
    )


def encode_photo(data: bytes, options: ConvertOptions) -> Encoded:
    """Turn the bytes of any picture file into what goes into the ``.beton``: a pure function of its arguments.

    * A JPEG in YCbCr or grey, upright and of fitting size, that decodes without complaint, is returned as it is.
    * Scaling: Pillow's Lanczos filter (antialiased); a JPEG more than four times too large is first reduced by the
      decoder, in the DCT, to no less than twice the size.
    * EXIF orientation is applied. CMYK becomes RGB as Pillow does it. Transparency is laid over white. Of 16 bits the
      high 8 stay. Of an animation the first picture is taken.

    Raises:
        JpegError, OSError, ValueError or whatever else a decoder raises for a damaged picture.
    """
    if not data:
        raise JpegError("the file is empty")
    is_jpeg = data[:3] == b"\xff\xd8\xff"
    header = _readable_header(data) if is_jpeg else None
    if header is not None:
        size = options.target_size(header.height, header.width)
        orientation = jpeg.exif_orientation(data)
        unchanged = size == (header.height, header.width) and orientation == 1
        far = header.height >= 4 * size[0] and header.width >= 4 * size[1]
        rgb, clean = _decode_jpeg(data, (2 * size[0], 2 * size[1]) if far else None)
        if unchanged and clean and header.colorspace != "RGB" and options.store == "jpeg":
            return Encoded(data, header.height, header.width, MODE_JPEG, True, zlib.crc32(data))
        image = Image.fromarray(rgb) if not unchanged else None
    else:
        image, orientation = _decode_pillow(data, is_jpeg)
        size = options.target_size(image.height, image.width)
        unchanged = size == (image.height, image.width) and orientation == 1
        rgb = np.asarray(image)
    if not unchanged:
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
        # Turned after scaling, when there are fewer pixels; the filter does not know up from down.
        image = image.transpose(_TRANSPOSE[orientation]) if orientation != 1 else image
        rgb = np.asarray(image)
    height, width, _ = rgb.shape
    if max(height, width) > 0xFFFF:
        raise JpegError(f"{height}x{width} pixels: the format stores sides up to 65535; scale it down")
    stored = jpeg.encode(rgb, options.quality) if options.store == "jpeg" else rgb.tobytes()
    return Encoded(stored, height, width, MODE_JPEG if options.store == "jpeg" else MODE_RAW, False, zlib.crc32(stored))


def _readable_header(data: bytes) -> jpeg.JpegHeader | None:
    """The header of a JPEG, or None when it is one that only Pillow can decode: CMYK, or unusual sampling factors."""
    try:
        header = jpeg.read_header(data)
    except JpegError:
        return None
    return header if header.colorspace in jpeg.DECODABLE else None


def _decode_jpeg(data: bytes, at_least: tuple[int, int] | None) -> tuple[np.ndarray, bool]:
    """Decode strictly; (pixels, whether the file may be stored as it is)."""
    try:
        return jpeg.decode(data, at_least=at_least), True
    except JpegError as error:
        # Stray bytes between the last pixel and the end marker (0xd9): the picture is whole, only untidy.
        if re.search(r"extraneous bytes before marker 0xd9$", str(error)) is None:
            raise
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False), False


def _decode_pillow(data: bytes, is_jpeg: bool) -> tuple[Image.Image, int]:
    """Decode with Pillow; (RGB picture, EXIF orientation still to be applied)."""
    try:
        image = Image.open(io.BytesIO(data), formats=_pillow_formats())
    except PIL.UnidentifiedImageError:
        raise JpegError("not a picture in a format that we read (by its contents, not by its name)") from None
    # Before load(): the size in the header costs nothing, the pixels behind it may cost gigabytes.
    if image.width * image.height > jpeg.MAX_PIXELS:
        raise JpegError(
            f"the header asks for {image.height}x{image.width} pixels, more than the limit of {jpeg.MAX_PIXELS:,}"
        )
    if is_jpeg:
        jpeg.require_few_scans(data, image.width * image.height)
    if image.format == "PNG":
        with Image.open(io.BytesIO(data), formats=("PNG",)) as check:
            check.verify()  # the chunks' checksums, which load() leaves out
    image.load()
    orientation = jpeg.exif_orientation(data) if is_jpeg else image.getexif().get(0x0112, 1)
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise JpegError("32 bits a pixel: of unknown range, convert it to 8 or 16 bits first")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise JpegError("floating-point pixels: of unknown range, convert it to 8 or 16 bits first")
    elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB"), orientation if orientation in _TRANSPOSE else 1


@cache
def _pillow_formats() -> tuple[str, ...]:
    """Those of our formats that this Pillow was built with."""
    Image.init()
    return tuple(name for name in PILLOW_FORMATS if name in Image.OPEN)


class _Conversion:
    """One run: takes photos in order from the threads, writes them, keeps the journal."""

    def __init__(self, listing: Listing, dst: Path, partial: Path, options: ConvertOptions, step: Step):
        self.listing, self.dst, self.partial, self.options, self.step = listing, dst, partial, options, step
        step(self._writing)
        self.chosen = chosen_photos(len(listing), options.limit)
        total = len(self.chosen)
        self.journal_path = Path(f"{partial}.journal")
        self._journal: BinaryIO | None = None
        self._unsynced = 0  # bytes
        self._unsaved: list[str] = []
        self._start_again()

        written = self._take_over() if options.resume else np.zeros(0, RECORD_DTYPE)
        self.resumed = self.num_done
        if not self.resumed:
            self.journal_path.unlink(missing_ok=True)
        page_size = DEFAULT_PAGE_SIZE if total >= SMALL_SET else MIN_PAGE_SIZE
        self.writer = BetonWriter(
            partial, total, labels=listing.classes is not None, page_size=page_size, written=written
        )

    def _start_again(self) -> None:
        self.num_done = self.num_copied = 0
        self.checksums = array("I")
        self.rejects = list(self.listing.rejected)

    def key(self) -> dict:
        """What has to be equal for a stopped conversion to be continued with the very same bytes."""
        versions = {"simplejpeg": simplejpeg.__version__, "pillow": PIL.__version__, "fastssl": __version__}
        return {
            "source": self.listing.fingerprint,
            "total": len(self.chosen),
            "options": self.options.deciding(),
            "versions": versions,
        }

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        """Convert all photos that are not done yet; whatever stops it, what is done so far is kept for the next run."""
        _pillow_formats()  # here, because loading plugins is not made for several threads at once
        total = len(self.chosen)
        checkpoint_at, progress_at = time.monotonic() + CHECKPOINT_SECONDS, 0.0
        try:
            if self.options.on_bad == "fail" and self.listing.rejected:
                self._fail(*self.listing.rejected[0])
            if self.options.resume:
                self._open_journal()
            if progress is not None:
                progress(self.num_done, total)
            with closing(self._results()) as results:
                for i, result in results:
                    self.step(self._writing)
                    self._take(i, result)
                    now = time.monotonic()
                    if now >= checkpoint_at:
                        self._checkpoint()
                        checkpoint_at = time.monotonic() + CHECKPOINT_SECONDS
                    if progress is not None and (now >= progress_at or self.num_done == total):
                        progress(self.num_done, total)
                        progress_at = now + 0.1
            self.step(self._writing)
            self._checkpoint()
        except BaseException as error:
            self._stop(error)
            raise

    def _taking_over(self) -> str:
        return f"while {self.journal_path.name} was read"

    def _writing(self) -> str:
        return f"while {self.partial.name} was written"

    def _results(self) -> Iterator[tuple[int, Encoded | str]]:
        """Yield (index into the listing, photo or reason for its rejection) in order, with few photos in flight."""
        workers = self.options.workers or available_cores()
        pending: deque[tuple[int, Future]] = deque()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="fastssl-convert")
        try:
            for i in self.chosen[self.num_done :].tolist():
                pending.append((i, pool.submit(self._photo, i)))
                if len(pending) >= 4 * workers:
                    yield self._result(*pending.popleft())
            while pending:
                yield self._result(*pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _result(self, i: int, future: Future) -> tuple[int, Encoded | str]:
        self.step(lambda: f"at {printable(self.listing.names[i])}")
        return i, future.result()

    def _photo(self, i: int) -> Encoded | str:
        try:
            return encode_photo(self.listing.read(i), self.options)
        except MemoryError as error:  # not the photo's fault: the next run may have more
            raise worker_error(self.listing.source, printable(self.listing.names[i]), error) from error
        except (
            Exception
        ) as error:  # decoders raise anything at all for damaged input, and one photo must not end the run
            reason = str(error).strip()
            return reason if isinstance(error, FastSSLError) and reason else f"{type(error).__name__}: {reason}"

    def _take(self, i: int, result: Encoded | str) -> None:
        """Write one photo, or note why not."""
        if isinstance(result, str):
            if self.options.on_bad == "fail":
                self._fail(self.listing.names[i], result)
            self.rejects.append((self.listing.names[i], result))
            line: list = [self.num_done, result]
        else:
            self._unsynced += len(result.data)
            self.writer.add(result.data, result.height, result.width, int(self.listing.labels[i]), result.mode)
            self.checksums.append(result.crc32)
            self.num_copied += result.copied
            line = [self.num_done, result.crc32, result.copied, *self.writer.records[-1].tolist()]
        self.num_done += 1
        if self._journal is not None:
            self._unsaved.append(_journal_line(line))

    def _fail(self, name: str, reason: str) -> None:
        raise ConvertError(f"{self.listing.source}: {name}: {reason} (--on-bad skip lists bad photos and goes on)")

    # ---- stopping and going on

    def _open_journal(self) -> None:
        self._journal = open(self.journal_path, "ab")  # noqa: SIM115 - lives on, see _close()
        if not self.resumed:
            self._journal.write(_journal_line(self.key()).encode())

    def _checkpoint(self) -> None:
        """Bring the photos to the disk, and only then the lines that vouch for them."""
        if self._journal is None:
            # What a large memory holds back would come at the very end, and a slow disk then take longer than one step
            # may.
            if self._unsynced >= _MOST_UNSYNCED:
                self.writer.sync()
                self._unsynced = 0
            return
        if not self._unsaved:
            return
        self.writer.sync()
        self._journal.write("".join(self._unsaved).encode())
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._unsaved.clear()

    def _stop(self, error: BaseException) -> None:
        """Leave things as the options promise: ready to go on, or clean."""
        try:
            if self.num_done < len(self.chosen) or self._unsaved:
                self._checkpoint()
            self._close()
        except OSError as disk_error:
            # A full disk, say. The journal's earlier lines still hold.
            logger.warning("%s: the last photos will have to be done again (%s)", self.partial, disk_error)
        if not self.options.resume:
            self.partial.unlink(missing_ok=True)
        if not self.num_done:  # a journal of nothing; the empty file goes with its lock
            self.journal_path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            again = "; run the same command again to go on" if self.options.resume else ""
            raise ConvertError(f"{self.dst}: cannot write: {error.strerror or error}{again}") from None

    def _close(self) -> None:
        self.writer.close()
        if self._journal is not None:
            self._journal.close()

    def _take_over(self) -> np.ndarray:
        """Read what a stopped run left; the records of its samples, none when it cannot be continued
        (which is said).
        """
        none = np.zeros(0, RECORD_DTYPE)
        try:
            lines = self.journal_path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return none
        # What follows the last newline was being written when the run was stopped.
        lines.pop()
        if not lines:
            return none
        try:
            key = _read_journal_line(lines[0])
        except ValueError:
            key = None
        if key != self.key():
            logger.warning(
                "%s: the photos, the options or a version changed since it was stopped; starting again", self.dst
            )
            return none
        rows, good = [], len(lines[0]) + 1
        for line in lines[1:]:
            self.step(self._taking_over)
            try:
                position, *row = _read_journal_line(line)
            except ValueError:  # it is not as it was written: what it and those behind it vouched for is done again
                break
            reason = str(row[0]) if len(row) == 1 else None
            checksum, copied, *record = [0, 0] if reason is not None else row
            # A write that failed half-way may have been tried again: take each photo once, in order.
            if (
                position != self.num_done
                or self.num_done == len(self.chosen)
                or len(record) not in (0, len(RECORD_DTYPE))
            ):
                break
            if reason is not None:
                self.rejects.append((self.listing.names[self.chosen[position]], reason))
            else:
                self.checksums.append(checksum)
                self.num_copied += copied
                rows.append(tuple(record))
            self.num_done += 1
            good += len(line) + 1
        records = np.array(rows, RECORD_DTYPE)
        if not self._last_is_there(records):
            logger.warning("%s: the unfinished file does not match its journal; starting again", self.dst)
            self._start_again()
            return none
        os.truncate(self.journal_path, good)
        return records

    def _last_is_there(self, records: np.ndarray) -> bool:
        if len(records) == 0:
            return True
        with open(self.partial, "rb") as file:
            file.seek(int(records[-1]["offset"]))
            data = file.read(int(records[-1]["size"]))
        return len(data) == records[-1]["size"] and zlib.crc32(data) == self.checksums[-1]

    # ---- the end

    def publish(self) -> int:
        """Finish the file, write what stands beside it, and rename; returns the file's size in bytes."""
        if self.writer.num_samples == 0:
            self._close()
            self.partial.unlink(missing_ok=True)
            self.journal_path.unlink(missing_ok=True)
            name, reason = self.rejects[0]
            photos = counted(len(self.rejects), "photo")
            raise ConvertError(
                f"{self.listing.source}: all of {photos} rejected, nothing is left to write; first {name}: {reason}"
            )
        try:
            self.step(self._writing)
            self.writer.finish()
            self._close()
            side = self._side_file()
            # The file itself comes last: when it is there, all of it is there.
            _write_or_remove(
                rejects_path(self.dst),
                "".join(json.dumps({"path": name, "reason": why}) + "\n" for name, why in self.rejects),
            )
            _write_or_remove(side_path(self.dst), json.dumps(side, indent=1) + "\n")
            os.replace(self.partial, self.dst)
            sync_folder(self.dst.parent)
        except BaseException as error:
            self._stop(error)
            raise
        self.journal_path.unlink(missing_ok=True)
        return side["bytes"]

    def _side_file(self) -> dict:
        with BetonReader(self.partial) as reader:  # also proves that the tables can be read
            checksums = reader.table_checksums()
            num_bytes = reader.num_bytes
        samples = np.array(self.checksums, "<u4")
        classes = self.listing.classes
        return {
            "format": SIDE_FORMAT,
            "version": SIDE_VERSION,
            "tool": f"fastssl {__version__}",
            "source": self.listing.source.name,
            "fingerprint": self.listing.fingerprint,
            "automatic": self.options.automatic,
            "options": self.options.deciding(),
            "samples": len(samples),
            "copied": self.num_copied,
            "reencoded": len(samples) - self.num_copied,
            "rejected": len(self.rejects),
            "bytes": num_bytes,
            "classes": classes,
            "class_counts": None
            if classes is None
            else np.bincount(self.writer.records["label"], minlength=len(classes)).tolist(),
            # CRC-32, the samples' as little-endian uint32 in base64: 5 bytes a sample.
            "crc32": {**checksums, "samples": base64.b64encode(samples.tobytes()).decode("ascii")},
        }


@contextmanager
def _reserve(dst: Path) -> Iterator[Path]:
    """Yield the path of the unfinished file, held against a second conversion to the same place."""
    partial = Path(f"{dst}.partial")
    existed = partial.exists()
    try:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConvertError(f"{partial}: cannot write: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConvertError(f"{partial}: another conversion is writing it") from None
        except OSError:
            pass  # a file system without locks
        yield partial
    finally:
        os.close(handle)
        if not existed and partial.exists() and partial.stat().st_size == 0:
            partial.unlink()


def _journal_line(content: list | dict) -> str:
    """A line with its own checksum: a wrong digit in it would become a wrong label in DST, and nobody would know."""
    text = json.dumps(content)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _read_journal_line(line: bytes) -> Any:
    """What stands in a line. ``ValueError``: it is not as it was written."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("a line that is not as it was written")
    return json.loads(text)


def _write_or_remove(path: Path, text: str) -> None:
    """Write ``text`` to ``path``; an empty text removes the file."""
    if text:
        write_atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
    else:
        path.unlink(missing_ok=True)
