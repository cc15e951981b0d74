"""Frozen language models: loading, identity, and each family's forward."""
