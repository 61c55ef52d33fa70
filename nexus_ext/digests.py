"""What the bytes of a group should hash to: one small file per checkpoint, written once.

A plain checkpoint carries no digests, so they are taken by one extra pass when verification is
first asked for, and kept under `NEXUS_HOME/digests`. The key holds names, sizes, inodes and times
of the files: a checkpoint that changed has no digests and gets new ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from nexus_ext.checkpoint import Checkpoint, Group
from nexus_ext.files import write_whole

__all__ = ["recorded_digests"]


def recorded_digests(
    checkpoint: Checkpoint,
    groups: Sequence[Group],
    folder: Path,
    take: Callable[[int], int],
) -> list[int]:
    """The digests of `groups` (XXH3-64, signed as torch has it); `take(i)` computes a missing one.

    Blocks for a read of every group that has none. What is kept in `folder` is trusted as much as
    the checkpoint beside it: whoever may write one may write the other.
    """
    path = folder / f"{checkpoint.fingerprint}.json"
    known = _load(path)
    keys = [_key(group) for group in groups]
    missing = {key: take(index) for index, key in enumerate(keys) if key not in known}
    if missing:
        known |= missing
        write_whole(path, json.dumps(known))
    return [known[key] for key in keys]


def _key(group: Group) -> str:
    """A group is its extents: the same bytes in the same order have the same digest."""
    places = [(extent.file, extent.offset, extent.nbytes) for extent in group.extents]
    return hashlib.sha256(json.dumps(places).encode()).hexdigest()[:32]


def _load(path: Path) -> dict[str, int]:
    """What is recorded; a torn or strange file counts as none, and is written anew."""
    try:
        content = json.loads(path.read_bytes())
    except (
        FileNotFoundError,
        ValueError,
        RecursionError,
    ):  # bad UTF-8 and bad JSON are ValueErrors
        return {}
    if not isinstance(content, dict):
        return {}
    return {key: value for key, value in content.items() if _is_digest(value)}


def _is_digest(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63
