from __future__ import annotations

import gc

import torch

from fastssl.pipelines.ops.memory import RecycledMemory


def test_memory_is_used_again_only_when_nobody_refers_to_it() -> None:
    memory = RecycledMemory()
    first = memory.take(2, 3, 4, 4)
    assert first.shape == (2, 3, 4, 4) and first.is_contiguous() and first.dtype == torch.float32
    place = first.data_ptr()
    second = memory.take(2, 3, 4, 4)
    assert second.data_ptr() != place
    del first
    assert memory.take(1, 3, 4, 4).data_ptr() == place  # a smaller one fits, too


def test_every_kind_of_reference_counts() -> None:
    """Views, NumPy arrays on the same memory, storages, and what autograd has saved for the way back."""
    weight = torch.ones((), requires_grad=True)
    kinds = {
        "view": lambda tensor: tensor.permute(0, 3, 1, 2)[:1],
        "numpy": lambda tensor: tensor.numpy()[0],
        "storage": lambda tensor: tensor.untyped_storage(),
        "dlpack": torch.to_dlpack,
        "autograd": lambda tensor: (tensor * weight).sum(),
    }
    for name, keep in kinds.items():
        memory = RecycledMemory()
        tensor = memory.take(2, 2, 2, 2).fill_(3.0)
        place = tensor.data_ptr()
        kept = keep(tensor)
        del tensor
        assert memory.take(2, 2, 2, 2).fill_(5.0).data_ptr() != place, name
        if name == "autograd":
            kept.backward()
            assert weight.grad == 48.0
        del kept
        gc.collect()
        assert place in {tensor.data_ptr() for tensor in [memory.take(2, 2, 2, 2), memory.take(2, 2, 2, 2)]}, name


def test_whoever_keeps_everything_gets_new_memory_and_the_list_stays_short() -> None:
    memory = RecycledMemory(most=3)
    kept = [memory.take(4, 4).fill_(float(k)) for k in range(20)]
    assert len({tensor.data_ptr() for tensor in kept}) == 20
    assert all((tensor == k).all() for k, tensor in enumerate(kept))
    assert len(memory._blocks) == 3
    del kept
    memory.take(8, 8)  # larger than all that is there: the old blocks are given up
    assert len(memory._blocks) == 1
    assert memory.take(0, 3).shape == (0, 3)
