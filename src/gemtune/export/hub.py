"""Putting an exported folder on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from gemtune.errors import ConfigError


def require_hub(repo_id: str) -> None:
    """Raise ConfigError unless it is a name that the hub allows, and somebody is logged in."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"push={repo_id} is no name of a repository: {error}") from error
    try:
        HfApi().whoami()
    except Exception as error:  # whatever a network may raise
        raise ConfigError(
            f"push={repo_id}: nobody is logged in, or the hub cannot be reached "
            f"({_first_line(error)}). Run: hf auth login. Or leave push out."
        ) from error


def push_folder(folder: Path, repo_id: str) -> str:
    """Upload the folder, making a private repository where there is none; the address.

    Raises:
        ConfigError: it could not be uploaded; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Export of a fine-tuned Gemma 4"
        )
    except Exception as error:
        raise ConfigError(
            f"{folder} is written and checked, but could not be uploaded to {repo_id}: "
            f"{_first_line(error)}\nTo try that alone again: hf upload {repo_id} {folder}"
        ) from error
    return str(done)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
