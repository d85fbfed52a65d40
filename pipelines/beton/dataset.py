"""Many ``.beton`` files that are read as one data set."""

from __future__ import annotations

import os
import re
import sys
import warnings
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastssl.errors import BetonError, counted
from fastssl.pipelines.beton.open_file import OpenFiles
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.remote_set import local_files, remote_names, said_of_all
from fastssl.pipelines.beton.tables import Row, Tables
from fastssl.pipelines.ops.memory import ThreadMemory
from fastssl.utils.addresses import is_remote, shown
from fastssl.utils.patterns import expand, has_pattern, natural_key
from fastssl.utils.remote_cache import room

#: Samples above which a set keeps no tables: they take 33 bytes a sample, in every process.
LAZY_ABOVE = 1 << 24
#: Files that are asked at once when a set is opened; records of each that tell a set from another one; records that a
#: disk is asked for at once; that are remembered, those of some batches.
_AT_ONCE, _RECORDS, _AHEAD, _REMEMBERED = 16, 4, 64, 1 << 16
_OF = re.compile(r"(.*?)(\d+)-of-(\d+)(\D*)")
#: Words in the names of files that are not of one set.
_SPLITS = re.compile(r"(?<![a-z])(train|val|valid|validation|test)(?![a-z])")

#: A file, a pattern (``train-*.beton``), a folder of ``.beton`` files, or several of them.
Data = str | os.PathLike | Sequence[str | os.PathLike]
Classes = tuple[str, ...]
_Found = TypeVar("_Found")


def open_beton(data: Data) -> BetonReader:
    """The data set that ``data`` names: a ``BetonReader`` of one file, a ``BetonSet`` of more. ``BetonError``: as those
    two and `beton_files`.
    """
    if isinstance(data, (str, os.PathLike)) and is_remote(data):
        names, path = _remote_files(data)
        said = said_of_all(names)
        size = sum(about.size or 0 for about in said)
        if len(names) > 1 and size > room():
            from fastssl.pipelines.beton.streamed_set import StreamedSet  # which is a BetonSet

            return StreamedSet(names, said, path)
        files = local_files(names, size)
    else:
        files, path = beton_files(data)
    if len(files) == 1:
        return BetonReader(files[0])
    found = BetonSet(files, path=path)
    if isinstance(data, (str, os.PathLike)) and is_remote(data):
        found.served = [(Path(shown(name)).name, about.size or 0) for name, about in zip(names, said)]
    return found


def beton_files(data: Data) -> tuple[list[Path], Path]:
    """The files that ``data`` names, numbers in their names in order (2 before 10), and what messages call them all.
    ``FastSSLError``: there is none, one of ``-00002-of-00064`` is missing, or a folder's are not of one set.
    """
    if not isinstance(data, (str, os.PathLike)):
        named = [beton_files(one) for one in data]
        files = [file for found, _ in named for file in found]
        if not any(map(is_remote, data)):  # names in the cache say nothing of an order
            files.sort(key=natural_key)
        if not files:
            raise BetonError("an empty list of .beton files: nothing to read")
        if twice := [file for file, times in Counter(map(os.path.abspath, files)).items() if times > 1]:
            raise BetonError(f"{twice[0]}: is named twice; its photos would count twice: name every file once")
        more = f" and {counted(len(named) - 1, 'more file')}" if len(named) > 1 else ""
        return files, named[0][1].with_name(f"{named[0][1].name}{more}")
    if is_remote(data):
        names, path = _remote_files(data)
        return local_files(names), path
    path = Path(data)
    if path.is_dir():
        inside = (one for one in path.iterdir() if one.suffix == ".beton" and not one.name.startswith("."))
        files = sorted(inside, key=natural_key)
        splits = {match[1] for file in files for match in _SPLITS.finditer(file.stem.lower())}
        if not files:
            raise BetonError(f"{path}: no .beton files in this folder; fastssl convert-imagenet makes one from photos")
        if len(splits) > 1:
            raise BetonError(
                f"{path}: holds files of {' and '.join(sorted(splits))}, which are not one data set; name those that "
                f"are meant by a pattern in quotes, '{path}/*{min(splits)}*.beton'"
            )
    elif not has_pattern(path):
        return [path], path
    else:
        files = list(map(Path, expand(path)))
        files = [file for file in files if file.suffix == ".beton"] or files  # side files match, too
    _require_complete(files)
    return files, path


def _remote_files(url: str | os.PathLike) -> tuple[list[str], Path]:
    names = remote_names(url)
    _require_complete([Path(shown(name)) for name in names])
    return names, Path(shown(url))


def _require_complete(files: list[Path]) -> None:
    """Refuse names of the kind ``train-00002-of-00064.beton`` of which not all are there."""
    found: dict[tuple[Path, str, str, str], dict[int, str]] = {}
    totals: dict[tuple[Path, str, str], str] = {}
    for file in files:
        if match := _OF.fullmatch(file.name):
            begin, number, total, end = match.groups()
            found.setdefault((file.parent, begin, total, end), {})[int(number)] = number
            if (other := totals.setdefault((file.parent, begin, end), total)) != total:
                raise BetonError(
                    f"{shown(file.parent / begin)}*{end}: files of two sets, -of-{other} and -of-{total}; photos would "
                    f"count twice: delete one, or name the other by a pattern in quotes, '{begin}*-of-{total}{end}'"
                )
    for (folder, begin, total, end), numbers in found.items():
        first = int(int(total) in numbers)  # they may count from 1
        missing = set(range(first, first + min(int(total), 1_000_000))) - numbers.keys()
        if missing:
            width = len(next(iter(numbers.values())))
            name = f"{begin}{min(missing):0{width}d}-of-{total}{end}"
            more = f" (and {counted(len(missing) - 1, 'more file')})" if len(missing) > 1 else ""
            raise BetonError(
                f"{shown(folder / name)}: is missing{more}; put it beside the others, or name as a list the files that "
                "are meant"
            )


class BetonSet(BetonReader):
    """Several files read as one, their samples counted through: a ``BetonReader`` like that of one file. Errors name
    the file and the sample in it.

    A set of more than ``LAZY_ABOVE`` samples is ``lazy``: opening it reads headers alone, and records are read, two
    reads each, and checked when they are asked for. Where a file's allocation table is not in the order of the samples
    (FFCV writes such ones) its whole table is read then, and those of four files are kept: in such files a lazy set is
    slow. Few files are open at once (a quarter of ``ulimit -n``); one that changed until it is opened again is an
    error.

    Class names come from the side files. Where those list different ones, labels are matched by name: the set's classes
    are all names, sorted.

    Args:
        files: in the order of the samples. path: what messages call the set.
        lazy: whether tables stay on the disk; None: of a large set.
        counts: samples of each file, where they are known. Files are then opened when they are needed; the set is lazy,
            and all of its side files must list the same classes.

    Attributes:
        served: name and bytes of each file, where it is a server's.

    Raises:
        BetonError: a file is damaged, files with and without labels, or classes that cannot be matched.
    """

    served: Sequence[tuple[str, int]] = ()

    def __init__(
        self,
        files: Sequence[str | os.PathLike],
        *,
        path: str | os.PathLike | None = None,
        lazy: bool | None = None,
        counts: Sequence[int] | None = None,
    ):
        self.files = [Path(file) for file in files]
        self.path = Path(path or beton_files(files)[1])
        self._among, self._scratch = OpenFiles(), ThreadMemory()
        self._readers, self._recent = dict[int, BetonReader](), dict[int, Row]()
        self._counts, numbers = counts, range(len(files) if counts is None else 1)
        self.labelled, self.num_bytes = self._reader(0).labelled, 0
        lists, made = zip(*self._each(lambda k: self._noted(self._reader(k)), numbers))
        self._listed, self._classes = lists[0], self._match_classes(list(lists))
        self._warn_of_mixed(made)
        if counts is None:
            counts = [len(self._reader(k)) for k in numbers]
            self.num_bytes = sum(self._reader(k).num_bytes for k in numbers)
        self._starts = [0, *accumulate(map(int, counts))]
        self.starts, self.num_samples = np.array(self._starts), self._starts[-1]
        self.lazy = self._counts is not None or (self.num_samples > LAZY_ABOVE if lazy is None else lazy)
        if not self.lazy:
            self._load()

    def _reader(self, k: int) -> BetonReader:
        if (reader := self._readers.get(k)) is None:
            reader = self._open(k)
            reader._scratch = self._scratch
            if self._counts is not None and len(reader) != self._counts[k]:
                raise reader._error(f"{counted(len(reader), 'sample')}, not {self._counts[k]:,} as was said")
            if self._counts is not None and k and self._noted(reader)[0] != self._listed:
                first = self.files[0].name
                raise reader._error(f"lists other classes than {first}; all files must be here to match them")
            reader = self._readers.setdefault(k, reader)
        return reader

    def _open(self, k: int) -> BetonReader:
        return BetonReader(self.files[k], lazy=True, among=self._among)

    def _noted(self, reader: BetonReader) -> tuple[Classes | None, str]:
        """The classes that the side file lists, and what the file was made from and how."""
        if reader.labelled != self.labelled:
            have = ("has labels", "has none")[:: 1 if self.labelled else -1]
            what = f"{self.files[0].name} {have[0]}, {reader.path.name} {have[1]}"
            raise self._error(f"{what}: they are not one data set; convert all with class folders, or all without")
        note = reader._note() or {}
        made = f"{note['fingerprint']} {note.get('options')}" if "fingerprint" in note else ""
        classes = note.get("classes") if self.labelled else None
        # Interned: a thousand lists of the same names.
        return None if classes is None else tuple(map(sys.intern, classes)), sys.intern(made)

    def _warn_of_mixed(self, made: Sequence[str]) -> None:
        """Warn where files -00002-of-00064 were not made of the same photos in the same way: then some photos are
        missing, and others there twice.
        """
        first: dict[tuple[Path, str, str], tuple[Path, str]] = {}
        for file, how in zip(self.files, made):
            if how and (match := _OF.fullmatch(file.name)):
                other, was = first.setdefault((file.parent, match[1], match[3]), (file, how))
                if how != was:
                    what = f"made of other photos, or in another way, than {other.name}"
                    warnings.warn(f"{file}: {what}; convert again what is out of date", stacklevel=4)
                    return

    def _match_classes(self, lists: list[Classes | None]) -> list[str] | None:
        """The set's classes, of those that each file lists."""
        named = [one for one in dict.fromkeys(lists) if one is not None]
        if len(named) < 2:
            return list(named[0]) if named else None
        if None in lists:
            raise self._error("side files list different classes, and a file has no such list (FILE.beton.json)")
        everything = sorted(set().union(*named))
        place = {name: k for k, name in enumerate(everything)}
        for k, classes in enumerate(lists):
            self._reader(k)._class_map = np.array([place[name] for name in classes or ()], np.int64)
        return everything

    def _set_labels(self, reader: BetonReader, labels: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """The set's labels for those of the samples ``samples`` of a file."""
        if (table := reader._class_map) is None:
            return labels
        if (outside := np.flatnonzero(labels >= len(table))).size:
            label = f"sample {samples[outside[0]]}: has the label {labels[outside[0]]}"
            raise reader._error(f"{label}, but its side file lists {counted(len(table), 'class')}")
        return np.where(labels < 0, labels, table[labels])

    def _each(self, look: Callable[[int], _Found], numbers: Iterable[int]) -> list[_Found]:
        with ThreadPoolExecutor(_AT_ONCE, "fastssl-tables") as pool:
            return list(pool.map(look, numbers))

    def _read_tables(self, out: Tables) -> None:
        for k, (low, high) in enumerate(pairwise(self._starts)):
            reader, part = self._reader(k), out.rows(slice(low, high))
            reader._file.read_all(part)
            if part.labels is not None:
                part.labels[:] = self._set_labels(reader, part.labels, np.arange(high - low))

    def _owner(self, i: int) -> tuple[BetonReader, int]:
        super()._owner(i)
        k = bisect_right(self._starts, i) - 1
        return self._reader(k), i - self._starts[k]

    def _row(self, i: int) -> Row:
        return (self._recent.get(i) or self._rows(np.array([i]))[0]) if self.lazy else super()._row(i)

    def _rows(self, index: np.ndarray) -> list[Row]:
        # Who draws the views asks for the shapes, and so does the engine, twice: they are remembered for a while.
        wanted, known = np.asarray(index).tolist(), self._recent
        if len(known) > _REMEMBERED:  # another thread may hold the old one
            known = self._recent = {i: known[i] for i in wanted if i in known}
        new = sorted({i for i in wanted if i not in known})
        for some in (new[low : low + _AHEAD] for low in range(0, len(new), _AHEAD)):
            owners = [(i, *self._owner(i)) for i in some]
            for _, reader, own in owners:
                reader._file.expect(own)
            for i, reader, own in owners:
                row = reader._file.row(own)
                if reader._class_map is not None:
                    label = self._set_labels(reader, np.array([row.label]), np.array([own]))
                    row = row._replace(label=int(label[0]))
                known[i] = row
        return [known[i] for i in wanted]

    @property
    def classes(self) -> list[str] | None:
        """The class names, label k being ``classes[k]``; None where no side file names any."""
        return self._classes

    def side_notes(self) -> list[dict[str, Any]]:
        """As of one file."""
        notes = self._each(lambda k: self._reader(k).side_notes(), range(len(self.files)))
        return [note for some in notes for note in some]

    def table_checksums(self) -> dict[str, int]:
        """CRC-32 of the headers and sizes of all files (``head``), and of a few records of each (``table``): whole
        tables of a thousand files are 48 GB. Of files of a server, of which not all may be here, now or later, names
        and counts, and sizes.
        """
        if self.served:
            counts, (names, sizes) = self.starts[1:] - self.starts[:-1], zip(*self.served)
            known = "\n".join(f"{name} {count}" for name, count in zip(names, counts.tolist()))
            return {"head": zlib.crc32(known.encode()), "table": zlib.crc32(str(list(sizes)).encode())}
        found = [reader._file for _, reader in sorted(self._readers.items())]
        heads = [(one.num_bytes, one.num_samples, one.page_size, one.metadata_end, one.table_at) for one in found]
        rows = b"".join(self._each(self._few_rows, range(len(self.files))))
        return {"head": zlib.crc32(np.array(heads, np.int64).tobytes()), "table": zlib.crc32(rows)}

    def _few_rows(self, k: int) -> bytes:
        reader = self._reader(k)
        return np.array(reader._rows(np.linspace(0, len(reader) - 1, _RECORDS).astype(np.int64)), np.int64).tobytes()

    def _looked_at(self) -> list[int]:
        middles = [(low + high) // 2 for low, high in pairwise(self._starts)]
        return [] if self.served else sorted({*super()._looked_at(), *middles})

    def close(self) -> None:
        """Let go of all files; a thread that is still reading from one finishes first."""
        for reader in self._readers.values():
            reader.close()
