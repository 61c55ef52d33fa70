"""`LayerCache`: layers of any model, by number, in memory and on disk.

    cache_layer ──▶ safetensors bytes ──▶ RAM tier, disk side  ──publish──▶ store of all nodes
    get_layer   ◀── module over bytes ◀── RAM tier ◀── disk side  ◀───────── store of all nodes

Owns the modules made from bytes (`layer_bytes` has those). A layer that was got is its caller's
own: it may be changed, and nothing here changes with it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import nn

from nexus_ext.cache.disk import Admission
from nexus_ext.cache.remote import RemoteStore
from nexus_ext.cache.tiers import Tier
from nexus_ext.config import home_folder
from nexus_ext.errors import ConfigError
from nexus_ext.sli.counters import Counters
from nexus_ext.sli.disk_side import DiskOptions
from nexus_ext.sli.layer_bytes import LayerBytes
from nexus_ext.sli.loaded import Loaded
from nexus_ext.sli.presets import PRESETS
from nexus_ext.sli.storing import read, store
from nexus_ext.sli.templates import Template, Templates

__all__ = ["LayerCache", "key_of"]

Folders: TypeAlias = "str | Path | Sequence[str | Path]"
_GB = 10**9


class LayerCache:
    """Layers in memory and on disk, least recently used out first.

    Several caches, threads and processes may use one folder; after a restart what is on disk is
    found again. Memory is shared by processes. A forked child opens its own.

    Attributes:
        disk: A DiskTier, or a TieredStore where there are several tiers or a remote store; None
            where nothing is kept on disk.
        ram: The memory tier.
        folders: Of the disk side, fastest first.
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
        tiers: Sequence[Tier] | None = None,
        remote: RemoteStore | str | None = None,
        publish: bool = False,
    ) -> None:
        """Open the cache. Reads no layer; the rate of a new tier is measured.

        Args:
            cache_dir: The folder, or several, best on different devices. None is
                ~/.cache/nexus/layers (or $NEXUS_HOME/layers).
            max_cache_size_gb: On disk, 10**9 bytes each; 0 keeps nothing there. Not looked at if
                there are tiers.
            max_memory_cache_size_gb: In memory; 0 keeps nothing there.
            admission: "second-touch" writes a layer to disk when it is cached for the second time.
            write_budget_gb_per_day: What may be written to disk in 24 hours.
            shared_memory: Whether other processes may use what is in memory here.
            tiers: Instead of cache_dir: several folders, fastest first, each with a size of its
                own; layers move between them, and are compressed where that is read faster.
            remote: A store of several nodes, or its URL (file://, s3://, http://); asked for what
                is not here. A name must mean the same model on all nodes.
            publish: Whether what is cached here goes there too.

        Raises:
            ConfigError: A size that is none, a folder that cannot be used, or options that exclude
                each other.
            MissingExtra: The driver of the remote store is not installed.
        """
        on_disk = _gigabytes("max_cache_size_gb", max_cache_size_gb)
        in_memory = _gigabytes("max_memory_cache_size_gb", max_memory_cache_size_gb)
        budget = write_budget_gb_per_day
        a_day = None if budget is None else _gigabytes("write_budget_gb_per_day", budget)
        self.folders = _folders(cache_dir, tiers)
        store_of_nodes = RemoteStore(remote) if isinstance(remote, str) else remote
        options = DiskOptions(
            self.folders, on_disk, tiers or (), store_of_nodes, publish, admission, a_day
        )
        self._bytes = LayerBytes(options, in_memory, shared_memory)
        self.disk, self.ram = self._bytes.disk, self._bytes.ram
        self._templates = Templates()
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
        about = {"model": str(model), "layer": layer_idx}
        self._bytes.keep(key, store(layer, key), about)
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

        found = self._bytes.find(key)
        return None if found is None else Loaded(*found, build)

    def set_template(self, model: str | Path, template: Template) -> None:
        """Say what structure the layers of a model have: a module, or a function from the layer's
        number to one.
        """
        self._templates.register(str(model), template)

    def evict(self, model: str | Path, layer_idx: int) -> bool:
        """Forget a layer, in memory and on disk; whether there was one. A remote store keeps what
        it has, and gives it again when it is asked.
        """
        return self._bytes.forget(key_of(model, layer_idx))

    def clear(self) -> None:
        """Forget all layers, those of other processes too; not those of a remote store."""
        self._bytes.clear()

    def layers(self, model: str | Path) -> list[int]:
        """The numbers of a model's layers that are kept here; a remote store is not asked."""
        pairs = [json.loads(key) for key in self._bytes.all_keys()]
        return sorted(index for name, index in pairs if name == str(model))

    # -- the whole ---------------------------------------------------------------------------

    def get_stats(self) -> dict[str, Any]:
        """Counters of this cache and the state of its tiers; times in milliseconds.

        hits, memory_hits, ssd_hits, remote_hits, misses, hit_ratio (`hits` are those near: memory
        and disk), avg_latency_ms, and those of each (memory_, ssd_, remote_): evictions, bytes,
        corruptions, avg_latency_ms; written_bytes.

        tiers: Of each, fastest first: folder, hits (asked for and found there; memory may have had
        the bytes), bytes, read_bytes, written_bytes, evictions, bytes_per_second (measured; None
        where there is only one), compression (what was decided, and why).
        promotions, promoted_bytes, demotions, demoted_bytes, moved_bytes: Between them.
        remote_bytes, published_bytes: On the wire, from the remote store and to it;
        remote_refused: objects that were not what they should be.

        What really happens: memory_mode ("shared", "private: why", "off"), ssd_error, remote_error.
        """
        return self._counters.report() | self._bytes.report()

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter that `nexus cache stats` shows (see `DiskTier.count`); nothing is
        counted where nothing is kept on disk.
        """
        self._bytes.count(name, number)

    def close(self) -> None:
        """Write down what was used when, and let go. Layers stay. May be called twice."""
        self._bytes.close()

    def __enter__(self) -> LayerCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


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


def _folders(cache_dir: Folders | None, tiers: Sequence[Tier] | None) -> list[Path]:
    if tiers is not None:
        if cache_dir is not None:
            raise ConfigError("tiers have folders of their own; got cache_dir too. Leave it out.")
        if not tiers:
            raise ConfigError("tiers are one Tier or more, fastest first; got none.")
        return [Path(tier.path).expanduser() for tier in tiers]
    many = [cache_dir] if isinstance(cache_dir, str | Path) else cache_dir
    return [Path(folder).expanduser() for folder in many or [home_folder() / "layers"]]


def _gigabytes(name: str, number: float) -> int:
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not 0 <= number < float("inf"):
        raise ConfigError(f"{name} is a number of gigabytes from 0 on, got {number!r}.")
    return int(number * _GB)
