"""Layers fetched ahead of who needs them.

    get(i) ──▶ on its way already? ──▶ join it        and then: those that come next are begun
           └─▶ `Loader`: cache, model's files          (`Order`: learnt, else i + 1, i + 2 ...)

Owns the threads that fetch, and the layers that were fetched and not asked for yet. A layer is read
once, however many ask for it meanwhile. What went wrong ahead is raised to whoever asks.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from torch import nn

from nexus_ext.errors import ConfigError, EngineClosed
from nexus_ext.sli.layer_cache import LayerCache, key_of
from nexus_ext.sli.limits import check_number
from nexus_ext.sli.loaded import Loaded
from nexus_ext.sli.loading import Loader
from nexus_ext.sli.order import Order
from nexus_ext.sli.prefetch_counts import PrefetchCounts

__all__ = ["Prefetcher"]

_MOST_LOOKAHEAD = 64
# More threads would take turns on one disk.
_MOST_THREADS = 4

_Key = tuple[str, int]


@dataclass
class _Flight:
    """One layer on its way, or there and not asked for yet. Who claims it flies it."""

    is_ahead: bool
    is_learnt: bool = False
    is_claimed: bool = False
    is_taken: bool = False
    future: Future[Loaded] = field(default_factory=Future)


class Prefetcher:
    """Serves layers, and fetches the next ones meanwhile. Thread-safe."""

    def __init__(
        self,
        cache: LayerCache,
        *,
        lookahead: int = 2,
        learns_order: bool = True,
        max_connections: int = 8,
    ) -> None:
        """Start no thread yet.

        Args:
            cache: Where layers are looked for first, and what is in memory is kept.
            lookahead: Layers fetched ahead; 0 fetches none.
            learns_order: Whether they are those that came next before; else the next numbers.
            max_connections: Of downloads, for models that are not on this machine.

        Raises:
            ConfigError: A number that cannot be.
        """
        check_number("prefetch_lookahead", lookahead, 0, _MOST_LOOKAHEAD)
        self.cache = cache
        self.lookahead = lookahead
        self._learns_order = learns_order
        self._lock = threading.Lock()
        self._flights: OrderedDict[_Key, _Flight] = OrderedDict()
        self._orders: dict[str, Order] = {}
        self._loader = Loader(cache, max_connections)
        self._counts = PrefetchCounts()
        self._threads: ThreadPoolExecutor | None = None
        self._is_closed = False

    # -- asking ------------------------------------------------------------------------------

    def get(
        self,
        model: str | Path,
        index: int,
        num_layers: int | None = None,
        *,
        lookahead: int | None = None,
    ) -> nn.Module:
        """A layer, ready to be called. Blocks until it is there, and begins the next ones.

        Args:
            model: As in `LayerCache`; a folder or a hub id, if the layer may not be cached.
            index: From 0 on.
            num_layers: What is fetched ahead ends before this; None is what the model has.
            lookahead: Other than that of the prefetcher.

        Raises:
            ConfigError: Numbers that cannot be; or the layer is not cached and the model unknown.
            NexusError: The layer cannot be read, or has no template.
            EngineClosed: Closed before, or meanwhile.
        """
        began = time.perf_counter()
        name = str(model)
        key_of(model, index)
        total = self.num_layers(name) if num_layers is None else num_layers
        if not 0 <= index < total:
            raise ConfigError(f"layers of {name} are numbered from 0 to {total - 1}, got {index}.")
        flight, is_mine = self._board((name, index))
        was_there = flight.future.done()
        count = self.lookahead if lookahead is None else lookahead
        try:
            if is_mine:  # what is waited for has the disk to itself
                self._fly((name, index), flight)
            ahead, is_learnt = self._next(name, index, total, count)
            self.begin(name, ahead, is_learnt=is_learnt)
            self._note_depth(is_ahead=count > 0)
            loaded = self._land(flight)
        finally:
            self._forget((name, index), flight)
        if index in ahead:  # the same again, now that this one was handed out
            self.begin(name, ahead, is_learnt=is_learnt)
        layer = loaded.build()
        self._note(flight, loaded.tier, is_mine, was_there, time.perf_counter() - began)
        return layer

    def begin(self, model: str | Path, indices: Sequence[int], *, is_learnt: bool = False) -> None:
        """Fetch these ahead, the first one first. Does not block.

        Args:
            model: As in `get`.
            indices: Which; none of them twice.
            is_learnt: For the counters: they are a guess from what was asked for before.

        Raises:
            EngineClosed: Closed before.
        """
        with self._lock:
            self._check_open()
            for index in indices:
                self._begin((str(model), index), is_learnt)
            if indices:
                self._drop_stale({(str(model), index) for index in indices}, len(indices))

    def num_layers(self, model: str | Path) -> int:
        """Blocks of the model; of one that is only cached, layers from 0 on without a gap.

        Raises:
            ConfigError: Neither cached nor known.
        """
        return self._loader.num_layers(str(model))

    def stats(self) -> dict[str, float | int]:
        """See `PrefetchCounts.report`."""
        with self._lock:
            depth = self._depth()
        return self._counts.report() | {"queue_depth": depth}

    def close(self) -> None:
        """Wait for reads that are under way; the rest is not begun. May be called twice."""
        with self._lock:
            self._is_closed = True
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._flights.clear()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- flights -----------------------------------------------------------------------------

    def _board(self, key: _Key) -> tuple[_Flight, bool]:
        """The flight of a layer, and whether the caller has to fly it."""
        with self._lock:
            self._check_open()
            flight = self._flights.setdefault(key, _Flight(is_ahead=False))
            is_mine = not flight.is_claimed
            flight.is_claimed = True
            return flight, is_mine

    def _fly(self, key: _Key, flight: _Flight) -> None:
        try:
            loaded = self._loader.load(*key)
        except BaseException as error:
            flight.future.set_exception(error)
            raise
        flight.future.set_result(loaded)

    def _land(self, flight: _Flight) -> Loaded:
        loaded = flight.future.result()
        with self._lock:
            is_first = not flight.is_taken
            flight.is_taken = True
        return loaded if is_first else loaded.copied(self.cache.ram)

    def _forget(self, key: _Key, flight: _Flight) -> None:
        with self._lock:
            if self._flights.get(key) is flight and flight.future.done():
                del self._flights[key]

    def _next(self, model: str, index: int, total: int, lookahead: int) -> tuple[list[int], bool]:
        """What will be asked for after this, and whether that was learnt."""
        if not self._learns_order or lookahead == 0:
            return list(range(index + 1, min(index + 1 + lookahead, total))), False
        with self._lock:
            order = self._orders.setdefault(model, Order())
            order.visit(index)
            return order.predict(lookahead, total)

    def _begin(self, key: _Key, is_learnt: bool) -> None:
        """With the lock."""
        if key in self._flights:
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_MOST_THREADS, "nexus-prefetch")
            # Nothing that waits is begun when nobody is left to ask for it.
            weakref.finalize(self, self._threads.shutdown, wait=False, cancel_futures=True)
        self._flights[key] = flight = _Flight(is_ahead=True, is_learnt=is_learnt)
        self._threads.submit(_fly_ahead, weakref.ref(self), key, flight)
        self._counts.note_issued(is_learnt)
        self.cache.count("prefetched")

    def _drop_stale(self, wanted: set[_Key], lookahead: int) -> None:
        """Who jumps about leaves layers behind; as many again as are wanted may wait for him."""
        idle = [
            (key, flight)
            for key, flight in self._flights.items()
            if flight.is_ahead and (flight.future.done() or not flight.is_claimed)
        ]
        stale = [(key, flight) for key, flight in idle if key not in wanted]
        for key, flight in stale[: max(0, len(idle) - 2 * lookahead)]:
            flight.is_claimed = True
            del self._flights[key]
            self._counts.note_dropped()

    def _claim(self, flight: _Flight) -> bool:
        with self._lock:
            is_free = not (flight.is_claimed or self._is_closed)
            flight.is_claimed |= is_free
            return is_free

    def _depth(self) -> int:
        """Layers on their way or waiting for it."""
        return sum(not flight.future.done() for flight in self._flights.values())

    # -- counting ----------------------------------------------------------------------------

    def _note(
        self, flight: _Flight, tier: str, is_mine: bool, was_there: bool, seconds: float
    ) -> None:
        was_ahead = flight.is_ahead and not is_mine
        self._counts.note(tier, was_ahead, was_ahead and flight.is_learnt, was_there, seconds)
        if was_ahead:
            self.cache.count("prefetch_used")

    def _note_depth(self, is_ahead: bool) -> None:
        with self._lock:
            depth = self._depth()
        self._counts.note_depth(depth)
        if is_ahead:
            self.cache.count("queue_looks")
            self.cache.count("queue_depths", depth)

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineClosed("A prefetcher was closed before this use. Make another one.")


def _fly_ahead(prefetcher: weakref.ref[Prefetcher], key: _Key, flight: _Flight) -> None:
    """In a thread, which must not keep the prefetcher alive while it waits for its turn."""
    owner = prefetcher()
    if owner is not None and owner._claim(flight):
        owner._fly(key, flight)
