"""What was found in one source or several, put in order: by split, and each photo with its class."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

from fastssl.errors import counted, printable
from fastssl.pipelines.convert.formats import kind_of
from fastssl.pipelines.convert.sources.base import Found, Passed, Source, SourceError
from fastssl.pipelines.convert.sources.classes import (
    SPLITS,
    ListingRules,
    find_splits,
    folder_classes,
    listed,
    split_name,
)
from fastssl.pipelines.convert.sources.labels import LabelError, Labels, is_number, read_classes, read_labels


@dataclass
class Photos:
    """The photos of one split that come from one source.

    Attributes:
        source: its number. names: what the list calls them. found: of each photo.
        classes: of each photo, '' for one without; None: none has. by_path: folders or a pattern say them.
    """

    source: int
    names: list[str]
    found: list[Found]
    classes: list[str] | None = None
    by_path: bool = False

    def decide(self, source: Source, rules: ListingRules, below: dict[str, str], known: Collection[str]) -> str:
        """Say which class each photo has; returns what is to be told of it. ``below``: of each folder in the split the
        part that follows it.
        """
        labels = [_class_name(source, one.label) for one in self.found]
        # A tar in a tar is a class by its name, unless that is a split's.
        if any(labels) and not rules.by_path and not (below and all(map(split_name, labels))):
            missing = labels.count("")
            self.classes = None if rules.keep_all and missing else labels
            return (
                "" if self.classes else f"{counted(missing, 'photo')} without a label: all are taken, without classes"
            )
        if not source.in_folders or rules.label_from == "txt":
            return ""
        self.by_path = True
        if rules.pattern is not None:
            matches = [re.search(rules.pattern, one.name) for one in self.found]
            self.classes = [match[min(1, match.re.groups)] or "" if match else "" for match in matches]
            return ""
        folders = [below.get(folder, folder) for folder in map(_folder, self.found)]
        class_of, said = folder_classes(Counter(folders), rules, strips=source.strips or bool(below), known=known)
        self.classes = None if class_of is None else [class_of[folder] for folder in folders]
        return said


class Collected:
    """What was found so far."""

    def __init__(self, rules: ListingRules) -> None:
        self.rules = rules
        self.sources: list[Source] = []
        self.splits: dict[str, list[Photos]] = {}
        self.rejected: list[tuple[str, str, str]] = []  # split, name, reason
        self.passed_over: Counter[str] = Counter()
        self.notes: list[str] = []
        self._below: list[dict[str, tuple[str, str]]] = []
        self.order = None if rules.classes is None else read_classes(rules.classes)
        self.labels = None if rules.labels is None else read_labels(rules.labels, self.order)

    def take(self, source: Source, every: Iterable[Found | Passed], prefix: str) -> None:
        """Add all that there is in ``source``, whose names get ``prefix``."""
        found: list[Found] = []
        rejected: list[Passed] = []
        for one in every:
            if isinstance(one, Found):
                found.append(one)
            elif one.reason:
                rejected.append(one)
            else:
                self.passed_over[kind_of(one.name)] += 1
        if source.sorts:
            # By parts, so that a class's photos stay together: "cat-2/x" sorts before "cat/x" as a string.
            found.sort(key=lambda one: one.name.split("/"))
        placed = None if self.rules.split == "none" else find_splits(Counter(map(_folder, found)))
        groups: dict[str, list[Found]] = {}
        for one in found if placed is not None else ():
            groups.setdefault(placed[_folder(one)][0], []).append(one)  # type: ignore[index]
        if placed is None:
            groups = {"": found} if found else {}
        elif beside := groups.pop("", []):
            first = f"{counted(len(beside), 'photo')}, first {printable(prefix + beside[0].name)}"
            self.notes.append(f"left out, as they are in no split: {first} (--split none takes all)")
        for split, photos in groups.items():
            group = Photos(len(self.sources), [f"{prefix}{one.name}" for one in photos], photos)
            self.splits.setdefault(split, []).append(group)
        for name, reason in rejected:
            inside = next((split for split in map(split_name, name.split("/")) if split in groups), None)
            self.rejected.append((inside or "", f"{prefix}{name}", reason))
        self.sources.append(source)
        self._below.append(placed or {})

    def choose(self, where: str) -> list[str]:
        """The splits that are wanted, each photo with its class from now on; [""] where there are none.
        ``SourceError``: there is no such split, or only some of several sources have any.
        """
        there = [split for split in ("", *SPLITS) if split in self.splits] or [""]
        self.splits = {split: self.splits.get(split, []) for split in there}
        if "" in there and len(there) > 1:
            raise SourceError(
                f"{where}: some of the sources hold {' and '.join(there[1:])}, some hold no splits; convert them one "
                "by one, or with --split none"
            )
        if self.rules.split not in ("auto", "none", *there):
            found = f"it has {' and '.join(there)}" if any(there) else f"no folders are called {', '.join(SPLITS)}"
            raise SourceError(f"{where}: no split {self.rules.split}: {found}")
        wanted = there if self.rules.split in ("auto", "none") else [self.rules.split]
        known: set[str] = set()
        for split in there:  # train comes first: its classes are classes elsewhere, too
            said = []
            for group in self.splits[split]:
                below = {folder: rest for folder, (name, rest) in self._below[group.source].items() if split == name}
                said.append(group.decide(self.sources[group.source], self.rules, below, known))
            if not known and not self.rules.by_path and (classes := self._class_a_source(self.splits[split])):
                for group, name in zip(self.splits[split], classes):
                    group.classes, group.by_path = [name] * len(group.found), True
                said = [f"classes are the sources ({listed(classes)})"]
            for group in self.splits[split]:
                if known and group.by_path and group.classes is not None and known.isdisjoint(group.classes):
                    said += ["its folders are no classes of train: no labels"] * any(group.classes)
                    group.classes = None
            names = {name for group in self.splits[split] for name in group.classes or ()} - {""}
            if known and (new := names - known):
                said.append(f"{counted(len(new), 'class')} that train lacks ({listed(new)})")
            known |= names
            if split in wanted:
                self.notes += [f"{split}: {line}" if split else line for line in said if line]
        if (self.rules.by_path or self.rules.label_from) and not known:
            raise SourceError(f"{where}: {self.rules.named} finds no class in any path")
        if self.labels is not None:
            self._give_labels(self.labels, wanted)
        return wanted

    def _class_a_source(self, groups: Sequence[Photos]) -> list[str]:
        """A class for each of several sources, by the name of the one folder in each; or by the source's own, where
        that is a WordNet id, as those of ImageNet's class tars are. Empty: they are no classes, as names are not that
        differ by a number (part-1, part-2).
        """
        folders = [{_folder(one) for one in group.found} for group in groups]
        if any(len(some) != 1 for some in folders) or not all(g.by_path and g.classes is None for g in groups):
            return []
        names = [some.pop().rpartition("/")[2] for some in folders]
        if not any(names):
            names = [os.path.basename(self.sources[group.source].name).partition(".")[0] for group in groups]
            kinds = {name if re.fullmatch(r"n\d{8}", name) else "" for name in names}
        else:
            kinds = {name if re.fullmatch(r"n\d{8}", name) else re.sub(r"\d+", "", name) for name in names}
        return names if all(names) and "" not in kinds and len(kinds) > 1 else []

    def _give_labels(self, labels: Labels, wanted: Sequence[str]) -> None:
        """Give the photos of a file their labels: those without class folders, if any of them is named there."""
        if labels.names is None and len(wanted) > 1:
            raise LabelError(
                f"{labels.path}: labels without names are of one split; say --split {wanted[-1]}, or other"
            )
        flat = [split for split in wanted if all(group.classes is None for group in self.splits[split])]
        given = 0
        for split in dict.fromkeys([*flat, *wanted]):
            groups = self.splits[split]
            found = labels.of([name for group in groups for name in group.names])
            if (given and split not in flat) or not any(found):
                continue
            given += len(found) - found.count("")
            for group in groups:
                group.classes, found, group.by_path = found[: len(group.names)], found[len(group.names) :], False
        if not given:
            first = printable((labels.names or [""])[0])
            raise LabelError(f"{labels.path}: names none of the photos; the first that it names is {first}")
        if labels.names is not None and (unused := len({*compress(labels.names, labels.classes)}) - given) > 0:
            self.notes.append(f"{labels.path}: {counted(unused, 'label')} without a photo here")

    def class_list(self) -> list[str]:
        """All classes, in the order of their numbers: that of --classes, of the source's own list, or sorted as
        torchvision does; numbers that are no folders' names by their value. ``LabelError``: --classes lacks one.
        """
        groups = [group for groups in self.splits.values() for group in groups if group.classes is not None]
        names = {name for group in groups for name in group.classes or ()} - {""}
        own = [self.sources[group.source].classes if not group.by_path else None for group in groups]
        order = self.order or (
            own[0] if own and all(one == own[0] for one in own) and names <= set(own[0] or ()) else None
        )
        if order is None:
            by_value = all(map(is_number, names)) and not any(group.by_path for group in groups)
            return sorted(names, key=lambda name: (int(name) if by_value else 0, name))  # 1, 01 and 2
        if strange := sorted(names - set(order)):
            more = f" and {counted(len(strange) - 1, 'other class')}" if len(strange) > 1 else ""
            raise LabelError(f"{self.rules.classes}: does not list the class {printable(strange[0])}{more}")
        return order


def _folder(photo: Found) -> str:
    return photo.name.rpartition("/")[0]


def _class_name(source: Source, label: str | int | None) -> str:
    if label is None or isinstance(label, str):
        return "" if label in (None, "-1") else label
    if label < 0:  # what the Hugging Face hub says of photos whose label is kept back
        return ""
    known = source.classes
    return known[label] if known is not None and label < len(known) else f"{label}"
