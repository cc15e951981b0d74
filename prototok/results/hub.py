"""Vectors on the Hugging Face hub: one safetensors file in a model repository, with its card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import ClassVar, Self

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from prototok.model.identity import ModelIdentity


class OnHub:
    """What has `save` and `load` for one file, and belongs to a model, can be on the hub.

    Attributes:
        _file: its name in a repository.
        _usage: what a reader writes to use it, with {repo_id} for the repository.
    """

    _file: ClassVar[str]
    _usage: ClassVar[str]
    model: ModelIdentity

    def save(self, path: str | Path) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path) -> Self:
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> str:
        """Upload this to a model repository of the Hugging Face hub; return the commit's URL.

        Args:
            repo_id: such as "me/my-vectors"; made where it is missing. A card is added where the
                repository has none.
            private: of a new repository; None leaves it to the hub.
            token: None takes the one that `hf auth login` keeps.
            endpoint: of another hub than huggingface.co.

        Raises ValueError where the hub refuses or cannot be reached.
        """
        try:
            api = HfApi(endpoint=endpoint, token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                self.save(Path(folder) / self._file)
                if not api.file_exists(repo_id, "README.md"):
                    card = Path(folder) / "README.md"
                    card.write_text(self._card(repo_id), encoding="utf-8")
                done = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=f"Upload {self._file}"
                )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise _refused(repo_id, "written", error) from error
        return str(done.commit_url)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> Self:
        """Read what `push_to_hub` uploaded, or the same file from a folder here.

        Raises ValueError where there is none, it is none of ours, or the hub cannot be reached.
        """
        if Path(repo_id).is_dir():
            return cls.load(Path(repo_id) / cls._file)
        try:
            found = hf_hub_download(
                str(repo_id), cls._file, revision=revision, token=token, endpoint=endpoint
            )
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise _refused(str(repo_id), "read", error) from error
        return cls.load(found)

    def _card(self, repo_id: str) -> str:
        """Return a model card: what the file holds, which model it is for, and how it is read."""
        model, title = self.model, type(self).__name__
        header = ["---", "library_name: prototok", "tags: [prompt-tuning, proto-tokens]"]
        # A base model is a hub id, and only what was loaded from there has a revision.
        header += [f"base_model: {model.name}"] if model.revision is not None else []
        revision = f", revision {model.revision}" if model.revision else ""
        return "\n".join(
            [
                *header, "---", "", f"# {title}", "", f"`{self._file}` holds {self!r}.", "",
                f"They belong to `{model.name}`{revision} (weights {model.fingerprint}), and to no "
                "other model.",
                "", "```python", "import prototok", "", f'lm = prototok.load("{model.name}")',
                self._usage.format(repo_id=repo_id), "```", "",
            ]
        )  # fmt: skip


def _refused(repo_id: str, verb: str, error: Exception) -> ValueError:
    why = str(error).strip().split("\n")[0]
    return ValueError(f"repo_id: {repo_id!r} could not be {verb} ({why})")
