"""Processes: who takes part, how they meet, collectives, BatchNorm over ranks."""
