"""`convert`: a checkpoint packed once, group by group, so that it streams in fewer bytes.

    source ──read one group──▶ pack ──▶ one shard, there as a whole or not at all

Never holds more than one group, and what packing its largest weight takes. Every shard is plain
safetensors, its data begins on a page and lies in the order in which a group is laid out: one read
brings a group, or an expert. Names and config.json are those of bitsandbytes, so that transformers
loads the result, except for mixtures of 4 and 8 bits and for experts.

A conversion that was interrupted goes on where it stopped: where its shards go (`shards.py`) says
which are done, and for which source and configuration.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.errors import CheckpointFormatError, ConfigError, NexusError, WriteError
from nexus_ext.experts.find import ExpertLayer
from nexus_ext.files import write_whole
from nexus_ext.quant.config import INT8Config, NF4Config, QuantConfig
from nexus_ext.quant.packed import pack
from nexus_ext.quant.selection import Selection
from nexus_ext.quant.shards import FolderShards, Report, Shards
from nexus_ext.quant.stacked import pack_stacked

__all__ = ["REPORT", "PackedModule", "convert_checkpoint"]

REPORT = "nexus-conversion.json"

# Called as (what, done_bytes, total_bytes).
Progress = Callable[[str, int, int], None]

_log = logging.getLogger("nexus_ext")

# For whoever may enter the folder, as what save_pretrained writes.
_READABLE = 0o644
# Weights, and what names them; everything else in a model's folder is small and copied.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".h5", ".msgpack")


@dataclass(frozen=True)
class PackedModule:
    """One line of the report: `error` is relative to the weight's own size (root mean square)."""

    name: str
    weights: str  # "nf4", "nf4-nested" or "int8"
    error: float
    bytes_before: int
    bytes_after: int


def convert_checkpoint(
    model: nn.Module,
    checkpoint: Checkpoint,
    groups: Iterable[Iterable[str]],
    folder: Path,
    config: QuantConfig,
    *,
    experts: Sequence[ExpertLayer] = (),
    rename: Callable[[str], str] = lambda name: name,
    shards: Shards | None = None,
    progress: Progress | None = None,
) -> list[PackedModule]:
    """Pack the Linear layers of a model's groups, and its experts; everything else is copied as it
    is, routers too.

    Experts that are one tensor stay one: packed with NF4 expert by expert, or, where `config` asks
    for what cannot be cut by expert, without nested scales or plain, and a warning is logged.

    Args:
        model: Without weights; says which weights belong to Linear layers.
        checkpoint: The source; plain.
        groups: Names of the checkpoint's tensors that move together; the rest forms a shard too.
        folder: Where to write; new, or with the journal of this very conversion.
        shards: Where the shards go; None is files in `folder`, beside what describes them.
        config: What to pack, and how.
        experts: Where the model's experts are in the source.
        rename: From a name in the model to the name in the checkpoint.
        progress: Called as (what, done_bytes, total_bytes).

    Returns:
        What was packed, in order; also written to `folder / REPORT`.

    Raises:
        ConfigError: The destination exists and holds something else, or nothing would be packed.
        CheckpointFormatError: The source is packed already.
        QuantizationError: A weight that cannot be packed.
        WriteError: The disk would not take it; what is done stays, and the next call goes on.
    """
    _refuse_packed(checkpoint)
    selection = Selection.of(model, checkpoint, experts, config, rename)
    for name, why in selection.compromises():
        _log.warning("%s is not packed as asked: %s", name, why)
    job = _Job(
        checkpoint,
        folder,
        shards or FolderShards(folder),
        selection,
        progress or (lambda what, done, total: None),
    )
    return job.run([*(list(names) for names in groups), *selection.shards])


def _refuse_packed(checkpoint: Checkpoint) -> None:
    for name, entry in checkpoint.entries.items():
        if "quant_state" in name or name.endswith((".SCB", ".weight_scale")):
            raise CheckpointFormatError(
                f"A source must hold plain weights, and {name!r} in "
                f"{checkpoint.files[entry.file].path} belongs to packed ones. Stream it as it is, "
                "or convert the original model."
            )


def _word(config: NF4Config | INT8Config) -> str:
    if isinstance(config, INT8Config):
        return "int8"
    return "nf4-nested" if config.nested else "nf4"


class _Job:
    """One conversion, from the first shard to the index."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        shards: Shards,
        selection: Selection,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
        self._shards = shards
        self._selection = selection
        self._progress = progress
        self._done_bytes = 0
        self._identity = {
            "source": checkpoint.fingerprint,
            "config": json.loads(json.dumps(asdict(selection.config))),
            "kind": type(selection.config).__name__,
        }

    def run(self, groups: list[list[str]]) -> list[PackedModule]:
        grouped = {name for names in groups for name in names}
        rest = [name for name in self._checkpoint.entries if name not in grouped]
        shards = [names for names in (rest, *groups) if names]
        self._check_packs_something(groups)
        names = [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        with _writing(self._folder):
            finished = self._shards.begin(self._identity, names)
            for shard, tensors in zip(names, shards, strict=True):
                if shard not in finished:
                    finished[shard] = self._write_shard(shard, tensors, grouped)
                self._count(tensors)
            report = [PackedModule(**line) for shard in names for line in finished[shard]]
            self._finish(names, report)
        return report

    def _check_packs_something(self, groups: list[list[str]]) -> None:
        if any(self._selection.config_of(name) for names in groups for name in names):
            return
        raise ConfigError(
            "A conversion packs the Linear layers of a model's blocks; this one would pack none. "
            "Look at the patterns of its config, or leave the model as it is."
        )

    def _count(self, tensors: list[str]) -> None:
        self._done_bytes += sum(self._checkpoint.entries[name].nbytes for name in tensors)
        self._progress("packing", self._done_bytes, self._checkpoint.nbytes)

    # -- shards ------------------------------------------------------------------------------

    def _write_shard(self, shard: str, tensors: list[str], packable: set[str]) -> Report:
        stored: dict[str, dict[str, torch.Tensor]] = {}
        packed: Report = []
        with ExitStack() as stack:
            files = _Files(self._checkpoint, stack)
            for name in tensors:
                config = self._selection.config_of(name) if name in packable else None
                if config is None:
                    stored[name] = {name: files.of(name).get_tensor(name)}
                    continue
                stored[name], line = self._pack(name, config, files)
                packed.append(asdict(line))
            self._shards.write(shard, self._in_order(stored), packed)
        return packed

    def _pack(
        self, name: str, config: NF4Config | INT8Config, files: _Files
    ) -> tuple[dict[str, torch.Tensor], PackedModule]:
        entry = self._checkpoint.entries[name]
        if name in self._selection.stacked and isinstance(config, NF4Config):
            rows = files.of(name).get_slice(name)
            made, error = pack_stacked(lambda number: rows[number], entry.shape, config, name)
        else:
            weight = files.of(name).get_tensor(name)
            made = pack(weight, config, name)
            error = made.error(weight)
        own = made.stored(name, entry.dtype)
        nbytes = sum(tensor.nbytes for tensor in own.values())
        word = _word(config)
        return own, PackedModule(self._selection.name(name), word, error, entry.nbytes, nbytes)

    def _in_order(self, stored: Mapping[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Parts of one weight beside each other, and alike parts of gate and up, which are used as
        one. (Nested scales are not: each has an offset of its own.)
        """
        ordered: dict[str, torch.Tensor] = {}
        for name, own in stored.items():
            if name in ordered:
                continue
            names = self._selection.beside.get(name, (name,))
            together = [stored[other] for other in names if other in stored]
            sizes = {len(parts) for parts in together}
            if len(sizes) > 1 or f"{name}.nested_absmax" in own:
                together = [own]
            for parts in zip(*(parts.items() for parts in together), strict=True):
                ordered |= dict(parts)
        return ordered

    # -- the end -----------------------------------------------------------------------------

    def _finish(self, shards: list[str], report: list[PackedModule]) -> None:
        weight_map: dict[str, str] = {}
        total = 0
        for shard in shards:
            tensors, nbytes = self._shards.tensor_names(shard)
            weight_map |= dict.fromkeys(tensors, shard)
            total += nbytes
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        self._write(REPORT, [asdict(line) for line in report])
        self._copy_the_rest(report)
        # The index makes it a checkpoint: it comes last.
        self._write("model.safetensors.index.json", index)
        self._shards.end()

    def _write(self, name: str, content: object) -> None:
        text = json.dumps(content, indent=1) + "\n"
        write_whole(self._folder / name, text, _READABLE)

    def _copy_the_rest(self, report: list[PackedModule]) -> None:
        for path in sorted(self._checkpoint.path.parent.iterdir()):
            if path.is_file() and not path.name.endswith(_NOT_COPIED) and path.name != REPORT:
                if path.name == "config.json":
                    fields = json.loads(path.read_text())
                    fields["quantization_config"] = self._quantization_config(report, fields)
                    self._write(path.name, fields)
                else:
                    shutil.copyfile(path, self._folder / path.name)

    def _quantization_config(
        self, report: list[PackedModule], fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What transformers goes by. A mixture of 4 and 8 bits it cannot load, nor packed experts,
        and it must not try.
        """
        packed = {line.name for line in report}
        kinds = {line.weights for line in report}
        left = self._selection.left(packed)
        if len(kinds) > 1 or self._selection.has_experts(packed):
            return {"quant_method": "nexus_ext", "modules": {m.name: m.weights for m in report}}
        is_int8 = kinds == {"int8"}
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": not is_int8,
            "_load_in_4bit": not is_int8,
            "load_in_8bit": is_int8,
            "_load_in_8bit": is_int8,
            "llm_int8_skip_modules": left,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "bnb_4bit_quant_type": "fp4" if is_int8 else "nf4",
            "bnb_4bit_use_double_quant": kinds == {"nf4-nested"},
            "bnb_4bit_compute_dtype": fields.get("dtype") or fields.get("torch_dtype") or "float32",
            "bnb_4bit_quant_storage": "uint8",
        }


class _Files:
    """The files of a checkpoint, opened when they are needed."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self._checkpoint = checkpoint
        self._stack = stack
        self._opened: dict[int, Any] = {}

    def of(self, name: str) -> Any:
        """The file of a tensor."""
        number = self._checkpoint.entries[name].file
        if number not in self._opened:
            path = str(self._checkpoint.files[number].path)
            self._opened[number] = self._stack.enter_context(safe_open(path, "pt"))
        return self._opened[number]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What the disk refuses becomes a `WriteError`."""
    try:
        yield
    except NexusError:
        raise
    except OSError as error:
        raise WriteError(
            f"{folder} must take the packed weights, but: {error}. Make room or choose another "
            "folder, and convert again: what is done stays."
        ) from error
