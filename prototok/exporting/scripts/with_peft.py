"""Read exported vectors with PEFT: python with_peft.py MODEL

MODEL is the folder or hub id of the model they were fitted on. Every row is a prompt-tuning adapter
whose virtual tokens are the whole input; its text is read at the virtual tokens themselves.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

here = Path(__file__).parent
made = json.loads((here / "export.json").read_text())
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])

for row in made["rows"]:
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(here / row["name"])).eval()
    with torch.no_grad():
        # PEFT wants a token behind the virtual ones; what comes before it does not see it.
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="cpu")).logits[0]
    ids = logits[row["read_from"] :][: row["tokens"]].argmax(-1)
    print(tokenizer.decode(ids))
    if row["ids"] is not None:
        wanted = torch.tensor(row["ids"], dtype=torch.int64, device="cpu")
        print(f"# {int((ids == wanted).sum())} of {row['tokens']} tokens right")
