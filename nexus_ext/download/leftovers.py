"""What earlier calls left of a file: found, taken over, read again, or removed.

To rename a journal is to take the pair over. That is done only where the owner is gone for certain
(`owners`). Where nobody can say, the blocks are copied into a file of one's own.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_ext.download.journal import Block, Head, new_hasher, parse
from nexus_ext.download.partial import OPEN_FLAGS, Partial, stem_of, try_lock, writing
from nexus_ext.owners import Fate, fate, own_name, unknown_name

__all__ = ["adopt"]

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class _Found:
    """A pair that somebody left, or works on."""

    journal: Path
    token: str
    fate: Fate


def adopt(target: Path, key: str) -> Partial | None:
    """Take over the best of what was left for this target, and remove the rest.

    Every block is read again and compared before it counts as landed. What belongs to a process
    that is alive stays untouched.

    Raises:
        WriteError: The folder refuses.
    """
    best: Partial | None = None
    try:
        with writing(target):
            for found in _find(target):
                partial = _take(target, found, key)
                if partial is None:
                    continue
                best, worse = _better(best, partial)
                if worse is not None:
                    worse.remove()
                    worse.close()
    except BaseException:
        if best is not None:
            best.release()
            best.close()
        raise
    return best


def _better(one: Partial | None, two: Partial) -> tuple[Partial, Partial | None]:
    if one is None or two.landed.nbytes > one.landed.nbytes:
        return two, one
    return one, two


def _find(target: Path) -> list[_Found]:
    wanted = re.compile(
        re.escape(f".{stem_of(target)}.") + r"([0-9a-f]{16})\.([0-9a-z-]+)\.journal"
    )
    if not target.parent.is_dir():
        return []
    with os.scandir(target.parent) as entries:
        matches = [match for entry in entries if (match := wanted.fullmatch(entry.name))]
    found = [_Found(target.parent / match[0], match[1], fate(match[2])) for match in matches]
    return [one for one in found if one.fate != "alive"]


def _take(target: Path, found: _Found, key: str) -> Partial | None:
    """A pair that is ours now, its blocks verified; None if it was not to be had, or useless."""
    opened = _open_journal(found)
    if opened is None:
        return None
    journal, data = opened
    parsed = parse(data)
    head = parsed[0] if parsed else Head(key, 0, "")
    # What is only copied does not get our name: after a kill nobody
    # may write to it either.
    owner = unknown_name() if found.fate == "unknown" else own_name()
    partial = Partial.taken_over(target, found.token, head, journal, found.journal, owner)
    if partial is None:
        return None
    try:
        return _judged(partial, found, key, data, parsed)
    except BaseException:
        partial.remove()  # or it would fail the next call, too
        partial.close()
        raise


def _judged(
    partial: Partial,
    found: _Found,
    key: str,
    data: bytes,
    parsed: tuple[Head, list[Block]] | None,
) -> Partial | None:
    if parsed is None or parsed[0].key != key or not _has_its_part(partial):
        partial.remove()
        partial.close()
        return None
    if found.fate == "unknown":
        return _copy(partial, parsed[1])
    if not data.endswith(b"\n"):
        partial.end_torn_line()
    _verify(partial, parsed[1])
    return partial


def _open_journal(found: _Found) -> tuple[int, bytes] | None:
    """The journal, open, locked as far as locks go, and its bytes; None if it is not for us."""
    try:
        journal = os.open(found.journal, os.O_RDWR | os.O_APPEND | OPEN_FLAGS)
    except OSError as error:
        if _is_not_for_us(error):
            return None
        raise
    is_for_us = _is_plain(os.fstat(journal)) and (try_lock(journal) or found.fate != "unknown")
    if not is_for_us:
        os.close(journal)
        return None
    return journal, _read_all(journal)


def _read_all(descriptor: int) -> bytes:
    data = bytearray()
    while piece := os.pread(descriptor, _READ_BYTES, len(data)):
        data += piece
    return bytes(data)


def _has_its_part(partial: Partial) -> bool:
    try:
        status = partial.open_part()
    except OSError as error:
        if _is_not_for_us(error):
            return False
        raise
    return _is_plain(status) and status.st_size == partial.nbytes


def _is_not_for_us(error: OSError) -> bool:
    """Gone, another user's, or a link or a device; what else may happen is an error."""
    return error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO)


def _is_plain(status: os.stat_result) -> bool:
    """A regular file with one name, of this user: nobody else prepared it."""
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid()


def _verify(partial: Partial, blocks: Sequence[Block]) -> None:
    for block in blocks:
        if _holds(partial, block):
            partial.landed.add(block.offset, block.offset + block.nbytes)


def _holds(partial: Partial, block: Block) -> bool:
    """Whether a block is still what was journalled: a power cut may have undone it."""
    algorithm, _, digest = block.digest.partition(":")
    hasher = new_hasher(algorithm)[1]
    if hasher is None:
        return False
    buffer = memoryview(bytearray(min(_READ_BYTES, block.nbytes)))
    at, end = block.offset, block.offset + block.nbytes
    while at < end:
        got = partial.read_into(buffer[: end - at], at)
        if got == 0:
            return False
        hasher.update(buffer[:got])
        at += got
    return hasher.hexdigest() == digest


def _copy(old: Partial, blocks: Sequence[Block]) -> Partial:
    """The blocks in a part of our own: the old owner may be alive, and write."""
    own = Partial.create(old.target, old.head)
    try:
        for block in blocks:
            _copy_bytes(old, own, block)
            if _holds(own, block):
                own.record(block)
                own.landed.add(block.offset, block.offset + block.nbytes)
    except OSError:
        own.remove()
        own.close()
        raise
    finally:
        old.remove()
        old.close()
    return own


def _copy_bytes(old: Partial, own: Partial, block: Block) -> None:
    buffer = memoryview(bytearray(min(_READ_BYTES, block.nbytes)))
    at, end = block.offset, block.offset + block.nbytes
    while at < end:
        got = old.read_into(buffer[: end - at], at)
        if got == 0:
            return
        own.write(buffer[:got], at)
        at += got
