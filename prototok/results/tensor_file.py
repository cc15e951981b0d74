"""Write safetensors files with a JSON header, and check which model they are for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prototok.common.files import whole
from prototok.common.json import parse_json
from prototok.model.frozen_lm import FrozenLM
from prototok.model.identity import ModelIdentity
from prototok.model.prefix import Prefix
from prototok.results.prefix_file import (
    NAME,
    prefix_header,
    prefix_in,
    prefix_tensors,
    require_prefix,
)

KEY = "prototok"  # of our JSON header among a safetensors file's metadata

# What a model reads, so it must be finite.
_VECTORS = ("e", "m", "mem", "mean", "std", "basis", "prefix")

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # a tensor's name to its dtype, as F32, and shape


@dataclasses.dataclass(frozen=True)
class Origin:
    """What every file of ours says of its vectors.

    model       which frozen model they belong to
    provenance  where they come from
    prefix      what stood in front of them; None: nothing
    """

    model: ModelIdentity
    provenance: dict[str, str]
    prefix: Prefix | None


def write_tensors(
    path: str | Path, form: tuple[str, int], tensors: Mapping[str, Tensor | None], origin: Origin,
    **fields: object,
) -> None:  # fmt: skip
    """Write one safetensors file with a JSON header, whole or not at all.

    A tensor that is None is left out. An earlier file of ours is replaced.

    Args:
        path: of the file.
        form: name and version of the format.
        tensors: by name; the prefix of `origin` goes beside them.
        origin: of the vectors.
        fields: what else the header has.

    Raises:
        ValueError: something else than a file of ours is in the way, or a vector is not finite.
        OSError: the file cannot be written, as on a full disk.
    """
    path = Path(path)
    given = {**tensors, **prefix_tensors(origin.prefix)}
    stored = {name: t.contiguous() for name, t in given.items() if t is not None}
    if broken := _not_finite(stored):
        raise ValueError(f"{broken}: it has values that are not finite; {path} is not written")
    if path.exists() or path.is_symlink():
        if (there := form_of(path)) is None:
            raise ValueError(f"path: {path} was not written by prototok and is left as it is")
        if there != form[0]:
            raise ValueError(f"path: {path} holds a {there}, no {form[0]}, and is left as it is")
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        "format": form[0],
        "version": form[1],
        **fields,
        "model": dataclasses.asdict(origin.model),
        "provenance": origin.provenance,
        **prefix_header(origin.prefix),
    }
    with whole(path) as temporary:
        try:
            save_file(stored, temporary, metadata={KEY: json.dumps(header)})
        except SafetensorError as error:  # its own kind for what the system refuses
            raise OSError(f"{path} cannot be written ({error})") from error


def read_tensors(
    path: str | Path, what: str, form: tuple[str, int],
    check: Callable[[dict, Shapes, ModelIdentity], None],
) -> tuple[dict, dict[str, Tensor], Origin]:  # fmt: skip
    """Return the header, the tensors and the origin that `write_tensors` wrote.

    Args:
        path: of the file.
        what: it should be, for messages, such as "a prior".
        form: name and version of the format, as the header has them.
        check: raises ValueError unless header, shapes and model go together; the prefix is checked
            here and is not among the shapes. It runs before any tensor is allocated; safetensors
            has held the shapes against the size of the file by then.

    Raises:
        ValueError: no such file, damaged, not of this format, or inconsistent.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            header = _header(path, what, form, file.metadata())
            shapes: Shapes = {}
            for key in file.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
                part = file.get_slice(key)
                shapes[key] = (part.get_dtype(), tuple(part.get_shape()))
            try:
                model, provenance = _identity_of(header), _provenance_in(header)
                require_prefix(header, shapes, model.hidden_size, model.vocab_size)
                check(header, {k: v for k, v in shapes.items() if k != NAME}, model)
            except (KeyError, TypeError, ValueError) as error:
                says = f"it has no {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"path: {path} is inconsistent, {says}") from None
            tensors = {key: file.get_tensor(key) for key in shapes}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {path} is not a whole safetensors file ({error})") from error
    if broken := _not_finite(tensors):
        raise ValueError(f"path: {path} holds values in {broken} that are not finite")
    return header, tensors, Origin(model, provenance, prefix_in(header, tensors))


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return which of the vectors is not finite; None where all are."""
    vectors = (name for name in _VECTORS if name in tensors)
    return next((name for name in vectors if not bool(torch.isfinite(tensors[name]).all())), None)


def _identity_of(header: dict) -> ModelIdentity:
    """Return the model that a header names; ValueError where a field is missing or mistyped."""
    found = header["model"]
    fields = {f.name: str(f.type) for f in dataclasses.fields(ModelIdentity)}
    if not isinstance(found, dict) or not set(found) <= set(fields):
        raise ValueError("its model is not one that this prototok knows")
    for name, value in found.items():
        kinds = tuple(_KINDS[kind] for kind in fields[name].split(" | "))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"its model has {value!r} as {name}")
    try:
        identity = ModelIdentity(**found)
    except TypeError as error:
        raise ValueError(f"its model does not parse ({error})") from None
    if identity.hidden_size < 1 or identity.vocab_size < 1:
        raise ValueError("its model has no size")
    return identity


def _provenance_in(header: dict) -> dict[str, str]:
    """Return where the vectors come from; ValueError where it is not names with texts."""
    found = header["provenance"]
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("its provenance is not names with texts")
    return found


def require_model(what: str, stored: ModelIdentity, lm: FrozenLM) -> None:
    """Raise ValueError unless `stored` is the model that `lm` holds; `what` names the argument."""
    lm.require_unchanged()
    if not lm.has_fingerprint(stored.fingerprint):
        raise ValueError(
            f"{what}: fitted on {stored.name} (weights {stored.fingerprint[:8]}), "
            f"not on {lm.identity.name} (weights {lm.identity.fingerprint[:8]})"
        )


def require_tokenizer(what: str, stored: ModelIdentity, lm: FrozenLM) -> None:
    """Raise ValueError unless `lm` has the tokenizer that was there; `what` names the argument."""
    then, now = stored.tokenizer_hash, lm.identity.tokenizer_hash
    if then != now:
        raise ValueError(
            f"{what}: fitted with another tokenizer ({then or 'none'}) than that of "
            f"{lm.identity.name} ({now or 'none'})"
        )


_KINDS: dict[str, type] = {"str": str, "int": int, "None": type(None)}


def _header(path: Path, what: str, form: tuple[str, int], metadata: dict[str, str] | None) -> dict:
    try:
        header = parse_json((metadata or {})[KEY])
    except (KeyError, ValueError):
        header = None
    if not isinstance(header, dict) or header.get("format") != form[0]:
        raise ValueError(f"path: {path} is a safetensors file, but not {what}")
    if header.get("version") != form[1]:
        raise ValueError(
            f"path: {path} has format version {header.get('version')!r}; this prototok reads "
            f"{form[1]}"
        )
    return header


def is_tensor_file(path: Path) -> bool:
    """Return True if `write_tensors` wrote the file."""
    return _metadata_of(path) is not None


def form_of(path: Path) -> str | None:
    """Return the name of the format of a file that `write_tensors` wrote; None for any other."""
    try:
        header = parse_json(_metadata_of(path) or "")
    except ValueError:
        return None
    return header.get("format") if isinstance(header, dict) else None


def _metadata_of(path: Path) -> str | None:
    """Return our JSON header as it stands in a file; None where there is none."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError):
        return None
