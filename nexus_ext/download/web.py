"""Bytes over http and https: one request, and everything about its answer that may be wrong."""

from __future__ import annotations

import base64
import re
import ssl
from collections.abc import Mapping
from posixpath import splitext
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from nexus_ext.download.body import nothing
from nexus_ext.download.facts import Download, shown
from nexus_ext.download.line import Line, needs_httpx2
from nexus_ext.download.patience import Trouble, retry_after_seconds
from nexus_ext.download.source import Body, Facts
from nexus_ext.errors import (
    AccessDenied,
    ContentMismatch,
    DownloadError,
    SourceChanged,
    SourceMissing,
    SourceRefused,
)

if TYPE_CHECKING:
    import httpx2

__all__ = ["WebSource"]

_MAX_REDIRECTS = 10
_REDIRECTS = {301, 302, 303, 307, 308}
_DENIED = {401, 403, 407}
_MISSING = {404, 410}
_PASSING = {408, 425, 429}
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", re.I | re.A)
_EMPTY_RANGE = re.compile(r"bytes \*/0", re.IGNORECASE)
_PAGES = {".html", ".htm", ".xhtml"}


class WebSource:
    """One file of a web server. Where redirects lead is remembered until it ends."""

    def __init__(self, download: Download) -> None:
        needs_httpx2()
        self._download = download
        self._url, self._secrets = _without_userinfo(download)
        self._lead: str | None = None

    def open(self, line: Line, span: tuple[int, int] | None, validator: str) -> Body:
        """See Source.open."""
        lead = self._lead
        try:
            response = self._follow(line, lead or self._url, span, validator)
        except Trouble:
            self._lead = None
            raise
        if lead is not None and _may_have_run_out(response.status_code):
            # A signed address that has run out: ask the first one for another.
            response.close()
            self._lead = None
            response = self._follow(line, self._url, span, validator)
        try:
            return self._judge(line, response, span, validator)
        except (DownloadError, Trouble):
            response.close()
            raise

    def recheck(self, validator: str) -> bool:
        """Every answer brings its validator along."""
        return True

    # -- asking ----------------------------------------------------------------------------------

    def _follow(
        self, line: Line, url: str, span: tuple[int, int] | None, validator: str
    ) -> httpx2.Response:
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._get(line, url, self._headers(url, span, validator))
            if response.status_code not in _REDIRECTS or "location" not in response.headers:
                if url != self._url:
                    self._lead = url
                return response
            response.close()
            url = self._target(url, response.headers["location"])
        raise SourceRefused(
            f"{self._download.source} may lead to its file by {_MAX_REDIRECTS} redirects, but went "
            "on; check the URL"
        )

    def _get(self, line: Line, url: str, headers: Mapping[str, str]) -> httpx2.Response:
        import httpx2

        try:
            return line.get(url, headers)
        except httpx2.InvalidURL:
            raise SourceRefused(f"{shown(url)} must be a URL that can be asked for") from None
        except httpx2.UnsupportedProtocol:
            raise SourceRefused(f"{shown(url)} must be http or https; check the URL") from None
        except httpx2.TransportError as error:
            raise self._trouble(error) from None

    def _trouble(self, error: httpx2.TransportError) -> Trouble | SourceRefused:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return SourceRefused(
                    f"{self._download.source} must show a certificate that this machine trusts, "
                    f"but: {cause.verify_message}; check the URL, or set SSL_CERT_FILE"
                )
            cause = cause.__cause__ or cause.__context__
        # The texts of protocol errors quote what the server sent; that of a connect error does not.
        why = f": {error}" if type(error).__name__ == "ConnectError" else ""
        return Trouble(f"{type(error).__name__}{why}")

    def _headers(self, url: str, span: tuple[int, int] | None, validator: str) -> dict[str, str]:
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if _origin(url) == _origin(self._url):
            headers = {**headers, **self._secrets, **self._download.headers}
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
            if validator.startswith('etag:"'):
                headers["If-Range"] = validator.removeprefix("etag:")
        return headers

    def _target(self, url: str, location: str) -> str:
        try:
            target = urljoin(url, location)
            parts = urlsplit(target)
            host, scheme = parts.netloc.rpartition("@")[2], parts.scheme.lower()
            _ = parts.port
        except ValueError:
            host = scheme = ""
        if scheme not in ("http", "https") or not host:
            raise SourceRefused(
                f"{self._download.source} may redirect to http and https only, but did to "
                f"{scheme or 'something'}; check the URL"
            )
        if scheme == "http" and url.lower().startswith("https:"):
            raise SourceRefused(
                f"{self._download.source} must not redirect from https to http, but did, to "
                f"{shown(target)}; ask its owner, or give that URL yourself"
            )
        return urlunsplit((scheme, host, parts.path, parts.query, ""))

    # -- judging ---------------------------------------------------------------------------------

    def _judge(
        self, line: Line, response: httpx2.Response, span: tuple[int, int] | None, validator: str
    ) -> Body:
        status, headers = response.status_code, response.headers
        if status == 416 and _EMPTY_RANGE.fullmatch(headers.get("content-range", "")):
            response.close()
            return self._body(line, response, Facts(0, _validator(headers)), 0, 0, is_whole=True)
        if status not in (200, 206):
            raise self._refusal(status, headers, validator)
        self._check_content(headers)
        if status == 200:
            nbytes = self._length(headers)
            facts = Facts(nbytes, _validator(headers))
            return self._body(line, response, facts, 0, nbytes, is_whole=True)
        return self._part(line, response, span)

    def _part(self, line: Line, response: httpx2.Response, span: tuple[int, int] | None) -> Body:
        headers = response.headers
        match = _CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
        if span is None or match is None:
            raise self._nonsense("a part that does not say which, or was not asked for")
        first, last, total = map(int, match.groups())
        if first != span[0] or not first <= last < min(span[1], total):
            raise self._nonsense(
                f"bytes {first}-{last} of {total} where {span[0]}-{span[1] - 1} were asked for"
            )
        if self._length(headers) not in (None, last + 1 - first):
            raise self._nonsense("a length that is not that of its range")
        facts = Facts(total, _validator(headers))
        return self._body(line, response, facts, first, last + 1 - first, is_whole=False)

    def _body(
        self,
        line: Line,
        response: httpx2.Response,
        facts: Facts,
        offset: int,
        nbytes: int | None,
        is_whole: bool,
    ) -> Body:
        framed = nbytes is not None or response.http_version == "HTTP/2"
        framed = framed or "chunked" in response.headers.get("transfer-encoding", "").lower()
        read_into = nothing if facts.nbytes == 0 else line.reader_of(response)
        return Body(
            facts,
            offset,
            nbytes,
            is_whole,
            framed,
            read_into,
            response.close,
            response.http_version,
        )

    def _check_content(self, headers: httpx2.Headers) -> None:
        coding = headers.get("content-encoding", "").strip().lower()
        if coding not in ("", "identity"):
            raise ContentMismatch(
                f"{self._download.source} must come as it is (identity was asked for), but came as "
                f"{coding[:40]!r}; its bytes could not be placed; ask its owner"
            )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        is_page = kind in ("text/html", "application/xhtml+xml")
        path = unquote(urlsplit(self._download.url).path)
        if is_page and splitext(path)[1].lower() not in _PAGES:
            raise ContentMismatch(
                f"{self._download.source} must be a file, but a web page came ({kind}); a log-in "
                "page or a proxy stands in between: open the URL in a browser"
            )

    def _length(self, headers: httpx2.Headers) -> int | None:
        # With chunks a length means nothing, and h11 does not look at it.
        text = headers.get("content-length")
        if text is None or "transfer-encoding" in headers:
            return None
        values = {value.strip() for value in text.split(",")}
        value = values.pop()
        if values or not re.fullmatch(r"[0-9]{1,18}", value):
            raise self._nonsense("a length that is no number")
        return int(value)

    def _nonsense(self, what: str) -> Trouble:
        return Trouble(f"the server sent {what}", ContentMismatch)

    def _refusal(
        self, status: int, headers: httpx2.Headers, validator: str
    ) -> DownloadError | Trouble:
        if status in _PASSING or status >= 500:
            wait = retry_after_seconds(headers.get("retry-after"))
            return Trouble(f"the server said {status}", retry_after_seconds=wait)
        name = f"{self._download.source} must be there for all to read"
        if status in _DENIED:
            return AccessDenied(
                f"{name}, or a token be given, but the server said {status}; pass headers="
                "{'Authorization': 'Bearer ...'}, and ask for access where it is gated"
            )
        if status in _MISSING:
            return SourceMissing(f"{name}, but the server said {status}; check the URL")
        if status == 416 and validator:
            return SourceChanged(
                f"{self._download.source} must stay as it is while it is fetched, but is shorter "
                "now; fetch again"
            )
        return SourceRefused(f"{name}, but the server said {status}; check the URL")


def _may_have_run_out(status: int) -> bool:
    return 400 <= status < 500 and status != 416 and status not in _PASSING


def _validator(headers: Mapping[str, str]) -> str:
    if etag := headers.get("etag", "").strip():
        return f"etag:{etag}"
    modified = headers.get("last-modified", "").strip()
    return f"modified:{modified}" if modified else ""


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    port = parts.port or (443 if scheme == "https" else 80)
    return scheme, (parts.hostname or "").lower(), port


def _without_userinfo(download: Download) -> tuple[str, dict[str, str]]:
    """The URL as it is asked for, and its user and password as a header."""
    parts = urlsplit(download.url)
    user, at, host = parts.netloc.rpartition("@")
    url = urlunsplit((parts.scheme.lower(), host, parts.path or "/", parts.query, ""))
    if not at or any(name.lower() == "authorization" for name in download.headers):
        return url, {}
    name, _, password = user.partition(":")
    pair = f"{unquote(name)}:{unquote(password)}".encode()
    return url, {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}
