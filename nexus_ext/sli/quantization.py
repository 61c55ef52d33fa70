"""The guide's names for packing layers in memory: `nexus_ext.quant` does it."""

from __future__ import annotations

from torch import nn

from nexus_ext.quant import (
    INT8Config,
    MixedConfig,
    NF4Config,
    QuantConfig,
    get_int8_config,
    get_mixed_config,
    get_nf4_config,
)
from nexus_ext.quant import quantize_layer as _quantize
from nexus_ext.sli.storing import named_tensors

__all__ = [
    "INT8Config",
    "MixedConfig",
    "NF4Config",
    "get_int8_config",
    "get_mixed_config",
    "get_nf4_config",
    "quantize_layer",
]


def quantize_layer(
    layer: nn.Module, mode: str = "nf4", config: QuantConfig | None = None
) -> nn.Module:
    """Pack the Linear layers of a module; see `nexus_ext.quantize_layer`.

    What is not packed gets memory of its own. Tensors of a layer out of a cache are views of all of
    its bytes, which torch.save would write, and which would stay in memory.

    Args:
        layer: A Linear, or a module with some; those are replaced in it.
        mode: "nf4", "nf4-nested", "nf4-fine", "int8" or "mixed" (INT8 for attention, NF4 for the
            rest); not looked at if there is a config.
        config: As `get_nf4_config()` etc. return it.

    Raises:
        ConfigError: An unknown mode, or a module without a Linear.
        QuantizationError: A weight that is not finite, or of integers or float8.
    """
    packed = _quantize(layer, mode, config)
    for _, tensor in named_tensors(packed):
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor.data = tensor.data.clone()
    return packed
