"""Train the two models that ship inside the package, `tiny-llama` and `tiny-neox`.

    python benchmarks/train_builtin.py tiny-llama --text FOLDER --out FOLDER

reads every .txt file below --text, holds some whole files out, trains a byte-level BPE tokenizer
and a small causal language model, and writes a model in Hugging Face layout with its model card.
Started again with the same arguments it goes on from its last checkpoint and sees the same batches
as an uninterrupted run. Hidden matrices are trained with Muon, everything else with AdamW.

Letters: B sequences in a batch, T context length, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prototok.common.allocator import keep_freed_memory

END_OF_TEXT = "<|endoftext|>"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is learned; stored beside the checkpoint and never mixed."""

    name: str
    vocab_size: int
    context: int
    batch: int
    tokens: int
    held_out: float
    muon_lr: float
    adam_lr: float
    seed: int

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.batch * self.context))


def build_model(
    name: str, vocab_size: int, context: int, width: int, layers: int
) -> PreTrainedModel:
    """A freshly initialised model of the Llama or GPT-NeoX shape, heads of 32."""
    heads = width // 32
    if name == "tiny-llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size, hidden_size=width, intermediate_size=width * 8 // 3,
                num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=max(1, heads // 3), max_position_embeddings=context,
                tie_word_embeddings=True, rope_parameters=dict(ROPE), bos_token_id=0,
                eos_token_id=0,
            )
        )  # fmt: skip
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab_size, hidden_size=width, intermediate_size=width * 4,
            num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=context,
            tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
            rope_parameters={**ROPE, "partial_rotary_factor": 0.25},
        )
    )  # fmt: skip


def split_files(folder: Path, share: float, seed: int) -> tuple[list[Path], list[Path]]:
    """Training and held-out files; whole files are held out, so no book is in both."""
    files = sorted(folder.rglob("*.txt"))
    if len(files) < 2:
        raise SystemExit(f"--text: at least two .txt files are needed, {folder} has {len(files)}")
    order = np.random.default_rng(seed).permutation(len(files))
    count = max(1, round(len(files) * share))
    held = {int(i) for i in order[:count]}
    return (
        [f for i, f in enumerate(files) if i not in held],
        [f for i, f in enumerate(files) if i in held],
    )


def train_tokenizer(files: list[Path], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(f) for f in files], trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, files: list[Path]) -> np.ndarray:
    """All files as one stream of ids, an end-of-text id in front of each."""
    pieces = []
    for file in files:
        ids = tokenizer.encode(file.read_text(encoding="utf-8")).ids
        pieces.append(np.array([0, *ids], dtype=np.uint16))
    return np.concatenate(pieces)


def batch_at(stream: np.ndarray, step: int, s: Settings) -> Tensor:
    """The (B, T+1) ids of one step: windows in an order that (seed, epoch) alone decides."""
    windows = (len(stream) - 1) // s.context
    rows = []
    for index in range(step * s.batch, (step + 1) * s.batch):
        epoch, place = divmod(index, windows)
        order = np.random.default_rng((s.seed, epoch)).permutation(windows)
        start = int(order[place]) * s.context
        rows.append(stream[start : start + s.context + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def make_optimizers(model: nn.Module, s: Settings) -> list[torch.optim.Optimizer]:
    hidden, other = [], []
    for name, parameter in model.named_parameters():
        is_table = "embed" in name or "lm_head" in name
        (hidden if parameter.ndim == 2 and not is_table else other).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=s.muon_lr, momentum=0.95, weight_decay=0.01,
                         adjust_lr_fn="original"),
        torch.optim.AdamW(other, lr=s.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]  # fmt: skip


def rate(step: int, steps: int) -> float:
    """Warm-up over 2 %, constant to 40 %, then linear to zero."""
    warm = max(1, steps // 50)
    return min(1.0, (step + 1) / warm, max(0.0, (steps - step) / (0.6 * steps)))


@torch.no_grad()
def held_out_loss(model: nn.Module, stream: np.ndarray, context: int, limit: int) -> float:
    """Mean next-token cross-entropy in nats per token over at most `limit` tokens."""
    windows = min((len(stream) - 1) // context, max(1, limit // context))
    total = 0.0
    for start in range(0, windows * context, context):
        ids = torch.from_numpy(stream[start : start + context + 1].astype(np.int64))
        logits = model(input_ids=ids[None, :-1]).logits[0].float()
        total += float(F.cross_entropy(logits, ids[1:]))
    return total / windows


def save_checkpoint(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for o, optimizer in enumerate(optimizers):
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


def load_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    parameters = dict(model.named_parameters())
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
            part, _, rest = key.partition(".")
            if part == "model":
                with torch.no_grad():
                    parameters[rest].copy_(file.get_tensor(key))
            else:
                o, i, name = rest.split(".")
                states[int(o)].setdefault(int(i), {})[name] = file.get_tensor(key)
        step = int(file.metadata()["step"])
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step


def model_card(s: Settings, record: dict, train: list[Path], held: list[Path]) -> str:
    curve = "\n".join(
        f"| {e['tokens'] / 1e6:.1f} M | {e['train_loss']:.3f} | {e['held_out_loss']:.3f} |"
        for e in record["curve"]
    )
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---
# {s.name}

A {record["parameters"] / 1e6:.1f}M-parameter {record["architecture"]} language model, trained from
scratch so that prototok has a real frozen model to work on where there is no network. It is a test
object; as a text generator it is of no use.

* **Held-out loss**: {record["held_out_loss"]:.3f} nats per token and
  {record["held_out_nats_per_byte"]:.3f} nats per byte, on {len(held)} whole books that were never
  trained on (stored bfloat16 weights, float32 arithmetic, windows of {s.context} tokens).
* **Data**: {len(train)} English novels of 1840–1920 from the ELTeC-eng collection, plain text;
  {record["train_tokens"] / 1e6:.1f}M tokens, seen {record["epochs"]:.1f} times. The texts are in
  the public domain; the ELTeC edition they were taken from is CC BY 4.0.
* **Held out**: {", ".join(f.stem for f in held)}.
* `held_out.txt` is an excerpt of {held[0].stem}, for `python -m prototok.bench`.
* **Tokenizer**: byte-level BPE, {s.vocab_size} entries, trained on the training books. No token is
  added in front of a text.
* **Training**: Muon (lr {s.muon_lr}) for hidden matrices, AdamW (lr {s.adam_lr}) for the rest,
  {s.steps} steps of {s.batch} × {s.context} tokens, seed {s.seed}.

| tokens seen | training loss | held-out loss |
|---|---|---|
{curve}

Losses are nats per token; the column is read on the first {record["curve_tokens"]} held-out tokens.

Retrain: `python benchmarks/train_builtin.py {s.name} --tokens {s.tokens} --text FOLDER --out
FOLDER`, where the first folder holds one .txt file a book.
"""


def excerpt(files: list[Path], size: int = 20_000) -> str:
    """Whole paragraphs from the middle of the first held-out file: text the model never saw."""
    text = files[0].read_text(encoding="utf-8")
    start = text.index("\n\n", len(text) // 2) + 2
    return text[start : text.rindex("\n\n", start, start + size)] + "\n"


def export(
    model: PreTrainedModel, tokenizer: Tokenizer, out: Path, record: dict, card: str, sample: str
) -> None:
    model.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(out)  # fmt: skip
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "README.md").write_text(card)
    (out / "held_out.txt").write_text(sample, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=["tiny-llama", "tiny-neox"])
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt files, one a book")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument(
        "--work", type=Path, help="folder for checkpoints (default: OUT/../work-NAME)"
    )
    parser.add_argument("--tokens", type=float, default=10.65e6)
    parser.add_argument("--width", type=int, default=192, help="hidden size, a multiple of 32")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the files")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--stop-after", type=int, help="stop at this step, as if interrupted")
    a = parser.parse_args()
    s = Settings(a.name, a.vocab, a.context, a.batch, int(a.tokens), a.held_out,
                 a.muon_lr, a.adam_lr, a.seed)  # fmt: skip
    keep_freed_memory()
    torch.set_num_threads(a.threads)
    torch.manual_seed(s.seed)
    work = a.work or a.out.parent / f"work-{s.name}"
    work.mkdir(parents=True, exist_ok=True)

    train_files, held_files = split_files(a.text, s.held_out, s.seed)
    if (work / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(train_files, s.vocab_size)
        tokenizer.save(str(work / "tokenizer.json"))
    train, held = encode(tokenizer, train_files), encode(tokenizer, held_files)

    model = build_model(s.name, s.vocab_size, s.context, a.width, a.layers)
    parameters = sum(p.numel() for p in model.parameters())
    optimizers = make_optimizers(model, s)
    settings = {**vars(s), "parameters": parameters}
    log, checkpoint = work / "log.json", work / "checkpoint.safetensors"
    state = {"settings": settings, "curve": [], "seconds": 0.0}
    step = 0
    if checkpoint.exists():
        state = json.loads(log.read_text())
        if state["settings"] != settings:
            raise SystemExit(f"--work: {work} holds a run with other settings: {state['settings']}")
        step = load_checkpoint(checkpoint, model, optimizers)
        state["curve"] = [e for e in state["curve"] if e["step"] <= step]
    sizes = f"{parameters:,} parameters, {len(train):,} training tokens"
    print(f"{s.name}: {sizes}, step {step}/{s.steps}")

    bf16 = torch.autocast("cpu", dtype=torch.bfloat16)

    def loss_of(ids: Tensor) -> Tensor:
        with bf16:
            logits = model(input_ids=ids[:, :-1]).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    compiled = torch.compile(loss_of) if a.compile else loss_of
    curve_tokens, every = 32_768, 250
    recent: list[float] = []
    clock = time.perf_counter()
    while step < s.steps:
        for optimizer, peak in zip(optimizers, (s.muon_lr, s.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, s.steps)
        loss = compiled(batch_at(train, step, s))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        recent.append(float(loss.detach()))
        if step % every == 0 or step in (s.steps, a.stop_after):
            state["seconds"] += time.perf_counter() - clock
            clock = time.perf_counter()
            entry = {
                "step": step,
                "tokens": step * s.batch * s.context,
                "train_loss": sum(recent) / len(recent),
                "held_out_loss": held_out_loss(model, held, s.context, curve_tokens),
            }
            recent = []
            state["curve"].append(entry)
            log.write_text(json.dumps(state, indent=1))
            save_checkpoint(checkpoint, model, optimizers, step)
            print(
                f"step {step}/{s.steps}  train {entry['train_loss']:.3f}  "
                f"held-out {entry['held_out_loss']:.3f}  {state['seconds']:.0f} s",
                flush=True,
            )
        if step == a.stop_after:
            return

    # The figure that is quoted is the stored model's: bfloat16 weights, all held-out text.
    stored = model.to(torch.bfloat16)
    a.out.mkdir(parents=True, exist_ok=True)
    rounded = build_model(s.name, s.vocab_size, s.context, a.width, a.layers)
    rounded.load_state_dict({k: v.float() for k, v in stored.state_dict().items()})
    final = held_out_loss(rounded, held, s.context, len(held))
    held_bytes = sum(f.stat().st_size for f in held_files)
    record = {
        "settings": settings,
        "architecture": type(model).__name__.removesuffix("ForCausalLM"),
        "parameters": parameters,
        "train_tokens": len(train),
        "epochs": s.tokens / len(train),
        "held_out_loss": final,
        "held_out_nats_per_byte": final * len(held) / held_bytes,
        "held_out_files": [f.name for f in held_files],
        "train_files": [f.name for f in train_files],
        "curve_tokens": curve_tokens,
        "curve": state["curve"],
        "seconds": round(state["seconds"]),
        "torch": torch.__version__,
    }
    card = model_card(s, record, train_files, held_files)
    export(stored, tokenizer, a.out, record, card, excerpt(held_files))
    print(f"held-out loss {final:.3f} nats per token; written to {a.out}")


if __name__ == "__main__":
    main()
