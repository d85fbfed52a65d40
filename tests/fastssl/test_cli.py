"""What the command line says whatever the command: warnings on a line, and nothing twice."""

from __future__ import annotations

import signal
import subprocess
import sys
import warnings

import click
import pytest

from fastssl import cli as module
from fastssl.cli import main
from fastssl.distributed import world
from fastssl.errors import FastSSLError, Interrupted


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """Run ``work`` as a command: (exit status, what was written to standard error)."""

    def call(work, *arguments: str) -> tuple[int, str]:
        command = click.Group("fastssl", commands={"work": click.Command("work", callback=work)})
        monkeypatch.setattr(module, "cli", command)
        with pytest.raises(SystemExit) as stop:
            main(["work", *arguments])
        return int(stop.value.code or 0), capfd.readouterr().err

    return call


def warn() -> None:
    warnings.warn("x.beton: fields not read:\n \x1b[2J", stacklevel=1)


def test_a_warning_is_one_plain_line(run) -> None:
    assert run(warn) == (0, "fastssl: warning: x.beton: fields not read: \\x1b[2J\n")


def test_with_debug_a_warning_is_left_to_python(run) -> None:
    with pytest.warns(UserWarning, match="fields not read"):
        assert run(warn, "--debug") == (0, "")


@pytest.mark.parametrize(("kind", "status"), [(FastSSLError, 1), (Interrupted, 130)])
def test_what_was_told_is_not_repeated(run, kind: type[FastSSLError], status: int) -> None:
    def end(told: bool) -> None:
        error = kind("stopped at step 7")
        error.reported = told
        raise error

    assert run(lambda: end(False)) == (status, "fastssl: stopped at step 7\n")
    assert run(lambda: end(True)) == (status, "")


def test_one_that_is_ended_on_its_way_out_says_nothing_more(run) -> None:
    """torchrun ends the other processes as soon as the first has left."""

    def end(told: bool) -> None:
        error = Interrupted("stopped at step 7")
        error.reported = told
        try:
            raise error
        finally:
            raise KeyboardInterrupt

    assert run(lambda: end(True)) == (130, "\n")  # click's
    assert run(lambda: end(False)) == (130, "\ninterrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_an_interpreter_that_ends_does_not_change_the_status(number: int) -> None:
    """Launchers say it twice, and the modules of torch take a quarter of a second to be taken down."""
    script = f"""
import os
from fastssl.cli import main

class Late:
    def __del__(self, kill=os.kill, process=os.getpid()):
        kill(process, {int(number)})

late = Late()
main(["--version"])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "fastssl" in ended.stdout and not ended.stderr


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("usage", [True, False])
def test_of_processes_with_the_same_mistake_one_speaks(
    run, usage: bool, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of a host waits for its end; where it does not come, the mistake is its own."""

    def work() -> None:
        if usage:
            raise click.UsageError("--epochs and --set train.epochs say the same thing")
        with world.first_of_host_speaks():
            raise FastSSLError("unknown network")

    def wait(seconds: float) -> None:
        if ended:
            raise KeyboardInterrupt

    monkeypatch.setattr(world.time, "sleep", wait)
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }.items():
        monkeypatch.setenv(name, value)
    status, said = run(work)
    if ended:
        assert (status, said.strip()) == (130, "")
    else:
        assert status == (2 if usage else 1) and ("say the same thing" if usage else "fastssl: unknown network") in said
