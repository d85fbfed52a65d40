"""Which split a photo belongs to, and which class: by the folders that it lies in.

Everything here looks at folders, of which there are few, and not at photos.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from fastssl.errors import counted, printable
from fastssl.pipelines.convert.sources.base import SourceError

_NAMES = {"train": "train|training", "val": "val|valid|validation|dev", "test": "test|testing"}
#: A split's folder (also of COCO: train2017, and of who unpacks where the tar is: ILSVRC2012_img_val), a tar in a tar,
#: or one of the hub's files: validation-00000-of-00014.parquet.
_SPLITS = {
    name: re.compile(
        rf"(?:ilsvrc\d*_(?:img_)?)?(?:{words})"
        r"(?:[_-]?(?:19|20)\d\d|[_-](?:set|split|data|images|img))?(?:(?:[_-][\w-]*)?\.(?:parquet|tar))?",
        re.IGNORECASE,
    )
    for name, words in _NAMES.items()
}
#: In the order in which they are written.
SPLITS = tuple(_NAMES)


@dataclass(frozen=True)
class ListingRules:
    """How photos get their split and class.

    Attributes:
        split: the one that is wanted: 'train', 'val' or 'test'; 'auto': those that there are; 'none': folders of these
            names are classes like others.
        depth: which folder level below the source, or its split, is the class; None: the first that tells photos apart.
        label_from: instead: 'parent', the folder that holds the photo; 'top', the first; 'txt', a WebDataset's .txt; or
            a regular expression, whose first group, or all of it, is the class.
        labels: a file with the photos' labels (see `labels.read_labels`). classes: a list of all classes in their
            order, or a .beton file that has it.
        keep_all: no photo may be lost because others have classes: there are none then.
    """

    split: str = "auto"
    depth: int | None = None
    label_from: str | None = None
    labels: Path | None = None
    classes: Path | None = None
    keep_all: bool = False

    def __post_init__(self) -> None:
        if self.split not in ("auto", "none"):
            name = split_name(self.split)
            if name is None:
                raise SourceError(f"--split {self.split}: say auto, none, {', '.join(SPLITS)}")
            object.__setattr__(self, "split", name)
        if self.depth is not None and (self.depth < 1 or self.label_from):
            raise SourceError("--depth N counts folder levels from 1, and goes without --label-from")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise SourceError(
                    f"--label-from {self.label_from}: neither top, parent nor txt, nor a regular expression ({error})"
                ) from None

    @property
    def pattern(self) -> str | None:
        """The regular expression of ``label_from``."""
        return None if self.label_from in (None, "parent", "top", "txt") else self.label_from

    @property
    def named(self) -> str:
        """The option that finds classes in paths, for messages."""
        return f"--depth {self.depth}" if self.depth else f"--label-from {self.label_from}"

    @property
    def by_path(self) -> bool:
        """Whether paths decide, also where the source itself knows classes."""
        return self.depth is not None or self.label_from not in (None, "txt")


def split_name(text: str) -> str | None:
    """``train``, ``val`` or ``test``, if a folder or file of this name is one."""
    return next((name for name, names in _SPLITS.items() if names.fullmatch(text)), None)


def find_splits(folders: Counter[str]) -> dict[str, tuple[str, str]] | None:
    """(split or '', the folder below it) of every folder with photos; ``folders``: photos in each. None: no splits.

    Splits lie at one level: where all photos share their folders, right below those, or one below (class/train/...).
    There are two at least, and no more other folders than splits beside them; or one alone, with all photos.
    """
    parts = {folder: folder.split("/") if folder else [] for folder in folders}
    shared = _shared(parts.values())
    alone = [level for level, part in enumerate(shared) if split_name(part)]
    for level in alone[-1:] or (len(shared), len(shared) + 1):
        here: Counter[str] = Counter()
        for folder, count in folders.items():
            here[parts[folder][level] if len(parts[folder]) > level else ""] += count
        loose = here.pop("", 0)
        splits = {part: name for part in here if (name := split_name(part))}
        several = len(set(splits.values())) > 1 and 2 * len(splits) >= len(here)
        if (several or alone) and 2 * loose < folders.total():
            first = min(len(shared), level)
            return {
                folder: (
                    splits.get("".join(path[level : level + 1]), ""),
                    "/".join(path[first:level] + path[level + 1 :]),
                )
                for folder, path in parts.items()
            }
    return None


def folder_classes(
    folders: Counter[str], rules: ListingRules, *, strips: bool, known: Collection[str] = ()
) -> tuple[dict[str, str] | None, str]:
    """The class of every folder, '' for what lies in none; None: they have no classes. And what is to be said of that.

    A folder of photos may have some folders in it (thumbnails, a few edited ones), but at least half of its photos lie
    in none; or there is only one.

    Args:
        folders: photos in each folder. strips: folders that all photos share name no class, unless it is ``known``.
    """
    parts = {folder: folder.split("/") if folder else [] for folder in folders}
    if rules.by_path:
        level = {"parent": -1, "top": 0}.get(rules.label_from or "", (rules.depth or 1) - 1)
        return {folder: "".join(path[level:][:1]) for folder, path in parts.items()}, ""
    shared = _shared(parts.values())
    if shared and shared[0] in known:
        shared = []
    below = {folder: "".join(path[len(shared) : len(shared) + 1]) for folder, path in parts.items()}
    loose, names = sum(folders[folder] for folder, name in below.items() if not name), set(below.values()) - {""}
    said = ""
    if 2 * loose >= folders.total() or (loose and len(names) == 1) or (shared and len(names) < 2):
        if strips or not shared:
            return None, f"{listed(names)} among the photos: no classes" if names and loose else ""
        below, loose, names = dict.fromkeys(parts, shared[0]), 0, {shared[0]}
    elif shared and not strips:
        said = f"classes are the folders of {'/'.join(shared)} ({listed(names)})"
    if loose and rules.keep_all:
        return None, f"{counted(loose, 'photo')} beside the folders {listed(names)}: all are taken, without classes"
    parents = {path[-1] for path in parts.values() if path}
    if len(parents) > len(names) and not rules.keep_all:
        said = said or f"classes are the first folders ({listed(names)})"
        said += f"; --label-from parent would make {len(parents)} of the folders that hold the photos"
    return below, said


def _shared(paths: Collection[list[str]]) -> list[str]:
    """The parts with which all paths begin."""
    first, last = min(paths, default=[]), max(paths, default=[])
    return first[: next((k for k, pair in enumerate(zip(first, last)) if pair[0] != pair[1]), len(first))]


def listed(names: Iterable[str]) -> str:
    """Some of them, for a message."""
    some = sorted(names)
    return ", ".join(map(printable, some[:3])) + (f", ... {some[-1]}" if len(some) > 3 else "")
