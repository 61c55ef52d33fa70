"""Small files of our own: there as a whole, or not at all; and what is in a file of any size."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["sha256_of", "write_whole"]

_READ_BYTES = 8 << 20


def write_whole(path: Path, content: str | bytes, mode: int = 0o600) -> None:
    """Temporary file, flush to disk, rename, flush the folder. Makes the folder.

    Args:
        path: Where it will be.
        content: All of it.
        mode: Permissions.

    Raises:
        OSError: The disk would not take it; then there is no temporary either.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # An interrupt may come just behind the rename.
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _flush_folder(path.parent)


def sha256_of(path: Path) -> str:
    """The digest of a file, hexadecimal. Reads all of it. Raises OSError."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            whole.update(data)
    return whole.hexdigest()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
