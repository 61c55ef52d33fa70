"""`LayerCache`: layers of any model, by number, in memory and on disk.

    cache_layer ──▶ safetensors bytes ──▶ disk tier, RAM tier
    get_layer   ◀── module over bytes ◀── RAM tier ◀── disk tier        nothing there: None

Owns the join of both tiers and the modules made from their bytes. A layer that was got is its
caller's own: it may be changed, and nothing here changes with it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import nn

from nexus_ext.cache.blob import view_of
from nexus_ext.cache.disk import Admission, DiskTier
from nexus_ext.cache.ram import RamTier
from nexus_ext.cache.report import Entry
from nexus_ext.cache.shared_folder import default_folder
from nexus_ext.config import home_folder
from nexus_ext.errors import ConfigError, CorruptCheckpoint, ReadError
from nexus_ext.sli.counters import Counters
from nexus_ext.sli.presets import PRESETS
from nexus_ext.sli.storing import read, store
from nexus_ext.sli.templates import Template, Templates

__all__ = ["LayerCache", "Loaded"]

Folders: TypeAlias = "str | Path | Sequence[str | Path]"
_GB = 10**9


class Loaded:
    """Bytes of a layer that came from somewhere, and how they become a module.

    Attributes:
        payload: The bytes; the caller's own.
        tier: "memory", "ssd" or "source".
        digest: Names them in the RAM tier.
    """

    def __init__(
        self,
        payload: torch.Tensor,
        tier: str,
        digest: str,
        build: Callable[[torch.Tensor], nn.Module],
    ) -> None:
        self.payload = payload
        self.tier = tier
        self.digest = digest
        self._build = build

    @torch.inference_mode(False)  # a layer outlives the mode that is on now
    def build(self) -> nn.Module:
        """A layer over the payload."""
        return self._build(self.payload)

    @torch.inference_mode(False)
    def copied(self, ram: RamTier) -> Loaded:
        """The same for somebody else: what one writes does not reach the other."""
        payload = ram.load(self.digest)
        own = self.payload.clone() if payload is None else payload
        return Loaded(own, self.tier, self.digest, self._build)


class LayerCache:
    """Layers in memory and on disk, least recently used out first.

    Several caches, threads and processes may use one folder; after a restart what is on disk is
    found again. Memory is shared by processes. A forked child opens its own.

    Attributes:
        disk: The SSD tier; None where it is off.
        ram: The memory tier.
    """

    def __init__(
        self,
        cache_dir: Folders | None = None,
        max_cache_size_gb: float = 50.0,
        max_memory_cache_size_gb: float = 2.0,
        *,
        admission: Admission = "always",
        write_budget_gb_per_day: float | None = None,
        shared_memory: bool = True,
    ) -> None:
        """Open the cache. Reads no layer.

        Args:
            cache_dir: The folder, or several, best on different devices. None is
                ~/.cache/nexus/layers (or $NEXUS_HOME/layers).
            max_cache_size_gb: On disk, 10**9 bytes each; 0 keeps nothing there.
            max_memory_cache_size_gb: In memory; 0 keeps nothing there.
            admission: "second-touch" writes a layer to disk when it is cached for the second time.
            write_budget_gb_per_day: What may be written to disk in 24 hours.
            shared_memory: Whether other processes may use what is in memory here.

        Raises:
            ConfigError: A size that is none, or a folder that cannot be used.
        """
        many = [cache_dir] if isinstance(cache_dir, str | Path) else cache_dir
        folders = [Path(f).expanduser() for f in many or [home_folder() / "layers"]]
        on_disk = _gigabytes("max_cache_size_gb", max_cache_size_gb)
        in_memory = _gigabytes("max_memory_cache_size_gb", max_memory_cache_size_gb)
        budget = write_budget_gb_per_day
        a_day = None if budget is None else _gigabytes("write_budget_gb_per_day", budget)
        self.disk: DiskTier | None = None
        if on_disk:
            self.disk = DiskTier(
                folders, on_disk, write_budget_bytes_per_day=a_day, admission=admission
            )
        shared = default_folder("\n".join(str(folder.resolve()) for folder in folders))
        self.ram = RamTier(in_memory, folder=shared, shared=shared_memory)
        self.folders = folders
        self._templates = Templates()
        self._only_in_memory: dict[str, str] = {}
        self._counters = Counters()

    @classmethod
    def preset(cls, name: str, **options: Any) -> LayerCache:
        """One of the guide's configurations: "high-performance", "network-constrained",
        "memory-constrained". Options given here win.

        Raises:
            ConfigError: No such name.
        """
        if name not in PRESETS:
            raise ConfigError(f"a preset is one of {', '.join(PRESETS)}; got {name!r}.")
        return cls(**{**PRESETS[name].cache, **options})

    # -- layers ------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def cache_layer(self, model: str | Path, layer_idx: int, layer: nn.Module) -> None:
        """Keep a layer; the one kept under this number before goes.

        All its parameters and buffers are kept as they are (on the CPU), and its structure for
        `get_layer` in this process. Blocks until the disk has it. Where the disk takes nothing
        (full, over its budget, read-only) it stays in memory alone; `get_stats` says so.

        Args:
            model: Any name; put a revision into it if it has one.
            layer_idx: From 0 on.
            layer: Of any class; packed by `quantize_layer` perhaps.

        Raises:
            StreamError: A layer that has values elsewhere than in tensors, or none.
            ConfigError: A name or number that is none.
        """
        key = key_of(model, layer_idx)
        parts = store(layer, key)
        entry = None
        if self.disk is not None:
            entry = self.disk.put(key, parts, about={"model": str(model), "layer": layer_idx})
        digest = _digest_of(parts) if entry is None else entry.digest
        self.ram.put(digest, parts)
        self._only_in_memory.pop(key, None)
        if entry is None:
            # What lies on disk under this key, and perhaps cannot be removed, is another layer.
            self._only_in_memory[key] = digest
            if self.disk is not None:
                self.disk.evict(key)
        self._templates.remember(str(model), layer_idx, layer)

    def get_layer(
        self, model: str | Path, layer_idx: int, template: Template | None = None
    ) -> nn.Module | None:
        """The layer, ready to be called, in the mode (train, eval) and dtype it was cached in.

        Its weights are views of memory that is its own; nothing is copied. Blocks for a read where
        it lies on disk. A file that is damaged is set aside and counts as a miss.

        Args:
            model, layer_idx: As in `cache_layer`.
            template: A module of the same structure, or a function from the layer's number to one.
                Without it: that of `set_template`, the structure of the layer that this process
                cached, or the config of the model, if `model` is a folder or a hub id that is on
                this machine, or if the layer came from such a model.

        Raises:
            StreamError: Nothing says what structure the layer has.
            CheckpointMismatch: The template has another one.
            ConfigError: A name or number that is none.
        """
        began = time.perf_counter()
        loaded = self.load(model, layer_idx, template)
        layer = None if loaded is None else loaded.build()
        tier = "miss" if loaded is None else loaded.tier
        self._counters.note(tier, time.perf_counter() - began)
        return layer

    @torch.inference_mode(False)
    def load(
        self, model: str | Path, layer_idx: int, template: Template | None = None
    ) -> Loaded | None:
        """The bytes for `get_layer`, which is `build` of them; None where there are none."""
        key = key_of(model, layer_idx)

        def build(payload: torch.Tensor) -> nn.Module:
            where = f"layer {layer_idx} of {model}"
            stored = read(payload, where)
            return self._templates.build(str(model), layer_idx, stored, where, template)

        digest = self._only_in_memory.get(key)
        entry = self.disk.get(key) if self.disk is not None and digest is None else None
        if entry is not None:
            digest = entry.digest
        if digest is None:
            return None
        payload = self.ram.load(digest)
        if payload is not None:
            return Loaded(payload, "memory", digest, build)
        payload = None if entry is None else self._read(entry)
        return None if payload is None else Loaded(payload, "ssd", digest, build)

    def set_template(self, model: str | Path, template: Template) -> None:
        """Say what structure the layers of a model have: a module, or a function from the layer's
        number to one.
        """
        self._templates.register(str(model), template)

    def evict(self, model: str | Path, layer_idx: int) -> bool:
        """Forget a layer, in memory and on disk; whether there was one."""
        key = key_of(model, layer_idx)
        digest = self._only_in_memory.pop(key, None)
        entry = self.disk.get(key) if self.disk is not None else None
        for name in {digest, entry.digest if entry else None} - {None}:
            self.ram.evict(str(name))
        was_there = digest is not None or entry is not None
        if self.disk is not None and entry is not None:
            self.disk.evict(key)
        return was_there

    def clear(self) -> None:
        """Forget all layers, those of other processes too."""
        self._only_in_memory.clear()
        self.ram.clear()
        if self.disk is not None:
            self.disk.clear()

    def layers(self, model: str | Path) -> list[int]:
        """The numbers of a model's layers that are kept."""
        keys = [entry.key for entry in self.disk.entries()] if self.disk is not None else []
        pairs = [json.loads(key) for key in {*keys, *self._only_in_memory}]
        return sorted(index for name, index in pairs if name == str(model))

    # -- the whole ---------------------------------------------------------------------------

    def get_stats(self) -> dict[str, Any]:
        """Counters of this cache and the state of its tiers; times in milliseconds.

        hits, memory_hits, ssd_hits, misses, hit_ratio, avg_latency_ms, and those of each tier
        (memory_, ssd_): evictions, bytes, corruptions, avg_latency_ms; written_bytes; and what the
        tiers really do: memory_mode ("shared", "private: why", "off"), ssd_error.
        """
        ram = self.ram.stats()
        stats = self._counters.report() | {
            "memory_mode": ram.effective,
            "memory_bytes": ram.nbytes,
            "memory_evictions": ram.evictions,
            "memory_corruptions": ram.corrupt,
            "memory_refused": ram.refused,
        }
        if self.disk is None:
            return stats | {"evictions": ram.evictions}
        disk = self.disk.stats()
        return stats | {
            "evictions": ram.evictions + disk.evictions,
            "ssd_bytes": disk.stored_bytes,
            "ssd_evictions": disk.evictions,
            "ssd_corruptions": disk.corruptions,
            "ssd_read_bytes": disk.read_bytes,
            "written_bytes": disk.written_bytes,
            "write_amplification": disk.write_amplification,
            "ssd_error": disk.last_error,
            "ssd": disk,
        }

    def close(self) -> None:
        """Write down what was used when, and let go. Layers stay. May be called twice."""
        self.ram.close()
        if self.disk is not None:
            self.disk.close()

    def __enter__(self) -> LayerCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------

    def _read(self, entry: Entry) -> torch.Tensor | None:
        """From disk into the RAM tier, or past it; None where it cannot be believed or read."""
        disk = self.disk
        assert disk is not None

        def fill(memory: torch.Tensor) -> None:
            disk.read(entry, memory)

        try:
            payload = self.ram.fill(entry.digest, entry.nbytes, fill)
            return disk.read(entry) if payload is None else payload
        except (CorruptCheckpoint, ReadError):
            return None  # the disk tier counted it and set it aside


def key_of(model: str | Path, layer_idx: int) -> str:
    """What the tiers call a layer.

    Raises:
        ConfigError: A name or number that is none.
    """
    if isinstance(layer_idx, bool) or not isinstance(layer_idx, int) or layer_idx < 0:
        raise ConfigError(f"a layer has a number from 0 on, got {layer_idx!r}.")
    if not isinstance(model, str | Path) or not str(model):
        raise ConfigError(f"a model has a name, got {model!r}.")
    return json.dumps([str(model), layer_idx])


def _digest_of(parts: Sequence[torch.Tensor]) -> str:
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(view_of(part))
    return sha256.hexdigest()


def _gigabytes(name: str, number: float) -> int:
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not 0 <= number < float("inf"):
        raise ConfigError(f"{name} is a number of gigabytes from 0 on, got {number!r}.")
    return int(number * _GB)
