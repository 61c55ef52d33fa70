"""A model behind a URL: a folder that cannot be listed, or one file.

What describes a model is asked for by name, and may be missing. Of the weights the index says which
files there are; without one there is a single file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from nexus_ext.config import home_folder
from nexus_ext.download import Download, Downloader, Fetched
from nexus_ext.download.facts import shown
from nexus_ext.errors import CheckpointFormatError, SourceMissing, SourceRefused
from nexus_ext.shards import Shard

__all__ = ["fetch_url", "folder_of", "start_url"]

_log = logging.getLogger("nexus_ext")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_ONE_FILE = (".safetensors", ".gguf")
_DESCRIPTIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


def folder_of(url: str) -> Path:
    """Where the files of a URL lie; without what may be secret in it."""
    parts = urlsplit(url)
    plain = f"{parts.scheme}://{parts.hostname or ''}:{parts.port or ''}{parts.path.rstrip('/')}"
    digest = hashlib.sha256(plain.encode()).hexdigest()[:12]
    return home_folder() / "models" / f"{_last(url).replace('/', '_') or 'model'}-{digest}"


def fetch_url(url: str, downloader: Downloader) -> tuple[Path, list[Fetched]]:
    """Fetch the checkpoint at a URL: the folder, or the one file, and what came.

    Raises:
        DownloadError: There are no weights, or a source refuses or cannot be reached.
        CheckpointFormatError: The index names files outside the folder.
    """
    folder = folder_of(url)
    if _last(url).endswith(_ONE_FILE):
        fetched = downloader.fetch(Download(url, folder / _last(url)))
        return fetched.path, [fetched]
    described = _described(url, folder, downloader)
    weights = downloader.fetch_all(
        Download(_inside(url, name), folder / name) for name in _shards(url, folder, downloader)
    )
    return folder, described + weights


def start_url(url: str, downloader: Downloader) -> dict[str, Shard] | None:
    """Fetch what describes the folder at a URL, and begin its weights, lazily; by name.

    None where it is one file, which nothing describes. Raises as `fetch_url`.
    """
    if _last(url).endswith(_ONE_FILE):
        return None
    folder = folder_of(url)
    _described(url, folder, downloader)
    return {
        name: downloader.start(Download(_inside(url, name), folder / name), lazily=True)
        for name in _shards(url, folder, downloader)
    }


def _described(url: str, folder: Path, downloader: Downloader) -> list[Fetched]:
    found, missing = [], []
    arriving = [
        downloader.start(Download(_inside(url, name), folder / name))
        for name in (*_DESCRIPTIONS, _INDEX)
    ]
    for name, one in zip((*_DESCRIPTIONS, _INDEX), arriving, strict=True):
        try:
            found.append(one.result())
        except SourceMissing as error:
            missing.append(folder / name)
            _log.info("left out: %s", error)
        except SourceRefused as error:
            # An object store that may not be listed refuses what is not there.
            _log.info("left out: %s", error)
    for path in missing if found else ():  # else the server may have lost all of it
        path.unlink(missing_ok=True)  # of an earlier time
    return found


def _shards(url: str, folder: Path, downloader: Downloader) -> list[str]:
    index = folder / _INDEX
    if not index.exists():
        return [_SINGLE]
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointFormatError(
            f"{_INDEX} must map tensors to files; that of {shown(url)} does not: {error!r}"
        ) from error
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or name in ("", ".", ".."):
            raise CheckpointFormatError(
                f"an index names plain files of its folder, got {name!r}; do not use this model"
            )
    if _SINGLE not in names:
        (folder / _SINGLE).unlink(missing_ok=True)  # of an earlier time: it would be opened first
    return sorted(names)


def _last(url: str) -> str:
    return urlsplit(url).path.rstrip("/").rpartition("/")[2] or (urlsplit(url).hostname or "")


def _inside(url: str, name: str) -> str:
    """The URL of a file in a folder; what follows a question mark stays behind it."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
