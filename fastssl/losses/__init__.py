"""Losses. One concept a file, each with a slow twin in tests/loss_twins.py."""

from fastssl.losses.smoothed_infonce import SmoothedInfoNCE

__all__ = ["SmoothedInfoNCE"]
