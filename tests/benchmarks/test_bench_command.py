"""The command that every record carries: it can be typed again, and tells nothing of where it was typed."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fastssl.benchmarks.harness.records import Record, read_records
from fastssl.benchmarks.suites import loader, step
from fastssl.cli import main
from fastssl.cli.bench import bench
from fastssl.cli.command import command_line


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (step, loader):
        monkeypatch.setattr(module, "run", lambda *args: [Record(bench="step", host={}, versions={}, git=None)])


def commands_of(out: Path, *arguments: str, through_main: bool) -> list[str]:
    if through_main:
        with pytest.raises(SystemExit) as stop:
            main(["bench", *arguments, "--json", str(out)])
        assert not stop.value.code
    else:
        result = CliRunner().invoke(bench, [*arguments, f"--json={out}"])
        assert result.exit_code == 0, result.output
    return [record.details["command"] for record in read_records(out)]


@pytest.mark.parametrize("through_main", [True, False])
@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["step"], "fastssl bench step"),
        (["step", "--peers", "--recipe", "quickstart"], "fastssl bench step --recipe quickstart --peers"),
        # also what is the default, if it was asked for
        (["step", "--runs=5", "--device", "cpu"], "fastssl bench step --device cpu --runs 5"),
        (
            ["step", "--set", "optim.lr=0.1", "--set", "train.epochs=3"],
            "fastssl bench step --set optim.lr=0.1 --set train.epochs=3",
        ),
        (
            [
                "loader",
                "--data",
                "/home/some one/my photos.beton",
                "--seconds",
                "30",
                "--workers",
                "1",
                "--workers",
                "2",
            ],
            "fastssl bench loader --data 'my photos.beton' --workers 1 --workers 2 --seconds 30",
        ),
    ],
)
def test_the_command_can_be_repeated(tmp_path: Path, arguments: list[str], command: str, through_main: bool) -> None:
    # two thread counts make two records
    assert set(commands_of(tmp_path / "out.jsonl", *arguments, through_main=through_main)) == {command}


def test_debug_and_folders_are_left_out(tmp_path: Path) -> None:
    recipe = tmp_path / "deep" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text((Path(__file__).resolve().parents[2] / "fastssl/recipes/quickstart.yaml").read_text())
    (command,) = commands_of(tmp_path / "out.jsonl", "step", "--recipe", str(recipe), "--debug", through_main=True)
    assert command == "fastssl bench step --recipe mine.yaml"


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("a=b/c.beton", "c.beton"),
        ("/home/a=b/c.beton", "c.beton"),
        ("C:\\me\\c.beton", "c.beton"),
        ("../c d", "c d"),
        ("x;y", "x;y"),
    ],
)
def test_words_with_folders(typed: str, kept: str) -> None:
    made: list[str] = []

    @click.command("thing")
    @click.argument("source", nargs=-1)
    @click.option("-n", "--number", type=float)
    @click.option("--on/--off", default=True)
    @click.pass_context
    def thing(ctx: click.Context, source: tuple[str, ...], number: float | None, on: bool) -> None:
        made.append(command_line(ctx))

    result = CliRunner().invoke(thing, [typed, "second", "--off", "-n", "2"])
    assert result.exit_code == 0, result.output
    assert shlex.split(made[0]) == ["fastssl", "thing", "--number", "2", "--off", kept, "second"]
