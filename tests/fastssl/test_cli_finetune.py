"""``fastssl evaluate semi`` and ``finetune``: records, lists, heads, and one clear line for what cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from runs import finished_run
from safetensors import safe_open

from fastssl.cli import main
from fastssl.evaluate import classifier
from fastssl.evaluate.classifier import Classifier
from fastssl.evaluate.features import ProbeError
from fastssl.evaluate.finetune import FinetuneConfig, finetune
from fastssl.evaluate.photos import draw_labels, open_split
from fastssl.evaluate.trained import load_trained
from fastssl.pipelines.beton.side_file import side_path
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions
from fastssl.pipelines.loader import ViewLoader

SMALL = ("--size", 32, "--device", "cpu", "--workers", 1)
QUICK = (*SMALL, "--batch-size", 8, "--epochs", 1)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "dino", "dino-mobilenetv2-sslight")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of the command line."""
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def record(capsys, *arguments: object) -> dict:
    status, out, err = run(capsys, *arguments, "--json", "-")
    assert status == 0, err
    return json.loads(out)  # nothing but the record on standard output


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    status, _, err = result
    assert status == 1
    lines = [
        line for line in err.splitlines() if line.startswith("fastssl:") and not line.startswith("fastssl: warning: ")
    ]
    assert len(lines) == 1 and "Traceback" not in err
    for word in words:
        assert word in lines[0]


def test_semi_equals_the_functions(capsys, dino: Path, beton: Path) -> None:
    found = record(
        capsys,
        "semi",
        dino,
        "--data",
        beton,
        "--val",
        beton,
        "--labels",
        "50%",
        "--seed",
        3,
        *SMALL,
        "--batch-size",
        8,
        "--epochs",
        2,
    )
    with open_split(beton, beton) as split:
        split.train_index = draw_labels(split.train.labels, 0.5, 3)
        network = Classifier(load_trained(dino).backbone, 3, seed=3)
        config = FinetuneConfig(epochs=2, batch_size=8, size=32)
        expected = finetune(network, split, config, device=torch.device("cpu"), seed=3, workers=1)
    for name in (
        "accuracy",
        "best_accuracy",
        "best_epoch",
        "accuracies",
        "losses",
        "learning_rates",
        "train_samples",
        "top5",
    ):
        assert found[name] == getattr(expected, name), name
    assert (found["evaluation"], found["arch"], found["network"], found["step"]) == ("semi", "lcnet_035", "student", 2)
    assert (found["labels"], found["list"], found["train_samples"], found["val_samples"]) == (0.5, None, 24, 48)
    assert (found["lr"], found["peak_lr"], found["optimizer"], found["nesterov"], found["weight_decay"]) == (
        0.03,
        0.03 / 32,
        "sgd",
        True,
        0.0,
    )
    assert (found["head"], found["from_scratch"], found["processes"], found["bfloat16"]) == ("linear", False, 1, False)


def test_the_record_says_what_was_not_as_published(capsys, dino: Path, beton: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"{n}\n" for n in (0, 1, 16, 17, 32, 33)))
    common = ("semi", dino, "--data", beton, "--val", beton, *SMALL, "--epochs", 1)
    drawn = record(capsys, *common, "--labels", "25%")
    # Twelve photos, no whole batch of 1024: they are the batch, and the rate is theirs.
    assert (drawn["batch_size"], drawn["steps_per_epoch"], drawn["peak_lr"]) == (12, 1, 0.03 * 12 / 256)
    assert drawn["protocol"] == "sslight"
    assert drawn["changed"] == ["size", "epochs", "batch_size", "head", "drawn"]
    listed = record(capsys, *common, "--list", tmp_path / "list.txt", "--head", "dino", "--lr", 0.1)
    assert listed["changed"] == ["size", "lr", "epochs", "batch_size"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """(split, config) of every fine-tuning that would have begun; none does."""
    from fastssl.evaluate import finetune as module

    seen = []

    def nothing(network, split, config, **how):
        seen.append((split, config))
        raise module.ProbeError("enough")

    monkeypatch.setattr(module, "finetune", nothing)
    return seen


@pytest.mark.parametrize(("labels", "epochs"), [("5%", 60), ("6%", 30)])
def test_the_published_epochs(capsys, dino: Path, beton: Path, labels: str, epochs: int, asked: list) -> None:
    assert_one_line(run(capsys, "semi", dino, "--data", beton, "--val", beton, "--labels", labels, *SMALL), "enough")
    ((split, config),) = asked
    # Of 16 photos a class round(0.05 * 16) = round(0.06 * 16) = 1: the share that was asked for decides, not the one
    # that was drawn.
    assert (config.epochs, config.batch_size, len(split.train_index)) == (epochs, 1024, 3)
    assert config.lr(0) == pytest.approx(0.12) and config.lr(epochs) == pytest.approx(1e-6)


def test_without_val_a_fifth_is_held_out_before_the_draw(capsys, dino: Path, beton: Path, asked: list) -> None:
    run(capsys, "semi", dino, "--data", beton, "--labels", "50%", *QUICK)
    ((split, _),) = asked
    assert (len(split.train_index), len(split.val_index)) == (18, 9)  # round(6.5) = 6 of 13 thrice
    assert not np.intersect1d(split.train_index, split.val_index).size


def test_a_list(capsys, dino: Path, beton: Path, photo_tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "1percent.txt"
    path.write_text(
        "".join(
            f"{16 * label + n},{label},{name},{n:02}.jpg\n"
            for label, name in enumerate(("blue", "green"))
            for n in range(4)
        )
    )
    found = record(capsys, "semi", dino, "--data", beton, "--val", beton, "--list", path, *QUICK)
    assert (found["labels"], found["list"], found["train_samples"]) == (8 / 48, "1percent.txt", 8)
    assert (found["classes"], found["unseen"]) == (2, 16) and found["accuracy"] <= 200 / 3  # red has no label
    by_name = record(
        capsys, "semi", dino, "--data", beton, "--val", beton, "--list", path, "--photos", photo_tree, *QUICK
    )
    assert by_name["accuracies"] == found["accuracies"] and by_name["losses"] == found["losses"]
    assert_one_line(run(capsys, "semi", dino, "--data", beton, "--list", path, *QUICK), "1percent.txt", "--val")
    assert_one_line(
        run(capsys, "semi", dino, "--data", beton, "--val", beton, "--list", tmp_path / "no.txt", *QUICK),
        "no such list",
    )
    path.write_text("48\n")
    assert_one_line(
        run(capsys, "semi", dino, "--data", beton, "--val", beton, "--list", path, *QUICK),
        "line 1",
        "photo 48",
        "has 48",
    )


def test_the_dino_head(capsys, dino: Path, beton: Path) -> None:
    common = ("--data", beton, "--val", beton, "--labels", "50%", "--head", "dino", *QUICK)
    student, teacher, scratch = (
        record(capsys, "semi", dino, *common, *more) for more in ((), ("--which", "teacher"), ("--from-scratch",))
    )
    assert (student["network"], teacher["network"], scratch["network"]) == ("student", "teacher", "random")
    assert (
        (student["step"], scratch["step"]) == (2, None)
        and scratch["from_scratch"]
        and scratch["checkpoint"] == "dino/last.pt"
    )
    assert len({tuple(found["losses"]) for found in (student, teacher, scratch)}) == 3
    moved = record(capsys, "semi", dino / "checkpoints" / "last.pt", *common)
    assert moved["losses"] == student["losses"]
    assert_one_line(
        run(capsys, "semi", dino / "checkpoints" / "last.safetensors", *common), "last.safetensors", "last.pt"
    )


def test_heads_of_other_runs(capsys, beton: Path, tmp_path: Path) -> None:
    moco = finished_run(tmp_path / "moco", "few-photos-moco", arch="resnet10t", steps=1)
    result = run(capsys, "semi", moco, "--data", beton, "--labels", "50%", "--head", "dino", *QUICK)
    assert_one_line(result, "a run of moco has no DINO head", "--head linear")


def test_finetune_on_folders_with_all_labels(capsys, dino: Path, photo_tree: Path) -> None:
    found = record(capsys, "finetune", dino, "--data", photo_tree, "--val", photo_tree, *QUICK, "--head-lr-factor", 10)
    assert (found["evaluation"], found["labels"], found["train_samples"], found["val_samples"]) == (
        "finetune",
        1.0,
        48,
        48,
    )
    assert (found["head_lr_factor"], found["epochs"], found["steps_per_epoch"], found["momentum"]) == (10.0, 1, 6, 0.9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ("sgd", 0.03, 0.0, True, 0.9)),
        (("--optimizer", "adamw"), ("adamw", 5e-4, 0.05, False, None)),
        (("--optimizer", "adamw", "--lr", "0.001", "--weight-decay", "0"), ("adamw", 0.001, 0.0, False, None)),
    ],
)
def test_optimisers(capsys, dino: Path, beton: Path, options: tuple, expected: tuple) -> None:
    found = record(capsys, "finetune", dino, "--data", beton, "--labels", "30%", *QUICK, *options)
    assert tuple(found[name] for name in ("optimizer", "lr", "weight_decay", "nesterov", "momentum")) == expected


def test_from_scratch_is_the_same_network_with_other_weights(capsys, dino: Path, beton: Path) -> None:
    common = ("finetune", dino, "--data", beton, *QUICK)
    trained, scratch, again, other = (
        record(capsys, *common, *more)
        for more in ((), ("--from-scratch",), ("--from-scratch",), ("--from-scratch", "--seed", 1))
    )
    assert (
        scratch["from_scratch"] and scratch["network"] == "random" and scratch["arch"] == trained["arch"] == "lcnet_035"
    )
    assert (
        scratch["losses"] == again["losses"]
        and len({trained["losses"][0], scratch["losses"][0], other["losses"][0]}) == 3
    )


def test_the_network_is_written_for_timm(capsys, dino: Path, beton: Path, tmp_path: Path) -> None:
    path = tmp_path / "colours.safetensors"
    found = record(capsys, "finetune", dino, "--data", beton, "--val", beton, *QUICK, "--crop", "1", "--out", path)
    network = timm.create_model("lcnet_035", num_classes=3, checkpoint_path=str(path)).eval()
    view = FinetuneConfig(size=32, crop=1.0).test_view
    with ViewLoader(beton, [view], 48, workers=1, shuffle=False) as loader, torch.no_grad():
        (batch,) = loader.epoch(0)
        assert 100 * float((network(batch.views[0]).argmax(1) == batch.label).double().mean()) == pytest.approx(
            found["accuracy"]
        )
    with safe_open(str(path), framework="pt") as file:
        assert json.loads(file.metadata()["fastssl-classifier"])["classes"] == ["blue", "green", "red"]
    # Of a list that lacks a class, the two that it has.
    (tmp_path / "list.txt").write_text("".join(f"{n}\n" for n in (0, 1, 2, 3, 32, 33, 34, 35)))
    record(
        capsys, "semi", dino, "--data", beton, "--val", beton, "--list", tmp_path / "list.txt", *QUICK, "--out", path
    )
    with safe_open(str(path), framework="pt") as file:
        assert json.loads(file.metadata()["fastssl-classifier"])["classes"] == ["blue", "red"]
        assert file.get_slice("classifier.weight").get_shape()[0] == 2


def test_one_line_says_what_came_out(capsys, dino: Path, beton: Path, tmp_path: Path) -> None:
    status, out, _ = run(
        capsys, "semi", dino, "--data", beton, "--val", beton, "--labels", "50%", *QUICK, "--json", tmp_path / "a.json"
    )
    found = json.loads((tmp_path / "a.json").read_text())
    assert status == 0 and len(out.splitlines()) == 1
    assert out.startswith(f"fine-tuned student, 24 of 48 labels, 3 classes: {found['accuracy']:.2f} % (95 %: ")
    assert f"best epoch 1 of 1: {found['best_accuracy']:.2f} %" in out
    status, out, _ = run(
        capsys,
        "semi",
        dino,
        "--data",
        beton,
        "--val",
        beton,
        "--labels",
        "50%",
        *SMALL,
        "--batch-size",
        10,
        "--epochs",
        1,
    )
    assert status == 0 and "one step an epoch" not in out  # 10, 10 and 4
    assert "not as published: size, epochs, batch_size, head, drawn" in out


# ---------------------------------------------------------------------- what cannot be


def test_photos_without_labels_or_with_others(
    capsys, dino: Path, beton: Path, photo_tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "flat").mkdir()
    for number, photo in enumerate(sorted(photo_tree.rglob("*.jpg"))[:6]):
        shutil.copy(photo, tmp_path / "flat" / f"{number}.jpg")
    flat, two = tmp_path / "flat.beton", tmp_path / "two.beton"
    convert(tmp_path / "flat", flat, ConvertOptions(keep_size=True, short_side=None))
    shutil.copytree(photo_tree, tmp_path / "two")
    (tmp_path / "two" / "green").rename(tmp_path / "two" / "grey")
    convert(tmp_path / "two", two, ConvertOptions(keep_size=True, short_side=None))
    for command in (("semi", "--labels", "50%"), ("finetune",)):
        assert_one_line(run(capsys, *command, dino, "--data", flat, *QUICK), str(flat), "no labels")
        assert_one_line(run(capsys, *command, dino, "--data", beton, "--val", two, *QUICK), "1 class of", "grey")
        assert_one_line(
            run(capsys, *command, dino, "--data", beton, "--val", tmp_path / "none.beton", *QUICK), "none.beton"
        )
    shutil.rmtree(tmp_path / "two" / "grey")
    convert(tmp_path / "two", two, ConvertOptions(keep_size=True, short_side=None))
    side_path(two).unlink()
    assert_one_line(run(capsys, "finetune", dino, "--data", beton, "--val", two, *QUICK), "3 and 2 classes")


def test_no_such_checkpoint(capsys, beton: Path, tmp_path: Path) -> None:
    assert_one_line(
        run(capsys, "finetune", tmp_path / "none.safetensors", "--data", beton, *QUICK), "no such file or folder"
    )
    assert_one_line(run(capsys, "finetune", tmp_path, "--data", beton, *QUICK), "no last.safetensors")
    assert_one_line(run(capsys, "finetune", tmp_path, "--head", "dino", "--data", beton, *QUICK), "last.pt")


@pytest.mark.parametrize(
    "arguments",
    [
        ("semi", "x", "--data", "y"),
        ("semi", "x", "--data", "y", "--labels", "1%", "--list", "z"),
        ("semi", "x", "--data", "y", "--labels", "1%", "--photos", "z"),
        ("semi", "x", "--data", "y", "--labels", "1"),
        ("semi", "x", "--data", "y", "--labels", "150%"),
        ("semi", "x", "--data", "y", "--labels", "1%", "--lr", "nan"),
        ("semi", "x", "--data", "y", "--labels", "1%", "--batch-size", "1"),
        ("finetune", "x", "--data", "y", "--optimizer", "lars"),
        ("finetune", "x", "--data", "y", "--head-lr-factor", "0"),
        ("finetune", "x", "--data", "y", "--weight-decay", "inf"),
        ("finetune", "x", "--data", "y", "--out", "a.pt"),
        ("finetune", "x", "--data", "y", "--out", "no-such-folder/a.safetensors"),
        ("finetune", "x", "--data", "y", "--out", "a.safetensors", "--head", "dino"),
        ("finetune", "x"),
    ],
)
def test_wrong_usage(capsys, arguments: tuple) -> None:
    assert run(capsys, *arguments)[0] == 2


def test_help_has_an_example(capsys) -> None:
    for command in ("semi", "finetune"):
        status, out, _ = run(capsys, command, "--help")
        assert status == 0 and f"fastssl evaluate {command} runs/" in out


def test_a_network_that_cannot_be_written_costs_no_figures(
    capsys, dino: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise ProbeError("no space left")

    monkeypatch.setattr(classifier, "save_classifier", full)
    status, out, err = run(
        capsys,
        "finetune",
        dino,
        "--data",
        beton,
        *QUICK,
        "--out",
        tmp_path / "n.safetensors",
        "--json",
        tmp_path / "r.json",
    )
    assert status == 1 and "no space left" in err and "fine-tuned student" in out
    assert json.loads((tmp_path / "r.json").read_text())["evaluation"] == "finetune"


def test_a_checkpoint_is_not_written_over(capsys, dino: Path, beton: Path) -> None:
    path = dino / "checkpoints" / "last.safetensors"
    before = path.read_bytes()
    status, _, err = run(capsys, "finetune", dino, "--data", beton, *QUICK, "--out", path)
    assert status == 2 and "is no fine-tuned network" in err and path.read_bytes() == before
