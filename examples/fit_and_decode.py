"""Fit a few texts, look at the result, keep it, and decode it again."""

import tempfile

import prototok

lm = prototok.load("tiny-llama")
texts = ["Call me Ishmael.", "It was the best of times, it was the worst of times"]

fit = prototok.fast_fit(lm, texts, seeds=2)
print(fit)  # how many came back whole, decoded alone at batch 1
print(fit.exact, fit.margin)  # (texts, seeds); the margin says how far each is from flipping

with tempfile.TemporaryDirectory() as folder:
    fit.best().save(folder)
    again = prototok.FitResult.load(folder)

for text, back in zip(texts, prototok.decode(lm, again, text=True), strict=True):
    print(f"{text!r} -> {back!r}")
    assert back == text
