"""What a streamed model holds: which group is acquired now, and where each weight is then.

Note [Where a streamed parameter is]
A parameter that streams has no memory of its own. In `_parameters` stands a stand-in: names, shapes
and dtypes of `state_dict` and `repr` stay what they were, and no stale byte can be taken for a
weight. While its group is acquired, reading the attribute gives a view of the arena; at any other
time the stand-in, which refuses to be computed with.

Note [Backward]
autograd saves what backward will need, weights among it. What lies in an arena is not saved: its
place is, and when backward asks, the group is acquired again. No weight outlives its turn, the
engine sees backward as one more sequence of groups and prefetches it, and a block that is
checkpointed comes through unharmed: hooks that were there before get every other tensor.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from nexus_ext import ops
from nexus_ext.checkpoint import Group, Member
from nexus_ext.errors import StreamError, ThreadConflict
from nexus_ext.quant.formats import PackedWeight
from nexus_ext.quant.packing import Packing
from nexus_ext.streamer import Streamer

__all__ = [
    "Attachment",
    "GroupSlot",
    "StandIn",
    "attachment_of",
    "part_name",
    "parts_of",
    "reading",
    "reading_packed",
    "tensors_in",
    "views",
]

_autograd: Any = torch._C._autograd


def _view(arena: torch.Tensor, member: Member) -> torch.Tensor:
    raw = arena[member.offset : member.offset + member.nbytes]
    return raw.view(member.dtype).view(member.shape)


def views(group: Group, arena: torch.Tensor) -> dict[str, torch.Tensor]:
    """The members of a group as tensors over its arena, by name."""
    return {member.name: _view(arena, member) for member in group.members}


# What may be asked of a weight that has no bytes now. Everything else is refused: torch computes
# with plain meta tensors beside real ones, and gives uninitialised memory (2.13, F.linear).
_METADATA = frozenset(
    [
        "__get__",
        "__set__",
        "__hash__",
        "__len__",
        "__repr__",
        "_is_view",
        "detach",
        "dim",
        "element_size",
        "is_complex",
        "is_conj",
        "is_floating_point",
        "is_inference",
        "is_neg",
        "ndimension",
        "nelement",
        "numel",
        "requires_grad_",
        "size",
        "storage_offset",
        "stride",
        "untyped_storage",
    ]
)


class StandIn(nn.Parameter):
    """What stands in `_parameters` for a streamed weight: name, shape and dtype, but no bytes.

    It is a meta tensor that refuses to be computed with. It says the device where the weight will
    be when its turn comes, because adapter libraries put their own weights there.
    """

    label = "a streamed weight"
    target: torch.device

    @classmethod
    def of(
        cls, label: str, shape: tuple[int, ...], dtype: torch.dtype, target: torch.device
    ) -> StandIn:
        made = cls(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        made.label = label
        made.target = target
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.target

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        origin = next((arg for arg in args if isinstance(arg, StandIn)), None)
        if func.__name__ in _METADATA:
            made = torch.Tensor.__torch_function__.__func__(  # type: ignore[attr-defined]
                cls, func, types, args, kwargs or {}
            )
            if isinstance(made, StandIn) and origin is not None:  # .data, .detach()
                made.label, made.target = origin.label, origin.target
            return made
        label = cls.label if origin is None else origin.label
        raise StreamError(
            f"A streamed weight can be used while its block runs; {func.__name__} was asked for "
            f"{label} at another time. Call the block, or leave it out of `groups`."
        )


def part_name(weight: str, part: str) -> str:
    """What a part of a packed weight is called among the members of a block."""
    return f"{weight}:{part}"


def _own_tensor(arena: torch.Tensor) -> torch.Tensor:
    """The same memory under a storage of its own.

    Which groups share an arena depends on budget and lookahead. A graph that saw it would have to
    be compiled anew for each; `turn` orders what aliasing would (see csrc/library.cpp).
    """
    # As a capsule: `from_dlpack(arena)` refuses memory of another GPU than the current one.
    own: torch.Tensor = torch.utils.dlpack.from_dlpack(torch._C._to_dlpack(arena))
    return own


class GroupSlot:
    """One block's group: its arena, its id, and whether it is acquired now.

    The id is a 0-dim tensor: an int per block, or per engine, would compile every block anew.
    """

    def __init__(
        self,
        attachment: Attachment,
        block: nn.Module,
        index: int,
        members: dict[str, Member],
        packed: dict[str, PackedWeight],
    ) -> None:
        self._block = weakref.ref(block)
        streamer = attachment.streamer
        self.arena = _own_tensor(streamer.arena(index)[: streamer.groups[index].nbytes])
        self.turn = attachment.turn
        self.id = streamer.group_id(index)
        self.is_resident = streamer.is_resident(index)
        self.life = attachment.life
        self.is_open = False  # while it is traced
        # Which weight, or part of one, is where, by its name in the block, and the same as one
        # text: a graph holds for every block that says the same.
        self._members = members
        self._packed = packed
        self.layout = repr(
            [
                *((name, m.offset, m.dtype, m.shape) for name, m in members.items()),
                *((name, weight.packing) for name, weight in packed.items()),
            ]
        )
        self._address = self.arena.untyped_storage().data_ptr()

    @property
    def is_live(self) -> bool:
        return self.is_resident or self.life.slot is self

    def view(self, name: str) -> torch.Tensor:
        """The weight of this name, over the arena."""
        return _view(self.arena, self._members[name])

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """The parts of the packed weight of this name: over the arena, and constants."""
        weight = self._packed[name]
        return {part: self.view(part_name(name, part)) for part in weight.parts} | dict(
            weight.constants
        )

    def compiled_view(self, name: str) -> torch.Tensor:
        """The same as `view`, in a graph."""
        begin, end, dtype, shape = self.place(name)
        return self.arena[begin:end].view(dtype).view(shape)

    def compiled_parts(self, name: str) -> dict[str, torch.Tensor]:
        """The same as `parts`, in a graph."""
        weight = self._packed[name]
        parts = {part: self.compiled_view(part_name(name, part)) for part in weight.parts}
        for part, tensor in weight.constants.items():
            parts[part] = tensor
        return parts

    @torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
    def place(self, name: str) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
        """First and last byte in the arena, dtype, shape: constants of a graph, which is guarded
        by `layout`. A guard for each would cost more than the op that acquires.
        """
        member = self._members[name]
        return member.offset, member.offset + member.nbytes, member.dtype, member.shape

    @property
    def is_ready(self) -> bool:
        """Whether a part of the block may simply compute. Not if it is checkpointed by itself: its
        weights would be saved by other hooks than ours.
        """
        if self.is_resident:
            return True
        return self.life.slot is self and (not torch.is_grad_enabled() or self.saves_places)

    def enter(self) -> GroupSlot | None:
        """Eager: a forward that needs the group begins; returns whose forward it interrupts."""
        outer = self.life.running
        self.acquire()
        self.life.running = self
        return outer

    def leave(self, outer: GroupSlot | None) -> None:
        """It is over. What was interrupted finds its bytes where they were."""
        self.life.running = outer
        if outer is not None and not outer.is_live:
            outer.acquire()

    def acquire(self) -> None:
        """Wait for the group; what was read through the group before is over. Eager code runs in
        order, and needs no `dep` (which may be a wrapper, under vmap for example).
        """
        self.life.enter_backward()
        try:
            ops.acquire_(self.arena, self.id, self.id)
        except ThreadConflict:
            raise  # refused: nothing was freed, and the other thread computes on
        except BaseException:
            self.life.end()
            raise
        if self.life.slot is not self:
            self.life.end()
        self.life.slot = self

    def acquire_compiled(self, dep: torch.Tensor) -> None:
        """The same inside a graph, from here to `release_compiled`. What `life` says of eager code
        is only written here: read, it would be a guard.
        """
        if self.life.num_open or not self.layout:  # and so every graph is guarded by the layout
            raise StreamError(
                "A compiled block uses its own weights alone; one called a part of another. "
                "Compile the blocks one by one, or leave these out of `groups`."
            )
        self.is_open = True
        self.life.num_open = 1
        self.life.slot = None
        ops.native.acquire_.held(self.arena, self.turn, dep, self.id)

    def close_compiled(self) -> None:
        """The block's own code ends here."""
        self.is_open = False
        self.life.num_open = 0

    def release_compiled(self, result: object) -> None:
        """The end of the block. A compiler may move what nobody needs yet past the next block's
        acquire, but not past this: it needs what the block made, and mutates what it read.
        """
        ops.native.release_(self.arena, self.turn, tensors_in(result), self.id)

    @torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
    def trains(self) -> bool:
        """Whether the block holds parameters to be trained (adapters). A constant for dynamo, which
        guards on their requires_grad anyway: they are inputs of the graph.
        """
        block = self._block()
        return block is not None and any(p.requires_grad for p in block.parameters())

    def acquire_for_backward(self) -> None:
        """See Note [Backward]."""
        if not self.is_live:
            self.acquire()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def places_saved(self) -> contextlib.AbstractContextManager[Any]:
        """While this block runs forward, save places instead of weights; see Note [Backward]."""
        keep, give = _autograd._top_saved_tensors_default_hooks(False) or (_keep, _give)

        def pack(tensor: torch.Tensor) -> object:
            if tensor.layout != torch.strided:
                return keep(tensor)
            if tensor.untyped_storage().data_ptr() == self._address:
                return _Place.of(self, tensor)
            return self._recast(tensor) or keep(tensor)

        def unpack(saved: Any) -> torch.Tensor:
            return saved.fetch() if isinstance(saved, _Place | _Recast) else give(saved)

        pack.slot = self  # type: ignore[attr-defined]
        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _recast(self, tensor: torch.Tensor) -> _Recast | None:
        """Autocast, and some models, compute with a copy of a weight in another dtype. Nothing but
        its bytes says where such a copy came from.
        """
        if tensor.requires_grad:
            return None
        numel, rest = divmod(tensor.untyped_storage().nbytes(), tensor.itemsize)
        for name, member in self._members.items():
            if rest or member.dtype == tensor.dtype or math.prod(member.shape) != numel:
                continue
            weight = self.view(name)
            if torch.equal(tensor.as_strided((numel,), (1,), 0), weight.to(tensor.dtype).flatten()):
                return _Recast(_Place.of(self, weight), tensor.dtype, *_layout_of(tensor))
        return None

    @property
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def saves_places(self) -> bool:
        """Whether what is saved now goes through this slot's hooks first."""
        top = _autograd._top_saved_tensors_default_hooks(False)
        return top is not None and getattr(top[0], "slot", None) is self


def tensors_in(value: object) -> list[torch.Tensor]:
    """The tensors of a value, through tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


@dataclass(frozen=True)
class _Place:
    """A tensor that lies in an arena: which bytes, and as what."""

    slot: GroupSlot
    begin: int
    end: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, slot: GroupSlot, tensor: torch.Tensor) -> _Place:
        size, stride = tuple(tensor.shape), tensor.stride()
        begin = int(tensor.storage_offset() * tensor.itemsize - slot.arena.storage_offset())
        last = sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
        end = begin + (int(last) + 1 if tensor.numel() else 0) * tensor.itemsize
        return cls(slot, begin, end, tensor.dtype, size, stride)

    def fetch(self) -> torch.Tensor:
        self.slot.acquire_for_backward()
        return (
            self.slot.arena[self.begin : self.end]
            .view(self.dtype)
            .as_strided(self.size, self.stride)
        )


@dataclass(frozen=True)
class _Recast:
    """A copy of a weight in another dtype, or a view of one."""

    weight: _Place
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def fetch(self) -> torch.Tensor:
        copy = self.weight.fetch().to(self.dtype)
        return copy.as_strided(self.size, self.stride, self.offset)


def _layout_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _keep(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    # An output itself would hold the graph that holds it.
    return tensor.detach(), tensor._version


def _give(saved: tuple[torch.Tensor, int]) -> torch.Tensor:
    """autograd leaves this check to the hooks, where there are any."""
    tensor, version = saved
    if tensor._version != version:
        raise StreamError(
            f"A tensor that backward needs must stay as it was; one of shape {list(tensor.shape)} "
            f"was modified by an inplace operation (version {tensor._version}, saved at {version})."
            " Work on a copy."
        )
    return tensor


class _Life:
    """Which group of a model is acquired now, as far as eager code knows."""

    def __init__(self, streamer: Streamer) -> None:
        self.slot: GroupSlot | None = None
        self.running: GroupSlot | None = None  # whose forward is under way
        self.num_open = 0  # slots in a graph that is being traced
        self.is_in_pass = False  # the root's forward is under way
        self._caller: int | None = None  # who called a block without the root
        self._streamer = streamer
        self._backward = -1  # the last backward that was seen

    def end(self) -> None:
        """The arena will be refilled."""
        before, self.slot = self.slot, None
        if before is not None and not before.is_resident:
            # Views that were not saved as places (a weight read outside its block) go stale now:
            # let autograd refuse them instead of reading on.
            torch.autograd.graph.increment_version(before.arena)

    def enter_backward(self) -> None:
        """When this backward is over, so is the use of the group that it acquired last."""
        task = _graph_task()
        if task == -1 and not self.is_in_pass:
            self._caller = self._streamer.caller_number()
        if task not in (-1, self._backward):
            self._backward = task
            self._end_calls_of_blocks()
            # Which thread the callback will run in, nobody knows.
            end = functools.partial(self.end_pass, self._streamer.caller_number())
            torch.autograd.Variable._execution_engine.queue_callback(end)

    def _end_calls_of_blocks(self) -> None:
        """Blocks called without the root end no pass, and backward runs in another thread on a GPU.
        What it goes back through has ended, if nothing runs now.
        """
        if self._caller is not None and self.running is None and not self.is_in_pass:
            self._streamer.end_pass(self._caller)
        self._caller = None

    def end_pass(self, caller: int | None = None) -> None:
        """A thread is through, the calling one or that of the number; raises ThreadConflict if
        another one interfered.
        """
        self.end()
        if not self._streamer.is_closed:
            self._streamer.end_pass(caller)


def _graph_task() -> int:
    """The backward that the calling thread is in; -1 outside."""
    task: int = torch._C._current_graph_task_id()
    return task


class Experts(Protocol):
    """The experts of a model; see `nexus_ext.experts.attach.AttachedExperts`."""

    def begin_pass(self, num_positions: int | None) -> None: ...
    def stats(self) -> Any: ...
    def close(self) -> None: ...


class Attachment:
    """What a streamed root holds: the streamer, the lock, which group is live, and the experts."""

    def __init__(
        self, model: nn.Module, streamer: Streamer, experts: Experts | None = None
    ) -> None:
        self.streamer = streamer
        self.experts = experts
        self.lock = threading.RLock()
        self.turn = torch.zeros(1, dtype=torch.uint8, device=streamer.device.torch_device)
        self.life = _Life(streamer)
        self._finalizer = weakref.finalize(model, _close_all, streamer, experts)
        model.__dict__["_nexus"] = self

    @property
    def is_closed(self) -> bool:
        return not self._finalizer.alive

    @contextlib.contextmanager
    def one_pass(self, num_positions: int | None = None) -> Iterator[None]:
        """One thread, from the first group to the last, over so many positions of a sequence."""
        with self.lock:
            outer, self.life.is_in_pass = self.life.is_in_pass, True
            if self.experts is not None:
                self.experts.begin_pass(num_positions)
            try:
                yield
            finally:
                self.life.is_in_pass = outer
                self.life.end_pass()

    def close(self) -> None:
        self.life.end()
        self._finalizer()


def _close_all(streamer: Streamer, experts: Experts | None) -> None:
    streamer.close()
    if experts is not None:
        experts.close()


def attachment_of(model: nn.Module) -> Attachment:
    """Raises StreamError when the model is not streamed."""
    attachment = model.__dict__.get("_nexus")
    if attachment is None:
        raise StreamError(
            f"This needs a streamed model; {type(model).__name__} is none. Use nexus_ext.stream() "
            "or nexus_ext.from_pretrained() first."
        )
    return attachment  # type: ignore[no-any-return]


Reader = Callable[[Any], torch.Tensor]


def reading(name: str) -> Reader:
    """How a module reads its parameter `name`; see Note [Where a streamed parameter is]."""

    def read(self: Any) -> torch.Tensor:
        if not _is_away(self, name):
            return self._parameters[name]  # type: ignore[no-any-return]
        slot: GroupSlot = self._nexus_slot
        if torch.compiler.is_compiling():
            return slot.compiled_view(f"{self._nexus_path}.{name}")
        if _is_there(slot):
            return self._nexus_tensors[name]  # type: ignore[no-any-return]
        return self._parameters[name]  # type: ignore[no-any-return]

    return read


def reading_packed(name: str) -> Reader:
    """The same for a packed parameter: a new tensor, decoded each time it is read."""

    def read(self: Any) -> torch.Tensor:
        stand_in: torch.Tensor = self._parameters[name]
        parts = parts_of(self, name)
        if parts is None:
            return stand_in
        packing: Packing = self._nexus_packed[name]
        return packing.decode(parts, stand_in.dtype)

    return read


def parts_of(module: Any, name: str) -> Mapping[str, torch.Tensor] | None:
    """The parts of a packed parameter, or None if there are none to read now."""
    if not _is_away(module, name):
        return None
    slot: GroupSlot | None = module.__dict__.get("_nexus_slot")
    if slot is not None and torch.compiler.is_compiling():
        return slot.compiled_parts(f"{module._nexus_path}.{name}")
    if slot is None or _is_there(slot):  # outside the blocks it is always there
        return module._nexus_tensors[name]  # type: ignore[no-any-return]
    return None


def _is_away(module: Any, name: str) -> bool:
    """Whether a stand-in stands for the parameter; else it was put there for one call, by
    torch.func.functional_call.
    """
    # Not is_exporting(): in dynamo, before torch 2.12, that is always true.
    return isinstance(module._parameters[name], StandIn) or torch.compiler._is_exporting_flag


def _is_there(slot: GroupSlot) -> bool:
    # A part of the block may be computed once more in backward, if it was checkpointed.
    if not slot.is_live and _graph_task() != -1:
        slot.acquire_for_backward()
    return slot.is_live
