"""What the recipes' headers say of their memory, against a count on tensors without content."""

from __future__ import annotations

import re

import pytest
from recipe_memory import CARD, line, step_bytes, with_memory

from fastssl.config.recipe import load_recipe, recipe_names, recipe_path
from fastssl.methods import base

MAIN = "dino-mobilenetv2-sslight"
LINE = re.compile(
    r"# Memory: ([\d.]+) GB at the peak of a step of (\d+) \(counted, bfloat16\)"
    r"(?:: one card of 80 GB runs it as it is|; on one card of 80 GB: --set train\.checkpoint=true, ([\d.]+) GB)\."
)


@pytest.mark.parametrize("name", recipe_names())
def test_a_header_says_how_one_card_runs_the_recipe(name: str) -> None:
    said = [LINE.fullmatch(text) for text in recipe_path(name).read_text().splitlines() if text.startswith("# Memory:")]
    assert len(said) == 1 and said[0], said
    whole, batch, less = said[0].groups()
    assert int(batch) == load_recipe(name).train.batch_size
    assert (less is None) == (float(whole) * 1e9 <= CARD)
    assert less is None or float(less) * 1e9 < 0.6 * CARD


@pytest.mark.parametrize(
    "name", [MAIN, *(pytest.param(name, marks=pytest.mark.slow) for name in recipe_names() if name != MAIN)]
)
def test_the_figures_are_what_is_counted(name: str) -> None:
    assert line(name) in recipe_path(name).read_text(), "python tests/recipe_memory.py writes it"


@pytest.mark.slow
def test_a_copied_activation_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "keep_less", lambda network: 0)
    assert step_bytes(MAIN) > 1.4 * 111e9


def test_the_line_takes_the_place_of_the_one_before() -> None:
    assert (
        with_memory("# A.\n# Memory: 1 GB\narch: x\n# b\n", "# Memory: 2 GB\n")
        == "# A.\n# Memory: 2 GB\narch: x\n# b\n"
    )
    assert with_memory("arch: x\n", "# Memory: 2 GB\n") == "# Memory: 2 GB\narch: x\n"
