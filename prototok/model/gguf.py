"""Read a GGUF file: one file with weights, often quantised, and a tokenizer.

Transformers reads it and dequantises every weight to float32; nothing here runs on the quantised
numbers. Needs the extra `gguf`.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def is_gguf(model: str) -> bool:
    """Return True if a model's name is that of a GGUF file."""
    return model.endswith(".gguf")


def stored_as(path: str) -> str:
    """Return how the matrices are stored, most numbers first, such as "Q4_1" or "Q6_K, Q8_0".

    Raises ValueError for what is not a whole GGUF file.
    """
    numbers: Counter[str] = Counter()
    for tensor in _reader(path).tensors:
        if len(tensor.shape) > 1:
            numbers[tensor.tensor_type.name] += int(tensor.n_elements)
    return ", ".join(name for name, _ in numbers.most_common())


def read_config(path: str) -> Any:
    """Return the configuration that transformers makes of the file's header.

    Raises ValueError for a file that is missing, damaged, or of an architecture it does not know.
    """
    _reader(path)
    folder, file = _parts(path)
    try:
        return AutoConfig.from_pretrained(folder, gguf_file=file)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model: {path} is not read by transformers ({error})") from error


def read_model(path: str, config: Any) -> PreTrainedModel:
    """Return the model, every weight dequantised to float32."""
    folder, file = _parts(path)
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # it would keep the blocks where a kernel takes them
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, config=config, dtype=torch.float32, **options
    )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # or the model could not be saved as the plain one that it is
        quantizer.remove_quantization_config(model)
    return model.eval()


def read_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in the file; None where it has none."""
    if "tokenizer.ggml.tokens" not in _reader(path).fields:
        return None
    folder, file = _parts(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model: the tokenizer in {path} could not be read ({error})") from error
    return tokenizer


def _reader(path: str) -> Any:
    if not Path(path).is_file():
        raise ValueError(f"model: there is no file {path}")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"model: {path} needs the gguf package, pip install 'prototok[gguf]'")
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"model: {path} is not a whole GGUF file ({error})") from error


def _parts(path: str) -> tuple[str, str]:
    found = Path(path)
    return str(found.parent), found.name
