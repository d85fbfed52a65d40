"""``fastssl report``: write a run's page again."""

from __future__ import annotations

from pathlib import Path

import click

from fastssl.cli.common import SomePath


@click.command()
@click.argument("run_dir", type=SomePath(), metavar="RUN_DIR")
def report(run_dir: Path) -> None:
    """Write RUN_DIR/report.html from what the run has left so far, also while it runs or after it was interrupted.

    \b
    fastssl report runs/quickstart-mobilenetv3_large
    """
    from fastssl.report.page import write_report

    click.echo(write_report(run_dir))
