"""What a study asks: its photos, its rows and its claims, read from a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fastssl.data.sample_set import places
from fastssl.errors import FastSSLError
from fastssl.utils.settings import in_words
from fastssl.utils.yaml_file import read_yaml

#: Of a row, a claim or a set: folders, files and places of the page are called after them.
Name = Annotated[str, Field(pattern=r"^[\w-]+$")]
Part = Annotated[str, Field(pattern=r"^(train|val)$")]
#: How many to learn from and to judge by.
Photos = Annotated[dict[Part, Annotated[int, Field(strict=True, ge=1)]], Field(min_length=2)]


@dataclass(frozen=True)
class Row:
    """One kind of run.

    Attributes:
        words: what the page calls it. recipe: a file beside the study's, or the name of one of ours.
        like: another row, whose recipe and changes this one has, too, where it does not say otherwise.
        changes: keys of the recipe and their values.
        seeds: how many runs it has, with the seeds 0, 1, ...
        why: what explains a figure below that of raw pixels.
        photos: one of the study's ``sets``, in place of the rendered views.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    words: str
    recipe: str = ""
    like: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    seeds: Annotated[int, Field(strict=True, ge=1, le=10)] = 3
    why: str = ""
    photos: str = ""


@dataclass(frozen=True)
class Claim:
    """A question: ``rows`` against the row ``against``. With ``minutes`` the time is part of it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    against: str
    rows: list[str]
    minutes: bool = False

    @property
    def names(self) -> list[str]:
        """Of all rows."""
        return [self.against, *self.rows]


@dataclass(frozen=True)
class Study:
    """``photos``: rendered views of each place, for each part (``sample_set.build_sample_set``). ``sets``: how many
    photos other sets have, which whoever makes the runs has to bring.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    photos: Photos
    rows: dict[Name, Row]
    claims: dict[Name, Claim]
    sets: dict[Name, Photos] = field(default_factory=dict)

    def photos_of(self, row: str) -> dict[str, int]:
        """How many photos the runs of a row learn from (``train``), and are judged by (``val``)."""
        name = self.rows[row].photos
        return self.sets[name] if name else {part: count * len(places()) for part, count in self.photos.items()}

    def order(self) -> list[tuple[str, int]]:
        """(row, seed) of all runs: claim by claim, and in each seed by seed, so that what is to be compared is made
        side by side and a study that is stopped early has whole seeds.
        """
        found: dict[tuple[str, int], None] = {}
        for claim in self.claims.values():
            for seed in range(max(self.rows[name].seeds for name in claim.names)):
                found |= {(name, seed): None for name in claim.names if seed < self.rows[name].seeds}
        return list(found)


def read_study(path: Path) -> Study:
    """The study of a yaml file. Raises FastSSLError, with what is wrong in it."""
    try:
        study = TypeAdapter(Study).validate_python(read_yaml(path))
    except ValidationError as error:
        raise FastSSLError(f"{path}: {in_words(error)[0]}") from error
    asked = {name for claim in study.claims.values() for name in claim.names}
    if unknown := sorted(asked - set(study.rows)):
        raise FastSSLError(f"{path}: a claim names {', '.join(unknown)}, which is no row")
    if idle := sorted(set(study.rows) - asked):
        raise FastSSLError(f"{path}: no claim asks for {', '.join(idle)}")
    rows = {name: _whole(name, study.rows, path) for name in study.rows}
    if unknown := sorted({row.photos for row in rows.values()} - {"", *study.sets}):
        raise FastSSLError(f"{path}: a row has photos of {', '.join(unknown)}, which is none of its sets")
    for name, claim in study.claims.items():
        if len({rows[one].photos for one in claim.names}) > 1:
            raise FastSSLError(f"{path}: {name} compares rows with other photos")
    return replace(study, rows=rows)


def _whole(name: str, rows: dict[str, Row], path: Path, below: tuple[str, ...] = ()) -> Row:
    row = rows[name]
    if row.like:
        if row.like not in rows or row.like in (name, *below):
            raise FastSSLError(f"{path}: {name} is like {row.like}, which is no other row")
        base = _whole(row.like, rows, path, (name, *below))
        changes, photos = {**base.changes, **row.changes}, row.photos or base.photos
        row = replace(row, recipe=row.recipe or base.recipe, changes=changes, photos=photos, like="")
    if not row.recipe:
        raise FastSSLError(f"{path}: {name} has no recipe")
    return row


def recipe_of(row: Row, folder: Path) -> Path | str:
    """The row's recipe: a file in ``folder``, or the name of one of ours."""
    return folder / row.recipe if row.recipe.endswith(".yaml") else row.recipe


def fingerprint(row: Row, folder: Path) -> str:
    """Changes with every value in the row's file and with what is changed in it, not with comments. What files leave
    out is told by the commits of the runs.
    """
    recipe = recipe_of(row, folder)
    content = [read_yaml(recipe) if isinstance(recipe, Path) else recipe, row.changes]
    content += [row.photos] if row.photos else []
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
