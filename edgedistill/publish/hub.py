"""Bundles on the Hugging Face hub: uploaded and downloaded whole, verified on both sides, only when asked."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgedistill.bundle import Bundle
from edgedistill.drafts import refuse_taken
from edgedistill.errors import BundleError, ConfigError, require
from edgedistill.files import written_aside
from edgedistill.manifest import MANIFEST
from edgedistill.publish.card import FILE, render

_IGNORED = (".cache/**", ".git*")


def push(
    root: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a bundle as one commit; a folder without a card gets one in the same commit.

    Files of the repository that the bundle does not have stay there.

    Args:
        root: A bundle.
        repository: ``"user/name"``; made if it is not there.
        private: Make a new repository private; one that is there stays as it is.
        revision: A branch; made if it is not there. None: the main one.
        token: None: the one that ``huggingface-cli login`` left.
        endpoint: Of the hub; None: huggingface_hub's own.

    Returns:
        Where it lies now.

    Raises:
        BundleError: If the folder is no bundle whose every hash holds, or the hub refuses it.
        ConfigError: If the repository has no such name.
        MissingDependencyError: If huggingface_hub is not installed.
    """
    _check_name(repository)
    bundle = Bundle.open(root)
    hub = require("huggingface_hub", "hub")
    api = hub.HfApi(endpoint=endpoint, token=token)
    files = [hub.CommitOperationAdd(name, root / name) for name in sorted(_files(root))]
    if not (root / FILE).exists():
        files.append(hub.CommitOperationAdd(FILE, render(bundle).encode()))
    with _told(hub, repository):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        message = f"{bundle.name}, {bundle.fingerprint[:12]}"
        made = api.create_commit(repository, files, commit_message=message, revision=revision)
    return str(made.commit_url)


def pull(
    repository: str,
    target: Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> Bundle:
    """Download a bundle; the folder appears when every hash holds, and not before.

    Args:
        repository: ``"user/name"``.
        target: A folder that is not there or is empty, or holds a bundle that may be replaced.
        revision: A branch, tag or commit; None: the main branch.
        overwrite: Replace a bundle, whatever it holds.
        token, endpoint: As for `push`.

    Raises:
        BundleError: If what lies there is no whole bundle, the hub refuses it, or `target` is taken.
        ConfigError: If the repository has no such name.
        MissingDependencyError: If huggingface_hub is not installed.
    """
    _check_name(repository)
    refuse_taken(target)
    if (target / MANIFEST).is_file() and not overwrite:
        msg = f"{target}: holds a bundle; choose another folder, or give --overwrite to replace it."
        raise BundleError(msg)
    hub = require("huggingface_hub", "hub")
    with written_aside(target) as aside:
        with _told(hub, repository):
            hub.snapshot_download(
                repository,
                revision=revision,
                local_dir=aside,
                token=token,
                endpoint=endpoint,
                ignore_patterns=list(_IGNORED),
            )
        _remove_traces(aside)
        Bundle.open(aside)
    return Bundle.open(target)


def _files(root: Path) -> Iterator[str]:
    """Yield what is uploaded: all that lies in the folder, hidden files left out."""
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        if path.is_file() and not any(part.startswith(".") for part in parts):
            yield "/".join(parts)


def _check_name(repository: str) -> None:
    owner, slash, name = repository.partition("/")
    if not (owner and slash and name) or "/" in name or repository.startswith((".", "/")):
        msg = f"A repository is named USER/NAME, got {repository!r}."
        raise ConfigError(msg)


def _remove_traces(folder: Path) -> None:
    """Remove what huggingface_hub notes beside a download."""
    shutil.rmtree(folder / ".cache", ignore_errors=True)


@contextmanager
def _told(hub: Any, repository: str) -> Iterator[None]:
    """Say in one sentence what the hub refused.

    Raises:
        BundleError: If it did, or cannot be reached.
    """
    known = (
        hub.errors.HfHubHTTPError,
        hub.errors.HFValidationError,
        hub.errors.LocalEntryNotFoundError,
        hub.errors.OfflineModeIsEnabled,
        # What it raises of large files: the latter of any trouble with one, which is its cause.
        ValueError,
        RuntimeError,
    )
    try:
        yield
    except (*known, *_unreachable()) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        msg = f"{repository}: the hub refuses or cannot be reached ({reason:.300}); check the name, the token (`huggingface-cli login`) and the network."
        raise BundleError(msg) from error


def _unreachable() -> tuple[type[Exception], ...]:
    """Return what the library below huggingface_hub raises where nobody answers: requests, httpx from 1.0 on."""
    known = {"requests": "RequestException", "httpx": "HTTPError"}
    return tuple(
        getattr(sys.modules[module], name)
        for module, name in known.items()
        if module in sys.modules
    )
