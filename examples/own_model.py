"""A model of your own, in memory: any causal model of transformers that takes inputs_embeds."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import prototok

torch.manual_seed(0)
config = GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=4)
lm = prototok.load(GPT2LMHeadModel(config).eval(), device="cpu", dtype="float32")
print(lm, "-", lm.body.reason)  # no forward of its own here: it goes through transformers

recipe = prototok.Recipe(lr=0.1, max_steps=400)
fit = prototok.fast_fit(lm, [[5, 9, 7], [1, 2]], recipe=recipe)  # ids: there is no tokenizer
print(fit)
print(prototok.decode(lm, fit))  # rows shorter than the longest end in -1
assert bool(fit.exact.all())
