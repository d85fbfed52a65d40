from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.cli import main
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.convert.conversion import convert, rejects_path
from fastssl.pipelines.convert.options import ConvertError, ConvertOptions, ConvertSummary
from fastssl.pipelines.convert.shards import shard_path
from fastssl.pipelines.convert.splits import convert_splits
from fastssl.pipelines.convert.unfinished import reserve


def convert_shards(
    src: Path,
    dst: Path,
    count: int,
    options: ConvertOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    only: int | None = None,
) -> ConvertSummary:
    (summary,) = convert_splits(src, dst, options, progress, shards=(only, count))
    return summary


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 photos of three classes, of which three are damaged and two more no plain photos."""
    root = tmp_path_factory.mktemp("shards") / "photos"
    for k in range(23):
        path = root / "abc"[k * 3 // 23] / f"{k:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        out = io.BytesIO()
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (20 + k, 24, 3), np.uint8)).save(out, "JPEG")
        path.write_bytes(b"bad" if k in (4, 11, 12) else out.getvalue())
    for name in ("x.jpg", "y.jpg"):
        (root / "c" / name).symlink_to(root / "nowhere")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stored(path: Path) -> list[tuple[bytes, int]]:
    with BetonReader(path) as reader:
        assert reader.labels is not None and reader.classes == ["a", "b", "c"]
        return [(reader.encoded(i).tobytes(), int(reader.labels[i])) for i in range(len(reader))]


def rejected(path: Path) -> list[str]:
    lines = rejects_path(path).read_text().splitlines() if rejects_path(path).exists() else []
    return [json.loads(line)["path"] for line in lines]


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    convert_shards(photos, folder / "set.beton", 4, ConvertOptions(workers=2))
    return folder


def test_photo_k_is_in_file_k_modulo_n(photos: Path, whole: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    summary = convert_shards(photos, tmp_path / "set.beton", 4, None, lambda *call: calls.append(call))
    one = convert(photos, tmp_path / "one.beton")
    assert summary.path == tmp_path / "set-*-of-00004.beton"
    assert [path.name for path in summary.files] == [f"set-0000{k}-of-00004.beton" for k in range(4)]
    assert (summary.written, summary.rejected, summary.resumed) == (one.written, one.rejected, 0) == (20, 5, 0)
    assert summary.copied + summary.reencoded == summary.written and summary.classes == one.classes
    assert summary.passed_over == one.passed_over
    assert summary.bytes == sum(path.stat().st_size for path in summary.files)
    assert calls == sorted(calls) and calls[0] == (0, 23) and calls[-1] == (23, 23)

    everything = iter(stored(tmp_path / "one.beton"))
    in_order = [None if k in (4, 11, 12) else next(everything) for k in range(23)]
    for k, path in enumerate(summary.files):
        assert stored(path) == [photo for photo in in_order[k::4] if photo]
    names = [name for path in summary.files for name in rejected(path)]
    assert sorted(names) == sorted(rejected(tmp_path / "one.beton")) and len(names) == 5
    for path in tmp_path.glob("one.beton*"):
        path.unlink()
    assert contents(tmp_path) == contents(whole)


def test_hosts_that_make_one_file_each_make_the_same_set(photos: Path, whole: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in (2, 0, 3, 1):
            summary = convert_shards(photos, tmp_path / "set.beton", 4, only=k)
            assert summary.path == summary.files[0] == shard_path(tmp_path / "set.beton", k, 4)
    assert contents(tmp_path) == contents(whole)


def test_limit_counts_over_the_whole_source(photos: Path, tmp_path: Path) -> None:
    options = ConvertOptions(limit=8)
    parts = [convert_shards(photos, tmp_path / "set", 4, options, only=k) for k in range(4)]
    convert(photos, tmp_path / "one.beton", options)
    assert [part.written + len(set(rejected(part.path)) - {"c/x.jpg", "c/y.jpg"}) for part in parts] == [2] * 4
    assert sorted(photo for part in parts for photo in stored(part.path)) == sorted(stored(tmp_path / "one.beton"))


def stop_after(photos: int) -> Callable[[int, int], None]:
    def progress(done: int, _: int) -> None:
        if done >= photos:
            raise KeyboardInterrupt

    return progress


def test_what_is_finished_stays_and_what_was_stopped_goes_on(
    photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastssl.pipelines.convert.conversion.CHECKPOINT_SECONDS", 0.0)
    dst, options = tmp_path / "set.beton", ConvertOptions(workers=1)
    with pytest.raises(KeyboardInterrupt):
        convert_shards(photos, dst, 4, options, stop_after(13))  # behind the third file's first photo
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.beton")}
    assert [path.name for path in sorted(there)] == ["set-00000-of-00004.beton", "set-00001-of-00004.beton"]
    summary = convert_shards(photos, dst, 4, options)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert contents(tmp_path) == contents(whole)
    assert (summary.written, summary.rejected) == (20, 5) and summary.resumed >= 12
    assert summary.bytes == sum(path.stat().st_size for path in summary.files)
    again = convert_shards(photos, dst, 4, options)
    assert again.resumed == 25 and again.written == 20 and again.scaled == summary.scaled
    assert convert_shards(photos, dst, 4, ConvertOptions(resume=False)).resumed == 0


def test_a_journal_of_another_part_is_not_gone_on_with(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastssl.pipelines.convert.conversion.CHECKPOINT_SECONDS", 0.0)
    one, other = (ConvertOptions(limit=22, part=(k, 2)) for k in range(2))
    with pytest.raises(KeyboardInterrupt):
        convert(photos, tmp_path / "x.beton", one, stop_after(1))
    assert convert(photos, tmp_path / "x.beton", other).resumed == 0
    assert "starting again" in caplog.text


@pytest.mark.parametrize("harm", ["cut", "swapped", "renamed", "no side file", "other options", "other photos"])
def test_a_file_that_is_not_what_would_be_made_is_made_again(
    photos: Path, whole: Path, tmp_path: Path, harm: str
) -> None:
    dst = tmp_path / "set.beton"
    first, options = shard_path(dst, 0, 4), ConvertOptions()
    convert_shards(photos, dst, 4, ConvertOptions(quality=50) if harm == "other options" else options)
    if harm == "cut":
        os.truncate(first, first.stat().st_size - 24)
    elif harm in ("swapped", "renamed"):
        first.write_bytes(shard_path(dst, 1, 4).read_bytes())
        if harm == "renamed":
            first.with_name(first.name + ".json").write_bytes((tmp_path / "set-00001-of-00004.beton.json").read_bytes())
    elif harm == "no side file":
        first.with_name(first.name + ".json").unlink()
    elif harm == "other photos":
        side = first.with_name(first.name + ".json")
        side.write_text(json.dumps({**json.loads(side.read_text()), "fingerprint": "0"}))
    convert_shards(photos, dst, 4, options)
    assert contents(tmp_path) == contents(whole)


def test_a_file_of_other_photos_beside_it_is_told(photos: Path, tmp_path: Path) -> None:
    dst = tmp_path / "set.beton"
    convert_shards(photos, dst, 4, ConvertOptions(limit=20), only=1)
    with pytest.warns(UserWarning, match=r"set-00001-of-00004\.beton: 1 file made .* than set-00003-of-00004\.beton;"):
        convert_shards(photos, dst, 4, only=3)
    with pytest.warns(UserWarning, match=r"set-00003"):
        convert_shards(photos, dst, 4, ConvertOptions(limit=20), only=2)
    with pytest.warns(UserWarning, match=r"set-00001-of-00004\.beton: 2 files made of other"):
        convert_shards(photos, dst, 4, only=3)


def test_two_conversions_of_one_file(photos: Path, tmp_path: Path) -> None:
    dst = tmp_path / "set.beton"
    with reserve(shard_path(dst, 1, 4)), pytest.raises(ConvertError, match="another conversion is writing it"):
        convert_shards(photos, dst, 4, only=1)
    with reserve(shard_path(dst, 1, 4)):
        convert_shards(photos, dst, 4, only=0)


def test_bad_photos_fail_where_they_are(photos: Path, tmp_path: Path) -> None:
    options = ConvertOptions(on_bad="fail")
    convert_shards(photos, tmp_path / "set.beton", 6, options, only=2)
    with pytest.raises(ConvertError, match=r"04\.jpg"):
        convert_shards(photos, tmp_path / "set.beton", 6, options, only=4)
    convert_shards(photos, tmp_path / "set.beton", 6, only=4)
    with pytest.raises(ConvertError, match=r"04\.jpg"):  # nor is what was finished with others good enough
        convert_shards(photos, tmp_path / "set.beton", 6, options, only=4)
    with pytest.raises(ConvertError, match=r"c/x\.jpg"):
        convert_shards(photos, tmp_path / "set.beton", 6, options, only=0)


def test_files_must_not_be_empty_and_parts_must_exist(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="23 photos for 24 files; make 23 at most"):
        convert_shards(photos, tmp_path / "set.beton", 24)
    with pytest.raises(ConvertError, match="1 photo for 2 files; make 1 at most"):
        convert_shards(photos, tmp_path / "set.beton", 2, ConvertOptions(limit=1))
    with pytest.raises(ConvertError, match=r"i of 0 \.\. N - 1"):
        ConvertOptions(part=(4, 4))
    (tmp_path / "set-00001-of-00002.beton").mkdir()
    with pytest.raises(ConvertError, match=r"set-00001-of-00002\.beton: is a folder"):
        convert_shards(photos, tmp_path / "set.beton", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["set-00001-of-00002.beton"]


def test_the_command(photos: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def run(*arguments: object) -> int:
        with pytest.raises(SystemExit) as stop:
            main(["convert-imagenet", str(photos), str(tmp_path / "set.beton"), *map(str, arguments)])
        return int(stop.value.code or 0)

    assert run("--shard", "1/4") == 0
    assert run("--shards", 4, "--json", "-") == 0
    said = capsys.readouterr()
    record = json.loads(said.out)
    assert record["path"] == "set-*-of-00004.beton" and record["written"] == 20
    assert record["files"] == [f"set-0000{k}-of-00004.beton" for k in range(4)]
    assert "set-*-of-00004.beton: 20 photos, 3 classes" in said.err
    assert "5 rejected (see" in said.err and "set-*-of-00004.beton.rejects.jsonl)" in said.err
    assert contents(tmp_path) == contents(whole)
    for text in ("4/4", "3", "3/", "/4", "-1/4", "0/0", "1/100000", "a/b", "1/2/3", ""):
        assert run("--shard", text) == 2
        said = " ".join(capsys.readouterr().err.replace("│", "").split())
        assert f"{text}: write I/N, I counted from 0: of 64 files 0/64 is the first, 63/64 the last" in said
    for wrong in (["--shards", 4, "--shard", "0/4"], ["--shards", 0]):
        assert run(*wrong) == 2
