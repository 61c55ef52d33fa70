"""Which tensors of a checkpoint are packed, how, and which of the experts share a shard.

Linear layers and experts are; routers are not: what they decide is decided by little, and they are
small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.experts.find import ExpertLayer
from nexus_ext.quant.config import INT8Config, NF4Config, QuantConfig
from nexus_ext.quant.stacked import config_for

__all__ = ["Selection"]

# Of the source: experts of a layer share a shard until it has so many. Few files, and little that
# is packed waits in memory.
_MOST_SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Selection:
    """What one conversion packs.

    Attributes:
        config: What was asked for.
        linears: Names of Linear modules by the checkpoint's name of their weight.
        routers: Those of these names that stay as they are.
        experts: Names for experts' weights by the checkpoint's names.
        stacked: Shapes of those that have all experts of a layer.
        beside: Names whose parts are used as one, by each of them: those of gate and up.
        shards: The checkpoint's names of experts, some whole experts each.
    """

    config: QuantConfig
    linears: Mapping[str, str]
    routers: frozenset[str] = frozenset()
    experts: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, Sequence[int]] = field(default_factory=dict)
    beside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shards: Sequence[list[str]] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        checkpoint: Checkpoint,
        layers: Sequence[ExpertLayer],
        config: QuantConfig,
        rename: Callable[[str], str],
    ) -> Selection:
        """Read what there is from the model; names are those of the checkpoint."""
        linears = {
            rename(f"{name}.weight"): name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        weights = [name for layer in layers for name in _expert_weights(model, layer)]
        shapes = {name: checkpoint.entries[name].shape for name in weights}
        joined = [
            names
            for layer in layers
            for expert in layer.experts
            for names in expert.names.values()
            if len(names) > 1
        ]
        return cls(
            config,
            linears,
            frozenset(
                rename(f"{name}.weight") for layer in layers for name in _routers(model, layer)
            ),
            {name: name.removesuffix(".weight") for name in weights},
            {name: shape for name, shape in shapes.items() if len(shape) == 3},
            {name: names for names in joined for name in names},
            [shard for layer in layers for shard in _shards(checkpoint, layer)],
        )

    def name(self, tensor: str) -> str:
        """Of the module, or what comes nearest."""
        return self.experts.get(tensor) or self.linears[tensor]

    def config_of(self, tensor: str) -> NF4Config | INT8Config | None:
        """How to pack a tensor; None leaves it."""
        return self._choice(tensor)[0]

    def compromises(self) -> Iterator[tuple[str, str]]:
        """Tensors that cannot be packed as asked, and why."""
        for tensor in self.stacked:
            why = self._choice(tensor)[1]
            if why:
                yield tensor, why

    def left(self, packed: set[str]) -> list[str]:
        """Linear modules that are not among the packed ones."""
        return [name for name in self.linears.values() if name not in packed]

    def has_experts(self, packed: set[str]) -> bool:
        """Whether experts are among the packed ones."""
        return not packed.isdisjoint(self.experts.values())

    def _choice(self, tensor: str) -> tuple[NF4Config | INT8Config | None, str]:
        if tensor in self.routers or not (tensor in self.linears or tensor in self.experts):
            return None, ""
        asked = self.config.of_module(self.name(tensor))
        shape = self.stacked.get(tensor)
        return (asked, "") if shape is None else config_for(shape, asked)


def _routers(model: nn.Module, layer: ExpertLayer) -> list[str]:
    """Linear modules beside experts that decide about them: a score for each, or one for all."""
    parent = layer.path.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    scores = (len(layer.experts), 1)
    return [
        prefix + name
        for name, module in model.get_submodule(parent).named_modules()
        if isinstance(module, nn.Linear) and module.out_features in scores
    ]


def _expert_weights(model: nn.Module, layer: ExpertLayer) -> list[str]:
    """The checkpoint's tensors with weights of experts, not those with biases."""
    module = model.get_submodule(layer.path)
    weights = [leaf for leaf in layer.parameters if module.get_parameter(leaf).dim() == 3]
    names = [name for e in layer.experts for leaf in weights for name in e.names[leaf]]
    return list(dict.fromkeys(names))


def _shards(checkpoint: Checkpoint, layer: ExpertLayer) -> Iterator[list[str]]:
    """Tensors of experts, whole experts as long as they are not one tensor."""
    shard: list[str] = []
    nbytes = 0
    seen: set[str] = set()
    for expert in layer.experts:
        mine = (name for names in expert.names.values() for name in names)
        own = [name for name in mine if name not in seen]
        own_bytes = sum(checkpoint.entries[name].nbytes for name in own)
        if shard and own and nbytes + own_bytes > _MOST_SHARD_BYTES:
            yield shard
            shard, nbytes = [], 0
        shard += own
        nbytes += own_bytes
        seen.update(own)
    yield shard
