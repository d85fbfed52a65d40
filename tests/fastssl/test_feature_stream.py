"""Features of training views: those of the loader's photos, in its order; passes; epochs that are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_features import MeanColour

from fastssl.evaluate import feature_stream
from fastssl.evaluate.feature_stream import FeatureStream, _passes
from fastssl.evaluate.features import ProbeError
from fastssl.evaluate.protocols import PROTOCOLS
from fastssl.pipelines.beton.reader import BetonReader
from fastssl.pipelines.loader import ViewLoader
from fastssl.utils.transfer import pinned_bytes

CPU, VIEW = torch.device("cpu"), replace(PROTOCOLS["sslight"], size=16).view()
TARGETS = 100 + torch.arange(48)


def stream(reader: BetonReader, batch: int = 12, indices: np.ndarray | None = None, **options: object) -> FeatureStream:
    indices = np.arange(len(reader)) if indices is None else indices
    return FeatureStream(
        MeanColour(), reader, indices, TARGETS, VIEW, batch_size=batch, device=CPU, seed=3, workers=1, **options
    )


def read(
    reader: BetonReader, epochs: int, batch: int = 12, **options: object
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    with stream(reader, batch, **options) as source:
        return [list(source.epoch(epoch)) for epoch in range(epochs)]


def plain(steps: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[list, list]]:
    return [(targets.tolist(), features.tolist()) for features, targets in steps]


def test_equals_the_loader_and_the_network(beton: Path) -> None:
    chosen = np.arange(5, 45)
    how = {"seed": 3, "workers": 1, "indices": chosen, "drop_last": False}
    with BetonReader(beton) as reader, ViewLoader(reader, [VIEW], 12, **how) as loader:
        found = read(reader, 2, indices=chosen)
        for epoch, steps in enumerate(found):
            assert [len(targets) for _, targets in steps] == [12, 12, 12, 4]
            assert sorted(torch.cat([targets for _, targets in steps]).tolist()) == (100 + chosen).tolist()
            for (features, targets), batch in zip(steps, loader.epoch(epoch)):
                # Dropout would show: the network is in evaluation mode.
                torch.testing.assert_close(features, batch.views[0].mean(dim=(2, 3)), atol=1e-6, rtol=0)
                assert torch.equal(targets, 100 + batch.index)
    assert not torch.equal(found[0][0][0], found[1][0][0])


def test_passes_of_the_network_do_not_change_a_batch(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with BetonReader(beton) as reader:
        chosen = np.arange(42)  # of the last batch one pass and a half are there
        whole = read(reader, 1, indices=chosen)
        monkeypatch.setattr(feature_stream, "PASS", 4)
        parts = read(reader, 1, indices=chosen)
    assert len(whole[0]) == len(parts[0]) == 4 and len(whole[0][-1][1]) == 6
    for (one, targets), (other, others) in zip(whole[0], parts[0]):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
        assert torch.equal(targets, others)


def test_equal_passes() -> None:
    assert [_passes(batch) for batch in (1, 256, 257, 258, 512, 4096, 4099)] == [1, 1, 1, 2, 2, 16, 1]


def test_features_are_kept_in_blocks_that_waste_little_where_they_are_pinned(
    beton: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch takes the next power of two: in one block two epochs of these would be 2,048 bytes."""
    step = 12 * 3 * 4
    monkeypatch.setattr(feature_stream, "BLOCK", 512)
    with BetonReader(beton) as reader, stream(reader, cached_epochs=2) as source:
        kept = [list(source.epoch(epoch)) for epoch in range(4)]
        blocks = {own.untyped_storage().data_ptr(): own.untyped_storage().nbytes() for own in source._features}
    assert sorted(map(str, plain(kept[0] + kept[1]))) == sorted(map(str, plain(kept[2] + kept[3])))
    assert list(blocks.values()) == [3 * step, 3 * step, 2 * step]
    assert sum(map(pinned_bytes, blocks.values())) == 3 * 512 and pinned_bytes(8 * step) == 2048


def test_kept_epochs_are_gone_round_in_a_new_order(beton: Path) -> None:
    with BetonReader(beton) as reader:
        chosen = np.arange(40)
        fresh, kept = (read(reader, epochs, indices=chosen, cached_epochs=n) for epochs, n in ((2, 0), (6, 2)))
    for epoch, steps in enumerate(kept):
        assert sorted(plain(steps)) == sorted(plain(fresh[epoch % 2]))
    orders = [[targets.tolist() for _, targets in steps] for steps in kept]
    assert orders[:2] == [[targets.tolist() for _, targets in steps] for steps in fresh]
    assert orders[0] != orders[2] or orders[0] != orders[4]


def test_processes_share_every_batch(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with BetonReader(beton) as reader:
        alone, parts = read(reader, 3, cached_epochs=2), []
        monkeypatch.setattr(feature_stream, "world_size", lambda: 2)
        for rank in range(2):
            monkeypatch.setattr(feature_stream, "rank", lambda rank=rank: rank)
            parts.append(read(reader, 3, cached_epochs=2))
    for epoch, steps in enumerate(alone):
        for step, (features, targets) in enumerate(steps):
            assert all(len(part[epoch]) == len(steps) for part in parts)
            torch.testing.assert_close(torch.cat([part[epoch][step][0] for part in parts]), features, atol=1e-6, rtol=0)
            assert torch.equal(torch.cat([part[epoch][step][1] for part in parts]), targets)


def test_the_last_batch_is_filled_up_for_all_processes(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """41 photos in batches of 12 leave 5: the epoch's first photo is read once more, as by torch's sampler."""
    monkeypatch.setattr(feature_stream, "world_size", lambda: 2)
    parts = []
    with BetonReader(beton) as reader:
        for rank in range(2):
            monkeypatch.setattr(feature_stream, "rank", lambda rank=rank: rank)
            parts.append(read(reader, 1, indices=np.arange(41))[0])
    for part in parts:
        assert [len(targets) for _, targets in part] == [6, 6, 6, 3]
    seen = torch.cat([targets for steps in zip(*parts) for _, targets in steps]).tolist()
    assert sorted(seen[:-1]) == list(range(100, 141)) and seen[-1] == seen[0]


def test_batches_that_do_not_fit(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with BetonReader(beton) as reader:
        with pytest.raises(ProbeError, match="48 photos to learn from, fewer than one batch of 49: lower --batch-size"):
            stream(reader, 49)
        monkeypatch.setattr(feature_stream, "world_size", lambda: 5)
        with pytest.raises(ProbeError, match="a batch of 12 cannot be shared by 5 processes"):
            stream(reader)
