"""The one door to native code: loads it, gives its ops fakes, turns its errors into typed ones.

Every schema stands in csrc/library.cpp. Importing this module touches no device and opens no file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from nexus_ext import _native
from nexus_ext.errors import from_native

__all__ = ["acquire_", "call", "call_checked", "native"]

P = ParamSpec("P")
T = TypeVar("T")

native = torch.ops.nexus
_check: Any = torch._check  # untyped

# The stable ABI takes tags from torch 2.12 on, and we build for 2.11. acquire_ waits on the host,
# which a CUDA graph cannot replay: the compiler must cut the graph around it.
for _op in (native.acquire_.default, native.acquire_.held, native.release_.default):
    _op.tags.append(torch.Tag.cudagraph_unsafe)


def _check_arena(arena: torch.Tensor) -> None:
    _check(arena.dtype == torch.uint8 and arena.dim() == 1)


@torch.library.register_fake("nexus::acquire_")  # type: ignore[untyped-decorator]
def _acquire_fake(arena: torch.Tensor, dep: torch.Tensor, group_id: torch.Tensor) -> None:
    _check_arena(arena)
    _check(group_id.dtype == torch.int64 and group_id.numel() == 1)


@torch.library.register_fake("nexus::acquire_.held")  # type: ignore[untyped-decorator]
def _acquire_held_fake(
    arena: torch.Tensor, turn: torch.Tensor, dep: torch.Tensor, group_id: torch.Tensor
) -> None:
    _acquire_fake(arena, dep, group_id)


@torch.library.register_fake("nexus::release_")  # type: ignore[untyped-decorator]
def _release_fake(
    arena: torch.Tensor, turn: torch.Tensor, deps: list[torch.Tensor], group_id: torch.Tensor
) -> None:
    _check_arena(arena)


@torch.library.register_fake("nexus::read_blocks_")  # type: ignore[untyped-decorator]
def _read_blocks_fake(
    out: torch.Tensor,
    path: str,
    stamp: list[int],
    offset: int,
    digests: torch.Tensor,
    block_bytes: int,
    io: str,
    allow_uring: bool,
    depth: int,
    faults: list[int],
) -> torch.Tensor:
    _check(out.dtype == torch.uint8 and digests.dtype == torch.int64)
    return digests.new_empty(8)


@torch.library.register_fake("nexus::block_digests")  # type: ignore[untyped-decorator]
def _block_digests_fake(parts: list[torch.Tensor], block_bytes: int) -> torch.Tensor:
    nbytes = sum(part.numel() for part in parts)
    return parts[0].new_empty((nbytes + block_bytes - 1) // block_bytes, dtype=torch.int64)


def call(op: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a native op; what it throws arrives as its `nexus_ext.errors` class.

    Raises:
        NexusError: The typed twin of a native error.
        KeyboardInterrupt: Or whatever a signal handler raised while native code waited.
    """
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        typed = from_native(error)
        if isinstance(typed, KeyboardInterrupt):
            typed = _native.take_interrupt() or typed
        if typed is error:
            raise
        raise typed from None


def call_checked(run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """As `call`, for code that goes on after an op of it has failed, and says nothing: that which
    AOTInductor generates, before torch 2.12.
    """
    _native.take_failure()
    result = call(run, *args, **kwargs)
    if failure := _native.take_failure():
        raise from_native(RuntimeError(failure))
    return result


_acquire: Any = native.acquire_.default


def acquire_(arena: torch.Tensor, dep: torch.Tensor, group_id: torch.Tensor) -> None:
    """Make `arena` hold the group; see the schema. Eager code calls this for typed errors."""
    call(_acquire, arena, dep, group_id)
