"""``fastssl recipes``, ``fastssl archs``, ``fastssl doctor``, ``fastssl report``."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path

import click

from fastssl.cli.common import PIPELINES, PlainConsole, SomePath, console, json_option, write_json
from fastssl.errors import counted


@click.command()
@click.argument("name", required=False)
@click.option(
    "--against", is_flag=True, help="Where it differs from the published settings, why, and what no source says."
)
@click.option("--all", "equal", is_flag=True, help="With --against: also the settings that are as published.")
@json_option
def recipes(name: str | None, against: bool, equal: bool, json_path: str | None) -> None:
    """List the recipes, or print one with its sources.

    \b
    fastssl recipes
    fastssl recipes light-moco-mobilenetv3 > mine.yaml
    fastssl recipes light-moco-mobilenetv3 --against
    """
    from fastssl.config.recipe import load_recipe, recipe_names, recipe_path, recipe_to_dict

    if (against and name is None) or (equal and not against):
        raise click.UsageError("--against goes with a NAME, and --all with --against")
    if against and name is not None:
        from fastssl.cli.against import print_comparison
        from fastssl.config.against import compare

        found = compare(name)
        if json_path != "-":
            print_comparison(found, equal=equal)
        write_json(json_path, [{**asdict(setting), "state": setting.state} for setting in found.settings])
        return
    if name is not None:
        recipe = load_recipe(name)
        if json_path != "-":
            click.echo(recipe_path(name).read_text(), nl=False)
        write_json(json_path, recipe_to_dict(recipe))
        return
    from fastssl.config.against import published_linear

    rows, out = [], PlainConsole()  # standard output
    for known in recipe_names():
        recipe = load_recipe(known)
        title = recipe_path(known).read_text().splitlines()[0].lstrip("# ")
        length = {"epochs": recipe.train.epochs, "batch_size": recipe.train.batch_size}
        number = published_linear(known)
        what = {"recipe": known, "arch": recipe.arch, "method": recipe.method, **length}
        rows.append({**what, "title": title, "linear": number})
        if json_path != "-":
            text = f"{known:34}  {f'{number:.1f} %' if number else '-':>6}  {title}"
            # A line each for other programs; on a terminal none runs on below the names.
            width = max(80, out.width) if out.is_terminal else 1000
            click.echo(textwrap.fill(text, width, subsequent_indent=" " * 44, break_on_hyphens=False))
    console.note("%: top-1 on ImageNet-1k by linear probe, the paper's; NAME --against says what is not as published")
    write_json(json_path, rows)


@click.command()
@json_option
def archs(json_path: str | None) -> None:
    """List the networks with a short name. Any other timm name works too.

    \b
    fastssl archs
    """
    from fastssl.models.backbones import SHORT_NAMES, create_backbone, feature_dim

    rows = []
    for short, name in SHORT_NAMES.items():
        backbone = create_backbone(short)
        dim, parameters = feature_dim(backbone), sum(p.numel() for p in backbone.parameters())
        rows.append({"arch": short, "timm": name, "feature_dim": dim, "parameters": parameters})
        if json_path != "-":
            click.echo(f"{short:20} {name:24} {dim:5}-d  {parameters / 1e6:5.1f} M parameters")
    write_json(json_path, rows)


@click.command()
@json_option
def doctor(json_path: str | None) -> None:
    """Say what this machine has, which engines can run on it, and what is missing.

    \b
    fastssl doctor
    """
    import torch

    from fastssl.pipelines.engines.registry import choose_engine, engine_state, jpeg_hardware
    from fastssl.utils.versions import describe_host, describe_versions

    host, versions, jpegs, cuda = describe_host(), describe_versions(), jpeg_hardware(), torch.version.cuda
    gpu = host.get("gpu")
    engines = [engine_state(name) for name in PIPELINES if name != "auto"]
    choice, reason = choose_engine(torch.device("cuda" if gpu else "cpu"))
    card = f"{gpu} x {host.get('gpus')}"
    if not gpu:
        card = "none usable: this torch is a CPU build; pip install torch torchvision from PyPI brings the CUDA build"
    if not gpu and cuda:
        ask = "is the driver installed, does nvidia-smi list the card?"
        card = f"none found (torch is built for CUDA {cuda}: {ask})"
    cores = counted(int(host["cores"]), "core")
    lines = [("processor", f"{host['cpu']}, {cores} for this process, {host['memory_gib']} GiB"), ("GPU", card)]
    lines += [*versions.items(), ("\nJPEG engine", jpegs)]
    for engine in engines:
        state = f"cannot run: {engine.problem}" if engine.problem else f"ready ({engine.version or '-'})"
        lines += [(engine.name, state), *([("", engine.remedy)] if engine.remedy else [])]
    if json_path != "-":
        for name, text in (*lines, ("auto", f"{choice}: {reason}")):
            click.echo(f"{name:11} {text}")
    record = {"host": host, "versions": versions, "cuda_build": cuda, "gpu": gpu}
    record |= {"engines": [asdict(engine) for engine in engines], "auto": {"engine": choice, "reason": reason}}
    write_json(json_path, {**record, "jpeg_hardware": jpegs})


@click.command()
@click.argument("run_dir", type=SomePath(), metavar="RUN_DIR")
def report(run_dir: Path) -> None:
    """Write RUN_DIR/report.html from what the run has left so far, also while it runs or after it was interrupted.

    \b
    fastssl report runs/quickstart-mobilenetv3_large
    """
    from fastssl.report.page import write_report

    click.echo(write_report(run_dir))
