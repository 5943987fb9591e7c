"""Uploads a folder to the Hugging Face hub in one commit, so that it appears there as a whole.

The hub verifies the hash of each file that it receives, so files are not hashed again here. An
interrupted upload continues where it stopped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.errors import UserError, one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DATASETS = "hf://datasets/"


class HubFolder:
    """A folder in a data set repository, which is created as a private one if it is missing.

    Raises UserError for a URL without a repository, and if the hub refuses.
    """

    def __init__(self, url: str) -> None:
        owner, _, rest = url.removeprefix(DATASETS).partition("/")
        name, _, self.inner = rest.partition("/")
        name, _, revision = name.partition("@")
        if not (owner and name):
            raise UserError(f"{url}: not a repository: give {DATASETS}OWNER/NAME")
        self.url = url
        self.where: dict[str, Any] = {
            "repo_id": f"{owner}/{name}",
            "repo_type": "dataset",
            "revision": revision or None,
        }
        self.api: HfApi = self._create()

    def _create(self) -> "HfApi":
        from huggingface_hub import HfApi

        api = HfApi()
        try:
            api.create_repo(self.where["repo_id"], repo_type="dataset", private=True, exist_ok=True)
        except Exception as error:  # of the hub or of the network
            raise UserError(
                f"{self.url}: the repository cannot be created: {one_line(error)}: log in with "
                "`hf auth login`, or create it on the hub"
            ) from error
        return api

    def put(self, files: Mapping[str, Path | bytes], message: str) -> None:
        """Add files, given as local paths or as contents, in one commit."""
        from huggingface_hub import CommitOperationAdd

        additions = [
            CommitOperationAdd(self._path(name), file if isinstance(file, bytes) else str(file))
            for name, file in files.items()
        ]
        try:
            self.api.create_commit(**self.where, operations=additions, commit_message=message)
        except Exception as error:
            raise UserError(
                f"{self.url}: cannot be written: {one_line(error)}: run the same command again"
            ) from error

    def _path(self, name: str) -> str:
        return f"{self.inner.strip('/')}/{name}".strip("/")
