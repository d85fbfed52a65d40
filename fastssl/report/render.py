"""Pages from the templates beside this file: self-contained, no script, no network; every value is escaped."""

from __future__ import annotations

import base64
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from fastssl.errors import counted
from fastssl.report.run_record import get, number


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "base64": lambda content: base64.b64encode(content).decode("ascii"),
        "counted": counted,
        "get": get,
        "number": number,
        "sentence": lambda text: f"{str(text).rstrip().rstrip('.')}.",
        "thousands": lambda value: f"{value:,}" if isinstance(value, int) else value,
    }
    return environment


def render_template(name: str, **values: Any) -> str:
    """``templates/NAME`` with ``values``; what is not ``markupsafe.Markup`` is text."""
    return _environment().get_template(name).render(**values)
