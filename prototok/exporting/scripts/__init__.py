"""Programs that are written beside exported vectors; they need no prototok."""
