"""Models packed on the way (`from_pretrained(weights=...)`): their shards are in the cache.

    NEXUS_HOME/cache            the shards: entries like any other, under the cache's budget
    NEXUS_HOME/converted/MODEL  what describes them: config, tokenizer, index
    NEXUS_STORE                 a store of all nodes, where others find them: only if it is set

Owns which shards of a model are there, and that none goes while the model is open. What the cache
evicted meanwhile is packed again, that alone.
"""

from __future__ import annotations

import base64
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch

from nexus_ext.cache import DiskTier, Entry, RemoteStore, Tier, TieredStore
from nexus_ext.cache.blob import open_blob, read_header
from nexus_ext.cache.work_locks import locked
from nexus_ext.checkpoint import Checkpoint, Place
from nexus_ext.checkpoint_files import read_file, read_index
from nexus_ext.config import cache_bytes, cache_folder, home_folder, store_url
from nexus_ext.errors import (
    CheckpointFormatError,
    CorruptCheckpoint,
    NexusError,
    WriteError,
)
from nexus_ext.files import write_whole
from nexus_ext.quant.shards import Report, is_report, safetensors_parts

__all__ = ["StoredShards", "open_packed"]

_KIND = "packed"
_INDEX = "model.safetensors.index.json"
# Under it all that is in the folder, for nodes that have no such folder yet.
_DESCRIPTION = "description"
# Linux's own limit, less what a temporary has more.
_MAX_NAME_BYTES = 255 - 16

Store: TypeAlias = "DiskTier | TieredStore"


class StoredShards:
    """The shards of one model, in the cache. What was found or written stays till `held` ends."""

    def __init__(self, store: Store, model: str, held: ExitStack) -> None:
        self._store = store
        self._model = model
        self._held = held
        self._places: dict[str, Place] = {}
        self._check: Callable[[], None] = lambda: None

    def guard(self, check: Callable[[], None]) -> None:
        """Called around every shard that is written: raises where its source is another by now."""
        self._check = check

    def begin(self, identity: Mapping[str, Any], names: Sequence[str]) -> dict[str, Report]:
        """Those that are there; the name of the model says of which conversion."""
        found = {name: self.find(name) for name in names}
        reports = {name: entry.about.get("report") for name, entry in found.items() if entry}
        # Another node may have said something else: then it is packed again.
        return {name: report for name, report in reports.items() if is_report(report)}

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], report: Report) -> None:
        """As `Shards.write`.

        Raises:
            WriteError: The cache would not take it.
            CheckpointChanged: As `guard` says.
        """
        self._check()
        about = {"report": report}
        entry = self._store.put(
            self._key(name), safetensors_parts(tensors), kind=_KIND, about=about
        )
        try:
            self._check()  # what is not packed may be read from the source as late as this
        except NexusError:
            self._store.evict(self._key(name))
            raise
        if entry is None or self.find(name) is None:
            raise WriteError(
                f"The cache in {cache_folder()} must take the packed weights, and would not: "
                f"{_why_not(self._store)}. Make room, raise NEXUS_CACHE_BYTES, or convert into a "
                "folder (nexus convert); what is done stays."
            )

    def find(self, name: str) -> Entry | None:
        """A shard that is there, here or in the nodes' store; it stays from now on.

        Raises:
            ReadError: It is there, and cannot be opened or read.
        """
        entry = self._store.get(self._key(name))
        if entry is None or name in self._places:
            return entry
        try:
            descriptor = open_blob(entry.path)
        except FileNotFoundError:
            return None
        except CorruptCheckpoint:
            self._store.evict(self._key(name))
            return None
        self._held.callback(os.close, descriptor)
        try:
            start = read_header(descriptor, str(entry.path)).header_nbytes
        except CorruptCheckpoint:
            self._store.evict(self._key(name))
            return None
        # Else this process could evict what it is about to use.
        self._held.enter_context(self._store.hold(self._key(name)))
        self._places[name] = Place(entry.path, start, descriptor)
        return entry

    def is_described(self) -> bool:
        """Whether other nodes can know what it is: whoever packed it may have been killed then."""
        return self._store.get(self._key(_DESCRIPTION)) is not None

    def describe(self, folder: Path) -> None:
        """Keep what describes the model, for other nodes; that it cannot be kept is no error."""
        paths = sorted(path for path in folder.iterdir() if path.is_file())
        files = {path.name: base64.b64encode(path.read_bytes()).decode() for path in paths}
        text = json.dumps(files).encode()
        self._store.put(self._key(_DESCRIPTION), [text], kind=_KIND)

    def restore(self, folder: Path) -> None:
        """Write what describes the model, if another node has kept it."""
        text = self._store.load(self._key(_DESCRIPTION))
        if text is None:
            return
        files = _parse_description(bytes(text.tolist()), self._model)
        for name in sorted(files, key=lambda name: name == _INDEX):  # that one comes last
            write_whole(folder / name, files[name])

    def place(self, name: str) -> Place:
        """Where a shard lies that was found."""
        return self._places[name]

    def tensor_names(self, name: str) -> tuple[list[str], int]:
        _, entries = read_file(self.place(name), 0)
        return [entry.name for entry in entries], sum(entry.nbytes for entry in entries)

    def end(self) -> None:
        """Nothing is left to do."""

    def _key(self, name: str) -> str:
        return f"{self._model}/{name}"


def open_packed(
    folder_name: str,
    convert: Callable[[Path, StoredShards], object],
    *,
    is_known_everywhere: bool,
) -> tuple[Path, Checkpoint]:
    """The packed model of this name; packed now where it is not there, by one process at a time.

    Its shards stay in the cache as long as the checkpoint is in use.

    Args:
        folder_name: Names source and configuration.
        convert: Called where something is neither here nor in the nodes' store: writes what
            describes the model into a folder, and the shards that are missing.
        is_known_everywhere: Whether the name means the same on every node; else the nodes' store
            is left alone.

    Returns:
        The folder, and the checkpoint over the shards.

    Raises:
        WriteError: There is no room.
        ReadError: A shard cannot be opened or read.
        CheckpointFormatError: What the nodes' store says of the model is strange.
    """
    folder = home_folder() / "converted" / folder_name
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    lock = locked(folder.parent / f"{folder_name}.lock")
    with _writing(folder), ExitStack() as held, lock:
        store = _open_store(store_url() if is_known_everywhere else None)
        held.callback(store.close)
        shards = StoredShards(store, folder_name, held)
        if not (folder / _INDEX).exists():
            shards.restore(folder)
        is_complete = _is_complete(folder / _INDEX, shards)
        if not is_complete:
            # Last when it is written, first when it goes: what describes the model is whole then.
            (folder / _INDEX).unlink(missing_ok=True)
            convert(folder, shards)
        if not (is_complete and shards.is_described()):
            shards.describe(folder)
        checkpoint = Checkpoint.open_within(folder / _INDEX, shards.place, _Lease(held))
    return folder, checkpoint


class _Lease:
    """What was held while a model was opened goes with the model, or with its checkpoint."""

    def __init__(self, held: ExitStack) -> None:
        self.close = weakref.finalize(self, held.pop_all().close)


def _open_store(url: str | None) -> Store:
    if url is None:
        return DiskTier(cache_folder(), cache_bytes())
    # Read in place, so never compressed here.
    tier = Tier(cache_folder(), cache_bytes(), compress="off")
    return TieredStore([tier], remote=RemoteStore(url), publish=True)


def _is_complete(index: Path, shards: StoredShards) -> bool:
    """The index comes last; a damaged one is made again."""
    try:
        names = sorted(read_index(index))
    except CheckpointFormatError:
        return False
    return None not in [shards.find(name) for name in names]


def _parse_description(text: bytes, model: str) -> dict[str, bytes]:
    """Files by name. Another node wrote it."""
    try:
        files = {name: base64.b64decode(data) for name, data in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _strange(model, str(error)) from error
    for name in files:
        is_plain = Path(name).name == name and name.isprintable() and name not in ("", "..")
        if not is_plain or len(name.encode()) > _MAX_NAME_BYTES:
            raise _strange(model, f"it names {name!r}")
    return files


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What the disk refuses becomes a `WriteError`."""
    try:
        yield
    except NexusError:
        raise
    except OSError as error:
        raise WriteError(
            f"What describes a packed model is kept in {folder}, which cannot be written to: "
            f"{error.strerror}. Make room, or name another folder with NEXUS_HOME."
        ) from error


def _strange(model: str, what: str) -> CheckpointFormatError:
    return CheckpointFormatError(
        f"A packed model is described by plain files; the description of {model} in the cache or "
        f"the nodes' store is another: {what}. Remove it there, or leave NEXUS_STORE out."
    )


def _why_not(store: Store) -> str:
    disk = store.stats() if isinstance(store, DiskTier) else store.stats().tiers[0].disk
    reasons = {
        "it is read-only": disk.refused_read_only,
        "there is no room": disk.refused_full,
        "it is too small": disk.refused_too_large,
    }
    return ", ".join(why for why, count in reasons.items() if count) or disk.last_error or "unknown"
