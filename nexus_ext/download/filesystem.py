"""Bytes from whatever fsspec knows: file, memory, s3, gcs, and many more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from nexus_ext.download.body import nothing, pieces_reader
from nexus_ext.download.facts import Download
from nexus_ext.download.line import Line
from nexus_ext.download.patience import Trouble
from nexus_ext.download.source import Body, Facts
from nexus_ext.drivers import credential_errors, driver_errors
from nexus_ext.errors import (
    AccessDenied,
    ConfigError,
    ContentMismatch,
    MissingExtra,
    SourceMissing,
    SourceUnavailable,
)

__all__ = ["FileSystemSource"]

T = TypeVar("T")

# What stays the same when a file's bytes change.
_NO_VERSION = {"name", "size", "type"}


class FileSystemSource:
    """One file of an fsspec file system; its version is what `info` says of it."""

    def __init__(self, download: Download) -> None:
        self._download = download
        self._scheme = download.url.partition(":")[0].lower()
        self._fs, self._path = _connect(download)
        self._facts: Facts | None = None

    def open(self, line: Line, span: tuple[int, int] | None, validator: str) -> Body:
        """See Source.open."""
        facts = self._facts or self._ask(self._look)
        self._facts = facts
        start, end = span or (0, facts.nbytes or 0)
        end = min(end, facts.nbytes or 0)

        def pieces() -> Iterator[bytes]:
            data = self._ask(lambda: self._fs.cat_file(self._path, start=start, end=end))
            if len(data) != end - start:
                raise Trouble(f"{len(data)} bytes came where {end - start} were asked for")
            yield data

        return Body(
            facts,
            start,
            end - start,
            span is None,
            True,
            pieces_reader(pieces()) if start < end else nothing,
            lambda: None,
            self._scheme,
        )

    def recheck(self, validator: str) -> bool:
        """Asks again: answers carry no validator."""
        now = self._ask(self._look)
        before, self._facts = self._facts, None
        is_as_long = before is None or before.nbytes == now.nbytes
        return is_as_long and now.validator == validator

    def _look(self) -> Facts:
        self._fs.invalidate_cache()
        info = self._fs.info(self._path)
        nbytes = info.get("size")
        if info.get("type") == "directory" or type(nbytes) is not int:
            raise ContentMismatch(
                f"{self._download.source} must be one file of a known size, but is "
                f"{info.get('type', 'something')} of size {nbytes}; check the URL"
            )
        is_versioned = bool(info.keys() - _NO_VERSION)
        return Facts(nbytes, f"fsspec:{self._fs.ukey(self._path)}" if is_versioned else "")

    def _ask(self, question: Callable[[], T]) -> T:
        name = f"{self._download.source} must be there and readable"
        try:
            return question()
        except ContentMismatch:
            raise
        except FileNotFoundError:
            raise SourceMissing(f"{name}, but is not there; check the URL") from None
        except IsADirectoryError:
            raise ContentMismatch(f"{name}, but is a directory; name a file of it") from None
        except credential_errors():
            raise AccessDenied(f"{name}, but may not be read; check its credentials") from None
        except driver_errors() as error:
            # Its text may hold a signed URL.
            raise Trouble(
                f"the file system {self._scheme} failed ({type(error).__name__})"
            ) from None


def _connect(download: Download) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise MissingExtra(
            f"{download.source} needs fsspec, which is not installed: pip install 'nexus_ext[hub]'."
        ) from None
    try:
        fs, path = url_to_fs(download.url)
    except ImportError as error:
        raise MissingExtra(
            f"{download.source} needs a package that fsspec asks for: {error}"
        ) from None
    except ValueError:
        raise ConfigError(
            f"a download's URL must be one that fsspec knows, got {download.source}; it knows "
            "http, https, file, memory, s3, gcs and more"
        ) from None
    except credential_errors():
        raise AccessDenied(
            f"{download.source} must let us in, but does not; check its credentials"
        ) from None
    except driver_errors() as error:
        raise SourceUnavailable(
            f"{download.source} must be within reach, but connecting failed "
            f"({type(error).__name__}); check network and server, and fetch again"
        ) from None
    return fs, path
