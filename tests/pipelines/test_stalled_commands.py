"""Converting and verifying on a disk that does not answer, and with threads that meet what they were not made for: an
error that says where, and an end.
"""

from __future__ import annotations

import _thread
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from children import in_child

from fastssl.cli import main
from fastssl.errors import FastSSLError, Stalled, WorkerError
from fastssl.pipelines.beton.open_file import OpenFile
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.verify import verify
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert import conversion as convert_module
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.convert.sources import Listing
from fastssl.pipelines.ops import jpeg
from fastssl.utils import deadline as stall
from fastssl.utils.deadline import Deadline

#: Seconds for which nothing is waited longer, in minutes.
SHORT = 1 / 60


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether threads were given up is known to the whole process, and it leaves otherwise than usual then."""
    monkeypatch.setattr(stall, "_given_up", False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos of two classes."""
    root = tmp_path_factory.mktemp("source") / "photos"
    for k in range(6):
        path = root / f"class{k % 2}" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg.encode(np.full((12, 16, 3), 40 * k, np.uint8), 90))
    return root


@pytest.fixture(scope="module")
def whole(photos: Path) -> Path:
    """What an undisturbed conversion makes of them."""
    convert(photos, photos.parent / "whole.beton")
    return photos.parent / "whole.beton"


def hang(owner: object, name: str, dead: Callable[..., bool]) -> None:
    """Calls of a function for which ``dead`` is true do not return, as from a disk that does not answer."""
    real = getattr(owner, name)

    def waiting(*args: object, **options: object) -> object:
        if dead(*args):
            threading.Event().wait()
        return real(*args, **options)

    setattr(owner, name, waiting)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


NOTHING = (
    r"nothing was {} for 1 s, since \d\d:\d\d:\d\d, {}: the disk or network file system does not answer; see .* give "
    r"the same command again"
)


def stalled_conversion(where: str, photos: Path, dst: Path) -> None:
    convert_module.CHECKPOINT_SECONDS = 0.0
    if where == "the listing":
        hang(os, "scandir", lambda path=".": path == photos)
        words = "while photos were listed, at the first of them"
    elif where == "a photo":
        hang(Listing, "read", lambda listing, i: listing.names[i] == "class1/3.jpg")
        words = "at class1/3.jpg"
    else:
        hang(BetonWriter, "sync", lambda writer: True)
        words = "while whole.beton.partial was written"
    with pytest.raises(Stalled, match=rf"^{photos}: {NOTHING.format('read or written', words)}$"):
        convert(photos, dst, ConvertOptions(workers=2, stall_minutes=SHORT))
    assert stall.threads_given_up() and not dst.exists()


@pytest.mark.timed
@pytest.mark.parametrize("where", ["the listing", "a photo", "the result"])
def test_a_conversion(where: str, photos: Path, whole: Path, tmp_path: Path) -> None:
    """It ends with the name of what does not answer, and the next one, in a new process, makes of the photos what an
    undisturbed one makes.
    """
    dst = tmp_path / "whole.beton"
    ended = in_child(stalled_conversion, where, photos, dst)
    assert ended.status == 0, ended
    # Of six photos the four before the dead one; none where no line of the journal has come to the disk.
    assert convert(photos, dst).resumed == {"the listing": 0, "a photo": 4, "the result": 0}[where]
    assert everything(tmp_path) == {
        name: (whole.parent / name).read_bytes() for name in ("whole.beton", "whole.beton.json")
    }


def stalled_check(where: str, whole: Path) -> None:
    if where == "the tables":
        hang(OpenFile, "read_into", lambda *args: True)
        words = "at its tables"
    else:
        hang(BetonReader, "encoded", lambda reader, sample: sample == 3)
        words = "at samples 0 to 5"
    with pytest.raises(Stalled, match=rf"^{whole}: {NOTHING.format('read', words)}$"):
        verify(whole, workers=2, stall_minutes=SHORT)
    assert stall.threads_given_up()


@pytest.mark.timed
@pytest.mark.parametrize("where", ["the tables", "a sample"])
def test_a_check(where: str, whole: Path) -> None:
    ended = in_child(stalled_check, where, whole)
    assert ended.status == 0, ended


def warned_conversion(source: Path, dst: Path) -> None:
    stall.WARN_SECONDS = 0.5
    hang(Listing, "read", lambda listing, i: True)
    with (
        pytest.warns(
            UserWarning,
            match=r"photos: nothing was read or written for 0 s, at \\x1b\[2J.jpg: the disk .*; an error in 0 min",
        ),
        pytest.raises(Stalled),
    ):
        convert(source, dst, ConvertOptions(stall_minutes=SHORT))


def test_a_warning_comes_first(photos: Path, tmp_path: Path) -> None:
    """And what a stranger has called a photo does nothing to the terminal."""
    source = tmp_path / "photos"
    source.mkdir()
    (source / "\x1b[2J.jpg").write_bytes((photos / "class0" / "0.jpg").read_bytes())
    ended = in_child(warned_conversion, source, tmp_path / "out.beton")
    assert ended.status == 0, ended


@pytest.mark.parametrize("value", [0, math.nan, "10"])
def test_the_limit_is_a_number(value: object, photos: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(FastSSLError, match=r"stall_minutes=.* is not a number of minutes above 0"):
        convert(photos, tmp_path / "out.beton", ConvertOptions(stall_minutes=value))
    with pytest.raises(FastSSLError, match=r"stall_minutes=.* is not a number of minutes above 0"):
        verify(whole, stall_minutes=value)


def test_for_ever_if_so_wished(photos: Path, whole: Path, tmp_path: Path) -> None:
    convert(photos, tmp_path / "out.beton", ConvertOptions(stall_minutes=math.inf))
    assert (tmp_path / "out.beton").read_bytes() == whole.read_bytes() and verify(whole, stall_minutes=math.inf).ok


def command_on_a_dead_disk(*arguments: object) -> None:
    kept = Deadline.__init__
    Deadline.__init__ = lambda self, path, minutes=0, deed="read": kept(self, path, SHORT, deed)
    Listing.read = OpenFile.read_into = lambda *args: threading.Event().wait()
    main([str(argument) for argument in arguments])


@pytest.mark.parametrize("command", ["convert-imagenet", "verify"])
def test_the_command_ends_although_threads_hang(command: str, photos: Path, whole: Path, tmp_path: Path) -> None:
    """With the reader's threads held forever, the command says its line and is gone, where the interpreter's own end
    would join them.
    """
    arguments = (whole,) if command == "verify" else (photos, tmp_path / "out.beton")
    ended = in_child(command_on_a_dead_disk, command, *arguments)
    assert ended.status == 1 and ended.signal is None, ended
    deed = "read" if command == "verify" else "read or written"
    assert ended.output.splitlines()[-1].startswith(f"fastssl: {arguments[0]}: nothing was {deed} for 1 s"), ended


def test_ctrl_c_stops_the_work_and_keeps_what_is_done(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dst, pressed, left = tmp_path / "whole.beton", threading.Event(), threading.Event()
    read, settled = Listing.read, Deadline.settled

    def interrupting(listing: Listing, i: int) -> bytes:
        if listing.names[i] == "class1/3.jpg" and not left.is_set():
            pressed.set()
            _thread.interrupt_main()
            assert left.wait(60)
        return read(listing, i)

    def leaving(deadline: Deadline, futures: list) -> bool:
        if pressed.is_set():
            left.set()
        return settled(deadline, futures)

    monkeypatch.setattr(Listing, "read", interrupting)
    monkeypatch.setattr(Deadline, "settled", leaving)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts what it puts into the background with SIGINT ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            convert(photos, dst, ConvertOptions(workers=1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (
        set(everything(tmp_path)) == {"whole.beton.partial", "whole.beton.partial.journal"}
        and not stall.threads_given_up()
    )
    assert convert(photos, dst).written == 6 and dst.read_bytes() == whole.read_bytes()


def test_no_memory_for_a_photo_is_no_fault_of_the_photo(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not among the rejected ones: the next conversion takes it."""
    dst, read = tmp_path / "whole.beton", Listing.read

    def no_memory(listing: Listing, i: int) -> bytes:
        if listing.names[i] == "class1/3.jpg":
            raise MemoryError
        return read(listing, i)

    with monkeypatch.context() as patch:
        patch.setattr(Listing, "read", no_memory)
        with pytest.raises(WorkerError, match=rf"^{photos}: class1/3.jpg: no memory left; fewer --workers"):
            convert(photos, dst)
    assert convert(photos, dst).resumed == 4 and dst.read_bytes() == whole.read_bytes() and not stall.threads_given_up()


@pytest.mark.parametrize(
    ("error", "message"),
    [(MemoryError(), "no memory left; fewer --workers"), (RuntimeError("a bug"), "unexpected RuntimeError: a bug")],
)
def test_what_a_thread_throws_is_no_damage_and_no_proof_of_a_whole_file(
    error: Exception, message: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(reader: BetonReader, sample: int) -> np.ndarray:
        raise error

    monkeypatch.setattr(BetonReader, "decode", broken)
    with pytest.raises(WorkerError, match=rf"^{whole}: sample 0: {message}") as caught:
        verify(whole)
    assert caught.value.__cause__ is error
