"""The only place that reaches the network: files from, and folders to, the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft.checkpoint import files
from peft.errors import AdapterNotFoundError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)


def is_repository_name(name: str) -> bool:
    """Whether `name` could be a repository: `"name"` or `"user/name"`."""
    return _REPOSITORY.fullmatch(name) is not None and ".." not in name and "--" not in name


def fetch(repo_id: str, names: Sequence[str], *, subfolder: str | None = None, **options: Any) -> Path:
    """Download the first of `names` that the repository has (or take it from the cache); returns its local path.

    Args:
        repo_id: `"user/name"`.
        names: File names, the preferred one first.
        subfolder: Folder in the repository.
        **options: As in `huggingface_hub.hf_hub_download`.

    Raises:
        AdapterNotFoundError: the repository does not exist, can't be reached, or has none of the files.
    """
    wanted = " or ".join(names)
    if not is_repository_name(repo_id):
        raise AdapterNotFoundError(f"There is no folder {repo_id!r} (looked for {wanted} in it); check the path.")
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def download(name: str) -> Path:
        try:
            return Path(huggingface_hub.hf_hub_download(repo_id, name, subfolder=subfolder, **options))
        except EntryNotFoundError:  # LocalEntryNotFoundError too: offline, and not in the cache
            raise
        except (OSError, ValueError) as error:  # no such repository or revision, gated, no network
            raise _not_fetched(repo_id, wanted, error) from error

    unreachable: Exception | None = None
    for name in names:
        try:
            path = download(name)
        except LocalEntryNotFoundError as error:
            unreachable = error
        except EntryNotFoundError:
            continue
        else:
            _fetch_shards(path, download)
            return path
    if unreachable is not None:
        raise _not_fetched(repo_id, wanted, unreachable) from unreachable
    place = f"the subfolder {subfolder!r} of {repo_id!r}" if subfolder else repr(repo_id)
    raise AdapterNotFoundError(
        f"On the hub, {place} has no {wanted}. Is it an adapter? Adapters in a subfolder need `subfolder=`."
    )


def _fetch_shards(path: Path, download: Callable[[str], Path]) -> None:
    if not path.name.endswith(".index.json"):
        return
    for shard in sorted(set(files.shard_map(path).values())):
        try:
            download(shard)
        except Exception as error:
            raise AdapterNotFoundError(
                f"{path.name} names the shard {shard!r}, which is not to be had: {error}"
            ) from error


def _not_fetched(repo_id: str, wanted: str, error: Exception) -> AdapterNotFoundError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return AdapterNotFoundError(
        f"There is no folder {repo_id!r} in {str(Path.cwd())!r}, and {wanted} could not be had from the hub: "
        f"{type(error).__name__}: {reason} Check the name and `revision`, log in (`hf auth login`) if the repository "
        "is private or gated, or download it beforehand and pass the folder."
    )


def push(
    save: Callable[[str], object],
    repo_id: str,
    *,
    commit_message: str = "Upload adapter",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Save into a temporary folder and upload it; returns the URL of the commit (or of its pull request).

    Args:
        save: Called with the folder, and fills it (`model.save_pretrained`, say).
        repo_id: `"user/name"`, created if missing.
        commit_message, commit_description, token, revision, create_pr: As in `huggingface_hub.upload_folder`.
        private: Whether a repository that is created now is private (default: as the organisation sets it).

    Raises:
        OSError: the hub can't be reached, or refuses. Nothing local has changed.
    """
    import huggingface_hub

    with tempfile.TemporaryDirectory(prefix="peft-push-") as folder:
        save(folder)
        repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            huggingface_hub.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        commit = huggingface_hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=[".peft-*"],
        )
    return str(commit.pr_url or commit.commit_url)
