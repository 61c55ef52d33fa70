"""Where does a model come from, and where do its files then lie?

    name ──▶ a path: used where it is
         ──▶ fetched before: nothing is asked of anybody
         ──▶ org/name: listed by huggingface_hub, fetched into the hub's own cache layout
         ──▶ a URL: fetched into NEXUS_HOME/models

Owns the answer, and the note of what was fetched (NEXUS_HOME/fetched).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nexus_ext.arriving import Inbound
from nexus_ext.config import home_folder
from nexus_ext.download import Downloader
from nexus_ext.errors import ConfigError, MissingExtra, SourceUnavailable
from nexus_ext.files import write_whole
from nexus_ext.hub_repo import (
    INDEX,
    SINGLE,
    Repo,
    cached_snapshot,
    fetch_descriptions,
    fetch_repo,
    is_offline,
    keep_repo,
    list_repo,
    start_shards,
    streamable_shards,
    weight_files,
)
from nexus_ext.memory import parse_bytes
from nexus_ext.url_model import fetch_url, folder_of, start_url

__all__ = ["FetchReport", "Outline", "arrive", "fetch", "find_local", "locate", "outline"]

_log = logging.getLogger("nexus_ext")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FetchReport:
    """What `fetch` found and did.

    Attributes:
        path: The folder (or file) to open.
        revision: The commit, where there is such a thing.
        num_files, nbytes: Of the whole model.
        bytes_received: Over the network, now.
        bytes_reused: Of an interrupted download, compared again.
        bytes_present: Of files that were here.
        num_retries: Requests that failed and were tried again.
        seconds: In all.
    """

    path: Path
    revision: str
    num_files: int
    nbytes: int
    bytes_received: int
    bytes_reused: int
    bytes_present: int
    num_retries: int
    seconds: float


@dataclass(frozen=True)
class Outline:
    """A model on the hub whose weights are not here.

    Attributes:
        name: Its id.
        folder: That it will have; what describes the model is there.
        weights: SHA-256 and bytes of each file with weights, in the order of their names.
    """

    name: str
    folder: Path
    weights: tuple[tuple[str, int], ...]


def outline(name: str | Path) -> Outline | None:
    """What a hub id means, before its weights are fetched. Blocks for what describes it; the second
    time nobody is asked.

    Returns:
        None for paths, URLs and ids of models that are here; where nobody can be asked; and where
        it has no checkpoint, or several.

    Raises:
        As `fetch`.
    """
    is_id = not _URL.match(str(name)) and not _is_no_id(name)
    if not is_id or find_local(name) is not None:
        return None
    known = _known_outline(str(name))
    if known is not None or is_offline():
        return known
    try:
        repo = list_repo(str(name), None)
    except SourceUnavailable:
        return None
    with Downloader() as downloader:
        fetch_descriptions(repo, downloader)
    weights = weight_files(repo)
    if weights is None:
        return None
    facts = tuple((file.blob, file.nbytes) for file in weights)
    found = Outline(str(name), repo.snapshot, facts)
    _write_note(_outline_note(str(name)), {"folder": str(found.folder), "weights": facts})
    return found


def _outline_note(name: str) -> Path:
    return home_folder() / "outlined" / f"{_digest(name)}.json"


def _known_outline(name: str) -> Outline | None:
    """As it was listed before, if what describes it is here; a strange note counts as none."""
    try:
        note = json.loads(_outline_note(name).read_bytes())
        folder = Path(note["folder"])
        weights = tuple((str(digest), int(nbytes)) for digest, nbytes in note["weights"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return Outline(name, folder, weights) if (folder / "config.json").is_file() else None


def find_local(name: str | Path) -> Path | None:
    """Where a model lies on this machine; None where it would have to be fetched. Asks nobody."""
    path = _existing(name)
    if path is not None:
        return path
    remembered = _remembered(str(name), None)
    if remembered is not None or _URL.match(str(name)) or _is_no_id(name):
        return remembered
    try:
        return cached_snapshot(str(name), None)
    except (ConfigError, MissingExtra):
        return None


def locate(name: str | Path, *, max_connections: int = 8, progress: Progress | None = None) -> Path:
    """The local folder (or file) of a model; what is not here is fetched.

    A model that was fetched before is used as it is, and nobody is asked for a newer one: `fetch`
    does that. Blocks for a download. HF_HUB_OFFLINE=1 uses the hub's cache alone.

    Raises:
        As `fetch`.
    """
    path = _existing(name)
    if path is not None:
        return path
    remembered = _remembered(str(name), None)
    if remembered is not None:
        return remembered
    return fetch(name, max_connections=max_connections, progress=progress).path


def arrive(
    name: str | Path,
    *,
    max_connections: int = 8,
    chunk_bytes: str | int = "8MiB",
    progress: Progress | None = None,
) -> Path | Inbound:
    """As `locate`, but does not wait for weights that can be streamed while they come.

    Blocks for what describes the model: its config, its tokenizer, its index.

    Args:
        name: As in `locate`.
        max_connections, chunk_bytes: As in `Downloader`.
        progress: As in `fetch`; called until all is here, or the model is closed.

    Returns:
        The path of what is here, or had to be fetched whole; or what is on its way, to be opened,
        and closed.

    Raises:
        As `fetch`.
    """
    path = _existing(name)
    if path is not None:
        return path
    if (remembered := _remembered(str(name), None)) is not None:
        return remembered
    url = str(name) if _URL.match(str(name)) else None
    if url is None and (len(Path(name).parts) != 2 or is_offline()):
        return locate(name, max_connections=max_connections, progress=progress)
    names: dict[str, str] = {}  # known when the hub has listed the files
    downloader = Downloader(
        max_connections=max_connections,
        chunk_bytes=chunk_bytes,
        progress=_named(progress, names),
    )
    try:
        window = 2 * parse_bytes(chunk_bytes)
        inbound = (
            _arrive_repo(str(name), downloader, window, names)
            if url is None
            else _arrive_url(url, downloader, window)
        )
    except BaseException:
        downloader.close()
        raise
    if inbound is not None:
        return inbound
    downloader.close()
    return locate(name, max_connections=max_connections, progress=progress)


def _arrive_repo(
    name: str, downloader: Downloader, window_bytes: int, names: dict[str, str]
) -> Inbound | None:
    try:
        repo = list_repo(name, None)
    except SourceUnavailable:
        return None  # `locate` asks the cache
    names |= {file.blob: file.name for file in repo.files}
    fetch_descriptions(repo, downloader)
    shards = streamable_shards(repo)
    if shards is None:
        return None
    has_index = (repo.snapshot / INDEX).exists()
    return Inbound(
        downloader,
        repo.snapshot,
        repo.snapshot / (INDEX if has_index else SINGLE),
        start_shards(repo, shards, downloader),
        {file.name: repo.blob(file) for file in shards},
        lambda: _keep_repo(name, repo),
        window_bytes=window_bytes,
    )


def _keep_repo(name: str, repo: Repo) -> None:
    keep_repo(repo)
    files = {str(repo.snapshot / file.name): file.nbytes for file in repo.files}
    _remember(name, None, repo.snapshot, files)


def _arrive_url(url: str, downloader: Downloader, window_bytes: int) -> Inbound | None:
    shards = start_url(url, downloader)
    if shards is None:
        return None
    folder = folder_of(url)

    def keep() -> None:
        there = [one for one in folder.iterdir() if one.is_file() and one.name[0] != "."]
        _remember(url, None, folder, {str(one): one.stat().st_size for one in there})

    index = folder / INDEX
    return Inbound(
        downloader,
        folder,
        index if index.exists() else folder / SINGLE,
        shards,
        {name: folder / name for name in shards},
        keep,
        window_bytes=window_bytes,
    )


def fetch(
    name: str | Path,
    *,
    revision: str | None = None,
    verify: bool = False,
    max_connections: int = 8,
    progress: Progress | None = None,
) -> FetchReport:
    """Bring a model here, or what is missing of it; an interrupted download goes on.

    Blocks. Every file is compared with what its source says of it: its size, and on the hub its
    SHA-256 or git's SHA-1.

    Args:
        name: A hub id; a URL (https, s3, gs, ...: what fsspec knows) of a folder with a checkpoint,
            or of one .safetensors or .gguf file; or a local path, which is left alone.
        revision: Branch, tag or commit of a hub id; None is its main branch.
        verify: Read files that are here, too, and compare. A URL's are fetched again: nothing is
            known about them.
        max_connections: At the same time, over all files.
        progress: Called as (file, done_bytes, total_bytes), from other threads.

    Raises:
        ConfigError: Neither a path, nor a URL, nor an id that the hub knows.
        MissingExtra: It needs a package that is not installed: pip install 'nexus_ext[hub]'.
        DownloadError: A source refuses, cannot be reached, or sends something else.
        WriteError: The disk would not take it.
    """
    began = time.perf_counter()
    path = _existing(name)
    if path is not None:
        return _report(path, "", began)
    if _URL.match(str(name)):
        return _fetch_url(str(name), verify, max_connections, progress, began)
    if _is_no_id(name):
        raise ConfigError(
            f"A model is a folder, a URL or a hub id like 'org/name'; {name} does not exist."
        )
    if is_offline():
        return _report(cached_snapshot(str(name), revision), revision or "", began)
    return _fetch_repo(str(name), revision, verify, max_connections, progress, began)


def _existing(name: str | Path) -> Path | None:
    """The path, if something is there. A URL is none: errors about paths would show its secrets."""
    if _URL.match(str(name)):
        return None
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, nobody's home
        return None


def _is_no_id(name: str | Path) -> bool:
    return len(Path(name).parts) > 2 or str(name).startswith((".", "/", "~"))


def _fetch_url(
    url: str, verify: bool, max_connections: int, progress: Progress | None, began: float
) -> FetchReport:
    remembered = None if verify else _remembered(url, None)
    if remembered is not None:
        return _report(remembered, "", began)
    with Downloader(max_connections=max_connections, progress=_named(progress)) as downloader:
        path, fetched = fetch_url(url, downloader)
        stats = downloader.stats()
    _remember(url, None, path, {str(one.path): one.nbytes for one in fetched})
    return FetchReport(
        path,
        "",
        len(fetched),
        sum(one.nbytes for one in fetched),
        stats.bytes_received,
        stats.bytes_reused,
        0,
        stats.num_retries,
        time.perf_counter() - began,
    )


def _fetch_repo(
    name: str,
    revision: str | None,
    verify: bool,
    max_connections: int,
    progress: Progress | None,
    began: float,
) -> FetchReport:
    try:
        repo = list_repo(name, revision)
    except SourceUnavailable as error:
        try:
            path = cached_snapshot(name, revision)
        except ConfigError:
            raise error from None
        _log.warning("%s; the hub's cache has it, and is used", error)
        return _report(path, revision or "", began)
    names = {file.blob: file.name for file in repo.files}
    with Downloader(
        max_connections=max_connections, progress=_named(progress, names)
    ) as downloader:
        present = fetch_repo(repo, downloader, verify=verify)
        stats = downloader.stats()
    files = {str(repo.snapshot / file.name): file.nbytes for file in repo.files}
    _remember(name, revision, repo.snapshot, files)
    return FetchReport(
        repo.snapshot,
        repo.commit,
        len(files),
        sum(files.values()),
        stats.bytes_received,
        stats.bytes_reused,
        present,
        stats.num_retries,
        time.perf_counter() - began,
    )


def _report(path: Path, revision: str, began: float) -> FetchReport:
    """Of a model that is here."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    nbytes = sum(one.stat().st_size for one in files)
    seconds = time.perf_counter() - began
    return FetchReport(path, revision, len(files), nbytes, 0, 0, nbytes, 0, seconds)


def _named(
    progress: Progress | None, names: Mapping[str, str] | None = None
) -> Callable[[str, int, int | None], None] | None:
    """Files of the hub's cache are called by their digests."""
    if progress is None:
        return None

    def tell(path: str, done: int, total: int | None) -> None:
        name = Path(path).name
        progress((names or {}).get(name, name), done, total or done)

    return tell


# -- what was fetched before -----------------------------------------------------------------------


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _note_of(name: str, revision: str | None) -> Path:
    return home_folder() / "fetched" / f"{_digest([name, revision])}.json"


def _remember(name: str, revision: str | None, path: Path, files: Mapping[str, int]) -> None:
    _write_note(_note_of(name, revision), {"path": str(path), "files": dict(files)})


def _write_note(path: Path, note: Mapping[str, object]) -> None:
    """Without the name: a URL may hold a secret."""
    try:
        write_whole(path, json.dumps(note))
    except OSError as error:
        # The error's text has the path of the note, and nothing of the name.
        _log.warning("what is here now will be asked for again: %s", error)


def _remembered(name: str, revision: str | None) -> Path | None:
    """Where it lies, if every file is still there with its size; a strange note counts as none."""
    try:
        note = json.loads(_note_of(name, revision).read_bytes())
        files = note["files"].items()
        if all(Path(file).stat().st_size == nbytes for file, nbytes in files):
            return Path(note["path"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    return None
