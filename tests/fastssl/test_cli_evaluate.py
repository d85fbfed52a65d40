"""``fastssl evaluate``: figures, JSON, and one clear line for what cannot be evaluated."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from processes import run_processes

from fastssl.cli import main
from fastssl.evaluate.features import extract_features, split_indices
from fastssl.evaluate.knn import knn_accuracies, knn_accuracy
from fastssl.evaluate.session import weights_fingerprint
from fastssl.models.backbones import create_backbone, load_backbone, save_backbone
from fastssl.pipelines.beton.side_file import side_path
from fastssl.pipelines.beton.writer import BetonWriter
from fastssl.pipelines.convert.conversion import convert
from fastssl.pipelines.convert.options import ConvertOptions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "last.safetensors"
    save_backbone(create_backbone("resnet18"), path, arch="resnet18")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A network that takes no time, whose BatchNorms have seen something."""
    torch.manual_seed(0)
    path, network = tmp_path_factory.mktemp("small") / "last.safetensors", create_backbone("resnet10t")
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.2, 1)
    save_backbone(network, path, arch="resnet10t")
    return path


@pytest.fixture(scope="module")
def unlabelled(photo_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flat")
    for number, photo in enumerate(sorted(photo_tree.rglob("*.jpg"))[:6]):
        shutil.copy(photo, folder / f"{number}.jpg")
    path = folder.parent / "flat.beton"
    convert(folder, path, ConvertOptions(keep_size=True, short_side=None))
    return path


def run(capsys, *arguments):
    """(exit status, standard output, standard error) of the command line."""
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


SMALL = ("--size", 32, "--device", "cpu", "--workers", 1)


def test_knn_with_validation_photos_equals_the_functions(capsys, checkpoint, beton):
    status, out, _ = run(capsys, "knn", checkpoint, "--data", beton, "--val", beton, *SMALL, "--k", 5, "--json", "-")
    assert status == 0
    record = json.loads(out)  # nothing but the record on standard output
    features = extract_features(load_backbone(checkpoint), beton, size=32, workers=1)
    expected = knn_accuracy(features, features, k=5)
    assert record["accuracy"] == pytest.approx(expected.accuracy) and record["evaluation"] == "knn"
    assert (record["k"], record["train_samples"], record["val_samples"], record["classes"]) == (5, 48, 48, 3)
    assert record["val"] == beton.name and record["held_out_seed"] is None and record["device"] == "cpu"


def test_several_k_are_records_of_one_search(capsys, checkpoint, beton):
    status, out, err = run(
        capsys, "knn", checkpoint, "--data", beton, "--val", beton, *SMALL, "--k", 5, "--k", 1, "--k", 5, "--json", "-"
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert (
        status == 0 and [record["k"] for record in records] == [5, 1] and records[1]["accuracy"] == 100
    )  # each finds itself
    assert "kNN (k 5," in err and "kNN (k 1," in err and records[0]["top5_accuracy"] is None  # of three classes


@pytest.mark.parametrize(
    ("options", "k", "temperature", "name"),
    [
        ((), 20, 0.07, "dino"),
        (("--protocol", "light-moco"), 20, 0.1, "light-moco"),
        (("--protocol", "light-moco", "--k", 5), 5, 0.1, None),
        (("--k", 20, "--temperature", 0.1), 20, 0.1, "light-moco"),
    ],
)
def test_knn_protocols(capsys, small, beton, options, k, temperature, name):
    status, out, _ = run(capsys, "knn", small, "--data", beton, "--val", beton, *SMALL, *options, "--json", "-")
    record = json.loads(out)
    assert status == 0 and (record["k"], record["temperature"], record["protocol"]) == (k, temperature, name)
    assert record["changed"] == ["size"]
    command = ("knn", small, "--data", beton, "--val", beton, *SMALL, *options, "--reestimate-bn", 8, "--json", "-")
    assert json.loads(run(capsys, *command)[1])["changed"] == ["size", "reestimate_bn"]


def test_photos_that_the_file_has_scaled_down_are_a_change(capsys, small, beton, photo_tree, tmp_path):
    """Of the file to learn from, by the converter's note or by the photos' sides; the other one has full size."""
    scaled = tmp_path / "scaled.beton"
    convert(photo_tree, scaled, ConvertOptions(short_side=40))
    for note in (True, False):
        if not note:
            side_path(scaled).unlink()
        status, out, err = run(capsys, "linear", small, "--data", scaled, "--val", beton, *SMALL, *BRIEF, "--json", "-")
        record = json.loads(out)
        assert status == 0 and (record["scaled_to"], record["val_scaled_to"]) == (40, None)
        assert record["changed"] == ["size", "scaled_to", "batch_size", "epochs"] and "size, scaled_to" in err


def test_leave_one_out_is_a_kind_of_its_own(capsys, checkpoint, beton, tmp_path):
    features = extract_features(load_backbone(checkpoint), beton, size=32, workers=1)
    expected = knn_accuracies(features, features, ks=[5], leave_one_out=True)[0]
    for photos, data, val in (
        (("--data", beton), beton.name, None),
        (("--data", beton, "--val", beton), None, beton.name),
    ):
        status, out, err = run(capsys, "knn", checkpoint, *photos, *SMALL, "--k", 5, "--leave-one-out", "--json", "-")
        record = json.loads(out)
        assert status == 0 and record["evaluation"] == "knn_leave_one_out" and "not comparable" in err
        assert record["accuracy"] == pytest.approx(expected.accuracy) and record["accuracy"] < 100
        assert (record["data"], record["val"], record["train_samples"], record["val_samples"]) == (data, val, 48, 48)


BRIEF = ("--protocol", "sslight", "--batch-size", 16, "--epochs", 3)


def test_a_published_protocol(capsys, small, beton):
    options = (*BRIEF, "--sweep", "--weight-decay", 0, "--weight-decay", 0.01, "--cached-epochs", 2, "--json", "-")
    status, out, err = run(capsys, "linear", small, "--data", beton, "--val", beton, *SMALL, *options)
    record = json.loads(out)
    assert status == 0 and (record["protocol"], record["lr"], record["batch_size"], record["epochs"]) == (
        "sslight",
        0.05,
        16,
        3,
    )
    assert len(record["grid"]) == 14 and record["steps_per_epoch"] == 3 and len(record["accuracy_by_epoch"]) == 3
    assert record["changed"] == ["size", "batch_size", "epochs", "cached_epochs"]
    assert (record["cached_epochs"], record["cache_dtype"], record["interpolation"]) == (2, "float32", "bicubic")
    assert record["grid"][0]["accuracy"] == record["accuracy"] == record["accuracy_by_epoch"][-1]
    assert record["confidence"][0] <= record["accuracy"] <= record["confidence"][1]
    assert (
        "not as published: size, batch_size, epochs" in err
        and "chosen on the validation photos" in err
        and "best of 14" in err
    )


def test_a_protocol_learns(capsys, small, beton):
    options = ("--protocol", "moco", "--batch-size", 24, "--epochs", 20, "--lr", 10, "--cached-epochs", 4)
    status, out, _ = run(capsys, "linear", small, "--data", beton, "--val", beton, *SMALL, *options, "--json", "-")
    record = json.loads(out)
    # Three colours, which a random network keeps: labels that got mixed up would give 33 %.
    assert status == 0 and record["accuracy"] > 80 and record["train_accuracy"] > 60 and record["train_loss"] < 1
    assert (
        record["best_accuracy"]
        == max(record["accuracy_by_epoch"])
        == record["accuracy_by_epoch"][record["best_epoch"] - 1]
    )


def test_the_choice_can_be_made_on_training_photos(capsys, small, beton):
    status, out, err = run(
        capsys,
        "linear",
        small,
        "--data",
        beton,
        *SMALL,
        *BRIEF,
        "--lr",
        1,
        "--lr",
        2,
        "--select",
        "held-out",
        "--json",
        "-",
    )
    record = json.loads(out)
    # 9 of 48 to judge on, 13 of each class are left, and of these one is held out.
    assert status == 0 and (record["val_samples"], record["train_samples"]) == (9, 36) and record["lr"] == 1
    assert (
        record["chosen_on"] == "held-out training photos"
        and "choose_on" in record["changed"]
        and "lr" in record["changed"]
    )
    assert all(round(row["held_out_accuracy"] * 3 / 100, 6) in range(4) for row in record["grid"])
    assert "chosen on the held-out training photos" in err


def test_statistics_taken_anew_serve_a_protocol_too(capsys, small, beton):
    status, out, _ = run(
        capsys, "linear", small, "--data", beton, *SMALL, *BRIEF, "--lr", 3, "--reestimate-bn", 32, "--json", "-"
    )
    record = json.loads(out)
    assert status == 0 and record["reestimate_bn"] == 32 and "reestimate_bn" in record["changed"]
    status, plain, _ = run(capsys, "linear", small, "--data", beton, *SMALL, *BRIEF, "--lr", 3, "--json", "-")
    assert json.loads(plain)["train_loss"] != record["train_loss"]


def test_protocols_that_do_not_fit(capsys, small, beton):
    status, _, err = run(capsys, "linear", small, "--data", beton, *SMALL, "--protocol", "sslight")
    assert_one_line(status, err, "39 photos", "one batch of 4096", "--batch-size")
    status, _, err = run(
        capsys, "linear", small, "--data", beton, *SMALL, "--protocol", "sslight-vit", "--batch-size", 16
    )
    assert_one_line(status, err, "class tokens", "another --protocol")


def both(checkpoint, beton, folder):
    """Every evaluation by a process's command line; the first process writes."""
    from fastssl.distributed.world import world_from_environment

    name = world_from_environment().size
    for number, options in enumerate(OVER_PROCESSES):
        with pytest.raises(SystemExit) as stop:
            main(
                [
                    "evaluate",
                    *map(
                        str,
                        (
                            options[0],
                            checkpoint,
                            "--data",
                            beton,
                            *SMALL,
                            *options[1:],
                            "--json",
                            folder / f"{name}-{number}.json",
                        ),
                    ),
                ]
            )
        assert stop.value.code == 0


OVER_PROCESSES = (
    ("knn", "--k", 3, "--k", 40),
    ("knn", "--k", 3, "--leave-one-out"),
    ("linear",),
    ("linear", *BRIEF, "--sweep", "--cached-epochs", 2, "--select", "held-out", "--reestimate-bn", 32),
    # 36 photos: the last batch of 4 is as large for two as for one.
    ("linear", "--protocol", "light-moco", "--batch-size", 16, "--epochs", 3, "--lr", 1, "--select", "held-out"),
)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(capsys, small, beton, tmp_path):
    both(small, beton, tmp_path)
    run_processes(both, 2, small, beton, tmp_path, join=False, timeout=300)
    for number in range(len(OVER_PROCESSES)):
        written = [json.loads((tmp_path / f"{world}-{number}.json").read_text()) for world in (1, 2)]
        alone, together = (found if isinstance(found, list) else [found] for found in written)
        assert [record["processes"] for record in together] == [2] * len(alone)
        for one, two in zip(alone, together):
            assert_alike(one, two, ignored=("seconds", "processes"))


def assert_alike(one, two, ignored=()):
    """Figures to float rounding, all else exactly."""
    assert one.keys() == two.keys()
    for name in one.keys() - set(ignored):
        if name == "grid" and isinstance(one[name], list):
            for row, other in zip(one[name], two[name], strict=True):
                assert_alike(row, other)
        elif isinstance(one[name], float):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
        else:
            assert two[name] == one[name], name


def test_linear_holds_out_the_same_fifth_every_time(capsys, checkpoint, beton, tmp_path):
    records = []
    for name in ("a.json", "b.json"):
        status, out, _ = run(capsys, "linear", checkpoint, "--data", beton, *SMALL, "--json", tmp_path / name)
        assert status == 0 and "fast linear probe" in out and out.rstrip().endswith("39 photos to learn from, 32 px")
        records.append(json.loads((tmp_path / name).read_text()))
    for record in records:
        del record["seconds"]
    assert records[0] == records[1]
    labels = np.repeat([0, 1, 2], 16)
    assert records[0]["val_samples"] == len(split_indices(labels, 48)[1]) == 9 and records[0]["train_samples"] == 39
    # The three classes differ in colour, which a random network keeps: a probe that mixes up labels is at 33 %.
    assert records[0]["accuracy"] > 60 and records[0]["held_out_seed"] == 0


def assert_one_line(status, err, *words):
    assert status == 1
    lines = [
        line for line in err.splitlines() if line.startswith("fastssl:") and not line.startswith("fastssl: warning: ")
    ]
    assert len(lines) == 1 and "Traceback" not in err
    for word in words:
        assert word in lines[0]


def test_unlabelled_photos(capsys, checkpoint, beton, unlabelled):
    status, _, err = run(capsys, "knn", checkpoint, "--data", unlabelled, *SMALL)
    assert_one_line(status, err, str(unlabelled), "no labels")
    for protocol in ((), BRIEF):
        status, _, err = run(capsys, "linear", checkpoint, "--data", beton, "--val", unlabelled, *SMALL, *protocol)
        assert_one_line(status, err, str(unlabelled), "no labels")
    status, _, err = run(capsys, "knn", checkpoint, "--data", unlabelled, *SMALL, "--leave-one-out")
    assert_one_line(status, err, str(unlabelled), "no labels")


def test_classes_that_differ(capsys, checkpoint, beton, photo_tree, tmp_path):
    shutil.copytree(photo_tree, tmp_path / "two")
    (tmp_path / "two" / "green").rename(tmp_path / "two" / "grey")
    other = tmp_path / "two.beton"
    convert(tmp_path / "two", other, ConvertOptions(keep_size=True, short_side=None))
    status, _, err = run(capsys, "linear", checkpoint, "--data", beton, "--val", other, *SMALL)
    assert_one_line(status, err, "1 class of", "grey")
    # Without names only the counts can be compared.
    shutil.rmtree(tmp_path / "two" / "grey")
    convert(tmp_path / "two", other, ConvertOptions(keep_size=True, short_side=None))
    side_path(other).unlink()
    status, _, err = run(capsys, "knn", checkpoint, "--data", beton, "--val", other, *SMALL)
    assert_one_line(status, err, "3 and 2 classes")


def test_a_split_that_is_not_there(capsys, small, beton, tmp_path):
    for command in (("knn",), ("knn", "--leave-one-out"), ("linear", *BRIEF)):
        status, _, err = run(capsys, *command, small, "--data", beton, "--val", tmp_path / "none.beton", *SMALL)
        assert_one_line(status, err, "none.beton")
    status, _, err = run(capsys, "linear", small, "--data", tmp_path / "none.beton", *SMALL, *BRIEF)
    assert_one_line(status, err, "none.beton")


def test_one_class(capsys, checkpoint, tmp_path):
    path = tmp_path / "one.beton"
    with BetonWriter(path, 10) as writer:
        for shade in range(10):
            writer.add(np.full((20, 20, 3), 20 * shade, np.uint8).tobytes(), 20, 20, 0, 1)
    for protocol in ((), BRIEF):
        status, _, err = run(capsys, "linear", checkpoint, "--data", path, *SMALL, *protocol)
        assert_one_line(status, err, "one class")


def test_wrong_checkpoints(capsys, beton, tmp_path):
    status, _, err = run(capsys, "knn", tmp_path / "none.safetensors", "--data", beton, *SMALL)
    assert_one_line(status, err, "none.safetensors: no such file")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a checkpoint")
    status, _, err = run(capsys, "knn", broken, "--data", beton, *SMALL)
    assert_one_line(status, err, "broken.safetensors")
    other = tmp_path / "other.safetensors"
    save_backbone(create_backbone("lcnet_035"), other, arch="resnet10t")
    status, _, err = run(capsys, "linear", other, "--data", beton, *SMALL, *BRIEF)
    assert_one_line(status, err, "other.safetensors", "do not fit")


MIXED = [
    ("linear", "x", "--data", "y", "--epochs", "3"),
    ("linear", "x", "--data", "y", "--sweep"),
    ("linear", "x", "--data", "y", "--protocol", "sslight", "--sweep", "--lr", "1"),
    ("linear", "x", "--data", "y", "--protocol", "sslight", "--lr", "nan"),
    ("linear", "x", "--data", "y", "--protocol", "sslight", "--weight-decay", "inf"),
]


@pytest.mark.parametrize(
    "arguments", [("knn",), ("nearest", "x"), ("knn", "x"), ("knn", "x", "--data", "y", "--k", "0"), *MIXED]
)
def test_wrong_usage(capsys, arguments):
    assert run(capsys, *arguments)[0] == 2


def test_help_has_an_example(capsys):
    for command in ("knn", "linear"):
        status, out, _ = run(capsys, command, "--help")
        assert status == 0 and f"fastssl evaluate {command} runs/" in out


@pytest.mark.parametrize("command", ["knn", "linear"])
def test_a_size_that_the_network_cannot_take(capsys, beton, tmp_path, command):
    save_backbone(create_backbone("vit_tiny"), tmp_path / "vit.safetensors", arch="vit_tiny")
    status, _, err = run(
        capsys, command, tmp_path / "vit.safetensors", "--data", beton, "--size", 40, "--device", "cpu", "--workers", 1
    )
    assert_one_line(status, err, "cannot take pictures of 40 px", "change --size")


def test_one_class_cannot_vote(capsys, checkpoint, tmp_path):
    path = tmp_path / "one.beton"
    with BetonWriter(path, 10) as writer:
        for shade in range(10):
            writer.add(np.full((20, 20, 3), 20 * shade, np.uint8).tobytes(), 20, 20, 4, 1)
    for more in ((), ("--leave-one-out",)):
        status, _, err = run(capsys, "knn", checkpoint, "--data", path, *SMALL, *more)
        assert_one_line(status, err, "one class only")


def test_a_record_names_its_weights(capsys, checkpoint, beton, tmp_path):
    other = tmp_path / "last.safetensors"
    save_backbone(create_backbone("resnet18"), other, arch="resnet18")
    found = [
        json.loads(run(capsys, "knn", path, "--data", beton, *SMALL, "--json", "-")[1])["weights"]
        for path in (checkpoint, other, checkpoint)
    ]
    assert found[0] == found[2] != found[1] and found[0] == weights_fingerprint(load_backbone(checkpoint))
    assert weights_fingerprint(load_backbone(checkpoint).to(memory_format=torch.contiguous_format)) == found[0]


@pytest.fixture(scope="module")
def small_run(small, tmp_path_factory):
    """The folder of a run that was probed at 32 px and the whole short side."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(small, folder / "checkpoints" / "last.safetensors")
    (folder / "config.yaml").write_text("recipe: mine\nprobe: {size: 32, crop: 1.0}\n")
    return folder


@pytest.mark.parametrize(
    "command", [("knn",), ("knn", "--leave-one-out"), ("linear",), ("finetune", "--epochs", 1, "--batch-size", 16)]
)
def test_pictures_are_taken_as_the_run_took_them(capsys, beton, small, small_run, command):
    machine = ("--data", beton, "--device", "cpu", "--workers", 1, "--json", "-")
    status, out, err = run(capsys, command[0], small_run, *command[1:], *machine)
    record = json.loads(out)
    assert status == 0 and (record["size"], record["crop"]) == (32, 1.0) and "probe." not in err
    status, out, err = run(capsys, command[0], small_run, *command[1:], *machine, "--size", 40, "--crop", 0.8)
    record = json.loads(out)
    assert status == 0 and (record["size"], record["crop"]) == (40, 0.8)
    assert (
        "--size 40: the run itself was probed with 32 (probe.size)" in err
        and "--crop 0.8: the run itself was probed with 1 " in err
    )


def test_of_bare_weights_pictures_are_the_usual_ones(capsys, beton, small):
    status, out, err = run(capsys, "knn", small, "--data", beton, "--device", "cpu", "--workers", 1, "--json", "-")
    record = json.loads(out)
    assert status == 0 and (record["size"], record["crop"]) == (224, 0.875) and "probe." not in err
