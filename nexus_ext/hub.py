"""Where a model's files come from: a folder, or a download by the hub's own library."""

from __future__ import annotations

from pathlib import Path

from nexus_ext.errors import ConfigError, MissingExtra

__all__ = ["find_local", "locate"]

# Weights as safetensors, and what describes them; never pickles.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def find_local(name: str | Path) -> Path | None:
    """As `locate`, but nothing is downloaded: None where the model is not on this machine."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if len(Path(name).parts) > 2 or str(name).startswith((".", "/", "~")):
        return None
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(snapshot_download(str(name), allow_patterns=_WANTED, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def locate(name: str | Path, *, num_connections: int = 8) -> Path:
    """The local folder (or file) of a model; a hub id is downloaded, or found in the hub's cache.

    Blocks for the download, of so many files at a time. HF_HUB_OFFLINE=1 uses the cache alone.

    Raises:
        ConfigError: Neither a path nor an id that the hub knows.
        MissingExtra: A hub id, without huggingface_hub.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if len(Path(name).parts) > 2 or str(name).startswith((".", "/", "~")):
        raise ConfigError(
            f"A model is a folder or a hub id like 'org/name'; {name} does not exist."
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError:
        raise MissingExtra(
            f"{name!r} is no local path, and a hub id needs huggingface_hub: "
            "pip install 'nexus_ext[hf]'."
        ) from None
    try:
        return Path(
            snapshot_download(str(name), allow_patterns=_WANTED, max_workers=num_connections)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"A model is a folder or a hub id; {name!r} is no folder, and the hub gave: {error}"
        ) from error
