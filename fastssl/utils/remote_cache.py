"""Whole files of servers on a disk of this machine, for all its processes.

    $FASTSSL_CACHE/remote/KEY-SIZE/lock          held shared while the file is in use; its time is that of the last use
                                   train.beton   whole; train.beton.part until then

KEY is a digest of address and version, so that a file which changes is another file, and what a killed download leaves
is gone on with by the next one. SIZE counts from the moment at which a download begins: what is under way elsewhere is
not given away twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

from fastssl.errors import Stalled, duration
from fastssl.utils.addresses import is_web
from fastssl.utils.deadline import STALL_MINUTES
from fastssl.utils.remote import About, Changed, Passing, Patience, RemoteError, RemoteFile, remote_file

#: Of what the cache and the free room come to, where FASTSSL_CACHE_GB says nothing.
_SHARE = 0.8
#: Parts of a query string that sign an address, and change while the file stays the same.
_SIGNATURE = re.compile(r"(x-(amz|goog)-\w+|signature|expires|awsaccesskeyid|key-pair-id|policy|sig|token)=", re.I)

#: The locks of files in use here, and how often each was asked for.
_held: dict[Path, list[Any]] = {}
_guard = threading.Lock()


def _show_nothing(name: str) -> AbstractContextManager[Callable[[int, int], None]]:
    return nullcontext(lambda done, total: None)


#: Shows how the download of a file of that name goes on: (bytes done, in all; 0: not known).
show = _show_nothing


def default_cache_dir() -> Path:
    """Where files are kept that can be had again: ``$FASTSSL_CACHE``, else ``fastssl`` in ``$XDG_CACHE_HOME`` or
    ``~/.cache``.
    """
    own, root = os.environ.get("FASTSSL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(root) if root else Path.home() / ".cache") / "fastssl"


def local_copy(
    url: str | os.PathLike, quiet: bool = False, stop: threading.Event | None = None, expected: About | None = None
) -> Path:
    """The whole file at ``url`` on this machine, downloaded unless it is there as the server has it now. It stays until
    `release`, or until the process ends. Any number of processes may ask at once: one downloads. A ``.beton`` file's
    side file comes with it. ``quiet``: nothing shows how it goes on. ``stop``: when it is set, nobody
    waits any more; the next one goes on with what has come. ``expected``: what its server said of it before.

    Raises:
        RemoteError: it cannot be had, changes all the time, does not fit, or is not what was ``expected``.
        Stalled: no byte came for ten minutes.
    """
    file = remote_file(url)
    for _ in range(3):
        about = Patience(stop).ask(file.about)
        if expected not in (None, about):
            raise RemoteError(f"{file.name}: was replaced since the set was opened; start again with whole files")
        with suppress(Changed), (_show_nothing if quiet else show)(file.name) as progress:
            return _Copy(file, about, progress, stop).path()
    raise RemoteError(f"{file.name}: changes while it is downloaded; wait until it is whole, then try again")


def release(path: Path) -> None:
    """What `local_copy` gave is no longer needed here, and may make room for others."""
    with _guard:
        if (held := _held.get(path)) is not None:
            held[1] -= 1
            _used(held[0])
            if not held[1]:
                _held.pop(path)[0].close()


def room(folder: Path | None = None) -> int:
    """Bytes that the cache may hold: ``$FASTSSL_CACHE_GB``, or most of what it has and the disk has left."""
    folder, text = folder or default_cache_dir() / "remote", os.environ.get("FASTSSL_CACHE_GB")
    if text:
        with suppress(ValueError, OverflowError):
            if (found := int(float(text) * 1e9)) > 0:
                return found
        raise RemoteError(f"FASTSSL_CACHE_GB={text!r} is not a number of gigabytes above 0")
    folder.mkdir(parents=True, exist_ok=True)
    return int(_SHARE * (shutil.disk_usage(folder).free + sum(there for _, _, there in _entries(folder))))


class _Copy:
    """One file in the cache, in a version of its own."""

    def __init__(
        self, file: RemoteFile, about: About, progress: Callable[[int, int], None], stop: threading.Event | None
    ):
        self.file, self.about, self.progress, self.stop = file, about, progress, stop
        self.parts = parts = urlsplit(file.url if is_web(file.url) else quote(file.url, safe="/:@"))
        query = "&".join(part for part in parts.query.split("&") if not _SIGNATURE.match(part))
        place = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query, fragment="").geturl()
        key = hashlib.sha256(f"{place} {about.version}".encode("utf-8", "surrogateescape")).hexdigest()[:20]
        # The server's name for it says people what it is, and programs how to read it; it is no path.
        name = re.sub(r"[^\w.-]", "_", unquote(parts.path).rstrip("/").rpartition("/")[2]).lstrip(".")[-100:]
        self.time = 10**9 + int(key[:7], 16)
        self.folder = default_cache_dir() / "remote" / f"{key}-{about.size or 0}"
        self.whole = self.folder / (name or "file")
        self.part = self.whole.with_name(f"{self.whole.name}.part")

    def path(self) -> Path:
        try:
            while (lock := self._locked()) is None or not self.whole.exists():
                if lock is not None:
                    with lock:
                        self._download()
        except OSError as error:
            what = error.strerror or error
            where = f"FASTSSL_CACHE says where there is room: {self.folder.parent}"
            raise RemoteError(f"{self.file.name}: cannot be kept here: {what}; {where}") from None
        _used(lock)
        with _guard:
            if (held := _held.get(self.whole)) is None:
                _held[self.whole] = [lock, 1]
            else:
                held[1] += 1
                lock.close()
        return self.whole

    def _locked(self) -> BinaryIO | None:
        """The lock: shared where the file is whole, else ours alone. None: it was taken away meanwhile."""
        if not self.whole.exists():
            self._make_room()
        try:
            lock = open(self.folder / "lock", "a+b")  # noqa: SIM115 (held open)
        except FileNotFoundError:
            return None
        size, since = -1, time.monotonic()
        try:
            while True:
                try:
                    whole = self.whole.exists()
                    fcntl.flock(lock, (fcntl.LOCK_SH if whole else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                    break
                except BlockingIOError:  # another process downloads it
                    if (there := _size(self.part)) != size:
                        size, since = there, time.monotonic()
                        self.progress(size, self.about.size or 0)
                    if (waited := time.monotonic() - since) > 60 * (STALL_MINUTES + 1):
                        what = f"another process downloads it, and nothing came for {duration(waited)}"
                        raise Stalled(f"{self.file.name}: {what}; see what became of that process") from None
                    time.sleep(0.1)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)) and (whole or not self.whole.exists()):
                    return lock
        except BaseException:
            lock.close()
            raise
        lock.close()
        return None

    def _make_room(self) -> None:
        """Enter the file's size, with what nobody uses deleted where that is needed."""
        root, size, name = self.folder.parent, self.about.size or 0, self.file.name
        more = "FASTSSL_CACHE_GB allows more, FASTSSL_CACHE names a folder on a larger disk"
        with _alone(root):
            limit = room(root)
            others = [entry for entry in _entries(root) if entry[0] != self.folder]
            if size > limit:
                whole = f"more than all of the cache ({root}, {gigabytes(limit)})"
                raise RemoteError(f"{name}: {gigabytes(size)}, {whole}; {more}")

            def fits() -> bool:
                coming = sum(max(0, wanted - there) for _, wanted, there in others)
                own = size - sum(map(_size, (self.part, self.whole)))
                # What others have announced and not written yet is no longer free.
                enough = shutil.disk_usage(root).free >= coming + own
                return enough and sum(max(wanted, there) for _, wanted, there in others) + size <= limit

            for entry in sorted(others, key=lambda entry: _time(entry[0] / "lock")):
                if fits():
                    break
                if _evict(entry[0]):
                    others.remove(entry)
            if not fits():
                used = gigabytes(sum(max(wanted, there) for _, wanted, there in others))
                free = gigabytes(shutil.disk_usage(root).free)
                full = f"{root} holds {used} of {gigabytes(limit)}, all in use, and its disk has {free} left"
                raise RemoteError(f"{name}: no room for its {gigabytes(size)}: {full}; {more}")
            self.folder.mkdir(exist_ok=True)
            (self.folder / "lock").touch()

    def _download(self) -> None:
        file, about, patience = self.file, self.about, Patience(self.stop)
        total, limit = about.size, room(self.folder.parent)
        with open(self.part, "ab") as out:
            if not about.version or total is None:  # nothing says that what is there is the beginning of the same file
                out.seek(0)
                out.truncate()
            while out.tell() != total:
                try:
                    for data in file.parts(out.tell(), about):
                        if out.tell() + len(data) > (limit if total is None else total):
                            raise RemoteError(f"{file.name}: longer than the server said, or than the cache may be")
                        out.write(data)
                        patience.moved()
                        self.progress(out.tell(), total or 0)
                    if total is None:
                        break
                    if out.tell() != total:
                        ended = f"{file.name}: ended after {out.tell():,} of {total:,} bytes"
                        raise Passing(ended, hopeless=True)
                except Passing as error:
                    patience.again(error)
            out.flush()
            os.fsync(out.fileno())
        # Part of the fingerprint of an archive's photos: another one for another version, the same when it comes again.
        os.utime(self.part, (self.time, self.time))
        if patience.ask(file.about) != about:
            self.part.unlink()
            raise Changed(f"{file.name}: changed while it was read")
        if self.whole.suffix == ".beton":
            self._side_file()
        os.replace(self.part, self.whole)

    def _side_file(self) -> None:
        """Class names and checksums, where they are there."""
        web = self.parts._replace(path=f"{self.parts.path}.json").geturl()
        beside = remote_file(web if is_web(web) else f"{self.file.url}.json")
        with suppress(RemoteError):
            patience = Patience(self.stop)
            size = patience.ask(beside.about).size or 0
            if 0 < size <= 1 << 30:
                found = patience.ask(lambda: beside.read(0, size))
                self.whole.with_name(f"{self.whole.name}.json").write_bytes(found)


def _entries(root: Path) -> Iterator[tuple[Path, int, int]]:
    """(folder, bytes that it was made for, bytes that are there) of all files of the cache."""
    for folder in root.iterdir() if root.is_dir() else ():
        if match := re.fullmatch(r"[0-9a-f]{20}-([0-9]+)", folder.name):
            yield folder, int(match[1]), sum(_size(Path(entry)) for entry in folder.iterdir())


def _evict(folder: Path) -> bool:
    """Delete a file of the cache unless somebody has it, or downloads it."""
    with suppress(OSError), open(folder / "lock", "a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / "lock").unlink()
        # Killed here it would leave a whole file without its class names: those go last.
        for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".json"):
            path.unlink()
        folder.rmdir()
        return True
    return False


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process at a time decides what goes and what comes."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _used(lock: BinaryIO) -> None:
    """Now, and not in the file system's steps of some milliseconds."""
    os.utime(lock.fileno(), ns=(time.time_ns(),) * 2)


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _time(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def gigabytes(size: float) -> str:
    """1.2 GB, 3.4 MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
