"""What a transformers block is given beside the hidden states, when it is called alone.

A model computes rotary embeddings and masks once and hands them to its blocks. A block that comes
out of a cache has no such model around it; so its model is asked, without weights, with recorders
in place of the blocks. Nothing is guessed: a block gets what its own model would give it.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from nexus_ext.blocks import find_blocks
from nexus_ext.errors import StreamError
from nexus_ext.pretrained import empty_model

__all__ = ["CallContext"]

# Shapes of inputs whose context is kept: of a prompt, and of a step.
_MOST_KEPT = 4


class _AllRecorded(Exception):
    """The last block was reached; what comes behind it needs weights."""


class _Recorder(nn.Module):
    """Stands for a block: keeps what it is called with."""

    def __init__(self, block: nn.Module, seen: list[dict[str, Any]], num_blocks: int) -> None:
        super().__init__()
        self._block = [block]  # no submodule: attributes are asked for, weights are not
        self._seen = seen
        self._num_blocks = num_blocks

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        takes = inspect.signature(type(self._block[0]).forward).parameters
        self._seen.append(dict(zip(list(takes)[2:], args, strict=False)) | kwargs)
        if len(self._seen) == self._num_blocks:
            raise _AllRecorded
        return hidden_states


class CallContext:
    """What the blocks of one model are called with, by the shape of their input.

    Not for several threads to change; `given` may be called by many.
    """

    def __init__(self, model: nn.Module) -> None:
        """Of a model without weights, which is not changed."""
        self._model = model
        self._known: OrderedDict[tuple[Any, ...], list[dict[str, Any]]] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def is_needed(model: nn.Module, block: nn.Module) -> bool:
        """Whether blocks of this kind depend on what their model computes."""
        takes = inspect.signature(type(block).forward).parameters
        base = _base_of(model)
        has_embeds = "inputs_embeds" in inspect.signature(type(base).forward).parameters
        return "position_embeddings" in takes and has_embeds

    def given(self, index: int, hidden: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of block `index`, for hidden states [batch, positions, width] that
        begin at position 0.
        """
        mode = torch.is_inference_mode_enabled()
        key = (tuple(hidden.shape), hidden.dtype, hidden.device, mode)
        with self._lock:
            if key not in self._known:
                self._known[key] = self._ask(hidden)
                while len(self._known) > _MOST_KEPT:
                    self._known.popitem(last=False)
            return self._known[key][index]

    def origin(self) -> tuple[Any, Any, torch.dtype]:
        """Class, config and dtype of the model."""
        model: Any = self._model
        return type(model), model.config, model.dtype

    def hook(self, index: int) -> _Hook:
        """A forward pre-hook (with keywords) for block `index`."""
        return _Hook(self, index)

    @torch.no_grad()
    def _ask(self, hidden: torch.Tensor) -> list[dict[str, Any]]:
        blocks = find_blocks(self._model, None)
        seen: list[dict[str, Any]] = []
        base = _base_of(self._model)
        try:
            for name, block in blocks:
                _replace(self._model, name, _Recorder(block, seen, len(blocks)))
            base(inputs_embeds=hidden.detach(), use_cache=False)
        except _AllRecorded:
            return seen
        finally:
            for name, block in blocks:
                _replace(self._model, name, block)
        raise StreamError(
            f"A block called alone gets what its model gives it; {type(base).__name__} called "
            f"{len(seen)} of {len(blocks)} blocks. Pass its keyword arguments yourself."
        )


class _Hook:
    """Completes a call that has hidden states and nothing else; any other is its caller's own.

    A copy of a layer shares it; a pickle holds what its model can be built from, and no weights.
    """

    def __init__(self, context: CallContext, index: int) -> None:
        self._context = context
        self._index = index

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        is_alone = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
        if not is_alone or args[0].dim() != 3:
            return None
        return args, dict(self._context.given(self._index, args[0]))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (*self._context.origin(), self._index)


def _rebuilt(kind: Any, config: Any, dtype: torch.dtype, index: int) -> _Hook:
    return CallContext(empty_model(kind, config, dtype)).hook(index)


def _base_of(model: nn.Module) -> nn.Module:
    """The part below the head, which calls the blocks."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    return base if isinstance(base, nn.Module) else model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._modules[leaf] = module
