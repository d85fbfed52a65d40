"""Weighted kNN against a slow twin and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from processes import run_processes
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.evaluate import knn
from fastssl.evaluate.features import Features, ProbeError, gathered, shard
from fastssl.evaluate.knn import (
    knn_accuracies,
    knn_accuracy,
    nearest_neighbors,
    ranked_classes,
)


def slow_knn(bank, labels, query, k, temperature, exclude_self=False):
    """The formula, one query and one bank sample at a time, in Python floats."""
    predicted = []
    for q, row in enumerate(query.tolist()):
        scored = []
        for b, other in enumerate(bank.tolist()):
            if exclude_self and b == q:
                continue
            dot = sum(x * y for x, y in zip(row, other))
            scored.append((dot / math.sqrt(sum(x * x for x in row)) / math.sqrt(sum(y * y for y in other)), b))
        votes = {}
        for cosine, b in sorted(scored, reverse=True)[:k]:
            votes[int(labels[b])] = votes.get(int(labels[b]), 0.0) + math.exp(cosine / temperature)
        predicted.append(max(sorted(votes), key=votes.get))
    return predicted


def knn_predict(bank, labels, query, *, k=20, temperature=0.07, exclude_self=False):
    """The class with the most votes for each query, of a bank that nobody shares."""
    own = 0 if exclude_self else None
    similarity, index = knn._search(bank, query, min(k, len(bank) - exclude_self), query.device, own)
    return ranked_classes(similarity, labels[index], temperature, places=1)[:, 0]


def leave_one_out(features, **how):
    return knn_accuracies(features, features, leave_one_out=True, **how)[0]


def clusters(count, classes=5, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + 1.5 * torch.randn(count, width, generator=generator), labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (500, 1.0)])
def test_equals_the_slow_twin(k, temperature):
    bank, labels = clusters(90)
    query, _ = clusters(40, seed=1)
    assert knn_predict(bank, labels, query, k=k, temperature=temperature).tolist() == slow_knn(
        bank, labels, query, k, temperature
    )


def test_leave_one_out_equals_the_slow_twin():
    bank, labels = clusters(70)
    expected = slow_knn(bank, labels, bank, 7, 0.1, exclude_self=True)
    assert knn_predict(bank, labels, bank, k=7, temperature=0.1, exclude_self=True).tolist() == expected
    result = leave_one_out(Features(bank, labels, torch.arange(70)), ks=[7], temperature=0.1)
    assert result.accuracy == pytest.approx(100 * np.mean(np.array(expected) == labels.numpy()))


def test_equals_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, labels = clusters(400, classes=7, width=16)
    query, truth = clusters(300, classes=7, width=16, seed=5)
    reference = neighbors.KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    expected = reference.fit(bank.double().numpy(), labels.numpy()).predict(query.double().numpy())
    assert knn_predict(bank, labels, query).tolist() == expected.tolist()
    result = knn_accuracy(Features(bank, labels, torch.arange(400)), Features(query, truth, torch.arange(300)))
    assert result.accuracy == pytest.approx(100 * float((expected == truth.numpy()).mean()))
    assert result.confidence[0] < result.accuracy < result.confidence[1] and result.classes == 7


@pytest.mark.parametrize("exclude_self", [False, True])
def test_tiles_do_not_change_the_neighbours(monkeypatch, exclude_self):
    bank, _ = clusters(2500, width=8)
    query = bank if exclude_self else clusters(1300, width=8, seed=2)[0]
    own = 0 if exclude_self else None
    similarity, index = knn._search(bank, query, 9, query.device, own)
    monkeypatch.setattr(knn, "_TILE_ELEMENTS", 64 * 1024)
    tiled, tiled_index = knn._search(bank, query, 9, query.device, own)
    torch.testing.assert_close(tiled, similarity, atol=1e-6, rtol=0)
    # An index may differ only where two samples are equally near up to rounding.
    assert (tiled_index == index).float().mean() > 0.999
    whole = torch.nn.functional.normalize(query, dim=1) @ torch.nn.functional.normalize(bank, dim=1).T
    if exclude_self:
        whole.fill_diagonal_(-torch.inf)
    torch.testing.assert_close(similarity.float(), whole.topk(9, dim=1).values, atol=1e-6, rtol=0)


def test_low_temperatures_neither_overflow_nor_vanish():
    bank, labels = clusters(60)
    query, _ = clusters(20, seed=3)
    # As T goes to 0 the nearest neighbour alone decides.
    assert (
        knn_predict(bank, labels, query, k=10, temperature=1e-4).tolist()
        == knn_predict(bank, labels, query, k=1).tolist()
    )


def test_equal_votes_go_to_the_lower_label():
    bank = torch.tensor([[1.0, 0.1], [1.0, -0.1]])
    assert knn_predict(bank, torch.tensor([4, 2]), torch.tensor([[1.0, 0.0]]), k=2).tolist() == [2]


def test_scale_is_ignored_and_a_class_missing_from_the_bank_is_wrong():
    bank, labels = clusters(50)
    query, _ = clusters(10, seed=1)
    scale = torch.rand(50, 1) * 100 + 0.1
    assert knn_predict(bank * scale, labels, query).tolist() == knn_predict(bank, labels, query * 7).tolist()
    unseen = Features(query, torch.full((10,), 77), torch.arange(10))
    assert knn_accuracy(Features(bank, labels, torch.arange(50)), unseen).accuracy == 0


def test_classes_are_ranked_by_their_votes():
    """Against scikit-learn's probabilities: the class is one of the five most probable, and has a vote."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    bank, labels = clusters(300, classes=9, width=6)
    query, truth = clusters(200, classes=9, width=6, seed=5)
    results = knn_accuracies(
        Features(bank, labels, torch.arange(300)), Features(query, truth, torch.arange(200)), ks=[20, 7, 500]
    )
    assert [result.k for result in results] == [20, 7, 300]
    for result in results:
        reference = neighbors.KNeighborsClassifier(
            result.k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        )
        probability = reference.fit(bank.double().numpy(), labels.numpy()).predict_proba(query.double().numpy())
        order = np.argsort(-probability, axis=1, kind="stable")[:, :5]
        hits = (order == truth.numpy()[:, None]) & (np.take_along_axis(probability, order, 1) > 0)
        assert result.accuracy == pytest.approx(100 * hits[:, 0].mean()) and result.top5_accuracy == pytest.approx(
            100 * hits.mean() * 5
        )
        assert (
            result.accuracy < result.top5_accuracy
            and result.top5_confidence[0] < result.top5_accuracy < result.top5_confidence[1]
        )


def test_a_class_without_votes_has_no_place():
    ranked = ranked_classes(torch.tensor([[0.9, 0.5, 0.4]]), torch.tensor([[3, 1, 3]]), 0.1, places=5)
    assert ranked.tolist() == [[3, 1, -1, -1, -1]]


def test_top5_of_five_classes_says_nothing():
    bank, labels = clusters(40)
    assert (
        knn_accuracy(Features(bank, labels, torch.arange(40)), Features(bank, labels, torch.arange(40))).top5_accuracy
        is None
    )


def test_equal_neighbours_come_in_the_banks_order(monkeypatch):
    monkeypatch.setattr(knn, "_TILE_ELEMENTS", 16)
    bank = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).repeat(4, 1)  # every row four times
    index = nearest_neighbors(bank, bank[:5], k=6)[1]
    assert index[:, :4].tolist() == [[row, row + 5, row + 10, row + 15] for row in range(5)]


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            # A view is no memory: it shows its whole base.
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.elements = max(self.elements, tensor.numel())
        return found


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_neither_the_bank_nor_the_similarities_are_ever_whole(monkeypatch, leave_one_out):
    for name, elements in (
        ("_TILE_ELEMENTS", 1 << 15),
        ("_QUERY_ELEMENTS", 1 << 14),
        ("_EXACT_ELEMENTS", 1 << 14),
        ("_QUERY_TILE", 256),
    ):
        monkeypatch.setattr(knn, name, elements)
    bank, labels = clusters(20_000 if not leave_one_out else 4_000, width=48)
    query, truth = clusters(600, width=48, seed=1)
    data = Features(bank, labels, torch.arange(len(bank)))
    asked = data if leave_one_out else Features(query, truth, torch.arange(600))
    with LargestTensor() as largest:
        knn_accuracies(data, asked, ks=[5], leave_one_out=leave_one_out)
    assert 0 < largest.elements <= 1 << 16 < bank.numel() / 2


CASES = [{"ks": [1, 20]}, {"ks": [1000]}, {"ks": [7], "leave_one_out": True}, {"ks": [1000], "leave_one_out": True}]


def over_processes():
    """What this process finds when it has a share of the bank, and the whole of the queries."""
    bank, labels = clusters(401, classes=7, width=16)
    bank[300:] = bank[:101]  # neighbours that are equally near, in parts of two processes
    mine = Features(bank, labels, torch.arange(401)).subset(shard(np.arange(401)))
    query, truth = clusters(90, classes=7, width=16, seed=5)
    asked = Features(query, truth, torch.arange(90))
    found = [
        knn_accuracies(mine, gathered(mine) if "leave_one_out" in case else asked, shared=True, **case)
        for case in CASES
    ]
    spoilt = Features(mine.features.clone(), mine.labels, mine.index)
    if int(mine.index[-1]) == 400:
        spoilt.features[3, 3] = torch.nan
    try:
        knn_accuracies(spoilt, asked, ks=[3], shared=True)
    except ProbeError as error:
        found.append(str(error))
    return found


def test_shares_of_several_processes_find_what_one_finds():
    alone = over_processes()
    assert "NaN" in alone[-1]
    for number, found in enumerate(run_processes(over_processes, 3, timeout=300)):
        assert found[:-1] == alone[:-1]
        assert ("NaN" if number == 2 else "another process") in found[-1]


def test_wrong_arguments():
    bank, labels = clusters(10)
    whole = Features(bank, labels, torch.arange(10))
    with pytest.raises(ProbeError, match="k >= 1"):
        knn_accuracy(whole, whole, k=0)
    with pytest.raises(ProbeError, match="temperature"):
        knn_accuracy(whole, whole, temperature=0.0)
    with pytest.raises(ProbeError, match="two samples"):
        leave_one_out(Features(bank[:1], labels[:1], torch.arange(1)), ks=[20])


def test_labels_may_be_any_numbers():
    bank, labels = clusters(60)
    query, _ = clusters(20, seed=1)
    wide = torch.tensor([3, 10**12, 5, 7 * 10**15, 11])
    assert knn_predict(bank, wide[labels], query).tolist() == wide[knn_predict(bank, labels, query)].tolist()


def test_numbers_of_neighbours_beyond_the_bank_are_one_result():
    bank, labels = clusters(30)
    data = Features(bank, labels, torch.arange(30))
    assert [result.k for result in knn_accuracies(data, data, ks=[10**12, 5, 30, 31])] == [30, 5]
