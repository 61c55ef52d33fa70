"""The guide's three configurations, as options of `LayerCache` and `IOOptimizer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Options for a kind of machine; those that are not named keep their defaults.

    Attributes:
        cache: Of `LayerCache`.
        optimizer: Of `IOOptimizer`.
        weights: What to pack layers with, or None; of `quantize_layer`.
    """

    cache: Mapping[str, Any]
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "high-performance": Preset(
            {"max_cache_size_gb": 100.0, "max_memory_cache_size_gb": 8.0},
            {"enable_prefetch": True, "prefetch_lookahead": 3, "enable_wear_leveling": False},
        ),
        "network-constrained": Preset(
            {"max_cache_size_gb": 200.0, "max_memory_cache_size_gb": 4.0},
            {
                "enable_prefetch": True,
                "enable_parallel_download": True,
                "max_concurrent_downloads": 8,
                "prefetch_lookahead": 5,
            },
        ),
        "memory-constrained": Preset(
            {"max_cache_size_gb": 500.0, "max_memory_cache_size_gb": 0.5}, weights="nf4"
        ),
    }
)
