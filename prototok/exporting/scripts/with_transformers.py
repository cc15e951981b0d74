"""Read exported vectors with transformers alone: python with_transformers.py MODEL

MODEL is the folder or hub id of the model they were fitted on. Needs torch, transformers and
safetensors; prints the text of each row.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

here = Path(__file__).parent
made = json.loads((here / "export.json").read_text())
inputs = load_file(here / "inputs.safetensors")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])

for row in made["rows"]:
    z = inputs[row["name"]][None]  # (1, P + L, d): the prefix, then the vectors
    with torch.no_grad():
        if made["kind"] == "one forward":
            logits = model(inputs_embeds=z).logits[0]
            ids = logits[row["read_from"] :][: row["tokens"]].argmax(-1)
        else:  # generated token by token behind the vectors
            new = row["tokens"]
            mask = torch.ones(z.shape[:2], dtype=torch.int64, device="cpu")
            ids = model.generate(
                inputs_embeds=z, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )[0]  # fmt: skip
    print(tokenizer.decode(ids))
    if row["ids"] is not None:
        wanted = torch.tensor(row["ids"], dtype=torch.int64, device="cpu")
        print(f"# {int((ids == wanted).sum())} of {row['tokens']} tokens right")
