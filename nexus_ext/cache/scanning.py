"""What the blobs of a folder say themselves: rows for an index that was lost."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from nexus_ext.cache.blob import open_blob, read_header
from nexus_ext.cache.folder import Folder
from nexus_ext.cache.header import Header
from nexus_ext.cache.index_row import Row
from nexus_ext.errors import CorruptCheckpoint, ReadError

__all__ = ["header_of", "row_of", "scan"]

# Why a file cannot be opened now, and could a moment later.
_FOR_A_MOMENT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def scan(
    folder: Folder, set_aside: Callable[[Path], object], remove: Callable[[bytes], object]
) -> Iterator[Row]:
    """Rows of all blobs whose headers are right; of two for one key the younger.

    Args:
        folder: Where.
        set_aside: Told of what is no blob, where the folder can be written to.
        remove: Told of the older one of two.

    Raises:
        ReadError: The folder, or a file, cannot be opened now.
    """
    if not folder.read_only:
        folder.remove_abandoned(everywhere=True)
    newest: dict[str, Row] = {}
    for digest, path in folder.every_blob():
        row = _row_at(digest, path, None if folder.read_only else set_aside)
        if row is None:
            continue
        other = newest.get(row.key)
        if other is None or other.created_ns <= row.created_ns:
            newest[row.key], row = row, other
        if row is not None and not folder.read_only:
            remove(row.digest)
    yield from newest.values()


def _row_at(digest: bytes, path: Path, set_aside: Callable[[Path], object] | None) -> Row | None:
    try:
        descriptor = open_blob(path)
    except (FileNotFoundError, CorruptCheckpoint):
        return None
    except ReadError as error:
        if getattr(error.__cause__, "errno", None) in _FOR_A_MOMENT:
            raise  # an index without it would be wrong for ever
        return None
    try:
        return row_of(header_of(descriptor, path, digest))
    except CorruptCheckpoint:
        if set_aside is not None:
            set_aside(path)
        return None
    except ReadError:
        return None
    finally:
        os.close(descriptor)


def header_of(descriptor: int, path: Path, digest: bytes) -> Header:
    """The header of a blob that is called so. Raises as `read_header`."""
    header = read_header(descriptor, str(path))
    if header.sha256 != digest:
        raise CorruptCheckpoint(
            f"A cached file is called by its content; {path} holds {header.sha256.hex()}. It "
            "is set aside; fetch its bytes again."
        )
    return header


def row_of(header: Header) -> Row:
    """As the blob's own header has it."""
    about = json.dumps(dict(header.about))
    stored, created = header.stored_bytes, header.created_ns
    fields = (header.key, header.sha256, header.kind, about, created, header.nbytes)
    return Row(*fields, stored, created)
