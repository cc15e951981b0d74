"""Load a causal language model and freeze it."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file, logging

from prototok.common.world import own_world
from prototok.model import gguf
from prototok.model.families import DecoderBody
from prototok.model.frozen_lm import FrozenLM, embedding_of, freeze
from prototok.model.identity import ModelIdentity, fingerprint_of, hash_of_tokenizer
from prototok.model.names import require_known

BUILT_IN = ("tiny-llama", "tiny-neox")
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_MODELS = Path(__file__).parents[1] / "models"


@own_world
def load(
    model: str | Path | PreTrainedModel,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    attention: str = "auto",
) -> FrozenLM:
    """Load and freeze a causal language model.

    Args:
        model: a hub id, a folder in Hub layout, a GGUF file, "tiny-llama" or "tiny-neox" (built
            in), or a `PreTrainedModel` of your own, which is read and never changed. A GGUF file is
            dequantised; `lm.dequantised` says from what.
        device: "auto" takes CUDA where there is one.
        dtype: "auto" is bfloat16 on CUDA and on CPUs with bfloat16 instructions, else float32.
        revision: branch, tag or commit of a hub id; what it resolved to is in `identity.revision`.
        attention: "auto" and "sdpa" leave it to torch, which on CUDA takes cuDNN's or its own Flash
            kernel and on the CPU our C++; "flash" is the flash-attn package, CUDA and 16 bit alone.

    Only safetensors and GGUF weights are read and no code of the repository is run.

    Raises:
        ValueError: missing, gated, not causal, quantised, pickle-only, or weights not finite.
    """
    device = device_of(device)
    dtype = dtype_of(dtype, device)
    if isinstance(model, PreTrainedModel):
        if revision is not None:
            raise ValueError(f"revision: {revision!r} means nothing for a model already in memory")
        name, source = model.config.name_or_path or type(model).__name__, _normal(model)
        resolved = dequantised = None
        _require_causal(model.config, name, type(model).__name__)
        tokenizer = _tokenizer_of(name, resolved) if Path(name).is_dir() else None
    else:
        name = str(model)
        path = path_of(name)
        dequantised = gguf.stored_as(path) if gguf.is_gguf(path) else None
        source, resolved = (
            _read(path, revision) if dequantised is None else _read_gguf(path, revision)
        )
        tokenizer = _tokenizer_of(path, resolved)
    config = source.config
    _require_finite(source, name)
    embedding = embedding_of(source)
    identity = ModelIdentity(
        name=name,
        revision=resolved,
        family=config.model_type,
        hidden_size=embedding.shape[1],
        vocab_size=config.vocab_size,
        fingerprint=fingerprint_of(source),
        tokenizer_hash=hash_of_tokenizer(tokenizer),
    )
    _require_attention(attention, device, dtype)
    lm = replace(freeze(source, identity, tokenizer, device, dtype), dequantised=dequantised)
    if attention != "flash":
        return lm
    if not isinstance(lm.body, DecoderBody):
        raise ValueError(f"attention: 'flash' is not for {name}, which transformers runs")
    return replace(lm, body=lm.body.flash(), attention="flash")


def _normal(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or a copy of one made in inference mode, whose tensors autograd refuses."""
    tensors = [*model.parameters(), *model.buffers()]
    if not any(tensor.is_inference() for tensor in tensors):
        return model
    memo: dict[int, object] = {id(tensor): tensor.clone() for tensor in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.clone(), requires_grad=False)
    return copy.deepcopy(model, memo)


def _require_attention(attention: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError where it is no such name, or what it names cannot be had."""
    if attention not in ("auto", "sdpa", "flash"):
        raise ValueError(f"attention: {attention!r} is not 'auto', 'sdpa' or 'flash'")
    if attention != "flash":
        return
    if device.type != "cuda":
        raise ValueError(f"attention: 'flash' needs a CUDA device, and this is {device}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"attention: 'flash' computes in 16 bit, and the weights are {dtype}")
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError("attention: 'flash' needs the flash-attn package, which is not installed")


def path_of(model: str) -> str:
    """Where a model is read from: the package's folder for a built-in one, else its own name."""
    return str(_MODELS / model) if model in BUILT_IN else model


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that `load` would take, without the weights; ValueError where there is none."""
    path = path_of(model)
    if not Path(path).is_dir():
        require_known(path, revision, BUILT_IN)
    found = _tokenizer_of(path, revision)
    if found is None:
        raise ValueError(f"model: {model!r} has no tokenizer here or on the hub")
    return found


def device_of(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: {device!r} is not a torch device") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} was asked for and torch sees no CUDA device")
    return found


def dtype_of(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is the faster of bfloat16 and float32 on the device."""
    if dtype == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    found = getattr(torch, _SHORT.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: {dtype!r} is not 'auto' or a floating-point torch dtype")
    return found


def _read(path: str, revision: str | None) -> tuple[PreTrainedModel, str | None]:
    """Configuration checks first, weights after; every failure one sentence."""
    local = Path(path).is_dir()
    if local:
        if not (Path(path) / "config.json").exists():
            raise ValueError(f"model: folder {path} has no config.json")
        if revision is not None:
            raise ValueError(f"revision: {revision!r} means nothing for the local folder {path}")
        if not any(Path(path).glob("*.safetensors")):
            what = "only pickled weights" if any(Path(path).glob("*.bin")) else "no weights"
            raise ValueError(f"model: folder {path} has {what}; safetensors is what is read")
    else:
        require_known(path, revision, BUILT_IN)
    try:
        if not local:
            # The commit first, then everything at that commit: a branch may move meanwhile.
            found = Path(hf_hub_download(path, "config.json", revision=revision))
            revision = found.parent.name
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        _require_causal(config, path, *(config.architectures or []))
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"model: {path} is quantised; load the unquantised weights")
        # Whatever the caller's default device is: weights are read on the CPU first.
        with torch.device("cpu"), _no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, config=config, revision=revision, dtype="auto", use_safetensors=True,
                trust_remote_code=False, output_loading_info=True,
            )  # fmt: skip
    except SafetensorError as error:
        raise ValueError(f"model: weights of {path} are damaged ({error})") from error
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ValueError) and str(error).startswith("model: "):
            raise
        raise ValueError(_reason(path, local, error)) from error
    source, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"model: {path} lacks {len(missing)} weights, {missing[0]} first")
    return source, revision


def _read_gguf(path: str, revision: str | None) -> tuple[PreTrainedModel, None]:
    if revision is not None:
        raise ValueError(f"revision: {revision!r} means nothing for the local file {path}")
    config = gguf.read_config(path)
    _require_causal(config, path, *(config.architectures or []))
    with _no_progress_bar():
        return gguf.read_model(path, config), None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Reading weights from disk is quick; downloads keep the hub's own bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _reason(path: str, local: bool, error: BaseException) -> str:
    chain: list[str] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(type(link).__name__ + " " + str(link))
        link = link.__cause__ or link.__context__
    text = " ".join(chain)
    first = str(error).strip().split("\n")[0]
    if "GatedRepo" in text or "gated repo" in text:
        return (
            f"model: {path} is gated; accept its licence on the hub and log in with `hf auth login`"
        )
    if "RevisionNotFound" in text:
        return f"revision: not found in {path} ({first})"
    if "trust_remote_code" in text:
        return f"model: {path} needs code of its own to run (trust_remote_code), which stays off"
    if "safetensors" in text and ".bin" in text:
        return f"model: {path} has only pickled weights; safetensors is what is read"
    if local:
        return f"model: folder {path} could not be loaded ({first})"
    return f"model: {path!r} is no folder here and could not be had from the hub ({first})"


def _require_causal(config: PreTrainedConfig, name: str, *architectures: str) -> None:
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = [a for a in architectures if a.endswith(("ForCausalLM", "LMHeadModel"))]
    if config.model_type not in causal or (architectures and not named):
        what = architectures[0] if architectures else config.model_type
        raise ValueError(f"model: {name} is not a causal language model ({what})")


def _require_finite(source: PreTrainedModel, name: str) -> None:
    for key, parameter in source.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter.detach()).all()):
            raise ValueError(f"model: {name} has weights that are not finite, in {key}")


def _tokenizer_of(path: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None where the folder, file or repository has none."""
    if gguf.is_gguf(path):
        return gguf.read_tokenizer(path)
    if not any(_has(path, name, revision) for name in ("tokenizer_config.json", "tokenizer.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model: the tokenizer of {path} could not be loaded ({error})") from error


def _has(path: str, name: str, revision: str | None) -> bool:
    try:
        return cached_file(path, name, revision=revision) is not None
    except OSError:
        return False
