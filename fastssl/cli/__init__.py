"""The command line. Each command lives in its own module and is imported only when it is called.

Importing torch takes seconds; ``fastssl --help`` and ``fastssl verify`` should not pay for it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

import click

from fastssl._version import __version__
from fastssl.pipelines.errors import FastSSLError, Interrupted

#: command name -> (module, attribute, the line that ``fastssl --help`` shows)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "convert-imagenet": ("fastssl.cli.convert", "convert_imagenet", "Turn a folder or tar of photos into a .beton file."),
    "verify": ("fastssl.cli.verify", "verify", "Check a .beton file: header, tables, checksums, pictures."),
    "pretrain": ("fastssl.cli.pretrain", "pretrain", "Pre-train a backbone without labels."),
    "evaluate": ("fastssl.cli.evaluate", "evaluate", "Probe a checkpoint: kNN and linear."),
    "bench": ("fastssl.cli.bench", "bench", "Measure images/s of every part, beside its ceiling; write the report."),
    "estimate": ("fastssl.cli.estimate", "estimate", "Say what a run will cost here, from a minute of measuring."),
    "views": ("fastssl.cli.views", "views", "Draw the views a recipe makes from your photos."),
    "report": ("fastssl.cli.report", "report", "Write the report page of a run again."),
    "recipes": ("fastssl.cli.info", "recipes", "List the recipes, or print one."),
    "archs": ("fastssl.cli.info", "archs", "List the networks with their short names."),
    "doctor": ("fastssl.cli.info", "doctor", "Say what this machine has and what is missing."),
}


class LazyGroup(click.Group):
    """A click group that knows its commands by name and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        return getattr(importlib.import_module(module), attribute)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        from fastssl.names import nearest

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}{nearest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastssl")
@click.option("--debug", is_flag=True, help="Show the full traceback when something fails.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Pre-train phone-sized vision networks without labels, as fast as the hardware decodes photos.

    \b
    fastssl convert-imagenet photos/ photos.beton
    fastssl pretrain --arch mobilenetv3_large --data photos.beton
    """
    ctx.obj = {"debug": debug}


#: commands that only print
_PRINTING = ("recipes", "archs", "doctor", "--version", "-h")


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends a command as Ctrl-C does: files that are half written are put in order, and the status is 130."""
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    """Run the command line and leave with 0 (done), 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # Read by GNU OpenMP when torch is loaded: how long a thread that waits for another spins before it sleeps. Its own 300,000 turns
    # make a training step on the CPU several times slower as soon as a core is busy with anything else; sleeping at once costs a
    # quarter on an idle machine. Quick-start step on 2 cores, idle / one core busy, pair/s, one noisy measurement each: spinning 391 / 107, sleeping 300 / 214,
    # 3,000 turns 376 / 135.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # --debug is accepted anywhere on the line: nobody remembers on which side of the command it goes.
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    signal.signal(signal.SIGTERM, _interrupt)
    if hasattr(signal, "SIGPIPE") and (not argv or argv[0] in _PRINTING or "--help" in argv):
        # `fastssl recipes | head`: these only print, so when the reader leaves there is nothing to do but to end, as any filter does.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        status = cli.main(args=argv, prog_name="fastssl", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except Interrupted as stop:
        click.echo(f"fastssl: {stop}", err=True)
        sys.exit(130)
    except (FastSSLError, OSError) as error:
        if debug:
            raise
        click.echo(f"fastssl: {error}", err=True)
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        click.echo(f"fastssl: unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)", err=True)
        sys.exit(1)
