"""The command line. Each command lives in its own module and is imported only when it is called: importing torch takes
seconds, which ``fastssl --help`` and ``fastssl verify`` should not pay for.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
import time
import traceback
import warnings
from typing import NoReturn

import click

from fastssl._version import __version__
from fastssl.cli.lazy import LazyCommand, LazyGroup
from fastssl.distributed.world import first_of_host_speaks
from fastssl.errors import FastSSLError, Interrupted, UsageError, printable, require_posix
from fastssl.utils.deadline import threads_given_up

COMMANDS = {
    "convert-imagenet": LazyCommand(
        ".convert", "convert_imagenet", "Turn photos, however they come, into .beton files."
    ),
    "convert": LazyCommand(".convert", "convert_imagenet", ""),
    "data": LazyCommand(".data", "data", "Say what is in a set of photos; draw a contact sheet."),
    "verify": LazyCommand(".verify", "verify", "Check a .beton file: header, tables, checksums, pictures."),
    "pretrain": LazyCommand(".pretrain", "pretrain", "Pre-train a backbone without labels."),
    "evaluate": LazyCommand(".evaluate", "evaluate", "What a checkpoint is worth: kNN, linear probe, ..."),
    "embed": LazyCommand(".embed", "embed", "Write the features of photos as a file: numpy, parquet or csv."),
    "search": LazyCommand(".embed", "search", "Find the photos like one, or those that are nearly alike."),
    "export": LazyCommand(".weights", "export", "Write a backbone for timm, torchvision or ONNX."),
    "import": LazyCommand(".weights", "import_", "Take over a backbone that others trained."),
    "push": LazyCommand(".weights", "push", "Put a backbone on the Hugging Face hub, with a model card."),
    "bench": LazyCommand(".bench", "bench", "Measure images/s of every part, beside its ceiling; write the report."),
    "estimate": LazyCommand(".estimate", "estimate", "Say what a run will cost here, from a minute of measuring."),
    "views": LazyCommand(".views", "views", "Draw the views a recipe makes from your photos."),
    "report": LazyCommand(".info", "report", "Write the report page of a run again."),
    "recipes": LazyCommand(".info", "recipes", "List the recipes, or print one."),
    "archs": LazyCommand(".info", "archs", "List the networks with their short names."),
    "doctor": LazyCommand(".info", "doctor", "Say what this machine has and what is missing."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastssl")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the full traceback when something fails.")
def cli() -> None:
    """Pre-train phone-sized vision networks without labels, as fast as the hardware decodes photos.

    \b
    fastssl convert-imagenet photos/ photos.beton
    fastssl pretrain --arch mobilenetv3_large --data photos.beton
    """


#: commands that only print
_PRINTING = ("recipes", "archs", "doctor", "--version", "-h")
#: Seconds between two signals that are two.
_TWICE_S = 5.0
_interrupted_at = -math.inf


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM and SIGUSR1 (Slurm's early warning) end a command as Ctrl-C does: files that are half written are put in
    order, and the status is 130. Launchers say it twice, and srun to every process of a group.
    """
    global _interrupted_at
    if time.monotonic() - _interrupted_at > _TWICE_S:
        _interrupted_at = time.monotonic()
        raise KeyboardInterrupt


def _hear_no_more() -> None:
    """The interpreter puts the signals' own deeds back before it takes its modules down: from there on one would take
    the place of the status that was told.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and leave with 0 (done), 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # Read by GNU OpenMP when torch is loaded: how long a thread that waits for another spins before it sleeps. Its own
    # 300,000 turns make a training step several times slower as soon as a core is busy with anything else; sleeping at
    # once costs a quarter on an idle machine. Quick-start step on 2 cores, idle / one core busy, pair/s, one noisy
    # measurement each: spinning 391 / 107, sleeping 300 / 214, 3,000 turns 376 / 135.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Where another process of the run has ended, torch writes a trace of its own C++ frames before our one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Anywhere on the line: nobody remembers on which side of the command it goes.
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    global _interrupted_at
    _interrupted_at = -math.inf
    try:
        require_posix()
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGUSR1, _interrupt)
        atexit.unregister(_hear_no_more)
        # Before all others, and so called behind them: what may hang there can still be ended.
        atexit.register(_hear_no_more)
        if not argv or argv[0] in _PRINTING or "--help" in argv:  # `fastssl recipes | head`: to end as any filter does
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        with warnings.catch_warnings():
            if not debug:
                warnings.showwarning = _show_warning
            status = _run(argv)
        _leave(status if isinstance(status, int) else 0)
    except click.exceptions.Exit as stop:
        _leave(stop.exit_code)
    except (click.Abort, KeyboardInterrupt) as stop:
        _leave(130, None if _was_leaving(stop) else "interrupted")
    except click.ClickException as error:
        if "unexpected extra argument" in error.message and sum(word.endswith(".beton") for word in argv) > 1:
            how = "one option takes many files as a pattern in quotes: --data 'train-*.beton'"
            error = click.UsageError(f"{error.message}; {how}", getattr(error, "ctx", None))
        error.show()
        _leave(2)
    except UsageError as error:
        _leave(2, _line(error))
    except Interrupted as stop:
        _leave(130, _line(stop))
    except Exception as error:
        # With --debug the error goes on as it is, unless the end of the interpreter would never come.
        if debug and not threads_given_up():
            raise
        if debug:
            traceback.print_exc()
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):
            # Torchrun's closing table names the process that failed first, and why, from a file that each may write.
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        unexpected = f"fastssl: unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)"
        _leave(1, _line(error) if isinstance(error, (FastSSLError, OSError)) else unexpected)


def _run(argv: list[str]) -> object:
    """What the command returns. Of several processes with the same wrong usage one speaks."""
    try:
        return cli.main(args=argv, prog_name="fastssl", standalone_mode=False)
    except click.ClickException:
        with first_of_host_speaks():
            raise


def _line(error: Exception) -> str | None:
    """What is said of ``error``; None where it was said before."""
    return None if getattr(error, "reported", False) else f"fastssl: {error}"


def _was_leaving(error: BaseException | None) -> bool:
    """Whether an interruption struck a process on its way out, whose reason was told: as soon as one process has left,
    torchrun ends the others.
    """
    told = bool(getattr(error, "reported", False))
    return told or (error is not None and _was_leaving(error.__cause__ or error.__context__))


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line for the reader. Python's own form, with the line of source that warns, comes with ``--debug``."""
    click.echo(printable(f"fastssl: warning: {' '.join(str(message).split())}"), err=True)


def _leave(status: int, message: str | None = None) -> NoReturn:
    """Say ``message``, which may quote a stranger's file, on one line, and end the process."""
    global _interrupted_at
    _interrupted_at = time.monotonic()
    if message is not None:
        click.echo(printable(message), err=True)
    if threads_given_up():
        # The interpreter's end joins all threads of pools, and these hang in the kernel at a disk that does not answer.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
