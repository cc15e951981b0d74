"""Any causal language model that takes `inputs_embeds`, through its own transformers forward."""

from __future__ import annotations

import copy
import fnmatch
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prototok.common.urgent import on_cuda
from prototok.model.families.stock import rope_changes
from prototok_kernels.attention import cudnn_may_fail, without_cudnn
from prototok_kernels.plan import Plan, Shape

_turning = threading.Lock()


class GeneralBody:
    """A frozen twin of the model; `hidden` returns logits, whatever stands between them and it.

    `reason` says why the model has no forward of its own here.
    """

    family = "general"
    head: Tensor | None = None
    shape = Shape()

    def __init__(
        self, model: PreTrainedModel, reason: str = "", prefix: Tensor | None = None
    ) -> None:
        self.model = model
        self.reason = reason
        self.prefix = prefix  # (P, d)

    def behind(self, vectors: Tensor) -> GeneralBody:
        """Return the same twin with vectors (P, d) in front of every input."""
        return GeneralBody(self.model, self.reason, vectors)

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, device: torch.device, dtype: torch.dtype, reason: str = ""
    ) -> GeneralBody:
        """Twin a model on a device, cast as `from_pretrained(dtype=…)` casts."""
        twin = twin_of_model(model)
        wanted = _dtypes_as_loaded(model, dtype)
        for name, parameter in twin.named_parameters():
            parameter.data = parameter.data.to(device, wanted.get(name, dtype))
        for name, buffer in twin.named_buffers():
            buffer.data = buffer.data.to(device, wanted.get(name, buffer.dtype))
        return cls(twin, reason)

    def hidden(self, inputs_embeds: Tensor, plan: Plan) -> Tensor:
        """(B, N, d) embeddings to logits (B, N, V), by transformers whatever the plan."""
        if self.prefix is None:
            # Some models scale what they are given in place.
            return self._logits(inputs_embeds.clone())
        front = self.prefix.expand(len(inputs_embeds), -1, -1)
        whole = torch.cat([front, inputs_embeds], dim=1)
        return self._logits(whole)[:, len(self.prefix) :]

    @cached_property
    def by_length(self) -> bool:
        """True where a row beside a longer one is computed otherwise, by a rope of that length."""
        return rope_changes(self.model)

    def _turn(self) -> AbstractContextManager[object]:
        """One thread at a time where a forward writes its angles into the model."""
        return _turning if self.by_length else nullcontext()

    def _logits(self, inputs_embeds: Tensor) -> Tensor:
        may_fail = cudnn_may_fail(inputs_embeds.shape[1], inputs_embeds.device)
        with self._turn(), without_cudnn() if may_fail else nullcontext():
            return self._attended(inputs_embeds)

    def _attended(self, inputs_embeds: Tensor) -> Tensor:
        if not on_cuda(inputs_embeds.device) or not self._takes_mask:
            return self.model(inputs_embeds=inputs_embeds, use_cache=False).logits
        return masked_logits(self.model, inputs_embeds)

    @cached_property
    def _takes_mask(self) -> bool:
        return takes_mask(self.model)

    def hidden_of_ids(self, ids: Tensor) -> Tensor:
        """Token ids (B, N) to logits (B, N, V), by the model's own embedding."""
        with self._turn():
            return self.model(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Return what the model feeds its first block for token ids, (…, d)."""
        rows = self._module(ids)
        return rows if self._scale == 1.0 else rows * self._scale

    @property
    def embedding(self) -> Tensor:
        """(V, d) what `embed` gives for every id."""
        device = next(self.model.parameters()).device
        return self.embed(torch.arange(self._module.weight.shape[0], device=device))

    @property
    def _module(self) -> Any:
        return self.model.get_input_embeddings()

    @cached_property
    def _scale(self) -> float:
        return outside_scale(self)


def masked_logits(model: PreTrainedModel, inputs_embeds: Tensor) -> Tensor:
    """Return the logits (B, N, V) of embeddings (B, N, d) under a causal mask that is made here.

    Without one transformers reads position ids back to the host to see whether texts are packed:
    every forward waits, and while a CUDA graph is captured it takes another way than before.
    """
    length, device = inputs_embeds.shape[1], inputs_embeds.device
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    return model(inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def takes_mask(model: PreTrainedModel) -> bool:
    """Return True if a ready causal mask gives what the model gives without one.

    Not so where a layer masks more than what is ahead, or reads a mask as that of padding; two
    short rows tell.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    narrow = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if config._attn_implementation != "sdpa" or kinds - {"full_attention"} or any(narrow):
        return False
    embedding: Any = model.get_input_embeddings()
    device = next(model.parameters()).device
    few = embedding(torch.arange(8, device=device).view(2, 4) % embedding.weight.shape[0])
    plain = model(inputs_embeds=few.clone(), use_cache=False).logits
    try:
        masked = masked_logits(model, few.clone())
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError):
        return False
    near = 16 * torch.finfo(plain.dtype).eps * float(plain.abs().max())
    return plain.shape == masked.shape and float((plain - masked).abs().max()) <= near


def twin_of_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a frozen model of its own modules over the same weights, in eval mode.

    It costs no second copy of the weights, and what happens to the model's modules (hooks,
    adapters, its config) no longer happens to the twin.
    """
    scaled = model.config.model_type == "rwkv"  # in place, when it first runs

    def own(tensor: Tensor) -> Tensor:
        """Return the tensor, or a copy of one made in inference mode, which autograd refuses."""
        tensor = tensor.detach()
        return tensor.clone() if scaled or tensor.is_inference() else tensor

    memo: dict[int, object] = {
        id(p): nn.Parameter(own(p), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(b): b.clone() for b in model.buffers() if b.is_inference()}
    # A weight that is computed, by pruning say, is an attribute, and a new one at the next forward.
    computed = (t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor))
    memo |= {id(t): own(t) for t in computed}
    return copy.deepcopy(model, memo).eval()


def _dtypes_as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return what `from_pretrained(dtype=…)` makes of each parameter and buffer, by name.

    Rotary frequencies, say, stay fp32: a rounded frequency is off by whole turns some hundred
    positions on. What the model does not create itself is not in the result.
    """
    maker: Any = type(model)
    try:
        with torch.device("meta"):
            made = maker._from_config(copy.deepcopy(model.config), dtype=dtype)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError):
        return {}  # changed so far that its config no longer builds it
    found = {name: t.dtype for name, t in made.named_parameters()}
    found |= {name: t.dtype for name, t in made.named_buffers() if t.is_floating_point()}
    kept: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(made._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(made._keep_in_fp32_modules or ())
    for name in found:
        if any(fnmatch.fnmatch(name, f"*{pattern}*") for pattern in kept):
            found[name] = torch.float32
    return found


@torch.no_grad()
def outside_scale(body: GeneralBody) -> float:
    """Return the factor that a model multiplies token embeddings with outside its embedding module.

    A model may scale ids and leave vectors as they are (Falcon-H1, Marian). What its first module
    behind the embedding reads is affine in the embeddings, so three short forwards tell the factor:
    one of ids, one of their rows, one of zeros.

    Raises ValueError for a model whose vectors cannot follow its ids.
    """
    # Of its own modules: what hooks note must not be of another thread's forward.
    body = GeneralBody(twin_of_model(body.model))
    model, module = body.model, body._module
    device = next(model.parameters()).device
    few = torch.arange(1, min(9, module.weight.shape[0]), device=device)[None]
    rows = module(few)
    of_ids = _feeds(model, lambda: body.hidden_of_ids(few))
    of_rows, of_zeros = (
        _feeds(model, partial(model, inputs_embeds=x, use_cache=False))
        for x in (rows.clone(), torch.zeros_like(rows))
    )
    name = next((n for n in of_ids if n in of_rows and n in of_zeros), None)
    if name is not None:
        ids, one, zero = (found[name].double() for found in (of_ids, of_rows, of_zeros))
        near = 4 * torch.finfo(rows.dtype).eps * float(ids.abs().max())
        if float((ids - one).abs().max()) <= near:
            return 1.0
        scale = float(((ids - zero) * (one - zero)).sum() / (one - zero).square().sum())
        if float((zero + scale * (one - zero) - ids).abs().max()) <= 4 * near:
            return _as_stored(model, scale)
    raise ValueError(
        f"lm: {type(model).__name__} does not feed its blocks a multiple of its embedding's rows, "
        "so token ids cannot be turned into vectors for it"
    )


def _feeds(model: PreTrainedModel, forward: Callable[[], object]) -> dict[str, Tensor]:
    """The first floating-point input of every module in one forward, by name, in order of call."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            first = next((t for t in given if t.is_floating_point()), None)
            if first is not None:
                found.setdefault(name, first.clone())

        return hook

    # The model and its decoders are given the embeddings themselves.
    inner = [(n, m) for n, m in model.named_modules() if not isinstance(m, PreTrainedModel)]
    handles = [m.register_forward_pre_hook(note(n), with_kwargs=True) for n, m in inner]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _as_stored(model: PreTrainedModel, scale: float) -> float:
    """The attribute of a module that is `scale` up to rounding, or `scale` itself."""
    stored = [v for m in model.modules() for v in vars(m).values() if isinstance(v, float)]
    nearest = min(stored, key=lambda value: abs(value - scale), default=scale)
    return nearest if abs(nearest - scale) <= 1e-3 * abs(scale) else scale
