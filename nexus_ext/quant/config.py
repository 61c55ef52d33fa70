"""What to pack, and how: the choices of a conversion."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from nexus_ext.errors import ConfigError

__all__ = [
    "INT8Config",
    "MixedConfig",
    "NF4Config",
    "QuantConfig",
    "Weights",
    "config_of",
    "get_int8_config",
    "get_mixed_config",
    "get_nf4_config",
]

Weights = Literal["nf4", "nf4-nested", "nf4-fine", "int8", "mixed"]


@dataclass(frozen=True)
class NF4Config:
    """Four bits an element, and a scale for each block: 4.5 bits, or 4.13 nested.

    Attributes:
        blocksize: Elements that share a scale: a power of two from 32 to 4096. 64 is usual.
        nested: Whether the scales are packed as well ("double quantisation").
        num_scales: Scales tried for each block: 1 is bitsandbytes' (the largest magnitude); more
            make the error smaller and packing slower. The format stays the same.
        skip: Modules to leave as they are: names, or patterns with *.
    """

    blocksize: int = 64
    nested: bool = False
    num_scales: int = 1
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        size = self.blocksize
        if not (isinstance(size, int) and 32 <= size <= 4096 and size & (size - 1) == 0):
            raise ConfigError(f"A blocksize is a power of two from 32 to 4096, got {size!r}.")
        if not (isinstance(self.num_scales, int) and 1 <= self.num_scales <= 1024):
            raise ConfigError(f"num_scales lies in 1..1024, got {self.num_scales!r}.")

    def of_module(self, name: str) -> NF4Config | None:
        """How to pack the module of this name; None leaves it."""
        return None if _fits(name, self.skip) else self


@dataclass(frozen=True)
class INT8Config:
    """Eight bits an element, and a scale for each row.

    Attributes:
        skip: Modules to leave as they are: names, or patterns with *.
    """

    skip: tuple[str, ...] = ()

    def of_module(self, name: str) -> INT8Config | None:
        """How to pack the module of this name; None leaves it."""
        return None if _fits(name, self.skip) else self


@dataclass(frozen=True)
class MixedConfig:
    """Attention and feed-forward layers packed differently.

    Attributes:
        attention: How to pack what fits one of `attention_patterns`; None leaves it.
        feed_forward: How to pack everything else in the blocks; None leaves it.
        attention_patterns: Of names of modules.
    """

    attention: NF4Config | INT8Config | None = INT8Config()
    feed_forward: NF4Config | INT8Config | None = NF4Config()
    attention_patterns: tuple[str, ...] = ("*attn*", "*attention*", "*Attention*")

    def of_module(self, name: str) -> NF4Config | INT8Config | None:
        """How to pack the module of this name; None leaves it."""
        is_attention = _fits(name, self.attention_patterns)
        chosen = self.attention if is_attention else self.feed_forward
        return None if chosen is None else chosen.of_module(name)


QuantConfig = NF4Config | INT8Config | MixedConfig


def get_nf4_config() -> NF4Config:
    """Blocks of 64, plain scales."""
    return NF4Config()


def get_int8_config() -> INT8Config:
    """A scale for each row."""
    return INT8Config()


def get_mixed_config() -> MixedConfig:
    """INT8 for attention, NF4 for feed-forward layers."""
    return MixedConfig()


_NAMED: dict[str, Callable[[], QuantConfig]] = {
    "nf4": get_nf4_config,
    "nf4-nested": lambda: NF4Config(nested=True),
    "nf4-fine": lambda: NF4Config(blocksize=32, nested=True, num_scales=32),
    "int8": get_int8_config,
    "mixed": get_mixed_config,
}


def config_of(weights: str | QuantConfig) -> QuantConfig:
    """A configuration, or that of a name: "nf4", "nf4-nested", "nf4-fine", "int8", "mixed".

    Raises:
        ConfigError: No such name.
    """
    if not isinstance(weights, str):
        return weights
    if weights not in _NAMED:
        raise ConfigError(
            f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}."
        )
    return _NAMED[weights]()


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
