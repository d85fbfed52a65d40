"""Turn a folder or tar of photos into one ``.beton`` file.

Every photo is decoded once, strictly, so that a damaged one is found now and not in the middle of a training run. A
JPEG that needs no change goes into the file byte for byte; anything else becomes upright 8-bit RGB and is re-encoded.

DST itself appears by renaming, so it is whole or absent. A conversion that was stopped goes on behind the last line of
its journal (unfinished.py); the bytes of the result do not depend on stops, nor on the number of workers.

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
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL
import simplejpeg

from fastssl._version import __version__
from fastssl.errors import FastSSLError, Stalled, at_work_on, counted, printable
from fastssl.pipelines.beton.format import DEFAULT_PAGE_SIZE, MIN_PAGE_SIZE, RECORD_DTYPE
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.side_file import read_side_file, side_path
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert.encode import COUNTS, Encoded, encode_photo, tally
from fastssl.pipelines.convert.formats import pillow_formats
from fastssl.pipelines.convert.options import ConvertError, ConvertOptions, ConvertSummary, chosen_photos
from fastssl.pipelines.convert.sources import Listing, ListingRules, list_source
from fastssl.pipelines.convert.unfinished import Journal, reserve
from fastssl.utils.atomic_files import sync_folder, write_atomically
from fastssl.utils.cores import available_cores
from fastssl.utils.deadline import Deadline
from fastssl.utils.patterns import expand
from fastssl.utils.remote import NoAccess

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")

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
    src: str | os.PathLike | Sequence[str | os.PathLike] | Listing,
    dst: str | os.PathLike,
    options: ConvertOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    rules: ListingRules | None = None,
) -> ConvertSummary:
    """Convert the photos of ``src``, one source or several (see `sources.list_source`) or what was listed of them, into
    the ``.beton`` file ``dst``; an existing one is replaced, at the very end. ``progress(done, total)`` is called ten
    times a second. ``rules`` say which split is meant, where there are several, and what the class is.

    Raises:
        ConvertError, SourceError: nothing to convert, every photo rejected, a bad photo with ``on_bad='fail'``, no
            space, ...
        WorkerError: no memory was left for a photo.
        Stalled: the disk or network file system did not answer; the same conversion goes on where it stood, in a new
            process.
    """
    options, dst = options or ConvertOptions(), Path(dst)
    sources = as_sources(src.source if isinstance(src, Listing) else src)
    require_target(dst, sources)
    started = time.monotonic()
    deadline = Deadline(sources[0], options.stall_minutes, "read or written")
    listed = nullcontext(src) if isinstance(src, Listing) else list_source(sources, deadline, rules, dst.parent)
    with warnings.catch_warnings(), listed as listing, reserve(dst) as unfinished:
        # Pillow warns about odd metadata, which does not concern the pixels, in the middle of the progress bar.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        job = _Conversion(listing, dst, unfinished, options, deadline)
        job.run(progress)
        return summary_of(dst, listing, job.publish(), job.resumed, time.monotonic() - started)


def summary_of(
    path: Path, listing: Listing, side: dict[str, Any], resumed: int, seconds: float = 0.0
) -> ConvertSummary:
    """What is told of a file, by what stands beside it. ``KeyError``: it is of before all of that was counted."""
    known = {name: side[name] for name in (*COUNTS, "deep", "rejected", "bytes")}
    known |= {name: getattr(listing, name) for name in ("passed_over", "classes", "split", "notes")}
    return ConvertSummary(path=path, files=[path], written=side["samples"], resumed=resumed, seconds=seconds, **known)


def as_sources(src: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str | os.PathLike]:
    """One source or several as a list."""
    return [src] if isinstance(src, (str, os.PathLike)) else list(src)


def require_target(dst: Path, sources: list[str | os.PathLike]) -> None:
    """``ConvertError``: nothing can be written to ``dst``, or one of ``sources`` is there."""
    if dst.is_dir():
        raise ConvertError(f"{dst}: is a folder; name the .beton file to write")
    if not dst.parent.is_dir():
        raise ConvertError(f"{dst.parent}: no such folder; create it first")
    # The result takes its name by renaming, which would put a plain file in the place of a device, or of the photos
    # themselves.
    if dst.exists() and not dst.is_file():
        raise ConvertError(f"{dst}: exists and is not a plain file; name another DST")
    names = (name for one in sources for name in expand(one)) if dst.exists() else ()
    if any(os.path.exists(name) and os.path.samefile(name, dst) for name in names):
        raise ConvertError(f"{dst}: SRC and DST are one file; the photos would be overwritten by the result")


def whole_side_file(dst: Path) -> dict[str, Any] | None:
    """What stands beside the ``.beton`` file ``dst``, if it is this very file's, as far as sizes and tables tell."""
    with suppress(FastSSLError, OSError):
        side = read_side_file(dst)
        if side is not None and isinstance(sums := side.get("crc32"), dict):
            with BetonReader(dst) as reader:
                found = {"bytes": reader.num_bytes, **reader.table_checksums(), "samples": sums.get("samples")}
            if {"bytes": side["bytes"], **sums} == found:
                return side
    return None


class _Conversion:
    """One run: takes photos in order from the threads, writes them, keeps the journal."""

    def __init__(self, listing: Listing, dst: Path, partial: Path, options: ConvertOptions, deadline: Deadline):
        self.listing, self.dst, self.partial, self.options, self.deadline = listing, dst, partial, options, deadline
        self.chosen = chosen_photos(len(listing), options.limit)[options.dealt]
        self.never_photos = listing.rejected[options.dealt]
        total = len(self.chosen)
        # What has to be equal for a stopped conversion to be continued with the very same bytes.
        versions = {"simplejpeg": simplejpeg.__version__, "pillow": PIL.__version__, "fastssl": __version__}
        key = {"source": listing.fingerprint, "total": total, "options": options.deciding(), "versions": versions}
        if options.part is not None:
            key["part"] = [*options.part]
        self.journal = Journal(Path(f"{partial}.journal"), key)
        self._unsynced = 0  # bytes
        written = self._from_the_start()
        if options.resume:
            written = deadline.call(self._take_over, f"while {self.journal.path.name} was read")
        self.resumed = self.num_done
        if not self.resumed:
            self.journal.remove()
        page_size = DEFAULT_PAGE_SIZE if total >= SMALL_SET else MIN_PAGE_SIZE
        labels = listing.classes is not None
        self.writer = BetonWriter(partial, total, labels=labels, page_size=page_size, written=written)

    def _from_the_start(self, why: str = "") -> np.ndarray:
        """Begin with no photo done; the records of those that are. ``why`` is said, where there was something."""
        if why:
            logger.warning("%s: %s; starting again", self.dst, why)
        self.num_done = 0
        self.hows: Counter[int] = Counter()
        self.checksums = array("I")
        self.rejects = list(self.never_photos)
        return np.zeros(0, RECORD_DTYPE)

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        """Convert all photos that are not done yet; whatever stops it, what is done so far is kept for the next run."""
        pillow_formats()  # here, because loading plugins is not made for several threads at once
        total = len(self.chosen)
        checkpoint_at, progress_at = time.monotonic() + CHECKPOINT_SECONDS, 0.0
        try:
            if self.options.on_bad == "fail" and self.never_photos:
                self._fail(*self.never_photos[0])
            if self.options.resume:
                self.journal.open(new=not self.resumed)
            if progress is not None:
                progress(self.num_done, total)
            left, workers = self.chosen[self.num_done :].tolist(), self.options.workers or available_cores()
            photos = self.deadline.map(self._photo, left, workers, lambda i: f"at {printable(self.listing.names[i])}")
            with closing(photos) as results:
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

    def _on_disk(self, work: Callable[[], _Result]) -> _Result:
        """``work()``, which waits for the disk under DST."""
        return self.deadline.call(work, f"while {self.partial.name} was written")

    def _photo(self, i: int) -> Encoded | str:
        try:
            return encode_photo(self.listing.read(i), self.options)
        except (Stalled, NoAccess):  # the server's state, not the photo's
            raise
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
            self.hows[result.how] += 1
            line = [self.num_done, result.crc32, result.how, *self.writer.records[-1].tolist()]
        self.num_done += 1
        self.journal.append(line)

    def _fail(self, name: str, reason: str) -> None:
        raise ConvertError(f"{self.listing.source}: {name}: {reason} (--on-bad skip lists bad photos and goes on)")

    # ---- stopping and going on

    def _checkpoint(self) -> None:
        """Bring the photos to the disk, and only then the lines that vouch for them."""
        # Without a journal, what a large memory holds back would come at the very end, and take longer than it may.
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
        """Read what a stopped run left; the records of its samples, none when it cannot be continued."""
        rows, good = [], 0
        try:
            for (position, *row), end in self.journal.replay():
                # A write that failed half-way may have been tried again: take each photo once, in order.
                if position != self.num_done:
                    break
                if len(row) == 1:
                    self.rejects.append((self.listing.names[self.chosen[position]], row[0]))
                else:
                    checksum, how, *record = row
                    self.checksums.append(checksum)
                    self.hows[how] += 1
                    rows.append(tuple(record))
                self.num_done, good = position + 1, end
        except ValueError:
            return self._from_the_start("the photos, the options or a version changed since it was stopped")
        records = np.array(rows, RECORD_DTYPE)
        if len(records):
            with open(self.partial, "rb") as file:
                file.seek(int(records[-1]["offset"]))
                last = file.read(int(records[-1]["size"]))
            if len(last) != records[-1]["size"] or zlib.crc32(last) != self.checksums[-1]:
                return self._from_the_start("the unfinished file does not match its journal")
        if good:
            os.truncate(self.journal.path, good)
        return records

    # ---- the end

    def publish(self) -> dict[str, Any]:
        """Finish the file, write what stands beside it, which is returned, and rename."""
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

    def _finish(self) -> dict[str, Any]:
        self.writer.finish()
        self._close()
        side = self._side_file()
        # The file itself comes last: when it is there, all of it is there.
        if self.rejects:
            lines = [json.dumps({"path": name, "reason": why}) + "\n" for name, why in self.rejects]
            write_atomically(rejects_path(self.dst), lambda unfinished: unfinished.write_text("".join(lines), "utf-8"))
        else:
            rejects_path(self.dst).unlink(missing_ok=True)
        text = json.dumps(side, indent=1) + "\n"
        write_atomically(side_path(self.dst), lambda unfinished: unfinished.write_text(text, "utf-8"))
        os.replace(self.partial, self.dst)
        sync_folder(self.dst.parent)
        self.journal.remove()
        return side

    def _side_file(self) -> dict[str, Any]:
        with BetonReader(self.partial) as reader:  # also proves that the tables can be read
            checksums = reader.table_checksums()
            num_bytes = reader.num_bytes
        samples, classes, counts = np.array(self.checksums, "<u4"), self.listing.classes, None
        rules = self.listing.rules
        if classes is not None:
            counts = np.bincount(self.writer.records["label"], minlength=len(classes)).tolist()
        return {
            "format": "fastssl-beton-side-file",
            "version": 1,
            "tool": f"fastssl {__version__}",
            "source": self.listing.source.name,
            "fingerprint": self.listing.fingerprint,
            "split": self.listing.split,
            "rules": {"depth": rules.depth, "label_from": rules.label_from, "labels": rules.labels is not None},
            "automatic": self.options.automatic,
            "options": self.options.deciding(),
            "part": self.options.part,
            **tally(self.hows),
            "rejected": len(self.rejects),
            "bytes": num_bytes,
            "classes": classes,
            "class_counts": counts,
            # CRC-32, the samples' as little-endian uint32 in base64: 5 bytes a sample.
            "crc32": {**checksums, "samples": base64.b64encode(samples.tobytes()).decode("ascii")},
        }
