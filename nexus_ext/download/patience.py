"""When to try again: back-off, Retry-After, and the clock they go by."""

from __future__ import annotations

import random
import threading
import time
from email.utils import parsedate_to_datetime

from nexus_ext.errors import DownloadError, SourceUnavailable

__all__ = ["Clock", "Failures", "Trouble", "backoff_seconds", "retry_after_seconds"]

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


class Failures:
    """The failures of one download's requests, and the pause after them. Not for several threads.

    Args:
        block_bytes: So many bytes that have landed end a row of failures.
        max_retries: Failures in a row that may pass.
        clock: What pauses go by.
    """

    def __init__(self, block_bytes: int, max_retries: int, clock: Clock) -> None:
        self.num_incidents = 0  # failures of requests under way together are one
        self._block_bytes = block_bytes
        self._max_retries = max_retries
        self._clock = clock
        self._in_a_row = 0
        self._landed_since = 0
        self._not_before = 0.0

    def pause_seconds(self) -> float:
        """How long no request may be sent."""
        return max(0.0, self._not_before - self._clock.now())

    def landed(self, nbytes: int) -> None:
        """Bytes have come."""
        self._landed_since += nbytes
        if self._landed_since >= self._block_bytes:
            self._landed_since = self._in_a_row = 0

    def may_retry(self, trouble: Trouble, incidents_then: int) -> bool:
        """Count a failure, and pause; False where there were too many.

        Args:
            trouble: What happened.
            incidents_then: `num_incidents` when the request began.
        """
        pause = trouble.retry_after_seconds
        if incidents_then == self.num_incidents:
            self.num_incidents += 1
            self._in_a_row += 1
            if self._in_a_row > self._max_retries:
                return False
        elif pause is None:
            return True
        until = self._clock.now() + backoff_seconds(self._in_a_row, pause)
        self._not_before = max(self._not_before, until)
        return True
