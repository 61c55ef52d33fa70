"""`ComputeIOOverlap`: one layer after the other, while the next ones are fetched."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

from torch import nn

from nexus_ext.errors import ConfigError, StreamError
from nexus_ext.sli.limits import check_number
from nexus_ext.sli.prefetch import Prefetcher

__all__ = ["ComputeIOOverlap"]

_MOST_DEPTH = 64


class HasPrefetcher(Protocol):
    """What an `IOOptimizer` is to a pipeline."""

    prefetcher: Prefetcher


class ComputeIOOverlap:
    """Pipelines over models, one for each name. Thread-safe; layers of one pipeline are handed out
    once each, in order.
    """

    def __init__(self, prefetcher: Prefetcher | HasPrefetcher, pipeline_depth: int = 2) -> None:
        """Start nothing yet.

        Args:
            prefetcher: An `IOOptimizer`, or its prefetcher.
            pipeline_depth: Layers that are fetched ahead of the one that is computed.

        Raises:
            ConfigError: No prefetcher, or a depth that cannot be.
        """
        check_number("pipeline_depth", pipeline_depth, 1, _MOST_DEPTH)
        found = getattr(prefetcher, "prefetcher", prefetcher)
        if not isinstance(found, Prefetcher):
            raise ConfigError(
                f"a pipeline needs an IOOptimizer or its prefetcher, got a "
                f"{type(prefetcher).__name__}."
            )
        self._prefetcher = found
        self._depth = pipeline_depth
        self._lock = threading.Lock()
        self._next: dict[str, tuple[int, int]] = {}

    def start_pipeline(
        self, model_id: str | Path, start_layer: int = 0, num_layers: int | None = None
    ) -> None:
        """Begin to fetch; a pipeline over this model that runs starts anew. Does not wait for
        layers.

        Args:
            model_id: As in `IOOptimizer.get_layer_with_prefetch`.
            start_layer: The first.
            num_layers: Where it ends; None is what the model has.

        Raises:
            ConfigError: There is no such layer, or no such model.
        """
        name = str(model_id)
        total = self._prefetcher.num_layers(name) if num_layers is None else num_layers
        if not 0 <= start_layer <= total:
            raise ConfigError(f"a pipeline starts at a layer from 0 to {total}, got {start_layer}.")
        with self._lock:
            self._next[name] = start_layer, total
        self._prefetcher.begin(name, range(start_layer, min(start_layer + self._depth, total)))

    def get_next_layer(self, model_id: str | Path) -> nn.Module | None:
        """The next layer; None behind the last one. Blocks until it is there.

        Raises:
            StreamError: The pipeline was not started.
            NexusError: As `Prefetcher.get`; asked again, the same layer is tried again.
        """
        name = str(model_id)
        with self._lock:
            if name not in self._next:
                raise StreamError(
                    f"a pipeline is started before it is asked; call start_pipeline({name!r})."
                )
            index, total = self._next[name]
            if index >= total:
                return None
            self._next[name] = index + 1, total
        try:
            return self._prefetcher.get(name, index, total, lookahead=self._depth)
        except BaseException:
            with self._lock:
                if self._next.get(name) == (index + 1, total):
                    self._next[name] = index, total
            raise
