"""``fastssl verify``: is this ``.beton`` file whole?"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import click

from fastssl.cli.common import SomePath, console, json_option, late_progress_bar, quiet_option, write_json
from fastssl.errors import BetonError, counted

#: How many damaged samples are printed; the JSON names all of them.
SHOWN = 20


class _Count(click.ParamType):
    name = "all|N"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value == "all":
            return None
        with suppress(ValueError):
            if (count := int(value)) >= 0:
                return count
        self.fail(f"{value!r} is neither 'all' nor a number of samples", param, ctx)


@click.command("verify")
@click.argument("file", type=SomePath())
@click.option(
    "--decode", type=_Count(), default="100", show_default=True, help="Decode this many samples, evenly spaced, or all."
)
@click.option("--workers", type=click.IntRange(min=1), default=None, help="Threads.  [default: one a CPU]")
@quiet_option
@json_option
def verify(file: Path, decode: int | None, workers: int | None, json_path: str | None) -> None:
    """Check FILE's header and tables, its checksums if FILE.json is there, and decode samples. Status 1 when something
    is damaged.

    \b
    fastssl verify photos.beton --decode all
    """
    from fastssl.pipelines.beton.verify import verify as run

    try:
        with late_progress_bar("checking", "samples") as progress:
            report = run(file, decode, workers, progress)
    except BetonError as error:
        problems = [_passed_on(file, str(error))]
        write_json(json_path, {"path": file.name, "ok": False, "problems": problems, "damaged": []})
        raise
    problems = [_passed_on(file, problem) for problem in report.problems]
    write_json(json_path, {**asdict(report), "path": file.name, "ok": report.ok, "problems": problems})
    how_many = counted(report.checksummed, "checksum")
    checksums = f"{how_many} compared" if report.checksummed else "no checksums to compare"
    if not report.side_file:
        checksums = f"no side file {file}.json, so no checksums"
    samples = counted(report.samples, "sample")
    line = f"{samples}, tables in order, {checksums}, {report.decoded:,} decoded, {report.seconds:,.1f} s"
    console.say(f"{file}: {line}")
    for problem in report.problems:
        console.say(f"damaged: {problem}")
    for sample, complaint in report.damaged[:SHOWN]:
        console.say(f"damaged: sample {sample}: {complaint}")
    if len(report.damaged) > SHOWN:
        console.say(f"damaged: and {counted(len(report.damaged) - SHOWN, 'more sample')}")
    if not report.ok:
        found = [f"{len(report.damaged):,} of {counted(report.samples, 'sample')}"] if report.damaged else []
        found += report.problems[:1]
        raise BetonError(f"{file}: damaged ({'; '.join(found)}); convert it again, or copy it again from a good one")


def _passed_on(file: Path, message: str) -> str:
    """As in every record: the file's name without the folders that tell where somebody works."""
    return message.replace(str(file), file.name)
