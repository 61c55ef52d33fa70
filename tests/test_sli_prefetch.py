"""Fetching ahead: nothing is read twice, nothing is lost, errors reach who asks."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nexus_ext as nexus
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.demo import make_llama
from nexus_ext.errors import (
    CheckpointChanged,
    ConfigError,
    EngineClosed,
    ReadError,
    StreamError,
)
from nexus_ext.sli import ComputeIOOverlap, IOOptimizer, LayerCache, download_from_hub
from nexus_ext.sli.prefetch import Prefetcher
from nexus_ext.sli.prefetch_counts import PrefetchCounts, verdicts
from nexus_ext.sli.source import ModelSource

NUM_LAYERS = 8
PATIENCE_SECONDS = 60

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    path = folder / "llama"
    make_llama(path, num_blocks=NUM_LAYERS, hidden=64, intermediate=96, vocabulary=64)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[LayerCache]:
    with LayerCache(tmp_path / "cache") as made:
        yield made


@pytest.fixture
def no_memory(tmp_path: Path) -> Iterator[LayerCache]:
    """A cache that keeps nothing."""
    with LayerCache(tmp_path / "none", 0, 0) as made:
        yield made


class Reads:
    """Counts reads of layers; holds those back whose gate is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[int] = Counter()
        self.began: dict[int, threading.Event] = {i: threading.Event() for i in range(NUM_LAYERS)}
        self.gates: dict[int, threading.Event] = {}
        self.errors: dict[int, BaseException] = {}
        self._lock = threading.Lock()
        real = ModelSource.read

        def read(source: ModelSource, index: int, out: torch.Tensor) -> None:
            with self._lock:
                self.counts[index] += 1
            self.began[index].set()
            if index in self.gates:
                assert self.gates[index].wait(PATIENCE_SECONDS)
            if index in self.errors:
                raise self.errors.pop(index)
            real(source, index, out)

        monkeypatch.setattr(ModelSource, "read", read)

    def close(self, *indices: int) -> None:
        for index in indices:
            self.gates[index] = threading.Event()

    def open(self, *indices: int) -> None:
        for index in indices:
            self.gates[index].set()

    def wait(self, *indices: int) -> None:
        for index in indices:
            assert self.began[index].wait(PATIENCE_SECONDS)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def weight(layer: nn.Module) -> torch.Tensor:
    return layer.get_parameter("mlp.up_proj.weight")


def stored(llama: Path, index: int) -> torch.Tensor:
    return load_file(llama / "model.safetensors")[f"model.layers.{index}.mlp.up_proj.weight"]


def until(is_true: Callable[[], bool]) -> None:
    """Wait for something that another thread will have done."""
    tick = threading.Event()
    for _ in range(PATIENCE_SECONDS * 100):
        if is_true():
            return
        tick.wait(0.01)
    raise AssertionError("it did not happen")


# -- ahead -----------------------------------------------------------------------------------------


def test_the_next_layers_are_read_while_this_one_computes(
    cache: LayerCache, llama: Path, reads: Reads
) -> None:
    with Prefetcher(cache, lookahead=2) as prefetcher:
        prefetcher.get(llama, 0, NUM_LAYERS)
        reads.wait(1, 2)
        assert not reads.began[3].is_set()
        until(lambda: prefetcher.stats()["queue_depth"] == 0)
        layer = prefetcher.get(llama, 1, NUM_LAYERS)
        assert torch.equal(weight(layer), stored(llama, 1))
        stats = prefetcher.stats()
        assert (stats["prefetch_ready"], stats["prefetch_used"], stats["cache_hits"]) == (1, 1, 1)
        reads.wait(3)
    assert max(reads.counts.values()) == 1


def test_who_asks_for_what_is_on_its_way_joins_it(
    no_memory: LayerCache, llama: Path, reads: Reads
) -> None:
    reads.close(1)
    results: list[nn.Module] = []
    with Prefetcher(no_memory, lookahead=1) as prefetcher:
        prefetcher.get(llama, 0, NUM_LAYERS)
        reads.wait(1)
        askers = [
            threading.Thread(
                target=lambda: results.append(prefetcher.get(llama, 1, NUM_LAYERS, lookahead=0))
            )
            for _ in range(3)
        ]
        for asker in askers:
            asker.start()
        flight = prefetcher._flights[str(llama), 1]
        assert flight.is_claimed
        reads.open(1)
        for asker in askers:
            asker.join()
    assert len(results) == 3
    # Somebody may have come when the joined read was over and given away: then it is read again.
    assert reads.counts[1] <= 3
    assert all(torch.equal(weight(layer), stored(llama, 1)) for layer in results)
    with torch.no_grad():
        weight(results[0]).zero_()
    assert torch.equal(weight(results[1]), stored(llama, 1))


def test_two_who_ask_for_one_layer_share_one_read(
    cache: LayerCache, llama: Path, reads: Reads
) -> None:
    reads.close(0)
    results: list[nn.Module] = []
    with Prefetcher(cache, lookahead=0) as prefetcher:
        askers = [
            threading.Thread(target=lambda: results.append(prefetcher.get(llama, 0, NUM_LAYERS)))
            for _ in range(4)
        ]
        for asker in askers:
            asker.start()
        reads.wait(0)
        reads.open(0)
        for asker in askers:
            asker.join()
    assert reads.counts[0] == 1  # who came later found it in memory
    assert all(torch.equal(weight(layer), stored(llama, 0)) for layer in results)
    assert len({weight(layer).data_ptr() for layer in results}) == 4


def test_without_lookahead_nothing_is_read_ahead(
    cache: LayerCache, llama: Path, reads: Reads
) -> None:
    with IOOptimizer(cache, enable_prefetch=False) as optimizer:
        for index in range(3):
            optimizer.get_layer_with_prefetch(llama, index, NUM_LAYERS)
        stats = optimizer.get_stats()["prefetcher"]
    assert stats["prefetch_issued"] == 0
    assert sorted(reads.counts) == [0, 1, 2]


def test_the_last_layers_have_nothing_behind_them(
    cache: LayerCache, llama: Path, reads: Reads
) -> None:
    with Prefetcher(cache, lookahead=5) as prefetcher:
        prefetcher.get(llama, NUM_LAYERS - 2, NUM_LAYERS)
        prefetcher.get(llama, NUM_LAYERS - 1, NUM_LAYERS)
        assert prefetcher.stats()["prefetch_issued"] == 1
    assert sorted(reads.counts) == [NUM_LAYERS - 2, NUM_LAYERS - 1]


def test_who_jumps_about_leaves_a_bounded_number_behind(
    no_memory: LayerCache, llama: Path, reads: Reads
) -> None:
    with Prefetcher(no_memory, lookahead=1, learns_order=False) as prefetcher:
        for index in (0, 4, 2, 6, 0, 4, 2, 6):
            layer = prefetcher.get(llama, index, NUM_LAYERS)
            assert torch.equal(weight(layer), stored(llama, index))
            until(lambda: prefetcher.stats()["queue_depth"] == 0)
            assert len(prefetcher._flights) <= 2
        stats = prefetcher.stats()
    assert stats["prefetch_dropped"] > 0
    assert stats["prefetch_hit_rate"] == 0.0


def test_a_second_pass_comes_from_memory(cache: LayerCache, llama: Path, reads: Reads) -> None:
    with Prefetcher(cache) as prefetcher:
        for _ in range(2):
            for index in range(NUM_LAYERS):
                prefetcher.get(llama, index)
        stats = prefetcher.stats()
    assert reads.counts == dict.fromkeys(range(NUM_LAYERS), 1)
    assert (stats["from_source"], stats["from_memory"]) == (NUM_LAYERS, NUM_LAYERS)
    assert cache.disk is not None
    assert cache.disk.stats().written_bytes == 0


def test_layers_in_the_cache_come_before_the_models_own(cache: LayerCache, llama: Path) -> None:
    mine = nn.Linear(3, 3)
    cache.cache_layer(llama, 1, mine)
    with Prefetcher(cache) as prefetcher:
        prefetcher.get(llama, 0)
        layer: Any = prefetcher.get(llama, 1)
        assert torch.equal(layer.weight, mine.weight)
        assert prefetcher.stats()["from_source"] >= 1


def test_a_model_that_is_only_cached(cache: LayerCache, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(4, 4) for _ in range(3)]
    for index, layer in enumerate(layers):
        cache.cache_layer("mine", index, layer)
    cache.cache_layer("mine", 7, layers[0])
    with Prefetcher(cache) as prefetcher:
        assert prefetcher.num_layers("mine") == 3
        for index, layer in enumerate(layers):
            got: Any = prefetcher.get("mine", index)
            assert torch.equal(got.weight, layer.weight)


# -- errors ----------------------------------------------------------------------------------------


def test_what_fails_ahead_is_raised_to_who_asks_and_can_be_asked_again(
    cache: LayerCache, llama: Path, reads: Reads
) -> None:
    reads.errors[1] = ReadError("the disk said no")
    with Prefetcher(cache, lookahead=1) as prefetcher:
        prefetcher.get(llama, 0, NUM_LAYERS)
        until(lambda: prefetcher.stats()["queue_depth"] == 0)
        with pytest.raises(ReadError, match="said no"):
            prefetcher.get(llama, 1, NUM_LAYERS)
        layer = prefetcher.get(llama, 1, NUM_LAYERS)
        assert torch.equal(weight(layer), stored(llama, 1))
    assert reads.counts[1] == 2


def test_what_nobody_asks_for_fails_for_nobody(
    cache: LayerCache, llama: Path, reads: Reads
) -> None:
    reads.errors[1] = ReadError("the disk said no")
    with Prefetcher(cache, lookahead=1) as prefetcher:
        prefetcher.get(llama, 0, NUM_LAYERS)
        until(lambda: prefetcher.stats()["queue_depth"] == 0)
        assert prefetcher.get(llama, 2, NUM_LAYERS) is not None


def test_a_file_that_changed_is_an_error(cache: LayerCache, folder: Path) -> None:
    path = folder / "changing"
    make_llama(path, num_blocks=3, hidden=64, intermediate=96, vocabulary=64)
    with Prefetcher(cache, lookahead=0) as prefetcher:
        prefetcher.get(path, 0)
        tensors = load_file(path / "model.safetensors")
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path / "other")
        (path / "other").rename(path / "model.safetensors")
        with pytest.raises(CheckpointChanged):
            prefetcher.get(path, 1)
    with Prefetcher(cache, lookahead=0) as prefetcher:  # opened anew: nothing old is left
        assert torch.equal(weight(prefetcher.get(path, 0)), stored(path, 0))


@pytest.mark.parametrize("index", [-1, NUM_LAYERS, 100, "0", None])
def test_layers_that_are_not_there(cache: LayerCache, llama: Path, index: Any) -> None:
    with Prefetcher(cache) as prefetcher, pytest.raises(ConfigError):
        prefetcher.get(llama, index)


def test_more_layers_than_there_are(cache: LayerCache, llama: Path) -> None:
    with (
        Prefetcher(cache, lookahead=0) as prefetcher,
        pytest.raises(ConfigError, match="numbered from 0 to 7"),
    ):
        prefetcher.get(llama, NUM_LAYERS, NUM_LAYERS + 1)


def test_a_model_that_is_nowhere(cache: LayerCache, tmp_path: Path) -> None:
    with Prefetcher(cache) as prefetcher:
        for _ in range(2):
            with pytest.raises(ConfigError, match="does not exist"):
                prefetcher.get(tmp_path / "nowhere", 0, 3)
            with pytest.raises(ConfigError, match="does not exist"):
                prefetcher.get(tmp_path / "nowhere", 0)


@pytest.mark.parametrize("number", [-1, 65, 1.5, True, "2"])
def test_lookaheads_that_cannot_be(cache: LayerCache, number: Any) -> None:
    with pytest.raises(ConfigError, match="lookahead"):
        IOOptimizer(cache, prefetch_lookahead=number)


def test_an_optimizer_needs_a_cache() -> None:
    with pytest.raises(ConfigError, match="LayerCache"):
        IOOptimizer({})  # type: ignore[arg-type]


# -- the end ---------------------------------------------------------------------------------------


def test_closing_waits_for_reads_and_begins_no_other(
    cache: LayerCache, llama: Path, reads: Reads
) -> None:
    reads.close(1, 2, 3, 4)  # as many as there are threads
    prefetcher = Prefetcher(cache, lookahead=6)
    prefetcher.get(llama, 0, NUM_LAYERS)
    reads.wait(1, 2, 3, 4)
    closing = threading.Thread(target=prefetcher.close)
    closing.start()
    until(lambda: prefetcher._is_closed)
    reads.open(1, 2, 3, 4)
    closing.join()
    prefetcher.close()
    assert sorted(reads.counts) == [0, 1, 2, 3, 4]
    assert [t.name for t in threading.enumerate() if t.name.startswith("nexus-prefetch")] == []
    for ask in (
        lambda: prefetcher.get(llama, 0, NUM_LAYERS),
        lambda: prefetcher.begin("m", range(2)),
    ):
        with pytest.raises(EngineClosed):
            ask()


def test_a_process_that_forgets_to_close_ends(llama: Path, tmp_path: Path) -> None:
    code = """
import sys
from nexus_ext.sli import IOOptimizer, LayerCache
optimizer = IOOptimizer(LayerCache(sys.argv[2]), prefetch_lookahead=5)
optimizer.get_layer_with_prefetch(sys.argv[1], 0)
print(optimizer.layer_cache.ram.effective)
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(llama), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_SECONDS,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "HOME": str(tmp_path)},
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "shared\n", "")
    with LayerCache(tmp_path / "cache") as cache:
        assert cache.ram.stats().nbytes == 0  # who leaves last takes the memory along


# -- pipelines -------------------------------------------------------------------------------------


def test_a_pipeline_begins_where_it_is_told(cache: LayerCache, llama: Path) -> None:
    with IOOptimizer(cache) as optimizer:
        overlap = ComputeIOOverlap(optimizer, pipeline_depth=3)
        overlap.start_pipeline(llama, start_layer=5)
        got = [overlap.get_next_layer(llama) for _ in range(4)]
        assert [layer is None for layer in got] == [False, False, False, True]
        for index, layer in zip((5, 6, 7), got, strict=False):
            assert layer is not None
            assert torch.equal(weight(layer), stored(llama, index))
        overlap.start_pipeline(llama, start_layer=NUM_LAYERS)
        assert overlap.get_next_layer(llama) is None
        overlap.start_pipeline(llama, num_layers=1)
        assert overlap.get_next_layer(llama) is not None
        assert overlap.get_next_layer(llama) is None


def test_a_layer_that_fails_is_the_next_one_again(
    cache: LayerCache, llama: Path, reads: Reads
) -> None:
    reads.errors[0] = ReadError("the disk said no")
    with IOOptimizer(cache) as optimizer:
        overlap = ComputeIOOverlap(optimizer)
        overlap.start_pipeline(llama)
        with pytest.raises(ReadError):
            overlap.get_next_layer(llama)
        layer = overlap.get_next_layer(llama)
        assert layer is not None
        assert torch.equal(weight(layer), stored(llama, 0))


def test_pipelines_that_cannot_be(cache: LayerCache, llama: Path) -> None:
    with pytest.raises(ConfigError, match="IOOptimizer"):
        ComputeIOOverlap(cache)  # type: ignore[arg-type]
    with IOOptimizer(cache) as optimizer:
        with pytest.raises(ConfigError, match="pipeline_depth"):
            ComputeIOOverlap(optimizer, pipeline_depth=0)
        overlap = ComputeIOOverlap(optimizer)
        with pytest.raises(StreamError, match="start_pipeline"):
            overlap.get_next_layer(llama)
        with pytest.raises(ConfigError, match="starts at"):
            overlap.start_pipeline(llama, start_layer=NUM_LAYERS + 1)


# -- verdicts --------------------------------------------------------------------------------------


def test_before_any_request_there_is_no_verdict() -> None:
    assert {one.is_met for one in verdicts(PrefetchCounts().report()).values()} == {None}


def test_verdicts_compare_with_the_guides_targets() -> None:
    counts = PrefetchCounts()
    for number in range(10):
        counts.note_depth(3)
        counts.note("memory" if number else "source", number > 0, False, number > 0, 0.05)
    found = verdicts(counts.report())
    assert {name: one.is_met for name, one in found.items()} == {
        "cache_hit_ratio": True,
        "avg_load_latency_ms": True,
        "prefetch_hit_rate": True,
        "queue_depth": True,
    }
    for _ in range(10):
        counts.note("source", False, False, False, 0.5)
        counts.note_dropped()
        counts.note_depth(9)
    found = verdicts(counts.report())
    assert {one.is_met for one in found.values()} == {False}
    assert found["cache_hit_ratio"].measured == 0.45


# -- models ----------------------------------------------------------------------------------------


def config_of(kind: str) -> Any:
    import transformers

    small = {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    gqa = {"intermediate_size": 96, "num_key_value_heads": 2}
    return {
        "LlamaForCausalLM": lambda: transformers.LlamaConfig(**small, **gqa),
        "MistralForCausalLM": lambda: transformers.MistralConfig(**small, **gqa, sliding_window=4),
        "Qwen2ForCausalLM": lambda: transformers.Qwen2Config(**small, **gqa),
        "Gemma2ForCausalLM": lambda: transformers.Gemma2Config(
            **small, **gqa, head_dim=16, sliding_window=4
        ),
        "GPT2LMHeadModel": lambda: transformers.GPT2Config(
            vocab_size=64, n_embd=64, n_layer=3, n_head=4, n_positions=64
        ),
    }[kind]()


KINDS = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Gemma2ForCausalLM",
    "GPT2LMHeadModel",
]


def hidden_by_layer(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What goes into each block of a model that is in memory, and what the last one gives."""
    seen: list[torch.Tensor] = []
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))

    def before(block: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(block: nn.Module, args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(after))
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_called_alone_compute_what_they_do_in_their_model(
    cache: LayerCache, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    """Windows shorter than the input, soft caps, biases: each block gets its model's own masks."""
    import transformers

    config = config_of(kind)
    getattr(transformers, kind)(config).to(dtype).save_pretrained(tmp_path / "model")
    # As transformers loads it: `to` has rounded buffers that stay in float32.
    model = getattr(transformers, kind).from_pretrained(tmp_path / "model", dtype=dtype)
    model.eval().requires_grad_(False)
    for length in (1, 9):
        seen = hidden_by_layer(model, torch.randint(0, 64, (2, length)))
        with IOOptimizer(cache) as optimizer:
            for index in range(3):
                layer = optimizer.get_layer_with_prefetch(tmp_path / "model", index)
                out = layer(seen[index])
                out = out[0] if isinstance(out, tuple) else out
                assert torch.equal(out, seen[index + 1]), (length, index)


def test_packed_checkpoints_come_packed(cache: LayerCache, llama: Path, tmp_path: Path) -> None:
    nexus.convert(llama, tmp_path / "packed", "nf4")
    streamed: Any = nexus.from_pretrained(tmp_path / "packed", budget="64MiB")
    with torch.no_grad():
        seen = hidden_by_layer(streamed, torch.randint(0, 64, (2, 5)))
    nexus.close(streamed)
    with IOOptimizer(cache) as optimizer, torch.no_grad():
        for index in range(NUM_LAYERS):
            layer: Any = optimizer.get_layer_with_prefetch(tmp_path / "packed", index)
            assert type(layer.mlp.up_proj).__name__ == "PackedLinear"
            assert torch.equal(layer(seen[index]), seen[index + 1])
    full = Checkpoint.open(llama).nbytes
    assert cache.ram.stats().nbytes < 0.5 * full


# -- modes and origins -----------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [0, 1.0])
def test_a_layer_outlives_inference_mode(tmp_path: Path, llama: Path, in_memory: float) -> None:
    with LayerCache(tmp_path, 1.0, in_memory) as cache, IOOptimizer(cache) as optimizer:
        with torch.inference_mode():
            layers = [
                optimizer.get_layer_with_prefetch(llama, 0),
                download_from_hub(llama, 0),
            ]
            cache.cache_layer("m", 0, layers[1])
            layers.append(cache.get_layer("m", 0))  # type: ignore[arg-type]
            hidden = torch.randn(1, 3, 64)
            results = [layer(hidden) for layer in layers]
        for layer, result in zip(layers, results, strict=True):
            x = hidden.clone().requires_grad_()
            out = layer(x)
            out.sum().backward()
            assert torch.equal(out, result)
            assert x.grad is not None


def test_a_cached_layer_finds_its_model_again_unless_it_is_another(
    tmp_path: Path, folder: Path
) -> None:
    path = folder / "renewed"
    make_llama(path, num_blocks=2, hidden=64, intermediate=96, vocabulary=64)
    x = torch.randn(1, 3, 64)
    with LayerCache(tmp_path) as cache:
        layer = download_from_hub(path, 1)
        expected = layer(x)
        cache.cache_layer("m", 1, layer)
    with LayerCache(tmp_path) as cache:
        again = cache.get_layer("m", 1)
        assert again is not None
        assert torch.equal(again(x), expected)
    config = path / "config.json"
    (path / "other").write_text(
        config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1')
    )
    (path / "other").rename(config)
    with LayerCache(tmp_path) as cache, pytest.raises(StreamError, match="template"):
        cache.get_layer("m", 1)


def test_a_pickled_layer_still_gets_what_its_model_would_give(llama: Path, tmp_path: Path) -> None:
    layer = download_from_hub(llama, 2)
    torch.save(layer, tmp_path / "layer.pt")
    x = torch.randn(1, 5, 64)
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert torch.equal(loaded(x), layer(x))
    with pytest.raises(TypeError):  # its own call, with something missing, stays its own
        loaded(x, position_ids=torch.arange(5)[None])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_gguf_file_comes_layer_by_layer(cache: LayerCache, tmp_path: Path) -> None:
    from tests.test_quant_gguf import IDS, tiny, write

    path = tmp_path / "model.gguf"
    write(path, tiny("llama"), "llama", "q8_0")
    streamed: Any = nexus.from_pretrained(path, budget="1GiB")
    with torch.no_grad():
        seen = hidden_by_layer(streamed, IDS)
    nexus.close(streamed)
    with IOOptimizer(cache) as optimizer, torch.no_grad():
        for index in range(len(seen) - 1):
            layer = optimizer.get_layer_with_prefetch(path, index)
            assert torch.equal(layer(seen[index]), seen[index + 1])
