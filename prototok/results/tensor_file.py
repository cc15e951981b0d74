"""What every safetensors file of ours has in common: how it is written, and for which model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import ModelIdentity


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor | None], header: dict) -> None:
    """One safetensors file with a JSON header, there whole or not at all; None is left out."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {name: t.contiguous() for name, t in tensors.items() if t is not None},
        temporary,
        metadata={"prototok": json.dumps(header)},
    )
    os.replace(temporary, path)


def require_model(what: str, stored: ModelIdentity, lm: FrozenLM) -> None:
    """ValueError unless `stored` is the model that `lm` holds; `what` names the argument."""
    lm.require_unchanged()
    if not lm.has_fingerprint(stored.fingerprint):
        raise ValueError(
            f"{what}: fitted on {stored.name} (weights {stored.fingerprint[:8]}), "
            f"not on {lm.identity.name} (weights {lm.identity.fingerprint[:8]})"
        )


def require_tokenizer(what: str, stored: ModelIdentity, lm: FrozenLM) -> None:
    """ValueError unless `lm` has the tokenizer that was there; `what` names the argument."""
    then, now = stored.tokenizer_hash, lm.identity.tokenizer_hash
    if then != now:
        raise ValueError(
            f"{what}: fitted with another tokenizer ({then or 'none'}) than that of "
            f"{lm.identity.name} ({now or 'none'})"
        )
