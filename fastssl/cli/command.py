"""The command line that made a result, so that its reader can make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

import click

from fastssl.utils.addresses import shown


class SectionedCommand(click.Command):
    """A command of many options, which ``--help`` shows in sections. ``sections``: the heading of each, by the name of
    the first option that belongs to it.
    """

    def __init__(self, *args: Any, sections: Mapping[str, str], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {}
        heading = "Options"
        for param in self.get_params(ctx):
            heading = self.sections.get(param.name or "", heading)
            if isinstance(param, click.Option) and (row := param.get_help_record(ctx)) is not None:
                rows.setdefault(heading, []).append(row)
        for heading, some in rows.items():
            with formatter.section(heading):
                formatter.write_dl(some)


def command_line(ctx: click.Context) -> str:
    """The call in ``ctx``, quoted for a shell: the options that were given, in the order of ``--help``, without
    ``--json`` and ``--debug``; the same however the command was started. Of a path only the file's name is left:
    results are passed on, and folders tell where somebody works.
    """
    words = ctx.command_path.split()
    words = words if words[:1] == ["fastssl"] else ["fastssl", *words]
    places: list[str] = []
    for param in ctx.command.params:
        given = ctx.get_parameter_source(param.name) is click.core.ParameterSource.COMMANDLINE
        if not given or param.name == "json_path" or not param.expose_value:  # --quiet: how it is told, not what it is
            continue
        value = ctx.params[param.name]
        values = value if isinstance(value, tuple) else (value,)
        if isinstance(param, click.Argument):
            places.extend(map(_word, values))
        elif isinstance(param, click.Option) and param.is_flag:
            words.append((param.opts if value else param.secondary_opts)[-1])
        else:
            # --set's values are the recipe's, and may hold anything.
            shown = str if param.name == "overrides" else _word
            words.extend(word for one in values for word in (max(param.opts, key=len), shown(one)))
    return shlex.join([*words, *places])


def _word(value: object) -> str:
    """As one would type it: 30 and not 30.0; file names without folders."""
    if isinstance(value, float):
        return f"{value:.10g}"
    text = shown(str(value))
    # This flavour of paths knows both separators.
    return PureWindowsPath(text).name or text if "/" in text or "\\" in text else text
