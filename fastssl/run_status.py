"""``status.json``: how a run stands, for whoever has to decide whether to start it again.

A launcher such as torchrun ends with status 1 whatever its processes say; this file says more: ``{"state": "stopped", "step": 1200, ...}``.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastssl.files import write_atomically

#: ``training``: at work, or killed without a word. ``stopped``: by a signal, with everything saved: the same command goes on. ``failed``: see ``why``.
#: ``trained``: all steps are made, the report is not written yet. ``finished``.
STATES = ("training", "stopped", "failed", "trained", "finished")


def write_status(folder: Path, state: str, **values: Any) -> None:
    """Write ``folder/status.json``; where the disk does not take it, nothing happens: no run ends for that."""
    if state not in STATES:
        raise ValueError(f"state={state!r} is not one of {', '.join(STATES)}")
    with suppress(OSError):
        write_atomically(folder / "status.json", lambda path: path.write_text(json.dumps({"state": state, **values}) + "\n"))
