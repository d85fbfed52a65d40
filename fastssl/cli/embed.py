"""``fastssl embed`` and ``fastssl search``: features as a file, and photos that are like one or like each other."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from fastssl.cli.common import PlainConsole, SomePath, finite, json_option, progress_bar, quiet_option, write_json
from fastssl.cli.evaluate import common
from fastssl.cli.evaluate.common import COUNT, option, options
from fastssl.errors import FastSSLError, counted

_PHOTOS: dict[str, Any] = {"type": SomePath(remote=True), "metavar": "FOLDER|TAR|FILE.beton|'PATTERN'"}
_COSINE: dict[str, Any] = {"type": click.FloatRange(0, 1, min_open=True), "callback": finite}


@click.command()
@options(common.checkpoint_argument, common.which_option, common.arch_option)
@option("--data", "Photos, with or without labels.", required=True, **_PHOTOS)
@option("--photos", "What --data, where it is .beton files, was converted from: for the paths.", **_PHOTOS)
@option("--out", "Features, .npy, .parquet or .csv; FILE.json says what they are.", required=True, type=SomePath())
@option("--half", "float16 in place of float32.", is_flag=True)
@options(common.size_option, common.crop_option, common.device_option)
@option("--batch-size", "Photos a pass of the network.", default=256, **COUNT)
@options(common.workers_option, quiet_option, json_option)
def embed(checkpoint: Path, json_path: str | None, **how: Any) -> None:
    """Write the features of photos, a row each, with id, path and label where they are known.

    \b
    fastssl embed runs/mine --data photos/ --out features.npy
    """
    from fastssl.api import embed as work

    if record := work(checkpoint, bar=progress_bar, **how):
        made = f"{counted(record['photos'], 'photo')}, {record['width']} x {record['dtype']}"
        click.echo(f"{how['out']}: {made}", err=json_path == "-")
        write_json(json_path, record)


@click.command()
@click.argument("query", required=False, type=SomePath(), metavar="[QUERY.jpg]")
@option("--in", "What `fastssl embed` wrote.", variable="place", required=True, type=SomePath(), metavar="FEATURES")
@option("--top", "How many of the nearest photos, or of pairs, are listed.", default=10, type=click.IntRange(1, 10_000))
@option("--duplicates", "All photos that are nearly alike, in place of a QUERY.", is_flag=True)
@option("--above", "Cosine from which on they are.", default=0.95, **_COSINE)
@option("--out", "Draw what was found: a .png; of duplicates an .html page.", type=SomePath(), metavar="FILE")
@option("--weights", "Where the network that made FEATURES is now. Default: where it was.", type=SomePath())
@option("--faiss", "Look with faiss, which holds all features in memory; the result is the same.", is_flag=True)
@options(common.device_option, quiet_option, json_option)
@click.pass_context
def search(ctx: click.Context, query: Path | None, place: Path, out: Path | None, **how: Any) -> None:
    """The photos nearest to QUERY, a picture; or with --duplicates all that are nearly alike, in groups.

    \b
    fastssl search photo.jpg --in features.npy --out found.png
    fastssl search --in features.npy --duplicates --above 0.98 --out duplicates.html
    """
    if how["duplicates"] == (query is not None):
        raise click.UsageError("give a picture to look for, or --duplicates")
    other = "above" if query else "weights"
    if ctx.get_parameter_source(other) is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError(f"--{other} goes with {'--duplicates' if query else 'a picture to look for'} alone")
    if out and out.suffix != (ending := ".png" if query else ".html"):
        raise click.BadParameter(f"{out}: name a {ending}", param_hint="--out")
    from fastssl.data.contents import open_photos
    from fastssl.evaluate.search import faiss_candidates, find_duplicates, nearest, open_features, open_query
    from fastssl.report.drawing import duplicates_page, sheet
    from fastssl.weights.source import open_session

    features, about = open_features(place)
    paths, labels, made_from = about["columns"]["path"], about["columns"]["label"], about["made_from"]
    record: dict[str, Any] = {"features": place.name, "photos": len(features)}
    by = faiss_candidates(features) if how["faiss"] else None

    def words(row: int) -> str:
        return (paths[row] or f"photo {row}") + (f" ({labels[row]})" if labels[row] else "")

    def below(row: int) -> str:
        """The same for the little room below a picture."""
        name = (paths[row] or str(row)).rsplit("/", 1)[-1]
        return f"{labels[row]} ({name})" if labels[row] else name

    with ExitStack() as opened:
        photos = opened.enter_context(open_photos(made_from["data"]))[0] if out else None
        if photos is not None and len(photos) != len(features):
            raise FastSSLError(f"{photos.path}: has other photos than when they were embedded; embed them again")
        if query:
            photo = opened.enter_context(open_query(query))
            asked = {"which": about["network"].removeprefix("imported") or None, "arch": about["arch"]}
            with open_session(how["weights"] or made_from["weights"], **asked, device=how["device"]) as session:
                found = nearest(session, features, about, photo, how["top"], by)
            lines = [f"{like:.4f} {words(row)}" for like, row in found]
            record |= {"query": query.name, "nearest": [(like, row, words(row)) for like, row in found]}
            if photos:
                cells = [(photos, row, f"{like:.2f} {below(row)}") for like, row in found]
                sheet([(query.name, [(photo, 0, "")]), ("nearest photos", cells)], out)
        else:
            count, pairs, groups = find_duplicates(features, how["above"], how["top"], how["device"], progress_bar, by)
            among = f"{counted(len(groups), 'group')} among {counted(len(features), 'photo')}"
            title = f"{counted(count, 'pair')} with a cosine of {how['above']:g} or more, in {among}"
            lines = [*(f"{like:.4f} {words(one)} {words(other)}" for like, one, other in pairs), title]
            record |= {"above": how["above"], "pairs": count, "most_alike": pairs, "groups": groups}
            if photos and out:
                duplicates_page(title, [[(photos, row, below(row)) for row in group] for group in groups], out)
    PlainConsole(stderr=how["json_path"] == "-").say("\n".join(lines))
    write_json(how["json_path"], record)
