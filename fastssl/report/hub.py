"""A run on the Hugging Face hub: the backbone as timm's users load it, and a model card. ``fastssl push``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCardData, constants
from huggingface_hub.errors import HfHubHTTPError

from fastssl._version import __version__
from fastssl.config.recipe import Recipe
from fastssl.errors import FastSSLError, counted, without_folders
from fastssl.evaluate.trained import Trained, load_trained
from fastssl.report.page import headline
from fastssl.report.run_record import RunRecord, get, read_run
from fastssl.weights.export import export_backbone

#: what the hub's server answers -> what it means here
_REFUSED = {
    401: "no token that is valid: `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: the name is somebody else's, or the token is for reading only",
    404: "no such repository: leave out --update",
    409: "exists already: choose another name, or write over it with --update",
}


def write_repo(
    run: Path, name: str, folder: Path, *, which: str | None, license: str | None, pictures: bool
) -> Trained:
    """Write config.json, model.safetensors and README.md of the repository ``name`` into ``folder``, a new one; with
    ``pictures`` also those that are drawn from the user's photos. ``license``: as the hub calls it; None: none is said.
    Raises FastSSLError where it is no run, or as ``load_trained`` and ``export_backbone`` do.
    """
    record, trained = read_run(run), load_trained(run, which)
    export_backbone(trained, folder, "timm")
    shown = [one for one in ("views.png", "neighbours.png") if pictures and record.picture(one)]
    for one in shown:
        (folder / one).write_bytes(record.picture(one))
    (folder / "README.md").write_text(model_card(record, trained, name, license, shown), encoding="utf-8")
    return trained


def model_card(run: RunRecord, trained: Trained, name: str, license: str | None, pictures: list[str]) -> str:
    """README.md of a repository. It names no folder, file, host or class."""
    tags, task = ["timm", "self-supervised", "fastssl"], "image-feature-extraction"
    header = ModelCardData(license=license, library_name="timm", pipeline_tag=task, tags=tags)
    table = ["| features | kNN | linear probe |", "| --- | --- | --- |"]
    for row in get(run.summary, "probe", "rows") or ():
        if None not in (row["knn"], row["linear"]):
            table.append(f"| {row['name']} | {row['knn']:.1f} % | {row['linear']:.1f} % |")
    told = f"{get(run.summary, 'verdict', 'text') or ''}\n\n{get(run.summary, 'probe', 'note') or ''}"
    told = told.replace(run.config.get("val") or "\0", "other photos")
    photos, classes = counted(get(run.config, "data", "samples") or 0, "photo"), get(run.summary, "data", "classes")
    labels = f", of {counted(classes, 'class')}; labels were used to judge alone" if classes else ", without labels"
    if began := get(run.config, "init_from", "name"):  # a file's name is the user's own
        public = began.startswith("hf-hub:") or began.partition(".")[0] == run.config.get("arch")
        labels += f". Training began with {began if public else 'other weights'}, whose licence holds, too"
    recipe = {field.name: run.config[field.name] for field in dataclasses.fields(Recipe) if field.name in run.config}
    return f"""---
{header.to_yaml()}
---
# {name.partition("/")[2]}

{headline(run)} This is the backbone of the {trained.network}, by fastssl {__version__}.

```python
import timm
backbone = timm.create_model("hf-hub:{name}", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone), is_training=False)
features = backbone(transform(photo).unsqueeze(0))  # of a picture of PIL in RGB
```

## Figures

{chr(10).join(table if table[2:] else ())}

{told}

## Data and recipe

{photos}{labels}. {" ".join(f"![{one}]({one})" for one in pictures)}

`{run.config.get("recipe")}`, with all values:

```yaml
{without_folders(yaml.safe_dump(recipe, sort_keys=False))}```
"""


def upload(folder: Path, name: str, *, private: bool, update: bool) -> str:
    """Put a folder's files into the repository ``name``, a new one (``private``: for its owner alone), or with
    ``update`` one that is there; its address. Raises FastSSLError where the hub cannot be reached or refuses it.
    """
    api = HfApi(library_name="fastssl", library_version=__version__)
    try:
        if not update:
            api.create_repo(name, private=private, exist_ok=False)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Backbone by fastssl {__version__}")
    # No network, a broken connection, a name that cannot be: the hub's client lets out what its own parts raise.
    except Exception as error:
        why = f"{constants.ENDPOINT}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if isinstance(error, HfHubHTTPError):
            why = _REFUSED.get(error.response.status_code, why)
        raise FastSSLError(f"{name}: {why}") from error
    return f"{constants.ENDPOINT}/{name}"
