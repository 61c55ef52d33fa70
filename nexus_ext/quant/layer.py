"""`quantize_layer`: a module's Linear layers packed in memory, without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nexus_ext.errors import ConfigError
from nexus_ext.quant.config import INT8Config, NF4Config, QuantConfig, config_of
from nexus_ext.quant.packed import Packed, pack

__all__ = ["PackedLinear", "quantize_layer"]


class PackedLinear(nn.Module):
    """A Linear whose weight [out, in] is packed; its parts are buffers.

    Inputs of any float dtype: the weight is rounded to theirs. The weight has no gradient, the
    input and the bias do. `to(dtype)` and `half()` convert the bias and leave the parts.
    """

    def __init__(self, packed: Packed, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.packing.shape
        self.packing = packed.packing
        for name, part in packed.parts.items():
            self.register_buffer(name, part)
        self._part_names = tuple(packed.parts)
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """Decoded: a new tensor, float32 if there is no bias to say otherwise."""
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        return self.packing.decode(self._parts(), dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.packing.linear(input, self._parts(), self.bias)

    def _parts(self) -> dict[str, torch.Tensor]:
        return {name: self._buffers[name] for name in self._part_names}  # type: ignore[misc]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Parts mean what they mean in their own dtype: only their device follows."""
        parts = self._parts()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in parts.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != part.dtype:
                self._buffers[name] = part.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.packing}"


def quantize_layer(
    layer: nn.Module, mode: str = "nf4", config: QuantConfig | None = None
) -> nn.Module:
    """Pack the Linear layers of a module, in memory.

    Args:
        layer: A Linear, or a module with some; those are replaced in it, once each.
        mode: As `weights` in `convert`; not looked at if there is a config.
        config: As `get_nf4_config()` etc. return it.

    Returns:
        The module; for a Linear, the `PackedLinear` that takes its place.

    Raises:
        ConfigError: An unknown mode, or a module without a Linear.
        QuantizationError: A weight that is not finite, or of integers or float8.
    """
    chosen = config_of(mode if config is None else config)
    if type(layer) is nn.Linear:
        own = chosen.of_module("")
        return layer if own is None else _packed(layer, own, "the layer")
    made: dict[int, nn.Module] = {}
    places: list[tuple[str, int]] = []
    for name, module in layer.named_modules(remove_duplicate=False):
        own = chosen.of_module(name)
        if type(module) is nn.Linear and own is not None:
            places.append((name, id(module)))
            if id(module) not in made:
                made[id(module)] = _packed(module, own, name)
    # Nothing is replaced unless everything can be packed.
    for name, key in places:
        path, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(path), leaf, made[key])
    if not made:
        raise ConfigError(
            f"quantize_layer packs nn.Linear modules; {type(layer).__name__} has none to pack. "
            "Pass one that has, or look at the config's patterns."
        )
    return layer


def _packed(linear: nn.Linear, config: NF4Config | INT8Config, name: str) -> PackedLinear:
    made = PackedLinear(pack(linear.weight.detach(), config, name), linear.bias)
    return made.train(linear.training)
