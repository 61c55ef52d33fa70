"""Owns replays: what a policy, or the best possible one, would have kept of a trace of routes.

Note [What a replay does]: exactly what the cache does, and nothing else. Every key of a forward
must be there for it: those that are not are loaded, whatever the capacity. After the forward keys
leave until what is there fits the capacity again. Those just used may leave like any other, so a
key can be loaded for one forward only. What a prefill loaded leaves first: nobody leaves for it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from nexus_ext.errors import ConfigError
from nexus_ext.experts.policy import Policy, make_policy
from nexus_ext.experts.routes import RouteTrace

__all__ = ["Replay", "belady", "replay"]


@dataclass(frozen=True)
class Replay:
    """What was there and what was not. A hit or a miss is one key of one forward; all sums."""

    policy: str
    capacity_bytes: int
    hits: int
    misses: int
    bytes_hit: int
    bytes_missed: int
    evictions: int

    @property
    def hit_rate(self) -> float:
        """Share of the keys that were there, 0 for none."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def byte_hit_rate(self) -> float:
        """Share of the bytes that were there, 0 for none."""
        return self.bytes_hit / max(1, self.bytes_hit + self.bytes_missed)


def replay(
    trace: RouteTrace,
    capacity_bytes: int,
    policy_name: str,
    *,
    sizes: Sequence[int] | None = None,
) -> Replay:
    """Run a trace through an empty cache of `capacity_bytes` under a policy.

    Args:
        trace: The routes.
        capacity_bytes: What may stay between forwards.
        policy_name: One of `POLICIES`.
        sizes: Bytes, one a key; those of the trace if None.

    Raises:
        ConfigError: There is no such policy, or the capacity or the sizes cannot be.
    """
    sizes = _checked(trace, capacity_bytes, sizes)
    policy = make_policy(policy_name, trace.layer_of)
    there, counts = _There(sizes), _Counts()
    for route in trace.routes:
        missing = [key for key in route.keys if not there.mask[key]]
        counts.note(route.keys, missing, sizes)
        there.add(missing)
        policy.select(route.layer, route.keys, is_prefill=route.is_prefill)
        if route.is_prefill:
            counts.evictions += there.let_pass(missing, capacity_bytes)
        counts.evictions += there.shrink(policy, capacity_bytes)
    return counts.result(policy_name, capacity_bytes)


class _There:
    """The keys that are there, and their bytes."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.mask = [False] * len(sizes)
        self._present = torch.zeros(len(sizes), dtype=torch.bool)
        self._sizes = sizes
        self._largest = max(sizes, default=1)
        self._nbytes = 0

    def add(self, keys: Sequence[int]) -> None:
        self._set(keys, True)
        self._nbytes += sum(self._sizes[key] for key in keys)

    def let_pass(self, keys: Sequence[int], capacity_bytes: int) -> int:
        """As many of `keys` leave as have to; how many."""
        num_left = 0
        for key in keys:
            if self._nbytes <= capacity_bytes:
                break
            self._remove([key])
            num_left += 1
        return num_left

    def shrink(self, policy: Policy, capacity_bytes: int) -> int:
        """Those of least worth leave, until the others fit; how many."""
        num_left = 0
        while self._nbytes > capacity_bytes:
            # So few that all of them have to leave, whatever their sizes.
            count = math.ceil((self._nbytes - capacity_bytes) / self._largest)
            victims = policy.victims(count, self._present)
            self._remove(victims)
            num_left += len(victims)
        return num_left

    def _remove(self, keys: Sequence[int]) -> None:
        self._set(keys, False)
        self._nbytes -= sum(self._sizes[key] for key in keys)

    def _set(self, keys: Sequence[int], is_there: bool) -> None:
        if keys:
            self._present[torch.tensor(keys)] = is_there
        for key in keys:
            self.mask[key] = is_there


def belady(trace: RouteTrace, capacity_bytes: int, *, sizes: Sequence[int] | None = None) -> Replay:
    """The fewest bytes that any policy can miss, knowing all routes: furthest next use leaves.

    With keys of one size this is the optimum, and a policy exists that reaches it. With several
    sizes a key may leave in part, which no cache does: then `bytes_missed` is a lower bound on
    that of every policy, and `hits`, the uses of keys that are there as a whole, bounds nothing.

    Source: Belady 1966. Keys that leave in part are pages of one byte, for which it is optimal.

    Raises:
        ConfigError: The capacity or the sizes cannot be.
    """
    sizes = _checked(trace, capacity_bytes, sizes)
    smallest, largest = min(sizes, default=0), max(sizes, default=0)
    # Of keys of one size as many as fit: a part of one is no use, and so the answer is exact.
    is_exact = 0 < smallest == largest
    capacity = capacity_bytes // largest * largest if is_exact else capacity_bytes
    kept = [0] * trace.num_keys
    furthest: list[tuple[float, int]] = []
    counts, used = _Counts(), 0
    for keys, next_uses in _next_uses(trace):
        counts.note_parts(keys, kept, sizes)
        for key, when in zip(keys, next_uses, strict=True):
            used += sizes[key] - kept[key]
            kept[key] = sizes[key]
            heapq.heappush(furthest, (-when, key))
        while used > capacity:
            # Entries of uses that have been are nearer than all others: this one is of a key that
            # is there.
            _, key = furthest[0]
            part = min(kept[key], used - capacity)
            used, kept[key] = used - part, kept[key] - part
            if not kept[key]:
                counts.evictions += 1
                heapq.heappop(furthest)
    return counts.result("belady", capacity_bytes)


def _checked(trace: RouteTrace, capacity_bytes: int, sizes: Sequence[int] | None) -> Sequence[int]:
    sizes = trace.sizes if sizes is None else sizes
    if capacity_bytes < 0:
        raise ConfigError(f"capacity_bytes must be at least 0, got {capacity_bytes}; give more")
    if len(sizes) != trace.num_keys:
        raise ConfigError(
            f"sizes must have one entry for each of {trace.num_keys} experts, got {len(sizes)}; "
            "give one size per expert, layer by layer"
        )
    return sizes


class _Counts:
    """Sums while a trace runs."""

    def __init__(self) -> None:
        self.hits = self.misses = self.bytes_hit = self.bytes_missed = self.evictions = 0

    def note(self, keys: Sequence[int], missing: Sequence[int], sizes: Sequence[int]) -> None:
        missed = sum(sizes[key] for key in missing)
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        self.bytes_missed += missed
        self.bytes_hit += sum(sizes[key] for key in keys) - missed

    def note_parts(self, keys: Sequence[int], kept: Sequence[int], sizes: Sequence[int]) -> None:
        hits = sum(kept[key] == sizes[key] for key in keys)
        there = sum(kept[key] for key in keys)
        self.hits += hits
        self.misses += len(keys) - hits
        self.bytes_hit += there
        self.bytes_missed += sum(sizes[key] for key in keys) - there

    def result(self, policy: str, capacity_bytes: int) -> Replay:
        return Replay(
            policy,
            capacity_bytes,
            self.hits,
            self.misses,
            self.bytes_hit,
            self.bytes_missed,
            self.evictions,
        )


def _next_uses(trace: RouteTrace) -> Iterator[tuple[tuple[int, ...], list[float]]]:
    """The keys of every forward, and in which forward each will be used next."""
    routes = [route.keys for route in trace.routes]
    seen: dict[int, float] = {}
    nexts: list[list[float]] = []
    for number in range(len(routes) - 1, -1, -1):
        nexts.append([seen.get(key, math.inf) for key in routes[number]])
        seen.update(dict.fromkeys(routes[number], number))
    return zip(routes, reversed(nexts), strict=True)
