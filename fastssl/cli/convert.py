"""``fastssl convert-imagenet``: photos in, one ``.beton`` file out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastssl.cli.command import SectionedCommand
from fastssl.cli.common import SomePath, console, json_option, late_progress_bar, quiet_option, write_json
from fastssl.errors import counted

if TYPE_CHECKING:
    from fastssl.pipelines.convert.options import ConvertSummary


def _shard(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, int] | None:
    """``3/64`` -> (3, 64)."""
    number, _, count = (text or "").partition("/")
    if text is None or (number.isdecimal() and count.isdecimal() and int(number) < int(count) < 100_000):
        return (int(number), int(count)) if text else None
    raise click.BadParameter(f"{text}: write I/N, I counted from 0: of 64 files 0/64 is the first, 63/64 the last")


def _low_high(_: click.Context, __: click.Parameter, value: str | None) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        low, high = map(float, value.split(","))
    except ValueError:
        raise click.BadParameter(f"two numbers with a comma between them, as in 0,4095, not {value!r}") from None
    return low, high


@click.command(
    "convert-imagenet",
    cls=SectionedCommand,
    sections={"split": "Photos and classes", "short_side": "What is stored", "shards": "Files and work"},
    context_settings={"show_default": True},
)
@click.argument("src", type=SomePath(remote=True), nargs=-1, required=True)
@click.argument("dst", type=SomePath())
@click.option(
    "--split",
    default="auto",
    metavar="auto|train|val|test|none",
    help="Of train/, val/ and test/ in SRC: a file each, one of them, or all as classes.",
)
@click.option(
    "--labels",
    type=click.Path(exists=True, path_type=Path),
    metavar="FILE",
    help="Labels of photos in no class folders: CSV, TSV, a label a line, ImageNet's devkit, Kaggle's zip.",
)
@click.option(
    "--classes",
    type=click.Path(exists=True, path_type=Path),
    metavar="FILE",
    help="All classes in their order: of a .beton file, or a list with one a line.",
)
@click.option("--depth", type=click.IntRange(min=1), help="Which folder level is the class.  [default: the first]")
@click.option(
    "--label-from",
    metavar="parent|top|txt|REGEX",
    help="The class: the folder that holds the photo, the first, a WebDataset's .txt, or a part of the path.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Convert only N photos, evenly spaced over the source.")
@click.option(
    "--short-side", type=click.IntRange(min=1), help="Scale larger photos to it: faster, softer crops.  [default: 256]"
)
@click.option("--max-side", type=click.IntRange(min=1), help="Scale larger photos down to this longer side instead.")
@click.option("--keep-size", is_flag=True, help="Scale nothing: crops as sharp as the published runs'.")
@click.option("--quality", type=click.IntRange(1, 100), default=90, help="JPEG quality of what is re-encoded.")
@click.option("--store", type=click.Choice(["jpeg", "raw"]), default="jpeg", help="Store JPEGs, or decoded pixels.")
@click.option(
    "--range",
    metavar="LOW,HIGH",
    callback=_low_high,
    help="Black and white of all photos of more than 8 bits.  [default: each one's own range]",
)
@click.option(
    "--icc", type=click.Choice(["ignore", "srgb"]), default="ignore", help="Ignore colour profiles, or convert by them."
)
@click.option("--shards", type=click.IntRange(1, 99_999), metavar="N", help="Write N files, a fair sample each.")
@click.option(
    "--shard", callback=_shard, metavar="I/N", help="Of N files only number I, from 0 on: hosts can share the work."
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads.  [default: one a CPU]")
@click.option("--resume/--no-resume", default=True, help="Go on where a stopped conversion stood, or start again.")
@click.option(
    "--on-bad",
    type=click.Choice(["skip", "fail"]),
    default="skip",
    help="List bad photos and go on, or stop at the first.",
)
@quiet_option
@json_option
def convert_imagenet(
    src: tuple[Path, ...],
    dst: Path,
    short_side: int | None,
    max_side: int | None,
    json_path: str | None,
    **options: Any,
) -> None:
    """Turn the photos of SRC into one file, DST, that training reads as fast as it decodes. `fastssl convert` is the
    same.

    SRC is a folder of class folders (SRC/cat/1.jpg), a folder of photos without labels, a tar (.tar.gz, ...) or zip
    that holds such a folder, the ILSVRC2012 train tar, WebDataset shards, parquet files of the Hugging Face hub or a
    folder of them, a list of photos (.csv, .tsv, .txt; - is standard input), or one of these at s3://, gs://, https://
    or hf://. Several SRC, and all files of a pattern in quotes, become one set. JPEGs that need no change are copied
    byte for byte; others are turned upright, scaled and re-encoded.

    DST is whole or absent: an existing one is replaced at the end. Beside it stand DST.json (classes, counts,
    checksums) and, when there were bad photos, DST.rejects.jsonl. After a crash or Ctrl-C, the same command goes on
    where it was.

    train/, val/ and test/ in SRC, also below ILSVRC/Data/CLS-LOC and in archives, become DST-train.beton,
    DST-val.beton and DST-test.beton with one list of classes; --split val makes one of them, DST itself.

    With --shards 64 the photos are dealt out to DST-00000-of-00064.beton, ...; those that are finished stay when the
    command is given again. With --shard 0/64 to 63/64 any number of processes and hosts make one file each.

    \b
    fastssl convert-imagenet photos/ photos.beton
    fastssl convert-imagenet ILSVRC2012_img_train.tar train.beton --keep-size --workers 16
    fastssl convert-imagenet ILSVRC2012_img_val.tar val.beton --labels ILSVRC2012_devkit_t12.tar.gz --keep-size
    fastssl convert-imagenet photos/ photos.beton --shards 64
    fastssl convert-imagenet 'shards/train-{000000..000146}.tar' train.beton
    find . -name '*.jpg' -print0 | fastssl convert-imagenet - photos.beton
    """
    if sum([short_side is not None, max_side is not None, options["keep_size"]]) > 1:
        raise click.UsageError("give one of --short-side, --max-side, --keep-size")
    shards, shard = options.pop("shards"), options.pop("shard")
    if shards and shard:
        raise click.UsageError("give --shards N for all files, or --shard I/N for one of them")
    from fastssl.pipelines.convert.formats import remedies
    from fastssl.pipelines.convert.options import ConvertOptions
    from fastssl.pipelines.convert.sources import ListingRules, SourceError
    from fastssl.pipelines.convert.splits import convert_splits

    options |= {"short_side": 256 if short_side is None else short_side, "max_side": max_side}
    only, count = shard or (None, shards)
    try:
        names = ("split", "depth", "label_from", "labels", "classes")
        rules = ListingRules(**{name: options.pop(name) for name in names})
    except SourceError as error:
        raise click.UsageError(str(error)) from None
    with late_progress_bar("converting") as progress:
        how: dict[str, Any] = {"rules": rules, "shards": None if count is None else (only, count)}
        summaries = convert_splits(src, dst, ConvertOptions(**options), progress, **how)
    for summary in summaries:
        _tell(summary, short_side is max_side is None)
    passed_over = summaries[0].passed_over
    tables = [f"{passed_over[kind]:,} {kind}" for kind in (".csv", ".tsv") if kind in passed_over]
    if tables and rules.labels is None and any(len(one.classes or ()) < 2 and one.split != "test" for one in summaries):
        console.note(f"{', '.join(tables)}: where labels are in it, give it as --labels FILE")
    for line in [*summaries[0].notes, *remedies(passed_over)]:
        console.note(line)
    write_json(json_path, [_record(summary) for summary in summaries])


def _tell(summary: ConvertSummary, usual_side: bool) -> None:
    """Say what was made. ``usual_side``: nobody said how large photos are to be."""
    from fastssl.pipelines.convert.conversion import rejects_path
    from fastssl.pipelines.convert.formats import in_words

    classes = counted(len(summary.classes), "class") if summary.classes is not None else "no labels"
    made = f"{summary.copied:,} copied, {summary.reencoded:,} re-encoded"
    parts = [f"{counted(summary.written, 'photo')}, {classes}: {made}"]
    if summary.rejected:
        parts.append(f"{summary.rejected:,} rejected (see {rejects_path(summary.path)})")
    if summary.ignored:
        parts.append(f"{counted(summary.ignored, 'other file')} ignored ({in_words(summary.passed_over)})")
    if summary.resumed:
        parts.append(f"{summary.resumed:,} taken over from an earlier run")
    rate = (summary.written + summary.rejected - summary.resumed) / max(summary.seconds, 1e-9)
    parts.append(f"{summary.bytes / 1e6:,.1f} MB, {summary.seconds:,.1f} s, {rate:,.0f} images/s")
    console.say(f"{summary.path}: {'; '.join(parts)}")
    if summary.scaled and usual_side:
        soft = "faster to read, but crops come out softer than from the originals (--keep-size keeps them)"
        console.note(f"{counted(summary.scaled, 'photo')} scaled down to a short side of 256 px: {soft}")
    for line in summary.remarks():
        console.note(line)


def _record(summary: ConvertSummary) -> dict[str, Any]:
    names = {"path": summary.path.name, "files": [path.name for path in summary.files]}
    return {**asdict(summary), "ignored": summary.ignored, **names}
