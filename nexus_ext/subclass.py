"""The classes of a streamed model: each module keeps its own, one subclass deeper, same name.

block    forward() first acquires the block's group
owner    `weight` and the like are read from the group's arena
by rows  a Linear or an Embedding computes with weights that are read by rows
packed   a Linear computes with the parts of its weight; others read it decoded
root     forward() runs in one thread at a time
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from nexus_ext import ops
from nexus_ext.attachment import (
    Attachment,
    GroupSlot,
    parts_of,
    reading,
    reading_packed,
    tensors_in,
)
from nexus_ext.errors import StreamError
from nexus_ext.quant.packing import Packing

__all__ = ["StreamedModule", "restore_all", "subclass_all"]

M = Any  # a module: mypy cannot say "the same class, with one more base"


class StreamedModule(nn.Module):
    """What the root of a streamed model is, besides what it was."""

    _nexus: Attachment

    def __enter__(self) -> StreamedModule:
        return self

    def __exit__(self, *exc: object) -> None:
        self._nexus.close()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Only where the model is already: weights live where they stream to."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None or (device is not None and not self._is_on(device)):
            _refuse(self, "moved or converted")
        return self

    def _is_on(self, device: torch.device) -> bool:
        here = self._nexus.streamer.device.torch_device
        return device.type == here.type and device.index in (None, here.index)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Only False: streamed weights are frozen. Unfreeze adapters by themselves."""
        if requires_grad:
            _refuse(self, "trained as a whole")
        return super().requires_grad_(False)


def _refuse(module: nn.Module, what: str) -> NoReturn:
    raise StreamError(
        f"A streamed model cannot be {what}: the weights of {type(module).__name__} are on disk. "
        "Close it and stream it again as you need it."
    )


def _as_linear_would(
    x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The input and the bias in the dtype that F.linear computes in, for a weight of `dtype`."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        lower = torch.get_autocast_dtype(x.device.type)
        return x.to(lower), None if bias is None else bias.to(lower)
    if x.dtype != dtype:
        raise StreamError(
            f"A projection's input must have the dtype of its weight, {dtype}, got {x.dtype}; "
            "convert the input."
        )
    return x, bias


class _RowsLinear(nn.Linear):
    """Stands where nn.Linear stood among the bases: a subclass's forward still comes first."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x, bias = _as_linear_would(input, self.bias, self.weight.dtype)
        result: torch.Tensor = ops.native.streamed_linear(
            x, bias, self._nexus_row_id, self.out_features
        )
        return result


class _PackedLinear(nn.Linear):
    """As `_RowsLinear`. The weight is never decoded as a whole where the kernel knows better."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        parts = parts_of(self, "weight")
        if parts is None:  # another weight for one call; or the stand-in, which refuses
            return super().forward(input)
        this: M = self
        packing: Packing = this._nexus_packed["weight"]
        x, bias = _as_linear_would(input, self.bias, this._parameters["weight"].dtype)
        return packing.linear(x, parts, bias)


class _PackedEmbedding(nn.Embedding):
    """As `_PackedLinear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        parts = parts_of(self, "weight")
        if parts is None:
            return super().forward(input)
        this: M = self
        packing: Packing = this._nexus_packed["weight"]
        return packing.rows(input, parts, this._parameters["weight"].dtype)


class _RowsEmbedding(nn.Embedding):
    """As `_RowsLinear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = ops.native.streamed_embedding(
            input, self._nexus_row_id, self.embedding_dim, self.weight.dtype
        )
        return result


@dataclass(frozen=True)
class _Kind:
    """What makes the class of a module; alike modules share one, so that they compile once."""

    base: type[nn.Module]
    names: tuple[str, ...]  # plain parameters that are read in an arena
    packed: tuple[str, ...]  # packed ones
    is_block: bool
    is_part: bool  # of a block
    is_by_rows: bool
    is_root: bool

    @classmethod
    def of(cls, module: nn.Module, model: nn.Module) -> _Kind:
        own = module.__dict__
        packed = tuple(sorted(own.get("_nexus_packed", ())))
        names = tuple(sorted(own.get("_nexus_tensors", {}).keys() - set(packed)))
        return cls(
            type(module),
            names,
            packed,
            "_nexus_group" in own,
            "_nexus_slot" in own,
            "_nexus_row_id" in own,
            module is model,
        )

    @property
    def is_plain(self) -> bool:
        return not (self.names or self.packed or self.is_block or self.is_by_rows or self.is_root)

    @property
    def bases(self) -> tuple[type[nn.Module], ...]:
        bases: tuple[type[nn.Module], ...] = (self.base,)
        ours: type[nn.Module] | None = None
        if self.is_by_rows:
            ours = _RowsLinear if issubclass(self.base, nn.Linear) else _RowsEmbedding
        elif "weight" in self.packed and issubclass(self.base, nn.Linear):
            ours = _PackedLinear
        elif "weight" in self.packed and issubclass(self.base, nn.Embedding):
            ours = _PackedEmbedding
        if ours is not None:
            bases = (ours,) if issubclass(ours, self.base) else (self.base, ours)
        return (StreamedModule, *bases) if self.is_root else bases


def subclass_all(model: nn.Module) -> None:
    """Give every module that streams something, and the root, its class."""
    for module in list(model.modules()):
        kind = _Kind.of(module, model)
        if not kind.is_plain:
            module.__class__ = _streamed_class(kind)


def restore_all(model: nn.Module) -> None:
    """Give every module its own class back; parameters stay on meta."""
    for module in model.modules():
        for name in [name for name in module.__dict__ if name.startswith("_nexus_")]:
            del module.__dict__[name]
        base = type(module).__dict__.get("_nexus_base")
        if base is not None:
            module.__class__ = base


@functools.cache
def _streamed_class(kind: _Kind) -> type[nn.Module]:
    base = kind.base
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_nexus_base": base,
        "_apply": lambda self, *args, **kwargs: _refuse(self, "moved or converted"),
        "_load_from_state_dict": lambda self, *args, **kwargs: _refuse(self, "loaded into"),
        "__deepcopy__": lambda self, memo: _refuse(self, "copied"),
        "__reduce_ex__": lambda self, protocol: _refuse(self, "pickled or copied"),
    }
    for name in kind.names:
        namespace[name] = property(reading(name))
    for name in kind.packed:
        namespace[name] = property(reading_packed(name))
    if kind.names or kind.packed:
        namespace["register_parameter"] = _registering(base, (*kind.names, *kind.packed))
    made: Any = type(base.__name__, kind.bases, namespace)
    if kind.is_block:
        made.forward = _acquiring(made.forward)
    elif kind.is_part:
        made.forward = _acquiring_if_needed(made.forward)
    if kind.is_root:
        made.forward = _serialised(made.forward)
    return made  # type: ignore[no-any-return]


def _registering(base: type[nn.Module], names: tuple[str, ...]) -> Callable[..., None]:
    """nn.Module assigns parameters through here, past any property."""

    def register_parameter(self: M, name: str, param: nn.Parameter | None) -> None:
        if name in names:
            raise StreamError(
                f"A streamed parameter cannot be assigned; {name!r} of {type(self).__name__} is "
                "read from the checkpoint. Change it there, or leave this block out of `groups`."
            )
        base.register_parameter(self, name, param)

    return register_parameter


def _acquiring(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward."""

    @functools.wraps(forward)
    def acquire_then_forward(self: M, *args: Any, **kwargs: Any) -> Any:
        return _with_group(self._nexus_group, forward, self, args, kwargs)

    return acquire_then_forward


def _acquiring_if_needed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a part of a block, which others than the block may call."""

    @functools.wraps(forward)
    def forward_at_any_time(self: M, *args: Any, **kwargs: Any) -> Any:
        slot = self._nexus_slot
        if slot.is_open if torch.compiler.is_compiling() else slot.is_ready:
            return forward(self, *args, **kwargs)
        return _with_group(slot, forward, self, args, kwargs)

    return forward_at_any_time


def _with_group(
    slot: GroupSlot,
    forward: Callable[..., Any],
    module: M,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if torch.compiler.is_compiling():
        tensors = tensors_in([*args, *kwargs.values()])
        _refuse_gradients(slot, tensors)
        # What is computed from: acquire_ is ordered after it.
        slot.acquire_compiled(tensors[0] if tensors else slot.id)
        try:
            result = forward(module, *args, **kwargs)
        finally:
            slot.close_compiled()
        # A tensor that is neither argument nor parameter may have wanted one.
        _refuse_gradients(slot, tensors_in(result))
        slot.release_compiled(result)
        return result
    outer = slot.enter()
    try:
        if slot.is_resident or not torch.is_grad_enabled():
            return forward(module, *args, **kwargs)
        with slot.places_saved():
            return forward(module, *args, **kwargs)
    finally:
        slot.leave(outer)


def _refuse_gradients(slot: GroupSlot, tensors: list[torch.Tensor]) -> None:
    """A compiled backward would read an arena that was refilled meanwhile, and nothing would tell.

    Eager code saves places instead: see `GroupSlot.places_saved`.
    """
    if not torch.is_grad_enabled() or slot.is_resident:
        return
    if slot.trains() or any(tensor.requires_grad for tensor in tensors):
        raise StreamError(
            "A compiled streamed block computes no gradients, and its input, its output or a "
            "parameter of its own requires one. Run it under torch.no_grad(), or do not compile it."
        )


def _num_positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many positions of each sequence go through, where the input says it by its shape."""
    named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids"))
    found = [*named, *args[:1]]
    for value in found:
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            return value.shape[1]
    return None


def _serialised(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def forward_in_one_thread(self: M, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        with self._nexus.one_pass(_num_positions(args, kwargs)):
            return forward(self, *args, **kwargs)

    return forward_in_one_thread
