"""What was measured of streamed experts, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from nexus_ext.expert_arms import ExpertArm
from nexus_ext.expert_work import Work

__all__ = ["COLUMNS", "Measured", "memory_of", "rounds_of", "summarize"]

# What a figure means where its name does not say it all.
COLUMNS = {
    "wired_bytes": "ours until the end: slots of experts (none for those used in mapped pages), "
    "dense weights and staging, and whatever else is locked (VmLck)",
    "used_bytes": "anonymous and shared memory of the process (RssAnon, RssShmem), peak, above its "
    "start",
    "file_backed_bytes": "pages of the model's files in the page cache (cachestat), peak, above "
    "what was there when the arm began",
    "hit_rate": "experts that were there when a token's layer asked for them",
    "kept_rate": "experts that were neither loaded for the layer nor fetched ahead for it: what "
    "keeping them saved",
    "belady_hit_rate": "the most that any policy could keep of these routes in all slots' bytes, "
    "beginning with the experts that were there",
    "policy_over_belady": "kept_rate / belady_hit_rate",
    "belady_staying_hits": "as belady_hit_rate, in the slots of those who may stay alone: a count",
    "slack_x": "a token's time over the larger of compute (the resident model's) and miss bytes / "
    "disk rate",
}


@dataclass
class Measured:
    """What one arm took, turn by turn; `first` is a prefill before all others."""

    first: dict[str, float] = field(default_factory=dict)
    prefills: list[dict[str, float]] = field(default_factory=list)
    segments: list[dict[str, float]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    logits: list[list[float]] = field(default_factory=list)


def summarize(
    work: Work,
    arm: ExpertArm,
    ours: Measured,
    theirs: Measured | None,
    disk_bytes_per_second: float,
) -> dict[str, Any]:
    """One line: speeds, ratios to the resident model, hits, bytes, and how near to its bounds."""
    token = median(_per_step(work, ours))
    prefill = median(one["seconds"] for one in ours.prefills)
    counts = _counts(ours.record)
    expert_bytes = arm.facts["expert_bytes"] / arm.facts["num_experts"]
    miss_bytes = (counts["misses"] + counts["ahead_used"]) * expert_bytes / work.num_new
    if theirs is None:
        # Nothing else is known of compute; what waits for nothing computes.
        compute = token - ours.record["wait_seconds"] / work.num_new
    else:
        compute = median(_per_step(work, theirs))
    return {
        "prefill_tps": work.batch * work.num_prompt / prefill,
        "first_prefill_tps": work.batch * work.num_prompt / ours.first["seconds"],
        "decode_tps": work.batch / token,
        "step_seconds": token,
        "compute_seconds": compute,
        "compute_source": "step less wait" if theirs is None else "resident arm",
        "disk_gbps": disk_bytes_per_second / 1e9,
        "slack_x": token / max(compute, miss_bytes / disk_bytes_per_second),
        "miss_bytes_per_step": int(miss_bytes),
        "read_bytes_per_step": int(ours.record["bytes_read"] / work.num_new),
        "disk_bytes_per_step": int(sum(one["disk_bytes"] for one in ours.segments) / work.num_new),
        "prefill_read_bytes": int(median(one["bytes_read"] for one in ours.prefills)),
        "wait_seconds_per_step": ours.record["wait_seconds"] / work.num_new,
        **_rates(counts, ours.record["belady_hits"]),
        "belady_staying_hits": ours.record["belady_staying_hits"],
        "counts": counts,
        **_compared(ours, theirs),
    }


def _counts(record: Mapping[str, Any]) -> dict[str, int]:
    names = ("hits", "joined", "misses", "ahead", "ahead_used", "ahead_wasted", "waves", "evicted")
    counts = {name: int(record[f"num_{name}"]) for name in names}
    return counts | {"selected": int(record["num_selected"]), "failed": int(record["num_failed"])}


def _rates(counts: Mapping[str, int], belady_hits: int | None) -> dict[str, float | None]:
    selected = counts["selected"]
    if not selected:
        # Where every expert stays nobody asks for one.
        return dict.fromkeys(("hit_rate", "kept_rate", "belady_hit_rate", "policy_over_belady"), 1)
    kept = counts["hits"] + counts["joined"] - counts["ahead_used"]
    return {
        "hit_rate": counts["hits"] / selected,
        "kept_rate": kept / selected,
        "belady_hit_rate": None if belady_hits is None else belady_hits / selected,
        "policy_over_belady": kept / belady_hits if belady_hits else None,
    }


def _compared(ours: Measured, theirs: Measured | None) -> dict[str, float | None]:
    """Speeds over the resident model's, on the same tokens; and how far the last logits differ."""
    if theirs is None:
        return {"decode_ratio": None, "prefill_ratio": None, "logits_difference": None}
    return {
        "decode_ratio": _ratio(theirs.segments, ours.segments),
        "prefill_ratio": _ratio(theirs.prefills, ours.prefills),
        "logits_difference": max(
            abs(a - b)
            for ours_row, theirs_row in zip(ours.logits, theirs.logits, strict=True)
            for a, b in zip(ours_row, theirs_row, strict=True)
        ),
    }


def _ratio(theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> float:
    return median(a["seconds"] / b["seconds"] for a, b in zip(theirs, ours, strict=True))


def _per_step(work: Work, measured: Measured) -> list[float]:
    return [one["seconds"] / num for one, num in zip(measured.segments, work.segments, strict=True)]


def rounds_of(measured: Measured) -> dict[str, list[float]]:
    """Every turn."""
    return {
        "prefill_seconds": [one["seconds"] for one in measured.prefills],
        "segment_seconds": [one["seconds"] for one in measured.segments],
    }


def memory_of(arm: ExpertArm, cached_before: int) -> dict[str, Any]:
    """What an arm holds, and by which way it read."""
    report = arm.report()
    now = report["stats"]
    experts = now["experts"]
    copied = experts["num_experts"] - experts["num_views"]
    # Slots that nobody was ever copied into are never touched.
    slots = min(
        arm.facts["slot_bytes"], copied * arm.facts["expert_bytes"] // arm.facts["num_experts"]
    )
    return {
        "budget_bytes": arm.facts["slot_bytes"],
        "budget_share": arm.facts["slot_bytes"] / arm.facts["expert_bytes"],
        "expert_bytes": arm.facts["expert_bytes"],
        "num_experts": experts["num_experts"],
        "num_slots": experts["num_slots"],
        "num_staying": experts["num_staying"],
        "num_views": experts["num_views"],
        "wired_bytes": slots
        + arm.facts["dense_bytes"]
        + now["staging_bytes"]
        + report["locked_bytes"],
        "used_bytes": arm.peak_own_bytes,
        "file_backed_bytes": max(0, arm.peak_cached_bytes - cached_before),
        "io_mode": experts["io_mode"],
        "reader": experts["reader"],
        "refusal": experts["refusal"],
        "is_predicting": experts["is_predicting"],
        "prediction_value": experts["prediction_value"],
        "bytes_direct": experts["bytes_direct"],
        "bytes_staged": experts["bytes_staged"],
        "num_dropped": experts["num_dropped"],
        "num_failed": experts["num_failed"],
    }
