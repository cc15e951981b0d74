"""Vectors on the Hugging Face hub: one safetensors file in a model repository, with its card."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from prototok.model.identity import ModelIdentity


def push(
    save: Callable[[Path], None], name: str, card: str, repo_id: str, private: bool | None,
    token: str | None, endpoint: str | None,
) -> str:  # fmt: skip
    """Put a file called `name`, as `save` writes it, into a repository; return the commit's URL.

    The repository is made where it is missing. A card is written where it has none.

    Raises ValueError where the hub refuses or cannot be reached.
    """
    try:
        api = HfApi(endpoint=endpoint, token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder) / name)
            if not api.file_exists(repo_id, "README.md"):
                (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"Upload {name}"
            )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _refused(repo_id, "written", error) from error
    return str(done.commit_url)


def fetch(
    repo_id: str | Path, name: str, revision: str | None, token: str | None, endpoint: str | None
) -> Path:
    """Return where a file called `name` is: in a folder here, or in the cache of the hub's client.

    Raises ValueError where there is none, or the hub cannot be reached.
    """
    if Path(repo_id).is_dir():
        return Path(repo_id) / name
    try:
        found = hf_hub_download(
            str(repo_id), name, revision=revision, token=token, endpoint=endpoint
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _refused(str(repo_id), "read", error) from error
    return Path(found)


def _refused(repo_id: str, verb: str, error: Exception) -> ValueError:
    why = str(error).strip().split("\n")[0]
    return ValueError(f"repo_id: {repo_id!r} could not be {verb} ({why})")


def card_of(model: ModelIdentity, title: str, what: str, code: str, base: bool) -> str:
    """Return a model card: what the file holds, which model it is for, and how it is read.

    `base` names the model as the base model in the card's header; not for one that is no hub id.
    """
    header = ["---", "library_name: prototok", "tags: [prompt-tuning, proto-tokens]"]
    header += [f"base_model: {model.name}"] if base else []
    revision = f", revision {model.revision}" if model.revision else ""
    return "\n".join(
        [
            *header, "---", "", f"# {title}", "", what, "",
            f"They belong to `{model.name}`{revision} (weights {model.fingerprint}), and to no "
            "other model.",
            "", "```python", code.strip(), "```", "",
        ]
    )  # fmt: skip
