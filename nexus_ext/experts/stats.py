"""Counters of streamed experts, in one immutable snapshot and one line of words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nexus_ext.experts.cache import CacheCounts
from nexus_ext.experts.slots import SlotPlan

__all__ = ["ExpertStats"]


@dataclass(frozen=True)
class ExpertStats:
    """A snapshot of a model's experts: counts since it was attached, bytes and seconds.

    A hit is an expert that was there when a token's layer asked for it; `num_joined` were on their
    way then, misses were not. Those of a prefill are counted apart. `num_waves` are loads that had
    to wait until experts of the same selection had computed. `num_ahead` were fetched on a guess:
    used, wasted, or still there. `prediction_value` is tokens a second with guessing over without,
    as last tried; guessing is off where it does not pay. `num_syncs` counts waits of the host for a
    GPU's router.
    """

    policy: str
    device: str
    io_mode: str
    reader: str
    refusal: str
    budget_bytes: int
    slot_bytes: int
    num_experts: int
    num_slots: int
    num_staying: int
    num_present: int
    num_views: int
    num_runs: int
    num_hits: int
    num_joined: int
    num_misses: int
    num_prefill_runs: int
    num_prefill_hits: int
    num_prefill_joined: int
    num_prefill_misses: int
    num_waves: int
    num_evicted: int
    num_passed: int
    num_preloaded: int
    num_ahead: int
    num_ahead_used: int
    num_ahead_wasted: int
    num_failed: int
    num_syncs: int
    bytes_read: int
    bytes_direct: int
    bytes_staged: int
    num_dropped: int
    num_verified: int
    num_healed: int
    num_ram_loads: int
    ram_bytes: int
    wait_seconds: float
    busy_seconds: float
    seconds_per_token: float
    is_predicting: bool
    prediction_value: float | None
    prediction_switches: int

    @classmethod
    def of(
        cls,
        counts: CacheCounts,
        engine: Mapping[str, Any],
        slots: SlotPlan,
        **others: Any,
    ) -> ExpertStats:
        """From the cache's counts, the engine's report, the plan, and what the runner knows."""
        known = {
            **engine,
            **asdict(counts),
            "budget_bytes": slots.budget_bytes,
            "slot_bytes": slots.nbytes,
            "num_experts": slots.num_experts,
            "num_slots": sum(slots.num_slots),
            "num_staying": slots.num_staying,
            **others,
        }
        return cls(**{field.name: known[field.name] for field in fields(cls)})

    @property
    def hit_rate(self) -> float:
        """Hits among all experts that decoding asked for; 0 before it began."""
        asked = self.num_hits + self.num_joined + self.num_misses
        return self.num_hits / asked if asked else 0.0

    def __str__(self) -> str:
        return (
            f"{self.num_staying} of {self.num_experts} experts stay ({self.policy}), "
            f"{self.io_mode} ({self.reader}): {self.hit_rate:.0%} hits, "
            f"{self.num_joined} joined, {self.num_misses} misses, {self.num_prefill_misses} in "
            f"prefill, {self.bytes_read / 1e9:.2f} GB read, {self.wait_seconds:.2f} s waited"
        )
