"""What efficientnet_pytorch and its offshoots call the tensors of timm's ``tf_efficientnet_*``, which compute alike."""

from __future__ import annotations

from collections.abc import Iterable

_AROUND = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
#: Of a block that widens first, and of one that does not.
_WIDENING = {"conv_pw": "_expand_conv", "conv_dw": "_depthwise_conv", "conv_pwl": "_project_conv"}
_WIDENING |= {"bn1": "_bn0", "bn2": "_bn1", "bn3": "_bn2"}
_WIDENING |= {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
_PLAIN = _WIDENING | {"bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}


def efficientnet_names(wanted: Iterable[str]) -> dict[str, str]:
    """{timm's name: theirs} of the tensors of a backbone; the blocks are numbered through, in timm's order."""
    wanted, numbers, table = list(wanted), dict[str, int](), {}
    for name in wanted:
        layer, _, tensor = name.rpartition(".")
        block, names = "", _AROUND
        if layer.startswith("blocks."):
            block = ".".join(layer.split(".")[:3]) + "."
            names = _WIDENING if f"{block}conv_pwl.weight" in wanted else _PLAIN
        part, lead = layer.removeprefix(block), f"_blocks.{numbers.setdefault(block, len(numbers))}." if block else ""
        table[name] = f"{lead}{names.get(part, part)}.{tensor}"
    return table
