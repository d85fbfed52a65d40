"""Signals become a flag; only a later second Ctrl-C ends the process at once."""

from __future__ import annotations

import math
import os
import signal
import threading

import pytest

from fastssl import cli
from fastssl.utils import signals as module
from fastssl.utils.signals import StopRequest


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_each_signal_asks_and_is_given_back(name: str) -> None:
    number, stop = getattr(signal, name), StopRequest()
    inherited = signal.signal(number, signal.SIG_DFL)  # nohup and shells start their children with some signals ignored
    try:
        with stop.by_signals():
            assert not stop and not stop.wait(0)
            os.kill(os.getpid(), number)
            assert stop and stop.name == name and stop.wait(0)
            os.kill(os.getpid(), number)  # passed on by a launcher: no second request
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)


def test_a_second_ctrl_c_some_seconds_later_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TWICE_S", 0.0)
    stop = StopRequest()
    with stop.by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)  # schedulers repeat themselves; they have SIGKILL where they mean it
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_hangup_that_was_to_be_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        stop = StopRequest()
        with stop.by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_happens() -> None:
    before, stop, inside = signal.getsignal(signal.SIGTERM), StopRequest(), []

    def work() -> None:
        with stop.by_signals():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


def test_work_that_can_be_left_is_left_at_once() -> None:
    stop, done = StopRequest(), []

    def work() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("not reached")
        return "whole"

    with stop.by_signals():
        assert stop.unless_asked(lambda: "whole") == "whole"
        assert stop.unless_asked(work) is None and stop and not done
        assert stop.unless_asked(lambda: "whole") is None, "not even begun"
        os.kill(os.getpid(), signal.SIGTERM)  # outside such work nothing is thrown


def test_a_signal_between_the_look_and_the_work_is_not_waited_for() -> None:
    class Late(StopRequest):
        sent = False

        def __bool__(self) -> bool:
            found = super().__bool__()
            if not self.sent:
                self.sent = True
                os.kill(os.getpid(), signal.SIGTERM)
            return found

    stop = Late()
    with stop.by_signals():
        assert stop.unless_asked(lambda: "minutes later") is None and stop


def test_a_handler_that_python_does_not_know_of_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was there before the interpreter: what stood there is then told as None, which cannot be put back."""
    real = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: (real(number, handler), None)[1])
    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    }
    try:
        stop = StopRequest()
        with stop.by_signals():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.name == "SIGUSR1"
    finally:
        for number, handler in before.items():
            real(number, handler)


def test_what_a_launcher_says_twice_does_not_interrupt_the_end_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_interrupted_at", -math.inf)
    with pytest.raises(KeyboardInterrupt):
        cli._interrupt(signal.SIGTERM, None)
    cli._interrupt(signal.SIGTERM, None)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "_TWICE_S", 0.0)
        with pytest.raises(KeyboardInterrupt):  # who still waits, and says it again, means it
            cli._interrupt(signal.SIGTERM, None)
    monkeypatch.setattr(cli, "_interrupted_at", -math.inf)
    with pytest.raises(SystemExit):
        cli._leave(0)
    cli._interrupt(signal.SIGUSR1, None)
