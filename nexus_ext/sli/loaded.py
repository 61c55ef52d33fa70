"""Bytes of a layer that came from somewhere, and how they become a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from nexus_ext.cache.ram import RamTier

__all__ = ["Loaded"]


class Loaded:
    """One layer, not built yet.

    Attributes:
        payload: The bytes; the caller's own.
        tier: "memory", "ssd", "remote" or "source".
        digest: Names them in the RAM tier.
    """

    def __init__(
        self,
        payload: torch.Tensor,
        tier: str,
        digest: str,
        build: Callable[[torch.Tensor], nn.Module],
    ) -> None:
        self.payload = payload
        self.tier = tier
        self.digest = digest
        self._build = build

    @torch.inference_mode(False)  # a layer outlives the mode that is on now
    def build(self) -> nn.Module:
        """A layer over the payload."""
        return self._build(self.payload)

    @torch.inference_mode(False)
    def copied(self, ram: RamTier) -> Loaded:
        """The same for somebody else: what one writes does not reach the other."""
        payload = ram.load(self.digest)
        own = self.payload.clone() if payload is None else payload
        return Loaded(own, self.tier, self.digest, self._build)
