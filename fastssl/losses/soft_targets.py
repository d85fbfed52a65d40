"""Cross-entropy of every view against every target distribution, for methods whose targets are soft: DINO and SwAV.

Sources: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO), arXiv 2104.14294, and
"Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (SwAV), arXiv 2006.09882. With p_t a
target of one sample, z_v the logits of view v of it and tau the temperature,

    pair(t, v)        = - sum_k p_t[k] log softmax(z_v / tau)[k] = logsumexp(z_v / tau) - sum_k p_t[k] z_v[k] / tau
                        as p_t sums to one
    d pair(t, v)/d z_v = (softmax(z_v / tau) - p_t) / tau

Neither needs the log-probabilities of more than one view at a time, and the gradient of the softmax only its logsumexp:
beside the inputs one number a sample and view is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def soft_cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Loss of each pair of a target and a view, mean over the samples, in nats.

    Computed in float32, or in float64 when an input is float64, whatever autocast says; nothing is read back to the
    host. Extra memory is the gradient and two (B, K) matrices. A NaN in an input makes its pairs NaN.

    Args:
        targets: (T, B, K) floating point, no gradient; each row over K is a distribution and sums to one, which the
            gradient relies on.
        logits: (V, B, K) floating point, before the division by the temperature; the gradient comes back in their
            dtype.
        temperature: tau of the softmax over the logits, positive.

    Returns:
        (T, V) float32 (float64 if an input is float64): entry [t, v] is ``- mean_b sum_k targets[t, b, k] log
            softmax(logits[v, b] / tau)[k]``.

    Raises:
        ValueError: shapes that do not agree, targets that require a gradient.

    Example::

        pairs = soft_cross_entropy(teacher_probabilities(teacher_logits, center, 0.04), student_logits, 0.1)
        loss = reduce_pairs(*split_pairs(pairs), weights)
    """
    if targets.dim() != 3 or targets.shape[1:] != logits.shape[1:]:  # would be broadcast
        raise ValueError(
            f"targets {tuple(targets.shape)} and logits {tuple(logits.shape)} must agree in samples and classes"
        )
    if targets.requires_grad:
        raise ValueError("targets require a gradient, but the loss treats them as constants: pass targets.detach()")
    pairs: Tensor = _SoftCrossEntropy.apply(targets, logits, float(temperature))
    return pairs


@torch.no_grad()
def teacher_probabilities(logits: Tensor, center: Tensor, temperature: Tensor | float) -> Tensor:
    """DINO's targets, ``softmax((logits - center) / temperature)``, without gradient.

    Args:
        logits: (T, B, K) floating point, of the teacher.
        center: (K,) floating point, the running mean of the teacher's logits.
        temperature: tau_t, a number or a tensor with one element on the device.

    Returns:
        (T, B, K) float32, or float64 if logits or centre are float64, whatever autocast says; sums to one over K.
    """
    with torch.autocast(logits.device.type, enabled=False):
        dtype = _working_dtype(logits, center)
        return (logits.to(dtype) - center.to(dtype)).div_(temperature).softmax(-1)


def _working_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class _SoftCrossEntropy(torch.autograd.Function):
    """Keeps the inputs and the (V, B) logsumexp, and goes view by view in both directions."""

    @staticmethod
    def forward(ctx: Any, targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
        dtype = _working_dtype(targets, logits)
        normaliser = logits.new_empty(logits.shape[:2], dtype=dtype)  # (V, B)
        pairs = logits.new_empty(len(targets), len(logits), dtype=dtype)
        with torch.autocast(logits.device.type, enabled=False):
            for view, raw in enumerate(logits):
                # Relative to the largest logit, which keeps both terms small and the exponential finite.
                maximum = raw.amax(1, keepdim=True).to(dtype)  # (B, 1)
                shifted = raw.to(dtype).sub(maximum).div_(temperature)  # (B, K)
                # T of (B,); no matrix product, which might run in TF32
                products = [(target * shifted).sum(1) for target in targets]
                total = shifted.exp_().sum(1).log()  # (B,)
                for row, product in enumerate(products):
                    pairs[row, view] = (total - product).mean()
                normaliser[view] = total + maximum.squeeze(1) / temperature
        ctx.save_for_backward(targets, logits, normaliser)
        ctx.temperature = temperature
        return pairs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_pairs: Tensor) -> tuple[Tensor | None, ...]:
        targets, logits, normaliser = ctx.saved_tensors
        scaled = grad_pairs / (ctx.temperature * logits.shape[1])  # (T, V)
        grad_logits = torch.empty_like(logits)
        with torch.autocast(logits.device.type, enabled=False):
            for view, raw in enumerate(logits):
                part = raw.to(normaliser.dtype).div(ctx.temperature).sub_(normaliser[view, :, None]).exp_()
                part.mul_(scaled[:, view].sum())
                for row, target in enumerate(targets):
                    part.addcmul_(target.to(part.dtype), scaled[row, view], value=-1)
                grad_logits[view] = part
        return None, grad_logits, None
