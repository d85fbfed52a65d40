"""Every recipe beside the settings that were published (``published.yaml``): what is equal, what is ours and why, and
what no source says. The recipes' headers and the table of docs/recipes.md are made from it (tests/recipe_docs.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastssl.config.recipe import Recipe, load_recipe, recipe_names, recipe_path, recipe_to_dict
from fastssl.errors import FastSSLError
from fastssl.pipelines.plan.multicrop import AUGMENTATION, MultiCrop
from fastssl.utils.yaml_file import read_yaml

PUBLISHED = Path(__file__).with_name("published.yaml")
_read = functools.cache(read_yaml)
State = Literal["as published", "ours", "no source"]


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe beside the published one.

    Attributes:
        key: the recipe's, or a few words for what no key says (``photos``). ``views.augment.*`` are all views'.
        here, published: resolved values; ``published`` is None, too, where no source says it.
        source: where the published value stands; "" where nowhere.
        reason: why it is ours, or what is known in place of a source; "" where the two are equal.
    """

    key: str
    here: Any
    published: Any
    source: str
    reason: str

    @property
    def state(self) -> State:
        if not self.source:
            return "no source"
        return "as published" if self.here == self.published else "ours"


@dataclass(frozen=True)
class Comparison:
    """A recipe beside what was published.

    Attributes:
        beside: whose settings these are, or the published recipe that comes nearest to one that nobody published.
        linear: the published top-1 on ImageNet-1k by linear probe, in %; None: there is none.
        settings: in the order of the recipe's keys.
    """

    recipe: str
    beside: str
    linear: float | None
    settings: tuple[Setting, ...]

    def of(self, state: State) -> dict[str, list[Setting]]:
        """Those in one state, by their reason."""
        found: dict[str, list[Setting]] = {}
        for setting in self.settings:
            if setting.state == state:
                found.setdefault(setting.reason, []).append(setting)
        return found


def compare(name: str) -> Comparison:
    """One of our recipes beside what was published. Raises FastSSLError for any other."""
    recipe_path(name)  # which names the nearest of a name that there is not
    if name not in recipe_names():
        raise FastSSLError(f"{name}: published settings are known for the recipes of `fastssl recipes` alone")
    facts, settings = facts_of(name), []
    for key, value in {**_resolved(load_recipe(name)), **facts["here"]}.items():
        if key not in facts["published"] and any(f"{key}.".startswith(f"{part}.") for part in facts["not compared"]):
            continue
        published, source, known = facts["published"].get(key, (None, "", "not in published.yaml"))
        reason = known if not source else "" if value == published else facts["ours"].get(key, "")
        settings.append(Setting(key, value, published, source, reason))
    return Comparison(name, facts["beside"]["beside"], published_linear(name), tuple(settings))


def published_linear(name: str) -> float | None:
    """``Comparison.linear`` by itself."""
    number: float | None = _read(PUBLISHED)[name].get("linear")
    return number


def facts_of(name: str) -> dict[str, dict[str, Any]]:
    """An entry of published.yaml with all that it is ``like``: by key ``published`` (value, source, what is known in
    place of a source), ``ours`` (the reason), ``here``, ``not compared``; ``beside`` holds itself.
    """
    entry = _read(PUBLISHED)[name]
    facts: dict[str, dict[str, Any]] = {part: {} for part in ("published", "ours", "here", "not compared", "beside")}
    for base in entry.get("like", ()):
        for part, values in facts_of(base).items():
            facts[part].update(values)
    for source, tree in entry.get("published", {}).items():
        facts["published"] |= {key: (value, source, "") for key, value in flat(tree)}
    for keys, why in entry.get("no source", {}).items():  # {"optim.lr, train.epochs": reason}
        facts["published"] |= dict.fromkeys(keys.split(", "), (None, "", why))
    for keys, why in entry.get("ours", {}).items():
        facts["ours"] |= dict.fromkeys(keys.split(", "), why)
    facts["not compared"] |= dict.fromkeys(entry.get("not compared", ()))
    facts["here"] |= entry.get("here", {})
    facts["beside"] |= {"beside": entry["beside"]} if "beside" in entry else {}
    return facts


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(``optim.lr``, 0.1) of all values of nested mappings, and of lists of them (``views.0.size``)."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _resolved(recipe: Recipe) -> dict[str, Any]:
    """All keys with their values. Of a multi-crop's augmentation what all views have in common stands under
    ``views.augment``, the rest under each kind of view, wherever the recipe says it.
    """
    plain = recipe_to_dict(recipe)
    if isinstance(recipe.views, MultiCrop):
        kinds = dict(zip(("global_1", "global_2", "local"), recipe.views, strict=False))
        plain["views"] |= {kind: {} for kind in ("augment", *kinds)}
        for name in AUGMENTATION:
            of = {kind: getattr(spec, name) for kind, spec in kinds.items()}
            for kind, value in (of if len(set(of.values())) > 1 else {"augment": of["global_1"]}).items():
                plain["views"][kind][name] = list(value) if isinstance(value, tuple) else value
    return dict(flat(plain))


def in_yaml(value: Any) -> str:
    """A value as a recipe has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(in_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else str(value)
