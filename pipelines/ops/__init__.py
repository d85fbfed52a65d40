"""Decode, crop, colour: pure functions of pixels and numbers."""
