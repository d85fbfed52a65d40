"""Which kind of source a path is, and what is behind a name that stands for several."""

from __future__ import annotations

import os
import resource
import stat
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from fastssl.errors import counted
from fastssl.pipelines.beton.remote_set import is_beton_address
from fastssl.pipelines.convert.formats import is_photo_name
from fastssl.pipelines.convert.sources.base import Source, SourceError, is_hidden, listed_behind
from fastssl.pipelines.convert.sources.folder import FolderSource
from fastssl.pipelines.convert.sources.lists import STANDARD_INPUT, ListSource
from fastssl.pipelines.convert.sources.parquet import ParquetSource
from fastssl.pipelines.convert.sources.remote import RemoteFolder, is_remote_folder
from fastssl.pipelines.convert.sources.tar import TarSource
from fastssl.pipelines.convert.sources.zip import ZipSource
from fastssl.utils.addresses import address, is_remote, shown
from fastssl.utils.deadline import Deadline
from fastssl.utils.patterns import expand, has_pattern, natural_key
from fastssl.utils.remote_cache import local_copy

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_LISTS = (".csv", ".tsv", ".txt", ".lst", ".list")
#: Endings of files that hold photos, or name them.
SOURCE_ENDINGS = (*_TARS, ".zip", ".parquet", *_LISTS)
#: Where the hub's data sets have their tables, below their folder.
_TABLES = ("*.parquet", "data/*.parquet", "*/train/*.parquet", "*/validation/*.parquet", "*/test/*.parquet")


def is_source(path: str | os.PathLike) -> bool:
    """Whether this is something that `list_source` takes; not a ``.beton`` file, a pattern or a folder of such."""
    if (url := address(path)) is not None:
        return not is_beton_address(url)
    name = os.fspath(path).lower()
    if os.path.isdir(path):
        seen = [one for one in os.scandir(os.fspath(path)) if not one.name.startswith(".")]
        photos = any(one.is_dir() or is_photo_name(one.name) or one.name.endswith(".parquet") for one in seen)
        return photos or not any(one.name.endswith(".beton") for one in seen)
    if name.endswith(".beton") or not os.path.isfile(path):
        return not name.endswith(".beton") and has_pattern(path)
    return name.endswith(SOURCE_ENDINGS) or _magic(path) != ""


def open_source(
    files: Sequence[str],
    deadline: Deadline,
    label_from: str | None = None,
    scratch: str | os.PathLike | None = None,
) -> Source:
    """The source at a path or address, or of several parquet files as one, by what it is: a folder; parquet; a zip; a
    list of photos (.csv, .tsv, .txt; ``-``: standard input); otherwise a tar. ``label_from``: see
    `webdataset.with_labels`. ``deadline``, ``scratch``: see `list_splits`.

    Raises:
        SourceError: of no kind that we read. OSError: as usual. Stalled: the disk did not answer.
    """
    if len(files) == 1 and is_remote(files[0]) and is_remote_folder(url := address(files[0]) or ""):
        return RemoteFolder(url)
    copies = [os.fspath(local_copy(one)) if is_remote(one) else one for one in files]
    names = [shown(one) if is_remote(one) else one for one in files]
    if len(files) > 1:
        return ParquetSource(names, copies)
    source = deadline.call(lambda: _open(copies[0], label_from, scratch), listed_behind(None))
    source.name = source.name.replace(copies[0], names[0])
    return source


def _open(name: str, label_from: str | None, scratch: str | os.PathLike | None) -> Source:
    if name == STANDARD_INPUT:
        return ListSource(name)
    path, mode = Path(name), os.stat(name).st_mode
    if stat.S_ISDIR(mode):
        tables = [one for pattern in _TABLES for one in path.glob(pattern)]
        # Beside photos, or folders of them, they hold something else.
        beside = (one for folder in {one.parent for one in tables} for one in os.scandir(folder))
        if tables and not any(one.is_dir() or is_photo_name(one.name) for one in beside if not is_hidden(one.name)):
            return ParquetSource(sorted(map(str, tables), key=natural_key))
        return FolderSource(path)
    if not stat.S_ISREG(mode):
        raise SourceError(f"{path}: neither a folder nor a tar, zip, parquet file or list of photos")
    kind, ending = _magic(path), path.suffix.lower()
    if "parquet" in (kind, ending[1:]):
        return ParquetSource([name])
    if "zip" in (kind, ending[1:]):
        return ZipSource(path)
    if not kind and (ending == ".beton" or is_photo_name(path.name)):
        what = "converted already; give its photos" if ending == ".beton" else "one photo; give its folder"
        raise SourceError(f"{path}: {what}")
    return ListSource(name) if not kind and ending in _LISTS else TarSource(path, scratch, label_from)


def files_of(given: Sequence[str | os.PathLike]) -> list[list[str]]:
    """The files of each source: one, or several of parquet that follow each other. Patterns are expanded; and as many
    files may be open as there are, where this process may decide that.
    """
    names = [name for one in given for name in expand(one)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < len(names) + 512 <= (hard if hard >= 0 else sys.maxsize):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(names) + 512, hard))
    parts: list[list[str]] = []
    for tables, group in groupby(names, key=lambda name: name.lower().endswith(".parquet")):
        some = list(group)
        parts += [some] if tables else [[name] for name in some]
    return parts


def expected(given: str | os.PathLike, passed_over: Mapping[str, int]) -> str:
    """What to give instead of a source in which there are no photos."""
    if inside := [kind for kind in passed_over if kind in (*SOURCE_ENDINGS[:-2], ".beton")]:
        held = counted(passed_over[inside[0]], f"{inside[0]} file")
        if os.path.isfile(given):
            return f"it holds {held}: unpack it first, and give those"
        return f"it holds {held}: give those themselves, as in '{shown(given)}/*{inside[0]}'"
    if not os.path.isdir(given):
        return "no photo is in it, or named by a line of it"
    return f"expected {given}/CLASS/photo.jpg, {given}/photo.jpg, or a tar, a zip, parquet files, a list of photos"


def _magic(path: str | os.PathLike) -> str:
    """What the first bytes of a file say: parquet, zip, tar, or nothing."""
    with open(path, "rb") as file:
        begin = file.read(262)
    return {b"PAR1": "parquet", b"PK\3\4": "zip", b"PK\5\6": "zip"}.get(begin[:4], "tar" * (begin[257:] == b"ustar"))
