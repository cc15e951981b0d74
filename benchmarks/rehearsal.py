"""A step as CUDA would run it, without CUDA: every launch recorded, no arithmetic, no memory.

Tensors live on torch's meta device, which stands for CUDA: plans give what CUDA would get. Triton's
launches are recorded instead of run, torch's attention is the three launches of a Flash kernel, and
a dispatch mode notes every other operation with the bytes it must move. It raises where an
operation would read a value back to the host, or mix devices.

    with rehearsal() as seen:
        lm = frozen_shape("pythia-160m")
        slots = slots_of(lm, "e m*", rows=256, length=128)
        seen.launches.clear()
        step(lm, slots, 256)

What this cannot show: which kernels cuBLAS and cuDNN choose and how fast they are, a real capture,
races, clocks. Letters: B rows, N positions, H heads, c head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from triton.runtime.jit import JITFunction

from prototok import FrozenLM, Recipe
from prototok.autoregressive.fit import teacher_forced
from prototok.fitting.engine import runner as runner_module
from prototok.fitting.engine import slots as slots_module
from prototok.fitting.engine import step as step_module
from prototok.fitting.engine.inputs import OneForward
from prototok.fitting.engine.rows import make_groups
from prototok.fitting.engine.setup import Setup
from prototok.fitting.engine.slots import Room, Slots
from prototok.model import frozen_lm
from prototok.model.families import general
from prototok.model.frozen_lm import freeze
from prototok.model.identity import ModelIdentity
from prototok.model.prefix import Prefix
from prototok.model.shapes import random_model
from prototok.results.arrangement import Arrangement
from prototok_kernels import attention_triton
from prototok_kernels import backend as backend_module
from prototok_kernels import linear_cross_entropy as head_module
from prototok_kernels.plan import Plan, _plan_of, plan_of

DEVICE = torch.device("meta")


class HostRead(RuntimeError):
    """An operation for which the host waits until the device has a value."""


class MixedDevices(RuntimeError):
    """An operation on tensors of the device and of the host."""


@dataclass(frozen=True)
class Launch:
    """One kernel on the device.

    kind   "product", "triton", "attention" or "torch" (all else)
    part   of the step: "forward", "head", "backward", "update", or "" outside of it
    read, written   bytes that cannot be avoided, a broadcast counted once; flops of products
    shape  of a product (batch, m, n, k); turned: its second factor lies as (n, k)
    """

    name: str
    kind: str
    part: str
    read: int
    written: int
    flops: int = 0
    shape: tuple[int, int, int, int] | None = None
    turned: bool = False

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Compilation:
    """What Triton compiles of a launch: a kernel for these types, constants and alignments."""

    kernel: JITFunction = field(compare=False)
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]  # arguments that 16 divides, pointers among them
    options: tuple[tuple[str, Any], ...]


@dataclass
class Seen:
    """What a rehearsal recorded.

    launches      in order
    compilations  of Triton's launches, each once
    sent          host tensors that were copied to the device through `Slots._sent`
    copied        and past it, as (name of the operation, shape): what would make the host wait
    reads         values that the host read, where it may: see `rehearsal`
    """

    launches: list[Launch] = field(default_factory=list)
    compilations: dict[Compilation, None] = field(default_factory=dict)
    sent: int = 0
    copied: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    part: str = ""
    sending: bool = False
    may_read: bool = False
    reads: int = 0

    def note(self, name: str, kind: str, read: int, written: int, **more: Any) -> None:
        self.launches.append(Launch(name, kind, self.part, read, written, **more))


def size_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor, each element that a stride of 0 repeats counted once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


# ---- torch's operations --------------------------------------------------------------------------

# They launch nothing: views, and memory without a value.
_FREE = {
    "view", "_unsafe_view", "_reshape_alias", "transpose", "t", "permute", "expand", "slice",
    "select", "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "alias", "detach",
    "as_strided", "unfold", "diagonal", "lift_fresh", "empty", "empty_like", "empty_strided",
    "new_empty", "new_empty_strided", "is_same_size", "_nested_tensor_from_mask_left_aligned",
}  # fmt: skip
# They give the host a value, or a shape that depends on one.
_READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "repeat_interleave",
}  # fmt: skip
# What they hold before does not count.
_FILLS = {"zero_", "fill_", "full", "full_like", "zeros", "zeros_like", "ones", "ones_like",
          "new_zeros", "new_ones", "new_full", "scalar_tensor", "arange"}  # fmt: skip
# They read the places that an index names, not the whole of what it points into.
_GATHERS = {"index_select", "index", "gather", "embedding"}
_PRODUCTS = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0, "baddbmm": 1, "baddbmm_": 1}


class _Dispatch(TorchDispatchMode):
    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name: str = func.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if self.seen.may_read and (value := self._read(name, args, kwargs)) is not None:
            self.seen.reads += 1
            return value
        if name in _READS and any(t.device == DEVICE for t in given):
            raise HostRead(f"the host waits for the values that {name} gives")
        here = {t.device.type for t in given if t.ndim}
        self._refuse(name, args, here)
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        moved = here == {"cpu"} and any(t.device == DEVICE for t in made)
        moved |= name == "copy_" and len(here) > 1
        if moved:
            if self.seen.sending:
                self.seen.sent += 1
            else:
                self.seen.copied.append((name, tuple(given[-1].shape)))
        elif name not in _FREE and any(t.device == DEVICE for t in made):
            self._note(name, args, kwargs, given, made)
        return out

    @staticmethod
    def _read(name: str, args: Any, kwargs: Any) -> Any:
        """Zeros in place of what the device would give the host, or None where it gives nothing."""
        if not args or not isinstance(args[0], Tensor) or args[0].device != DEVICE:
            return None
        to = kwargs.get("device")
        if name == "_to_copy" and to is not None and to.type == "cpu":
            return torch.zeros(
                args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu"
            )
        if name == "_local_scalar_dense":
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        return None

    def _refuse(self, name: str, args: Any, here: set[str]) -> None:
        if DEVICE.type not in here:
            return
        masks = name in ("index", "index_put", "index_put_") and any(
            isinstance(t, Tensor) and t.dtype == torch.bool for t in args[1]
        )
        if masks:
            raise HostRead(f"the host waits for how many are true in {name}")
        if len(here) > 1 and name not in ("copy_", "_to_copy"):
            raise MixedDevices(f"{name} mixes tensors of {' and '.join(sorted(here))}")

    def _note(
        self, name: str, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]
    ) -> None:
        into = [t for key, t in kwargs.items() if key == "out"]
        written = sum(map(size_of, made))
        read = sum(map(size_of, given)) - sum(map(size_of, into))
        if name in _FILLS:
            read = 0
        elif name == "copy_":
            read = size_of(args[1])
        elif name in _GATHERS:
            read = written
        if name not in _PRODUCTS:
            self.seen.note(name, "torch", read, written)
            return
        a, b = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
        batch = a.shape[0] if a.ndim == 3 else 1
        shape = (batch, a.shape[-2], b.shape[-1], a.shape[-1])
        flops = 2 * batch * shape[1] * shape[2] * shape[3]
        turned = b.stride(-2) == 1 < b.shape[-1]
        self.seen.note(name, "product", read, written, flops=flops, shape=shape, turned=turned)


# ---- Triton's launches ---------------------------------------------------------------------------


def _norm(a: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    more = a["HAS_DELTA"]
    normed = [a["normed"], *[a["second_normed"]] * a["SECOND"]]
    return [a["x"], *[a["delta"]] * more], normed + [a["total"]] * more


def _rotary(a: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    turned = a["x"] if a["COPY_REST"] else a["x"][..., : 2 * a["HALF"]]
    return [turned], [turned]


def _named(reads: str, writes: str) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    return lambda a: ([a[name] for name in reads.split()], [a[name] for name in writes.split()])


# Of each kernel, the tensors it reads and writes, by its arguments; once for each time.
_TRAFFIC: dict[str, Callable[[dict[str, Any]], tuple[list[Tensor], list[Tensor]]]] = {
    "_residual_norm_kernel": _norm,
    "_residual_norm_backward_kernel": lambda a: (
        [a["grad_normed"], a["total"], *[a["grad_total"]] * a["HAS_GRAD_TOTAL"]]
        + [a["grad_second"]] * a["SECOND"],
        [a["grad"]],
    ),
    "_activation_kernel": lambda a: ([a["z"], *[a["grad"]] * a["BACKWARD"]], [a["out"]]),
    "_rotary_kernel": _rotary,
    "_attention_kernel": _named("qkv", "out"),
    "_attention_backward_kernel": _named("qkv grad_out", "grad"),
    "_attention_halves_kernel": _named("qkv", "out"),
    "_attention_halves_backward_kernel": _named("qkv grad_out", "grad"),
    "_normed_product_kernel": lambda a: (
        [a[name] for name in ("x", "norm", *["norm_bias"] * a["CENTRED"], "weight")]
        + [a["bias"]] * a["HAS_BIAS"] + [a["second_weight"]] * bool(a["SECOND_OUT"])
        + [a["second_bias"]] * (a["SECOND_OUT"] > 0 and a["SECOND_HAS_BIAS"]),
        [a["out"], *[a["second_out"]] * bool(a["SECOND_OUT"])],
    ),
    "_added_product_kernel": lambda a: (
        [a["x"], a["inputs"], a["weight"], *[a["bias"]] * a["HAS_BIAS"]]
        + [a["second_inputs"], a["second_weight"]] * bool(a["SECOND_SIZE"])
        + [a["second_bias"]] * (a["SECOND_SIZE"] > 0 and a["SECOND_HAS_BIAS"]),
        [a["x"]],
    ),
    # The whole cache, though only what is filled is read.
    "_cached_attention_kernel": lambda a: (
        [a["qkv"], a["keys"], a["values"]],
        [a["out"], *[a["best"], a["total"]] * (a["SPLITS"] > 1)],
    ),
    "_merge_kernel": _named("mixed best total", "out"),
    "_best_logit_kernel": _named("h weight", "best index"),
    "_next_token_kernel": lambda a: ([a["scores"], *[a["index"]] * a["INDEXED"], a["x"]], [a["x"]]),
    "_head_kernel": lambda a: (
        [a["logits"]] * (1 + a["NEED_GRAD"]), [a["gradient"]] * a["NEED_GRAD"],
    ),
    "_adamw_kernel": _named("param grad exp_avg exp_avg_sq", "param exp_avg exp_avg_sq"),
    "pair_input_kernel": lambda a: (
        [a["m"], a["e"]], [a["normed"], a["span"][:, :2], *[a["second"]] * a["SECOND"]],
    ),
    "pair_input_backward_kernel": lambda a: (
        [a["m"], a["e"], a["grad_normed"], a["grad_span"][:, :2]]
        + [a["grad_second"]] * a["SECOND"],
        [a["grad_m"], a["grad_e"]],
    ),
    "pair_logits_kernel": lambda a: (
        [a["qkv"], a["cos"], a["sin"]],
        [a["a"], a["b"], a["apart"], a["u"] if a["P"] else a["values"]],
    ),
    "pair_logits_backward_kernel": lambda a: (
        [a[name] for name in ("qkv", "cos", "sin", "grad_a", "grad_b", "grad_apart")]
        + [a["grad_u" if a["P"] else "grad_values"]],
        [a["grad"]],
    ),
    "combined_activation_kernel": lambda a: (
        [a["coef"], a["vectors"], *[a["grad"]] * a["BACKWARD"]], [a["out"]],
    ),
    "affine_scan_forward_kernel": lambda a: (
        [a[f"{name}_ptr"] for name in ("a", "b", "span", *["u"] * bool(a["P"]))],
        [a[f"{name}_ptr"] for name in ("x", "coef", "w", "sum")],
    ),
    "affine_backward_kernel": _named("grad_x_ptr span_ptr w_ptr", "grad_w_ptr partial_ptr"),
    "scan_backward_kernel": lambda a: (
        [a[f"{name}_ptr"] for name in ("grad_w", "a", "sum", "w")]
        + [a["grad_coef_ptr"]] * a["HAS_GRAD_COEF"],
        [a[f"{name}_ptr"] for name in ("grad_a", "grad_b", *["grad_u"] * bool(a["P"]))],
    ),
}  # fmt: skip

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")


def _recorder(seen: Seen) -> Callable[..., None]:
    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name, names = self.__name__, self.arg_names
        unknown = kwargs.keys() - set(names) - set(_OPTIONS)
        bound = dict(zip(names, args, strict=False))
        twice = bound.keys() & kwargs.keys()
        bound |= {key: value for key, value in kwargs.items() if key in names}
        missing = [argument for argument in names if argument not in bound]
        if unknown or missing or twice:
            raise TypeError(f"{name}: unknown {unknown}, missing {missing}, twice {twice}")
        for argument, value in bound.items():
            if isinstance(value, Tensor) and value.device != DEVICE:
                raise MixedDevices(f"{name}: {argument} is on {value.device}")
        if not all(isinstance(n, int) and n > 0 for n in grid):
            raise ValueError(f"{name}: a grid of {grid}")
        read, written = (sum(map(size_of, side)) for side in _TRAFFIC[name](bound))
        seen.note(name, "triton", read, written)
        seen.compilations.setdefault(_compilation(self, bound, kwargs))

    return run


def _compilation(kernel: JITFunction, bound: dict[str, Any], options: Any) -> Compilation:
    """Specialise as Triton does: an integer 1 is a constant, and what 16 divides is known to be."""
    signature, constants, aligned = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, bound[parameter.name]
        if isinstance(value, Tensor):
            signature.append((name, "*" + _TYPES[value.dtype]))
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(name)
        elif parameter.is_constexpr or (type(value) is int and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0:
                aligned.append(name)
    chosen = tuple((key, value) for key, value in options.items() if key in _OPTIONS)
    return Compilation(
        kernel, kernel.__name__, tuple(signature), tuple(constants), tuple(aligned), chosen
    )


# ---- torch's attention ---------------------------------------------------------------------------


def _attention(seen: Seen) -> Callable[..., Tensor]:
    """Flash attention's launches: one forward; ⟨out, ∂out⟩, the gradients and a cast backward."""

    def heads_inside(like: Tensor) -> Tensor:  # (B, H, N, c) that lies as (B, N, H, c)
        return torch.empty_like(
            like.transpose(1, 2), memory_format=torch.contiguous_format
        ).transpose(1, 2)

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, share: float) -> Tensor:
            out = heads_inside(q)
            ctx.save_for_backward(q, k, v, out)
            ctx.flops = share * 2 * q.numel() * k.shape[2]  # of one of the products
            seen.note(
                "attention", "attention", sum(map(size_of, (q, k, v))),
                size_of(out) + 4 * q[..., 0].numel(), flops=int(2 * ctx.flops),
            )  # fmt: skip
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            q, k, v, out = ctx.saved_tensors
            inputs, wide = sum(map(size_of, (q, k, v, grad))), 4 * q.numel()
            written, per_query = size_of(k) + size_of(v), 4 * q[..., 0].numel()
            seen.note("attention backward, dot", "attention", 2 * size_of(out), per_query)
            seen.note(
                "attention backward", "attention", inputs, wide + written, flops=int(5 * ctx.flops)
            )
            seen.note("attention backward, cast", "attention", wide, size_of(q))
            return heads_inside(q), heads_inside(k), heads_inside(v), None

    def attend(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        for name, tensor in (("k", k), ("v", v), ("mask", attn_mask)):
            if tensor is not None and tensor.device != q.device:
                raise MixedDevices(f"attention: {name} is on {tensor.device}, q on {q.device}")
        if q.shape[1] != k.shape[1] and not enable_gqa:
            raise ValueError(f"attention: {q.shape[1]} heads on {k.shape[1]} without enable_gqa")
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch makes it one to add
            seen.note("where", "torch", size_of(attn_mask), 2 * attn_mask.numel())
        return Flash.apply(q, k, v, 0.5 if is_causal else 1.0)

    return attend


# ---- all together --------------------------------------------------------------------------------


@contextmanager
def rehearsal(
    processors: int = 132, may_read: bool = False, capability: int = 90
) -> Iterator[Seen]:
    """Let the meta device stand for CUDA, and record what would run there.

    `processors`: multiprocessors of the device; 132 on H100 and H200, whose `capability` is that of
    sm_90. `may_read`: the host may read single values and copies of tensors, which are zeros; for
    what runs beside a fit.

    Raises RuntimeError where Triton's kernels are interpreted, so that there is no launch to see.
    """
    if backend_module.TRITON_INTERPRETED:
        raise RuntimeError("a rehearsal needs TRITON_INTERPRET=0 when triton is imported")
    seen = Seen(may_read=may_read)

    @contextmanager
    def part(name: str, device: torch.device) -> Iterator[None]:
        before, seen.part = seen.part, name
        try:
            yield
        finally:
            seen.part = before

    def plan(
        lm: FrozenLM, rows: int, length: int, backend: str = "auto", pair: bool = False
    ) -> Plan:
        return plan_of(
            lm.body.shape, rows=rows, length=length, dtype=lm.dtype, device="cuda",
            backend=backend, pair=pair,
        )  # fmt: skip

    lacking, sent = backend_module.unavailable, Slots._sent

    def unavailable(backend: str, kind: str) -> str | None:
        return lacking(backend, "cuda" if kind == DEVICE.type else kind)

    def send(slots: Slots, tensor: Tensor) -> Tensor:
        seen.sending = True
        try:
            return sent(slots, tensor)
        finally:
            seen.sending = False

    functional = torch.nn.functional
    with ExitStack() as stack:
        for where, name, value in (
            (JITFunction, "run", _recorder(seen)),
            (torch.cuda, "device_of", lambda tensor: nullcontext()),
            (functional, "scaled_dot_product_attention", _attention(seen)),
            (backend_module, "unavailable", unavailable),
            (head_module, "multiprocessors", lambda device: processors),
            (backend_module, "capability", lambda device: capability),
            (attention_triton, "capability", lambda device: capability),
            (FrozenLM, "plan", plan),
            (slots_module.Slots, "_sent", send),
            (step_module, "named_range", part),
            (runner_module, "named_range", part),
            (general, "on_cuda", lambda device: True),
            (general, "takes_mask", lambda model: True),  # these two compare values
            (general, "outside_scale", lambda body: 1.0),
            (frozen_lm, "sampled_fingerprint_of", lambda source: "of no weights"),
        ):
            stack.enter_context(patch.object(where, name, value))
        # Plans that are kept are of another capability, and so are those of here.
        _plan_of.cache_clear()
        stack.callback(_plan_of.cache_clear)
        stack.enter_context(_Dispatch(seen))
        yield seen


def frozen(make: Callable[[], PreTrainedModel], prefix: int = 0) -> FrozenLM:
    """Make a model without weights and freeze it in bfloat16, behind a prefix of P vectors."""
    with DEVICE:
        source = make().to(torch.bfloat16).eval()
    config = source.config.get_text_config()
    identity = ModelIdentity(
        config.name_or_path, None, config.model_type, config.hidden_size, config.vocab_size,
        "of no weights", None,
    )  # fmt: skip
    lm = freeze(source, identity, None, DEVICE, torch.bfloat16)
    if not prefix:
        return lm
    return lm.behind(Prefix(torch.zeros(prefix, lm.hidden_size, device="cpu")))


def frozen_shape(shape: str, prefix: int = 0) -> FrozenLM:
    """Freeze a published shape without weights."""
    return frozen(lambda: random_model(shape, DEVICE, torch.bfloat16), prefix)


def slots_of(
    lm: FrozenLM, inputs: str, rows: int, length: int, *, share: str | None = None,
    recipe: Recipe | None = None,
) -> Slots:  # fmt: skip
    """Return slots full of rows of N targets, for an arrangement or "[mem]"."""
    recipe = recipe or Recipe()
    if inputs == "[mem]":
        setup = teacher_forced(lm, 2, recipe, "auto", rows, 0)
    else:
        setup = Setup(lm, OneForward(Arrangement.parse(inputs)), recipe, "auto", rows)
    ids = torch.zeros(length, dtype=torch.int64, device="cpu")
    groups = make_groups([ids] * rows, [0], share, max(1, rows // 2) if share else None)
    slots = Slots(setup, Room(rows, len(groups), length), share)
    slots.admit(groups)
    return slots
