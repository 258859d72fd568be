"""A package on the Hugging Face Hub: what would go there, and the upload itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors, get_token
from huggingface_hub.utils._validators import validate_repo_id

from mtgdm.errors import SettingError, UserError
from mtgdm.export.folder import LITTER, files_of

_LOG_IN = (
    "set HF_TOKEN to a token that may write (https://huggingface.co/settings/tokens), or `hf auth login`"
)


def check_name(repo: str) -> None:
    """SettingError for what cannot be the name of a repository."""
    try:
        validate_repo_id(repo)
    except errors.HFValidationError as error:
        raise SettingError(
            f"'{repo}' is no repository of the Hub: {error}", hint="--push OWNER/NAME"
        ) from error
    if "/" not in repo:
        raise SettingError(f"'{repo}' names no owner", hint=f"--push OWNER/{repo}")


def check_access(repo: str, api: Any = None) -> None:
    """Whether the Hub is there and knows the token; asked before anything is made."""
    if get_token() is None and api is None:
        raise UserError("the Hub wants a token, and there is none", hint=_LOG_IN)
    with _hub_errors(repo):
        (api or HfApi()).whoami()


def listing(folder: Path) -> list[tuple[str, int]]:
    """What would be uploaded: the files with their sizes."""
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files_of(folder)]


def push(folder: Path, repo: str, *, private: bool, message: str, api: Any = None) -> str:
    """Upload a package, into a new repository where there is none; returns its address.

    `private` says how a new one is made and changes nothing about one that is there.
    """
    hub = api or HfApi()
    with _hub_errors(repo):
        hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=[pattern for name in LITTER for pattern in (name, f"*/{name}")],
        )
    return f"https://huggingface.co/{repo}"


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """What the Hub and the network raise, in one line."""
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise UserError(
                f"the Hub does not let this token write to {repo}: HTTP {status}", hint=_LOG_IN
            ) from error
        raise UserError(
            f"the Hub does not take {repo}: {error.server_message or _first_line(error)}",
            hint="the package is whole: run the same command again, what was uploaded is not sent twice",
        ) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # that of the HTTP library it uses
        raise UserError(
            f"the Hub cannot be reached: {_first_line(error)}",
            hint="the network, a proxy and HF_HUB_OFFLINE are usual causes; no package was lost",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
