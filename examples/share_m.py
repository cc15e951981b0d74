"""One m for all texts, an e for each: what the paper's Figure 2 calls a shared proto-token."""

import prototok

lm = prototok.load("tiny-neox")
texts = ["Call me Ishmael.", "The sun rose.", "He went home at once."]

shared = prototok.fast_fit(lm, texts, length=4, share="m")
alone = prototok.fast_fit(lm, texts, length=4)
print("one m for all:", shared, tuple(shared.tokens.m.shape))
print("an m for each:", alone, tuple(alone.tokens.m.shape))
assert shared.tokens.m.shape == (1, lm.hidden_size)
assert bool(shared.exact.all()) and bool(alone.exact.all())
