"""Downloads: ranged, resumable after a kill, checked, over HTTP and whatever fsspec knows.

    from nexus_ext.download import Download, Downloader

    with Downloader() as downloader:
        downloader.fetch(Download("https://host/file", "file", sha256="..."))

docs/downloads.md tells more. Nothing here imports torch.
"""

from __future__ import annotations

from nexus_ext.download.arrival import Arriving
from nexus_ext.download.downloader import Downloader
from nexus_ext.download.facts import Download, DownloadStats, Fetched

__all__ = ["Arriving", "Download", "DownloadStats", "Downloader", "Fetched"]
