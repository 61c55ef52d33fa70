"""Where a prefetcher's layers come from: the cache, else the model's own files."""

from __future__ import annotations

import torch
from torch import nn

from nexus_ext.sli.layer_cache import LayerCache
from nexus_ext.sli.loaded import Loaded
from nexus_ext.sli.source import ModelSource, page_memory
from nexus_ext.sli.sources import fetched_source_of, source_of

__all__ = ["Loader"]


class Loader:
    """Thread-safe."""

    def __init__(self, cache: LayerCache, max_connections: int) -> None:
        """Open nothing yet.

        Args:
            cache: Asked first; its memory keeps what is read from a model's own files.
            max_connections: Of downloads, for models that are not on this machine.
        """
        self._cache = cache
        self._max_connections = max_connections
        self._sources: dict[str, ModelSource] = {}

    def num_layers(self, model: str) -> int:
        """See `Prefetcher.num_layers`."""
        source = self._sources.get(model) or source_of(model)
        if source is None:
            cached = self._cache.layers(model)
            count = next((i for i, index in enumerate(cached) if i != index), len(cached))
            if count:
                return count
        return self._source(model).num_layers

    @torch.inference_mode(False)  # a layer outlives the mode that is on now
    def load(self, model: str, index: int) -> Loaded:
        """A layer's bytes. Blocks until they are there. Raises as `Prefetcher.get`."""
        cached = self._cache.load(model, index)
        if cached is not None:
            return cached
        source = self._source(model)

        def build(payload: torch.Tensor) -> nn.Module:
            return source.build(index, payload)

        def read(memory: torch.Tensor) -> None:
            source.read(index, memory)

        ram, digest = self._cache.ram, source.digest(index)
        payload = ram.load(digest)
        if payload is not None:
            return Loaded(payload, "memory", digest, build)
        nbytes, phase = source.nbytes(index), source.phase(index)
        payload = ram.fill(digest, nbytes, read, phase=phase)
        if payload is None:
            payload = page_memory(nbytes, phase)
            read(payload)
        return Loaded(payload, "source", digest, build)

    def _source(self, model: str) -> ModelSource:
        source = self._sources.get(model)
        if source is None:
            source = fetched_source_of(model, max_connections=self._max_connections)
            self._sources[model] = source
        return source
