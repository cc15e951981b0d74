"""Choose what runs, once: one implementation for each part of a forward or of a step.

`plan_of` is the only function that names implementations. Everything below is told what to run and
never asks again. A plan says of each part what was taken, why, and why nothing else was; print it
with `str(plan)`.

Letters: B rows, N positions, d hidden size, H heads, P vectors of a prefix, S = 2 + H (1 + P)
spanning vectors per row, of which H (P − 1) are constants of the model.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from prototok_kernels.attention_triton import why_no_tile
from prototok_kernels.backend import EMULATED, KERNEL_DTYPES, PACKED, Machine, this_machine
from prototok_kernels.layers import DecoderLayer, inner_projection, is_parallel
from prototok_kernels.packed import why_unpacked

BACKENDS = ("auto", "torch", "triton", "cpu")

# A constant vector's part of a position against one operation of the products that it replaces:
# nothing else of it is left to be saved (docs/dev/log.md).
CONSTANT_COST = 4
# B N d below which the closed form's 30 to 65 further launches cost a GPU more than one block at
# all positions does: counted by a rehearsal (docs/dev/log.md), not measured.
FEW_ON_CUDA = 3 << 20
# B N d² below which torch's closed form costs a CPU more than one more block does, by what runs
# the blocks (docs/dev/log.md). Measured with AVX-512 BF16.
FEW_ON_CPU = {"cpu": 1 << 26, "one by one": 1 << 22}
# Spanning vectors that a tile of Triton's combined kernels takes, with their gradients.
MOST_COMBINED = 128
# Rows up to which one token is decoded by kernels that read a weight once for all of them: from
# there on a row's multiplications take as long as the weights. Counted (docs/gpu.md), not measured.
FEW_ROWS_ON_CUDA = 4
# Positions (B · N) up to which the C++ decoder is faster than blocks (docs/dev/log.md); the second
# is of float32 on AVX-512. Where blocks have packed products it is for tokens one by one.
FEW_POSITIONS, FEW_POSITIONS_FP32 = 64, 256
# Positions a thread up to which it is so even then where rows are fewer than threads: it shares out
# outputs, where blocks share out positions and have no tile of products for each thread.
FEW_POSITIONS_A_THREAD = 6
# The length from which AMX multiplies in tiles (kTilesFrom in packed_matrix.h): blocks then take
# half of the decoder's time, however few the positions.
TILES_FROM = 5


@dataclass(frozen=True)
class Choice:
    """What runs for one part, why, and why each other candidate does not."""

    taken: str
    reason: str
    others: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        refused = "".join(f"; not {name}: {why}" for name, why in self.others)
        return f"{self.taken} ({self.reason}{refused})"


@dataclass(frozen=True)
class Plan:
    """What runs for B rows of N positions.

    passes        norms and activations: "torch", "triton" or "cpu" (C++)
    attention     "torch"; "tile" (one Triton launch each way), or "triton" (rotary in place, then
                  torch's attention); "cpu"; "flash"
    first_layer   "in full" (at every position), or its closed form: "cpu" (one C++ op), or torch's
                  products around a scan by "triton" or "torch"
    first_mlp     of a sequential block in closed form: products of S vectors, "combined" and
                  activated in one Triton kernel or, as "span", in two steps; or "positions"
    second_layer  its first products from the span of the first layer's output, as products alone
                  ("span") or with the activation in one Triton kernel ("combined"), or "in full"
    blocks        "cpu" (all blocks as one C++ op), or "one by one"
    decoder       of a forward without gradient: "cpu" (the C++ decoder), or "blocks"
    token         one more token of each row behind cached keys and values: "cpu" (the C++ decoder),
                  "fused" (Triton's products with all that stands around them), or "one by one"
    head          "packed" (C++ on a weight laid out for it), or torch's products around a pass by
                  "torch", "triton" or "cpu"
    update        AdamW: "torch", "triton" or "cpu"
    products      of packed weights, in any of these parts: "amx", "avx512bf16" or "avx2"; "torch"
                  where no part has them
    """

    backend: str  # as asked for
    device: str
    dtype: str
    rows: int
    length: int
    instruction_set: str  # of the C++ kernels; "none" where they do not run
    passes: Choice
    attention: Choice
    first_layer: Choice
    first_mlp: Choice
    second_layer: Choice
    blocks: Choice
    decoder: Choice
    token: Choice
    head: Choice
    update: Choice
    products: Choice

    def by_row(self, as_fitted: bool = False) -> bool:
        """Whether a forward without gradient gives a row the same bits whatever rows are beside it.

        C++ sums in one order. Torch and transformers choose theirs by the size of the batch. With
        `as_fitted` of the forward that fits run, not of the decoder.
        """
        packed = self.blocks.taken == "cpu" and self.head.taken == "packed"
        return packed or (self.decoder.taken == "cpu" and not as_fitted)

    def choices(self) -> dict[str, Choice]:
        """Return the choice of each part, by its name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Choice)}

    def summary(self) -> str:
        """Return one line that names what was taken, for records."""
        taken = ", ".join(f"{name} {choice.taken}" for name, choice in self.choices().items())
        return f"{self.rows} x {self.length} {self.dtype} on {self.device}: {taken}"

    def __repr__(self) -> str:
        return f"Plan({self.summary()})"

    def __str__(self) -> str:
        head = (
            f"{self.rows} rows x {self.length} positions, {self.dtype} on {self.device}, "
            f"backend {self.backend!r}, C++ instructions: {self.instruction_set}"
        )
        width = max(map(len, self.choices()))
        return "\n".join([head, *(f"{n:<{width}}  {c}" for n, c in self.choices().items())])


@dataclass(frozen=True)
class Shape:
    """What a plan must know of a model: of its blocks and of its head.

    blocks        0 where transformers runs the model
    unpacked      why packed products do not take the blocks' weights; None when they do
    head_unpacked the same of the head's weight
    """

    blocks: int = 0
    hidden_size: int = 0
    heads: int = 0
    head_size: int = 0
    shared_keys: bool = False  # by several heads
    window: int | None = None  # of the first block
    flash: bool = False
    normed_heads: bool = False  # norms on q and k, in any block
    parallel: tuple[bool, ...] = ()  # of the first two blocks
    prefix: int = 0  # P
    unpacked: str | None = None
    head_unpacked: str | None = "the model ends in logits"

    @property
    def spanning(self) -> int:
        """S"""
        return 2 + self.heads * (1 + self.prefix)

    @property
    def constants(self) -> int:
        """Return how many of the S spanning vectors are constants."""
        return self.heads * max(0, self.prefix - 1)

    @classmethod
    def of(cls, layers: Sequence[DecoderLayer], head: Tensor | None) -> Shape:
        """Return the shape of frozen blocks and of the head behind them (None: none)."""
        first = layers[0]
        weights = (w for layer in layers for w in _matrices(layer))  # which may be made by and by
        return cls(
            blocks=len(layers),
            hidden_size=first.hidden_size,
            heads=first.heads,
            head_size=first.head_size,
            shared_keys=first.heads != first.kv_heads,
            window=first.window,
            flash=any(layer.flash for layer in layers),
            normed_heads=any(layer.q_norm is not None for layer in layers),
            parallel=tuple(is_parallel(layer) for layer in layers[:2]),
            prefix=first.prefix_length,
            unpacked=why_unpacked(weights),
            head_unpacked="there is no head" if head is None else why_unpacked([head]),
        )


def _matrices(layer: DecoderLayer) -> tuple[Tensor, ...]:
    return layer.qkv, layer.o, inner_projection(layer)[0], layer.down


def plan_of(
    shape: Shape,
    *,
    rows: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device | str,
    backend: str,
    pair: bool,
    machine: Machine | None = None,
) -> Plan:
    """Choose what runs for B = `rows` rows of N = `length` input positions.

    Args:
        shape: of the model.
        rows, length: of the forward.
        dtype, device: of the weights.
        backend: "torch", "triton" or "cpu" to have that, "auto" for the fastest there is.
        pair: the input is [e, m, m, …, m], so that the first layers may collapse.
        machine: what there is to choose from; None is this machine.

    Raises:
        ValueError: a backend that is unknown, or that cannot be had for this device and dtype.
    """
    device = torch.device(device)
    return _plan_of(shape, rows, length, dtype, device, backend, pair, machine or this_machine())


@lru_cache(maxsize=4096)
def _plan_of(
    shape: Shape, rows: int, length: int, dtype: torch.dtype, device: torch.device, backend: str,
    pair: bool, machine: Machine,
) -> Plan:  # fmt: skip
    kind = device.type
    passes = _passes(backend, kind, dtype, machine)
    by = passes.taken

    # What may stand against a candidate, None where it does not.
    run_elsewhere = None if shape.blocks else "transformers runs the model"
    no_cpp = None if by == "cpu" else "the C++ kernels do not run"
    no_triton = None if by == "triton" else "Triton's kernels do not run"
    no_products = None if machine.packed else "no instruction set here multiplies bf16 pairs"
    normed_heads = "q and k have norms" if shape.normed_heads else None
    is_flash = "flash-attn attends" if shape.flash else None
    two_vectors = None if shape.parallel[:1] == (False,) else "a parallel block needs e and m alone"
    long_prefix = "the prefix is longer than the text" if shape.prefix > length else None
    cost_of_span = (shape.spanning - shape.constants) * (shape.hidden_size + length)
    cost_of_span += CONSTANT_COST * shape.constants * length
    spanned = cost_of_span < length * shape.hidden_size
    few_positions = None if spanned else "the S spanning vectors cost more than N positions"
    no_tile = f"more than {MOST_COMBINED} spanning vectors fit no tile"
    wide_first = no_tile if shape.spanning > MOST_COMBINED else None
    wide_second = no_tile if shape.spanning + 1 > MOST_COMBINED else None  # one for all positions
    few_on_cuda = kind == "cuda" and rows * length * shape.hidden_size < FEW_ON_CUDA
    no_pair = _against_closed_form(shape, length, pair) or (
        "its small operations cost more than N positions" if few_on_cuda else None
    )

    blocks = _choose(
        (
            "cpu", run_elsewhere, no_cpp, no_products, shape.unpacked, normed_heads, is_flash,
            None if rows * length else "there is nothing to do",
        ),
        ("one by one",),
    )  # fmt: skip
    # Torch's closed form competes with one more block.
    few_on_cpu = kind == "cpu" and rows * length * shape.hidden_size**2 < FEW_ON_CPU[blocks.taken]
    one_more_block = few_positions if blocks.taken == "cpu" else None
    if one_more_block is None and few_on_cpu:
        one_more_block = "one more block costs less"

    first_layer = _choose(
        (
            "cpu", no_pair, no_cpp, no_products, shape.unpacked, two_vectors, few_positions,
            "the head size is odd" if shape.head_size % 2 else None,
        ),
        ("triton", no_pair, long_prefix, no_triton),
        ("torch", no_pair, long_prefix, one_more_block),
        ("in full",),
    )  # fmt: skip
    in_full = "the first layer is in full" if first_layer.taken == "in full" else None
    no_second = (
        no_pair, in_full,
        None if shape.parallel == (True, True) else "it needs two parallel blocks",
        # Up to 3 S positions it is no faster (docs/dev/log.md).
        None if length > 3 * shape.spanning else "it pays beyond 3 S positions",
    )  # fmt: skip
    head = _choose(("packed", no_cpp, no_products, shape.head_unpacked), (by,))
    has_packed = "cpu" in (blocks.taken, first_layer.taken) or head.taken == "packed"
    unused = None if has_packed else "no part has packed weights"
    sets = dict.fromkeys((machine.packed or PACKED[0], *PACKED))
    wide = dtype == torch.float32 and length > 1 and "avx512" in machine.instruction_sets
    few_for_decoder = FEW_POSITIONS_FP32 if wide else FEW_POSITIONS
    too_few = rows < machine.threads and rows * length <= FEW_POSITIONS_A_THREAD * machine.threads
    if machine.packed in (PACKED[0], EMULATED):
        too_few = too_few and length < TILES_FROM
    has_products = length > 1 and blocks.taken == "cpu" and not too_few

    if run_elsewhere:
        attention = Choice("transformers", run_elsewhere)
    elif shape.flash:
        attention = Choice("flash", "asked of load")
    elif by == "triton":
        keys = shape.prefix + length
        too_large = why_no_tile(keys, shape.head_size, dtype, shape.shared_keys, device)
        attention = _choose(("tile", too_large), ("triton",))
    else:
        attention = passes
    return Plan(
        backend=backend,
        device=kind,
        dtype=str(dtype).removeprefix("torch."),
        rows=rows,
        length=length,
        instruction_set=machine.instruction_sets[0] if by == "cpu" else "none",
        passes=passes,
        attention=attention,
        first_layer=first_layer,
        first_mlp=_choose(
            ("combined", no_pair, in_full, two_vectors, few_positions, no_triton, wide_first),
            ("span", no_pair, in_full, two_vectors, few_positions),
            ("positions",),
        ),
        second_layer=_choose(
            ("combined", *no_second, no_triton, wide_second), ("span", *no_second), ("in full",)
        ),
        blocks=blocks,
        decoder=_choose(
            (
                "cpu", run_elsewhere, no_cpp,
                "blocks have the faster products" if has_products else None,
                None if rows * length <= few_for_decoder
                else f"more than {few_for_decoder} positions",
            ),
            ("blocks",),
        ),
        token=_choose(
            (
                "cpu", run_elsewhere, no_cpp,
                None if rows <= FEW_POSITIONS else f"more than {FEW_POSITIONS} rows",
            ),
            (
                "fused", run_elsewhere, no_triton,
                None if rows <= FEW_ROWS_ON_CUDA else f"more than {FEW_ROWS_ON_CUDA} rows",
            ),
            ("one by one",),
        ),
        head=head,
        # e and m are fp32, whatever the model is.
        update=_passes(backend, kind, torch.float32, machine),
        products=_choose(
            *((name, no_cpp, unused, machine.lacks_instructions(name)) for name in sets),
            ("torch",),
        ),
    )  # fmt: skip


def _choose(*candidates: tuple[str | None, ...]) -> Choice:
    """Take the first candidate, each (name, what may stand against it …), that nothing refuses."""
    reasons = {str(name): next((r for r in against if r), None) for name, *against in candidates}
    taken = next(name for name, reason in reasons.items() if reason is None)
    others = tuple((name, reason or "slower") for name, reason in reasons.items() if name != taken)
    only = all(reason for name, reason in reasons.items() if name != taken)
    return Choice(taken, "nothing else can" if only and others else "the fastest", others)


def _against_closed_form(shape: Shape, length: int, pair: bool) -> str | None:
    """Return why the first block has no closed form, or None where it has."""
    if not shape.blocks:
        return "transformers runs the model"
    if not pair:
        return "the input is not [e, m, …, m]"
    if shape.window is not None and shape.window < shape.prefix + length:
        return f"positions beyond the window of {shape.window} do not see e"
    return None


def _passes(backend: str, kind: str, dtype: torch.dtype, machine: Machine) -> Choice:
    """Choose between torch, Triton and the C++; raise ValueError for what cannot be had."""
    if backend not in BACKENDS:
        near = difflib.get_close_matches(str(backend)[:200].lower(), BACKENDS, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}{meant}")

    def against(name: str) -> str | None:
        missing = machine.lacks(name, kind)
        if missing is None and dtype not in KERNEL_DTYPES[name]:
            return f"backend: {name!r} does not take tensors of {dtype}"
        return missing

    if backend == "torch":
        return Choice("torch", "asked for")
    if backend != "auto":
        missing = against(backend)
        if missing is not None:
            raise ValueError(missing)
        return Choice(backend, "asked for")
    preferred = {"cuda": "triton", "cpu": "cpu"}.get(kind)
    if preferred is None:
        return Choice("torch", f"there are no kernels for {kind!r}")
    missing = against(preferred)
    if missing is None:
        return Choice(preferred, f"the kernels for {kind!r}")
    why = missing.removeprefix("backend: ")
    return Choice("torch", "what is left", ((preferred, why),))
