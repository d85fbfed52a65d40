"""A recipe's own mean and std: wherever the run's network is looked at, it is shown pictures as in its training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_run import Silent, options, small

from fastssl.cli import main
from fastssl.config.recipe import load_recipe, recipe_to_dict
from fastssl.config.resolved import normalisation_of
from fastssl.evaluate.collapse import feature_std
from fastssl.evaluate.features import extract_features
from fastssl.evaluate.trained import load_trained
from fastssl.models.backbones import read_header, save_backbone
from fastssl.pipelines.loader import ViewLoader
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation
from fastssl.pretrain import pretrain
from fastssl.weights.export import export_backbone
from fastssl.weights.importing import import_backbone

OWN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
Shown = set[tuple[int, Normalisation]]


@contextmanager
def shown() -> Iterator[Shown]:
    """(size, normalisation) of every view that is made inside the block."""
    found: Shown = set()
    made = ViewLoader.__init__

    def look(self: ViewLoader, data: object, views: list, *args: object, **how: object) -> None:
        found.update((spec.size, Normalisation(spec.mean, spec.std)) for spec in views)
        made(self, data, views, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ViewLoader, "__init__", look)
        yield found


@pytest.fixture(scope="module")
def run(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, Shown]:
    """A run that does all that a report can hold: (folder, summary, what was shown)."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    own = ["views.0.mean=[0, 0, 0]", "views.0.std=[1, 1, 1]"]
    more = ["probe.final_samples=0", "probe.teacher=true", "probe.reestimate_bn=8"]
    with shown() as found:
        summary = pretrain(small(*own, *more), options(beton, out), Silent())
    assert summary is not None
    return out, summary, found


def evaluate(capsys: pytest.CaptureFixture, command: str, *arguments: object) -> dict:
    """The record."""
    machine = ("--device", "cpu", "--workers", 1, "--json", "-")
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", command, *map(str, (*arguments, *machine))])
    assert stop.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_probes_and_report_look_as_training_does(run: tuple[Path, dict, Shown], beton: Path) -> None:
    out, summary, found = run
    # Raw pixels are a mark: they stay as they are; so do colours, which are counted as they are stored.
    assert found == {(32, OWN), (16, IMAGENET), (64, OWN)}
    backbone = load_trained(out).backbone
    spreads = [
        float(feature_std(extract_features(backbone, beton, size=32, crop=1.0, normalisation=each).features))
        for each in (OWN, IMAGENET)
    ]
    assert summary["features"]["feature_std"] == pytest.approx(spreads[0], rel=1e-4)
    assert summary["features"]["feature_std"] != pytest.approx(spreads[1], rel=1e-2)


def test_evaluate_gives_what_the_end_of_the_run_gave(
    capsys: pytest.CaptureFixture, run: tuple[Path, dict, Shown], beton: Path
) -> None:
    out, summary, _ = run
    [row] = [row for row in summary["probe"]["rows"] if row["name"] == "after pre-training"]
    for command in ("knn", "linear"):
        assert evaluate(capsys, command, out, "--data", beton)["accuracy"] == row[command]


@pytest.mark.parametrize(
    "command",
    [
        ("knn", "--reestimate-bn", 8),
        ("linear",),
        ("linear", "--protocol", "light-moco", "--epochs", 1, "--batch-size", 16),
        ("semi", "--labels", "50%", "--epochs", 1, "--batch-size", 8),
        ("finetune", "--epochs", 1, "--batch-size", 16, "--out", "fine.safetensors"),
    ],
)
def test_every_evaluation_looks_as_training_did(
    capsys: pytest.CaptureFixture,
    run: tuple[Path, dict, Shown],
    beton: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[object, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    moved = shutil.copy(run[0] / "checkpoints" / "last.safetensors", tmp_path)  # which has no config.yaml beside it
    with shown() as found:
        record = evaluate(capsys, str(command[0]), moved, "--data", beton, "--size", 32, *command[1:])
    assert found == {(32, OWN)} and (record["mean"], record["std"]) == ([0, 0, 0], [1, 1, 1])
    if "--protocol" in command:
        assert {"mean", "std"} <= {*record["changed"]}
    if "--out" in command:
        with safe_open("fine.safetensors", framework="pt") as file:
            about = json.loads(file.metadata()["fastssl-classifier"])
        assert (about["mean"], about["std"]) == ([0, 0, 0], [1, 1, 1])


def test_every_file_of_a_run_says_it(run: tuple[Path, dict, Shown], tmp_path: Path) -> None:
    checkpoints = run[0] / "checkpoints"
    for name in ("last.safetensors", "last-teacher.safetensors", "last.pt"):
        copy = shutil.copy(checkpoints / name, tmp_path)
        assert load_trained(copy).normalisation == load_trained(checkpoints / name).normalisation == OWN
    half = tmp_path / "half.safetensors"
    save_backbone(load_trained(run[0]).backbone, half, arch="lcnet_035", std=OWN.std)
    assert load_trained(half).normalisation == Normalisation(IMAGENET.mean, OWN.std)
    # Files of older runs: what config.yaml says, and alone nothing.
    folder = tmp_path / "old" / "checkpoints"
    folder.mkdir(parents=True)
    save_backbone(load_trained(run[0]).backbone, folder / "last.safetensors", arch="lcnet_035", network="student")
    assert load_trained(folder).normalisation == IMAGENET
    shutil.copy(run[0] / "config.yaml", folder.parent)
    assert "mean" not in read_header(folder / "last.safetensors") and load_trained(folder).normalisation == OWN


def test_exports_come_back_with_it_and_what_is_damaged_is_said(run: tuple[Path, dict, Shown], tmp_path: Path) -> None:
    trained, back = load_trained(run[0]), tmp_path / "back.safetensors"
    for name in ("mine.pth", "mine.safetensors"):
        export_backbone(trained, tmp_path / name)
        import_backbone(tmp_path / name, back, "lcnet_035")
        assert load_trained(back).normalisation == OWN
    tensors = load_file(tmp_path / "mine.safetensors")
    for mean in ("[" * 100_000, "[NaN, 0, 0]", "0.5", ""):
        save_file(tensors, tmp_path / "mine.safetensors", metadata={"mean": mean})
        with pytest.warns(UserWarning, match="normalised as ImageNet's"):
            import_backbone(tmp_path / "mine.safetensors", back, "lcnet_035")
        assert load_trained(back).normalisation == IMAGENET


def test_the_first_global_view_decides() -> None:
    own = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    other = {"mean": [0.5, 0.5, 0.5]}
    for views, expected in (
        ([own, other], OWN),
        ([{}, own], IMAGENET),
        ([{"mean": [0, 0, 0]}], Normalisation(OWN.mean, IMAGENET.std)),
        ({"augment": own, "local": other, "global_2": other}, OWN),
        ({"augment": other, "global_1": own}, OWN),
        ({"local": own}, IMAGENET),
        # of a stranger
        ([3], IMAGENET),
        ({"augment": 3, "global_1": None}, IMAGENET),
        ("sslight-cnn", IMAGENET),
    ):
        assert normalisation_of({"views": views}) == expected, views
    assert normalisation_of(None) == normalisation_of({}) == IMAGENET
    for wrong in ({"mean": [0, 0, 2]}, {"mean": "0, 0, 0", "std": [0, 0, 0]}):
        with pytest.warns(UserWarning, match="normalised as ImageNet's"):
            assert normalisation_of({"views": [wrong]}) == IMAGENET
    # What a run stores of its recipe.
    sslight = load_recipe(
        "dino-mobilenetv2-sslight", {"views.global_1.mean": "[0, 0, 0]", "views.local.std": "[1, 1, 1]"}
    )
    assert normalisation_of(recipe_to_dict(sslight)) == Normalisation(OWN.mean, IMAGENET.std)
    assert sslight.views[0].mean == OWN.mean and sslight.views[2].std == OWN.std
