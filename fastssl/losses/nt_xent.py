"""InfoNCE within the batch (NT-Xent), with the target smoothed towards the nearest negatives.

Sources: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR), arXiv
2002.05709; the smoothing is that of Lin et al., arXiv 2212.07158. For anchor (v, b) and global view g of the same
sample as its positive, with l the products of embeddings over tau, the negatives are both global views of all OTHER
samples, with smoothing mass a and a weighting w over ranks:

    loss = log(exp(l+) + sum_j exp(l_j)) - (1 - a) l+ - a sum_r w_r l_(r)
    l_(r): the r-th largest l_j, ties to the lowest column

The negatives do not depend on g: each anchor has one logsumexp and one search for both its positives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.losses.smoothed_target import SmoothedTarget, top_columns, weight_row


class SmoothedNTXent(SmoothedTarget):
    """Pair losses between all views of a batch and its global views.

    Anchors and candidates both receive their gradients; as a rule the candidates are the anchors' first two views,
    gathered over the ranks. Values are in float32, or in float64 when an input is float64, whatever autocast says.
    Nothing here reads a value back to the host. Extra memory is a few matrices (V * B, 2 * M). A NaN in an input
    reaches the loss. Settings: see :class:`SmoothedTarget`.

    Example::

        criterion = SmoothedNTXent(temperature=0.1, smoothing=0.2, weighting="stepped", neighbors=20)
        pairs = criterion(embeddings, embeddings[:2])             # L2-normalised (V, B, D), (2, B, D) -> (2, V)
        loss = (pairs[0, 1] + pairs[1, 0]) / 2                    # of two views; split_pairs and reduce_pairs of more
    """

    def forward(
        self, anchors: Tensor, candidates: Tensor, first: int = 0, smoothing: Tensor | float | None = None
    ) -> Tensor:
        """Loss of each pair of a positive's global view and an anchor's view, mean over the samples, in nats.

        Args:
            anchors: (V, B, D) floating point, L2-normalised: all views of this rank's samples.
            candidates: (2, M, D), the global views of the samples of all ranks, M >= B. They count as 2 * M columns,
                those of view 0 first.
            first: the anchors' samples are the candidates' samples ``first`` to ``first + B - 1``.
            smoothing: the mass a of this step, see :meth:`SmoothedTarget.mass`; the number 0.0 skips the search for the
                nearest.

        Returns:
            (2, V) float32 (float64 if an input is float64). Entry [g, v]: anchors of view v, positive in global view g.
                Entry [v, v] of a global view that is also a candidate compares each anchor with itself: finite, and of
                no meaning.

        Raises:
            ValueError: fewer negatives than neighbours, a smoothing that is no mass or requires a gradient.
        """
        mass = self.mass(smoothing)
        smoothed = isinstance(mass, Tensor) or mass > 0  # a tensor's value is not known here
        views, batch, samples = *anchors.shape[:2], candidates.shape[1]
        self.require_negatives(2 * (samples - 1), smoothed)
        dtype = torch.float64 if torch.float64 in (anchors.dtype, candidates.dtype) else torch.float32
        with torch.autocast(anchors.device.type, enabled=False):
            rows, columns = (tensor.flatten(0, 1).to(dtype) for tensor in (anchors, candidates))
            logits = rows @ columns.t() / self.temperature  # (V * B, 2 * M)
            by_view = logits.view(views, batch, 2, samples)
            positive = by_view[..., first : first + batch].diagonal(dim1=1, dim2=3).transpose(0, 1)  # (2, V, B)
            own, all_of_them = (torch.arange(count, device=logits.device) for count in (batch, samples))
            own = (own[:, None] + first == all_of_them)[:, None, :]  # (B, 1, M): no negatives of the anchor's sample
            negatives = by_view.masked_fill(own, -torch.inf).flatten(2)  # (V, B, 2 * M)

            # Differences to the positive, which stay accurate when the loss is near zero.
            behind = negatives.logsumexp(2) - positive
            loss = torch.logaddexp(behind, torch.zeros_like(behind))  # (2, V, B)
            if smoothed:
                if self.weights:
                    nearest = top_columns(negatives.detach().flatten(0, 1), len(self.weights))  # (V * B, n)
                    shares = logits.gather(1, nearest) * weight_row(self.weights, dtype, logits.device)
                    soft = shares.sum(1).view(views, batch)
                else:
                    soft = by_view.masked_fill(own, 0).sum((2, 3)) / (2 * (samples - 1))
                loss = loss + (mass.to(dtype) if isinstance(mass, Tensor) else mass) * (positive - soft)
            return loss.mean(2)
