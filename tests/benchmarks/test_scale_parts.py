"""The measurements that docs/scale.md multiplies, in small."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from fastssl.benchmarks import scale_parts
from fastssl.benchmarks.complete import missing_parts
from fastssl.pipelines.beton import BetonReader, BetonWriter
from fastssl.pipelines.errors import FastSSLError


def test_tables_without_photos_open_like_any_file(tmp_path: Path) -> None:
    path = tmp_path / "tables.beton"
    size = scale_parts.write_tables(path, 70_000)
    with BetonReader(path) as reader:
        assert len(reader) == 70_000 and reader.sizes.tolist() == [32] * 70_000
        assert reader.offsets[1] - reader.offsets[0] == 32 and (reader.labels == 0).all()
        assert size == 70_000 * 48 and path.stat().st_blocks * 512 < reader.num_bytes
    # what the writer itself makes has tables of the same size a sample
    with BetonWriter(tmp_path / "real.beton", 10, page_size=2 << 20) as writer:
        for _ in range(10):
            writer.add(b"x" * 32, 256, 341)
    with BetonReader(tmp_path / "real.beton") as reader:
        assert reader._metadata_end - (24 + 2 * 1041) + reader.num_bytes - reader._table_at == 10 * 48


def test_every_part_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_parts, "_FILE", 2**23)
    monkeypatch.setattr(scale_parts, "RECIPES", ("quickstart",))
    monkeypatch.setattr(scale_parts, "starting", lambda runs: [])  # has a test of its own
    records = {}
    for what, job in scale_parts.jobs([200_000], 5, tmp_path):
        try:
            records[what] = job()
        except FastSSLError as error:  # a file system in memory has no way past the page cache
            assert what == "reads" and "page cache" in str(error)
            records[what] = []
    assert set(records) == {"orders of 200,000", "opening 200,000", "reads", "starting", "checkpoint, quickstart"}
    for record in chain.from_iterable(records.values()):
        assert set(missing_parts(record)) <= {"command", "git"}
        assert record.pair_per_s > 0 and record.fraction_of_ceiling == pytest.approx(record.pair_per_s / record.ceiling)
    orders = [(record.details["order"], record.details["asked"]) for record in records["orders of 200,000"]]
    assert orders == [("sorted", 200_000), ("Feistel", 512), ("windows", 512), ("Feistel", 65536), ("windows", 65536)]
    (opened,) = records["opening 200,000"]
    assert opened.details["kept_bytes_per_sample"] == 33 and opened.details["table_bytes_per_sample"] == 48
    (written,) = records["checkpoint, quickstart"]
    assert written.recipe == "quickstart" and "last.pt" in written.details["bytes"]
    assert list(tmp_path.iterdir()) == []


def test_starting_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < scale_parts._imported("json") < 10
    monkeypatch.setattr(scale_parts, "_imported", lambda what: 0.5)
    (record,) = scale_parts.starting(runs=5, clients=2)
    assert record.pair_per_s == 2.0 and record.ceiling == 2.0 and 0 < record.details["store_get_s"] < 0.1
