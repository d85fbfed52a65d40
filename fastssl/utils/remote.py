"""Files on servers: what a server says of one, and its bytes.

http and https are read here, with the standard library; all others (s3, gs, hf, ...) through fsspec, which torch brings
and which asks for a package a protocol.
"""

from __future__ import annotations

import base64
import errno
import http.client
import os
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from fastssl.errors import FastSSLError, Stalled, duration
from fastssl.utils.addresses import address, is_web, shown
from fastssl.utils.deadline import STALL_MINUTES, Deadline

#: Seconds in which a server has to say something.
_TIMEOUT = 60.0
#: Bytes that are asked for at a time, and how many such requests are under way.
_PART, _REQUESTS = 4 << 20, 4
#: Half the seconds before the second attempt; each further pause is twice as long.
_PAUSE = 0.25
#: Attempts where nobody ever answered, or where a file ends at the same wrong place.
_FEW = 3
#: What fsspec wants for a protocol.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs"}
#: Names of a version in what file systems say of a file: S3's, Google's, the hub's, Azure's, fsspec's own.
_VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id", "content_md5", "LastModified", "mtime", "created")

#: What an address may hold beside letters and digits; all else, spaces and letters of other scripts, is quoted.
_AS_THEY_ARE = "/%:@!$&'()*+,;=~[]"

#: Servers that answered once: that nobody is there then is no wrong name, and passes.
_known: set[str] = set()

_Result = TypeVar("_Result")


class RemoteError(FastSSLError):
    """A file of a server cannot be had: it is not there, not for us, changes, or does not fit."""


class Changed(RemoteError):
    """A file is no longer the one whose first bytes were read."""


class NoAccess(RemoteError):
    """A file is not for us: no login, a wrong one, or one that has run out."""


class Passing(RemoteError):
    """What may be over in a moment: a dropped connection, a server that restarts. ``hopeless``: after few attempts."""

    def __init__(self, what: str, hopeless: bool = False):
        super().__init__(what)
        self.hopeless = hopeless


@dataclass(frozen=True)
class About:
    """What a server says of a file. ``size``: in bytes, None where it does not say; ``version``: its ETag or time of
    change, empty where it has neither.
    """

    size: int | None
    version: str


def _server(name: str) -> str:
    return "/".join(name.split("/")[:3])


class Patience:
    """How long one file is tried for: with growing pauses, up to ``minutes`` without a byte, and no longer than until
    ``stop`` is set. A warning comes once.
    """

    def __init__(self, stop: threading.Event | None = None, minutes: float = STALL_MINUTES):
        self.stop, self.minutes, self._warned = stop or threading.Event(), minutes, False
        self.moved()

    def moved(self) -> None:
        """Something came: the count begins again. RemoteError: nobody waits for more."""
        if self.stop.is_set():
            raise RemoteError("not wanted any more")
        self._tries, self._since = 0, time.monotonic()

    def again(self, error: Passing) -> None:
        """Return when the next attempt is due, or raise RemoteError, Stalled: there is none."""
        self._tries += 1
        waited, pause = time.monotonic() - self._since, min(30.0, _PAUSE * 2**self._tries)
        if error.hopeless and self._tries >= _FEW:
            raise RemoteError(str(error)) from None
        if waited + pause > 60 * self.minutes:
            again = "see whether the server can be reached at all, then give the same command again"
            raise Stalled(f"{error}; no byte for {duration(waited)}; {again}") from None
        if self._tries == _FEW and not self._warned:
            self._warned = True
            end = f"an error after {self.minutes:g} min without a byte"
            warnings.warn(f"{error}; trying again, {end}", stacklevel=3)
        self.stop.wait(pause)
        if self.stop.is_set():
            raise RemoteError("not wanted any more")

    def ask(self, question: Callable[[], _Result]) -> _Result:
        """``question()``, asked until it is answered."""
        while True:
            try:
                return question()
            except Passing as error:
                self.again(error)


class RemoteFile(ABC):
    """One file. ``name``: its address as it is shown. Its methods raise RemoteError, and Passing for what another
    attempt may mend.
    """

    def __init__(self, url: str):
        self.url, self.name = url, shown(url)

    @abstractmethod
    def about(self) -> About:
        """Size and version as they are now."""

    @abstractmethod
    def read(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``, fewer only at the file's end."""

    @abstractmethod
    def parts(self, start: int, about: About) -> Iterator[bytes]:
        """The bytes from ``start`` to the end, some at a time. Changed: this is another version than ``about``."""


def remote_file(url: str | os.PathLike) -> RemoteFile:
    """The file at an address; nothing is asked yet. RemoteError: no such protocol, or a package for it is missing."""
    found = address(url)
    if found is None:
        raise RemoteError(f"{os.fspath(url)}: not an address like s3://bucket/name or https://host/name")
    try:
        return _HttpFile(found) if is_web(found) else _FsspecFile(found)
    except ValueError as error:  # of urlsplit
        raise RemoteError(f"{shown(found)}: {error}") from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To other files of the web alone, never from https to http, and without our password to another host."""

    def redirect_request(self, req: Any, *answer: Any) -> Any:
        newurl = answer[-1]
        to = urlsplit(newurl)
        if to.scheme != "https" and (to.scheme != "http" or req.type == "https"):
            raise RemoteError(f"{shown(req.full_url)}: leads to {shown(newurl)}, which is not followed")
        request = super().redirect_request(req, *answer)
        if request is not None and to.netloc != req.host:
            request.remove_header("Authorization")
        return request


class _HttpFile(RemoteFile):
    _opener = urllib.request.build_opener(_Redirects)

    def __init__(self, url: str):
        super().__init__(url)
        host, parts = "", urlsplit(url)
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "fastssl"}
        login, _, host = parts.netloc.rpartition("@")
        if login:
            self._headers["Authorization"] = "Basic " + base64.b64encode(unquote(login).encode()).decode()
        path, query = quote(parts.path, safe=_AS_THEY_ARE), quote(parts.query, safe=_AS_THEY_ARE + "?")
        self._host, self._address = host, parts._replace(netloc=host, path=path, query=query, fragment="").geturl()

    def about(self) -> About:
        with self._errors(), self._ask(0, 1) as response:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            total = total if response.status != 200 else response.headers.get("Content-Length", "")
            return About(int(total) if re.fullmatch("[0-9]{1,18}", total) else None, _version(response.headers))

    def read(self, start: int, stop: int) -> bytes:
        with self._errors(), self._ask(start, stop) as response:
            skipped = start if response.status == 200 else 0
            return bytes(response.read(skipped + stop - start)[skipped:])

    def parts(self, start: int, about: About) -> Iterator[bytes]:
        with self._errors(), self._ask(start, None) as response:
            if _version(response.headers) != about.version:
                raise Changed(f"{self.name}: changed while it was read")
            skip = start if response.status == 200 else 0  # a server that knows no ranges
            if not skip and start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise RemoteError(f"{self.name}: the server sends other bytes than it was asked for")
            while data := response.read1(1 << 20):
                data, skip = data[skip:], max(0, skip - len(data))
                if data:
                    yield data

    def _ask(self, start: int, stop: int | None) -> Any:
        span = f"bytes={start}-{'' if stop is None else stop - 1}"
        request = urllib.request.Request(self._address, headers={**self._headers, "Range": span})
        response = self._opener.open(request, timeout=_TIMEOUT)
        packed = response.headers.get("Content-Encoding", "identity").lower()
        if packed not in ("", "identity") and not re.search(r"\.(gz|tgz)$", urlsplit(self._address).path, re.I):
            response.close()  # of x.tar.gz the bytes as they come are the file
            raise RemoteError(f"{self.name}: the server sends it packed ({shown(packed)}), not as it was asked to")
        _known.add(_server(self._address))
        return response

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = error.reason if isinstance(error, urllib.error.URLError) else error
            said = shown(" ".join(str(why).split())) or type(why).__name__
            if isinstance(error, http.client.InvalidURL):  # it repeats a part, which may be of the password
                raise RemoteError(f"{self.name}: no such address; in a password / is written %2F, @ %40") from None
            if isinstance(why, ssl.SSLCertVerificationError) or isinstance(error, ValueError):
                raise RemoteError(f"{self.name}: {said}") from None
            nobody = isinstance(why, socket.gaierror | ConnectionRefusedError) and _server(self._address) not in _known
            said = f"no connection to {self._host} ({said})" if nobody else said
            raise Passing(f"{self.name}: {said}", nobody) from None

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        said = f"{self.name}: the server says {error.code} {shown(str(error.reason))}"
        if error.code in (408, 425, 429) or error.code >= 500:
            _known.add(_server(self._address))
            return Passing(said)
        advice = {404: "is the name right?", 410: "it was removed", 416: "it is shorter than the server said, or empty"}
        if error.code in (401, 403):
            return NoAccess(f"{said}: access denied; a signed address may have run out")
        return RemoteError(f"{said}: {advice.get(error.code, 'not a file for us')}")


def _version(headers: Any) -> str:
    return str(headers.get("ETag") or headers.get("Last-Modified") or "")


class _FsspecFile(RemoteFile):
    def __init__(self, url: str):
        super().__init__(url)
        self.system, self.path = file_system(url)

    def about(self) -> About:
        with fsspec_errors(self.name):
            self.system.invalidate_cache()
            info = self.system.info(self.path)
        if info.get("type") == "directory":
            raise RemoteError(f"{self.name}: a folder, not a file")
        return said_of(info)

    def read(self, start: int, stop: int) -> bytes:
        with fsspec_errors(self.name):
            return bytes(self.system.cat_file(self.path, start=start, end=stop))

    def parts(self, start: int, about: About) -> Iterator[bytes]:
        if about.size is None:
            raise RemoteError(f"{self.name}: the server does not say how long it is")

        def part(low: int) -> bytes:
            wanted = min(_PART, size - low)
            if len(data := self.read(low, low + wanted)) != wanted:
                came = f"{len(data):,} of {wanted:,} bytes came from byte {low:,} on"
                raise Passing(f"{self.name}: {came}", hopeless=True)
            return data

        size, deadline = about.size, Deadline(self.name)
        with closing(deadline.map(part, range(start, size, _PART), _REQUESTS, lambda low: f"at byte {low:,}")) as found:
            yield from found


def said_of(info: dict[str, Any]) -> About:
    """Size and version in what a file system of fsspec says of a file."""
    size = info.get("size")
    versions = [str(info[key]) for key in _VERSIONS if info.get(key)]
    return About(size if isinstance(size, int) and size >= 0 else None, " ".join(versions[:1]))


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and its path there. RemoteError: no such protocol, or its package is missing;
    says which.
    """
    protocol, _, rest = url.partition("://")
    if protocol in ("s3", "s3a", "gs", "gcs") and "@" in rest.partition("/")[0]:
        raise RemoteError(f"{shown(url)}: a bucket's name has no @, and takes no login: see AWS_PROFILE, or gcloud")
    try:
        import fsspec

        # Not url_to_fs: to that, x::file:///y in the name of an object is the address of another file.
        kind = fsspec.get_filesystem_class(protocol)
        system = kind(**kind._get_kwargs_from_urls(url))
        system.invalidate_cache()  # listings that are kept would hide changes
        return system, kind._strip_protocol(url)
    except ImportError:
        package = _PACKAGES.get(protocol, "fsspec")
        how = "pip install 'fastssl-vision[remote]'" if package == "s3fs" else f"pip install {package}"
        raise RemoteError(f"{shown(url)}: {protocol}:// is read with {package}, which is not here: {how}") from None
    except ValueError as error:
        raise RemoteError(f"{shown(url)}: {shown(str(error))}") from None


@contextmanager
def fsspec_errors(name: str) -> Iterator[None]:
    """What fsspec's file systems raise, of ``name``, as RemoteError, and Passing where another attempt may help."""
    try:
        yield
        _known.add(_server(name))
    except (FastSSLError, MemoryError):
        raise
    except FileNotFoundError:
        raise RemoteError(f"{name}: no such file on the server; is the name right?") from None
    except Exception as error:  # each package has its own
        said, kind = shown(" ".join(str(error).split())), type(error).__name__
        code: Any = getattr(error, "status_code", None)
        with suppress(AttributeError):
            code = code or error.response.status_code  # type: ignore[attr-defined]
        if isinstance(error, PermissionError) or "Credential" in kind or code in (401, 403):
            how = "log in as for that service's own program; for a public bucket FSSPEC_S3_ANON=true"
            raise NoAccess(f"{name}: access denied ({said or kind}): {how}") from None
        if code == 404:
            raise RemoteError(f"{name}: no such file on the server; is the name right?") from None
        odd = isinstance(error, TypeError | ValueError) or "ParamValidation" in kind
        odd = odd or getattr(error, "errno", None) in (errno.EINVAL, errno.EPERM)
        raise Passing(f"{name}: {said or kind}", odd or ("Connect" in kind and _server(name) not in _known)) from None
