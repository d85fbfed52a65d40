"""Where two resolved configurations differ."""

from __future__ import annotations

from typing import Any

from fastssl.utils.yaml_file import shown


def differences(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """``["optim.lr: 0.1 there, 0.2 here", ...]``: where two resolved configurations differ."""
    found = []
    for key in sorted({*mine, *theirs}):
        here, there = mine.get(key), theirs.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            found += differences(here, there, f"{prefix}{key}.")
        elif isinstance(here, dict) or isinstance(there, dict):
            found.append(f"{prefix}{key}: only {'here' if there is None else 'there'}")
        elif here != there:
            found.append(f"{prefix}{key}: {shown(there)} there, {shown(here)} here")
    return found
