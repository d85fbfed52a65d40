"""Turn a folder or tar of photos into one ``.beton`` file.

Every photo is decoded once, strictly, so that a damaged one is found now and not in the middle of a training run. A
JPEG that needs no change goes into the file byte for byte; anything else becomes upright 8-bit RGB and is re-encoded.

While it works, there are two files beside DST: ``DST.partial``, the growing file, and ``DST.partial.journal``, one line
for every photo that is safely on the disk. DST itself appears by renaming, so it is whole or absent. A conversion that
was stopped goes on behind the journal's last line; the bytes of the result do not depend on stops, nor on the number of
workers.

SRC and DST often lie on one network disk, and that may be gone forever: what reads from it, or waits for it, does so
in threads that are waited for with a limit (deadline.py).
"""

from __future__ import annotations

import base64
import json
import logging
import os
import time
import warnings
import zlib
from array import array
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import numpy as np
import PIL
import simplejpeg

from fastssl._version import __version__
from fastssl.errors import FastSSLError, at_work_on, counted, printable
from fastssl.pipelines.beton.format import DEFAULT_PAGE_SIZE, MIN_PAGE_SIZE, RECORD_DTYPE
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import side_path
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert.encode import Encoded, encode_photo, pillow_formats
from fastssl.pipelines.convert.journal import Journal
from fastssl.pipelines.convert.options import ConvertError, ConvertOptions, ConvertSummary, chosen_photos
from fastssl.pipelines.convert.sources import Listing, list_source
from fastssl.pipelines.convert.unfinished import reserve, write_or_remove
from fastssl.utils.atomic_files import sync_folder
from fastssl.utils.cores import available_cores
from fastssl.utils.deadline import Deadline

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")

SIDE_FORMAT, SIDE_VERSION = "fastssl-beton-side-file", 1
#: How much work a kill may cost. Each checkpoint waits for the disk twice.
CHECKPOINT_SECONDS = 2.0
#: Bytes that are left to the system's memory, at most, where no journal asks for more.
_MOST_UNSYNCED = 1 << 30
#: Below this many photos the small page keeps the file small: the metadata alone takes a whole page.
SMALL_SET = 10_000


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

    An existing ``dst`` is replaced, at the very end. ``progress(done, total)`` is called ten times a second.

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
        return _convert(src, Path(dst), options, progress)


def _convert(
    src: str | os.PathLike, dst: Path, options: ConvertOptions, progress: Callable[[int, int], None] | None
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
    deadline = Deadline(src, options.stall_minutes, "read or written")
    with list_source(src, deadline) as listing, reserve(dst) as unfinished:
        job = _Conversion(listing, dst, unfinished, options, deadline)
        job.run(progress)
        num_bytes = job.publish()
    written, copied, seconds = job.writer.num_samples, job.num_copied, time.monotonic() - started
    counts = (written, copied, written - copied, len(job.rejects), listing.ignored, job.resumed)
    return ConvertSummary(dst, *counts, listing.classes, num_bytes, seconds)


class _Conversion:
    """One run: takes photos in order from the threads, writes them, keeps the journal."""

    def __init__(self, listing: Listing, dst: Path, partial: Path, options: ConvertOptions, deadline: Deadline):
        self.listing, self.dst, self.partial, self.options, self.deadline = listing, dst, partial, options, deadline
        self.chosen = chosen_photos(len(listing), options.limit)
        total = len(self.chosen)
        self.journal = Journal(Path(f"{partial}.journal"), self.key())
        self._unsynced = 0  # bytes
        self._start_again()

        written = np.zeros(0, RECORD_DTYPE)
        if options.resume:
            written = deadline.call(self._take_over, f"while {self.journal.path.name} was read")
        self.resumed = self.num_done
        if not self.resumed:
            self.journal.remove()
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
        pillow_formats()  # here, because loading plugins is not made for several threads at once
        total = len(self.chosen)
        checkpoint_at, progress_at = time.monotonic() + CHECKPOINT_SECONDS, 0.0
        try:
            if self.options.on_bad == "fail" and self.listing.rejected:
                self._fail(*self.listing.rejected[0])
            if self.options.resume:
                self.journal.open(new=not self.resumed)
            if progress is not None:
                progress(self.num_done, total)
            left, workers = self.chosen[self.num_done :].tolist(), self.options.workers or available_cores()
            with closing(self.deadline.map(self._photo, left, workers, self._at)) as results:
                for i, result in zip(left, results):
                    self._take(i, result)
                    now = time.monotonic()
                    if now >= checkpoint_at:
                        self._checkpoint()
                        checkpoint_at = time.monotonic() + CHECKPOINT_SECONDS
                    if progress is not None and (now >= progress_at or self.num_done == total):
                        progress(self.num_done, total)
                        progress_at = now + 0.1
            self._checkpoint()
        except BaseException as error:
            self._stop(error)
            raise

    def _at(self, i: int) -> str:
        return f"at {printable(self.listing.names[i])}"

    def _on_disk(self, work: Callable[[], _Result]) -> _Result:
        """``work()``, which waits for the disk under DST."""
        return self.deadline.call(work, f"while {self.partial.name} was written")

    def _photo(self, i: int) -> Encoded | str:
        try:
            return encode_photo(self.listing.read(i), self.options)
        except MemoryError:  # not the photo's fault: the next run may have more
            with at_work_on(self.listing.source, printable(self.listing.names[i])):
                raise
        except Exception as error:  # decoders raise anything at all for damaged input: it must not end the run
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
        self.journal.append(line)

    def _fail(self, name: str, reason: str) -> None:
        raise ConvertError(f"{self.listing.source}: {name}: {reason} (--on-bad skip lists bad photos and goes on)")

    # ---- stopping and going on

    def _checkpoint(self) -> None:
        """Bring the photos to the disk, and only then the lines that vouch for them."""
        # Without a journal, what a large memory holds back would come at the very end, and a slow disk then take longer
        # than it may.
        if self.journal.has_unsaved or (not self.options.resume and self._unsynced >= _MOST_UNSYNCED):
            self._on_disk(self._sync)
            self._unsynced = 0

    def _sync(self) -> None:
        self.writer.sync()
        self.journal.sync()

    def _stop(self, error: BaseException) -> None:
        """Leave things as the options promise: ready to go on, or clean; what may lie on a dead disk as it is."""
        if self.deadline.given_up:
            return
        try:
            if self.num_done < len(self.chosen) or self.journal.has_unsaved:
                self._checkpoint()
            self._close()
        except OSError as disk_error:
            # A full disk, say. The journal's earlier lines still hold.
            logger.warning("%s: the last photos will have to be done again (%s)", self.partial, disk_error)
        if not self.options.resume:
            self.partial.unlink(missing_ok=True)
        if not self.num_done:  # a journal of nothing; the empty file goes with its lock
            self.journal.remove()
        if isinstance(error, OSError):
            again = "; run the same command again to go on" if self.options.resume else ""
            raise ConvertError(f"{self.dst}: cannot write: {error.strerror or error}{again}") from None

    def _close(self) -> None:
        self.writer.close()
        self.journal.close()

    def _take_over(self) -> np.ndarray:
        """Read what a stopped run left; the records of its samples, none when it cannot be continued
        (which is said).
        """
        none = np.zeros(0, RECORD_DTYPE)
        try:
            lines = self.journal.replay()
        except ValueError:
            logger.warning(
                "%s: the photos, the options or a version changed since it was stopped; starting again", self.dst
            )
            return none
        if lines is None:
            return none
        rows, good = [], 0
        for (position, *row), end in lines:
            reason = str(row[0]) if len(row) == 1 else None
            checksum, copied, *record = [0, 0] if reason is not None else row
            # A write that failed half-way may have been tried again: take each photo once, in order.
            if (
                position != self.num_done
                or self.num_done == len(self.chosen)
                or len(record) not in (0, len(RECORD_DTYPE.descr))
            ):
                break
            if reason is not None:
                self.rejects.append((self.listing.names[self.chosen[position]], reason))
            else:
                self.checksums.append(checksum)
                self.num_copied += copied
                rows.append(tuple(record))
            self.num_done += 1
            good = end
        records = np.array(rows, RECORD_DTYPE)
        if not self._last_is_there(records):
            logger.warning("%s: the unfinished file does not match its journal; starting again", self.dst)
            self._start_again()
            return none
        if good:
            os.truncate(self.journal.path, good)
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
            self.journal.remove()
            name, reason = self.rejects[0]
            photos = counted(len(self.rejects), "photo")
            raise ConvertError(
                f"{self.listing.source}: all of {photos} rejected, nothing is left to write; first {name}: {reason}"
            )
        try:
            return self._on_disk(self._finish)
        except BaseException as error:
            self._stop(error)
            raise

    def _finish(self) -> int:
        self.writer.finish()
        self._close()
        side = self._side_file()
        # The file itself comes last: when it is there, all of it is there.
        write_or_remove(
            rejects_path(self.dst),
            "".join(json.dumps({"path": name, "reason": why}) + "\n" for name, why in self.rejects),
        )
        write_or_remove(side_path(self.dst), json.dumps(side, indent=1) + "\n")
        os.replace(self.partial, self.dst)
        sync_folder(self.dst.parent)
        self.journal.remove()
        return int(side["bytes"])

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
