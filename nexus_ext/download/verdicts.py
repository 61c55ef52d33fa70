"""What is decided about a download: is a part of it the right one, what does an error come to?"""

from __future__ import annotations

from nexus_ext.download.facts import Download
from nexus_ext.download.partial import Partial
from nexus_ext.download.patience import Trouble
from nexus_ext.download.source import Facts
from nexus_ext.errors import (
    AccessDenied,
    ContentMismatch,
    DownloadCancelled,
    DownloadError,
    NexusError,
    SourceChanged,
    SourceUnavailable,
)

__all__ = [
    "can_be_pieced",
    "changed_error",
    "check_size",
    "final_error",
    "first_span",
    "is_right",
    "is_worth_keeping",
    "needs_no_source",
]

# After these a later call goes on with what has arrived.
_RESUMABLE = (SourceUnavailable, AccessDenied, DownloadCancelled)


# -- parts -----------------------------------------------------------------------------------------


def can_be_pieced(download: Download, validator: str) -> bool:
    """Whether pieces of two versions could be told apart.

    A weak ETag may stay the same where bytes differ.
    """
    is_strong = validator != "" and not validator.lower().startswith("etag:w/")
    return is_strong or download.sha256 is not None


def first_span(candidate: Partial | None, block_bytes: int) -> tuple[int, int]:
    """What to ask for while opening: a block that is missing, or the last byte."""
    if candidate is None or candidate.nbytes is None:
        return 0, block_bytes
    gaps = candidate.landed.gaps(0, candidate.nbytes)
    if not gaps:
        return max(0, candidate.nbytes - 1), max(1, candidate.nbytes)
    start, end = gaps[0]
    return start, min(end, (start // block_bytes + 1) * block_bytes)


def needs_no_source(candidate: Partial, download: Download) -> bool:
    """Everything is there, and its digest will judge it."""
    return candidate.is_complete and download.sha256 is not None


def is_right(candidate: Partial, download: Download, facts: Facts) -> bool:
    """Whether what an earlier call left is a part of the file that the source has now."""
    head = candidate.head
    if facts.nbytes is None or head.nbytes != facts.nbytes:
        return False
    return can_be_pieced(download, facts.validator) and head.validator == facts.validator


def is_worth_keeping(part: Partial, download: Download, error: BaseException | None) -> bool:
    """Whether a later call could go on with a part, after this error."""
    return (
        isinstance(error, _RESUMABLE)
        and bool(part.landed)
        and part.nbytes is not None
        and can_be_pieced(download, part.head.validator)
    )


def check_size(download: Download, facts: Facts) -> None:
    """Raises ContentMismatch where the source has not as many bytes as were asked for."""
    wanted = download.nbytes
    if wanted is not None and facts.nbytes is not None and facts.nbytes != wanted:
        raise ContentMismatch(
            f"{download.source} must have {wanted} bytes, but has {facts.nbytes}; check the URL "
            "and its revision"
        )


# -- errors ----------------------------------------------------------------------------------------


def changed_error(download: Download) -> SourceChanged:
    """Another version came."""
    return SourceChanged(
        f"{download.source} must stay as it is while it is fetched, but another size, ETag or date "
        "came; fetch again"
    )


def final_error(download: Download, max_retries: int, error: BaseException) -> NexusError:
    """What a user gets for an error that a retry does not mend."""
    if isinstance(error, NexusError):
        return error
    if isinstance(error, Trouble):
        kept = "what arrived is kept" if error.kind in _RESUMABLE else "nothing is kept"
        return error.kind(
            f"{download.source} may fail {max_retries} times in a row, but did once more; the last "
            f"time {error}; check network and server, and fetch again ({kept})"
        )
    wrapped = DownloadError(
        f"{download.source}: neither a source nor a callback may fail like this: "
        f"{type(error).__name__}; its own error is attached"
    )
    wrapped.__cause__ = error
    return wrapped
