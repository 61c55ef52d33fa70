"""When to try again: back-off, Retry-After, and the clock they go by."""

from __future__ import annotations

import random
import threading
import time
from email.utils import parsedate_to_datetime

from nexus_ext.errors import DownloadError, SourceUnavailable

__all__ = ["Clock", "Trouble", "backoff_seconds", "retry_after_seconds"]

_FIRST_SECONDS = 0.5
_MOST_SECONDS = 30.0
# A server may ask for more; then it is asked too early, and fails one try more.
_MOST_RETRY_AFTER_SECONDS = 120.0


class Trouble(Exception):
    """A request failed in a way that may pass. Private: users get what `kind` says, in the end.

    Args:
        message: What happened, without secrets.
        kind: The error that it becomes when it does not pass.
        retry_after_seconds: What the server asked for, or None.
    """

    def __init__(
        self,
        message: str,
        kind: type[DownloadError] = SourceUnavailable,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_seconds = retry_after_seconds


class Clock:
    """The time, and waiting for it; tests put another in its place."""

    def now(self) -> float:
        """Seconds that only grow."""
        return time.monotonic()

    def wait(self, condition: threading.Condition, seconds: float | None) -> None:
        """Wait until notified, or until `seconds` have passed. The condition's lock is held."""
        condition.wait(seconds)


def backoff_seconds(num_failures: int, retry_after_seconds: float | None = None) -> float:
    """How long to wait after so many failures in a row: doubling, jittered, bounded."""
    bound = min(_MOST_SECONDS, _FIRST_SECONDS * 2.0 ** min(num_failures - 1, 16))
    seconds = random.uniform(bound / 2, bound)
    return max(seconds, min(retry_after_seconds or 0.0, _MOST_RETRY_AFTER_SECONDS))


def retry_after_seconds(value: str | None) -> float | None:
    """What a Retry-After header says: seconds, or a date; None for anything else."""
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return None
