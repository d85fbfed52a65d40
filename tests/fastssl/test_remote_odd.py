"""Odd names, odd answers and sets that change, on servers: right bytes, or a line that says why not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from file_server import Server
from s3_server import s3_server

from fastssl.errors import BetonError, FastSSLError
from fastssl.pipelines.beton.dataset import open_beton
from fastssl.pipelines.beton.remote_set import at_once, remote_names, said_of_all
from fastssl.pipelines.beton.streamed_set import StreamedSet
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils import remote_cache
from fastssl.utils.addresses import shown
from fastssl.utils.remote import Patience, RemoteError, remote_file
from fastssl.utils.remote_cache import _evict, local_copy

FILES, PHOTOS = 6, 12


def beton(path: Path, first: int) -> bytes:
    with BetonWriter(path, PHOTOS) as writer:
        for k in range(first, first + PHOTOS):
            writer.add(bytes([k % 256]) * 3 * 64 * 64, 64, 64, mode=1)
    return path.read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    for k in range(FILES):
        beton(folder / f"p{k}.beton", PHOTOS * k)
    return sorted(folder.iterdir())


@pytest.fixture
def server(files: list[Path]) -> Iterator[Server]:
    with Server() as found:
        for file in files:
            found.files[f"/{file.name}"] = file.read_bytes(), f'"{file.name}"'
        yield found
        found.shutdown()


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    with s3_server() as system:
        yield system


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[Path]) -> Iterator[Path]:
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTSSL_CACHE_GB", "1")
    yield tmp_path / "cache"
    while remote_cache._held:
        remote_cache.release(next(iter(remote_cache._held)))


# ---- names


@pytest.mark.parametrize("name", ["a b", "ü", "a#1", "a%20b", "a+b", "x[1]", "a@b", "a::file:///etc/passwd"])
def test_any_key_of_s3(s3: Any, files: list[Path], name: str) -> None:
    s3.pipe_file(f"bucket/{name}.beton", files[0].read_bytes())
    s3.pipe_file(f"bucket/{name}.beton.json", b'{"bytes": 1, "of": "this one"}')
    path = local_copy(f"s3://bucket/{name}.beton")
    assert path.read_bytes() == files[0].read_bytes() and path.suffix == ".beton"
    assert b"this one" in Path(f"{path}.json").read_bytes()


def test_spaces_and_other_scripts_in_addresses_of_the_web(server: Server, files: list[Path]) -> None:
    server.files["/%C3%BC%20x.tar"] = b"abc", None
    for path in ("/ü x.tar", "/%C3%BC%20x.tar"):
        assert local_copy(server.url(path)).read_bytes() == b"abc"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://user:p/w@host:80/x", "http://host:80/x"),
        ("http://user:p@ss@host/x?sig=1", "http://host/x"),
        ("http://us er:sec ret@host/x", "http://host/x"),
        ("cannot read http://user:p/w@host/x today", "cannot read http://host/x today"),
        ("https://host:8080/a@b/c", "https://host:8080/a@b/c"),
        ("hf://datasets/u/x@main/t", "hf://datasets/u/x@main/t"),
        ("http://host/x and me@home", "http://host/x and me@home"),
    ],
)
def test_passwords_that_were_not_quoted_are_not_shown(text: str, said: str) -> None:
    assert shown(text) == said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://user:hidd/en@127.0.0.1/x.beton", "no such address; in a password / is written %2F, @ %40"),
        ("http://[::1/x.beton", "Invalid IPv6 URL"),
        ("s3://KEY:secret@bucket/x.beton", "s3://bucket/x.beton: a bucket's name has no @, and takes no login"),
        ("http://127.0.0.1/x{0..99999999999}.beton", "stands for more than 1,000,000 files"),
    ],
)
def test_addresses_that_are_none(url: str, said: str) -> None:
    with pytest.raises(FastSSLError) as error:
        open_beton(url)
    assert said in str(error.value)
    assert not any(secret in str(error.value) for secret in ("hidd", "en@", "secret", "KEY"))


def test_a_shard_of_a_bucket_is_missing(s3: Any) -> None:
    s3.pipe_file("bucket/part/t-00000-of-00002.beton", b"x")
    with pytest.raises(BetonError, match=r"^s3://bucket/part/t-00001-of-00002\.beton: is missing"):
        open_beton("s3://bucket/part/")


# ---- answers


def test_what_comes_packed(server: Server) -> None:
    server.packed, server.files["/x.tar.gz"] = "gzip", (b"\x1f\x8b", None)
    with pytest.raises(RemoteError, match=r"p0\.beton: the server sends it packed \(gzip\), not as it was asked to"):
        local_copy(server.url("/p0.beton"))
    assert local_copy(server.url("/x.tar.gz")).read_bytes() == b"\x1f\x8b"  # as many servers say of such files


def test_class_names_are_evicted_last(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/p0.beton.json"] = b"{}", None
    path, gone = local_copy(server.url("/p0.beton")), list[str]()
    remote_cache.release(path)
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, **how: gone.append(self.name) or unlink(self, **how))
    assert _evict(path.parent) and not path.parent.exists()
    assert gone == ["lock", "p0.beton", "p0.beton.json"]  # killed between any two, no file is whole without its names


# ---- sets larger than the cache


def seen(data: object, size: int, between: Any = None, window: int = 1, **how: Any) -> list[tuple[list[int], bytes]]:
    views, found = [ViewSpec(size=32, count=1)], []
    with ViewLoader(data, views, batch_size=size, workers=2, window=window, **how) as loader:
        for epoch in range(3):
            found += [(one.index.tolist(), one.views[0].numpy().tobytes()) for one in loader.epoch(epoch)]
            if between is not None:
                between()
    return found


@pytest.mark.parametrize(
    ("size", "window", "room", "how"),
    [(2, 1, 3, {}), (3, 1, 4, {}), (5, 1, 5, {}), (3, 2, 5, {}), (5, 1, 5.5, {"world": 2, "rank": 1})],
)
def test_batches_that_reach_over_several_files(
    size: int, window: int, room: float, how: dict, server: Server, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    many, bytes_ = server.url("/p{0..5}.beton"), files[0].stat().st_size
    monkeypatch.setenv("FASTSSL_CACHE_GB", str((room + 0.1) * bytes_ / 1e9))
    if how:  # two processes' batches reach further
        with pytest.raises(BetonError, match=r"6 files have to be here at once, .* or a smaller batch"):
            seen(many, size, window=window, **how)
    else:
        assert seen(many, size, window=window) == seen(files, size, window=window)
        monkeypatch.setenv("FASTSSL_CACHE_GB", str((room - 0.1) * bytes_ / 1e9))
        with pytest.raises(BetonError, match=f"{room} files have to be here at once"):
            seen(many, size, window=window)


def test_epochs_that_are_left(server: Server, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSSL_CACHE_GB", str(3.1 * files[0].stat().st_size / 1e9))
    server.pause = 0.001
    views = [ViewSpec(size=32, count=1)]
    with ViewLoader(server.url("/p{0..5}.beton"), views, batch_size=1, workers=2, window=1) as loader:
        for epoch in range(6):
            batches = loader.epoch(epoch, start_step=17 * epoch % 70)
            next(batches)
            batches.close()


def test_a_file_that_changes_between_two_epochs(
    server: Server, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSSL_CACHE_GB", str(3.5 * files[0].stat().st_size / 1e9))

    def change() -> None:
        for k in range(1, FILES):
            server.files[f"/p{k}.beton"] = beton(tmp_path / "new.beton", 100 + k), '"new"'

    with pytest.raises(RemoteError, match=r"p\d\.beton: was replaced since the set was opened; start again"):
        seen(server.url("/p{0..5}.beton"), 1, change)


def test_a_set_of_other_sizes_is_another_one(server: Server, files: list[Path]) -> None:
    names = remote_names(server.url("/p{0..5}.beton"))
    with StreamedSet(names, said_of_all(names), Path("x")) as found:
        before = found.table_checksums()
    content, etag = server.files["/p5.beton"]
    server.files["/p5.beton"] = content + bytes(24), etag
    with StreamedSet(names, said_of_all(names), Path("x")) as found:
        assert found.table_checksums() != before


def test_a_set_of_a_server_is_compared_with_one_of_here(server: Server, files: list[Path]) -> None:
    names = remote_names(server.url("/p{0..5}.beton"))
    with StreamedSet(names, said_of_all(names), Path("x")) as far, open_beton(files) as here:
        assert (far.is_same(here), here.is_same(far), far.is_same(far)) == (False, False, True)


def test_nobody_waits_for_others_where_one_is_missing(server: Server) -> None:
    server.status = [503] * 1000  # those that are asked again and again
    with pytest.raises(RemoteError, match="no such host: the others stop, too"):
        at_once(asked, ["missing", server.url("/p0.beton")])
    ended = time.monotonic() + 10
    while threads := [one for one in threading.enumerate() if one.name.startswith("fastssl-remote")]:
        assert time.monotonic() < ended, threads
        time.sleep(0.05)


def asked(name: str, stop: threading.Event) -> int | None:
    if name == "missing":
        raise RemoteError("no such host: the others stop, too")
    return Patience(stop).ask(remote_file(name).about).size
