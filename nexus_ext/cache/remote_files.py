"""Whole files in a store behind an fsspec URL: read in pieces, written so that nobody sees half.

Owns what must not be told (credentials in URLs, texts of other people's errors), and which errors
mean that a store cannot be reached.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from nexus_ext.errors import ConfigError, MissingExtra

__all__ = ["PIECE_BYTES", "RemoteFiles", "shown", "unreachable"]

PIECE_BYTES = 8 << 20
# They make an object visible when all of it is there.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "az", "memory"}
_READ_ONLY = {"http", "https"}
# What the drivers of stores raise besides OSError, by module; only a loaded one can have raised.
_DRIVERS = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
}


class RemoteFiles:
    """The files under one URL. Thread-safe as far as its driver is.

    Attributes:
        root: The path of the URL, as its driver calls it.
        name: The URL without credentials.
        is_writable: Whether its protocol can write.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """Name it; touches nothing.

        Raises:
            ConfigError: No URL that fsspec knows.
            MissingExtra: fsspec, or the driver of this protocol, is not installed.
        """
        self.name = shown(url)
        try:
            import fsspec
        except ImportError:
            raise MissingExtra(
                "A store behind a URL needs fsspec, which is not installed: pip install fsspec."
            ) from None
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            driver = _driver_of(url)
            raise MissingExtra(
                f"A store at {self.name} needs a driver that is not installed: pip install "
                f"{driver}."
            ) from error
        except ValueError:
            # Its text may hold the URL.
            raise ConfigError(
                f"A store has a URL that fsspec knows (file://, memory://, s3://, gs://); got "
                f"{self.name}."
            ) from None
        self.root = root.rstrip("/")
        protocols = self._fs.protocol
        self._protocols = {protocols} if isinstance(protocols, str) else set(protocols)
        self.is_writable = not self._protocols & _READ_ONLY

    def pieces(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes `start` to `end` of a file, in order; fewer where it ends before.

        Raises:
            FileNotFoundError: There is none.
            and those of `unreachable`.
        """
        while start < end:
            wanted = min(PIECE_BYTES, end - start)
            piece = self._fs.cat_file(path, start=start, end=start + wanted)
            if len(piece) > wanted:
                raise OSError("the store answered with more than was asked for")
            if not piece:
                return
            yield piece
            start += len(piece)

    def beginning(self, path: str, nbytes: int) -> bytes:
        """The first bytes of a file. Raises as `pieces`."""
        return bytes(self._fs.cat_file(path, start=0, end=nbytes)[:nbytes])

    def size(self, path: str) -> int | None:
        """Of a file; None where the store does not say. Raises as `pieces`."""
        size = self._fs.info(path).get("size")
        return size if isinstance(size, int) else None

    def write(self, path: str, chunks: Sequence[bytes | memoryview]) -> None:
        """Make a file of the chunks, or replace it. Raises those of `unreachable`."""
        if self._protocols & _OBJECT_STORES:
            self._fs.pipe_file(path, b"".join(chunks))
            return
        folder = path.rpartition("/")[0]
        self._fs.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{uuid.uuid4().hex}.tmp"
        try:
            with self._fs.open(temporary, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                if "file" in self._protocols:
                    os.fsync(file.fileno())
            self._fs.mv(temporary, path)
        except BaseException:
            self._remove_if_there(temporary)
            raise

    def _remove_if_there(self, path: str) -> None:
        try:
            self._fs.rm_file(path)
        except unreachable():
            return  # that it failed is on its way already; a temporary hurts nobody


def unreachable() -> tuple[type[BaseException], ...]:
    """The errors that mean: it cannot be reached now, or says no."""
    found: list[type[BaseException]] = [OSError, EOFError, TimeoutError, asyncio.TimeoutError]
    for module, names in _DRIVERS.items():
        loaded = sys.modules.get(module)
        found += [getattr(loaded, name) for name in names if hasattr(loaded, name)]
    return tuple(found)


def shown(url: str) -> str:
    """A URL without userinfo, query and fragment: they may be secrets."""
    parts = []
    for one in url.split("::"):
        try:
            split = urlsplit(one)
        except ValueError:
            return "(not a URL)"
        host = split.netloc.rpartition("@")[2]
        parts.append(f"{split.scheme}://{host}{split.path}" if split.scheme else split.path)
    return "::".join(parts)


def _driver_of(url: str) -> str:
    """What to install for a protocol; fsspec's own name of it where that is not known."""
    scheme = url.split("://")[0].rpartition("::")[2]
    known = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}
    known |= {"abfs": "adlfs", "http": "aiohttp", "https": "aiohttp"}
    return known.get(scheme, f"'fsspec[{scheme}]'")
