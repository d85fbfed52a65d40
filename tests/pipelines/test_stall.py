"""Disks that do not answer, and threads that meet what they were not made for: the consumer gets an error, and the
process can end.
"""

from __future__ import annotations

import io
import math
import threading
import time
import warnings
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.thread import _python_exit
from pathlib import Path

import pytest
from children import Ended, in_child
from conftest import need_engine
from rich.console import Console

from fastssl.cli import main
from fastssl.cli.progress import RunProgress
from fastssl.errors import FastSSLError, Stalled, WorkerError
from fastssl.pipelines.beton import open_file
from fastssl.pipelines.beton import reader as beton_module
from fastssl.pipelines.engines import native
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils import deadline as stall
from fastssl.utils.deadline import Deadline

TWO = [ViewSpec(size=16, count=2)]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether threads were given up is known to the whole process, and it leaves otherwise than usual then."""
    monkeypatch.setattr(stall, "_given_up", False)


class DeadDisk:
    """Reads in threads hang until ``answer`` is set, but for those at ``answered`` offsets; the main thread's tables
    are read.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None, answered: Collection[int] = ()):
        self.answer, self.all_answered, self.hangs = (threading.Event() for _ in range(3))
        left = set(answered)
        real = open_file.OpenFile.read_into

        def read_into(file, out, offset):
            if threading.current_thread() is not threading.main_thread() and offset not in answered:
                self.hangs.set()
                self.answer.wait()
            done = real(file, out, offset)
            left.discard(offset)
            if not left:
                self.all_answered.set()
            return done

        if monkeypatch is None:
            open_file.OpenFile.read_into = read_into
        else:
            monkeypatch.setattr(open_file.OpenFile, "read_into", read_into)


@pytest.mark.engines
@pytest.mark.timed
@pytest.mark.parametrize("engine", ["native", "dali", "ffcv", "torchcodec"])
def test_a_disk_that_does_not_answer(engine: str, beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_engine(engine)
    disk = DeadDisk(monkeypatch)
    before = set(threading.enumerate())
    with ViewLoader(beton, TWO, 8) as loader:
        loader.request(0, 0)  # what is compiled for this takes longer than the limit below
    loader = ViewLoader(beton, TWO, 8, pipeline=engine, workers=2, stall_minutes=0.2 / 60)
    if engine == "ffcv":
        monkeypatch.setattr(type(loader.engine), "_open", lambda self: Opened())
    try:
        started = time.monotonic()
        with pytest.raises(
            Stalled,
            match=r"photos.beton: nothing was read for 0\.2 s, since \d\d:\d\d:\d\d, .*batch.*does not answer; see",
        ) as caught:
            next(iter(loader.epoch(0)))
        # The samples are known where the plan was drawn, not where it waits for the samples' check.
        assert engine != "native" or "at the batch that begins with samples" in str(caught.value)
        with pytest.raises(FastSSLError, match="still wait for the disk"):
            next(iter(loader.epoch(0)))
        loader.close()
        loader.close()
        assert 0.2 <= time.monotonic() - started < 4 and stall.threads_given_up()
    finally:
        disk.answer.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)  # what is compiled at its first call takes seconds on a busy machine
        assert not thread.is_alive()


class Opened:
    """FFCV's loader before it has compiled anything: seconds that say nothing about a disk."""

    batches_ahead, batch_size = 3, 8
    memory_manager = type(
        "",
        (),
        {
            "schedule_epoch": lambda self, batches: type(
                "", (), {"state": None, "__enter__": lambda s: s, "__exit__": lambda s, *a: None}
            )()
        },
    )()
    graph = type("", (), {"allocate_memory": lambda self, *sizes: None})()
    reader = type("", (), {"metadata": None})()


def test_a_slow_disk_is_waited_for(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line after a while, and the batch when it comes; without a hint of it where the disk is quick."""
    monkeypatch.setattr(stall, "WARN_SECONDS", 0.05)
    disk = DeadDisk(monkeypatch)
    threading.Timer(0.4, disk.answer.set).start()
    with (
        ViewLoader(beton, TWO, 8, workers=1) as loader,
        pytest.warns(UserWarning, match=r"photos.beton: nothing was read for 0 s, .*an error in 10 min"),
    ):
        assert len(list(loader.epoch(0))) == 6
    assert not stall.threads_given_up()
    monkeypatch.setattr(stall, "WARN_SECONDS", 60.0)
    with warnings.catch_warnings(), ViewLoader(beton, TWO, 8, stall_minutes=math.inf) as loader:
        warnings.simplefilter("error")
        assert len(list(loader.epoch(0))) == 6


def warn_under_a_display() -> None:
    shown = io.StringIO()
    with RunProgress(Console(file=shown, force_terminal=True, width=300)):
        with pytest.raises(Stalled):
            Deadline("photos.beton", 0.2 / 60).result(Future(), lambda: "at the batch [red]")
        stall.WARN_SECONDS = 0.05
        with pytest.raises(Stalled):
            Deadline("photos.beton", 0.2 / 60).result(Future(), lambda: "at the batch [red]")
    assert (
        shown.getvalue().count(
            "nothing was read for 0 s, at the batch [red]: the disk or network file system does not answer"
        )
        == 1
    )


def test_the_warning_stands_above_the_live_display() -> None:
    """Rich takes over standard error while it draws: the line is seen, and the bar is drawn again below it."""
    ended = in_child(warn_under_a_display)
    assert ended.status == 0, ended


@pytest.mark.timed
def test_leaving_early_does_not_wait_for_ever(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "LEAVE_SECONDS", 0.2)
    with ViewLoader(beton, TWO, 8) as loader:
        first = set(loader.reader.offsets[loader.request(0, 0).index].tolist())
    disk = DeadDisk(monkeypatch, first)
    try:
        started = time.monotonic()
        # Threads enough for all batches ahead: none of them hangs before the first batch is there, and one surely does
        # before it is left.
        with ViewLoader(beton, TWO, 8, workers=8) as loader:
            draw = loader.request
            monkeypatch.setattr(
                loader, "request", lambda epoch, step: (step and disk.all_answered.wait(60), draw(epoch, step))[1]
            )
            for _ in loader.epoch(0):
                assert disk.hangs.wait(60)
                started = time.monotonic()
                break
        assert time.monotonic() - started < 3 and stall.threads_given_up()
    finally:
        disk.answer.set()


@pytest.mark.parametrize("value", [0, -1, math.nan, True, "10", None])
def test_the_limit_is_a_number(value: object, beton: Path) -> None:
    with pytest.raises(FastSSLError, match=r"stall_minutes=.* is not a number of minutes above 0"):
        ViewLoader(beton, TWO, 8, stall_minutes=value)


def test_a_time_out_of_the_work_itself_is_no_stall() -> None:
    deadline = Deadline("x.beton", 0.1)
    failed: Future = Future()
    failed.set_exception(TimeoutError("the server's"))
    with pytest.raises(TimeoutError, match="the server's"):
        deadline.result(failed, str)
    assert not deadline.given_up


def test_one_who_leaves_waits_for_what_runs_and_cancels_what_has_not_begun() -> None:
    deadline, gate = Deadline("x.beton"), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running, waiting = pool.submit(gate.wait), pool.submit(gate.wait)
        threading.Timer(0.2, gate.set).start()
        assert deadline.settled([running, waiting]) and running.done() and waiting.cancelled()
    assert not deadline.given_up


def test_a_long_list_is_taken_in_a_thread_of_its_own_in_order() -> None:
    source = ((number, threading.current_thread()) for number in range(250))
    numbers, takers = zip(*Deadline("x").each(source, str))
    assert numbers == tuple(range(250)) and len(set(takers)) == 1 and threading.main_thread() not in takers
    with pytest.raises(ZeroDivisionError):
        list(Deadline("x").each((1 // (200 - number) for number in range(250)), str))


def command_on_a_dead_disk(beton: Path, out: Path) -> None:
    kept = Deadline.__init__
    Deadline.__init__ = lambda self, path, minutes=0: kept(self, path, 0.2 / 60)
    DeadDisk()
    main(["views", str(beton), "--recipe", "quickstart", "--out", str(out)])


def test_the_command_ends_although_threads_hang(beton: Path, tmp_path: Path) -> None:
    """With the reader's threads held forever, the command says its line and is gone, where the interpreter's own end
    would join them.
    """
    ended = in_child(command_on_a_dead_disk, beton, tmp_path / "views.png", seconds=5)
    assert ended.status == 1 and ended.signal is None, ended
    (line,) = ended.output.splitlines()
    assert line.startswith(f"fastssl: {beton}: nothing was read for 0.2 s")


def end_as_usual() -> None:
    ThreadPoolExecutor(1).submit(threading.Event().wait)
    _python_exit()


def test_without_that_the_end_would_not_come() -> None:
    """The interpreter joins the threads of every pool: what ``os._exit`` is for."""
    assert in_child(end_as_usual, seconds=0.5) == Ended(None, None, "")


UNEXPECTED = [
    (MemoryError(), r"no memory left; fewer --workers"),
    (RuntimeError("a bug\nof two lines"), r"unexpected RuntimeError: a bug of two lines \(run again with --debug"),
]


@pytest.mark.engines
@pytest.mark.parametrize("on_bad", ["fail", "skip"])
@pytest.mark.parametrize(("error", "message"), UNEXPECTED, ids=["memory", "bug"])
@pytest.mark.parametrize("engine", ["native", "dali", "ffcv", "torchcodec"])
def test_what_a_thread_throws_reaches_the_consumer(
    engine: str, error: Exception, message: str, on_bad: str, beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sample named, and nothing hangs. It is no damage of the photo: skipping does not hide it."""
    need_engine(engine)
    real = {name: getattr(beton_module.BetonReader, name) for name in ("decode", "decode_into", "encoded")}

    def broken(name: str):
        def call(reader, sample, *rest):
            if sample == 13:
                raise error
            return real[name](reader, sample, *rest)

        return call

    for name in real:
        monkeypatch.setattr(beton_module.BetonReader, name, broken(name))
    with ViewLoader(beton, TWO, 24, pipeline=engine, on_bad=on_bad, workers=2) as loader:
        if engine == "ffcv":
            monkeypatch.setattr(type(loader.engine), "_open", lambda self: Opened())
            monkeypatch.setattr(type(loader.engine), "_views", lambda self, request: [])
            batches = (
                rendered
                for rendered in loader.engine.run(iter([lambda: loader.request(0, 0), lambda: loader.request(0, 1)]))
            )
        else:
            batches = loader.epoch(0)
        with pytest.raises(WorkerError, match=rf"photos.beton: sample 13: {message}") as caught:
            list(batches)
        assert caught.value.__cause__ is error and loader.stats.skipped == []
    assert not stall.threads_given_up()


@pytest.mark.engines
def test_what_the_plan_throws_reaches_the_consumer(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ("native", "dali", "torchcodec"):
        need_engine(engine)
        with ViewLoader(beton, TWO, 24, pipeline=engine) as loader:
            monkeypatch.setattr(loader, "request", lambda *step: 1 / 0)
            with pytest.raises(
                WorkerError, match=r"photos.beton: drawing the views of a batch: unexpected ZeroDivisionError"
            ):
                list(loader.epoch(0))


def test_no_memory_for_a_batch(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*sizes):
        raise MemoryError

    monkeypatch.setattr(native._Slot, "reserve_views", none)
    with (
        ViewLoader(beton, TWO, 24) as loader,
        pytest.raises(WorkerError, match=r"at the batch that begins with samples \d+, \d+, \d+: no memory"),
    ):
        list(loader.epoch(0))


def test_a_generator_that_is_closed_leaves_no_thread_busy(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun ahead is done or cancelled when ``close`` returns."""
    busy, most = [0], [0]
    lock, real = threading.Lock(), native.NativeEngine._render_one

    def counted(engine, slot, job, position):
        with lock:
            busy[0] += 1
            most[0] += 1
        time.sleep(0.005)
        real(engine, slot, job, position)
        with lock:
            busy[0] -= 1

    monkeypatch.setattr(native.NativeEngine, "_render_one", counted)
    with ViewLoader(beton, TWO, 8, workers=2) as loader:
        epoch = loader.epoch(0)
        next(epoch)
        epoch.close()
        assert busy[0] == 0
        rendered = most[0]
        time.sleep(0.1)
        assert most[0] == rendered < 48  # nor does anything begin behind it
