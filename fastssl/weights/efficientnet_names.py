"""What efficientnet_pytorch (lukemelas), whose weights and offshoots are many, calls the tensors of timm's networks
``tf_efficientnet_*``, which have its padding and its BatchNorm.
"""

from __future__ import annotations

from collections.abc import Iterable

#: Of a block that widens first, and of one that does not (timm's depth-wise separable one).
_WIDENING = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
_WIDENING |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
_PLAIN = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
_SQUEEZE = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
_AROUND = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}


def efficientnet_names(wanted: Iterable[str]) -> dict[str, str]:
    """{timm's name: theirs} of the tensors of a backbone; the blocks are numbered through, in timm's order."""
    wanted, numbers, table = list(wanted), dict[str, int](), {}
    for name in wanted:
        layer, _, tensor = name.rpartition(".")
        block = ".".join(layer.split(".")[:3]) if layer.startswith("blocks.") else ""
        part = layer.removeprefix(f"{block}.")
        if not block:
            table[name] = f"{_AROUND.get(part, part)}.{tensor}"
            continue
        number = numbers.setdefault(block, len(numbers))
        names = _WIDENING if f"{block}.conv_pwl.weight" in wanted else _PLAIN
        table[name] = f"_blocks.{number}.{(names | _SQUEEZE).get(part, part)}.{tensor}"
    return table
