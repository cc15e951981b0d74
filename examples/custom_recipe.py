"""A recipe of your own, and the curve of a fit."""

import prototok

lm = prototok.load("tiny-llama")
recipe = prototok.Recipe(
    name="mine", lr=0.1, betas=(0.8, 0.99), schedule="cosine", cycle=100, warmup=5, init_std=0.3,
    temperature=0.5, margin=0.2, max_steps=700,
)  # fmt: skip

fit = prototok.fast_fit(lm, ["Call me Ishmael."], length=4, seeds=2, recipe=recipe, history=True)
print(fit)
for seed, curve in enumerate(fit.history.curves[0]):
    steps, accuracy = curve.steps.tolist(), curve.accuracy.tolist()
    first = next((s for s, a in zip(steps, accuracy, strict=True) if a == 1.0), None)
    print(f"seed {seed}: all tokens right after {first} updates")
# fit.plot().savefig("curves.png")  # with matplotlib
assert bool(fit.exact.any())
