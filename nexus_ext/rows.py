"""Weights that are read by rows: a projection in tiles of rows, an embedding row by row.

    x ──▶ streamed_linear ──▶ tile 0 │ tile 1 │ ... ──▶ y      tile k+1 is read while k computes
    ids ──▶ streamed_embedding ──▶ their rows ──▶ y            nothing else is read

Both ops are pure: functions of their inputs and of the checkpoint, named by a 0-dim id. Owns the
table of what the ids stand for. Backward of a projection reads its tiles again and saves none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from nexus_ext import ops
from nexus_ext.checkpoint import Entry, Extent, Group, Member
from nexus_ext.engine import Engine
from nexus_ext.errors import EngineClosed, StreamError

__all__ = ["RowTable", "TiledWeight", "forget", "remember", "tiles_of"]

# Results of a matmul are as good as equal for tiles of a multiple of this many rows: kernels take
# this many columns at a time.
_TILE_ROWS = 64


def tiles_of(entry: Entry, tile_bytes: int) -> list[Group]:
    """Cut a matrix [out, in] into groups of whole rows, about `tile_bytes` each, in order."""
    num_rows, _ = entry.shape
    row_bytes = entry.nbytes // num_rows
    step = max(1, tile_bytes // row_bytes // _TILE_ROWS) * _TILE_ROWS
    tiles = []
    for begin in range(0, num_rows, step):
        shape = (min(step, num_rows - begin), entry.shape[1])
        nbytes = shape[0] * row_bytes
        name = f"{entry.name}[{begin}:{begin + shape[0]}]"
        extent = Extent(entry.file, entry.offset + begin * row_bytes, nbytes, 0)
        member = Member(name, entry.dtype, shape, 0, nbytes)
        tiles.append(Group(name, (member,), (extent,), nbytes))
    return tiles


@dataclass(frozen=True)
class Tile:
    """Rows of a matrix while they are acquired: `weight` [rows, in] lies in `arena`."""

    id: torch.Tensor
    arena: torch.Tensor
    weight: torch.Tensor


class TiledWeight:
    """A matrix [out, in] whose tiles take turns in a few arenas. Owned by a streamer."""

    def __init__(self, engine: Engine, tiles: Sequence[tuple[int, Group, torch.Tensor]]) -> None:
        """Args:
        engine: Who moves the tiles.
        tiles: Number in the engine, group and arena of each, in order of rows.
        """
        self._tiles = [
            Tile(engine.group_id(number), arena, _weight_in(arena, group.members[0]))
            for number, group, arena in tiles
        ]
        self.id = self._tiles[0].id
        self.shape = (sum(len(tile.weight) for tile in self._tiles), self._tiles[0].weight.shape[1])

    def __len__(self) -> int:
        return len(self._tiles)

    def parts(self, *, backwards: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """Each tile's rows and weight, while it is acquired. Blocks until it has landed.

        Backwards the tile read last comes first: it is still there.
        """
        end = self.shape[0] if backwards else 0
        for tile in reversed(self._tiles) if backwards else self._tiles:
            rows = (
                slice(end - len(tile.weight), end)
                if backwards
                else slice(end, end + len(tile.weight))
            )
            end = rows.start if backwards else rows.stop
            ops.call(ops.native.acquire_.held, tile.arena, tile.id, tile.id, tile.id)
            try:
                yield rows, tile.weight
            finally:
                ops.call(ops.native.release_, tile.arena, tile.id, [], tile.id)


def _weight_in(arena: torch.Tensor, member: Member) -> torch.Tensor:
    return arena[: member.nbytes].view(member.dtype).view(member.shape)


class RowTable:
    """A matrix [num, dim] whose rows are read one by one. Owned by a streamer."""

    def __init__(self, engine: Engine, number: int, entry: Entry) -> None:
        self.id = engine.group_id(number)
        self.shape = entry.shape
        self.dtype = entry.dtype
        self._engine = engine
        self._entry = entry

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows that `ids` (integers, any shape) name: [*ids.shape, dim], where the ids are.
        Blocks; ids on a GPU are waited for, as the host must know them.

        Raises:
            StreamError: An id that is no row, or no integer.
            ReadError, TruncatedCheckpoint, CheckpointChanged: The bytes cannot be had.
        """
        entry = self._entry
        num_rows, dim = entry.shape
        if ids.dtype not in (torch.int32, torch.int64):
            raise StreamError(
                f"Ids of {entry.name} must be int64 or int32, got {ids.dtype}; convert them."
            )
        flat = ids.reshape(-1).to("cpu", torch.int64).contiguous()
        if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < num_rows:
            raise StreamError(
                f"Ids of {entry.name} must lie in [0, {num_rows}), got {int(flat.min())} to "
                f"{int(flat.max())}. Check the tokenizer, or resize the embedding."
            )
        out = torch.empty(flat.numel(), dim, dtype=entry.dtype)
        as_bytes = out.view(torch.uint8)
        self._engine.read_rows(as_bytes, flat, entry.file, entry.offset, num_rows)
        return out.to(ids.device).view(*ids.shape, dim)


# What ids stand for. Filled and emptied by streamers.
_known: dict[int, TiledWeight | RowTable] = {}


def remember(thing: TiledWeight | RowTable) -> None:
    """Let ops find it by its id, until `forget`."""
    _known[int(thing.id)] = thing


def forget(thing: TiledWeight | RowTable) -> None:
    """From now on its id names nothing; may be called twice."""
    _known.pop(int(thing.id), None)


def _lookup(kind: type[Any], id_: torch.Tensor) -> Any:
    thing = _known.get(int(id_))
    if not isinstance(thing, kind):
        raise EngineClosed(
            f"An id must name weights of a model that streams; {int(id_)} names none. The model "
            "was closed, or the graph was saved by another process. Stream the model again."
        )
    return thing


def _check(what: str, rule: object, got: object) -> None:
    """An id can come from a graph that was saved, and name a weight that it does not mean."""
    if got != rule:
        raise StreamError(
            f"{what} of this weight must be {rule}, got {got}. The id names another weight than "
            "the graph was made for: stream the model, then export or compile it again."
        )


# -- kernels -------------------------------------------------------------------------------------


@torch.library.impl("nexus::streamed_linear", ("CPU", "CUDA"))
def _linear(
    x: torch.Tensor, bias: torch.Tensor | None, weight_id: torch.Tensor, out_features: int
) -> torch.Tensor:
    weight: TiledWeight = _lookup(TiledWeight, weight_id)
    _check("Shape", list(weight.shape), [out_features, x.shape[-1]])
    if bias is not None:
        _check("Shape of a bias", [weight.shape[0]], list(bias.shape))
    if len(weight) == 1:
        for _, tile in weight.parts():
            only = functional.linear(x, tile.to(x.dtype), bias)
        return only
    flat = x.reshape(-1, x.shape[-1])
    out = x.new_empty(len(flat), out_features)
    for rows, tile in weight.parts():
        part = None if bias is None else bias[rows]
        out[:, rows] = functional.linear(flat, tile.to(x.dtype), part)
    return out.view(*x.shape[:-1], out_features)


@torch.library.impl("nexus::streamed_linear_grad", ("CPU", "CUDA"))
def _linear_grad(grad: torch.Tensor, weight_id: torch.Tensor, in_features: int) -> torch.Tensor:
    weight: TiledWeight = _lookup(TiledWeight, weight_id)
    _check("Shape", list(weight.shape), [grad.shape[-1], in_features])
    flat = grad.reshape(-1, grad.shape[-1])
    # Rounding to less than float32 once a tile would add up.
    is_short = grad.dtype.itemsize < 4 and len(weight) > 1
    sum_dtype = torch.float32 if is_short else grad.dtype
    out = torch.zeros(len(flat), in_features, dtype=sum_dtype, device=grad.device)
    for rows, tile in weight.parts(backwards=True):
        out += flat[:, rows] @ tile.to(grad.dtype)
    return out.to(grad.dtype).view(*grad.shape[:-1], in_features)


@torch.library.impl("nexus::streamed_embedding", ("CPU", "CUDA"))
def _embedding(
    ids: torch.Tensor, table_id: torch.Tensor, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    table: RowTable = _lookup(RowTable, table_id)
    _check("Row and dtype", (table.shape[1], table.dtype), (dim, dtype))
    return table.rows(ids)


# -- fakes: they touch no engine -------------------------------------------------------------------


@torch.library.register_fake("nexus::streamed_linear")  # type: ignore[untyped-decorator]
def _linear_fake(
    x: torch.Tensor, bias: torch.Tensor | None, weight_id: torch.Tensor, out_features: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("nexus::streamed_linear_grad")  # type: ignore[untyped-decorator]
def _linear_grad_fake(
    grad: torch.Tensor, weight_id: torch.Tensor, in_features: int
) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], in_features)


@torch.library.register_fake("nexus::streamed_embedding")  # type: ignore[untyped-decorator]
def _embedding_fake(
    ids: torch.Tensor, table_id: torch.Tensor, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    return ids.new_empty(*ids.shape, dim, dtype=dtype)


# -- gradients: each of the two products is the other's --------------------------------------------


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bias, weight_id, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight_id)


def _linear_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (weight_id,) = ctx.saved_tensors
    wants_x, wants_bias = ctx.needs_input_grad[:2]
    grad_x = ops.native.streamed_linear_grad(grad, weight_id, ctx.in_features) if wants_x else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if wants_bias else None
    return grad_x, grad_bias, None, None


def _linear_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, weight_id, _ = inputs
    ctx.out_features = grad.shape[-1]
    ctx.save_for_backward(weight_id)


def _linear_grad_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (weight_id,) = ctx.saved_tensors
    return ops.native.streamed_linear(grad, None, weight_id, ctx.out_features), None, None


torch.library.register_autograd(
    "nexus::streamed_linear", _linear_backward, setup_context=_linear_setup
)
torch.library.register_autograd(
    "nexus::streamed_linear_grad", _linear_grad_backward, setup_context=_linear_grad_setup
)
