"""Packed weights: what they mean, how they are stored, how they are made.

reference     what each op computes, in plain PyTorch
registration  fakes and gradients of the ops
packing       parts to a weight, or to a product with one
formats       which tensors of a checkpoint are one packed weight
config        what to pack, and how
packed        a weight to its parts
layer         a module's Linear layers, in memory
convert       a whole checkpoint, group by group
"""

from nexus_ext.quant.config import (
    INT8Config,
    MixedConfig,
    NF4Config,
    QuantConfig,
    get_int8_config,
    get_mixed_config,
    get_nf4_config,
)
from nexus_ext.quant.layer import PackedLinear, quantize_layer

__all__ = [
    "INT8Config",
    "MixedConfig",
    "NF4Config",
    "PackedLinear",
    "QuantConfig",
    "get_int8_config",
    "get_mixed_config",
    "get_nf4_config",
    "quantize_layer",
]
