"""Which bytes of a part come next: what is missing, and what of that is wanted first."""

from __future__ import annotations

from collections.abc import Sequence

from nexus_ext.download.ranges import Ranges

__all__ = ["Schedule"]


class Schedule:
    """Hands out what is missing of one part, in blocks. Not for several threads.

    Args:
        block_bytes: A request never crosses a multiple of it.
    """

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._missing = Ranges()
        self._wants: list[tuple[int, int]] = []
        self._ever_wanted = Ranges()

    def begin(self, landed: Ranges, nbytes: int | None) -> None:
        """Another part: all that has not landed in it is missing. What was wanted stays so."""
        self._missing = Ranges()
        self._wants += self._ever_wanted
        if nbytes is not None:
            self.give_back(landed, (0, nbytes))

    def want(self, spans: Sequence[tuple[int, int]]) -> None:
        """These come next, in this order, before what was wanted earlier."""
        self._wants = [*spans, *(want for want in self._wants if want not in spans)]
        for span in spans:
            self._ever_wanted.add(*span)

    @property
    def has_wants(self) -> bool:
        """Whether something that is wanted is missing."""
        return any(self._missing.within(*want) for want in self._wants)

    def take(self, nbytes: int, is_lazy: bool, landed: Ranges) -> tuple[int, int] | None:
        """The first missing block, what was wanted before the rest; it is not missing any more.

        None where all `nbytes` are there or on their way, or, if lazy, all that is wanted.
        """
        # What is only on its way may fail, and is still wanted then.
        self._wants = [want for want in self._wants if landed.gaps(want[0], min(want[1], nbytes))]
        everything = [] if is_lazy else [(0, nbytes)]
        for want in [*self._wants, *everything]:
            if (piece := self._missing.within(*want)) is not None:
                span = self._block_around(piece[0])
                self.remove(span)
                return span
        return None

    def _block_around(self, offset: int) -> tuple[int, int]:
        """What is missing around `offset`, as far as the block reaches that it lies in."""
        block = self._block_bytes
        at = offset // block * block
        while (piece := self._missing.within(at, (offset // block + 1) * block)) is not None:
            if piece[1] > offset:
                return piece
            at = piece[1]
        raise AssertionError(f"byte {offset} is not missing")

    def remove(self, span: tuple[int, int]) -> None:
        """These have landed, or are on their way."""
        self._missing.remove(*span)

    def give_back(self, landed: Ranges, span: tuple[int, int]) -> None:
        """What of these has not landed is missing again."""
        for gap in landed.gaps(*span):
            self._missing.add(*gap)
