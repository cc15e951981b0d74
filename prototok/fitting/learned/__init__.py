"""Learned once a frozen model: an optimiser that fits texts in a handful of updates."""
