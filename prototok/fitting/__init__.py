"""Fits of proto-tokens: recipes, priors, the engine, and verification."""
