"""``fastssl bench report``."""

from __future__ import annotations

from pathlib import Path

import click

from fastssl.cli.common import SomePath


@click.command()
@click.argument("results", nargs=-1, required=True, type=SomePath(), metavar="RESULTS...")
@click.option(
    "--out", type=SomePath(), default="bench-report", show_default=True, metavar="DIR", help="Made if it is not there."
)
def report(results: tuple[Path, ...], out: Path) -> None:
    """Write what the records in RESULTS say into DIR: report.md, report.html with its plots inside, the plots, and
    recipes.md.

    \b
    fastssl bench train --json train.jsonl
    fastssl bench report train.jsonl loader.jsonl --out bench-report
    """
    from fastssl.benchmarks.harness.report import write_report

    for path in write_report(results, out):
        click.echo(path)
