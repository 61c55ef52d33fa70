"""How a model uses streaming: `stream(model, ...)` swaps its blocks' weights for streamed ones.

The model stays the object it was. Blocks, the modules that own streamed parameters, and the root
get a subclass of their own class, with the same name: see nexus_ext/subclass.py.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_ext.attachment import (
    Attachment,
    GroupSlot,
    StandIn,
    attachment_of,
    part_name,
    views,
)
from nexus_ext.checkpoint import Checkpoint, Group, Member
from nexus_ext.config import StreamConfig
from nexus_ext.conversion import Conversion
from nexus_ext.device import Device
from nexus_ext.engine import Faults
from nexus_ext.errors import ConfigError, StreamError
from nexus_ext.experts.attach import AttachedExperts, asks_registry, gates_of
from nexus_ext.experts.budget import Division, divide
from nexus_ext.experts.find import ExpertLayer, find_experts
from nexus_ext.experts.runner import ExpertRunner
from nexus_ext.layout import Layout, lay_out
from nexus_ext.memory import default_budget
from nexus_ext.mode import choose
from nexus_ext.plan import Plan, divide_budget
from nexus_ext.profiling import Stats
from nexus_ext.quant.formats import PackedWeight
from nexus_ext.quant.gguf_file import open_checkpoint
from nexus_ext.streamer import Progress, Streamer, plan_groups
from nexus_ext.subclass import restore_all, subclass_all

__all__ = ["close", "plan_of", "save_hotness", "stats", "stream", "stream_all"]

# More than any checkpoint needs besides its own bytes: padding, arenas of tiles.
_ROOMY = 1 << 30


def stream(
    model: nn.Module,
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    device: str | torch.device | Device = "cpu",
    groups: str | Iterable[str] | None = None,
    by_rows: str | Iterable[str] = (),
    keep: str | Iterable[str] = (),
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
        checkpoint: A safetensors file, an index, a folder with either, or a .gguf file.
        device: Where the model computes: "cpu", "cuda" or "cuda:1". What of the model is not in the
            checkpoint moves there too.
        groups: Name of the blocks' container, or names of blocks; None finds the repeated ones.
        by_rows: Names of Linear and Embedding modules, or patterns with *, whose weights are never
            resident: a projection is read in tiles, an embedding by the rows that ids name.
        keep: Names of parameters, or patterns with *, that stay as they are and train as they did:
            adapters that the checkpoint lacks.
        rename: From a name in the model to the name in the checkpoint.
        strict: Whether tensors of the checkpoint that the model lacks are an error.
        progress: Called as (what, done_bytes, total_bytes) while weights are read.
        faults: Test hook.
        **options: budget, io, lookahead, ram_budget, verify, prefault, depth, chunk_bytes,
            use_uring, tile_bytes, trailing_drop, and for mixture-of-experts models expert_budget,
            expert_policy, expert_device, expert_predict, expert_hotness; see `StreamConfig`.

    Returns:
        The model. It streams until `close(model)`, the end of a `with` block, or its collection.

    Raises:
        BudgetError: The budget is too small; names the smallest that works.
        CheckpointError: The files break the format, or disagree with the model.
        ConfigError: An option or a device that cannot be.
        StreamError: A model that cannot be streamed.
    """
    config = StreamConfig.of(**options)
    target = Device.of(device)
    _detach_closed(model)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    rename = rename or Conversion.of(model, checkpoint)
    keep = [keep] if isinstance(keep, str) else list(keep)
    layers = _expert_layers(model, checkpoint, rename, keep)
    layout = lay_out(
        model,
        checkpoint,
        groups,
        rename,
        strict=strict,
        by_rows=by_rows,
        keep=keep,
        experts=layers,
    )
    _check_blocks(layout.blocks)
    _check_verified(config, layout)
    _check_experts(config, model, layers)
    division = divide(checkpoint, layout, layers, config, target) if layers else None
    # Arenas outlive an inference_mode that is on now, and gradients need their version counters.
    with torch.inference_mode(False):
        streamer = Streamer(
            checkpoint,
            layout.groups,
            layout.outside,
            config if division is None else division.config,
            target,
            projections=layout.projections,
            tables=layout.tables,
            sequence=layout.sequence(),
            faults=faults,
            progress=progress,
        )
        experts = None
        try:
            if division is not None:
                experts = _attach_experts(layout, layers, division, checkpoint, faults)
                streamer.plan = division.whole_plan(streamer.plan)
            _attach(layout, streamer, experts)
        except BaseException:
            streamer.close()
            if experts is not None:
                experts.close()
            raise
    return model


def _expert_layers(
    model: nn.Module,
    checkpoint: Checkpoint,
    rename: Callable[[str], str] | None,
    keep: Iterable[str] = (),
) -> list[ExpertLayer]:
    """The experts that can stream one by one; those of other modules move with their blocks."""
    layers = find_experts(model, checkpoint, rename)
    layers = [layer for layer in layers if asks_registry(model.get_submodule(layer.path))]
    for pattern in keep:
        for layer in layers:
            if kept := fnmatch.filter(layer.claimed, pattern):
                raise StreamError(
                    f"keep is for parameters that the checkpoint lacks; {min(kept)} holds experts, "
                    f"which it has, and matches {pattern!r}. Leave them out of keep."
                )
    return layers


def _attach_experts(
    layout: Layout,
    layers: list[ExpertLayer],
    division: Division,
    checkpoint: Checkpoint,
    faults: Faults | None,
) -> AttachedExperts:
    gates = gates_of(layout.model, checkpoint, layers, layout.source)
    choice = choose(checkpoint, division.config, division.device)
    runner = ExpertRunner(checkpoint, layers, division, choice, gates, faults=faults)
    return AttachedExperts(layout.model, layers, runner)


def stream_all(
    models: Iterable[tuple[nn.Module, str | os.PathLike[str] | Checkpoint, dict[str, Any]]],
    *,
    budget: str | int = "auto",
    **options: Any,
) -> list[nn.Module]:
    """Stream several models in one process under one budget, a pipeline's for example.

    Each model gets what it cannot do without; of the rest, all get the same share of what would
    make them resident.

    Args:
        models: (model, checkpoint, options of `stream` for this model alone) each.
        budget: Bytes of device memory for the weights of all of them.
        **options: Options of `stream` for all of them.

    Returns:
        The models, changed in place. If one cannot be streamed, none is left streaming.

    Raises:
        BudgetError: The budget is too small for all of them together; names the smallest that
            works.
        NexusError: As `stream`.
    """
    requests = [(model, checkpoint, {**options, **own}) for model, checkpoint, own in models]
    plans = [_whole_plan(*request) for request in requests]
    total = StreamConfig.of(budget=budget).budget
    device = Device.of(options.get("device", "cpu"))
    total = default_budget(device.available_bytes()) if total == "auto" else total
    streamed: list[nn.Module] = []
    try:
        for (model, checkpoint, own), share in zip(
            requests, divide_budget(total, plans), strict=True
        ):
            streamed.append(stream(model, checkpoint, budget=share, **own))
    except BaseException:
        for model in streamed:
            close(model)
        raise
    return streamed


def _whole_plan(
    model: nn.Module, checkpoint: str | os.PathLike[str] | Checkpoint, options: dict[str, Any]
) -> Plan:
    """The plan that keeps everything resident: what the model could use at most, and at least."""
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    about_layout = ("groups", "rename", "strict", "by_rows", "keep")
    layers = _expert_layers(model, checkpoint, options.get("rename"))
    layout = lay_out(
        model,
        checkpoint,
        **{n: options[n] for n in about_layout if n in options},
        experts=layers,
    )
    config = StreamConfig.of(
        budget=2 * checkpoint.nbytes + _ROOMY,
        **{name: options[name] for name in options if name in StreamConfig.__annotations__},
    )
    device = Device.of(options.get("device", "cpu"))
    division = divide(checkpoint, layout, layers, config, device) if layers else None
    config = config if division is None else division.config
    plan, _ = plan_groups(
        checkpoint, layout.groups, layout.outside, config, device, projections=layout.projections
    )
    return plan if division is None else division.whole_plan(plan)


def stats(model: nn.Module) -> Stats:
    """Counters and effective modes of a streamed model.

    Raises:
        StreamError: The model is not streamed.
        EngineClosed: It was closed.
    """
    attachment = attachment_of(model)
    experts = attachment.experts
    return replace(
        attachment.streamer.stats(), experts=None if experts is None else experts.stats()
    )


def save_hotness(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write which experts of a streamed model are hot; `expert_hotness=path` begins with them.

    Raises:
        StreamError: The model is not streamed, or has no experts.
        WriteError: The file cannot be written.
    """
    experts = attachment_of(model).experts
    if not isinstance(experts, AttachedExperts):
        raise StreamError(
            f"Only experts have hotness; {type(model).__name__} streams none. Nothing was written."
        )
    experts.runner.save_hotness(Path(path))


def plan_of(model: nn.Module) -> Plan:
    """What of a streamed model is resident, what streams, and the predicted step."""
    return attachment_of(model).streamer.plan


def close(model: nn.Module) -> None:
    """Stop streaming and free threads, files and staging. May be called twice.

    The model cannot be used afterwards, unless it is streamed again.
    """
    attachment_of(model).close()


def _check_blocks(blocks: list[tuple[str, nn.Module]]) -> None:
    for name, block in blocks:
        if "forward" in block.__dict__:
            raise StreamError(
                f"A block's forward must be its class's; that of {name!r} was replaced (by "
                "accelerate's hooks, perhaps). Remove them before streaming."
            )


def _check_experts(config: StreamConfig, model: nn.Module, layers: list[ExpertLayer]) -> None:
    if layers:
        return
    asked = StreamConfig()
    names = ("expert_budget", "expert_device", "expert_hotness")
    given = [name for name in names if getattr(config, name) != getattr(asked, name)]
    if given:
        raise StreamError(
            f"{given[0]} is for models with experts that transformers can dispatch; "
            f"{type(model).__name__} has none. Leave it out."
        )


def _check_verified(config: StreamConfig, layout: Layout) -> None:
    if config.verify != "off" and layout.tables:
        raise ConfigError(
            f"verify={config.verify!r} compares whole groups, and single rows of "
            f"{layout.tables[0].name} have no digest; leave the embedding out of by_rows, or use "
            "verify='off'."
        )


def _detach_closed(model: nn.Module) -> None:
    """A closed model may be streamed again."""
    attachment = model.__dict__.get("_nexus")
    if attachment is None:
        return
    if not attachment.is_closed:
        raise StreamError("This model is streamed already; close(model) before streaming it again.")
    del model.__dict__["_nexus"]
    restore_all(model)


# -- from a layout to the model: nothing before changed it -----------------------------------------


def _attach(layout: Layout, streamer: Streamer, experts: AttachedExperts | None) -> None:
    attachment = Attachment(layout.model, streamer, experts)
    where = streamer.device.torch_device
    layout.packed = {name: weight.on(where) for name, weight in layout.packed.items()}
    _place_outside(layout, streamer)
    _place_by_rows(layout, streamer)
    for index, ((path, block), names) in enumerate(zip(layout.blocks, layout.grouped, strict=True)):
        members, packed = _placed(layout, layout.groups[index], path, names)
        slot = GroupSlot(attachment, block, index, members, packed)
        _place_group(layout, slot, path, sorted(names))
        block.__dict__["_nexus_group"] = slot
    _move_the_rest(layout.model, where)
    subclass_all(layout.model)


def _move_the_rest(model: nn.Module, where: torch.device) -> None:
    """What the checkpoint does not hold is used beside what it holds."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(where)
        for parameter in module._parameters.values():
            if parameter is not None and not parameter.is_meta:
                parameter.data = parameter.data.to(where)
                if parameter.grad is not None:
                    parameter.grad.data = parameter.grad.data.to(where)


def _placed(
    layout: Layout, group: Group, path: str, names: set[str]
) -> tuple[dict[str, Member], dict[str, PackedWeight]]:
    """Where a block's weights and parts of weights are, by their names in the block."""
    stored = {member.name: member for member in group.members}
    members: dict[str, Member] = {}
    packed: dict[str, PackedWeight] = {}
    for name in sorted(names):
        own = name.removeprefix(path)
        weight = layout.packed.get(name)
        if weight is None:
            members[own] = stored[layout.source[name]]
            continue
        packed[own] = weight
        for part, source in weight.parts.items():
            members[part_name(own, part)] = stored[source]
    return members, packed


def _place_outside(layout: Layout, streamer: Streamer) -> None:
    views_of = views(layout.outside, streamer.outside_arena)
    parameters: dict[int, nn.Parameter] = {}
    for name in layout.names_outside():
        tensor = layout.tensors[name]
        owner, leaf = _owner(layout.model, name)
        if name in layout.packed:
            weight = layout.packed[name]
            stand_in = _stand_in(layout, name, streamer.device.torch_device)
            owner._parameters[leaf] = parameters.setdefault(id(tensor), stand_in)
            parts = {part: views_of[source] for part, source in weight.parts.items()}
            _give(owner, leaf, parts | dict(weight.constants), weight)
        elif isinstance(tensor, nn.Parameter):
            # Tied before, tied after: one object for one object.
            resident = nn.Parameter(views_of[layout.source[name]], False)
            owner._parameters[leaf] = parameters.setdefault(id(tensor), resident)
        else:
            owner._buffers[leaf] = views_of[layout.source[name]]


def _place_by_rows(layout: Layout, streamer: Streamer) -> None:
    stand_ins: dict[str, StandIn] = {}
    for module, entry in layout.by_rows:
        is_linear = isinstance(module, nn.Linear)
        ids = streamer.projection_ids if is_linear else streamer.table_ids
        module.__dict__["_nexus_row_id"] = ids[entry.name]
        stand_in = stand_ins.setdefault(
            entry.name,
            StandIn.of(entry.name, entry.shape, entry.dtype, streamer.device.torch_device),
        )
        module._parameters["weight"] = stand_in


def _place_group(layout: Layout, slot: GroupSlot, path: str, names: list[str]) -> None:
    stand_ins: dict[int, StandIn] = {}
    for name in names:
        owner, leaf = _owner(layout.model, name)
        # As outside: tied before, tied after.
        key = id(layout.tensors[name])
        stand_in = _stand_in(layout, name, slot.arena.device)
        owner._parameters[leaf] = stand_ins.setdefault(key, stand_in)
        own = name.removeprefix(path)
        owner.__dict__["_nexus_slot"] = slot
        owner.__dict__["_nexus_path"] = own.removesuffix(f".{leaf}")
        weight = layout.packed.get(name)
        _give(owner, leaf, slot.parts(own) if weight else slot.view(own), weight)


def _stand_in(layout: Layout, name: str, where: torch.device) -> StandIn:
    tensor = layout.tensors[name]
    return StandIn.of(name, tuple(tensor.shape), tensor.dtype, where)


def _give(owner: nn.Module, leaf: str, there: object, weight: PackedWeight | None) -> None:
    """Tell a module where its parameter is while it is there: a view, or the parts of it."""
    owner.__dict__.setdefault("_nexus_tensors", {})[leaf] = there
    if weight is not None:
        owner.__dict__.setdefault("_nexus_packed", {})[leaf] = weight.packing


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
