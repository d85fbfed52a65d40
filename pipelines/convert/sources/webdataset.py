"""WebDataset's rule (https://github.com/webdataset/webdataset): members of a tar that follow each other and are named
alike up to the first dot are one sample: ``000017.jpg``, ``000017.cls``, ``000017.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from fastssl.pipelines.convert.formats import kind_of, remedy
from fastssl.pipelines.convert.sources.base import Found, Passed

#: No label is longer, in bytes.
_LARGEST_SIDE = 1 << 18
_STEM = re.compile(r"(?:.*/)?[^./]+(?=\.)").match
_FIELDS = ("label", "cls", "class", "class_id", "class_name", "label_name")


class Side(NamedTuple):
    """A file of an archive that is no photo, but may say the class of one."""

    name: str
    size: int
    place: Any


def with_labels(
    members: Iterable[Found | Passed | Side], read: Callable[[Any, int], bytes], label_from: str | None = None
) -> Iterator[Found | Passed]:
    """Photos with what the files beside them say: ``.cls`` (a number or a name), else a field of ``.json`` (label, cls,
    class, ...); with ``label_from='txt'`` the text, usually a caption. Files of a photo's own name are not counted
    as passed over, unless something can be done about them (`formats.remedy`).
    """
    for _, group in groupby(members, lambda one: _key(one.name)):
        sample = list(group)
        if len(sample) == 1 and not isinstance(sample[0], Side):  # most of a tar of class folders
            yield sample[0]
            continue
        photos = {_stem(one.name) for one in sample if isinstance(one, Found)}
        sides: dict[str, list[Side]] = {}
        for one in sample:
            if photos and isinstance(one, Side):
                sides.setdefault(stem if (stem := _stem(one.name)) in photos else "", []).append(one)
        of_all = _label(sides.pop("", []), read, label_from)
        if len(photos) > 1 and sides:  # names with dots, of which each is its own: IMG.2024.1.jpg, IMG.2024.1.cls
            of_all = None
        for one in sample:
            if isinstance(one, Found) and one.label is None:
                label = _label(sides.get(_stem(one.name), []), read, label_from)
                one = one._replace(label=of_all if label is None else label)
            if not isinstance(one, Side):
                yield one
            elif not photos or remedy(kind_of(one.name)):
                yield Passed(one.name)


def as_label(value: Any) -> str | int | None:
    """A class as a file says it: a number or a name; None: neither, or the -1 of those that have none."""
    if isinstance(value, str):
        value = value.strip()
        value = int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value or None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:  # of tables in which some had none
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value >= 0 else None
    return value if isinstance(value, str) else None


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _key(name: str) -> str:
    stem = _STEM(name)
    return stem[0] if stem else name  # hidden files are nobody's


def _label(sides: list[Side], read: Callable[[Any, int], bytes], label_from: str | None) -> str | int | None:
    for kind in (".txt",) if label_from == "txt" else (".cls", ".json"):
        for side in sides:
            if kind_of(side.name) != kind or side.size > _LARGEST_SIDE:
                continue
            said: Any = read(side.place, side.size).decode("utf-8-sig", "replace")
            if kind == ".json":
                try:
                    said = json.loads(said)
                except (ValueError, RecursionError):
                    continue
                fields = map(said.get, _FIELDS) if isinstance(said, dict) else ()
                said = next((one for one in fields if as_label(one) is not None), None)
            return as_label(said)
    return None
