"""The fast linear probe against scikit-learn, and on input that has little or nothing to learn from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastssl.evaluate.features import Features, ProbeError
from fastssl.evaluate.linear import L2_DEFAULT, L2_GRID, LogisticRegression, linear_probe


def fit_logistic(features, labels, classes, l2):
    """To the last digits."""
    return LogisticRegression(features, labels, classes).solve(l2, 1e-7, 5000)


def make(count, classes=4, width=20, noise=2.0, seed=0):
    """Overlapping clusters behind a ReLU with features of very different scale, as networks give them."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(1234)
    labels = torch.randint(0, classes, (count,), generator=generator)
    hidden = torch.randn(classes, 8, generator=fixed)[labels] + noise * torch.randn(count, 8, generator=generator) / 2
    mixing = torch.randn(8, width, generator=fixed) * torch.exp(torch.randn(width, generator=fixed))
    return Features(torch.relu(hidden @ mixing + 1), labels, torch.arange(count))


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_coefficients_and_accuracy_equal_scikit_learn(l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, val = make(500), make(400, seed=1)
    mean, std = train.features.double().mean(dim=0), train.features.double().std(dim=0, unbiased=False)
    reference = linear_model.LogisticRegression(C=1 / (len(train) * l2), max_iter=20000, tol=1e-10)
    reference.fit(((train.features - mean) / std).numpy(), train.labels.numpy())
    weight, bias = fit_logistic(train.features, train.labels, 4, l2)
    standardised = (weight * std).numpy()
    np.testing.assert_allclose(standardised, reference.coef_, atol=2e-3 * np.abs(reference.coef_).max())
    intercept = (bias + weight @ mean).numpy()
    np.testing.assert_allclose(
        intercept - intercept.mean(), reference.intercept_ - reference.intercept_.mean(), atol=1e-2
    )
    ours = (val.features.double() @ weight.T + bias).argmax(dim=1).numpy()
    theirs = reference.predict(((val.features - mean) / std).numpy())
    assert abs((ours == val.labels.numpy()).mean() - (theirs == val.labels.numpy()).mean()) <= 0.005


def test_solution_is_a_minimum_of_the_stated_loss():
    train = make(200, classes=3, width=10)
    weight, bias = fit_logistic(train.features, train.labels, 3, 0.01)
    std = train.features.double().std(dim=0, unbiased=False)
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(train.features.double() @ weight.T + bias, train.labels)
    (loss + 0.005 * (weight * std).square().sum()).backward()
    # In units of the standardised weights, which are of the order of 1.
    assert (weight.grad / std).abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4


def test_more_features_than_samples_and_repeated_features():
    linear_model = pytest.importorskip("sklearn.linear_model")
    train = make(60, width=30)
    features = torch.cat([train.features] * 4, dim=1)  # 120 columns of rank 30, 60 rows
    std = features.double().std(dim=0, unbiased=False)
    reference = linear_model.LogisticRegression(C=1 / (60 * 0.1), max_iter=20000, tol=1e-10)
    reference.fit(((features - features.double().mean(dim=0)) / std).numpy(), train.labels.numpy())
    weight, _ = fit_logistic(features, train.labels, 4, 0.1)
    np.testing.assert_allclose((weight * std).numpy(), reference.coef_, atol=2e-3 * np.abs(reference.coef_).max())


def test_probe_chooses_the_strength_on_held_out_samples_and_is_deterministic():
    train, val = make(600, width=80, noise=3.0), make(300, width=80, noise=3.0, seed=1)
    result = linear_probe(train, val)
    assert result == linear_probe(train, val)
    assert result.grid[result.l2] == max(result.grid.values())
    assert result.l2 == max(l2 for l2, accuracy in result.grid.items() if accuracy == result.grid[result.l2])
    assert result.accuracy > 100 / 4 + 15 and result.train_accuracy >= result.accuracy - 5
    assert result.confidence[0] < result.accuracy < result.confidence[1]
    assert (result.train_samples, result.val_samples, result.classes, result.unseen) == (600, 300, 4, 0)


def two_hills(count, seed):
    """Four rough hints at the class, 60 columns of noise, and two columns whose small difference tells it exactly.

    A strong penalty sees the hints, a middle one learns the noise, and only a weak one allows the large weights that
    the difference needs.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    side = 2.0 * labels[:, None] - 1
    hints, common, noise = (torch.randn(count, width, generator=generator) for width in (4, 1, 60))
    features = torch.cat([0.5 * side + hints, common + 0.03 * side, common, noise], dim=1)
    return Features(features, labels, torch.arange(count))


def test_a_held_out_curve_with_two_hills_does_not_fool_the_search():
    result = linear_probe(two_hills(500, seed=2), two_hills(400, seed=1))
    curve = list(result.grid.values())
    assert len(curve) == len(L2_GRID)
    assert max(curve[:3]) > max(curve[3:7]) + 1, "a first hill, and a long way down from it"
    assert result.l2 <= 1e-5 and result.accuracy > 90, "the second, higher hill"


def test_noise_features_ask_for_a_strong_penalty_and_give_chance():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    part = [Features(torch.randn(400, 50, generator=generator), labels, torch.arange(400)) for _ in range(2)]
    result = linear_probe(*part)
    assert 15 < result.accuracy < 35


def test_labels_need_not_be_consecutive():
    train, val = make(300), make(200, seed=1)
    plain = linear_probe(train, val)
    names = torch.tensor([3, 50, 51, 900])
    renamed = linear_probe(
        Features(train.features, names[train.labels], train.index), Features(val.features, names[val.labels], val.index)
    )
    assert renamed.accuracy == plain.accuracy and renamed.classes == 4


def test_constant_features_are_ignored():
    train, val = make(300), make(200, seed=1)
    plain = linear_probe(train, val)
    constant = [
        Features(torch.cat([part.features, torch.full((len(part), 3), 1e4)], dim=1), part.labels, part.index)
        for part in (train, val)
    ]
    assert linear_probe(*constant).accuracy == pytest.approx(plain.accuracy, abs=0.51)
    only_constant = [Features(torch.ones(len(part), 5), part.labels, part.index) for part in (train, val)]
    most_common = int(train.labels.bincount().argmax())
    assert linear_probe(*only_constant).accuracy == pytest.approx(
        100 * float((val.labels == most_common).float().mean())
    )


def test_one_class_is_an_error():
    train = make(50)
    single = Features(train.features, torch.full((50,), 6), train.index)
    with pytest.raises(ProbeError, match="one class only"):
        linear_probe(single, train)


def test_one_sample_a_class_uses_the_default_strength():
    train = make(300)
    rows = np.array([int((train.labels == c).nonzero()[0]) for c in range(4)])
    result = linear_probe(train.subset(rows), make(100, seed=1))
    assert result.grid == {} and result.l2 == L2_DEFAULT and result.train_accuracy == 100


def test_classes_missing_from_training_count_as_wrong():
    train, val = make(300), make(200, seed=1)
    kept = train.subset(np.flatnonzero(train.labels.numpy() != 3))
    result = linear_probe(kept, val)
    assert result.unseen == int((val.labels == 3).sum()) > 0
    assert result.accuracy <= 100 * (1 - result.unseen / 200)
