"""Makes a model's experts modules stream: transformers' registry calls us, and nothing is patched.

Every architecture whose experts module asks `ExpertsInterface` what to run can do this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nexus_ext.attachment import StandIn
from nexus_ext.checkpoint import Checkpoint, Entry
from nexus_ext.errors import MissingExtra
from nexus_ext.experts.find import ExpertLayer
from nexus_ext.experts.layer import StreamedExperts, experts_forward, forget, remember
from nexus_ext.experts.pool import Pool
from nexus_ext.experts.runner import ExpertRunner
from nexus_ext.experts.stats import ExpertStats

__all__ = ["IMPLEMENTATION", "AttachedExperts", "asks_registry", "gates_of", "register"]

IMPLEMENTATION = "nexus"


def register() -> None:
    """Make `experts_implementation="nexus"` known to transformers. May be called twice.

    Raises:
        MissingExtra: transformers is not there, or has no such registry.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        raise MissingExtra(
            "Streaming experts needs transformers 5 with its registry of experts implementations: "
            "pip install 'nexus_ext[hf]'."
        ) from None
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def asks_registry(module: nn.Module) -> bool:
    """Whether a module's forward is transformers' to choose: others compute with their parameters,
    which must be there.
    """
    return hasattr(getattr(module, "config", None), "_experts_implementation")


class AttachedExperts:
    """The experts modules of one streamed model, and who runs them."""

    def __init__(
        self, model: nn.Module, layers: Sequence[ExpertLayer], runner: ExpertRunner
    ) -> None:
        register()
        self.runner = runner
        self._modules: list[StreamedExperts] = []
        self._configs: list[tuple[Any, Any]] = []
        for number, layer in enumerate(layers):
            self._attach(model.get_submodule(layer.path), number, layer)

    def _attach(self, module: nn.Module, number: int, layer: ExpertLayer) -> None:
        experts = StreamedExperts(
            module, number, layer, self.runner, self.runner.store.layer_id(number)
        )
        experts.pool = self._pool_of(module, number, layer)
        remember(experts)
        self._modules.append(experts)
        module.__dict__["_nexus_experts_id"] = experts.id
        where = self.runner.store.device.torch_device
        for name in layer.parameters:
            parameter = module._parameters[name]
            assert parameter is not None
            module._parameters[name] = StandIn.of(
                f"{layer.path}.{name}", tuple(parameter.shape), parameter.dtype, where
            )
        config: Any = module.config
        if all(config is not known for known, _ in self._configs):
            self._configs.append((config, config._experts_implementation))
            config._experts_implementation = IMPLEMENTATION

    def _pool_of(self, module: nn.Module, number: int, layer: ExpertLayer) -> Pool | None:
        """On a GPU a launch for each expert is what one waits for; a CPU need not gather."""
        store = self.runner.store
        classes = {store.class_of[key] for key in self.runner.layers[number]}
        weights = layer.experts[0].weights
        if store.device.is_host or len(classes) > 1 or not Pool.can_hold(weights):
            return None
        return Pool(module, store, classes.pop(), weights)

    def begin_pass(self, num_positions: int | None) -> None:
        """A forward of the model begins, over so many positions of each sequence, if known."""
        self.runner.begin_pass(num_positions)

    def stats(self) -> ExpertStats:
        """A snapshot."""
        return self.runner.stats()

    def close(self) -> None:
        """Stop loading; the model's own implementation is chosen again. May be called twice."""
        for experts in self._modules:
            forget(experts)
        while self._configs:
            config, implementation = self._configs.pop()
            config._experts_implementation = implementation
        self.runner.close()


def gates_of(
    model: nn.Module, checkpoint: Checkpoint, layers: Sequence[ExpertLayer], source: dict[str, str]
) -> list[Entry | None]:
    """Each layer's router where it is a plain matrix [experts, hidden] beside the experts module.

    Args:
        model: Whose layers these are.
        checkpoint: Where routers are.
        layers: Those with experts.
        source: The checkpoint's name of each tensor of the model.
    """
    return [_gate_of(model, checkpoint, layer, source) for layer in layers]


def _gate_of(
    model: nn.Module, checkpoint: Checkpoint, layer: ExpertLayer, source: dict[str, str]
) -> Entry | None:
    parent, _, _ = layer.path.rpartition(".")
    for name, _child in model.get_submodule(parent).named_children():
        entry = checkpoint.entries.get(source.get(f"{parent}.{name}.weight", ""))
        if entry is not None and _is_gate(entry, len(layer.experts)):
            return entry
    return None


def _is_gate(entry: Entry, num_experts: int) -> bool:
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return entry.dtype in floats and len(entry.shape) == 2 and entry.shape[0] == num_experts
