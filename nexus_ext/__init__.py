"""nexus_ext: run PyTorch models that do not fit.

    import nexus_ext as nexus

    model = nexus.from_pretrained("path/or/hub-id", budget="1GiB")
    model = nexus.stream(module, "checkpoint/", budget="1GiB", groups="model.layers")
    nexus.stats(model)
    nexus.close(model)

Importing this package touches no device and opens no file.
"""

from __future__ import annotations

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.errors import NexusError
from nexus_ext.export import export, load_package
from nexus_ext.module import close, plan_of, save_hotness, stats, stream, stream_all
from nexus_ext.plan import Plan
from nexus_ext.pretrained import convert, from_pretrained
from nexus_ext.profiling import Stats
from nexus_ext.quant import (
    INT8Config,
    MixedConfig,
    NF4Config,
    get_int8_config,
    get_mixed_config,
    get_nf4_config,
    quantize_layer,
)
from nexus_ext.subclass import StreamedModule

__all__ = [
    "Checkpoint",
    "INT8Config",
    "MixedConfig",
    "NF4Config",
    "NexusError",
    "Plan",
    "Stats",
    "StreamedModule",
    "close",
    "convert",
    "export",
    "from_pretrained",
    "get_int8_config",
    "get_mixed_config",
    "get_nf4_config",
    "load_package",
    "plan_of",
    "quantize_layer",
    "save_hotness",
    "stats",
    "stream",
    "stream_all",
]
