"""Photos and ``.beton`` files on servers, through the commands: the same files and pixels as from this machine."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_server import Server
from PIL import Image
from s3_server import s3_server
from small_run import SMALL

from fastssl.cli import main
from fastssl.errors import BetonError
from fastssl.pipelines.beton.dataset import open_beton
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.beton.remote_set import said_of_all
from fastssl.pipelines.beton.streamed_set import StreamedSet
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.convert.sources import SourceError, list_source
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import ViewSpec
from fastssl.utils import remote_cache


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 photos of two classes, and what is passed over."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for k in range(6):
            picture = Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8))
            picture.save(folder / name / f"{k}.{'png' if k == 5 else 'jpg'}")
    (folder / "cat" / "notes.txt").write_text("none")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.jpg").write_bytes((folder / "cat" / "0.jpg").read_bytes())
    return folder


@pytest.fixture(scope="module")
def local(photos: Path) -> Path:
    """The photos, converted on this machine."""
    convert(photos, photos.parent / "local.beton")
    return photos.parent / "local.beton"


@pytest.fixture(scope="module")
def s3(photos: Path) -> Iterator[Any]:
    """An S3 on this machine that holds the photos; the file system of it."""
    with s3_server() as system:
        for path in filter(Path.is_file, photos.rglob("*")):
            system.pipe_file(f"bucket/set/photos/{path.relative_to(photos)}", path.read_bytes())
        yield system


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    while remote_cache._held:
        remote_cache.release(next(iter(remote_cache._held)))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        yield found
        found.shutdown()


@pytest.fixture
def fastssl(capfd: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a command, which is to end with ``status``; what it said on both streams."""

    def run(*words: object, status: int = 0) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert left.value.code == status, out + err
        return out + err

    return run


def tar_of(folder: Path) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.add(folder, folder.name)
    return file.getvalue()


def test_a_folder_of_s3_gives_the_same_file(fastssl: Callable, s3: Any, local: Path, tmp_path: Path) -> None:
    said = fastssl("convert-imagenet", "s3://bucket/set/photos/", tmp_path / "x.beton")
    assert "12 photos, 2 classes" in said
    assert (tmp_path / "x.beton").read_bytes() == local.read_bytes()
    side = json.loads((tmp_path / "x.beton.json").read_text())
    assert (side["source"], side["classes"]) == ("photos", ["cat", "dog"])
    # Its objects were read one by one: nothing of it is kept.
    assert not list((tmp_path / "cache").rglob("*.jpg"))


def test_an_object_that_changes_is_another_source(s3: Any, photos: Path) -> None:
    def fingerprint() -> str:
        with list_source("s3://bucket/other/") as listing:
            return listing.fingerprint

    content = (photos / "cat" / "0.jpg").read_bytes()
    s3.pipe_file("bucket/other/0.jpg", content)
    first = fingerprint()
    assert fingerprint() == first
    s3.pipe_file("bucket/other/0.jpg", content[:-1] + b"\xd8")
    assert fingerprint() != first
    with list_source("s3://bucket/other") as listing:
        s3.pipe_file("bucket/other/0.jpg", content + b"more")
        with pytest.raises(SourceError, match="changed while it was being converted"):
            listing.read(0)


def test_login_that_runs_out_ends_a_conversion(
    fastssl: Callable, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(self: object, path: str, **span: object) -> bytes:
        raise PermissionError(f"ExpiredToken: {path}")

    with monkeypatch.context() as patch:
        patch.setattr(type(s3), "_cat_file", read)
        type(s3).clear_instance_cache()  # its methods were bound when it was made
        said = fastssl("convert-imagenet", "s3://bucket/set/photos", tmp_path / "x.beton", status=1)
    type(s3).clear_instance_cache()
    assert "access denied (ExpiredToken" in said and not (tmp_path / "x.beton").exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("s3://bucket/nothing/", "no such file on the server"),
        ("s3://no-bucket/x.tar", "no such file on the server"),
        ("HOST/photos/", "a web server has no list of the files"),
        ("HOST/x.tar?X-Amz-Signature=secret", "404"),
        ("ftp+x://host/x.tar", "ftp"),
    ],
)
def test_sources_that_are_not_there(
    fastssl: Callable, s3: Any, server: Server, tmp_path: Path, source: str, said: str
) -> None:
    source = source.replace("HOST", server.url(""))
    found = fastssl("convert-imagenet", source, tmp_path / "x.beton", status=1)
    assert said in found and "Traceback" not in found and "secret" not in found


def test_an_archive_of_a_web_server(
    fastssl: Callable, server: Server, photos: Path, local: Path, tmp_path: Path
) -> None:
    server.files["/photos.tar"] = tar_of(photos), '"one"'
    url = server.url("/photos.tar?X-Amz-Signature=secret")
    said = fastssl("convert-imagenet", url, tmp_path / "x.beton")
    assert "12 photos, 2 classes" in said
    with BetonReader(tmp_path / "x.beton") as found, BetonReader(local) as wanted:
        assert found.labels.tolist() == wanted.labels.tolist()
        assert all(np.array_equal(found.decode(i), wanted.decode(i)) for i in range(12))
    assert "secret" not in said + (tmp_path / "x.beton.json").read_text()


@pytest.mark.slow
def test_training_on_photos_of_a_server(fastssl: Callable, server: Server, photos: Path, tmp_path: Path) -> None:
    server.files["/photos.tar"] = tar_of(photos), '"one"'
    changes = [word for change in [*SMALL, "train.epochs=1", "train.batch_size=4"] for word in ("--set", change)]
    small = ("--recipe", "few-photos-moco", *changes, "--workers", 1, "--data", server.url("/photos.tar?token=secret"))
    said = fastssl("pretrain", *small, "--out", tmp_path / "one")
    assert "12 photos, 2 classes" in said and "secret" not in said
    said = fastssl("views", small[-1], "--recipe", "few-photos-moco", "--set", SMALL[1], "--out", tmp_path / "x.png")
    assert server.asked["/photos.tar"] == 1
    for path in filter(Path.is_file, (tmp_path / "one").rglob("*")):
        assert b"token=secret" not in path.read_bytes(), path


def test_commands_on_a_file_of_a_server(fastssl: Callable, server: Server, local: Path, tmp_path: Path) -> None:
    server.files["/set/train.beton"] = local.read_bytes(), '"b"'
    server.files["/set/train.beton.json"] = Path(f"{local}.json").read_bytes(), '"s"'
    url = server.url("/set/train.beton")
    said = fastssl("verify", url, "--decode", "all", "--json", tmp_path / "verify.json")
    assert f"\n{url}: 12 samples" in f"\n{said}" and fastssl("data", url).startswith(f"{url}: photos: 12")
    assert "12 samples, tables in order, 12 checksums compared, 12 decoded" in said
    assert json.loads((tmp_path / "verify.json").read_text())["path"] == "train.beton"
    fastssl("views", url, "--recipe", "quickstart", "--out", tmp_path / "views.png", "--samples", 1)
    assert server.asked["/set/train.beton"] == 1


def test_where_an_address_has_no_place(fastssl: Callable, tmp_path: Path) -> None:
    found = fastssl("convert-imagenet", tmp_path, "s3://me:secret@bucket/x.beton", status=2)
    assert "has to be a path of this machine" in found and "secret" not in found


@pytest.fixture(scope="module")
def shards(local: Path, photos: Path) -> list[Path]:
    """Some of the photos as three files."""
    files = [local.with_name(f"part-{k:05d}-of-00003.beton") for k in range(3)]
    for k, file in enumerate(files):
        convert(photos, file, ConvertOptions(limit=4 + 2 * k))
    return files


def same_samples(one: BetonReader, other: BetonReader) -> bool:
    pairs = ((one.decode(i), other.decode(i)) for i in range(len(other)))
    return len(one) == len(other) and all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.parametrize("name", ["part-*-of-00003.beton", "", "part-{00000..00002}-of-00003.beton"])
def test_a_set_of_s3(s3: Any, shards: list[Path], name: str) -> None:
    for file in shards:
        for one in (file, Path(f"{file}.json")):
            s3.pipe_file(f"bucket/betons/{one.name}", one.read_bytes())
    with open_beton(f"s3://bucket/betons/{name}") as found, open_beton(shards) as wanted:
        assert same_samples(found, wanted)
        assert found.classes == wanted.classes
        assert [file.name for file in found.files] == [file.name for file in shards]


def test_a_set_of_a_web_server(server: Server, shards: list[Path]) -> None:
    for file in shards:
        server.files[f"/{file.name}"] = file.read_bytes(), '"e"'
        server.files[f"/{file.name}.json"] = Path(f"{file}.json").read_bytes(), '"e"'
    with open_beton(server.url("/part-{00000..00002}-of-00003.beton")) as found:
        assert len(found) == sum(len(BetonReader(file)) for file in shards)
    with pytest.raises(BetonError, match=r"part-00002-of-00003\.beton: is missing"):
        open_beton(server.url("/part-{00000..00001}-of-00003.beton"))
    with pytest.raises(BetonError, match="a web server has no list of its files; give numbers in braces"):
        open_beton(server.url("/part-*.beton"))


def batches(data: object, window: int | None = 1, epochs: int = 2) -> list[tuple[list[int], bytes]]:
    views = [ViewSpec(size=32, count=1)]
    with ViewLoader(data, views, batch_size=1, workers=1, window=window, drop_last=False) as loader:
        return [
            (batch.index.tolist(), batch.views[0].numpy().tobytes())
            for epoch in range(epochs)
            for batch in loader.epoch(epoch)
        ]


def test_a_set_larger_than_the_cache(
    server: Server, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    files = [tmp_path / f"part-{k}.beton" for k in range(6)]
    for k, file in enumerate(files):
        file.write_bytes(local.read_bytes())
        server.files[f"/{file.name}"] = local.read_bytes(), f'"{k}"'
    url, size = server.url("/part-{0..5}.beton?token=secret"), local.stat().st_size
    wanted = batches(files)

    def there() -> int:  # files come and go meanwhile
        paths = [Path(folder, name) for folder, _, names in os.walk(cache) for name in names if ".beton" in name]
        return sum(remote_cache._size(path) for path in paths)

    monkeypatch.setenv("FASTSSL_CACHE_GB", str(3.5 * size / 1e9))
    seen: list[int] = []
    hold = StreamedSet.hold
    monkeypatch.setattr(StreamedSet, "hold", lambda self, files: seen.append(there()) or hold(self, files))
    assert batches(url) == wanted
    assert max(seen) <= 3.5 * size and not remote_cache._held
    # Twice each but for those that were still there when the second epoch began; none is fetched to be thrown away.
    asked = [server.asked[f"/{file.name}"] for file in files]
    assert 8 <= sum(asked) <= 12 and max(asked) <= 2

    with pytest.raises(BetonError, match=r"12\.8 MB, and the cache may hold 7\.5 MB: .*train\.window=FILES") as error:
        batches(url, window=None)
    assert "secret" not in str(error.value)
    with pytest.raises(BetonError, match=r"train\.window=2: 5 files have to be here at once, 10\.7 MB, and"):
        batches(url, window=2)
    with open_beton(url) as streamed:
        identity = streamed.table_checksums(), streamed.photo_checksum()
    monkeypatch.setenv("FASTSSL_CACHE_GB", "1")
    assert batches(url, window=None) == batches(files, window=None)
    with open_beton(url) as whole:  # a run that was begun with the smaller cache goes on
        assert not whole.streamed and (whole.table_checksums(), whole.photo_checksum()) == identity


def test_samples_that_judge_a_set_larger_than_the_cache(server: Server, local: Path, cache: Path) -> None:
    for k in range(3):
        server.files[f"/part-{k}.beton"] = local.read_bytes(), f'"{k}"'
    names = [server.url(f"/part-{k}.beton") for k in range(3)]
    said = said_of_all(names)
    with StreamedSet(names, said, Path("x")) as found:
        assert (len(found), found.some().tolist()) == (36, list(range(12)))
        assert all(found.table_checksums().values()) and found.photo_checksum() == 0
        assert len(list(cache.rglob("*.beton"))) == 1  # nothing else was asked for
    server.files["/part-1.beton"] = b"no header", '"x"'
    with pytest.raises(BetonError, match=r"part-1\.beton: not a \.beton file"):
        StreamedSet(names, said, Path("x"))


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_downloads(server: Server, local: Path, cache: Path) -> None:
    for k in range(6):
        server.files[f"/part-{k}.beton"] = local.read_bytes(), f'"{k}"'
    server.pause = 1.0
    command = [sys.executable, "-m", "fastssl", "data", server.url("/part-{0..5}.beton")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not any(part.stat().st_size for part in cache.rglob("*.part")):
        assert child.poll() is None
        time.sleep(0.05)
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert time.monotonic() - began < 15  # a whole file takes over two minutes


def test_a_folder_of_s3_in_the_place_of_a_file(fastssl: Callable, s3: Any, tmp_path: Path, cache: Path) -> None:
    for said in ("12 photos, 2 classes, now also in", "converted before"):
        found = fastssl("views", "s3://bucket/set/photos/", "--recipe", "quickstart", "--out", tmp_path / "x.png")
        assert f"s3://bucket/set/photos: {said}" in found
    assert [path.name[:7] for path in (cache / "photos").glob("*.beton")] == ["photos-"]
