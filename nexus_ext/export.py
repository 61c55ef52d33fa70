"""A streamed block outside Python's eye: torch.export and AOTInductor.

A graph may mutate its buffers, not its constants, so a block is exported with its arena as one. The
exported program computes with that very memory; a package that AOTInductor compiled brings copies,
which `load_package` exchanges for the arena, in this process or in a later one.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import nn

from nexus_ext import ops
from nexus_ext.attachment import GroupSlot
from nexus_ext.errors import StreamError

__all__ = ["export", "load_package"]


def export(
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> torch.export.ExportedProgram:
    """Export one block of a streamed model, as torch.export.export does with any module.

    Gradients are off: the program is for inference. It is right as long as the model streams, and
    may run between eager and compiled passes, in the same thread.

    Args:
        block: A block of a streamed model, not the whole model.
        args, kwargs, dynamic_shapes: As torch.export.export takes them.

    Raises:
        StreamError: Not a block of a streamed model.
    """
    with torch.no_grad():
        return torch.export.export(_Exportable(block), args, kwargs, dynamic_shapes=dynamic_shapes)


def load_package(path: str | os.PathLike[str], block: nn.Module) -> Any:
    """Load what torch._inductor.aoti_compile_and_package made of `export(block, ...)`.

    Args:
        path: The .pt2 package.
        block: The block whose weights it shall compute with: the exported one, or one of the same
            architecture in another process or model.

    Returns:
        A callable with the block's arguments. Keep the model alive as long as it is used. Its
        errors are those of the block.

    Raises:
        StreamError: Not a block of a streamed model, or a package of something else.
    """
    slot = _slot_of(block)
    package = torch._inductor.aoti_load_package(str(path))
    wanted = _buffers_of(slot)
    names = package.get_constant_fqns()
    if not wanted.keys() <= set(names):
        raise StreamError(
            f"A package must come from nexus_ext.export(block, ...); {path} holds the constants "
            f"{', '.join(names) or 'none'}. Export and compile the block again."
        )
    package.load_constants(wanted, check_full_update=False, user_managed=True)
    return functools.partial(ops.call_checked, package)


def _slot_of(block: nn.Module) -> GroupSlot:
    slot = block.__dict__.get("_nexus_group")
    if slot is None:
        raise StreamError(
            f"This needs a block of a streamed model; {type(block).__name__} is none. Pass one of "
            "its layers, for example model.model.layers[0]."
        )
    return slot  # type: ignore[no-any-return]


# inductor writes the values of constants up to 8 elements into its code.
_TOO_LONG_TO_INLINE = 16


def _buffers_of(slot: GroupSlot) -> dict[str, torch.Tensor]:
    return {"arena": slot.arena, "turn": slot.turn, "ids": slot.id.repeat(_TOO_LONG_TO_INLINE)}


class _Exportable(nn.Module):
    """A block whose arena, turn and id are buffers; it is no submodule, so nothing else is."""

    arena: torch.Tensor
    turn: torch.Tensor
    ids: torch.Tensor

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, tensor in _buffers_of(_slot_of(block)).items():
            self.register_buffer(name, tensor, persistent=False)

        @functools.wraps(block.forward)  # the names and defaults that dynamic_shapes goes by
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(block, *args, **kwargs)

        self.forward = forward

    def _run(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slot = _slot_of(block)
        own = slot.arena, slot.turn, slot.id
        # While it is traced, the buffers are what the tracer follows.
        slot.arena, slot.turn, slot.id = self.arena, self.turn, self.ids[:1]
        try:
            return block(*args, **kwargs)
        finally:
            slot.arena, slot.turn, slot.id = own
