"""The converter's benchmark, its bare loops, its peer, and ``fastssl bench convert``."""

from __future__ import annotations

import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import jpeg_bytes, make_photo, need_engine
from lines import to_line

from fastssl.benchmarks.harness.records import Record, read_records
from fastssl.benchmarks.harness.setting import Setting
from fastssl.benchmarks.harness.table import cells
from fastssl.benchmarks.suites import convert as bench_convert
from fastssl.benchmarks.suites.convert import MODES, BareLoop, Convert, bare_copy, run, write_tree
from fastssl.cli import main
from fastssl.cli.bench import bench
from fastssl.errors import FastSSLError
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.convert import conversion as converter
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.encode import encode_photo
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.convert.sources import Listing, list_source
from fastssl.pipelines.ops import jpeg

SMALL = ConvertOptions(short_side=40, workers=2, resume=False)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each photo of a listing was read."""
    made: Counter = Counter()
    real = Listing.read

    def spy(self: Listing, number: int) -> bytes:
        made[self.names[number]] += 1
        return real(self, number)

    monkeypatch.setattr(Listing, "read", spy)
    return made


def test_the_synthetic_tree_holds_the_cached_jpegs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beton: Path
) -> None:
    monkeypatch.setattr(bench_convert, "ensure_photos", lambda count: beton)
    write_tree(tmp_path, 48)
    with BetonReader(beton) as reader, list_source(tmp_path) as listing:
        assert len(listing) == len(reader) == 48 and len(listing.classes) == len(set(reader.labels.tolist())) == 3
        for number, name in enumerate(listing.names):
            sample = int(Path(name).stem)
            assert listing.read(number) == reader.encoded(sample).tobytes()
            assert listing.labels[number] == reader.labels[sample]


def test_copy_mode_copies_byte_for_byte_and_each_run_is_whole(
    photo_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def spy(source: Path, path: Path, options: ConvertOptions):
        assert not path.exists() and list(path.parent.iterdir()) == []  # a fresh place, nothing to go on from
        summary = convert(source, path, options)
        with BetonReader(path) as reader, list_source(source) as listing:
            found.append(
                sum(reader.encoded(number).tobytes() == listing.read(number) for number in range(len(listing)))
            )
        return summary

    monkeypatch.setattr(bench_convert, "convert", spy)
    ours = Convert(photo_tree, 48, ConvertOptions(resume=False, **MODES["copy"]), tmp_path)
    windows = [ours(1.0), ours(1.0)]
    assert found == [48, 48] and ours.last.copied == 48 and ours.last.resumed == 0
    assert all(window.samples == 48 and window.seconds > 0 and window.cpu_s > 0 for window in windows)
    assert list(tmp_path.iterdir()) == []


def test_the_bare_copy_writes_every_byte_to_the_disk(
    photo_tree: Path, tmp_path: Path, reads: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []

    def fsync(handle: int) -> None:
        synced.append(bench_convert.os.pread(handle, 1 << 30, 0))

    with list_source(photo_tree) as listing:
        chosen = list(range(0, 48, 2))
        expected = b"".join((photo_tree / listing.names[number]).read_bytes() for number in chosen)
        monkeypatch.setattr(bench_convert.os, "fsync", fsync)
        assert bare_copy(listing, chosen, tmp_path, 1.0).samples == 24
        assert reads == Counter(listing.names[number] for number in chosen)
    assert synced == [expected] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_the_bare_loop_does_the_converters_work_on_every_photo(
    photo_tree: Path, reads: Counter, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Each photo once, and the JPEGs that it drops are those that the converter stores."""
    made: list[bytes] = []
    real = jpeg.encode
    with list_source(photo_tree) as listing:
        expected = [encode_photo(listing.read(number), SMALL).data for number in range(48)]
        reads.clear()
        monkeypatch.setattr(jpeg, "encode", lambda rgb, quality: made.append(real(rgb, quality)) or made[-1])
        loop = BareLoop(listing, list(range(48)), SMALL, threads)
        window = loop(1.0)
        assert window.samples == 48 and window.host_cpu_s > 0
        assert reads == Counter(listing.names) and sorted(made) == sorted(expected)
    assert list(loop.shares) == ["reading", "decoding", "scaling", "encoding"] and sum(
        loop.shares.values()
    ) == pytest.approx(1)


def test_the_bare_loop_decodes_large_photos_as_the_converter_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than four times too large: reduced in the decoder, first."""
    (tmp_path / "large.jpg").write_bytes(jpeg_bytes(make_photo(3, 300, 420)))
    (tmp_path / "other.png").write_bytes(jpeg_bytes(make_photo(4, 100, 90)))
    made: list[bytes] = []
    real = jpeg.encode
    with list_source(tmp_path) as listing:
        expected = [encode_photo(listing.read(number), SMALL).data for number in range(2)]
        monkeypatch.setattr(jpeg, "encode", lambda rgb, quality: made.append(real(rgb, quality)) or made[-1])
        BareLoop(listing, [0, 1], SMALL, 1)(1.0)
        assert bench_convert._decode(listing.read(0), SMALL).shape[0] < 300
    assert made == expected


def test_without_scaling_the_bare_loop_only_decodes(photo_tree: Path) -> None:
    with list_source(photo_tree) as listing:
        loop = BareLoop(listing, list(range(48)), ConvertOptions(**MODES["copy"]), 2)
        loop(1.0)
    assert list(loop.shares) == ["reading", "decoding"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_convert_records(photo_tree: Path, tmp_path: Path, kind: str) -> None:
    source, work = tmp_path / "some photos", tmp_path / "work"
    work.mkdir()
    shutil.copytree(photo_tree, source)
    (source / "red" / "00.jpg").write_bytes((source / "red" / "00.jpg").read_bytes()[:300])  # cut off
    for number in range(4):
        (source / "blue" / f"large{number}.jpg").write_bytes(jpeg_bytes(make_photo(number, 300, 400)))
    if kind == "tar":
        with tarfile.open(tmp_path / "some.tar", "w") as archive:
            archive.add(source, "photos")
        source = tmp_path / "some.tar"
    copy, small = run(Setting(data=str(source), workers=2, folder=work))
    for record in (copy, small):
        assert (record.bench, record.device, record.workers, record.runs) == ("convert", "cpu", 2, 5)
        assert record.view_per_s is None and record.batch_size is None and record.peer is None
        assert record.pair_per_s == pytest.approx(52 / record.median_s)
        assert record.fraction_of_ceiling == pytest.approx(record.pair_per_s / record.ceiling)
        details = record.details
        assert details["photos"] == 52 and details["rejected"] == 1 and details["copied"] + details["reencoded"] == 51
        assert details["data"]["name"] == source.name and details["missing"] == {}
        assert details["bytes_in"] == pytest.approx(52 * details["data"]["bytes"], abs=52) and details["bytes_out"] > 0
        assert sum(details["share"].values()) == pytest.approx(1) and "of the time" in record.bottleneck
        assert str(tmp_path) not in to_line(record)
    assert cells(copy)[0] == "convert: copy" and cells(small)[0] == "convert: short side 256"
    assert (copy.details["reencoded"], small.details["reencoded"]) == (0, 4)
    assert "fsync" in copy.ceiling_name and small.ceiling_name == "bare decode, scale and encode loop, 2 threads"
    assert list(work.iterdir()) == []


def test_a_large_source_is_thinned_out_the_same_for_everybody(photo_tree: Path, reads: Counter) -> None:
    copy, _ = run(Setting(data=str(photo_tree), workers=1, photos=12))
    assert copy.details["photos"] == copy.details["copied"] == 12
    with list_source(photo_tree) as listing:
        assert set(reads) == {listing.names[number] for number in range(0, 48, 4)}


def test_what_cannot_be_read_or_written_is_one_line(tmp_path: Path, photo_tree: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FastSSLError, match="absent"):
        run(Setting(data=str(tmp_path / "absent")))
    with pytest.raises(FastSSLError, match=r"cannot write temporary files: Not a directory"):
        run(Setting(data=str(photo_tree), folder=tmp_path / "file"))


# ------------------------------------------------------------------ the peer


@pytest.mark.engines
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # numba, when ffcv's functions are collected
@pytest.mark.parametrize("part", MODES)
def test_ffcvs_writer_writes_the_same_photos(part: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    need_engine("ffcv")
    source = tmp_path / "photos"
    for number in range(10):
        (source / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        (source / f"class{number % 2}" / f"{number}.jpg").write_bytes(jpeg_bytes(make_photo(number, 280, 364)))
    (source / "class0" / "bad.jpg").write_bytes(b"\xff\xd8\xff bad")  # ffcv's writer would wait for it forever
    options = ConvertOptions(workers=2, resume=False, **MODES[part])
    ours = tmp_path / "ours.beton"
    convert(source, ours, options)
    with list_source(source) as listing:
        peer = bench_convert.FfcvWriter(listing, list(range(len(listing))), options, tmp_path)
        peer.write(tmp_path / "theirs.beton")
    with BetonReader(ours) as mine, BetonReader(tmp_path / "theirs.beton") as theirs:
        assert len(mine) == len(theirs) == 10
        np.testing.assert_array_equal(mine.labels, theirs.labels)
        assert (
            np.abs(mine.heights.astype(int) - theirs.heights).max() <= 1
            and np.abs(mine.widths.astype(int) - theirs.widths).max() <= 1
        )
        for number in range(10):
            height, width = np.minimum(mine.decode(number).shape[:2], theirs.decode(number).shape[:2])
            difference = mine.decode(number)[:height, :width].astype(int) - theirs.decode(number)[:height, :width]
            assert np.abs(difference).mean() < 12
    assert capfd.readouterr().err == ""  # its progress bar


@pytest.mark.slow
@pytest.mark.engines
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ffcv_takes_turns_with_ours(photo_tree: Path, tmp_path: Path) -> None:
    need_engine("ffcv")
    copy, small = run(Setting(data=str(photo_tree), workers=1, photos=6, peers=True, folder=tmp_path))
    for record in (copy, small):
        assert record.peer == "ffcv's DatasetWriter" and record.details["missing"] == {}
        assert record.ratio_to_peer > 0 and record.details["peer_median_s"] > 0
        assert "x ffcv's DatasetWriter" in cells(record)[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_peer_that_is_missing_is_named(photo_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastssl.pipelines.engines.registry import EngineState

    absent = EngineState("ffcv", None, "not installed", "install it")
    monkeypatch.setattr(bench_convert, "engine_state", lambda name: absent)
    for record in run(Setting(data=str(photo_tree), workers=1, photos=2, peers=True)):
        assert (
            record.peer is None
            and record.ratio_to_peer is None
            and record.details["missing"] == {"ffcv": "not installed"}
        )
    with list_source(photo_tree) as listing, pytest.raises(FastSSLError, match="not installed"):
        bench_convert.FfcvWriter(listing, [0], SMALL, photo_tree)


# ------------------------------------------------------------------ the command


def invoke(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "convert", *arguments])
    return int(stop.value.code or 0)


def test_settings_are_crossed_and_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Setting] = []
    monkeypatch.setattr(
        bench_convert,
        "run",
        lambda setting: calls.append(setting) or [Record(bench="convert", host={}, versions={}, git=None)],
    )
    out, more = tmp_path / "out.jsonl", ["--runs", "6", "--photos", "9", "--folder", str(tmp_path), "--peers"]
    assert (
        invoke("--data", "synthetic", "--data", "x", "--workers", "1", "--workers", "4", *more, "--json", str(out)) == 0
    )
    options = {"runs": 6, "photos": 9, "peers": True, "folder": tmp_path}
    crossed = [(data, workers) for data in ("synthetic", "x") for workers in (1, 4)]
    assert calls == [Setting(data=data, workers=workers, **options) for data, workers in crossed]
    assert [record.details["command"].split()[:3] for record in read_records(out)] == [
        ["fastssl", "bench", "convert"]
    ] * 4


def test_a_whole_measurement(photo_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert invoke("--data", str(photo_tree), "--photos", "4", "--workers", "1", "--json", str(out)) == 0
    assert [record.details["part"] for record in read_records(out)] == ["copy", "short side 256"]


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(bench, ["convert", "--help"])
    assert result.exit_code == 0 and "fastssl bench convert " in result.output and "--json FILE" in result.output


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--folder", "absent"], 2), (["--runs", "4"], 2), (["--workers", "0"], 2), (["--data", "absent"], 1)],
)
def test_wrong_use(arguments: list[str], status: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke(*arguments) == status
    errors = capfd.readouterr().err
    assert "Traceback" not in errors and errors.strip()


def test_the_modes_are_options_of_the_converter() -> None:
    """So that the records speak of what users can ask for."""
    assert converter.ConvertOptions(**MODES["copy"]).target_size(375, 500) == (375, 500)
    assert converter.ConvertOptions(**MODES["short side 256"]).target_size(375, 500) == (256, 341)
