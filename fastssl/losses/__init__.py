"""Losses. One concept a file, each with a slow twin in tests/loss_twins.py."""

from fastssl.losses.nt_xent import SmoothedNTXent
from fastssl.losses.pairs import PairWeights, reduce_pairs, split_pairs
from fastssl.losses.sinkhorn import sinkhorn
from fastssl.losses.smoothed_infonce import SmoothedInfoNCE
from fastssl.losses.soft_targets import soft_cross_entropy, teacher_probabilities

__all__ = [
    "PairWeights",
    "SmoothedInfoNCE",
    "SmoothedNTXent",
    "reduce_pairs",
    "sinkhorn",
    "soft_cross_entropy",
    "split_pairs",
    "teacher_probabilities",
]
