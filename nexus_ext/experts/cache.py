"""Which experts are where: hits compute while misses load, and what is worth most stays.

    run(layer, experts) ── misses ──▶ slots ──▶ collect ──▶ compute ──▶ back to what may stay
                        └─ hits ─────────────────────────▶ compute

Owns the accounts of the slots, not their memory. It has never heard of files, devices or matmuls:
a store loads, and the caller computes.

Note [Who stays, who passes through]
Some slots of each class belong to nobody for long. While a token is decoded, its misses load there
at once and no eviction is waited for; when the layer is through, the policy says which experts are
worth least, the new ones among them, until those slots are free again; not before half of them are
taken, because asking the policy costs the same for one as for ten. In a prefill nearly every
expert comes by once. It may take a place that is empty, and else passes through: the experts that
decoding needs stay, and the disk reads on, the next layer's experts last. What is fetched ahead
lands in these slots too, so that a guess costs nobody his place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nexus_ext.experts.policy import Policy

__all__ = ["CacheCounts", "ExpertCache", "Store"]


class Store(Protocol):
    """What loads experts into slots; see `nexus_ext.experts.store.ExpertStore`."""

    class_of: list[int]
    slots_of: list[range]

    def place(self, keys: Sequence[int], slots: Sequence[int], *, ahead: bool = False) -> None: ...
    def collect(self, keys: Sequence[int], *, at_least: int) -> list[int]: ...
    def evict(self, keys: Collection[int]) -> None: ...


@dataclass
class CacheCounts:
    """Counts of experts, by forward of a layer, since the model was attached.

    A hit was there when its layer asked, `joined` ones were on their way, misses were neither; a
    wave is a load that had to wait until an expert of the same selection had computed. `num_passed`
    experts left at once, without staying.
    """

    num_runs: int = 0
    num_prefill_runs: int = 0
    num_hits: int = 0
    num_joined: int = 0
    num_misses: int = 0
    num_prefill_hits: int = 0
    num_prefill_joined: int = 0
    num_prefill_misses: int = 0
    num_waves: int = 0
    num_evicted: int = 0
    num_passed: int = 0
    num_ahead: int = 0
    num_ahead_used: int = 0
    num_ahead_wasted: int = 0
    num_preloaded: int = 0
    num_failed: int = 0
    wait_seconds: float = 0.0


@dataclass
class _Class:
    """The slots of one class: which are free, and how many experts may stay."""

    free: list[int]
    num_passing: int
    present: torch.Tensor  # bool, by key: who has a slot
    num_guesses: int = 0  # of these, fetched ahead and not asked for yet

    @property
    def num_over(self) -> int:
        """Experts too many to leave the passing slots free, to guesses at most."""
        return max(0, self.num_passing - len(self.free) - self.num_guesses)


Compute = Callable[[Sequence[int]], None]


class ExpertCache:
    """Runs the selections of layers; one thread at a time.

    Args of the constructor:
        store: Who loads.
        policy: Who says what is worth keeping.
        layers: The keys of each layer's experts.
        num_passing: Slots of each class that experts pass through.
    """

    def __init__(
        self,
        store: Store,
        policy: Policy,
        layers: Sequence[range],
        num_passing: Sequence[int],
    ) -> None:
        self._store = store
        self._policy = policy
        self._layers = layers
        num_keys = len(store.class_of)
        self._classes = [
            _Class(list(reversed(slots)), count, torch.zeros(num_keys, dtype=torch.bool))
            for slots, count in zip(store.slots_of, num_passing, strict=True)
        ]
        self.slot_of: list[int] = [-1] * num_keys
        self._ahead: set[int] = set()  # placed and not asked for yet
        self._lock = threading.RLock()
        self.counts = CacheCounts()
        # When the last expert that a layer asked for had landed (`time.perf_counter`).
        self.idle_since = time.perf_counter()

    @property
    def num_present(self) -> int:
        """Experts that have a slot now."""
        return sum(slot >= 0 for slot in self.slot_of)

    @property
    def num_read(self) -> int:
        """Experts that were read because a layer needs them, right guesses included. What a
        decoding layer adds are its misses, as they would be without guessing.
        """
        return self.counts.num_misses + self.counts.num_ahead_used

    # -- one layer, one forward ----------------------------------------------------------------

    def run(
        self,
        layer: int,
        keys: Sequence[int],
        compute: Compute,
        *,
        is_prefill: bool = False,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Compute every expert of a selection once it is there, the ones that are there first.

        Args:
            layer: Index of the layer.
            keys: Distinct experts of that layer.
            compute: Called with experts that have landed, in whatever order; enqueues or does all
                that reads them.
            is_prefill: Whether many tokens come by at once: then nobody is evicted for them.
            meanwhile: Called once, when the first loads are under way and nothing has computed.

        Raises:
            ReadError, CorruptCheckpoint, ...: As the store. The experts that are there stay; the
                others are asked for again by the next run.
        """
        with self._lock:
            selection = _Selection(self, layer, keys, is_prefill)
            try:
                selection.compute_all(compute, meanwhile)
            except BaseException:
                self.counts.num_failed += 1
                self._drop(selection.loading)
                raise
            finally:
                self._policy.select(layer, keys, is_prefill=is_prefill)
                self._settle(selection)

    def _settle(self, selection: _Selection) -> None:
        """Back to as many experts as may stay; see Note [Who stays, who passes through]."""
        wasted = [key for key in self._layers[selection.layer] if key in self._ahead]
        self.counts.num_ahead_wasted += len(wasted)
        self._drop(wasted)
        if selection.is_prefill:
            self._let_pass(selection.loaded)
        for index, one in enumerate(self._classes):
            if one.num_over > one.num_passing // 2:
                evicted = self._evict(index, one.num_over, held=self._ahead)
                self.counts.num_evicted += len(evicted)

    def _let_pass(self, keys: Collection[int]) -> None:
        """Of a prefill's experts that are through, those leave for whom no place is empty."""
        for key in keys:
            if self.slot_of[key] >= 0 and self._classes[self._store.class_of[key]].num_over:
                self.counts.num_passed += 1
                self._drop([key])

    # -- slots -----------------------------------------------------------------------------------

    def _evict(self, index: int, count: int, held: Collection[int]) -> list[int]:
        """Take the slots of those who are worth least; fewer if the others are held."""
        victims = self._policy.victims(count, self._classes[index].present, held)
        self._drop(victims)
        return victims

    def _drop(self, keys: Collection[int]) -> None:
        """Their slots are free."""
        if not keys:
            return
        self._store.evict(keys)
        self._forget(keys)

    def _forget(self, keys: Collection[int]) -> None:
        for key in keys:
            one = self._classes[self._store.class_of[key]]
            if self.slot_of[key] >= 0:
                one.free.append(self.slot_of[key])
                one.present[key] = False
                self.slot_of[key] = -1
        self._no_guesses(keys)

    def _no_guesses(self, keys: Collection[int]) -> None:
        for key in self._ahead.intersection(keys):
            self._ahead.discard(key)
            self._classes[self._store.class_of[key]].num_guesses -= 1

    def _place(self, keys: Sequence[int], *, ahead: bool = False) -> list[int]:
        """Give free slots to as many of these as there are, in order."""
        placed: list[int] = []
        for key in keys:
            one = self._classes[self._store.class_of[key]]
            if not one.free:
                continue
            self.slot_of[key] = one.free.pop()
            one.present[key] = True
            placed.append(key)
        if placed:
            self._store.place(placed, [self.slot_of[key] for key in placed], ahead=ahead)
        return placed

    # -- before they are asked for ---------------------------------------------------------------

    def fetch_ahead(self, keys: Sequence[int], max_count: int) -> list[int]:
        """Begin to load up to `max_count` absent experts into slots that are free, in order of
        worth. Nobody is evicted for them, and they yield to whoever is asked for.
        """
        with self._lock:
            absent = [key for key in keys if self.slot_of[key] < 0]
            placed = self._place(absent[:max_count], ahead=True)
            self._ahead.update(placed)
            for key in placed:
                self._classes[self._store.class_of[key]].num_guesses += 1
            self.counts.num_ahead += len(placed)
            return placed

    def preload(self, keys: Sequence[int]) -> list[int]:
        """Begin to load the first of these, as many as may stay. They count as asked for."""
        with self._lock:
            wanted: list[int] = []
            room = [len(one.free) - one.num_passing for one in self._classes]
            for key in keys:
                index = self._store.class_of[key]
                if self.slot_of[key] < 0 and room[index] > 0:
                    room[index] -= 1
                    wanted.append(key)
            placed = self._place(wanted, ahead=True)
            self.counts.num_preloaded += len(placed)
            return placed

    def wait(self) -> None:
        """Block until everybody who has a slot is there. Raises as `run`."""
        with self._lock:
            present = [key for key, slot in enumerate(self.slot_of) if slot >= 0]
            try:
                self._store.collect(present, at_least=len(present))
            except BaseException:
                self._drop(present)
                raise

    def all_stay(self, keys: Sequence[int]) -> bool:
        """Whether these are there and will be for ever: their classes have slots for all. Blocks
        until they have landed. Raises as `run`.
        """
        with self._lock:
            index = {self._store.class_of[key] for key in keys}
            if any(self._classes[one].num_passing for one in index):
                return False
            if any(self.slot_of[key] < 0 for key in keys):
                return False
            try:
                self._store.collect(keys, at_least=len(keys))
            except BaseException:
                self._drop(keys)
                raise
            return True

    def clear(self) -> None:
        """Everybody leaves."""
        with self._lock:
            self._drop([key for key, slot in enumerate(self.slot_of) if slot >= 0])


class _Selection:
    """The experts that one forward of a layer needs, and how far they are."""

    def __init__(
        self, cache: ExpertCache, layer: int, keys: Sequence[int], is_prefill: bool
    ) -> None:
        self._cache = cache
        self.layer = layer
        self.is_prefill = is_prefill
        self._needed = set(keys)  # not computed yet
        self._num_selected = len(keys)
        there = [key for key in keys if cache.slot_of[key] >= 0]
        self.absent = [key for key in keys if cache.slot_of[key] < 0]
        self.loading: list[int] = there  # placed, as far as we know not landed
        self.loaded: set[int] = set()

    def compute_all(self, compute: Compute, meanwhile: Callable[[], None] | None) -> None:
        cache = self._cache
        cache.idle_since = time.perf_counter()
        there, self.loading = self.loading, []
        num_missing = len(self.absent)
        # The disk begins before anything computes.
        self._start()
        self.loading += there  # one that failed is not placed any more: it must go
        hits = cache._store.collect(there, at_least=0) if there else []
        self._count(there, hits, num_missing)
        if meanwhile is not None:
            meanwhile()
        is_there = set(hits)
        self.loading = [key for key in self.loading if key not in is_there]
        while self._needed:
            # The next loads are under way before these compute.
            self._start()
            self._read_on()
            landed = self._landed(must_wait=not hits)
            ready = landed or hits
            now = ready[:1] if self._is_piecewise else ready[:]
            self._compute(now, compute)
            hits = [key for key in hits if key in self._needed]

    @property
    def _is_piecewise(self) -> bool:
        """Whether somebody waits for a slot: then each that is through gives his at once, and the
        disk goes on.
        """
        return self.is_prefill or bool(self.absent)

    def _landed(self, *, must_wait: bool) -> list[int]:
        """Who is there of those on their way."""
        if not self.loading:
            return []
        began = time.perf_counter()
        landed = self._cache._store.collect(self.loading, at_least=int(must_wait))
        now = time.perf_counter()
        self._cache.counts.wait_seconds += now - began
        if landed:
            self._cache.idle_since = now
        return landed

    def _compute(self, keys: list[int], compute: Compute) -> None:
        compute(keys)
        gone = set(keys)
        self._needed -= gone
        self.loading = [key for key in self.loading if key not in gone]

    def _start(self) -> None:
        """Begin as many loads as there are slots: free ones, those of guesses that nobody asked
        for, and those of experts that are not needed any more.
        """
        cache = self._cache
        began = bool(self.loaded)
        count = len(self.absent)
        while self.absent:
            placed = set(cache._place(self.absent))
            self.loading += [key for key in self.absent if key in placed]
            self.absent = [key for key in self.absent if key not in placed]
            self.loaded |= placed
            made_room = [self._make_room(index) for index in self._classes_of_absent()]
            if not any(made_room):
                break
        cache.counts.num_waves += began and len(self.absent) < count

    def _classes_of_absent(self) -> set[int]:
        return {self._cache._store.class_of[key] for key in self.absent}

    def _make_room(self, index: int) -> bool:
        """Free slots of a class; in a prefill, nobody leaves who was there before."""
        cache = self._cache
        if guesses := self._not_needed(cache._ahead, index):
            cache.counts.num_ahead_wasted += len(guesses)
            cache._drop(guesses)
            return True
        if self.is_prefill:
            through = self._not_needed(self.loaded, index)
            cache.counts.num_passed += len(through)
            cache._drop(through)
            if through or len(self._needed) > len(self.absent):  # some will be through
                return bool(through)
        victims = cache._evict(index, len(self.absent), held=self._needed)
        cache.counts.num_evicted += len(victims)
        return bool(victims)

    def _not_needed(self, keys: Collection[int], index: int) -> list[int]:
        """Of these, the ones with a slot of the class whom nobody waits for."""
        cache = self._cache
        return [
            key
            for key in keys
            if cache.slot_of[key] >= 0
            and cache._store.class_of[key] == index
            and key not in self._needed
        ]

    def _read_on(self) -> None:
        """In a prefill, most experts of a layer are needed: so will be most of the next one's."""
        cache = self._cache
        if not self.is_prefill or self.absent or self.layer + 1 == len(cache._layers):
            return
        if 2 * self._num_selected >= len(cache._layers[self.layer]):
            cache._let_pass(self.loaded - self._needed)
            num_free = sum(len(one.free) for one in cache._classes)
            cache.fetch_ahead(cache._layers[self.layer + 1], num_free)

    def _count(self, there: list[int], hits: list[int], num_missing: int) -> None:
        cache = self._cache
        counts = cache.counts
        used_ahead = [key for key in there if key in cache._ahead]
        counts.num_ahead_used += len(used_ahead)
        cache._no_guesses(used_ahead)
        self.loaded.update(used_ahead)
        num_joined = len(there) - len(hits)
        if self.is_prefill:
            counts.num_prefill_runs += 1
            counts.num_prefill_hits += len(hits)
            counts.num_prefill_joined += num_joined
            counts.num_prefill_misses += num_missing
        else:
            counts.num_runs += 1
            counts.num_hits += len(hits)
            counts.num_joined += num_joined
            counts.num_misses += num_missing
