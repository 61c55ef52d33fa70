"""What a user says about a download and hears about it; and how a URL may be shown."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from nexus_ext.errors import ConfigError

__all__ = ["Download", "DownloadStats", "Fetched", "key_of", "shown"]

_SHA256 = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)
# What the downloader says itself; another value would make the answers mean something else.
_OWN_HEADERS = {"accept-encoding", "connection", "host", "if-range", "range"}


def shown(url: str) -> str:
    """The URL without userinfo, query and fragment: they may be secrets.

    Of a chain (`simplecache::https://...`) each URL.
    """
    return "::".join(_shown(one) for one in url.split("::"))


def _shown(url: str) -> str:
    try:
        parts = urlsplit(url)
        _ = parts.port  # if it is none, a password with a slash in it may stand there
    except ValueError:
        return "(a URL that cannot be read)"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if parts.scheme else parts.path


@dataclass(frozen=True)
class Download:
    """What to fetch, and what it must be.

    Attributes:
        url: http, https, or any URL that fsspec knows (`file://`, `memory://`, `s3://`, ...).
        path: The file to write. It appears complete and checked, or not at all.
        nbytes: Its size, where it is known.
        sha256: Its digest in hex, where it is known. Only this protects from a server that lies.
        headers: Sent to the URL's own host, and after a redirect to no other. Never shown.

    Raises:
        ConfigError: A value that cannot be.
    """

    url: str = field(repr=False)
    path: Path
    nbytes: int | None = None
    sha256: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(os.path.abspath(self.path)))
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(//|:)", self.url):
            raise ConfigError(
                f"a download needs a URL with a scheme, got {shown(self.url)!r}; write it like "
                "'https://host/file' or 'file:///folder/file'"
            )
        if self.is_web:
            self._check_web()
        elif self.headers:
            raise ConfigError(
                f"headers go with http and https only, got some for {shown(self.url)}; give the "
                "file system's own settings to fsspec"
            )
        if self.nbytes is not None and self.nbytes < 0:
            raise ConfigError(f"nbytes must be 0 or more, got {self.nbytes}; or leave it out")
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ConfigError(
                f"sha256 must be 64 hex digits, got {self.sha256!r}; leave it out if it is unknown"
            )

    def _check_web(self) -> None:
        try:
            parts = urlsplit(self.url)
            has_host = bool(parts.hostname)
            _ = parts.port
        except ValueError:
            has_host = False
        if not has_host or re.search(r"[\s\x00-\x1f]", self.url):
            raise ConfigError(
                f"an http URL needs a host and no blanks, got {shown(self.url)!r}; quote what is "
                "special in it"
            )
        if own := sorted(_OWN_HEADERS & {name.lower() for name in self.headers}):
            raise ConfigError(
                f"the downloader sets {', '.join(sorted(_OWN_HEADERS))} itself, got "
                f"{', '.join(own)}; leave them out of headers"
            )
        for name, value in self.headers.items():
            if not re.fullmatch(r"[!-9;-~]+", name) or not re.fullmatch(r"[\t -~]*", value):
                raise ConfigError(
                    f"a header is one line of ASCII, the one called {name!r} is not; encode it"
                )

    @property
    def is_web(self) -> bool:
        """Whether the URL is http or https."""
        return self.url.lower().startswith(("http://", "https://"))

    @property
    def source(self) -> str:
        """The URL as it may be shown."""
        return shown(self.url)


def key_of(download: Download) -> str:
    """What a part must be a part of: the digest, or else the very source. Holds no secret."""
    if download.sha256 is not None:
        return f"sha256:{download.sha256.lower()}"
    scheme, _, rest = download.url.partition("://")
    authority, slash, path = rest.partition("/")
    plain = f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"
    return f"url:{hashlib.sha256(plain.encode()).hexdigest()}"


@dataclass(frozen=True)
class Fetched:
    """A file that has arrived.

    Attributes:
        path: Where it is.
        nbytes: Its size.
        sha256: Of its bytes as they were read back from the file; always computed.
        bytes_received: Came over the network in this call, bytes that were of no use included.
        bytes_reused: Had arrived earlier, and were read and compared again.
        num_retries: Requests that failed and were tried again.
        seconds: From `start` on.
        http_version: "HTTP/1.1", "HTTP/2"; of other sources the scheme; "" if nothing was asked.
    """

    path: Path
    nbytes: int
    sha256: str
    bytes_received: int
    bytes_reused: int
    num_retries: int
    seconds: float
    http_version: str


@dataclass(frozen=True)
class DownloadStats:
    """What a Downloader did until now.

    Attributes:
        bytes_received: Over the network, bytes that were of no use included.
        bytes_reused: Had arrived earlier, and were read and compared again.
        active_downloads: Started and not ended.
        finished_downloads, failed_downloads: Ended.
        connections_opened, connections_reused: Requests over new and over waiting connections.
        num_retries: Requests that failed and were tried again.
        seconds: Since the first start.
        http_versions: Requests by what was spoken: {"HTTP/2": 12}.
        http2: "offered", or why it is not.
        direct_bodies: Answers over HTTP whose bytes were read from the socket itself, past h11.
        ordinary_bodies: Answers over HTTP that httpx2 read.
    """

    bytes_received: int
    bytes_reused: int
    active_downloads: int
    finished_downloads: int
    failed_downloads: int
    connections_opened: int
    connections_reused: int
    num_retries: int
    seconds: float
    http_versions: Mapping[str, int]
    http2: str
    direct_bodies: int
    ordinary_bodies: int
