"""Which bytes of a checkpoint on its way are asked for next.

    hastened: somebody waits ──▶ a window of them ─┐
                                                   ├─▶ wanted, file by file
    expected: the plan, in order ──▶ a window ─────┘   then everything else

Bytes are asked for in a window, and not all at once, because connections take files in turn: an
order over several files is kept only as far as little is asked for at a time. While somebody waits
for bytes, nothing new of the plan is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from nexus_ext.shards import Shard, Span, has_landed

__all__ = ["Asking"]


class Asking:
    """The order of need. Any thread says what it needs; one thread calls `ask`."""

    def __init__(self, shards: Sequence[Shard], window_bytes: int) -> None:
        """`window_bytes` are asked for at a time: enough for every connection, and few enough that
        the order is kept.
        """
        self._shards = shards
        self._window_bytes = window_bytes
        self._expected: deque[Span] = deque()
        self._hastened: deque[Span] = deque()
        self._asked: list[Span] = []
        self._urgent: list[Span] = []
        self._has_all_asked = False
        self._is_new = False

    @property
    def is_new(self) -> bool:
        """Whether somebody said something since `ask` was called."""
        return self._is_new

    def expect(self, spans: Sequence[Span]) -> None:
        """These will be needed, in this order, behind all that was said before."""
        self._expected.extend(spans)
        self._is_new = True

    def hasten(self, spans: Sequence[Span]) -> None:
        """Somebody waits for these: they come before all that is expected."""
        self._hastened.extend(spans)
        self._is_new = True

    def ask(self) -> None:
        """Keep a window's worth of bytes wanted. Does not block."""
        self._is_new = False  # first: what is said meanwhile is looked at again
        self._urgent = [span for span in self._urgent if not self._is_there(span)]
        self._asked = [span for span in self._asked if not self._is_there(span)]
        added = self._take(self._hastened, self._urgent)
        if not self._urgent:
            added |= self._take(self._expected, self._asked)
        for number in added:
            # All of them again: what is wanted last comes first.
            self._shards[number].want(
                [
                    (offset, nbytes)
                    for file, offset, nbytes in (*self._urgent, *self._asked)
                    if file == number
                ]
            )
        if not (self._has_all_asked or self._expected or self._hastened):
            self._has_all_asked = True
            for shard in self._shards:
                shard.want_all()

    def _take(self, waiting: deque[Span], window: list[Span]) -> set[int]:
        """Fill a window; the files that it has more of now."""
        added = set()
        missing = sum(nbytes for _, _, nbytes in window)
        while waiting and missing < self._window_bytes:
            span = waiting.popleft()
            if not self._is_there(span):
                window.append(span)
                missing += span[2]
                added.add(span[0])
        return added

    def _is_there(self, span: Span) -> bool:
        file, offset, nbytes = span
        return has_landed(self._shards[file], offset, nbytes)
