"""Drop path from a table: the arithmetic of timm's, and uniforms that belong to the sample."""

from __future__ import annotations

import copy

import numpy as np
import torch
from timm.layers import DropPath
from torch import nn

from fastssl.models.backbones import create_backbone
from fastssl.models.drop_path import DropTable, PlannedDropPath


def test_every_drop_path_of_a_network_reads_the_table() -> None:
    backbone = create_backbone("vit_tiny", drop_path=0.1)
    rates = [layer.drop_prob for layer in backbone.modules() if isinstance(layer, DropPath)]
    table = DropTable.install(backbone)
    layers = [layer for layer in backbone.modules() if isinstance(layer, PlannedDropPath)]
    # The first block's rate is 0: it has none. From there linear to 0.1, twice a block.
    assert table.layers == len(layers) == 22 and not any(isinstance(layer, DropPath) for layer in backbone.modules())
    np.testing.assert_allclose(sorted(layer.drop_prob for layer in layers), sorted(rates), rtol=1e-6)
    assert max(rates) == 0.10000000149011612 and [layer.number for layer in layers] == list(range(22))
    assert DropTable.install(create_backbone("resnet18")) is None


def test_a_branch_is_left_out_where_its_coin_says_so_and_scaled_elsewhere() -> None:
    table = DropTable(2)
    layer = PlannedDropPath(0.25, table, 1).train()
    branch = torch.ones(3, 2, 4)
    assert torch.equal(layer(branch), branch)  # no uniforms, nothing is dropped
    table.uniforms = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.9, 0.1, 0.25, 0.2]])
    assert torch.equal(layer(branch)[:, 0, 0], torch.tensor([4 / 3, 0.0, 4 / 3]))
    table.first = 1
    assert torch.equal(layer(branch)[:, 0, 0], torch.tensor([0.0, 4 / 3, 0.0]))
    assert torch.equal(layer.eval()(branch), branch)


def test_coins_are_uniform_and_belong_to_sample_view_and_layer() -> None:
    table = DropTable(7)
    uniforms = table.draw(3, 1, np.arange(500), 4)
    assert uniforms.shape == (7, 2000) and uniforms.dtype == np.float32 and uniforms.min() >= 0 and uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 0.01 and len(np.unique(uniforms)) > 13_900
    # Part of the samples, in another order: the same uniforms, whatever batch they are in.
    some = np.array([499, 7, 20])
    np.testing.assert_array_equal(table.draw(3, 1, some, 4).reshape(7, 4, 3), uniforms.reshape(7, 4, 500)[:, :, some])
    assert not np.array_equal(table.draw(3, 2, np.arange(500), 4), uniforms) and not np.array_equal(
        table.draw(4, 1, np.arange(500), 4), uniforms
    )


def test_copies_share_the_table_and_can_be_freed_of_it() -> None:
    block = nn.Sequential(DropPath(0.5))
    table = DropTable.install(block)
    twin = copy.deepcopy(block)
    assert twin[0].table is table and twin[0] is not block[0]
    DropTable.remove(twin)
    assert isinstance(twin[0], nn.Identity) and isinstance(block[0], PlannedDropPath)
