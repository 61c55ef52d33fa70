"""How a model uses streaming: `stream(model, ...)` swaps its blocks' weights for streamed ones.

The model stays the object it was. Blocks, the modules that own streamed parameters, and the root
get a subclass of their own class, with the same name:

    block    forward() first acquires the block's group
    owner    `weight` and the like are read from the group's arena
    root     forward() runs in one thread at a time

Note [Where a streamed parameter is]
A parameter that streams has no memory of its own. In `_parameters` stands a meta tensor: names,
shapes and dtypes of `state_dict` and `repr` stay what they were, and no stale byte can be taken
for a weight. While its group is acquired, reading the attribute gives a view of the arena; at any
other time the meta tensor, whose use torch refuses.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn

from nexus_ext import ops
from nexus_ext.blocks import find_blocks
from nexus_ext.checkpoint import Checkpoint, Group, Member
from nexus_ext.config import StreamConfig
from nexus_ext.engine import Faults
from nexus_ext.errors import CheckpointMismatch, ConfigError, StreamError
from nexus_ext.plan import Plan
from nexus_ext.profiling import Stats
from nexus_ext.streamer import Progress, Streamer

__all__ = ["Layout", "StreamedModule", "close", "lay_out", "plan_of", "stats", "stream"]

M = Any  # a module: mypy cannot say "the same class, with one more base"


def stream(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    device: str | torch.device = "cpu",
    groups: str | Iterable[str] | None = None,
    rename: Callable[[str], str] | None = None,
    strict: bool = True,
    progress: Progress | None = None,
    faults: Faults | None = None,
    **options: Any,
) -> nn.Module:
    """Stream the weights of a model's blocks from its checkpoint.

    The blocks' parameters leave memory (they may never have been there: a model on the meta device
    is welcome); everything else is read from the checkpoint and stays. Weights are frozen.

    Args:
        model: Any module; changed in place and returned. Buffers that the checkpoint lacks keep
            their values.
        checkpoint: A safetensors file, an index, or a folder with either.
        device: Where the model computes: "cpu".
        groups: Name of the blocks' container, or names of blocks; None finds the repeated ones.
        rename: From a name in the model to the name in the checkpoint.
        strict: Whether tensors of the checkpoint that the model lacks are an error.
        progress: Called as (what, done_bytes, total_bytes) while weights are read.
        faults: Test hook.
        **options: budget, io, lookahead, ram_budget, verify, prefault, depth, chunk_bytes,
            use_uring; see `StreamConfig`.

    Returns:
        The model. It streams until `close(model)`, the end of a `with` block, or its collection.

    Raises:
        BudgetError: The budget is too small; names the smallest that works.
        CheckpointError: The files break the format, or disagree with the model.
        ConfigError: An option or a device that cannot be.
        StreamError: A model that cannot be streamed.
    """
    config = StreamConfig.of(**options)
    _check_device(device)
    _detach_closed(model)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint)
    layout = lay_out(model, checkpoint, groups, rename or (lambda name: name), strict=strict)
    _check_blocks(layout.blocks)
    # Arenas outlive an inference_mode that is on now, and gradients need their version counters.
    with torch.inference_mode(False):
        streamer = Streamer(
            checkpoint, layout.groups, layout.outside, config, faults=faults, progress=progress
        )
        layout.attach(streamer)
    return model


def lay_out(
    model: nn.Module,
    checkpoint: Checkpoint,
    groups: str | Iterable[str] | None,
    rename: Callable[[str], str],
    *,
    strict: bool,
) -> Layout:
    """Which tensors would form which group; changes nothing. Arguments and errors as `stream`."""
    return Layout(model, find_blocks(model, groups), checkpoint, rename, strict)


def stats(model: nn.Module) -> Stats:
    """Counters and effective modes of a streamed model.

    Raises:
        StreamError: The model is not streamed.
        EngineClosed: It was closed.
    """
    return _attachment_of(model).streamer.stats()


def plan_of(model: nn.Module) -> Plan:
    """What of a streamed model is resident, what streams, and the predicted step."""
    return _attachment_of(model).streamer.plan


def close(model: nn.Module) -> None:
    """Stop streaming and free threads, files and staging. May be called twice.

    The model cannot be used afterwards, unless it is streamed again.
    """
    _attachment_of(model).close()


def _attachment_of(model: nn.Module) -> _Attachment:
    attachment = model.__dict__.get("_nexus")
    if attachment is None:
        raise StreamError(
            f"This needs a streamed model; {type(model).__name__} is none. Use nexus_ext.stream() "
            "or nexus_ext.from_pretrained() first."
        )
    return attachment  # type: ignore[no-any-return]


def _check_device(device: str | torch.device) -> None:
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        raise ConfigError(f"device must name a device, got {device!r}; use 'cpu'.") from None
    if kind != "cpu":
        raise ConfigError(f"device must be one that weights can stream to: 'cpu'; got {device!r}.")


def _check_blocks(blocks: list[tuple[str, nn.Module]]) -> None:
    for name, block in blocks:
        if "forward" in block.__dict__:
            raise StreamError(
                f"A block's forward must be its class's; that of {name!r} was replaced (by "
                "accelerate's hooks, perhaps). Remove them before streaming."
            )


# -- from a model's tensors to groups ----------------------------------------------------------


class Layout:
    """Which tensor of the model belongs to which group, checked against the checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        blocks: list[tuple[str, nn.Module]],
        checkpoint: Checkpoint,
        rename: Callable[[str], str],
        strict: bool,
    ) -> None:
        self.model = model
        self._tensors = _named_tensors(model)
        self._source = _match(self._tensors, checkpoint, rename, strict)
        _refuse_unfilled(model)
        self.blocks: list[tuple[str, nn.Module]] = []
        self.groups: list[Group] = []
        self._grouped: list[set[str]] = []
        for name, block in blocks:
            self._add_block(name, block, checkpoint)
        if not self.blocks:
            raise StreamError(
                f"Streaming needs blocks with weights of their own; those of {type(model).__name__}"
                " share all of theirs. Name others: stream(..., groups=['encoder.layer'])."
            )
        inside = set().union(*self._grouped)
        rest = {source for name, source in self._source.items() if name not in inside}
        self.outside = checkpoint.group("outside", rest)

    def _add_block(self, name: str, block: nn.Module, checkpoint: Checkpoint) -> None:
        """Make the block a group, if it has bytes that are its alone: else nothing would move."""
        names = self._own_names(name, block)
        group = checkpoint.group(name, {self._source[tensor] for tensor in names})
        if group.nbytes == 0:
            return
        self.blocks.append((name, block))
        self.groups.append(group)
        self._grouped.append(names)

    def _own_names(self, name: str, block: nn.Module) -> set[str]:
        """The block's parameters that nobody outside shares. Buffers stay: they may be written."""
        prefix = f"{name}." if name else ""
        inner = {id(parameter) for parameter in block.parameters()}
        shared = {
            id(tensor)
            for other, tensor in self._tensors.items()
            if id(tensor) in inner and not other.startswith(prefix)
        }
        return {
            prefix + inner_name
            for inner_name, parameter in block.named_parameters(remove_duplicate=False)
            if id(parameter) not in shared
        }

    def attach(self, streamer: Streamer) -> None:
        """Change the model: nothing before this line did."""
        attachment = _Attachment(self.model, streamer)
        self._place_outside(streamer)
        for index, ((_, block), names) in enumerate(zip(self.blocks, self._grouped, strict=True)):
            slot = _GroupSlot(attachment, streamer, index)
            self._place_group(slot, self.groups[index], names)
            block.__dict__["_nexus_group"] = slot
        _subclass_all(self.model, [block for _, block in self.blocks])

    def _place_outside(self, streamer: Streamer) -> None:
        views = _views(self.outside, streamer.outside_arena)
        inside = set().union(*self._grouped)
        parameters: dict[int, nn.Parameter] = {}
        for name, tensor in self._tensors.items():
            if name in inside or name not in self._source:
                continue
            view = views[self._source[name]]
            owner, leaf = _owner(self.model, name)
            if isinstance(tensor, nn.Parameter):
                # Tied before, tied after: one object for one object.
                resident = parameters.setdefault(id(tensor), nn.Parameter(view, False))
                owner._parameters[leaf] = resident
            else:
                owner._buffers[leaf] = view

    def _place_group(self, slot: _GroupSlot, group: Group, names: set[str]) -> None:
        members = {member.name: member for member in group.members}
        stand_ins: dict[int, nn.Parameter] = {}
        for name in sorted(names):
            owner, leaf = _owner(self.model, name)
            streamed = _StreamedTensor(slot, members[self._source[name]])
            empty = torch.empty(streamed.shape, dtype=streamed.dtype, device="meta")
            # As outside: tied before, tied after.
            key = id(self._tensors[name])
            owner._parameters[leaf] = stand_ins.setdefault(key, nn.Parameter(empty, False))
            owner.__dict__.setdefault("_nexus_tensors", {})[leaf] = streamed


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter under every name it has, then the buffers that a state_dict holds."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                tensors[f"{path}.{leaf}" if path else leaf] = buffer
    return tensors


def _refuse_unfilled(model: nn.Module) -> None:
    """A buffer that no checkpoint holds must have its value already."""
    empty = [
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and leaf in module._non_persistent_buffers_set
    ]
    if empty:
        raise StreamError(
            f"Buffers that a checkpoint does not hold must have values; on meta are "
            f"{_listed(empty)}. Build the model with parameters alone on meta."
        )


def _match(
    tensors: dict[str, torch.Tensor],
    checkpoint: Checkpoint,
    rename: Callable[[str], str],
    strict: bool,
) -> dict[str, str]:
    """The checkpoint's name for every tensor of the model.

    A tied tensor is found under any of its names. A buffer with a value may be missing.
    """
    names_of: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    source: dict[str, str] = {}
    missing: list[str] = []
    for names in names_of.values():
        tensor = tensors[names[0]]
        found = [rename(name) for name in names if rename(name) in checkpoint.entries]
        if found:
            source |= dict.fromkeys(names, found[0])
        elif isinstance(tensor, nn.Parameter) or tensor.is_meta:
            missing.append(names[0])
    used = {rename(name) for name in source}
    unexpected = [name for name in checkpoint.entries if name not in used] if strict else []
    _refuse_mismatch(tensors, source, checkpoint, missing, unexpected)
    return source


def _refuse_mismatch(
    tensors: dict[str, torch.Tensor],
    source: dict[str, str],
    checkpoint: Checkpoint,
    missing: list[str],
    unexpected: list[str],
) -> None:
    problems = []
    if missing:
        problems.append(f"the checkpoint lacks {_listed(missing)}")
    if unexpected:
        problems.append(f"the model lacks {_listed(unexpected)} (strict=False ignores these)")
    for name, entry_name in source.items():
        entry, tensor = checkpoint.entries[entry_name], tensors[name]
        if entry.shape != tuple(tensor.shape) or entry.dtype != tensor.dtype:
            problems.append(
                f"{name} is {_kind(tensor.dtype, tensor.shape)} in the model and "
                f"{_kind(entry.dtype, entry.shape)} in {checkpoint.files[entry.file].path} at "
                f"offset {entry.offset}"
            )
    if problems:
        shown = "; ".join(problems[:10]) + (
            f"; and {len(problems) - 10} more" * (len(problems) > 10)
        )
        raise CheckpointMismatch(
            f"Model and checkpoint {checkpoint.path} must agree on every tensor: {shown}. "
            "Build the model with the checkpoint's own config and dtype."
        )


def _kind(dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _view(arena: torch.Tensor, member: Member) -> torch.Tensor:
    raw = arena[member.offset : member.offset + member.nbytes]
    return raw.view(member.dtype).view(member.shape)


def _views(group: Group, arena: torch.Tensor) -> dict[str, torch.Tensor]:
    return {member.name: _view(arena, member) for member in group.members}


# -- what stands in the model while it streams -------------------------------------------------


class _StreamedTensor:
    """One streamed parameter: where it is in which arena, and a view made once for eager use."""

    def __init__(self, slot: _GroupSlot, member: Member) -> None:
        self.slot = slot
        self.begin = member.offset
        self.end = member.offset + member.nbytes
        self.dtype = member.dtype
        self.shape = member.shape
        self.view = _view(slot.arena, member)


class _GroupSlot:
    """One block's group: its arena, its number as a tensor, and whether it is acquired now.

    The number is a 0-dim tensor because an int per block would compile every block anew.
    """

    def __init__(self, attachment: _Attachment, streamer: Streamer, index: int) -> None:
        self.arena = streamer.arena(index)
        self.id = streamer.group_id(index)
        self.is_resident = streamer.is_resident(index)
        self.life = attachment.life

    @property
    def is_live(self) -> bool:
        return self.is_resident or self.life.slot is self

    def acquire(self, dep: torch.Tensor) -> None:
        """Eager: wait for the group; what was read through the group before is over."""
        if self.life.slot is not self:
            self.life.end()
        ops.acquire_(self.arena, dep, self.id)
        self.life.slot = self

    def acquire_compiled(self, dep: torch.Tensor) -> None:
        """The same inside a graph. `life` is only written here: read, it would be a guard."""
        self.life.slot = None
        ops.native.acquire_.held(self.arena, dep, self.id)

    def release_compiled(self, result: object) -> None:
        """The end of the block. A compiler may move what nobody needs yet past the next block's
        acquire, but not past this: it needs what the block made, and mutates what it read.
        """
        ops.native.release_(self.arena, _tensors_in(result), self.id)


class _Life:
    """Which group of a model is acquired now, as far as eager code knows."""

    slot: _GroupSlot | None = None

    def end(self) -> None:
        """The arena will be refilled."""
        before, self.slot = self.slot, None
        if before is not None and not before.is_resident:
            # autograd may have kept a view for backward: let it refuse instead of reading on.
            torch.autograd.graph.increment_version(before.arena)


class _Attachment:
    """What a streamed root holds: the streamer, the lock, and which group is live."""

    def __init__(self, model: nn.Module, streamer: Streamer) -> None:
        self.streamer = streamer
        self.lock = threading.RLock()
        self.life = _Life()
        self._finalizer = weakref.finalize(model, streamer.close)
        model.__dict__["_nexus"] = self

    @property
    def is_closed(self) -> bool:
        return not self._finalizer.alive

    @contextlib.contextmanager
    def one_pass(self) -> Iterator[None]:
        """One thread, from the first group to the last."""
        with self.lock:
            try:
                yield
            finally:
                self.life.end()
                if not self.is_closed:
                    self.streamer.end_pass()

    def close(self) -> None:
        self.life.end()
        self._finalizer()


class StreamedModule(nn.Module):
    """What the root of a streamed model is, besides what it was."""

    def __enter__(self) -> StreamedModule:
        return self

    def __exit__(self, *exc: object) -> None:
        close(self)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Only where the model is already: weights live where they stream to."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None or (device is not None and device.type != "cpu"):
            _refuse(self, "moved or converted")
        return self


def _refuse(module: nn.Module, what: str) -> NoReturn:
    raise StreamError(
        f"A streamed model cannot be {what}: the weights of {type(module).__name__} are on disk. "
        "Close it and stream it again as you need it."
    )


# -- the subclasses ----------------------------------------------------------------------------


def _subclass_all(model: nn.Module, blocks: list[nn.Module]) -> None:
    is_block = {id(block) for block in blocks}
    for module in list(model.modules()):
        names = tuple(sorted(module.__dict__.get("_nexus_tensors", ())))
        if names or id(module) in is_block or module is model:
            kind: Any = type(module)  # a class can be a key; mypy sees nn.Module's __hash__ only
            module.__class__ = _streamed_class(kind, names, id(module) in is_block, module is model)


@functools.cache
def _streamed_class(
    base: type[nn.Module], names: tuple[str, ...], is_block: bool, is_root: bool
) -> type[nn.Module]:
    """One class for all modules alike, so that identical blocks compile once."""
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
    for name in names:
        namespace[name] = _streamed_attribute(name)
    if names:
        namespace["register_parameter"] = _registering(base, names)
    forward = base.forward
    if is_block:
        forward = _acquiring(forward)
    if is_root:
        forward = _serialised(forward)
    if is_block or is_root:
        namespace["forward"] = forward
    bases = (StreamedModule, base) if is_root else (base,)
    return type(base.__name__, bases, namespace)


def _streamed_attribute(name: str) -> property:
    def get(self: M) -> torch.Tensor:
        tensor = self._nexus_tensors[name]
        slot = tensor.slot
        if torch.compiler.is_compiling():
            raw = slot.arena[tensor.begin : tensor.end]
            return raw.view(tensor.dtype).view(tensor.shape)  # type: ignore[no-any-return]
        if slot.is_live:
            return tensor.view  # type: ignore[no-any-return]
        # See Note [Where a streamed parameter is].
        return self._parameters[name]  # type: ignore[no-any-return]

    return property(get)


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
    @functools.wraps(forward)
    def acquire_then_forward(self: M, *args: Any, **kwargs: Any) -> Any:
        slot = self._nexus_group
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        # What the block computes from: acquire_ is ordered after it.
        dep = tensors[0] if tensors else slot.id
        if torch.compiler.is_compiling():
            _refuse_gradients(slot, tensors)
            slot.acquire_compiled(dep)
            result = forward(self, *args, **kwargs)
            slot.release_compiled(result)
            return result
        slot.acquire(dep)
        return forward(self, *args, **kwargs)

    return acquire_then_forward


def _tensors_in(value: object) -> list[torch.Tensor]:
    """The tensors of a block's result, through tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors_in(item)]
    return []


def _refuse_gradients(slot: _GroupSlot, tensors: list[torch.Tensor]) -> None:
    """A compiled backward would read an arena that was refilled meanwhile, and nothing would tell.

    Eager code notices: see `_Life.end`.
    """
    if (
        torch.is_grad_enabled()
        and not slot.is_resident
        and any(tensor.requires_grad for tensor in tensors)
    ):
        raise StreamError(
            "A compiled streamed block computes no gradients, and its input requires one. Run it "
            "under torch.no_grad(), or do not compile it."
        )


def _serialised(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def forward_in_one_thread(self: M, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        with self._nexus.one_pass():
            return forward(self, *args, **kwargs)

    return forward_in_one_thread


def _detach_closed(model: nn.Module) -> None:
    """Give a closed model its own classes back; its parameters stay on meta."""
    attachment = model.__dict__.get("_nexus")
    if attachment is None:
        return
    if not attachment.is_closed:
        raise StreamError("This model is streamed already; close(model) before streaming it again.")
    del model.__dict__["_nexus"]
    for module in model.modules():
        module.__dict__.pop("_nexus_tensors", None)
        module.__dict__.pop("_nexus_group", None)
        base = type(module).__dict__.get("_nexus_base")
        if base is not None:
            module.__class__ = base
