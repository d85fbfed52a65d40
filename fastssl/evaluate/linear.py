"""The fast linear probe: logistic regression on cached features of one centre crop, solved to its optimum.

It is *not* a published protocol (see ``protocols``): figures from here compare networks with each other, not with
papers. In return it has no learning rate, no schedule and no seed of its own, and takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastssl.evaluate.features import Features, ProbeError, check_probe_input, split_indices, wilson_interval

#: L2 strengths that may be tried, the strongest first. For scikit-learn's ``C`` see ``LogisticRegression``.
L2_GRID = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6)
#: Taken where no sample can be held out to choose by.
L2_DEFAULT = 0.1

#: Principal directions with less than this share of the largest variance are rounding noise of float32 features.
_RANK_TOLERANCE = 1e-11
#: When a solution counts as found: largest entry of the preconditioned gradient (the loss is then off by about its
#: square), or number of iterations. With 1e-5 in the place of 1e-4 six probes chose and scored the same, in up to twice
#: the time; the search chose the same strengths with 40, 100 and 200 iterations.
_SEARCH, _FINAL = (1e-4, 40), (1e-4, 1000)


@dataclass(frozen=True)
class LinearResult:
    """What the fast linear probe found.

    Attributes:
        accuracy: top-1 on the validation part, percent. confidence: its 95 % interval.
        train_accuracy: on the training part, percent.
        l2: strength used.
        grid: accuracy (percent) on the held-out fifth of the training part for each strength tried; empty when the
            part was too small to hold anything out, and ``l2`` is then ``L2_DEFAULT``.
        unseen: validation samples of a class that the training part does not have; they count as wrong.
    """

    accuracy: float
    confidence: tuple[float, float]
    train_accuracy: float
    l2: float
    grid: dict[float, float]
    train_samples: int
    val_samples: int
    classes: int
    unseen: int


def linear_probe(train: Features, val: Features, *, device: str | torch.device = "cpu") -> LinearResult:
    """Fit on ``train``, measure on ``val``, which is looked at once. Deterministic.

    The L2 strength is the one with the best accuracy on a held-out fifth of ``train`` (equal ones: the stronger). All
    of ``L2_GRID`` is tried: the held-out curve has several hills, and networks before and after training have them in
    different places. The fit is then repeated on all of ``train``.

    Raises:
        ProbeError: no labels, an empty part, features that are not finite, or a training part of a single class.
    """
    check_probe_input(train, val)
    classes, targets = train.labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ProbeError(
            f"the training part has one class only (label {int(classes[0])}); a linear probe needs at least two"
        )
    features, targets, scores = train.features.to(device), targets.to(device), dict[float, float]()
    fit_rows, held_rows = map(torch.from_numpy, split_indices(train.labels.numpy(), len(train)))
    # float32 iterations: an accuracy does not need float64, which costs three times as much.
    whole = LogisticRegression(features, targets, len(classes), dtype=torch.float32)
    l2 = L2_DEFAULT
    if len(held_rows):
        part = LogisticRegression(features[fit_rows], targets[fit_rows], len(classes), dtype=torch.float32)
        for strength in L2_GRID:
            # Each solution is the start for the next, weaker strength: the path costs little more than its last point.
            weight, bias = part.solve(strength, *_SEARCH)
            score = _percent_correct(features[held_rows], targets[held_rows], weight, bias)
            if not scores or score > max(scores.values()):
                l2 = strength
                whole.start_from(weight, bias)
            scores[strength] = score

    weight, bias = whole.solve(l2, *_FINAL)
    predicted = classes[_predict(val.features.to(device), weight, bias).cpu()]
    correct = int((predicted == val.labels).sum())
    return LinearResult(
        accuracy=100 * correct / len(val),
        confidence=wilson_interval(correct, len(val)),
        train_accuracy=_percent_correct(features, targets, weight, bias),
        l2=l2,
        grid=scores,
        train_samples=len(train),
        val_samples=len(val),
        classes=len(classes),
        unseen=int((~torch.isin(val.labels, classes)).sum()),
    )


class LogisticRegression:
    """Multinomial logistic regression with an L2 penalty on the weights of the *standardised* features: one data set,
    prepared once, solved for any number of strengths; each solution starts from the one before.

    Minimises  mean_n cross_entropy(x_n W^T + b, y_n) + l2 / 2 * |W_s|^2,  where W_s are the weights in units of each
    feature's standard deviation; the bias is free. scikit-learn's ``C`` on standardised features is 1 / (N * l2).

    How it is fast and still exact: the standardised features are rotated to their principal directions, which leaves
    the penalty as it is, and each weight is scaled by its entry of the Hessian's diagonal. L-BFGS then meets a nearly
    round problem and needs tens of iterations where the features as given need many hundreds.

    Args:
        features: (N, F) floating point. labels: (N,) int64 in 0 .. num_classes - 1.
        dtype: of the iterations; statistics and directions are float64 always.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, dtype: torch.dtype = torch.float64):
        features = features.double()
        self._mean = features.mean(dim=0)
        spread = features.std(dim=0, unbiased=False)
        # A spread of a few float32 roundings is no signal: blowing it up to 1 would make it one.
        constant = spread <= 1e-6 * self._mean.abs()
        self._spread = torch.where(constant, 0.0, spread)
        self._scale = torch.where(self._spread > 0, 1 / self._spread.clamp_min(1e-300), self._spread)
        standardised = (features - self._mean) * self._scale
        self._directions = _principal_directions(standardised)  # (F, R)
        self._inputs = (standardised @ self._directions).to(dtype)  # (N, R)
        self._labels = labels
        self._weight = self._inputs.new_zeros(num_classes, self._inputs.shape[1])
        # The optimum when nothing can be learned: the classes' frequencies.
        self._bias = (torch.bincount(labels, minlength=num_classes).to(dtype) / len(labels) + 1e-12).log()

    def start_from(self, weight: Tensor, bias: Tensor) -> None:
        """Begin the next ``solve`` at (weight, bias), which are for the features as given."""
        dtype = self._inputs.dtype
        self._weight = ((weight * self._spread) @ self._directions).to(dtype)
        self._bias = (bias + weight @ self._mean).to(dtype)

    def solve(self, l2: float, tolerance: float, max_iterations: int) -> tuple[Tensor, Tensor]:
        """(weight (C, F), bias (C,)) float64 at strength ``l2``, above 0, for the features as given; features without
        spread get weight 0.

        ``tolerance``: largest entry of the preconditioned gradient at which to stop.
        """
        rank = self._weight.shape[1]
        step = self._diagonal_scale(l2)  # (C, R)
        parameter = torch.cat([self._weight / step, self._bias[:, None]], dim=1).requires_grad_()
        optimiser = torch.optim.LBFGS(
            [parameter],
            max_iter=max_iterations,
            tolerance_grad=tolerance,
            tolerance_change=1e-12,
            history_size=30,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            weight = parameter[:, :rank] * step
            scores = torch.addmm(parameter[:, rank], self._inputs, weight.T)
            loss = functional.cross_entropy(scores, self._labels) + 0.5 * l2 * weight.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        solution = parameter.detach()
        self._weight, self._bias = solution[:, :rank] * step, solution[:, rank].clone()
        weight = (self._weight.double() @ self._directions.T) * self._scale
        return weight, self._bias.double() - weight @ self._mean

    def _diagonal_scale(self, l2: float) -> Tensor:
        """1 / sqrt of the Hessian's diagonal at the present weights, (C, R)."""
        probability = torch.softmax(torch.addmm(self._bias, self._inputs, self._weight.T), dim=1)
        curvature = (probability * (1 - probability)).T @ self._inputs.square() / len(self._inputs)
        return 1 / torch.sqrt(curvature + l2)


def _principal_directions(centred: Tensor) -> Tensor:
    """Orthonormal directions (F, R) in which the rows of ``centred`` (N, F) vary, from the smaller Gram matrix."""
    count, width = centred.shape
    gram = centred @ centred.T if count < width else centred.T @ centred
    square, vectors = torch.linalg.eigh(gram)
    kept = square > _RANK_TOLERANCE * square[-1].clamp_min(1e-300)
    directions: Tensor = vectors[:, kept]
    return directions if count >= width else centred.T @ directions / square[kept].sqrt()


def _predict(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, features.double(), weight.T).argmax(dim=1)


def _percent_correct(features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> float:
    return 100 * float((_predict(features, weight, bias) == targets).double().mean())
