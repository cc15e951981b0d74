"""Out into other tools: a PEFT adapter, and plain transformers, with no prototok in the reading."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import prototok

lm = prototok.load("tiny-llama")
fit = prototok.fast_fit(lm, ["Call me Ishmael."])

with tempfile.TemporaryDirectory() as folder:
    out = prototok.export(fit, Path(folder) / "out", format="npz")
    row = json.loads((out / "export.json").read_text())["rows"][0]
    inputs = torch.tensor(np.load(out / "inputs.npz")[row["name"]])  # (positions, d)

model = AutoModelForCausalLM.from_pretrained(lm.source.name_or_path, dtype=torch.float32)
with torch.no_grad():
    logits = model(inputs_embeds=inputs[None]).logits[0]
ids = logits[row["read_from"] :][: row["tokens"]].argmax(-1)
print(lm.decode_ids(ids))
assert ids.tolist() == row["ids"]
