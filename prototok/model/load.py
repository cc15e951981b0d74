"""Load a causal language model and freeze it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
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

from prototok.common.arguments import hint
from prototok.common.world import own_world
from prototok.model import gguf
from prototok.model.examine import require_forward, require_plain_weights
from prototok.model.families import DecoderBody, body_of, choose
from prototok.model.frozen_lm import FrozenLM, context_of, freeze
from prototok.model.identity import ModelIdentity, fingerprint_of, hash_of_tokenizer
from prototok.model.in_memory import frozen_twin, unwrapped
from prototok.model.names import require_known

BUILT_IN = ("tiny-llama", "tiny-neox")
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_DTYPES = ("auto", "bfloat16", "float32", "float16", "float64", *_SHORT)
_DEVICES = ("auto", "cpu", "cuda", "cuda:0")
_MODELS = Path(__file__).parents[1] / "models"


@own_world
def load(
    model: str | Path | torch.nn.Module,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    attention: str = "auto",
) -> FrozenLM:
    """Load and freeze a causal language model.

    Args:
        model: a hub id, a folder in Hub layout, a GGUF file, which is dequantised
            (`lm.dequantised` says from what), "tiny-llama" or "tiny-neox" (built in), or a
            `PreTrainedModel` of your own, which is read and never changed; also one that peft,
            `torch.compile` or `DataParallel` has wrapped. Weights that need no cast are shared with
            it, so it must not be trained on while it is used here: that is noticed and refused.
        device: "auto" takes CUDA where there is one.
        dtype: "auto" is bfloat16 on CUDA and on CPUs with bfloat16 instructions, else float32.
        revision: branch, tag or commit of a hub id; what it resolved to is in `identity.revision`.
        attention: "auto" and "sdpa" leave it to torch, which on CUDA takes cuDNN's or its own Flash
            kernel and on the CPU our C++; "flash" is the flash-attn package, CUDA and 16 bit alone.

    Only safetensors and GGUF weights are read and no code of the repository is run. A few positions
    are run to see that the model is causal, and that its own forward, where it has one here, gives
    what transformers gives.

    Raises:
        ValueError: missing, gated, not causal, quantised, pickle-only, weights not finite, or a
            forward that differs from that of transformers.
    """
    device = device_of(device)
    dtype = dtype_of(dtype, device)
    _require_attention(attention, device, dtype)
    dequantised = None
    if isinstance(model, torch.nn.Module):
        if revision is not None:
            raise ValueError(f"revision: {revision!r} means nothing for a model already in memory")
        given = unwrapped(model)
        name, resolved = given.config.name_or_path or type(given).__name__, None
        _require_causal_class(given.config, name, *(c.__name__ for c in type(given).__mro__))
        require_plain_weights(given, name)
        source = frozen_twin(given, name)
        tokenizer = _tokenizer_of(name, resolved) if Path(name).is_dir() else None
    else:
        name = str(model)
        path = path_of(name)
        if gguf.is_gguf(path):
            source, resolved, dequantised = _read_gguf(path, revision), None, gguf.stored_as(path)
        else:
            source, resolved = _read(path, revision)
        require_plain_weights(source, name)
        tokenizer = _tokenizer_of(path, resolved)
    chosen = choose(source)
    body = body_of(source, device, dtype, chosen)
    context = context_of(source.config)
    hidden_size, vocab_size = require_forward(source, body, chosen.family, name, context)
    identity = ModelIdentity(
        name=name,
        revision=resolved,
        family=source.config.model_type,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        fingerprint=fingerprint_of(source, chosen.reason if chosen.changed else ""),
        tokenizer_hash=hash_of_tokenizer(tokenizer),
    )
    lm = freeze(source, identity, tokenizer, device, dtype, body)
    lm = replace(lm, dequantised=dequantised)
    if attention != "flash":
        return lm
    if not isinstance(lm.body, DecoderBody):
        raise ValueError(f"attention: 'flash' is not for {name}, which transformers runs")
    return replace(lm, body=lm.body.flash(), attention="flash")


def _require_attention(attention: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError where it is no such name, or what it names cannot be had."""
    if attention not in ("auto", "sdpa", "flash"):
        raise ValueError(
            f"attention: {attention!r} is not 'auto', 'sdpa' or 'flash'"
            + hint(attention, ("auto", "sdpa", "flash"))
        )
    if attention != "flash":
        return
    if device.type != "cuda":
        raise ValueError(f"attention: 'flash' needs a CUDA device, and this is {device}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"attention: 'flash' computes in 16 bit, and the weights are {dtype}")
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError("attention: 'flash' needs the flash-attn package, which is not installed")


def path_of(model: str) -> str:
    """Return where a model is read from: the package's folder if built in, else its own name."""
    return str(_MODELS / model) if model in BUILT_IN else model


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone that `load` would take; ValueError where there is none."""
    path = path_of(model)
    if not Path(path).is_dir():
        require_known(path, revision, BUILT_IN)
    found = _tokenizer_of(path, revision)
    if found is None:
        raise ValueError(f"model: {model!r} has no tokenizer here or on the hub")
    return found


def device_of(device: str | torch.device) -> torch.device:
    """Return the device of that name; "auto" is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device: {device!r} is not a torch device" + hint(device, _DEVICES)
        ) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} was asked for and torch sees no CUDA device")
    try:
        torch.empty(1, dtype=torch.float32, device=found)
    except (RuntimeError, NotImplementedError, AssertionError):
        raise ValueError(f"device: {device!r} cannot be had here") from None
    return found


def dtype_of(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; "auto" is the faster of bfloat16 and float32 on the device."""
    if dtype == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    found = getattr(torch, _SHORT.get(dtype, dtype), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(
            f"dtype: {dtype!r} is not 'auto' or a floating-point torch dtype" + hint(dtype, _DTYPES)
        )
    return found


def _read(path: str, revision: str | None) -> tuple[PreTrainedModel, str | None]:
    """Check the configuration, then read the weights; every failure is one sentence."""
    local = Path(path).is_dir()
    if local:
        if not (Path(path) / "config.json").exists():
            if (Path(path) / "adapter_config.json").exists():
                raise ValueError(
                    f"model: folder {path} holds an adapter without its model; load the model with "
                    "it and pass that"
                )
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
        _require_causal_class(config, path, *(config.architectures or []))
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(f"model: {path} is quantised; load the unquantised weights")
        adapted = _has_adapter(path, revision)
        # Whatever the caller's default device is: weights are read on the CPU first.
        with (
            torch.device("cpu"), _no_progress_bar(), _base_alone(path, revision, adapted) as base
        ):  # fmt: skip
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base, config=config, revision=revision, dtype="auto", use_safetensors=True,
                trust_remote_code=False, output_loading_info=True,
            )  # fmt: skip
            source, report = loaded
            missing = sorted(report["missing_keys"])
            if missing:
                raise ValueError(f"model: {path} lacks {len(missing)} weights, {missing[0]} first")
            if adapted:
                _add_adapter(source, path, revision)
    except SafetensorError as error:
        raise ValueError(f"model: weights of {path} are damaged ({error})") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, ValueError) and str(error).startswith("model: "):
            raise
        raise ValueError(_reason(path, local, error)) from error
    return source, revision


def _read_gguf(path: str, revision: str | None) -> PreTrainedModel:
    if revision is not None:
        raise ValueError(f"revision: {revision!r} means nothing for the local file {path}")
    config = gguf.read_config(path)
    _require_causal_class(config, path, *(config.architectures or []))
    with _no_progress_bar():
        return gguf.read_model(path, config)


def _has_adapter(path: str, revision: str | None) -> bool:
    return (
        cached_file(
            path, "adapter_config.json", revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        is not None
    )  # fmt: skip


@contextmanager
def _base_alone(path: str, revision: str | None, adapted: bool) -> Iterator[str]:
    """Where transformers finds the model without its adapter.

    Given both, it reports what the adapter lacks, and of the base not even what is missing.
    """
    if not adapted:
        yield path
        return
    kinds = ["*.json", "*.safetensors"]
    local = Path(path).is_dir()
    folder = path if local else snapshot_download(path, revision=revision, allow_patterns=kinds)
    with TemporaryDirectory() as base:
        for file in Path(folder).iterdir():
            if not file.name.startswith("adapter_"):
                (Path(base) / file.name).symlink_to(file.resolve())
        yield base


def _add_adapter(source: PreTrainedModel, path: str, revision: str | None) -> None:
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"model: {path} holds an adapter, which needs the peft package")
    source.config.name_or_path = source.name_or_path = path
    added: Any = source.load_adapter(path, adapter_kwargs={"revision": revision})
    missing = sorted(getattr(added, "missing_keys", ()))
    if missing:
        raise ValueError(f"model: the adapter of {path} lacks {missing[0]}")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide transformers' bar: reading from disk is quick; downloads keep the hub's own."""
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
    if "ignore_mismatched_sizes" in text:
        return f"model: weights of {path} do not fit its config"
    if local:
        return f"model: folder {path} could not be loaded ({first})"
    return f"model: {path!r} is no folder here and could not be had from the hub ({first})"


def _require_causal_class(config: PreTrainedConfig, name: str, *architectures: str) -> None:
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    named = [a for a in architectures if a.endswith(("ForCausalLM", "LMHeadModel"))]
    if config.model_type not in causal or (architectures and not named):
        what = architectures[0] if architectures else config.model_type
        raise ValueError(f"model: {name} is not a causal language model ({what})")


def _tokenizer_of(path: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """Load the model's tokenizer; None where the folder, file or repository has none."""
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
