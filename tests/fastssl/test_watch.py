"""Processes that die, stand still or fail: how soon the others are gone, and what they say."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from processes import Started, free_port, start_processes

from fastssl.distributed.rendezvous import connect, read
from fastssl.distributed.watchdog import Watch, _is_refused, _Line, _Patience, _Silence, ended_line

# ---------------------------------------------------------------------- one process, several watches


class Watched:
    """Watches of several "processes" in one, over a real store; instead of ending the process they note what they would
    have said.
    """

    def __init__(self, size: int, silent_s: float = 0.5, leave_s: float = 0.3):
        self.port = free_port()
        self.store = connect("127.0.0.1", self.port, 5, keep=True)
        self.ended: dict[int, str] = {}
        self.watches = [self._watch(rank, size, silent_s, leave_s) for rank in range(size)]

    def _watch(self, rank: int, size: int, silent_s: float, leave_s: float) -> Watch:
        watch = Watch(
            lambda: connect("127.0.0.1", self.port, 5),
            rank,
            size,
            prefix="test",
            address="127.0.0.1",
            port=self.port,
            keeper="the keeper",
            keeps_store=rank == 0,
            silent_s=silent_s,
            leave_s=leave_s,
        )
        watch._end = lambda failure: self.ended.__setitem__(rank, failure)
        return watch

    def read(self, key: str) -> str:
        return read(dist.PrefixStore("test", self.store), key)


@pytest.fixture
def three() -> Iterator[Watched]:
    found = Watched(3)
    for watch in found.watches:
        watch.start()
    yield found
    for watch in reversed(found.watches):
        watch.close()


def wait_for(condition: object, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_the_first_failure_is_everyones(three: Watched) -> None:
    three.watches[1].leave("sample 13 is damaged")
    assert three.read("failure").endswith("): sample 13 is damaged")
    three.watches[2].leave("a consequence")
    reason = three.watches[0].reason()
    assert reason.startswith("process 1 of 3 (") and reason.endswith("): sample 13 is damaged")
    assert wait_for(lambda: set(three.ended) == {0, 1, 2}) and set(three.ended.values()) == {reason}


def test_who_leaves_by_itself_in_time_is_not_ended() -> None:
    found = Watched(2, leave_s=5)
    for watch in found.watches:
        watch.start()
    found.watches[1].leave("of its own")
    assert found.watches[0].reason() is not None
    for watch in reversed(found.watches):
        watch.close()
    assert not found.ended and not any(thread.is_alive() for watch in found.watches for thread in watch._threads)


def test_who_leaves_in_order_is_not_missed_and_its_part_is_watched_by_another(three: Watched) -> None:
    three.watches[1].close()
    assert three.watches[0].reason(1.5) is None  # three times what a silent one has
    # 2 stands behind 1 in the ring: now 0 looks after it, and it alone can say so.
    three.watches[2]._look = lambda *_: time.sleep(0.1)
    assert wait_for(lambda: three.watches[0]._neighbour.rank == 2)
    assert wait_for(lambda: three.watches[0].failure is not None) and "process 2 of 3" in three.watches[0].failure
    assert "has stood still for 5 s" in three.watches[0].failure


@pytest.mark.timed
def test_one_that_cannot_be_reached_is_given_up_earlier(three: Watched) -> None:
    found = three.watches[1]._neighbour
    assert wait_for(lambda: found.line is not None)
    found.has_ended = lambda: False  # as of a host that has lost its power: no farewell
    three.watches[2]._look = lambda *_: time.sleep(0.1)
    three.watches[2]._listener.close()
    started = time.monotonic()
    assert "process 2 of 3" in three.watches[0].reason(4) and "has not been heard of for" in three.watches[0].failure
    assert time.monotonic() - started < 3


def test_a_lost_store_is_its_keepers_end() -> None:
    port = free_port()
    watch = Watch(
        lambda: dist.HashStore(),
        1,
        2,
        prefix="x",
        address="127.0.0.1",
        port=port,
        keeper="process 0 of 2 (head)",
        keeps_store=False,
        silent_s=1,
    )

    def look(*_: object) -> None:
        raise RuntimeError("Connection reset by peer")

    ended = threading.Event()
    watch._look, watch._end, watch._leave_s = look, lambda failure: ended.set(), 0.1
    assert watch.start().reason(2) == "process 0 of 2 (head) is gone"
    assert ended.wait(3)
    watch.close()


def test_a_store_that_does_not_answer_is_given_up() -> None:
    watch = Watch(
        lambda: dist.HashStore(),
        1,
        2,
        prefix="x",
        address="127.0.0.1",
        port=free_port(),
        keeper="process 0 of 2 (head)",
        keeps_store=False,
        silent_s=0.5,
    )
    watch._look, watch._end, watch._leave_s = lambda *_: time.sleep(30), lambda failure: None, 0.1
    assert watch.start().reason(3) == "process 0 of 2 (head) has not answered for 1 s"
    watch._words = ""


def test_last_words_are_told_and_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Where they are written may be what the process hangs at."""
    told, answer, codes = [], threading.Event(), []

    def hang(why: str) -> None:
        told.append(why)
        answer.wait()

    monkeypatch.setattr("fastssl.distributed.watchdog.os._exit", codes.append)
    monkeypatch.setattr("fastssl.distributed.watchdog._TELL_S", 0.1)
    watch = Watch(
        lambda: dist.HashStore(),
        1,
        2,
        prefix="x",
        address="127.0.0.1",
        port=free_port(),
        keeper="the keeper",
        keeps_store=False,
        before_end=hang,
    )
    try:
        watch._end("process 0 of 2 (head) is gone")
        assert codes == [1] and wait_for(lambda: told == ["the run cannot go on: process 0 of 2 (head) is gone"], 60)
        assert capfd.readouterr().err == f"fastssl: {told[0]}\n"
    finally:
        answer.set()
        watch._listener.close()


def test_own_standstill_is_nobodys_silence() -> None:
    silence = _Silence()
    time.sleep(0.3)
    silence.count(True, at_most=0.1)
    assert 0.09 < silence.seconds <= 0.1
    silence.count(True, at_most=0.1)
    assert silence.seconds < 0.15
    silence.count(False, at_most=0.1)
    assert silence.seconds == 0


def test_patience_is_ten_times_as_long_with_one_that_answers() -> None:
    asked = []

    def answers() -> bool:
        asked.append(True)
        return True

    patience = _Patience(60)
    over = [second for second in range(0, 900, 2) if patience.is_over(second, answers)]
    assert over[0] == 600 and len(asked) < 20
    assert not patience.is_over(59, answers) and not patience.is_over(60, answers), "it was heard of in between"
    assert _Patience(60).is_over(60, lambda: False)


def test_a_line_ends_with_the_process_though_it_was_never_accepted() -> None:
    import subprocess
    import sys

    code = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); "
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True) as process:
        line = _Line.to(("127.0.0.1", int(process.stdout.readline())))
        assert not line.has_ended() and not _is_refused(line._place) and line.answers()
        process.send_signal(signal.SIGSTOP)
        assert not line.has_ended() and not _is_refused(line._place) and line.answers()
        process.kill()
        process.wait()
        assert wait_for(line.has_ended, 2) and _is_refused(line._place) and not line.answers()
        line.close()


def test_without_a_reason_the_line_points_at_the_others() -> None:
    assert ended_line(None) == "the run cannot go on: another process has ended, and its message says why"


# ---------------------------------------------------------------------- real processes

#: Many small steps; "at work" once the first is made.
STEPS = """
try:
    with joined(world, torch.device("cpu")):
        for step in range(100000):
            all_reduce_sum(torch.zeros(1))
            if step == 3:
                print("at work", file=sys.stderr, flush=True)
            time.sleep(0.01)
except FastSSLError as error:
    print("fastssl:", error, file=sys.stderr, flush=True)
    sys.exit(1)
"""


def at_work(started: Started) -> None:
    for rank in range(len(started.processes)):
        started.wait_until_said(rank, "at work")


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_is_named_and_the_others_are_gone(victim: int, tmp_path: Path) -> None:
    with start_processes(STEPS, 3, tmp_path) as started:
        at_work(started)
        started.processes[victim].kill()
        others = [rank for rank in range(3) if rank != victim]
        assert started.ended(others, timeout=25) == [1, 1]
        for rank in others:
            said = started.said(rank).strip().splitlines()[-1]
            # Where the keeper of the store is killed, two ways lead to the news.
            ways = ["has ended without a word"] if victim else ["has ended without a word", "is gone"]
            assert f"the run cannot go on: process {victim} of 3 (" in said and any(way in said for way in ways), said
            assert started.said(rank).count("the run cannot go on") == 1


#: Rank 1 stops in the middle; the others are not in a collective of gloo, which would end by itself, but somewhere for
#: ever.
FOR_EVER = """
def tell(why):
    print(f"told: {why}", file=sys.stderr, flush=True)
with joined(world, torch.device("cpu"), before_end=tell):
    barrier()
    print("at work", file=sys.stderr, flush=True)
    time.sleep(1000)
"""


def test_one_that_sits_in_compiled_code_for_ever_is_ended_from_outside(tmp_path: Path) -> None:
    with start_processes(FOR_EVER, 2, tmp_path) as started:
        at_work(started)
        started.processes[1].kill()
        assert started.ended([0], timeout=30) == [1]
        for said in ("fastssl: ", "told: "):
            assert f"{said}the run cannot go on: process 1 of 2 (" in started.said(0)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_process_is_given_up(victim: int, tmp_path: Path) -> None:
    with start_processes(STEPS, 2, tmp_path, FASTSSL_SILENT_SECONDS="0.4") as started:
        at_work(started)
        os.kill(started.processes[victim].pid, signal.SIGSTOP)
        assert started.ended([1 - victim], timeout=30) == [1]
        said = started.said(1 - victim)
        assert f"fastssl: the run cannot go on: process {victim} of 2 (" in said and "has ended" not in said, said
        assert ("has stood still for 4 s" if victim else "has not answered for 4 s") in said, said


#: ``PyDLL`` calls a function without letting go of the interpreter's lock.
HOLDS_THE_LOCK = """
import ctypes
with joined(world, torch.device("cpu")):
    barrier()
    if rank() == 1:
        ctypes.PyDLL(None).usleep(2500000)
    barrier()
print("done", file=sys.stderr)
"""


def test_one_that_holds_the_interpreters_lock_for_long_is_not_taken_for_dead(tmp_path: Path) -> None:
    with start_processes(HOLDS_THE_LOCK, 2, tmp_path, FASTSSL_SILENT_SECONDS="0.5") as started:
        assert started.ended([0, 1], timeout=60) == [0, 0]


ALL_AGREE = """
try:
    with joined(world, torch.device("cpu")):
        barrier()
        raise KIND(f"all say so, this is {rank()}")
except FastSSLError as error:
    print(error, file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["FastSSLError", "Interrupted"])
def test_what_all_raise_is_what_each_says(kind: str, tmp_path: Path) -> None:
    with start_processes(ALL_AGREE.replace("KIND", kind), 3, tmp_path) as started:
        assert started.ended(range(3), timeout=60) == [0, 0, 0]
        assert [started.said(rank).strip() for rank in range(3)] == [f"all say so, this is {rank}" for rank in range(3)]


def test_a_photo_that_only_one_process_reads_ends_all_with_its_name(damaged: tuple[Path, int], tmp_path: Path) -> None:
    path, sample = damaged
    small = [
        "views.0.size=32",
        "train.batch_size=12",
        "moco.queue=48",
        "moco.projector.hidden=8",
        "moco.split_bn=1",
        "train.epochs=3",
    ]
    command = [
        "-m",
        "fastssl",
        "pretrain",
        "--arch",
        "resnet10t",
        "--recipe",
        "few-photos-moco",
        "--data",
        str(path),
        "--out",
        str(tmp_path / "run"),
    ]
    command += ["--device", "cpu", "--workers", "1", *(word for item in small for word in ("--set", item))]
    with Started([command] * 3, tmp_path) as started:
        deadline = time.monotonic() + 240
        while all(process.poll() is None for process in started.processes):
            assert time.monotonic() < deadline, [started.said(rank) for rank in range(3)]
            time.sleep(0.05)
        assert started.ended(range(3), timeout=20) == [1, 1, 1]
        assert not any("frame #" in started.said(rank) for rank in range(3)), "torch's own traces"
        lines = [
            [line for line in started.said(rank).splitlines() if line.startswith("fastssl: ")] for rank in range(3)
        ]
    assert all(len(own) == 1 and f"sample {sample}" in own[0] for own in lines), lines
    others = [own[0] for own in lines if "the run cannot go on: process" in own[0]]
    assert len(others) == 2, lines
