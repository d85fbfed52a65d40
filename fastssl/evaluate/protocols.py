"""The numbers of the published linear probes and kNN figures, each with its source; and what of them was changed.

In all probes the backbone is frozen, in evaluation mode; a linear layer (bias 0 at first) is trained on its features
of random resized crops, flipped at random; the rate changes once an epoch, whose last batch is what is left of the
photos; judged is one centre crop (the photo's short side to 256 pixels, 224 of them), after every epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastssl.evaluate.features import EVALUATION_CROP, EVALUATION_SIZE
from fastssl.optim.schedules import half_cosine
from fastssl.pipelines.plan.draw import IMAGENET, Normalisation, ViewSpec

#: A batch for which rates are stated.
LR_BATCH = 256
#: What ``--sweep`` multiplies a protocol's rate with, the protocol's own first. Three decades: the best rate goes by
#: the scale of the features, and that differs between networks (DINO's ResNet-50 is published with a probe's rate of
#: 0.3, and reads far too low at 0.002).
SWEEP = (1.0, 0.01, 0.03, 0.1, 0.3, 3.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a network sees; the values here are those of all published figures.

    Attributes:
        size: pixels of all views. crop: the test view's share of the short side.
        scaled_to, val_scaled_to: see ``photos.scaled_to``, of the photos to learn from and of those to be judged on.
        bfloat16: whether the network computes in it; otherwise in float32.
    """

    size: int = EVALUATION_SIZE
    crop: float = EVALUATION_CROP
    scaled_to: int | None = None
    val_scaled_to: int | None = None
    bfloat16: bool = False


def differing(used: Mapping[str, Any], published: Mapping[str, Any]) -> list[str]:
    """Names of the settings, all that ``published`` has, whose values in ``used`` are others."""
    return [name for name, value in published.items() if used[name] != value]


@dataclass(frozen=True)
class LinearProtocol(Pictures):
    """How a linear classifier is trained on frozen features.

    Attributes:
        source: where the numbers stand.
        optimizer: ``sgd`` (no Nesterov), or ``lars`` as in ``fastssl.optim.optimizers``, which takes the plain step for
            the bias.
        lr: rate per 256 photos of a batch, as the papers state it: a step's is ``lr * batch / 256``.
        batch_size: of all processes together.
        milestones: epochs from which on the rate is a tenth of what it was; without any it follows half a cosine to
            ``final_lr`` after the last epoch, which is not scaled with the batch.
        weight_decay: on the weights; under ``sgd`` on the bias too, as torch does, under ``lars`` not.
        trust: of LARS.
        area: of the random crops, as a share of the photo's.
        interpolation: of training and test views.
        class_tokens: 0: the classifier reads what the backbone returns; n: a vision transformer's class tokens behind
            each of the last n blocks.
        init_std: standard deviation of the classifier's first weights, which are normal.
        cached_epochs: see ``FeatureStream``. reestimate_bn: photos that gave the BatchNorm statistics anew, if any.
        choose_on: what the best epoch and the best trial are chosen on: the photos that are judged, or a tenth of the
            training photos, which are then not trained on.
    """

    name: str
    source: str
    optimizer: Literal["sgd", "lars"]
    lr: float
    batch_size: int
    epochs: int
    milestones: tuple[int, ...] = ()
    final_lr: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    trust: float = 0.001
    area: tuple[float, float] = (0.08, 1.0)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    class_tokens: int = 0
    init_std: float = 0.01
    cached_epochs: int = 0
    reestimate_bn: int | None = None
    choose_on: Literal["val", "held_out"] = "val"

    def view(self, normalisation: Normalisation = IMAGENET) -> ViewSpec:
        """The training view: random resized crop and flip, no colour."""
        shape: dict[str, Any] = {"size": self.size, "area": self.area, "interpolation": self.interpolation}
        return ViewSpec(**shape, **normalisation._asdict(), flip=0.5, jitter=0.0, grey=0.0, blur=0.0)

    def rate(self, lr: float, epoch: int, epochs: int, batch_size: int) -> float:
        """The rate of all steps of ``epoch`` (from 0).

        Args:
            lr: per 256 photos.
            epochs: of this training. Milestones of a shorter or longer one than the protocol's move with it.
            batch_size: of all processes together.
        """
        peak = lr * batch_size / LR_BATCH
        if self.milestones:
            return peak * 0.1 ** sum(epoch * self.epochs >= milestone * epochs for milestone in self.milestones)
        return half_cosine(epoch / epochs, peak, self.final_lr)

    def record(self) -> dict[str, Any]:
        """All numbers by name, for a result."""
        values = asdict(self)
        return {"protocol": values.pop("name"), **values}


# Its other script, MoCo's probe, cannot load MobileNet-V3 or EfficientNet.
_LIGHT_MOCO = (
    "Lin et al., arXiv 2212.07158, public code of light-moco, the script that loads small networks (SimSiam's probe: "
    "arXiv 2011.10566); it trains with SGD or, on demand, LARS: which of them gave the published figures is not known"
)
_MOCO = "He et al., arXiv 1911.05722 (MoCo), public code"
_SSLIGHT = "Tan et al., arXiv 2210.02808 (SSLight), public code"
_LONG: dict[str, Any] = {"epochs": 100, "final_lr": 1e-6, "interpolation": "bicubic"}

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        LinearProtocol("light-moco", _LIGHT_MOCO, "sgd", lr=0.1, batch_size=4096, epochs=90),
        LinearProtocol("light-moco-lars", _LIGHT_MOCO, "lars", lr=0.1, batch_size=4096, epochs=90),
        LinearProtocol("moco", _MOCO, "sgd", lr=30.0, batch_size=256, epochs=100, milestones=(60, 80)),
        LinearProtocol("sslight", f"{_SSLIGHT}, convolutional networks", "lars", 0.05, 4096, **_LONG),
        LinearProtocol("sslight-vit", f"{_SSLIGHT}, vision transformer", "sgd", 0.01, 1024, class_tokens=4, **_LONG),
    )
}

#: (k, temperature) of the vote of the training photos, by name.
KNN_PROTOCOLS = {
    "dino": (20, 0.07),  # Caron et al., arXiv 2104.14294, public code
    "light-moco": (20, 0.1),  # Lin et al., arXiv 2212.07158: so does their public code call its monitor
    "light-moco-200": (200, 0.1),  # the same with Wu et al.'s number of neighbours
    "wu": (200, 0.07),  # Wu et al., CVPR 2018
}


@dataclass(frozen=True)
class Trial:
    """One classifier of a grid: rate per 256 photos, and weight decay."""

    lr: float
    weight_decay: float


def trials(
    protocol: LinearProtocol, lrs: Sequence[float] = (), weight_decays: Sequence[float] = (), *, sweep: bool = False
) -> list[Trial]:
    """The grid: every rate with every decay, without repeats. Its first is the one whose last epoch is the headline.

    Args:
        lrs: rates per 256 photos; none: the protocol's own, or with ``sweep`` those around it.
        weight_decays: none: the protocol's own.
        sweep: ``SWEEP`` times the protocol's rate.
    """
    lrs = lrs if lrs else [float(f"{protocol.lr * factor:.6g}") for factor in (SWEEP if sweep else (1.0,))]
    return list(dict.fromkeys(Trial(lr, decay) for decay in (weight_decays or [protocol.weight_decay]) for lr in lrs))
