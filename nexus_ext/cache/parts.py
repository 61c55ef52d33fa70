"""What is kept: a sequence of tensors and buffers, one behind the other."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TypeAlias

import torch

from nexus_ext.errors import ConfigError

__all__ = ["Part", "no_bytes", "tensors_of", "view_of"]

Part: TypeAlias = "torch.Tensor | bytes | bytearray | memoryview"


def tensors_of(parts: Sequence[Part]) -> list[torch.Tensor]:
    """The parts as tensors (uint8, 1-D, CPU) over the same memory; only buffers that may not be
    written to are copied.

    Raises:
        ConfigError: A part that is neither a contiguous uint8 tensor on the CPU nor a buffer.
    """
    return [_tensor_of(part) for part in parts]


def _tensor_of(part: Part) -> torch.Tensor:
    if isinstance(part, torch.Tensor):
        if part.dtype != torch.uint8 or part.device.type != "cpu" or not part.is_contiguous():
            raise ConfigError(
                "what is cached is contiguous uint8 on the CPU; got a tensor of "
                f"{part.dtype} on {part.device}, strides {tuple(part.stride())}. "
                "Pass tensor.cpu().contiguous().view(torch.uint8)."
            )
        return part.detach().view(-1)
    view = memoryview(part)
    if not view.contiguous:
        raise ConfigError("what is cached is contiguous; got a buffer with gaps. Copy it first.")
    if view.nbytes == 0:
        return no_bytes()
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)


def view_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, for as long as the tensor lives."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def no_bytes() -> torch.Tensor:
    """A tensor of none."""
    return torch.empty(0, dtype=torch.uint8)
