"""Files of servers and their cache, against a server that can be told to misbehave."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from file_server import Server

from fastssl.errors import FastSSLError, Stalled
from fastssl.utils import deadline, remote, remote_cache
from fastssl.utils.addresses import address, is_remote, shown
from fastssl.utils.deadline import Deadline
from fastssl.utils.remote import Passing, Patience, RemoteError, remote_file
from fastssl.utils.remote_cache import local_copy, release

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes, no two neighbours alike


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        found.files["/set/train.tar"] = CONTENT, '"one"'
        yield found
        found.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and pauses that nobody waits for."""
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    yield tmp_path / "cache" / "remote"
    while remote_cache._held:
        release(next(iter(remote_cache._held)))


def parts_of(cache: Path) -> list[Path]:
    return list(cache.glob("*/*.part"))


# ---- addresses


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("s3://bucket/a b.tar", "s3://bucket/a b.tar"),
        ("S3://bucket/x", "s3://bucket/x"),
        (Path("https://host/x?y=1"), "https://host/x?y=1"),  # pathlib leaves one slash
        ("s3:/bucket/x", "s3://bucket/x"),
        ("photos/", None),
        ("/data/s3:/x", None),
        ("c:/photos", None),
        ("file:///photos", None),
        (b"s3://bytes", None),
    ],
)
def test_addresses(text: str | Path, found: str | None) -> None:
    assert address(text) == found
    assert is_remote(text) == (found is not None)


def test_what_is_shown_holds_no_secret() -> None:
    text = "no https://me:word@host/x.tar?X-Amz-Signature=abc&e=1 (s3://key:secret@bucket/y) 'gs://b/z?token=q'"
    assert shown(text) == "no https://host/x.tar (s3://bucket/y) 'gs://b/z'"
    assert shown(Path("https://me:word@host/x?sig=abc")) == "https://host/x"


@pytest.mark.parametrize(
    ("url", "said"),
    [("gs://bucket/x.tar", "pip install gcsfs"), ("foo://bucket/x.tar", "foo"), ("photos/x", "not an address")],
)
def test_a_protocol_that_is_not_there(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RemoteError, match=said):
        local_copy(url)


# ---- one file


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("etag", ['"one"', None])
def test_a_whole_file_once(
    server: Server, ranges: bool, lengths: bool, etag: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.ranges, server.lengths, server.files["/set/train.tar"] = ranges, lengths, (CONTENT, etag)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(remote_cache, "show", lambda name: nullcontext(lambda *one: told.append(one)))
    path = local_copy(server.url("/set/train.tar"))
    assert path.name == "train.tar" and path.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT) if ranges or lengths else 0)
    assert local_copy(server.url("/set/train.tar")) == path
    assert server.asked["/set/train.tar"] == 1


def test_a_changed_file_is_another_one(server: Server) -> None:
    first = local_copy(server.url("/set/train.tar"))
    server.files["/set/train.tar"] = CONTENT[::-1], '"two"'
    second = local_copy(server.url("/set/train.tar"))
    assert second != first and second.read_bytes() == CONTENT[::-1] and first.read_bytes() == CONTENT


def test_a_signature_that_is_renewed_is_the_same_file(server: Server, cache: Path) -> None:
    first = local_copy(server.url("/set/train.tar?X-Amz-Signature=one&X-Amz-Date=1"))
    assert local_copy(server.url("/set/train.tar?X-Amz-Signature=two&X-Amz-Date=2")) == first
    assert local_copy(server.url("/set/train.tar?version=2")) != first
    assert not any("Signature" in str(path) for path in cache.rglob("*"))


def test_a_password_goes_to_its_host_alone(server: Server) -> None:
    with Server() as other:
        other.files["/x.tar"] = CONTENT, '"x"'
        server.redirect["/set/train.tar"] = other.url("/x.tar").replace("127.0.0.1", "localhost")
        local_copy(server.url("/set/train.tar").replace("://", "://me:w%20rd@"))
        assert server.headers[0]["Authorization"] == "Basic bWU6dyByZA=="
        assert other.headers and not any("Authorization" in headers for headers in other.headers)
        other.shutdown()


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://host/x"])
def test_redirects_stay_in_the_web(server: Server, to: str) -> None:
    server.redirect["/set/train.tar"] = to
    with pytest.raises(RemoteError, match=r"is not (followed|allowed)"):
        local_copy(server.url("/set/train.tar"))


def test_a_redirect_that_never_ends(server: Server) -> None:
    server.redirect["/set/train.tar"] = "/set/train.tar"
    with pytest.raises(RemoteError, match="infinite loop"):
        local_copy(server.url("/set/train.tar"))


@pytest.mark.parametrize("name", ["/..%2f..%2fevil", "/a/%2e%2e", "/", "/x/.hidden", "/" + "n" * 300])
def test_no_name_leads_out_of_the_cache(server: Server, cache: Path, name: str) -> None:
    server.files[name] = CONTENT, '"e"'
    path = local_copy(server.url(name))
    assert path.parent.parent == cache and path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "said"),
    [(404, "is the name right"), (403, "access denied"), (401, "access denied"), (400, "not a file")],
)
def test_answers_that_will_not_change(server: Server, status: int, said: str) -> None:
    server.status = [status]
    with pytest.raises(RemoteError, match=rf"train\.tar: the server says {status}.*{said}"):
        local_copy(server.url("/set/train.tar?X-Amz-Signature=secret"))
    assert len(server.headers) == 1


def test_nobody_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.shutdown()
    server.server_close()
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"no connection to 127.0.0.1"):
        local_copy(server.url("/set/train.tar"))
    with pytest.raises(RemoteError, match=r"no connection to nowhere.invalid"):
        local_copy("https://nowhere.invalid/x.tar")
    assert time.monotonic() - began < 10


def test_a_server_that_comes_back(server: Server) -> None:
    server.status = [500, 503, 429, 200, 502, 500]
    with pytest.warns(UserWarning, match=r"train\.tar: the server says 429.*; trying again"):
        assert local_copy(server.url("/set/train.tar")).read_bytes() == CONTENT


def test_a_server_that_does_not_come_back() -> None:
    patience = Patience(minutes=0.02)
    with warnings.catch_warnings(), pytest.raises(Stalled, match=r"s3://b/x: 503; no byte for \d s; see whether"):
        warnings.simplefilter("ignore")
        for _ in range(100):
            patience.again(Passing("s3://b/x: 503"))


def test_a_server_that_is_silent_for_a_while(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_TIMEOUT", 0.2)
    server.silent = [1.0, 1.0]
    began = time.monotonic()
    assert local_copy(server.url("/set/train.tar")).read_bytes() == CONTENT
    assert time.monotonic() - began < 2


def test_a_file_system_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "_given_up", False)  # no thread is left: this process may end as others do
    with warnings.catch_warnings(), pytest.raises(Stalled) as error:
        Deadline("s3://bucket/x.tar?sig=secret", 0.1 / 60).result(Future(), lambda: "at byte 0")
    assert re.match(
        r"s3://bucket/x\.tar: nothing was read for 0\.1 s, since .*, at byte 0: the server does not answer; see "
        r"whether the server can be reached at all, then give the same command again$",
        str(error.value),
    )


def test_a_download_that_nobody_waits_for(server: Server, cache: Path) -> None:
    server.pause, stop = 0.02, threading.Event()
    with ThreadPoolExecutor(1) as pool:
        download = pool.submit(local_copy, server.url("/set/train.tar"), stop=stop)
        while not (parts := parts_of(cache)) or not parts[0].stat().st_size:
            time.sleep(0.01)
        stop.set()
        with pytest.raises(RemoteError, match="not wanted any more"):
            download.result(5)
    assert 0 < parts_of(cache)[0].stat().st_size < len(CONTENT)
    server.pause = 0.0
    assert local_copy(server.url("/set/train.tar")).read_bytes() == CONTENT
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    server.status = [503] * 100
    with pytest.raises(RemoteError, match="not wanted any more"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        local_copy(server.url("/set/other.tar"), stop=stop)


@pytest.mark.parametrize("ranges", [True, False])
def test_dropped_connections(server: Server, ranges: bool) -> None:
    server.ranges, server.drop_after = ranges, [100_000, 200_000, 5]
    assert local_copy(server.url("/set/train.tar")).read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_lies_about_the_length(server: Server, cache: Path, ranges: bool) -> None:
    server.ranges, server.lie = ranges, 1000
    with pytest.raises(RemoteError, match=r"ended after 512,000 of 513,000 bytes|416"):
        local_copy(server.url("/set/train.tar"))
    server.lie = 0
    assert local_copy(server.url("/set/train.tar")).read_bytes() == CONTENT


def test_a_file_that_changes_while_it_is_downloaded(server: Server, cache: Path) -> None:
    server.after = {"/set/train.tar": (CONTENT[::-1], '"two"')}
    assert local_copy(server.url("/set/train.tar")).read_bytes() == CONTENT[::-1]
    assert not parts_of(cache)


def test_a_file_that_changes_between_two_halves(server: Server) -> None:
    server.drop_after = [100_000]
    server.after = {"/set/train.tar": (CONTENT[::-1], '"two"')}
    assert local_copy(server.url("/set/train.tar")).read_bytes() == CONTENT[::-1]


def test_a_file_that_never_rests(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(100))
    monkeypatch.setattr(remote, "_version", lambda headers: str(next(count)))
    with pytest.raises(RemoteError, match="changes while it is downloaded"):
        local_copy(server.url("/set/train.tar"))


# ---- the cache


def test_the_bound_takes_the_least_recently_used(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSSL_CACHE_GB", "0.0011")  # two files
    for name in "abc":
        server.files[f"/{name}"] = CONTENT, '"e"'
    a, b = (local_copy(server.url(f"/{name}")) for name in "ab")
    assert local_copy(server.url("/b")) == b  # by two, who both have to let go
    release(b)
    with pytest.raises(RemoteError, match=r"/c: no room for its 0\.5 MB: .* holds 1\.0 MB of 1\.1 MB, all in use"):
        local_copy(server.url("/c"))
    release(a), release(b)
    release(local_copy(server.url("/a")))  # used last
    c = local_copy(server.url("/c"))
    assert a.exists() and c.exists() and not b.parent.exists()
    assert local_copy(server.url("/b")).exists() and not a.exists() and c.exists()  # c is in use


def test_a_file_larger_than_the_cache(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = local_copy(server.url("/set/train.tar"))
    release(kept)
    monkeypatch.setenv("FASTSSL_CACHE_GB", "0.0001")
    server.files["/large"] = CONTENT, '"e"'
    with pytest.raises(RemoteError, match=r"/large: 0\.5 MB, more than all of the cache .*FASTSSL_CACHE_GB allows"):
        local_copy(server.url("/large"))
    assert kept.exists()  # nothing is deleted for what cannot fit


def test_more_than_the_disk_has(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.ranges, server.lie = False, 10**17
    with pytest.raises(RemoteError, match="more than all of the cache"):
        local_copy(server.url("/set/train.tar"))
    monkeypatch.setenv("FASTSSL_CACHE_GB", "1e9")
    with pytest.raises(RemoteError, match="no room for its"):
        local_copy(server.url("/set/train.tar"))


def test_an_endless_file(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSSL_CACHE_GB", "0.0003")
    server.ranges = server.lengths = False
    with pytest.raises(RemoteError, match="longer than the server said"):
        local_copy(server.url("/set/train.tar"))


@pytest.mark.parametrize("text", ["nan", "-1", "much", "0"])
def test_a_size_that_is_none(text: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSSL_CACHE_GB", text)
    with pytest.raises(RemoteError, match=r"FASTSSL_CACHE_GB=.* is not a number"):
        local_copy(server.url("/set/train.tar"))


def test_a_disk_that_is_full(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_cache.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(RemoteError, match=r"train\.tar: cannot be kept here: No space left; FASTSSL_CACHE says"):
        local_copy(server.url("/set/train.tar"))


def test_a_folder_that_cannot_be_made(server: Server, cache: Path) -> None:
    cache.parent.write_text("in the way")
    with pytest.raises(RemoteError, match="cannot be kept here"):
        local_copy(server.url("/set/train.tar"))


def test_side_files_come_along(server: Server) -> None:
    server.files["/x.beton"], server.files["/x.beton.json"] = (CONTENT, '"e"'), (b"{}", '"s"')
    server.files["/y.beton"] = CONTENT, '"e"'
    path = local_copy(server.url("/x.beton?X-Amz-Signature=1"))
    assert Path(f"{path}.json").read_bytes() == b"{}"
    path = local_copy(server.url("/y.beton"))
    assert not Path(f"{path}.json").exists()


# ---- several processes

CHILD = """
import sys
from fastssl.utils.remote_cache import local_copy
print(local_copy(sys.argv[1]), flush=True)
"""


def child(url: str, then: str = "") -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", CHILD + then, url], text=True, **pipes)


def test_processes_download_once(server: Server) -> None:
    server.pause = 0.03
    children = [child(server.url("/set/train.tar")) for _ in range(2)]
    path = local_copy(server.url("/set/train.tar"))
    assert {one.communicate(timeout=60)[0].strip() for one in children} == {str(path)}
    assert server.asked["/set/train.tar"] == 1


@pytest.mark.parametrize("etag", ['"one"', None])
def test_a_killed_download_goes_on(server: Server, cache: Path, etag: str | None) -> None:
    server.files["/set/train.tar"], server.pause = (CONTENT, etag), 0.05
    killed = child(server.url("/set/train.tar"))
    while not (parts := parts_of(cache)) or parts[0].stat().st_size < 100_000:
        time.sleep(0.01)
        assert killed.poll() is None
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    server.pause, there = 0.0, parts[0].stat().st_size
    path = local_copy(server.url("/set/train.tar"))
    assert path.read_bytes() == CONTENT and not parts_of(cache)
    starts = [int(headers["Range"][6:].partition("-")[0]) for headers in server.headers]
    assert max(starts) == (there if etag else 0)


def test_what_another_process_has_stays_until_it_dies(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSSL_CACHE_GB", "0.0006")
    server.files["/b"] = CONTENT, '"b"'
    other = child(server.url("/set/train.tar"), then="sys.stdin.read()")
    path = Path(other.stdout.readline().strip())
    with pytest.raises(RemoteError, match="/b: no room for its"):
        local_copy(server.url("/b"))
    assert path.read_bytes() == CONTENT
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert local_copy(server.url("/b")).read_bytes() == CONTENT and not path.exists()


def test_what_a_killed_download_left_makes_room(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSSL_CACHE_GB", "0.0006")
    left = cache / f"{'0' * 20}-500000"
    left.mkdir(parents=True)
    (left / "old.tar.part").write_bytes(bytes(400_000))
    local_copy(server.url("/set/train.tar"))
    assert not left.exists()


# ---- fsspec


def test_a_file_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr(remote, "_PART", 100_000)
    system = fsspec.filesystem("memory")
    system.pipe_file("/bucket/x.tar", CONTENT)
    path = local_copy("memory://bucket/x.tar")
    assert path.name == "x.tar" and path.read_bytes() == CONTENT
    assert remote_file("memory://bucket/x.tar").read(3, 8) == CONTENT[3:8]
    with pytest.raises(RemoteError, match="a folder, not a file"):
        local_copy("memory://bucket")
    with pytest.raises(RemoteError, match=r"memory://bucket/y\.tar: no such file"):
        local_copy("memory://bucket/y.tar")
    shutil.rmtree(path.parent)
    monkeypatch.setattr(system, "cat_file", lambda path, start, end: CONTENT[start : min(end, 300_000)])
    with pytest.raises(FastSSLError, match=r"x\.tar: 0 of 100,000 bytes came from byte 300,000 on"):
        local_copy("memory://bucket/x.tar")
