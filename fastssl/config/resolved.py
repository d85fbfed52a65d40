"""What a run's config.yaml says: a resolved recipe as plain values, of this version of fastssl or of another."""

from __future__ import annotations

import warnings
from typing import Any

from fastssl.pipelines.plan.draw import IMAGENET, Normalisation, ViewSpec, ViewSpecError
from fastssl.utils.yaml_file import shown


def normalisation_of(config: object) -> Normalisation:
    """With which a network is shown pictures wherever it is used: that of its run's first global view, as ``config``
    says it, plain values as of config.yaml, also a stranger's. ImageNet's where it says none, or none that can be.
    """
    views = config.get("views") if isinstance(config, dict) else None
    parts = views[:1] if isinstance(views, list) else []
    parts = [views.get("augment"), views.get("global_1")] if isinstance(views, dict) else parts
    told = [part for part in parts if isinstance(part, dict)]
    try:
        view = ViewSpec(**{name: part[name] for part in told for name in Normalisation._fields if name in part})
    except ViewSpecError as error:
        why = f"mean and std beside a network are of no use ({str(error)[:100]})"
        warnings.warn(f"{why}: its pictures are normalised as ImageNet's", stacklevel=3)
        return IMAGENET
    return Normalisation(view.mean, view.std)


def differences(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """``["optim.lr: 0.1 there, 0.2 here", ...]``: where two resolved configurations differ."""

    def numbered(value: Any) -> Any:
        """Of a list of views each by its number: all of them in one line would be cut before what differs."""
        by_number = isinstance(value, list) and value and isinstance(value[0], dict)
        return {str(number): each for number, each in enumerate(value)} if by_number else value

    found = []
    for key in sorted({*mine, *theirs}):
        here, there = numbered(mine.get(key)), numbered(theirs.get(key))
        if isinstance(here, dict) and isinstance(there, dict):
            found += differences(here, there, f"{prefix}{key}.")
        elif isinstance(here, dict) or isinstance(there, dict):
            found.append(f"{prefix}{key}: only {'here' if there is None else 'there'}")
        elif here != there:
            found.append(f"{prefix}{key}: {shown(there)} there, {shown(here)} here")
    return found
