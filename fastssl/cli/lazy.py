"""A command group whose commands live in modules of their own, each imported only when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import click


class LazyCommand(NamedTuple):
    """Where a command is (``.verify``: in this package), and the line that its group's ``--help`` shows; '': none."""

    module: str
    attribute: str
    line: str


class LazyGroup(click.Group):
    """A click group that knows its commands by name and imports one when it is asked for: ``--help`` should not wait
    for torch.
    """

    def __init__(self, *args: Any, lazy: Mapping[str, LazyCommand], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if found := self.lazy.get(cmd_name):
            command: click.Command = getattr(importlib.import_module(found.module, __package__), found.attribute)
            return command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from fastssl.utils.suggest import nearest

        if args and args[0] not in self.lazy and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}{nearest(args[0], self.lazy)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, found.line) for name, found in self.lazy.items() if found.line])
