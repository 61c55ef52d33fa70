"""`convert`: a checkpoint packed once, group by group, so that it streams in fewer bytes.

    source ──read one group──▶ pack ──▶ one shard, written under another name, then renamed

Never holds more than one group, and what packing its largest weight takes. Every shard is plain
safetensors, its data begins on a page and lies in the order in which a group is laid out: one read
brings a group, or an expert. Names and config.json are those of bitsandbytes, so that transformers
loads the result, except for mixtures of 4 and 8 bits and for experts.

A conversion that was interrupted goes on where it stopped: its journal (`JOURNAL`) says which
shards are done, and for which source and configuration.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import nn

from nexus_ext.checkpoint import ALIGNMENT, Checkpoint
from nexus_ext.errors import CheckpointFormatError, ConfigError, NexusError, WriteError
from nexus_ext.experts.find import ExpertLayer
from nexus_ext.quant.config import INT8Config, NF4Config, QuantConfig
from nexus_ext.quant.packed import describes_weight, pack
from nexus_ext.quant.selection import Selection
from nexus_ext.quant.stacked import pack_stacked

__all__ = ["JOURNAL", "REPORT", "PackedModule", "convert_checkpoint"]

JOURNAL = "nexus-conversion.jsonl"
REPORT = "nexus-conversion.json"

# Called as (what, done_bytes, total_bytes).
Progress = Callable[[str, int, int], None]

_log = logging.getLogger("nexus_ext")

_PAGE_BYTES = 4096
_DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
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
    job = _Job(checkpoint, folder, selection, progress or (lambda what, done, total: None))
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
        selection: Selection,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._folder = folder
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
        with _writing(self._folder):
            finished = self._begin()
            names = [
                f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                for number in range(1, len(shards) + 1)
            ]
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

    # -- the journal -------------------------------------------------------------------------

    def _begin(self) -> dict[str, list[dict[str, Any]]]:
        """Open the journal, or make one; the shards that are done, and their part of the report."""
        journal = self._folder / JOURNAL
        if not journal.exists():
            if self._folder.exists() and any(self._folder.iterdir()):
                raise ConfigError(
                    f"A destination must be new or an interrupted conversion; {self._folder} holds "
                    "something else. Name another folder, or remove it."
                )
            self._folder.mkdir(parents=True, exist_ok=True)
            self._note(self._identity)
            return {}
        lines, end = _whole_lines(journal)
        if not lines or lines[0] != self._identity:
            raise ConfigError(
                f"{self._folder} holds the conversion of another source or configuration. Name "
                "another folder, or remove it."
            )
        os.truncate(journal, end)  # the next line begins where a line begins
        return {line["shard"]: line["packed"] for line in lines[1:]}

    def _note(self, line: Mapping[str, Any]) -> None:
        with open(self._folder / JOURNAL, "a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fdatasync(journal.fileno())

    # -- shards ------------------------------------------------------------------------------

    def _write_shard(
        self, shard: str, tensors: list[str], packable: set[str]
    ) -> list[dict[str, Any]]:
        stored: dict[str, dict[str, torch.Tensor]] = {}
        packed: list[dict[str, Any]] = []
        with ExitStack() as stack:
            files = _Files(self._checkpoint, stack)
            for name in tensors:
                config = self._selection.config_of(name) if name in packable else None
                if config is None:
                    stored[name] = {name: files.of(name).get_tensor(name)}
                    continue
                stored[name], line = self._pack(name, config, files)
                packed.append(asdict(line))
            write_safetensors(self._folder / shard, self._in_order(stored))
        self._note({"shard": shard, "packed": packed})
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
            made = Checkpoint.open(self._folder / shard)
            weight_map |= dict.fromkeys(made.entries, shard)
            total += made.nbytes
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_text(self._folder / REPORT, json.dumps([asdict(line) for line in report], indent=1))
        self._copy_the_rest(report)
        # The index makes it a checkpoint: it comes last.
        _write_text(self._folder / "model.safetensors.index.json", json.dumps(index, indent=1))
        (self._folder / JOURNAL).unlink()

    def _copy_the_rest(self, report: list[PackedModule]) -> None:
        for path in sorted(self._checkpoint.path.parent.iterdir()):
            if path.is_file() and not path.name.endswith(_NOT_COPIED) and path.name != REPORT:
                if path.name == "config.json":
                    fields = json.loads(path.read_text())
                    fields["quantization_config"] = self._quantization_config(report, fields)
                    _write_text(self._folder / path.name, json.dumps(fields, indent=2))
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


def _whole_lines(journal: Path) -> tuple[list[Any], int]:
    """The lines that were written to their end, and where that is: power may fail in the middle."""
    lines, end = [], 0
    for line in journal.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            lines.append(json.loads(line.decode()))
        except ValueError:
            break
        end += len(line)
    return lines, end


# -- files -----------------------------------------------------------------------------------------


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


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one file whose data begins on a page; whole, or not at all.

    What moves stands in front, and in front of that whatever is a multiple of `ALIGNMENT`, so that
    it lies in the file as it will lie in a group.
    """
    ordered = sorted(
        tensors.items(),
        key=lambda item: (describes_weight(item[0]), item[1].nbytes % ALIGNMENT != 0),
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _PAGE_BYTES)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in ordered:
                _write_tensor(file, tensor.contiguous())
            file.flush()
            os.fdatasync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    if tensor.nbytes:
        file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text + "\n")
    partial.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
