"""The models of this process by name: each is opened once, by whoever needs it first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.hub import find_local, locate
from nexus_ext.sli.source import ModelSource

__all__ = ["fetched_source_of", "source_of"]

# A source is headers and modules without weights: some megabytes.
_MOST_KEPT = 8
_lock = threading.Lock()
_sources: OrderedDict[tuple[Path, str], ModelSource] = OrderedDict()


def source_of(model: str) -> ModelSource | None:
    """The model of this folder or hub id, if it is on this machine. Raises as `ModelSource`."""
    path = find_local(model)
    if path is None or not _has_config(path):
        return None
    return _opened(path)


def fetched_source_of(model: str, *, max_connections: int = 8) -> ModelSource:
    """The same; a hub id is downloaded if it is not here. Raises as `locate` and `ModelSource`."""
    return _opened(locate(model, max_connections=max_connections))


def _has_config(path: Path) -> bool:
    return path.suffix == ".gguf" or (path / "config.json").is_file()


def _state_of(path: Path) -> str:
    """Of weights and config, from names and times alone."""
    if path.suffix == ".gguf":
        return repr(_stamp(path))
    return f"{Checkpoint.open(path).fingerprint} {_stamp(path / 'config.json')}"


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """None where there is no such file; who needs it says so."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _opened(path: Path) -> ModelSource:
    """Opened again where its files have changed."""
    key = path.resolve(), _state_of(path)
    with _lock:
        source = _sources.pop(key, None) or ModelSource(path)
        _sources[key] = source
        while len(_sources) > _MOST_KEPT:
            _sources.popitem(last=False)
        return source
