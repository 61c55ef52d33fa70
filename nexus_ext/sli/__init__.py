"""Selective layer inference: the guide's names, over the cache and the model's own files.

layer_cache   layers in memory and on disk
io_optimizer  fetching ahead, pipelines, downloads, zones
quantization  packing layers

docs/guide.md says where each of the guide's sentences is true.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from nexus_ext.sli.io_optimizer import (
    ComputeIOOverlap,
    IOOptimizer,
    ParallelDownloader,
    SSDWearLeveling,
)
from nexus_ext.sli.layer_cache import LayerCache
from nexus_ext.sli.quantization import (
    get_int8_config,
    get_mixed_config,
    get_nf4_config,
    quantize_layer,
)
from nexus_ext.sli.sources import fetched_source_of

__all__ = [
    "ComputeIOOverlap",
    "IOOptimizer",
    "LayerCache",
    "ParallelDownloader",
    "SSDWearLeveling",
    "download_from_hub",
    "get_int8_config",
    "get_mixed_config",
    "get_nf4_config",
    "quantize_layer",
]


def download_from_hub(model_id: str | Path, layer_idx: int) -> nn.Module:
    """One layer of a model, from its folder, or from the hub's cache, or downloaded. Blocks.

    Raises:
        ConfigError: No such model, or no such layer.
        NexusError: As `IOOptimizer.get_layer_with_prefetch`.
    """
    return fetched_source_of(str(model_id)).load(layer_idx)
