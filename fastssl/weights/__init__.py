"""Backbones in and out: other people's weights, other programs' formats."""
