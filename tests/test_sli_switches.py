"""The guide's advice: presets, sizes, and what can be switched off, really do what they say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nexus_ext.cache.shared_folder import default_folder
from nexus_ext.demo import make_llama
from nexus_ext.quant import PackedLinear
from nexus_ext.sli import (
    ComputeIOOverlap,
    IOOptimizer,
    LayerCache,
    download_from_hub,
    quantize_layer,
)
from nexus_ext.sli.presets import PRESETS
from tests.conftest import PATIENCE_SECONDS

NUM_LAYERS = 6
PART = "mlp.up_proj.weight"

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    path = folder / "llama"
    make_llama(path, num_blocks=NUM_LAYERS, hidden=64, intermediate=96, vocabulary=64)
    return path


@pytest.fixture(scope="module")
def weights(llama: Path) -> list[torch.Tensor]:
    tensors = load_file(llama / "model.safetensors")
    return [tensors[f"model.layers.{index}.{PART}"] for index in range(NUM_LAYERS)]


def is_right(layer: nn.Module | None, weight: torch.Tensor) -> bool:
    return layer is not None and torch.equal(layer.get_parameter(PART), weight)


def one_pass(optimizer: IOOptimizer, llama: Path, weights: list[torch.Tensor]) -> None:
    for index, weight in enumerate(weights):
        layer = optimizer.get_layer_with_prefetch(llama, index, NUM_LAYERS)
        assert is_right(layer, weight)


def fill(cache: LayerCache, llama: Path) -> None:
    for index in range(NUM_LAYERS):
        cache.cache_layer("m", index, download_from_hub(llama, index))
    cache.set_template("m", download_from_hub(llama, 0))


def until(is_true: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(100 * PATIENCE_SECONDS):
        if is_true():
            return
        tick.wait(0.01)
    raise AssertionError("it did not happen")


@pytest.fixture
def new_threads() -> Callable[[], list[threading.Thread]]:
    """The threads that fetch ahead and were not there when the test began."""
    before = set(threading.enumerate())

    def look() -> list[threading.Thread]:
        found = set(threading.enumerate()) - before
        return [one for one in found if one.name.startswith("nexus-prefetch")]

    return look


# -- presets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_serves_a_model(
    tmp_path: Path, llama: Path, weights: list[torch.Tensor], name: str
) -> None:
    with (
        LayerCache.preset(name, cache_dir=tmp_path) as cache,
        IOOptimizer.preset(name, cache) as optimizer,
    ):
        for _ in range(2):
            one_pass(optimizer, llama, weights)
        counts = optimizer.get_stats()["prefetcher"]
    assert counts["from_source"] == counts["from_memory"] == NUM_LAYERS
    assert counts["prefetch_issued"] > 0


def test_options_win_over_a_preset(tmp_path: Path) -> None:
    with (
        LayerCache.preset(
            "high-performance", cache_dir=tmp_path, max_memory_cache_size_gb=0
        ) as cache,
        IOOptimizer.preset("high-performance", cache, prefetch_lookahead=1) as optimizer,
    ):
        assert cache.ram.effective == "off"
        assert cache.disk.stats().max_bytes == 100 * 10**9  # type: ignore[union-attr]
        assert optimizer.prefetcher.lookahead == 1


def test_little_memory_means_packed_layers(tmp_path: Path, llama: Path) -> None:
    """What the preset names as its weights, a layer is packed with."""
    preset = PRESETS["memory-constrained"]
    assert preset.weights == "nf4"
    with LayerCache.preset("memory-constrained", cache_dir=tmp_path) as cache:
        packed = quantize_layer(download_from_hub(llama, 0), mode=preset.weights)
        cache.cache_layer("m", 0, packed)
        layer: Any = cache.get_layer("m", 0)
        assert type(layer.mlp.up_proj) is PackedLinear
        x = torch.randn(1, 3, 64)
        assert torch.equal(layer(x), packed(x))


# -- switched off ----------------------------------------------------------------------------------


def test_without_memory_nothing_is_kept_there(
    tmp_path: Path, llama: Path, weights: list[torch.Tensor]
) -> None:
    with LayerCache(tmp_path, max_memory_cache_size_gb=0) as cache:
        fill(cache, llama)
        for _ in range(2):
            for index, weight in enumerate(weights):
                assert is_right(cache.get_layer("m", index), weight)
        stats = cache.get_stats()
        assert (stats["memory_mode"], stats["memory_bytes"]) == ("off", 0)
        assert (stats["memory_hits"], stats["ssd_hits"]) == (0, 2 * NUM_LAYERS)
        assert not default_folder(str(tmp_path.resolve())).exists()
        with IOOptimizer(cache) as optimizer:  # fetching ahead needs none
            one_pass(optimizer, llama, weights)
            assert optimizer.get_stats()["cache"]["memory_bytes"] == 0


def test_with_memory_there_is_such_a_folder(tmp_path: Path, llama: Path) -> None:
    with LayerCache(tmp_path) as cache:
        fill(cache, llama)
        assert cache.get_stats()["memory_mode"] == "shared"
        assert default_folder(str(tmp_path.resolve())).exists()


def test_without_disk_nothing_is_written(
    tmp_path: Path, llama: Path, weights: list[torch.Tensor]
) -> None:
    with LayerCache(tmp_path / "none", max_cache_size_gb=0) as cache:
        fill(cache, llama)
        assert all(is_right(cache.get_layer("m", i), weights[i]) for i in range(NUM_LAYERS))
        stats = cache.get_stats()
        assert (stats["memory_hits"], stats["ssd_hits"], stats["evictions"]) == (NUM_LAYERS, 0, 0)
        cache.count("prefetched")  # nowhere to keep it
    assert not (tmp_path / "none").exists()


def test_with_nothing_at_all_every_layer_is_read_from_its_model(
    tmp_path: Path, llama: Path, weights: list[torch.Tensor]
) -> None:
    with LayerCache(tmp_path / "none", 0, 0) as cache, IOOptimizer(cache) as optimizer:
        for _ in range(2):
            one_pass(optimizer, llama, weights)
        assert optimizer.get_stats()["prefetcher"]["from_source"] == 2 * NUM_LAYERS
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("options", [{"enable_prefetch": False}, {"prefetch_lookahead": 0}])
def test_without_prefetch_no_thread_reads_ahead(
    tmp_path: Path,
    llama: Path,
    weights: list[torch.Tensor],
    options: dict[str, Any],
    new_threads: Callable[[], list[threading.Thread]],
) -> None:
    with LayerCache(tmp_path) as cache, IOOptimizer(cache, **options) as optimizer:
        for _ in range(3):
            one_pass(optimizer, llama, weights)
            assert new_threads() == []
        counts = optimizer.get_stats()["prefetcher"]
    assert (counts["prefetch_issued"], counts["max_queue_depth"]) == (0, 0)
    assert (counts["from_source"], counts["from_memory"]) == (NUM_LAYERS, 2 * NUM_LAYERS)


def test_with_prefetch_there_are_threads_until_the_end(
    tmp_path: Path,
    llama: Path,
    weights: list[torch.Tensor],
    new_threads: Callable[[], list[threading.Thread]],
) -> None:
    with LayerCache(tmp_path) as cache:
        with IOOptimizer(cache) as optimizer:
            one_pass(optimizer, llama, weights)
            assert new_threads() != []
        assert new_threads() == []


def test_a_pipeline_fetches_ahead_even_so(tmp_path: Path, llama: Path) -> None:
    with LayerCache(tmp_path) as cache, IOOptimizer(cache, enable_prefetch=False) as optimizer:
        overlap = ComputeIOOverlap(optimizer, pipeline_depth=2)
        overlap.start_pipeline(llama)
        while overlap.get_next_layer(llama) is not None:
            pass
        assert optimizer.get_stats()["prefetcher"]["prefetch_issued"] == NUM_LAYERS


# -- sizes -----------------------------------------------------------------------------------------


def hit_ratio(folder: Path, llama: Path, max_cache_size_gb: float) -> float:
    """Of two passes over all layers, each cached where it is not there."""
    with LayerCache(folder, max_cache_size_gb, 0) as cache:
        cache.set_template("m", download_from_hub(llama, 0))
        for _ in range(2):
            for index in range(NUM_LAYERS):
                if cache.get_layer("m", index) is None:
                    cache.cache_layer("m", index, download_from_hub(llama, index))
        stats = cache.get_stats()
    assert stats["ssd"].zones[0].free_bytes > 0
    return float(stats["hit_ratio"])


def test_a_larger_cache_has_more_hits(tmp_path: Path, llama: Path) -> None:
    nbytes = sum(p.nbytes for p in download_from_hub(llama, 0).parameters())
    model_gb = NUM_LAYERS * nbytes / 1e9
    # A pass in order over more than fits finds nothing that is left; all that fits is found.
    assert hit_ratio(tmp_path / "small", llama, 0.5 * model_gb) == 0
    assert hit_ratio(tmp_path / "large", llama, 2 * model_gb) == 0.5


@pytest.mark.parametrize("lookahead", [1, 2, 5])
def test_a_smaller_lookahead_holds_fewer_layers(
    tmp_path: Path, llama: Path, lookahead: int
) -> None:
    with (
        LayerCache(tmp_path / "none", 0, 0) as cache,
        IOOptimizer(cache, prefetch_lookahead=lookahead) as optimizer,
    ):
        prefetcher = optimizer.prefetcher
        most = 0
        for index in (0, 3, 1, 5, 2, 0, 4, 1, 3, 5):
            prefetcher.get(llama, index, NUM_LAYERS)
            until(lambda: prefetcher.stats()["queue_depth"] == 0)
            most = max(most, len(prefetcher._flights))
    assert lookahead <= most <= 2 * lookahead
