"""Commands of `prototok` that are more than a call."""
