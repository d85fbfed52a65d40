"""The table of docs/data.md: every row is carried out. tests/layouts.py says how to add one."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import layouts_of_archives  # noqa: F401
import layouts_of_folders  # noqa: F401
import layouts_of_formats  # noqa: F401
import pytest
from click.testing import CliRunner
from layouts import BUILDERS, COLOURS, WNIDS

from fastssl.cli import cli
from fastssl.pipelines.beton.reader import BetonReader


def rows() -> list[tuple[str, str, str]]:
    """(what you have, command, what comes out) of each row of the page."""
    lines = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text("utf-8").splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("| what you have |")) + 2
    end = next(n for n, line in enumerate([*lines[begin:], ""], begin) if not line.startswith("|"))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin:end]]
    assert all(len(row) == 3 for row in table), "a row has other than three cells"
    return [(what, command.strip("`"), out) for what, command, out in table]


def test_every_row_has_a_builder_and_every_builder_a_row() -> None:
    names = [what for what, _, _ in rows()]
    assert sorted(names) == sorted(BUILDERS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("what", "command", "out"), rows(), ids=[what for what, _, _ in rows()])
def test_a_row(what: str, command: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSSL_CACHE", "cache")
    if isinstance(built := BUILDERS[what](), Iterator):
        next(built)
    program, *arguments = shlex.split(command)
    assert program == "fastssl"
    *arguments, given = [*arguments, None] if "<" not in arguments else [*arguments[:-2], arguments[-1]]
    result = CliRunner().invoke(cli, arguments, input=given and Path(given).read_bytes())
    if isinstance(built, Iterator):
        assert next(built, None) is None
    said = " ".join(result.output.split())
    assert result.exit_code == 0, f"{said} {result.exception}"
    for part in out.split("; "):
        assert re.search(rf"(?<![\w,.]){re.escape(part)}(?!\w)", said), f"{part!r} is not in {said!r}"
    lost = [word for word in ("rejected", "ignored", "passed over") if word in said and word not in out]
    assert not lost, f"the row does not tell that something is {lost[0]}: {said}"
    made = sorted(tmp_path.glob("*.beton"))
    assert made, "no .beton file came out"
    for path in made:
        check_colours(path)


def check_colours(path: Path) -> None:
    """Of photos with a label that is a colour, the channel of that colour leads."""
    with BetonReader(path) as reader:
        for i in range(len(reader)):
            mean = reader.decode(i).mean((0, 1))
            name = reader.classes[reader.labels[i]] if reader.classes and reader.labels is not None else ""
            colour = WNIDS.get(name, name)
            if colour in COLOURS:
                assert COLOURS[2 - int(mean.argmax())] == colour, f"{path.name}: sample {i} is labelled {name}"
