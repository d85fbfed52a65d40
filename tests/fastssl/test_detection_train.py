"""Fine-tuning: a stopped run goes on as if it had not been, and processes that share a batch move as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_processes
from shapes import make_shapes

from fastssl.distributed.collectives import rank, world_size
from fastssl.errors import FastSSLError
from fastssl.evaluate.detection import train as module
from fastssl.evaluate.detection.annotations import DetectionError, DetectionSet, load_coco
from fastssl.evaluate.detection.batches import load_batches, to_device
from fastssl.evaluate.detection.model import Detector, DetectorConfig
from fastssl.evaluate.detection.protocol import predict
from fastssl.evaluate.detection.train import TrainingConfig, create_optimizer, fine_tune, training_requests
from fastssl.models.backbones import create_backbone
from fastssl.runs.checkpoint import write_state

CPU = torch.device("cpu")
SHAPE = DetectorConfig(
    levels=(16, 32), anchor_sizes=(16, 32, 64), width=16, head_width=32, proposals=40, box_samples=16
)
CONFIG = TrainingConfig(iterations=4, batch_size=4, lr=0.02, warmup=1, short_sides=(64, 80), long_side=128, seed=5)
SMALL = {"short_side": 64, "long_side": 128}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_shapes(tmp_path_factory.mktemp("shapes"), 7)


@pytest.fixture(scope="module")
def data(files: tuple[Path, Path]) -> DetectionSet:
    return load_coco(*files)


def new_detector(arch: str = "lcnet_035", seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    return Detector(create_backbone(arch), 3, SHAPE)


def trained(
    data: DetectionSet, config: TrainingConfig = CONFIG, arch: str = "lcnet_035", **how: object
) -> dict[str, torch.Tensor]:
    detector = new_detector(arch)
    fine_tune(detector, data, config, workers=1, **how)
    return detector.state_dict()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_run_is_a_function_of_its_seed(data: DetectionSet) -> None:
    before, one = new_detector().state_dict(), trained(data)
    torch.rand(3)  # what others drew before is of no account
    assert_equal(one, trained(data))
    moved = [name for name, value in one.items() if not torch.equal(value, before[name])]
    # All layers are trained, and the statistics move.
    assert set(before) - set(moved) <= {name for name in before if "conv_head" in name}
    other = trained(data, TrainingConfig(**{**vars(CONFIG), "seed": 6}))
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def test_a_stopped_run_goes_on_where_it_stood(
    data: DetectionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 1)
    path = tmp_path / "detect.pt"
    seen: list[int] = []

    def stop(done: int) -> None:
        seen.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(data, checkpoint=path, checkpoint_minutes=0, progress=stop)
    assert path.is_file() and seen == [1, 2, 3]
    again: list[int] = []
    assert_equal(trained(data, checkpoint=path, progress=again.append), trained(data))
    assert again == [3, 4]  # the third was not saved any more
    # Behind the end there is nothing left to do, and the file has it all.
    detector = new_detector(seed=9)
    losses = fine_tune(detector, data, CONFIG, workers=1, checkpoint=path)
    assert_equal(detector.state_dict(), trained(data))
    assert losses["loss"] > 0
    with pytest.raises(
        DetectionError, match=r"detect.pt belongs to a run with other settings \(lr: 0.02 there, 0.1 here\)"
    ):
        trained(data, TrainingConfig(**{**vars(CONFIG), "lr": 0.1}), checkpoint=path)
    with pytest.raises(
        DetectionError, match=r"other settings .about: 1 there|other settings .about: None there, 1 here"
    ):
        trained(data, checkpoint=path, about={"about": 1})
    # Of a version whose anchors, batches and losses were others.
    state = torch.load(path, weights_only=True)
    del state["config"]["form"]
    write_state(path, state)
    with pytest.raises(DetectionError, match=r"other settings .form: None there, 2 here"):
        trained(data, checkpoint=path)
    path.write_bytes(b"nothing")
    with pytest.raises(FastSSLError, match=r"damaged checkpoint"):
        trained(data, checkpoint=path)


def test_what_cannot_be_trained_is_refused(data: DetectionSet, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DetectionError, match=r"instances-0.json: 7 pictures with boxes, fewer than one batch of 8; lower --batch-size"
    ):
        trained(data, TrainingConfig(iterations=1, batch_size=8))
    with monkeypatch.context() as patch, pytest.raises(DetectionError, match=r"4 cannot be shared by 3 processes"):
        patch.setattr(module, "world_size", lambda: 3)
        trained(data)
    with pytest.raises(DetectionError, match=r"the loss is not finite at iteration 4 \(learning rate .*\): lower --lr"):
        trained(data, TrainingConfig(**{**vars(CONFIG), "lr": 1e12}))


@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_what_the_last_step_broke_is_neither_kept_nor_judged(lr: float, data: DetectionSet, tmp_path: Path) -> None:
    config = TrainingConfig(**{**vars(CONFIG), "lr": lr, "iterations": 1, "warmup": 0})
    with pytest.raises(
        DetectionError, match=r"(loss is|weights are) not finite .*iteration 1 \(learning rate .*\): lower --lr"
    ):
        trained(data, config, checkpoint=tmp_path / "detect.pt")
    assert not (tmp_path / "detect.pt").exists()


def test_weights_that_are_not_finite_are_not_kept() -> None:
    detector = new_detector()
    module._require_finite(detector, 7, 0.1)
    detector.pyramid.body.bn1.running_var[0] = float("inf")
    with pytest.raises(
        DetectionError, match=r"the weights are not finite behind iteration 7 \(learning rate 0.1\): lower --lr"
    ):
        module._require_finite(detector, 7, 0.1)


DAMAGED = {
    "no detector": {"detector": None},
    "no optimizer": {"optimizer": []},
    "of another kind": {"kind": "probe"},
    "no settings": {"config": None},
}


@pytest.fixture(scope="module")
def saved(data: DetectionSet, tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("saved") / "detect.pt"
    trained(data, TrainingConfig(**{**vars(CONFIG), "iterations": 1}), checkpoint=path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named_in_one_line(case: str, saved: dict, data: DetectionSet, tmp_path: Path) -> None:
    assert saved["kind"] == "detector"
    write_state(tmp_path / "detect.pt", {**saved, **DAMAGED[case]})
    with pytest.raises(
        DetectionError,
        match=r"detect.pt: (does not fit this detector|holds no detector|is not a whole checkpoint).*choose another "
        r"--out",
    ) as error:
        trained(data, TrainingConfig(**{**vars(CONFIG), "iterations": 1}), checkpoint=tmp_path / "detect.pt")
    assert "\n" not in str(error.value)


def test_norms_do_not_decay_and_biases_do() -> None:
    detector = new_detector()
    names = {id(each): name for name, each in detector.named_parameters()}
    for kind, optimizer in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        made = create_optimizer(detector, TrainingConfig(iterations=1, optimizer=kind, weight_decay=0.25))
        assert type(made) is optimizer
        decays = {names[id(each)]: group["weight_decay"] for group in made.param_groups for each in group["params"]}
        assert set(decays) == set(names.values())
        assert decays["pyramid.body.bn1.weight"] == decays["pyramid.body.bn1.bias"] == 0
        assert (
            decays["pyramid.body.conv_stem.weight"]
            == decays["heads.box_head.fc6.bias"]
            == decays["rpn.head.bbox_pred.bias"]
            == 0.25
        )
        assert sum(not decay for decay in decays.values()) == 2 * sum(
            isinstance(layer, torch.nn.BatchNorm2d) for layer in detector.modules()
        )


# ---------------------------------------------------------------------- two processes


def of_a_process(files: tuple[str, str], config: TrainingConfig) -> dict:
    """The weights behind the training of both networks, and what the untrained one finds."""
    data = load_coco(*files)
    # The second process begins with other weights: the first one's count.
    found = predict(new_detector(), data, workers=1, **SMALL)
    weights = {}
    for arch in ("lcnet_035", "vit_tiny_patch16_224"):
        detector = new_detector(arch, seed=rank())
        fine_tune(detector, data, config, workers=1)
        weights[arch] = detector.state_dict()
    return {"found": found, "weights": weights, "size": world_size()}


@pytest.fixture(scope="module")
def two(files: tuple[Path, Path]) -> list[dict]:
    return run_processes(of_a_process, 2, tuple(map(str, files)), CONFIG)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(data: DetectionSet, two: list[dict]) -> None:
    found = predict(new_detector(), data, workers=1, **SMALL)
    assert len(found) > 50 and len({row["image_id"] for row in found}) == len(data)
    assert all(each["size"] == 2 and each["found"] == found for each in two)


@pytest.mark.parametrize("arch", ["lcnet_035", "vit_tiny_patch16_224"])
def test_two_processes_keep_the_same_weights(arch: str, two: list[dict]) -> None:
    """Statistics of the BatchNorms included: those are of the whole batch."""
    assert_equal(two[0]["weights"][arch], two[1]["weights"][arch])


def test_two_processes_make_the_mean_of_their_gradients(data: DetectionSet, two: list[dict]) -> None:
    """One process that computes both halves, each with the samples that its process drew. Without BatchNorm, whose
    statistics join the halves.
    """
    detector = new_detector("vit_tiny_patch16_224").train()
    spared = [name for name, layer in detector.named_modules() if isinstance(layer, torch.nn.LayerNorm)]
    groups = [
        {"params": [each], "weight_decay": 0.0 if name.rpartition(".")[0] in spared else CONFIG.weight_decay}
        for name, each in detector.named_parameters()
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    peak = CONFIG.lr * CONFIG.batch_size / 16
    for iteration in range(CONFIG.iterations):
        optimizer.zero_grad()
        for half in (0, 1):
            requests = training_requests(data.with_boxes(), range(iteration, iteration + 1), CONFIG, half, 2)
            [batch] = load_batches(requests, divisible=detector.pyramid.divisible, workers=1)
            module._seed_sampling(CONFIG.seed, iteration, half)
            images, targets = to_device(batch, CPU, detector.normalise)
            (sum(detector(images, batch.sizes, targets).values()) / 2).backward()
        for group in optimizer.param_groups:
            group["lr"] = peak * (0.001 if iteration == 0 else 1.0) * (0.1 if iteration == 3 else 1.0)
        optimizer.step()
    start = new_detector("vit_tiny_patch16_224").state_dict()
    for name, value in two[0]["weights"]["vit_tiny_patch16_224"].items():
        torch.testing.assert_close(value, detector.state_dict()[name], rtol=1e-4, atol=1e-6)
    assert max((value - start[name]).abs().max() for name, value in detector.state_dict().items()) > 1e-3
