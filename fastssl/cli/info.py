"""``fastssl recipes``, ``fastssl archs``, ``fastssl doctor``."""

from __future__ import annotations

import dataclasses

import click

from fastssl.cli.common import PIPELINES, json_option, write_json
from fastssl.errors import counted


@click.command()
@click.argument("name", required=False)
@json_option
def recipes(name: str | None, json_path: str | None) -> None:
    """List the recipes, or print one with its sources.

    \b
    fastssl recipes
    fastssl recipes light-moco-mobilenetv3 > mine.yaml
    """
    from fastssl.config.recipe import load_recipe, recipe_names, recipe_path, recipe_to_dict

    if name is not None:
        recipe = load_recipe(name)
        if json_path != "-":
            click.echo(recipe_path(name).read_text(), nl=False)
        write_json(json_path, recipe_to_dict(recipe))
        return
    rows = []
    for known in recipe_names():
        recipe = load_recipe(known)
        title = recipe_path(known).read_text().splitlines()[0].lstrip("# ")
        rows.append(
            {
                "recipe": known,
                "arch": recipe.arch,
                "method": recipe.method,
                "epochs": recipe.train.epochs,
                "batch_size": recipe.train.batch_size,
                "title": title,
            }
        )
        if json_path != "-":
            click.echo(f"{known:34} {title}")
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
        parameters = sum(p.numel() for p in backbone.parameters())
        rows.append({"arch": short, "timm": name, "feature_dim": feature_dim(backbone), "parameters": parameters})
        if json_path != "-":
            click.echo(f"{short:20} {name:24} {feature_dim(backbone):5}-d  {parameters / 1e6:5.1f} M parameters")
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

    host, versions = describe_host(), describe_versions()
    gpu = host.get("gpu")
    device = torch.device("cuda" if gpu else "cpu")
    engines = [engine_state(name) for name in PIPELINES if name != "auto"]
    choice, reason = choose_engine(device)
    record = {
        "host": host,
        "versions": versions,
        "cuda_build": torch.version.cuda,
        "gpu": gpu,
        "engines": [dataclasses.asdict(engine) for engine in engines],
        "auto": {"engine": choice, "reason": reason},
        "jpeg_hardware": jpeg_hardware(),
    }
    if json_path != "-":
        cores = counted(int(host["cores"]), "core")
        click.echo(f"processor   {host['cpu']}, {cores} for this process, {host.get('memory_gib', '?')} GiB")
        if gpu:
            click.echo(f"GPU         {gpu} x {host['gpus']}")
        elif torch.version.cuda:
            ask = "is the driver installed, does nvidia-smi list the card?"
            click.echo(f"GPU         none found (torch is built for CUDA {torch.version.cuda}: {ask})")
        else:
            remedy = "pip install torch torchvision from PyPI brings the CUDA build"
            click.echo(f"GPU         none usable: this torch is a CPU build; {remedy}")
        for name, version in versions.items():
            click.echo(f"{name:11} {version}")
        click.echo(f"\nJPEG engine {record['jpeg_hardware']}")
        for engine in engines:
            found = engine.version or "-"
            click.echo(f"{engine.name:11} {f'cannot run: {engine.problem}' if engine.problem else f'ready ({found})'}")
            if engine.remedy:
                click.echo(f"{'':11} {engine.remedy}")
        click.echo(f"auto        {choice}: {reason}")
    write_json(json_path, record)
