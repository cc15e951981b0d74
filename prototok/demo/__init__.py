"""A page to play with: `prototok demo`."""
