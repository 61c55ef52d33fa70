"""`from_pretrained`: a transformers model built empty, then streamed from its checkpoint.

`convert` packs such a checkpoint once, and `from_pretrained(weights=...)` does so by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_ext.arriving import Inbound
from nexus_ext.checkpoint import Checkpoint, Stamp
from nexus_ext.config import StreamConfig, store_url
from nexus_ext.conversion import Conversion
from nexus_ext.device import Device
from nexus_ext.errors import CheckpointChanged, ConfigError, CorruptCheckpoint, MissingExtra
from nexus_ext.experts.budget import divide
from nexus_ext.experts.find import find_experts
from nexus_ext.files import sha256_of
from nexus_ext.hub import Outline, arrive, fetch, locate, outline
from nexus_ext.layout import lay_out
from nexus_ext.module import stream
from nexus_ext.packed_store import StoredShards, open_packed
from nexus_ext.plan import Plan
from nexus_ext.quant.config import QuantConfig, config_of
from nexus_ext.quant.convert import PackedModule, convert_checkpoint
from nexus_ext.quant.formats import PackedWeights, descriptions
from nexus_ext.quant.gguf_file import GGUFCheckpoint, open_checkpoint
from nexus_ext.quant.shards import Shards
from nexus_ext.streamer import Progress, plan_groups

__all__ = [
    "build_empty",
    "convert",
    "empty_model",
    "from_pretrained",
    "plan_pretrained",
    "renaming",
    "source_of",
]

_log = logging.getLogger("nexus_ext")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What packing makes of the same weights: another number is another model in the cache.
_PACKING = 1

# Requests for headers are this divided by the connections: little else comes with them.
_HEADERS_CHUNK = "512KiB"


def from_pretrained(
    name: str | Path | Inbound | Outline,
    *,
    model_class: str | type[nn.Module] | None = None,
    device: str | torch.device | Device = "cpu",
    groups: str | Iterable[str] | None = None,
    by_rows: str | Iterable[str] = (),
    weights: str | QuantConfig | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> nn.Module:
    """A transformers model that streams its weights; `generate` and everything else works.

    What is not here is downloaded, and the model streams while it arrives: this blocks for the
    weights that stay resident, and a forward for those that it needs. At no time is the whole model
    in memory. The dtype is the checkpoint's own. docs/arriving.md tells when all is fetched first.

    Args:
        name: A folder with config.json and safetensors, a .gguf file, a hub id, or a URL; or what
            `source_of` has found, with the same options.
        model_class: A transformers class or its name; None takes the one named in the config.
        device: As in `stream`.
        groups: As in `stream`.
        by_rows: As in `stream`.
        weights: "nf4", "nf4-nested", "nf4-fine", "int8", "mixed" or a config of `nexus_ext.quant`:
            pack the checkpoint once, keep that in the cache, and stream it. None streams it as it
            is, be it plain or packed.
        progress: As in `stream`.
        **options: As in `stream`: budget, io, lookahead, ram_budget, verify, prefault,
            expert_budget, ...

    Raises:
        MissingExtra: transformers is not installed.
        ConfigError: No such model, no such class, or an option that cannot be.
        NexusError: As `stream`.
    """
    groups = groups if groups is None or isinstance(groups, str) else list(groups)
    target = Device.of(device)
    with contextlib.ExitStack() as on_error:
        source = source_of(name, device=target, weights=weights, **options)
        if isinstance(source, Inbound):
            on_error.callback(source.close)
        if weights is None:
            checkpoint, model = _opened(source, model_class)
        else:
            path, checkpoint = _packed(source, config_of(weights), model_class, groups, progress)
            model = build_empty(path, checkpoint, model_class)
        rename = renaming(model, checkpoint)
        _report_unused(model, checkpoint, rename)
        streamed = stream(
            model,
            checkpoint,
            device=target,
            groups=groups,
            by_rows=by_rows,
            rename=rename,
            # As transformers does: a head or a buffer that this class has no use for stays unread.
            strict=False,
            progress=progress,
            **options,
        )
        on_error.pop_all()
    return streamed


def source_of(
    name: str | Path | Inbound | Outline,
    *,
    device: str | torch.device | Device = "cpu",
    weights: str | QuantConfig | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Path | Inbound | Outline:
    """Where a model is; or what is on its way, where these options can stream it while it comes; or
    what is known of it, where the nodes' store may have it packed.

    Blocks for what describes the model, or for all of it.

    Args:
        name, device, weights, **options: As in `from_pretrained`, which takes what this returns.
        progress: Called as (file, done_bytes, total_bytes), from other threads, until all is here.

    Returns:
        A folder or file; or what must be given to `from_pretrained`, or, if it is an Inbound,
        closed.

    Raises:
        ConfigError: No such model, or an option that cannot be; what is on its way already, and
            options that need all of it.
        DownloadError, WriteError: As `nexus_ext.hub.fetch`.
    """
    config, target = StreamConfig.of(**options), Device.of(device)
    can_stream = weights is None and _reads_as_it_comes(config, target)
    if isinstance(name, Outline):
        return name
    if not isinstance(name, Inbound):
        outlined = outline(name) if weights is not None and store_url() else None
        bring = arrive if can_stream else locate
        return outlined or bring(name, progress=progress)
    if not can_stream:
        raise ConfigError(
            "what is still on its way streams as it is to the CPU, with io='auto', 'direct' or "
            f"'buffered' and verify='off'; got device={target.name!r}, weights={weights!r}, "
            f"io={config.io!r}, verify={config.verify!r}. Fetch it first: nexus fetch."
        )
    return name


def _reads_as_it_comes(config: StreamConfig, device: Device) -> bool:
    """Whether a model may be streamed while it is downloaded. Mapped files and kvikio read past the
    engine's gate, and digests have nothing to be compared with before all is here; to a GPU nobody
    has tried.
    """
    return device.is_host and config.io in ("auto", "direct", "buffered") and config.verify == "off"


def _opened(
    source: Path | Inbound | Outline, model_class: str | type[nn.Module] | None
) -> tuple[Checkpoint, nn.Module]:
    """A checkpoint and its empty model. Of one that is on its way what describes packed weights is
    brought here; all else waits at the engine's gate.
    """
    source = locate(source.name) if isinstance(source, Outline) else source
    if isinstance(source, Path):
        checkpoint = open_checkpoint(source)
        return checkpoint, build_empty(source, checkpoint, model_class)
    checkpoint = source.open()
    source.bring([(entry.file, entry.offset, entry.nbytes) for entry in descriptions(checkpoint)])
    return checkpoint, build_empty(source.folder, checkpoint, model_class)


def plan_pretrained(
    name: str | Path,
    *,
    model_class: str | type[nn.Module] | None = None,
    device: str | torch.device | Device = "cpu",
    groups: str | Iterable[str] | None = None,
    by_rows: str | Iterable[str] = (),
    **options: Any,
) -> Plan:
    """What `from_pretrained` would keep and stream, read from headers alone.

    Of a model that is not here the headers are fetched, and no more; rates, and so the step, are
    unknown then. For a GPU all of it is fetched. Raises as `from_pretrained`.
    """
    config, target = StreamConfig.of(**options), Device.of(device)
    source = arrive(name, chunk_bytes=_HEADERS_CHUNK) if target.is_host else locate(name)
    with contextlib.ExitStack() as stack:
        if isinstance(source, Inbound):
            stack.callback(source.close)
        checkpoint, model = _opened(source, model_class)
        return _planned(model, checkpoint, groups, by_rows, config, target)


def _planned(
    model: nn.Module,
    checkpoint: Checkpoint,
    groups: str | Iterable[str] | None,
    by_rows: str | Iterable[str],
    config: StreamConfig,
    target: Device,
) -> Plan:
    rename = renaming(model, checkpoint)
    experts = find_experts(model, checkpoint, rename)
    layout = lay_out(
        model, checkpoint, groups, rename, strict=False, by_rows=by_rows, experts=experts
    )
    division = divide(checkpoint, layout, experts, config, target) if experts else None
    plan, _ = plan_groups(
        checkpoint,
        layout.groups,
        layout.outside,
        config if division is None else division.config,
        target,
        projections=layout.projections,
    )
    return plan if division is None else division.whole_plan(plan)


def convert(
    name: str | Path,
    folder: str | Path,
    weights: str | QuantConfig = "nf4",
    *,
    model_class: str | type[nn.Module] | None = None,
    groups: str | Iterable[str] | None = None,
    progress: Progress | None = None,
) -> list[PackedModule]:
    """Pack a model's checkpoint: what `from_pretrained` streams in a quarter of the bytes.

    Linear layers in the model's blocks and experts are packed, routers and everything else are
    copied. Never holds more than one group, or some experts. An interrupted conversion goes on
    where it stopped.

    Args:
        name: A folder with config.json and safetensors, or a hub id.
        folder: The destination; new, or of the same conversion, interrupted.
        weights: "nf4", "nf4-nested", "nf4-fine", "int8", "mixed", or a config of `nexus_ext.quant`.
        model_class, groups: As in `from_pretrained`.
        progress: Called as (what, done_bytes, total_bytes).

    Returns:
        Name, kind, error and bytes of every module that was packed.

    Raises:
        ConfigError: An option that cannot be; the destination holds something else.
        CheckpointFormatError: The source breaks its format, or is packed already.
        QuantizationError: A weight that is not finite, or of integers or float8.
        WriteError: The disk would not take it.
    """
    return _convert(
        locate(name), Path(folder), config_of(weights), model_class, groups, None, progress
    )


def _convert(
    path: Path,
    folder: Path,
    config: QuantConfig,
    model_class: str | type[nn.Module] | None,
    groups: str | Iterable[str] | None,
    shards: Shards | None,
    progress: Progress | None,
) -> list[PackedModule]:
    checkpoint = open_checkpoint(path)
    model = build_empty(path, checkpoint, model_class)
    rename = renaming(model, checkpoint)
    experts = find_experts(model, checkpoint, rename)
    layout = lay_out(model, checkpoint, groups, rename, strict=False, experts=experts)
    moved = [[member.name for member in group.members] for group in layout.groups]
    return convert_checkpoint(
        model,
        checkpoint,
        moved,
        folder,
        config,
        experts=experts,
        rename=rename,
        shards=shards,
        progress=progress,
    )


def _packed(
    source: Path | Inbound | Outline,
    config: QuantConfig,
    model_class: str | type[nn.Module] | None,
    groups: str | list[str] | None,
    progress: Progress | None,
) -> tuple[Path, Checkpoint]:
    """This model, packed: what describes it, and its shards in the cache; made where missing."""
    assert not isinstance(source, Inbound)  # packing needs all of it: see source_of
    if isinstance(source, Outline):
        path, content, identity = source.folder, list(source.weights), ""
    else:
        original = open_checkpoint(source)
        path, content, identity = source, _content(original), original.fingerprint
    facts = (json.dumps(content or identity), *_descriptions(path), config, groups)
    named = (
        f"{model_class.__module__}.{model_class.__qualname__}"
        if isinstance(model_class, type)
        else model_class
    )
    key = hashlib.sha256(repr((_PACKING, *facts, named)).encode()).hexdigest()[:16]

    def pack(folder: Path, shards: StoredShards) -> None:
        _log.info("packing %s into the cache", path)
        here = _fetched(source) if isinstance(source, Outline) else source
        checkpoint = open_checkpoint(here)
        shards.guard(lambda: _check_unchanged(checkpoint))
        if content:
            _check_content(checkpoint, content)
        elif checkpoint.fingerprint != identity:
            raise _changed(here)
        _convert(here, folder, config, model_class, groups, shards, progress)

    # Inodes and times are of this machine: on another one they may be those of other bytes.
    return open_packed(f"{path.name}-{key}", pack, is_known_everywhere=bool(content))


def _descriptions(path: Path) -> list[bytes]:
    """What a model is built of, beside its weights: see `build_empty`."""
    files = [path / name for name in ("config.json", "generation_config.json")]
    return [file.read_bytes() if file.exists() else b"" for file in files]


def _content(checkpoint: Checkpoint) -> list[tuple[str, int]]:
    """Digests and bytes of the files. In the hub's layout they are called by what is in them, on
    every node; empty where they are not.
    """
    files = [(file.path.name, file.stamp.size) for file in checkpoint.files]
    return files if all(_SHA256.fullmatch(name) for name, _ in files) else []


def _fetched(outlined: Outline) -> Path:
    """That very commit: the branch may have moved since it was listed."""
    here = locate(outlined.name)
    if here.resolve() == outlined.folder.resolve():
        return here
    return fetch(outlined.name, revision=outlined.folder.name).path


def _check_content(checkpoint: Checkpoint, content: list[tuple[str, int]]) -> None:
    """All nodes will believe that it was packed of this."""
    if _content(checkpoint) != content:
        raise _changed(checkpoint.path)
    for file in checkpoint.files:
        if sha256_of(file.path) != file.path.name:
            raise CorruptCheckpoint(
                f"A file of the hub's cache is called by the SHA-256 of its bytes; {file.path} has "
                "others. Fetch it again: nexus fetch MODEL --verify."
            )


def _check_unchanged(checkpoint: Checkpoint) -> None:
    for file in checkpoint.files:
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _changed(file.path) from error
        try:
            if Stamp.of(descriptor) != file.stamp:
                raise _changed(file.path)
        finally:
            os.close(descriptor)


def _changed(path: Path) -> CheckpointChanged:
    return CheckpointChanged(
        f"A model must not change while it is packed, but {path} did. Open it again when its "
        "writer has finished."
    )


def build_empty(
    path: Path, checkpoint: Checkpoint, model_class: str | type[nn.Module] | None = None
) -> nn.Module:
    """The model of `path/config.json` in eval mode, parameters on meta, buffers computed."""
    transformers = _transformers()
    with _describing(path, "config.json"):
        config = _config_of(transformers, path)
    kind = _class_of(transformers, config, model_class)
    dtype = _dtype_of(config, checkpoint)
    model = empty_model(kind, config, dtype)
    if dtype in (torch.float16, torch.bfloat16):
        _keep_in_float32(model, dtype, checkpoint)
    model.tie_weights()  # type: ignore[operator]
    if (path / "generation_config.json").exists():
        with _describing(path, "generation_config.json"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model.eval()


@contextlib.contextmanager
def _describing(path: Path, file: str) -> Iterator[None]:
    """What transformers raises of a file that is missing or strange becomes a `ConfigError`."""
    from huggingface_hub.errors import StrictDataclassError  # transformers needs it, too

    try:
        yield
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(
            f"A model folder needs a {file} that transformers understands; {path}: {error}"
        ) from error


def empty_model(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A model of a class of transformers, parameters on meta, buffers computed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _parameters_on_meta():
            model: nn.Module = kind(config)
    finally:
        torch.set_default_dtype(before)
    return model


def _config_of(transformers: Any, path: Path) -> Any:
    if path.suffix != ".gguf":
        return transformers.AutoConfig.from_pretrained(path)
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if not config.architectures:
        causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        config.architectures = [causal[config.model_type]]
    return config


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtra(
            "from_pretrained needs transformers: pip install 'nexus_ext[hf]'. Without it, use "
            "nexus_ext.stream(module, checkpoint)."
        ) from None
    return transformers


def _class_of(transformers: Any, config: Any, asked: str | type[nn.Module] | None) -> Any:
    if isinstance(asked, type):
        return asked
    name = asked or next(iter(config.architectures or ()), None)
    kind = getattr(transformers, name, None) if name else None
    if kind is None:
        raise ConfigError(
            f"model_class must name a class of transformers, got {name!r}; pass the class that "
            "fits this checkpoint."
        )
    return kind


def _dtype_of(config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype most of the checkpoint's bytes have: weights are never converted. Parts of packed
    weights have dtypes of their own.
    """
    packed = PackedWeights(checkpoint).names()
    weights: dict[torch.dtype, int] = {}
    for entry in checkpoint.entries.values():
        if entry.dtype.is_floating_point and entry.name not in packed:
            weights[entry.dtype] = weights.get(entry.dtype, 0) + entry.nbytes
    fallback = config.dtype or torch.float32
    return max(weights, key=lambda dtype: weights[dtype], default=fallback)


def _keep_in_float32(model: nn.Module, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    """What transformers keeps in float32, the scores of a router perhaps, where it is stored so."""
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not patterns:
        return
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    rename = renaming(model, checkpoint)
    for path, module in model.named_modules():
        for owned in (module._parameters, module._buffers):
            for leaf, tensor in owned.items():
                name = f"{path}.{leaf}" if path else leaf
                if tensor is None or tensor.dtype != dtype or not kept.search(name):
                    continue
                sources = [checkpoint.entries.get(source) for source in _sources(rename, name)]
                if all(entry and entry.dtype == torch.float32 for entry in sources):
                    tensor.data = tensor.data.float()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters are made without memory; buffers, which no checkpoint may hold, are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def renaming(model: nn.Module, checkpoint: Checkpoint) -> Callable[[str], str]:
    """Names differ by the base model's prefix when model and checkpoint differ in their head, and
    by what transformers renames; those of GGUF are others altogether.
    """
    if isinstance(checkpoint, GGUFCheckpoint):
        return checkpoint.rename
    return Conversion.of(model, checkpoint)


def _sources(rename: Callable[[str], str], name: str) -> list[str]:
    """The checkpoint's names of all that a tensor of the model needs."""
    return rename.sources(name) if isinstance(rename, Conversion) else [rename(name)]


def _report_unused(model: nn.Module, checkpoint: Checkpoint, rename: Callable[[str], str]) -> None:
    used = PackedWeights(checkpoint).names()
    for name in model.state_dict():
        used.update(_sources(rename, name))
    unused = [name for name in checkpoint.entries if name not in used]
    if unused:
        _log.info(
            "%s has no use for %d tensors: %s", type(model).__name__, len(unused), unused[:10]
        )
