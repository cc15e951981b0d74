"""Fitted vectors in the formats of other tools."""
