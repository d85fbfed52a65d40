"""Networks that train with several branches and run with one: MobileOne, FastViT, RepViT, RepVGG, GhostNet-V3 and
others (arXiv 2206.04040, 2303.14189).
"""

from __future__ import annotations

from pathlib import Path

from timm.utils import reparameterize_model
from torch import nn

from fastssl.weights.check import check_features


def fused(backbone: nn.Module, *, size: int) -> nn.Module | None:
    """A copy of ``backbone`` with its parallel branches, and in some networks its BatchNorms, merged into single
    convolutions by timm.

    It computes the same features with fewer layers and cannot be trained on as well; its tensors have other names.

    Args:
        backbone: in evaluation mode, on the CPU; left as it is.
        size: side of the pictures on which both are compared.

    Returns:
        None where timm has nothing to merge, cannot do it, or comes to other features (by more than 1e-4 of their
        spread).
    """
    try:
        merged = reparameterize_model(backbone)
        if merged.state_dict().keys() == backbone.state_dict().keys():
            return None
        check_features(Path("fused"), backbone, merged.eval(), size=size, tolerance=1e-4)
    except Exception:  # whatever timm's merging fails with in one network; that one is exported as it was trained
        return None
    return merged
