"""The guide's names for what makes layers come sooner.

IOOptimizer ─▶ prefetcher ─▶ LayerCache ─▶ memory, disk
            └▶ downloader, wear_leveling
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from nexus_ext.errors import ConfigError
from nexus_ext.sli.downloads import ParallelDownloader
from nexus_ext.sli.layer_cache import LayerCache
from nexus_ext.sli.pipeline import ComputeIOOverlap
from nexus_ext.sli.prefetch import Prefetcher
from nexus_ext.sli.prefetch_counts import verdicts
from nexus_ext.sli.presets import PRESETS
from nexus_ext.sli.wear import SSDWearLeveling

__all__ = ["ComputeIOOverlap", "IOOptimizer", "ParallelDownloader", "SSDWearLeveling"]


class IOOptimizer:
    """Serves the layers of models: from the cache, else from the model's own files.

    Layers of a model on this machine are read in place into the memory tier; the disk tier gets no
    copy of what is on disk already. A hub id is downloaded once, into the hub's own cache.

    Attributes:
        layer_cache: As given; not closed by `close`.
        prefetcher: What fetches ahead; for `ComputeIOOverlap`.
        downloader: None where parallel downloads are off.
        wear_leveling: None where it is off.
    """

    def __init__(
        self,
        layer_cache: LayerCache,
        enable_prefetch: bool = True,
        prefetch_lookahead: int = 2,
        enable_wear_leveling: bool = False,
        enable_parallel_download: bool = True,
        max_concurrent_downloads: int = 8,
        *,
        learn_order: bool = True,
    ) -> None:
        """Start nothing yet.

        Args:
            layer_cache: Where layers are looked for first, and kept.
            enable_prefetch: Whether layers are fetched ahead.
            prefetch_lookahead: How many.
            enable_wear_leveling: Whether to offer zones for files of the user's own, in the
                cache's folder; see `SSDWearLeveling` for what that is worth.
            enable_parallel_download: Whether files are downloaded several at a time.
            max_concurrent_downloads: How many.
            learn_order: Whether what is fetched ahead follows the order in which layers were asked
                for before; else, and before it is known, it is the next numbers.

        Raises:
            ConfigError: A value that cannot be.
        """
        if not isinstance(layer_cache, LayerCache):
            raise ConfigError(
                f"an optimizer needs a LayerCache, got a {type(layer_cache).__name__}."
            )
        self.layer_cache = layer_cache
        connections = max_concurrent_downloads if enable_parallel_download else 1
        self.downloader = ParallelDownloader(connections) if enable_parallel_download else None
        self.prefetcher = Prefetcher(
            layer_cache,
            lookahead=prefetch_lookahead if enable_prefetch else 0,
            learns_order=learn_order,
            max_connections=connections,
        )
        self.wear_leveling = None
        if enable_wear_leveling:
            self.wear_leveling = SSDWearLeveling(layer_cache.folders[0] / "zones")

    @classmethod
    def preset(cls, name: str, layer_cache: LayerCache, **options: Any) -> IOOptimizer:
        """One of the guide's configurations, as `LayerCache.preset`. Options given here win."""
        if name not in PRESETS:
            raise ConfigError(f"a preset is one of {', '.join(PRESETS)}; got {name!r}.")
        return cls(layer_cache, **{**PRESETS[name].optimizer, **options})

    def get_layer_with_prefetch(
        self, model_id: str | Path, layer_idx: int, num_layers: int | None = None
    ) -> nn.Module:
        """A layer, ready to be called; the next ones are fetched while it computes.

        Blocks until it is there. It is the caller's own, and frozen and in eval mode if it comes
        from the model's files. A transformers block called with hidden states alone (from position
        0 on) gets what its model would give it beside them: positions and masks.

        Args:
            model_id: A name under which layers were cached, a folder, or a hub id.
            layer_idx: From 0 on.
            num_layers: Of the model; None finds out.

        Raises:
            ConfigError: Numbers that cannot be; a model that is neither cached nor found.
            StreamError: A model whose weights do not lie in its files as layers have them.
            NexusError: The bytes cannot be read.
            EngineClosed: Closed before.
        """
        return self.prefetcher.get(model_id, layer_idx, num_layers)

    def get_stats(self) -> dict[str, Any]:
        """What happened, by part: "prefetcher" (see `PrefetchCounts.report`), "downloader"
        (active_downloads, bytes_received, ...), "cache" (see `LayerCache.get_stats`),
        "wear_leveling" (bytes written by zone), and "verdicts": the guide's targets beside these.
        """
        prefetcher = self.prefetcher.stats()
        stats: dict[str, Any] = {
            "prefetcher": prefetcher,
            "downloader": _downloads(self.downloader),
            "cache": self.layer_cache.get_stats(),
            "verdicts": verdicts(prefetcher),
        }
        if self.wear_leveling is not None:
            stats["wear_leveling"] = self.wear_leveling.written_bytes()
        return stats

    def close(self) -> None:
        """Wait for reads under way and cancel downloads. The cache stays open."""
        self.prefetcher.close()
        if self.downloader is not None:
            self.downloader.close()

    def __enter__(self) -> IOOptimizer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _downloads(downloader: ParallelDownloader | None) -> dict[str, Any]:
    if downloader is None:
        return {"active_downloads": 0}
    stats = downloader.get_stats()
    return {name: getattr(stats, name) for name in stats.__dataclass_fields__}
