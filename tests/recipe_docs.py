"""Bring the headers of fastssl/recipes/*.yaml and the table of docs/recipes.md in line with published.yaml.

python tests/recipe_docs.py            # writes them
python tests/recipe_docs.py --check    # says which are not, and fails
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

from fastssl.config.against import State, compare
from fastssl.config.recipe import recipe_names

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- recipes -->\n", "<!-- /recipes -->"
TITLES: dict[str, State] = {"# Ours:": "ours", "# No source says, so ours:": "no source"}
#: From so many keys on the table names their sections instead.
MANY = 8


def header(name: str) -> str:
    """Of a recipe's header what says what is not as published: a title, and below it a line for each reason."""
    lines = []
    for title, state in TITLES.items():
        if found := compare(name).of(state):
            lines.append(title)
        for reason, settings in found.items():
            said = f"{', '.join(setting.key for setting in settings)}: {reason}"
            lines += textwrap.wrap(said, 120, initial_indent="#   ", subsequent_indent="#     ", break_on_hyphens=False)
    return "".join(f"{line}\n" for line in lines)


def with_header(name: str, text: str) -> str:
    """A recipe's text with ``header`` in the place of what stood under the same titles, or at the header's end."""
    kept: list[str] = []
    place = inside = None
    for line in text.splitlines(keepends=True):
        inside = line.strip() in TITLES or (inside and line.startswith("#   "))
        if inside or (place is None and not line.startswith("#")):
            place = len(kept) if place is None else place
        if not inside:
            kept.append(line)
    return "".join([*kept[:place], header(name), *kept[place:]])


def table() -> str:
    """All recipes, what was published, and what they differ in, in Markdown; links are from docs/."""
    every = [compare(name) for name in recipe_names()]
    ours = {found.recipe: keys(found.of("ours")) for found in every}
    shared = set.intersection(*map(set, ours.values()))
    lines = ["| recipe | published | differs in | no source says |", "| --- | --- | --- | --- |"]
    for found in every:
        path = f"fastssl/recipes/{found.recipe}.yaml"
        title = (ROOT / path).read_text().splitlines()[0].lstrip("# ").rstrip(".")
        published = f"{found.linear:.1f}" if found.linear else f"none; beside {found.beside}"
        differs = named([key for key in ours[found.recipe] if key not in shared])
        unknown = named(keys(found.of("no source")))
        lines.append(f"| [{found.recipe}](../{path}): {title} | {published} | {differs} | {unknown} |")
    return "\n".join([*lines, *(["", f"All of them also differ in {named(sorted(shared))}."] if shared else [])]) + "\n"


def keys(found: dict[str, list]) -> list[str]:
    return [setting.key for settings in found.values() for setting in settings]


def named(found: list[str]) -> str:
    sections = list(dict.fromkeys(key.split(".")[0] for key in found))
    return ", ".join(f"`{key}`" for key in (sections if len(found) > MANY else found))


def with_table(text: str) -> str:
    """docs/recipes.md with the table in its marked place."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}{table()}{END}", text, flags=re.DOTALL)


def rewrite(pages: Mapping[Path, Callable[[str], str]], *, check: bool) -> int:
    """Give each file the text that is made of its own, or with ``check`` only name those that differ; 1 if any did."""
    status = 0
    for path, made in pages.items():
        text = path.read_text()
        if (new := made(text)) != text:
            print(path.name)
            status = 1
            if not check:
                path.write_text(new)
    return status if check else 0


def main(argv: list[str]) -> int:
    pages = {ROOT / "docs" / "recipes.md": with_table}
    pages |= {
        ROOT / f"fastssl/recipes/{name}.yaml": lambda text, name=name: with_header(name, text)
        for name in recipe_names()
    }
    return rewrite(pages, check="--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
