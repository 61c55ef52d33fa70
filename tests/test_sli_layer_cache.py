"""`LayerCache`: what goes in comes out, in this process, in the next one, and after damage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from nexus_ext.errors import (
    CheckpointMismatch,
    ConfigError,
    CorruptCheckpoint,
    EngineClosed,
    ForkedEngine,
    NexusError,
    StreamError,
)
from nexus_ext.quant import NF4Config, PackedLinear
from nexus_ext.sli import LayerCache, quantize_layer
from nexus_ext.sli.storing import read, store

WIDTH = 64


class Block(nn.Module):
    """Tied weights, buffers of both kinds, several dtypes, a part in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.5)
        self.narrow = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.register_buffer("scale", torch.rand(WIDTH))
        self.register_buffer("hidden", torch.rand(1), persistent=False)
        self.register_buffer("nothing", None)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.empty(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.second(self.first(x)))
        return self.drop(y) * self.scale * self.hidden + self.narrow.float().sum() + self.count


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[LayerCache]:
    with LayerCache(tmp_path / "cache") as made:
        yield made


@pytest.fixture
def block() -> Block:
    made = Block().eval()
    made.first.bias.requires_grad_(False)
    return made


def reopened(cache: LayerCache, **options: Any) -> LayerCache:
    cache.close()
    return LayerCache(cache.folders, **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    mine = dict(one.named_parameters(remove_duplicate=False)) | dict(one.named_buffers())
    theirs = dict(other.named_parameters(remove_duplicate=False)) | dict(other.named_buffers())
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype
        and mine[name].requires_grad == theirs[name].requires_grad
        and torch.equal(mine[name], theirs[name])
        for name in mine
    )


# -- what goes in comes out ------------------------------------------------------------------------


def test_a_layer_comes_back_as_it_was(cache: LayerCache, block: Block) -> None:
    block.drop.train()
    cache.cache_layer("m", 0, block)
    layer: Any = cache.get_layer("m", 0)
    assert layer is not block
    assert same(layer, block)
    assert layer.second.weight is layer.first.weight
    assert layer.nothing is None
    assert {name: module.training for name, module in layer.named_modules()} == {
        name: module.training for name, module in block.named_modules()
    }
    assert layer.state_dict().keys() == block.state_dict().keys()
    x = torch.randn(5, WIDTH)
    block.drop.eval()
    layer.drop.eval()
    assert torch.equal(layer(x), block(x))


def test_after_a_restart_a_template_brings_the_code(cache: LayerCache, block: Block) -> None:
    cache.cache_layer("m", 0, block)
    again = reopened(cache)
    with pytest.raises(StreamError, match="set_template"):
        again.get_layer("m", 0)
    layer: Any = again.get_layer("m", 0, template=Block())
    assert same(layer, block)
    numbers: list[int] = []

    def make(number: int) -> nn.Module:
        numbers.append(number)
        return Block().double()

    assert same(again.get_layer("m", 0, template=make), block)  # type: ignore[arg-type]
    again.set_template("m", make)
    assert same(again.get_layer("m", 0), block)  # type: ignore[arg-type]
    assert same(again.get_layer("m", 0), block)  # type: ignore[arg-type]
    assert numbers == [0, 0]  # asked once for each layer
    again.close()


def test_what_a_caller_does_to_a_layer_stays_with_him(cache: LayerCache, block: Block) -> None:
    cache.cache_layer("m", 0, block)
    first: Any = cache.get_layer("m", 0)
    second: Any = cache.get_layer("m", 0)
    with torch.no_grad():
        first.first.weight.zero_()
        first.scale.fill_(3)
    del first.norm
    assert same(second, block)
    assert same(cache.get_layer("m", 0), block)  # type: ignore[arg-type]
    with torch.no_grad():
        block.first.weight.zero_()
    assert not same(cache.get_layer("m", 0), block)  # type: ignore[arg-type]


def test_weights_are_views_of_shared_memory(cache: LayerCache, block: Block) -> None:
    cache.cache_layer("m", 0, block)
    layer: Any = cache.get_layer("m", 0)
    addresses = {t.untyped_storage().data_ptr() for t in layer.parameters()}
    assert len(addresses) == 1
    (address,) = addresses
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "nexus-" in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    assert any(begin <= address < end for begin, end in ranges)
    # Aligned as BLAS likes it, whatever lies before.
    assert {t.data_ptr() % 64 for t in layer.parameters()} == {0}


def test_the_bytes_are_safetensors(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    path.write_bytes(b"".join(bytes(part.tolist()) for part in store(block)))
    with safe_open(str(path), "pt") as file:
        assert torch.equal(file.get_tensor("first.weight"), block.first.weight)
        assert torch.equal(file.get_tensor("hidden"), block.hidden)
        assert "second.weight" not in file.keys()  # noqa: SIM118
        assert not path.read_bytes().startswith(b"\x80")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.complex64, torch.float8_e4m3fn, torch.uint16]
)
def test_dtypes_survive(cache: LayerCache, dtype: torch.dtype) -> None:
    layer = nn.Module()
    layer.register_buffer("odd", torch.arange(1, 8).to(dtype).reshape(7))
    layer.register_buffer("scalar", torch.ones((), dtype=dtype))
    layer.register_buffer("strided", torch.arange(12).to(torch.float32).reshape(3, 4).t())
    cache.cache_layer("m", 0, layer)
    got: Any = cache.get_layer("m", 0)
    for name, tensor in layer.named_buffers():
        assert got.get_buffer(name).dtype == tensor.dtype
        assert got.get_buffer(name).tolist() == tensor.tolist()


@pytest.mark.parametrize("mode", ["nf4", "nf4-nested", "int8", "mixed"])
@pytest.mark.parametrize("restart", [False, True])
def test_packed_layers_stay_packed(cache: LayerCache, mode: str, restart: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True).eval()
    plain = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)
    # Its attention reads out_proj.weight itself, so only the feed-forward part is packed here.
    for name in ("linear1", "linear2"):
        setattr(layer, name, quantize_layer(getattr(layer, name), mode))
    cache.cache_layer("m", 0, layer)
    if restart:
        cache = reopened(cache)
        cache.set_template("m", plain)
    got: Any = cache.get_layer("m", 0)
    assert type(got.linear1) is PackedLinear
    x = torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        assert torch.equal(got.linear1(x), layer.linear1(x))
        assert torch.equal(got.linear2(got.linear1(x)), layer.linear2(layer.linear1(x)))
    assert type(plain.linear1) is nn.Linear
    cache.close()


def test_a_packed_linear_alone(cache: LayerCache) -> None:
    linear = nn.Linear(WIDTH, WIDTH)
    packed = quantize_layer(linear, config=NF4Config(blocksize=32))
    cache.cache_layer("m", 0, packed)
    again = reopened(cache)
    x = torch.randn(2, WIDTH)
    got: Any = again.get_layer("m", 0, template=nn.Linear(WIDTH, WIDTH))
    assert torch.equal(got(x), packed(x))
    for wrong in (nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU()):
        with pytest.raises(CheckpointMismatch):
            again.get_layer("m", 0, template=wrong)
    again.close()


# -- templates that do not fit ---------------------------------------------------------------------


class Larger(Block):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 2 * WIDTH)


class More(Block):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(1, 1)


class Tied(Block):
    """Two tensors of the stored layer are one here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.bias = self.norm.weight


@pytest.mark.parametrize(
    ("template", "said"),
    [(Larger(), "as stored"), (More(), "lacks"), (Tied(), "one tensor"), (nn.ReLU(), "lacks")],
)
def test_another_structure_is_refused(
    cache: LayerCache, block: Block, template: nn.Module, said: str
) -> None:
    cache.cache_layer("m", 0, block)
    with pytest.raises(CheckpointMismatch, match=said):
        cache.get_layer("m", 0, template=template)
    assert same(cache.get_layer("m", 0), block)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", [3, "Block", Block])
def test_a_template_is_a_module_or_makes_one(
    cache: LayerCache, block: Block, template: Any
) -> None:
    cache.cache_layer("m", 0, block)
    with pytest.raises(ConfigError, match="template"):
        cache.get_layer("m", 0, template=template)
    with pytest.raises(ConfigError, match="template"):
        cache.set_template("m", template)
    with pytest.raises(ConfigError, match="template"):
        cache.get_layer("m", 0, template=lambda number: "no module")  # type: ignore[arg-type,return-value]


# -- layers that cannot be kept --------------------------------------------------------------------


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"a": 1}


def streamed_weight() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.empty(2, 2, device="meta"))
    return layer


def sparse() -> nn.Module:
    layer = nn.Module()
    layer.register_buffer("s", torch.eye(3).to_sparse())
    return layer


def unknown_dtype() -> nn.Module:
    layer = nn.Module()
    layer.register_buffer("c", torch.zeros(2, dtype=torch.complex128))
    return layer


@pytest.mark.parametrize(
    "make", [lambda: Extra(2, 2), streamed_weight, sparse, unknown_dtype, lambda: nn.LazyLinear(3)]
)
def test_what_is_no_plain_tensor_is_refused(cache: LayerCache, make: Any) -> None:
    with pytest.raises(StreamError, match="cached"):
        cache.cache_layer("m", 0, make())
    assert cache.get_layer("m", 0) is None


@pytest.mark.parametrize(
    ("model", "index"), [("", 0), (None, 0), ("m", -1), ("m", True), ("m", "0")]
)
def test_names_and_numbers_that_cannot_be(cache: LayerCache, model: Any, index: Any) -> None:
    for ask in (
        lambda: cache.get_layer(model, index),
        lambda: cache.evict(model, index),
        lambda: cache.cache_layer(model, index, nn.Linear(1, 1)),
    ):
        with pytest.raises(ConfigError):
            ask()


@pytest.mark.parametrize("option", ["max_cache_size_gb", "max_memory_cache_size_gb"])
@pytest.mark.parametrize("number", [-1, float("nan"), float("inf"), "2", True])
def test_sizes_that_cannot_be(tmp_path: Path, option: str, number: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        LayerCache(tmp_path, **{option: number})


def test_no_such_preset() -> None:
    with pytest.raises(ConfigError, match="memory-constrained"):
        LayerCache.preset("fast")


# -- tiers -----------------------------------------------------------------------------------------


def test_counters_tell_where_a_layer_came_from(cache: LayerCache, block: Block) -> None:
    assert cache.get_layer("m", 0) is None
    cache.cache_layer("m", 0, block)
    cache.get_layer("m", 0)
    cache.ram.clear()
    cache.get_layer("m", 0)
    cache.get_layer("m", 0)
    stats = cache.get_stats()
    assert (stats["memory_hits"], stats["ssd_hits"], stats["misses"]) == (2, 1, 1)
    assert (stats["hits"], stats["hit_ratio"]) == (3, 0.75)
    assert stats["memory_mode"] == "shared"
    assert 0 < stats["memory_bytes"] < 1 << 20
    key = json.dumps(["m", 0])
    assert stats["ssd_read_bytes"] == sum(part.nbytes for part in store(block, key))
    assert stats["avg_latency_ms"] > 0


@pytest.mark.parametrize(("on_disk", "in_memory"), [(1.0, 0), (0, 1.0), (0, 0)])
def test_either_tier_may_be_off(
    tmp_path: Path, block: Block, on_disk: float, in_memory: float
) -> None:
    with LayerCache(tmp_path, on_disk, in_memory) as cache:
        cache.cache_layer("m", 0, block)
        layer = cache.get_layer("m", 0)
        if on_disk or in_memory:
            assert layer is not None
            assert same(layer, block)
        else:
            assert layer is None
    assert list(tmp_path.rglob("*.nx")) == [] or on_disk


def test_the_disk_tier_is_bounded_and_the_oldest_goes(tmp_path: Path) -> None:
    layers = [nn.Linear(256, 256) for _ in range(4)]
    room = 3 * 0.00028
    with LayerCache(tmp_path, room, 0) as cache:
        for index, layer in enumerate(layers):
            cache.cache_layer("m", index, layer)
        found = [cache.get_layer("m", index) for index in range(4)]
        assert [one is None for one in found] == [True, False, False, False]
        assert cache.get_stats()["ssd_evictions"] == 1
        assert cache.get_stats()["ssd_bytes"] <= room * 1e9


def test_what_the_disk_refuses_stays_in_memory(tmp_path: Path, block: Block) -> None:
    with LayerCache(tmp_path, admission="second-touch") as cache:
        cache.cache_layer("m", 0, block)
        assert list(tmp_path.rglob("*.nx")) == []
        assert same(cache.get_layer("m", 0), block)  # type: ignore[arg-type]
        assert cache.layers("m") == [0]
        cache.cache_layer("m", 0, block)
        assert len(list(tmp_path.rglob("*.nx"))) == 1
        assert cache.get_stats()["misses"] == 0


def test_a_layer_that_was_replaced_never_comes_back(tmp_path: Path, block: Block) -> None:
    """Not even where the disk took the first one and refuses the second."""
    with LayerCache(tmp_path, 1.0, 0, write_budget_gb_per_day=0.0001) as cache:
        cache.cache_layer("m", 0, block)
        assert cache.get_layer("m", 0) is not None
        other = Block().eval()
        cache.cache_layer("m", 0, nn.Sequential(other, nn.Linear(512, 512)))
        assert cache.get_layer("m", 0) is None
    with LayerCache(tmp_path, 1.0, 0) as cache:
        assert cache.get_layer("m", 0, template=Block()) is None


def test_models_are_apart(cache: LayerCache) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    cache.cache_layer("a", 1, first)
    cache.cache_layer("b", 1, second)
    cache.cache_layer("a", 11, second)
    assert same(cache.get_layer("a", 1), first)  # type: ignore[arg-type]
    assert same(cache.get_layer("b", 1), second)  # type: ignore[arg-type]
    assert cache.layers("a") == [1, 11]
    assert cache.evict("a", 1)
    assert not cache.evict("a", 1)
    assert cache.get_layer("a", 1) is None
    assert same(cache.get_layer("b", 1), second)  # type: ignore[arg-type]
    cache.clear()
    assert cache.layers("b") == []
    assert cache.get_layer("b", 1) is None


def test_layers_alike_are_forgotten_one_by_one(cache: LayerCache) -> None:
    layer = nn.Linear(4, 4)
    for index in range(3):
        cache.cache_layer("m", index, layer)
    assert cache.evict("m", 1)
    assert cache.get_layer("m", 1) is None
    assert same(cache.get_layer("m", 0), layer)  # type: ignore[arg-type]
    assert same(cache.get_layer("m", 2), layer)  # type: ignore[arg-type]


# -- damage ----------------------------------------------------------------------------------------


def test_a_damaged_file_is_a_miss_and_is_set_aside(cache: LayerCache, block: Block) -> None:
    cache.cache_layer("m", 0, block)
    cache.ram.clear()
    (path,) = cache.folders[0].rglob("*.nx")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert cache.get_layer("m", 0) is None
    assert cache.get_stats()["ssd_corruptions"] == 1
    cache.cache_layer("m", 0, block)
    assert same(cache.get_layer("m", 0), block)  # type: ignore[arg-type]


def test_bytes_that_are_no_layer_are_refused(block: Block) -> None:
    payload = torch.cat(store(block))
    whole = read(payload, "it")
    assert whole.about.kind.endswith("Block")
    header = int.from_bytes(bytes(payload[:8].tolist()), "little")
    for length in (0, 7, 8, 100, header + 7, len(payload) - 1):
        with pytest.raises(NexusError):
            read(payload[:length], "it")
    with pytest.raises(CorruptCheckpoint):
        read(torch.full((100,), 255, dtype=torch.uint8), "it")
    plain = payload.clone()
    text = bytes(plain[8 : 8 + header].tolist()).replace(b"nexus_layer", b"nexus_lawyer"[:11])
    plain[8 : 8 + header] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(NexusError, match="what module"):
        read(plain, "it")


# -- processes, threads, the end -------------------------------------------------------------------

CHILD = """
import sys, torch
from torch import nn
from nexus_ext.sli import LayerCache
with LayerCache(sys.argv[1]) as cache:
    layer = cache.get_layer("m", 0, template=nn.Linear(64, 64))
    print(layer.weight.double().sum().item(), cache.get_stats()["memory_hits"], flush=True)
    with torch.no_grad():
        layer.weight.zero_()
    cache.cache_layer("m", 1, nn.Linear(64, 64))
"""


def test_another_process_finds_it_in_memory(cache: LayerCache) -> None:
    layer = nn.Linear(64, 64)
    cache.cache_layer("m", 0, layer)
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(cache.folders[0])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert result.stdout.split() == [str(layer.weight.double().sum().item()), "1"]
    assert same(cache.get_layer("m", 0), layer)  # type: ignore[arg-type]
    assert cache.get_layer("m", 1, template=nn.Linear(64, 64)) is not None


def test_many_threads_get_right_layers(cache: LayerCache) -> None:
    layers = [nn.Linear(64, 64) for _ in range(6)]
    for index, layer in enumerate(layers):
        cache.cache_layer("m", index, layer)
    failures: list[int] = []

    def ask(start: int) -> None:
        for step in range(30):
            index = (start + step) % len(layers)
            if step % 7 == 0:
                cache.ram.clear()
            got = cache.get_layer("m", index)
            if got is None or not same(got, layers[index]):
                failures.append(index)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_after_the_end(cache: LayerCache, block: Block) -> None:
    cache.cache_layer("m", 0, block)
    layer = cache.get_layer("m", 0)
    cache.close()
    cache.close()
    assert layer is not None
    assert same(layer, block)
    for ask in (
        lambda: cache.get_layer("m", 0),
        lambda: cache.cache_layer("m", 0, block),
        cache.clear,
    ):
        with pytest.raises(EngineClosed):
            ask()


def test_a_forked_child_is_told(cache: LayerCache, block: Block) -> None:
    cache.cache_layer("m", 0, block)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            cache.get_layer("m", 0)
        except ForkedEngine:
            cache.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(cache.get_layer("m", 0), block)  # type: ignore[arg-type]
