"""Names of models: is there one of that name, and if not, which one may be meant."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

from prototok.common.arguments import nearest

_PATIENCE = 5.0  # seconds that the hub has for saying whether it knows a name


def require_known(name: str, revision: str | None, built_in: Iterable[str]) -> None:
    """Raise ValueError at once where a hub id cannot be had, with the name that may be meant.

    The hub's own client tries for half a minute where there is no network. So what is not in its
    cache is asked for once, with a short wait. Something like a built-in name is not asked for,
    unless it names an owner, too.
    """
    if Path(name).is_file():
        raise ValueError(f"model: {name} is a file, and neither a model's folder nor a .gguf")
    meant = None if "/" in name else nearest(name, built_in)
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        if not meant:
            HfApi().model_info(name, timeout=_PATIENCE)
            return
        why = ""
    except GatedRepoError:
        return  # there is one; the client says what to do
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (401, 404):
            return  # the hub is unwell: the client says more
        why = "it knows no model of that name, or none that you may see"
    except HFValidationError:
        why = "it is no name of a model either"
    except Exception as error:  # a dozen kinds, of the client and of its transport
        why = str(error).strip().split("\n")[0]
    meant = meant or nearest(name, (path.parent.name for path in Path().glob("*/config.json")))
    raise ValueError(_missing(name, f"did you mean {meant!r}?" if meant else why))


def _missing(name: str, hint: str) -> str:
    return f"model: {name!r} is no folder here and could not be had from the hub ({hint})"
