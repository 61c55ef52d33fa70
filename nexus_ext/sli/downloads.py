"""`ParallelDownloader`: files of layers, several at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from nexus_ext.download import Download, Downloader, DownloadStats, Fetched

__all__ = ["ParallelDownloader"]


class ParallelDownloader:
    """Downloads over a limited number of connections, which are used again. Thread-safe."""

    def __init__(self, max_connections: int = 8, **options: Any) -> None:
        """Open no connection yet.

        Args:
            max_connections: Of all downloads together.
            **options: As `Downloader`: chunk_bytes, max_retries, timeout_seconds, progress.

        Raises:
            ConfigError: A value that cannot be.
        """
        self._downloader = Downloader(max_connections=max_connections, **options)
        self._finalizer = weakref.finalize(self, self._downloader.close)

    def download_layers_parallel(
        self, urls: Iterable[tuple[str, str | Path] | Download]
    ) -> list[Fetched]:
        """Fetch files; blocks until all have ended. An interrupted one is resumed by a later call.

        Args:
            urls: Pairs of URL and path, or what else a `Download` can say (size, digest, headers).

        Returns:
            Path, size, SHA-256 and more of each, in order.

        Raises:
            DownloadError, WriteError: The first that failed; the others are there.
            ConfigError: A URL that cannot be.
        """
        return self._downloader.fetch_all([_download_of(one) for one in urls])

    def get_stats(self) -> DownloadStats:
        """What was done until now."""
        return self._downloader.stats()

    def close(self) -> None:
        """Cancel what is under way. May be called twice."""
        self._finalizer()

    def __enter__(self) -> ParallelDownloader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _download_of(one: tuple[str, str | Path] | Download) -> Download:
    return one if isinstance(one, Download) else Download(one[0], Path(one[1]).expanduser())
