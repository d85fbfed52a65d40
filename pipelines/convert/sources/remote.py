"""Photos on a server: a folder of objects, read one by one, or one archive, which is copied to this machine first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from fastssl.pipelines.convert.formats import is_photo_name
from fastssl.pipelines.convert.sources.base import Found, Passed, Source, SourceError, is_hidden
from fastssl.utils.addresses import is_web, shown
from fastssl.utils.remote import Patience, file_system, fsspec_errors, said_of


class RemoteFolder(Source):
    """The objects below an address. A stamp is the object's version: ETag, or time of change."""

    sorts, strips = True, False

    def __init__(self, url: str):
        super().__init__(shown(url).rstrip("/"))
        self._system, self._root = file_system(url)

    def photos(self) -> Iterator[Found | Passed]:
        with fsspec_errors(self.name):
            for folder, folders, files in self._system.walk(self._root, detail=True, on_error="raise"):
                # Deep ones are not asked for.
                for name in filter(is_hidden, list(folders)):
                    del folders[name]
                below = os.path.relpath(folder, self._root)
                for name, info in files.items():
                    path, about = name if below == "." else f"{below}/{name}", said_of(info)
                    if not name:  # what S3's console makes of an empty folder
                        continue
                    if is_photo_name(name) and not is_hidden(name) and about.size is not None:
                        yield Found(path, about.size, about.version, path)
                    else:
                        yield Passed(path)

    def read(self, place: Any, size: int) -> bytes:
        def ask() -> bytes:
            with fsspec_errors(f"{self.name}/{place}"):
                # One byte more than expected shows an object that has grown.
                return bytes(self._system.cat_file(f"{self._root}/{place}", start=0, end=size + 1))

        data = Patience().ask(ask) if size else b""
        if len(data) != size:
            raise SourceError("changed while it was being converted")
        return data


def is_remote_folder(url: str) -> bool:
    """Whether this is a folder of objects. ``SourceError``: it is one of a web server, which has no list of files."""
    if not is_web(url):
        system, path = file_system(url)
        with fsspec_errors(shown(url)):
            return bool(system.isdir(path))
    if url.partition("?")[0].endswith("/"):
        what = "a web server has no list of the files in a folder; give the address of a tar, zip, parquet or .beton"
        raise SourceError(f"{shown(url)}: {what}")
    return False
