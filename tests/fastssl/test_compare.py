"""Evaluations side by side: what becomes of records in the table, and records that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastssl.cli import main
from fastssl.errors import FastSSLError
from fastssl.report.compare import KINDS, comparison, figures, read_evaluations, write_comparison
from fastssl.report.document import Paragraph, Table, table_markdown


def record(evaluation: str, checkpoint: str = "mine/last.safetensors", **values: Any) -> dict[str, Any]:
    """As ``Session.record`` makes one, with what this kind needs."""
    top = {"accuracy": 68.25, "confidence": [67.8, 68.7]}
    tuned = {**top, "head": "linear", "epochs": 30, "optimizer": "sgd", "lr": 0.03}
    near = {"k": 20, "temperature": 0.07, "accuracy": 61.0, "confidence": [60.0, 62.0]}
    kinds = {
        "knn": near,
        "knn_leave_one_out": near,
        "linear": {**top, "protocol": "fast"},
        "semi": {**tuned, "labels": 0.01, "head": "dino"},
        "finetune": {**tuned, "labels": 1.0},
        "detect": {
            "box_ap": 34.1,
            "box_ap50": 53.6,
            "box_ap_small": None,
            "mask_ap": None,
            "iterations": 90000,
            "batch_size": 16,
        },
    }
    about = {
        "checkpoint": checkpoint,
        "arch": "mobilenetv2_100",
        "network": "student",
        "step": 1000,
        "data": "train.beton",
        "val": "val.beton",
    }
    machine = {
        "held_out_seed": None,
        "host": {"cpu": "Some CPU"},
        "versions": {"python": "3.11", "torch": "2.11"},
        "git": "abc",
    }
    return {"evaluation": evaluation, **about, **machine, **kinds[evaluation], **values}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def tables(records: list[dict[str, Any]]) -> list[Table]:
    return [block for block in comparison(records) if isinstance(block, Table)]


def test_a_row_for_each_network_and_a_column_for_each_kind() -> None:
    (table,) = tables(
        [record("knn"), record("linear"), record("linear", "other/last.safetensors", accuracy=70.0, step=None)]
    )
    assert table.header == ["checkpoint", "network", "kNN, k 20, T 0.07", "linear probe, fast"]
    assert table.rows == [
        ["mine/last.safetensors", "mobilenetv2_100, student, step 1,000", "61.0 (60.0 to 62.0)", "68.2 (67.8 to 68.7)"],
        ["other/last.safetensors", "mobilenetv2_100, student", "", "70.0 (67.8 to 68.7)"],
    ]


def test_other_photos_are_another_table_and_the_last_of_equal_records_counts() -> None:
    first, second = tables([record("knn"), record("knn", accuracy=61.5), record("knn", val=None, held_out_seed=3)])
    assert [row[2][:4] for row in (*first.rows, *second.rows)] == ["61.5", "61.0"]
    assert len(first.rows) == 1


def test_pages_are_written_and_names_stay_words(tmp_path: Path) -> None:
    paths = write_comparison([record("knn", "<b>/a|b.safetensors")], tmp_path / "new" / "folder")
    markdown, html = (path.read_text() for path in paths)
    assert [path.name for path in paths] == ["evaluations.md", "evaluations.html"]
    assert "&lt;b>/a\\|b.safetensors" in markdown and "&lt;b&gt;/a|b.safetensors" in html and "<b>/a" not in html
    assert "Some CPU, python 3.11, torch 2.11, commit abc" in markdown
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "evaluations.html",
        "evaluations.md",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ('{"evaluation": ' + "9" * 5000 + "}", "line 2: not JSON"),
        ("[]", "not a record of an evaluation"),
        ('{"bench": "step"}', "not a record of an evaluation"),
        (json.dumps({**record("knn"), "accuracy": None}), "holds one of another kind"),
        (json.dumps({**record("knn"), "accuracy": float("nan")}), "no finite number"),
        (json.dumps({**record("knn"), "step": "x"}), "holds one of another kind"),
        (json.dumps({**record("knn"), "host": None}), "holds one of another kind"),
        (json.dumps({**record("knn"), "evaluation": ["knn"]}), "not a record of an evaluation"),
        (json.dumps({**record("knn"), "accuracy": 10**400}), "holds one of another kind"),
        (
            json.dumps({key: value for key, value in record("linear").items() if key != "data" and key != "val"}),
            "lacks a value",
        ),
    ],
)
def test_what_is_no_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "records.json", record("knn"))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(FastSSLError, match=rf"records\.json.*{message}"):
        read_evaluations([path])
    (tmp_path / "empty.json").write_text("\n")
    with pytest.raises(FastSSLError, match="no evaluations in these files"):
        read_evaluations([tmp_path / "empty.json"])


def test_a_document_of_several_records_is_read_as_lines_are(tmp_path: Path) -> None:
    lines = write(tmp_path / "records.jsonl", record("knn"), record("linear"))
    document = tmp_path / "records.json"
    document.write_text(json.dumps([record("knn"), record("linear")], indent=1))
    assert read_evaluations([document]) == read_evaluations([lines])
    document.write_text(json.dumps([record("knn"), {"bench": "step"}]))
    with pytest.raises(FastSSLError, match=r"records\.json, record 2: not a record of an evaluation"):
        read_evaluations([document])


def test_every_kind_is_tried_here() -> None:
    named = {kind: next(iter(figures(record(kind)))) for kind in KINDS}
    assert named == {
        "knn": "kNN, k 20, T 0.07",
        "knn_leave_one_out": "leave-one-out kNN, k 20, T 0.07",
        "linear": "linear probe, fast",
        "semi": "fine-tuned, 1 % of the labels, half of the DINO head, 30 epochs, sgd lr 0.03",
        "finetune": "fine-tuned, all labels, 30 epochs, sgd lr 0.03",
        "detect": "box AP, 90,000 iterations of 16",
    }
    assert list(figures(record("detect")).values()) == ["34.1", "53.6"]
    shorter = record("linear", protocol="sslight", changed=["epochs", "cached_epochs"], epochs=30, cached_epochs=3)
    assert list(figures(shorter)) == ["linear probe, sslight, but epochs 30; cached epochs 3"]
    # A record of the time when MoCo's steps went by light-moco's name.
    old = record("linear", protocol="light-moco", milestones=[60, 80], changed=[])
    assert list(figures(old)) == ["linear probe, moco"]
    assert list(figures({**old, "milestones": []})) == ["linear probe, light-moco"]
    scratch = record("semi", network="random", step=None)
    assert tables([scratch])[0].rows[0][:2] == ["random weights", "mobilenetv2_100"]
    # Neither what was learned from nor a held-out part: photos that are judged among themselves.
    assert [block.text for block in comparison([record("knn_leave_one_out")])[1:2]] == ["val.beton, among themselves"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "records.json", record("knn"), record("linear"))
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "compare", str(path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 0 and "61.0 (60.0 to 62.0)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "compare", str(tmp_path / "none.json"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 1 and "none.json" in capsys.readouterr().err


def test_the_published_page_shows_its_records() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "evaluations"
    records = read_evaluations([folder / "records.json"])
    (table,) = tables(records)
    assert table_markdown(table) in (folder / "README.md").read_text()
    assert all(one["git"] and one["versions"]["torch"] and one["host"]["cpu"] for one in records)


def test_settings_that_differ_are_columns_and_other_weights_are_rows() -> None:
    one, other = (
        record("knn", size=32, seed=0, weights="aa"),
        record("knn", size=64, seed=0, weights="aa", accuracy=70.0),
    )
    (table,) = tables([one, other])
    assert table.header[2:] == ["kNN, k 20, T 0.07, size 32", "kNN, k 20, T 0.07, size 64"] and len(table.rows) == 1
    (table,) = tables([record("linear", seed=seed, accuracy=60.0 + seed) for seed in range(3)])
    assert [cell[:4] for cell in table.rows[0][2:]] == ["60.0", "61.0", "62.0"] and table.header[4].endswith(", seed 2")
    # Two runs whose folders are called the same.
    (table,) = tables(
        [record("knn", weights="aa"), record("linear", weights="aa"), record("knn", weights="bb", accuracy=70.0)]
    )
    assert [row[0] for row in table.rows] == ["mine/last.safetensors [aa]", "mine/last.safetensors [bb]"]
    assert [row[2][:4] for row in table.rows] == ["61.0", "70.0"]


def test_what_was_replaced_is_said() -> None:
    def said(*records: dict[str, Any]) -> str:
        return " ".join(block.text for block in comparison(records) if isinstance(block, Paragraph))

    assert "2 of the replaced had other figures" in said(
        record("knn"), record("knn", accuracy=1.0), record("knn", accuracy=2.0)
    )
    assert "others had" not in said(record("knn"), record("knn"))
