"""An export is compared with the backbone that it was made from before anybody else gets it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.errors import FastSSLError
from fastssl.utils.suggest import some_names


def check_names(path: Path, have: Iterable[str], want: Iterable[str], network: str) -> None:
    """Refuse a set of tensors that is not exactly the one that ``network`` has.

    Raises:
        FastSSLError: one line that counts what is missing and what is left over, and names the first few of each.
    """
    have, want = set(have), set(want)
    odd = ((want - have, "missing"), (have - want, "left over"))
    if parts := [some_names(names, word) for names, word in odd if names]:
        raise FastSSLError(f"{path.name}: the tensors are not those of {network}: {'; '.join(parts)}")


@torch.no_grad()
def check_features(
    path: Path,
    backbone: nn.Module,
    other: Callable[[Tensor], Tensor],
    *,
    size: int,
    tolerance: float,
    batches: Iterable[int] = (2,),
) -> float:
    """The largest difference between the backbone's features and the export's, on random images, as a share of how far
    features are from their mean.

    A share of that and not of the features: much of a feature can be the same for every image, and hide an export that
    reads no image at all. A network in which rounding alone, measured against its copy in float64, grows past
    ``tolerance`` is not refused for that.

    Args:
        path: for the message.
        backbone: what was exported, in evaluation mode, on the CPU.
        other: images (N, 3, size, size) float32 -> features (N, F).
        size: side of the images.
        tolerance: what the result may be; or ten times what rounding does, if that is more.
        batches: sizes N to try, at least two images in all.

    Raises:
        FastSSLError: the features differ by more, are not finite, or have another shape.
    """
    exact = copy.deepcopy(backbone).double()
    wanted, ours, found = [], [], []
    for number, batch in enumerate(batches):
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(number))
        wanted.append(exact(images.double()))
        ours.append(backbone(images))
        found.append(other(images))
        if found[-1].shape != ours[-1].shape:
            raise FastSSLError(
                f"{path.name}: gives features of shape {tuple(found[-1].shape)}, the backbone "
                f"{tuple(ours[-1].shape)}; not written"
            )
    truth, features, others = torch.cat(wanted), torch.cat(ours), torch.cat(found)
    spread = max(float((truth - truth.mean(0)).abs().max()), 1e-30)
    rounding, difference = (float((a - b).abs().max()) / spread for a, b in ((features, truth), (others, features)))
    if not difference <= max(tolerance, 10 * rounding):  # NaN is no number to pass on either
        raise FastSSLError(
            f"{path.name}: gives features that differ by {difference:.2g} of their spread from the backbone's; "
            "not written"
        )
    return difference
