"""Weights that are read by rows: projections in tiles, embeddings row by row."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import nexus_ext as nexus
from nexus_ext.engine import Faults
from nexus_ext.errors import (
    BudgetError,
    CheckpointChanged,
    ConfigError,
    EngineClosed,
    NexusError,
    ReadError,
    StreamError,
    TruncatedCheckpoint,
)

OPS = torch.ops.nexus
VOCABULARY, WIDTH, HIDDEN = 700, 32, 200
IDS = torch.tensor([[3, 699, 3, 4], [5, 0, 350, 698]])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(self.norm(x)))
        # A weight of the group is used after the tiles were.
        y: torch.Tensor = x + self.last(self.down(hidden))
        return y


class Scaled(nn.Embedding):
    """As Gemma's: its forward goes through its base's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 5.5


class Net(nn.Module):
    def __init__(self, tied: bool = False, num_blocks: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = Scaled(VOCABULARY, WIDTH, padding_idx=3)
        self.layers = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        y: torch.Tensor = self.head(x)
        return y


@pytest.fixture(autouse=True)
def _clean_slate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")
    torch._dynamo.reset()


class Maker:
    """Resident models and streamed twins, with the least memory for two arenas."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "model.safetensors"

    def resident(self, dtype: torch.dtype = torch.float32, **options: Any) -> Net:
        model = Net(**options).to(dtype).eval().requires_grad_(False)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        # One byte longer than a multiple of everything: rows lie at odd places.
        save_file(tensors, self.path, {"padding": "x" * 13})
        return model

    def streamed(self, resident: Any, by_rows: Any, **options: Any) -> Any:
        options = {"io": "direct", "lookahead": 1, "tile_bytes": "8KiB", **options}
        if "budget" in options:
            return nexus.stream(copy.deepcopy(resident), self.path, by_rows=by_rows, **options)
        with pytest.raises(BudgetError) as refused:
            nexus.stream(copy.deepcopy(resident), self.path, budget=0, by_rows=by_rows, **options)
        needed = int(re.search(r"needed (\d+) =", str(refused.value))[1])
        model = copy.deepcopy(resident)
        return nexus.stream(model, self.path, **{"budget": needed, "by_rows": by_rows, **options})


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


ALL = ["head", "embed", "layers.*.up", "layers.*.down"]


# -- whole models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("by_rows", ["head", "embed", ["head", "embed"], "layers.*.down", ALL])
@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_models_read_by_rows_answer_as_resident_ones(maker: Maker, by_rows: Any, io: str) -> None:
    resident = maker.resident()
    for lookahead in (1, 2):
        with maker.streamed(resident, by_rows, io=io, lookahead=lookahead) as model:
            for _ in range(3):
                with torch.no_grad():
                    assert torch.allclose(model(IDS), resident(IDS), rtol=1e-5, atol=1e-5)
            if "embed" in by_rows and "head" not in by_rows:
                assert torch.equal(model(IDS), resident(IDS))
            assert nexus.plan_of(model).device_bytes <= nexus.plan_of(model).budget_bytes


def test_one_tile_gives_the_same_bits(maker: Maker) -> None:
    resident = maker.resident()
    with maker.streamed(resident, ALL, tile_bytes="1MiB") as model:
        for _ in range(3):
            assert torch.equal(model(IDS), resident(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_as_good(maker: Maker, dtype: torch.dtype) -> None:
    resident = maker.resident(dtype)
    with maker.streamed(resident, ALL) as model:
        near = {torch.bfloat16: 2e-1, torch.float16: 2e-2, torch.float64: 1e-10}[dtype]
        assert torch.allclose(model(IDS), resident(IDS), rtol=near, atol=near)


def test_a_tied_table_serves_both_ends(maker: Maker) -> None:
    resident = maker.resident(tied=True)
    with maker.streamed(resident, ["head", "embed"]) as model:
        assert torch.allclose(model(IDS), resident(IDS), rtol=1e-5, atol=1e-5)
        assert model.head.weight is model.embed.weight
        assert nexus.plan_of(model).outside_bytes < 1000
    for half in ("head", "embed"):
        with pytest.raises(StreamError, match="share a weight must be read by rows, or none"):
            maker.streamed(resident, half)


def test_tiles_take_less_memory_than_the_whole_and_are_counted(maker: Maker) -> None:
    resident = maker.resident()
    with maker.streamed(resident, []) as model:
        whole = nexus.plan_of(model)
    with maker.streamed(resident, "head") as model:
        plan = nexus.plan_of(model)
        assert plan.tiled_bytes == VOCABULARY * WIDTH * 4
        assert plan.tile_arena_bytes == 3 * 8192
        saved = plan.tiled_bytes - plan.tile_arena_bytes
        assert whole.outside_bytes - plan.outside_bytes == plan.tiled_bytes
        assert whole.device_bytes - plan.device_bytes == saved
        assert "by rows" in plan.describe()
        before = nexus.stats(model).bytes_read
        model(IDS)
        assert nexus.stats(model).bytes_read - before >= plan.tiled_bytes
    with pytest.raises(BudgetError, match=r"\+ tiles 24576; give at least"):
        nexus.stream(
            copy.deepcopy(resident), maker.path, budget=1, by_rows="head", tile_bytes="8KiB"
        )


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_faulty_reads_of_tiles_are_typed_or_mended(maker: Maker, io: str) -> None:
    resident = maker.resident()
    want, outcomes = resident(IDS), []
    chances = {"errno_ppm": 100_000, "short_ppm": 50_000, "again_ppm": 50_000}
    for seed in range(12):
        try:
            model = maker.streamed(resident, ALL, io=io, faults=Faults(seed=seed, **chances))
        except ReadError:
            continue  # a resident group could not be read
        for _ in range(4):
            try:
                outcomes.append(torch.allclose(model(IDS), want, rtol=1e-5, atol=1e-5))
            except ReadError:
                outcomes.append("failed")
        nexus.close(model)
    assert set(outcomes) == {True, "failed"}


def test_tiles_are_read_ahead(maker: Maker) -> None:
    resident = maker.resident()
    with maker.streamed(resident, ALL) as model:
        for _ in range(3):
            model(IDS)
        before = nexus.stats(model).num_mispredicted
        for _ in range(5):
            model(IDS)
        assert nexus.stats(model).num_mispredicted == before


def test_a_llama_generates_the_same_tokens(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=500,
        pad_token_id=0,
    )
    resident = LlamaForCausalLM(config).eval()
    resident.save_pretrained(tmp_path)
    by_rows = ["lm_head", "model.embed_tokens"]
    asked = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(1, 5).long()}
    ids = torch.randint(1, 500, (1, 5))
    with nexus.from_pretrained(
        tmp_path, by_rows=by_rows, budget="200KB", tile_bytes="16KiB", io="direct"
    ) as model:
        assert torch.equal(model.generate(ids, **asked), resident.generate(ids, **asked))
        assert nexus.stats(model).num_rows == 5 + 5


def test_a_tied_llama_generates_the_same_tokens(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=2,
        vocab_size=500,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    resident = LlamaForCausalLM(config).eval()
    resident.save_pretrained(tmp_path)
    asked = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones(1, 5).long()}
    ids = torch.randint(1, 500, (1, 5))
    want = resident.generate(ids, **asked)
    model = nexus.stream(
        copy.deepcopy(resident),
        tmp_path,
        by_rows=["lm_head", "model.embed_tokens"],
        budget="150KB",
        tile_bytes="16KiB",
        io="direct",
        lookahead=1,
    )
    assert len(nexus.plan_of(model).streamed) > 2
    assert torch.equal(model.generate(ids, **asked), want)
    nexus.close(model)


# -- the ops ---------------------------------------------------------------------------------------


@pytest.fixture
def net(maker: Maker) -> Iterator[Any]:
    """Everything by rows, in float64: tiles of head, embed, and of each block."""
    resident = maker.resident(torch.float64)
    with maker.streamed(resident, ALL) as model:
        model.twin = [resident]  # in a list: no submodule
        yield model


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_opcheck_finds_nothing_wrong(net: Any, requires_grad: bool, has_bias: bool) -> None:
    up = net.layers[1].up
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=requires_grad)
    bias = torch.randn(HIDDEN, dtype=torch.float64, requires_grad=requires_grad)
    weight_id = up._nexus_row_id
    results = [
        torch.library.opcheck(
            OPS.streamed_linear.default, (x, bias if has_bias else None, weight_id, HIDDEN)
        ),
        torch.library.opcheck(
            OPS.streamed_linear_grad.default,
            (
                torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=requires_grad),
                weight_id,
                WIDTH,
            ),
        ),
        torch.library.opcheck(
            OPS.streamed_embedding.default,
            (IDS, net.embed._nexus_row_id, WIDTH, torch.float64),
        ),
    ]
    assert {value for result in results for value in result.values()} == {"SUCCESS"}


def test_gradients_are_those_of_finite_differences(net: Any) -> None:
    weight_id = net.layers[2].up._nexus_row_id
    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(HIDDEN, dtype=torch.float64, requires_grad=True)

    def linear(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return OPS.streamed_linear(x, bias, weight_id, HIDDEN)

    assert torch.autograd.gradcheck(linear, (x, bias))
    assert torch.autograd.gradgradcheck(linear, (x, bias))


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (0, WIDTH), (2, 0, WIDTH), (2, 3, WIDTH)])
def test_inputs_of_any_shape(net: Any, shape: tuple[int, ...]) -> None:
    up, twin = net.layers[0].up, net.twin[0].layers[0].up
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(up(x), twin(x))
    assert up(x.transpose(0, -1).contiguous().transpose(0, -1)).shape == (*shape[:-1], HIDDEN)


# To the last bits: tiles may add up in another order.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("tile_bytes", ["1MiB", "4KiB"])
def test_a_projection_is_exact_in_one_tile_and_as_good_in_many(
    maker: Maker, dtype: torch.dtype, tile_bytes: str
) -> None:
    resident = maker.resident(dtype)
    with maker.streamed(resident, ALL, tile_bytes=tile_bytes) as model:
        for ours, theirs in (
            (model.layers[1].up, resident.layers[1].up),  # with a bias
            (model.head, resident.head),
        ):
            for shape in ((WIDTH,), (1, WIDTH), (5, WIDTH), (2, 3, WIDTH), (0, WIDTH)):
                x = torch.randn(shape).to(dtype)
                got, want = ours(x), theirs(x)
                assert (got.shape, got.dtype) == (want.shape, want.dtype)
                if tile_bytes == "1MiB":
                    assert torch.equal(got, want)
                else:
                    assert torch.allclose(got, want, rtol=NEAR[dtype], atol=NEAR[dtype])
            columns = torch.randn(WIDTH, 6).to(dtype).t()
            got, want = ours(columns), theirs(columns)
            assert torch.allclose(got, want, rtol=NEAR[dtype], atol=NEAR[dtype])


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("tile_bytes", ["1MiB", "4KiB"])
def test_its_gradient_too(maker: Maker, dtype: torch.dtype, tile_bytes: str) -> None:
    resident = maker.resident(dtype)

    def gradient(head: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = torch.ones(3, WIDTH, dtype=dtype, requires_grad=True)
        head(x).double().square().sum().backward()
        return x.grad

    with maker.streamed(resident, "head", tile_bytes=tile_bytes) as model:
        got, want = gradient(model.head), gradient(resident.head)
        if tile_bytes == "1MiB":
            assert torch.equal(got, want)
        error = (got - want).abs().max() / want.abs().max()
        assert error.item() <= NEAR[dtype]


def test_backward_reads_tiles_again_and_saves_none(net: Any) -> None:
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.ones(2, WIDTH, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net.head(x).square().sum()
    assert 0 < sum(tensor.nbytes for tensor in saved) <= 2 * 2 * VOCABULARY * 8
    assert WIDTH not in [tensor.shape[-1] for tensor in saved if tensor.dim() > 0]
    before = nexus.stats(net).bytes_read
    loss.backward()
    tiles = nexus.plan_of(net).tile_arena_bytes
    assert nexus.stats(net).bytes_read - before >= VOCABULARY * WIDTH * 8 - tiles


def test_a_projection_may_be_used_by_several_threads(net: Any) -> None:
    xs = [torch.randn(3, WIDTH, dtype=torch.float64) for _ in range(3)]
    outcomes: list[object] = []

    def attempt(x: torch.Tensor) -> None:
        want = net.twin[0].head(x)
        for _ in range(20):
            outcomes.append(torch.allclose(net.head(x), want))

    threads = [threading.Thread(target=attempt, args=(x,)) for x in xs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 60


@pytest.mark.parametrize(
    "call",
    [
        lambda net, x: OPS.streamed_linear(x, None, net.head._nexus_row_id, VOCABULARY + 200),
        lambda net, x: OPS.streamed_linear(x, None, net.head._nexus_row_id, VOCABULARY - 200),
        lambda net, x: OPS.streamed_linear(
            x, x.new_zeros(VOCABULARY + 1), net.head._nexus_row_id, VOCABULARY
        ),
        lambda net, x: OPS.streamed_linear_grad(
            x.new_zeros(2, VOCABULARY + 1), net.head._nexus_row_id, WIDTH
        ),
        lambda net, x: OPS.streamed_linear_grad(
            x.new_zeros(2, VOCABULARY), net.head._nexus_row_id, WIDTH + 1
        ),
        lambda net, x: OPS.streamed_embedding(IDS, net.embed._nexus_row_id, WIDTH + 1, x.dtype),
        lambda net, x: OPS.streamed_embedding(IDS, net.embed._nexus_row_id, WIDTH, torch.float16),
    ],
    ids=["out+", "out-", "bias+", "grad+", "in+", "dim+", "dtype"],
)
@pytest.mark.parametrize("tile_bytes", ["8KiB", "1MiB"])
def test_sizes_that_are_not_the_weights_are_refused(
    maker: Maker, call: Callable[[Any, torch.Tensor], torch.Tensor], tile_bytes: str
) -> None:
    """An id may come from a graph that was saved: it can name another model's weight."""
    with (
        maker.streamed(maker.resident(), ["head", "embed"], tile_bytes=tile_bytes) as model,
        pytest.raises((NexusError, RuntimeError)),
    ):
        call(model, torch.zeros(2, WIDTH))


def test_training_through_tiles_gives_the_same_gradients(net: Any) -> None:
    def gradient(model: Any) -> torch.Tensor:
        x = torch.ones(2, WIDTH, dtype=torch.float64, requires_grad=True)
        y = x
        for layer in model.layers:
            y = layer(y)
        model.head(y).square().sum().backward()
        assert x.grad is not None
        return x.grad

    for _ in range(3):
        assert torch.allclose(gradient(net), gradient(net.twin[0]), rtol=1e-10)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_whole_and_by_blocks(net: Any, backend: str) -> None:
    counters = torch._dynamo.utils.counters
    counters.clear()
    want = net.twin[0](IDS)
    with torch.no_grad():
        run = torch.compile(net, backend=backend, fullgraph=True, dynamic=True)
        for ids in (IDS, torch.cat([IDS, IDS], 1)):
            assert torch.allclose(run(ids), net.twin[0](ids))
        assert counters["stats"]["unique_graphs"] == 1
        for layer in net.layers:
            layer.compile(backend=backend, fullgraph=True)
        for _ in range(2):
            assert torch.allclose(net(IDS), want)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    # aot_eager runs on clones of what it mutates.
    assert (nexus.stats(net).num_cloned > 0) == (backend == "aot_eager")


def test_compiled_blocks_look_further_ahead(maker: Maker) -> None:
    resident = maker.resident()
    with maker.streamed(resident, ALL, lookahead=2) as model, torch.no_grad():
        run = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(3):
            assert torch.allclose(run(IDS), resident(IDS), rtol=1e-5, atol=1e-5)
        for layer in model.layers:
            layer.compile(backend="eager", fullgraph=True)
        for _ in range(3):
            assert torch.allclose(model(IDS), resident(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_gradient_survives_the_compiler(net: Any) -> None:
    """A head by rows is pure: unlike a whole group, it may be trained through when compiled."""

    def gradient(run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = torch.ones(2, WIDTH, dtype=torch.float64, requires_grad=True)
        run(x).square().sum().backward()
        return x.grad

    head = torch.compile(lambda x: net.head(torch.tanh(x)), fullgraph=True)
    want = gradient(lambda x: net.twin[0].head(torch.tanh(x)))
    for _ in range(2):
        assert torch.allclose(gradient(head), want)


# -- embeddings ------------------------------------------------------------------------------------


def embed(model: Any, ids: torch.Tensor) -> dict[str, int]:
    """What reading these rows changed in the counters."""
    names = ("num_rows", "num_row_reads", "row_bytes_read", "num_row_retries")
    before = nexus.stats(model)
    model.embed(ids)
    after = nexus.stats(model)
    return {name: getattr(after, name) - getattr(before, name) for name in names}


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_only_the_rows_asked_for_are_read_and_each_once(maker: Maker, io: str) -> None:
    resident = maker.resident()
    with maker.streamed(resident, "embed", io=io) as model:
        far_apart = embed(model, torch.tensor([0, 200, 400, 200, 0]))
        assert far_apart["num_rows"] == 5
        assert far_apart["num_row_reads"] == 3
        assert far_apart["row_bytes_read"] <= 3 * 8192
        assert embed(model, torch.arange(100))["num_row_reads"] == 1
        assert embed(model, torch.arange(700))["num_row_reads"] == 2  # of 64 KiB at most
        assert embed(model, torch.empty(0, dtype=torch.int64))["num_row_reads"] == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_rows_of_any_ids_are_right(maker: Maker, io: str, dtype: torch.dtype) -> None:
    resident = maker.resident()
    with maker.streamed(resident, "embed", io=io) as model:
        for shape in ((), (1,), (700,), (3, 0), (2, 3, 4), (5000,)):
            ids = torch.randint(0, VOCABULARY, shape).to(dtype)
            assert torch.equal(model.embed(ids), resident.embed(ids))


def test_rows_longer_than_a_read(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 30_001)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    resident = Wide()
    save_file(resident.state_dict(), tmp_path / "model.safetensors")
    model = nexus.stream(copy.deepcopy(resident), tmp_path, by_rows="embed", io="direct")
    ids = torch.tensor([8, 0, 3, 4])
    assert torch.equal(model.embed(ids), resident.embed(ids))


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
@pytest.mark.parametrize("chance", ["short_ppm", "errno_ppm"])
def test_long_rows_are_right_in_any_way_and_when_reads_fail(
    tmp_path: Path, io: str, chance: str
) -> None:
    table = torch.randn(9, 20_001).bfloat16()  # 40002 bytes: two do not fit in one read
    model = table_model(tmp_path, table, 0)
    for seed in range(20):
        try:
            nexus.stream(
                model,
                tmp_path / "odd.safetensors",
                by_rows="embed",
                io=io,
                faults=Faults(seed=seed, **{chance: 300_000}),
            )
            break
        except ReadError:
            continue  # a resident group could not be read
    for _ in range(6):
        ids = torch.randint(0, 9, (7,))
        assert torch.equal(model.embed(ids), table[ids])
    assert (nexus.stats(model).num_row_retries > 0) == (io != "mmap")
    nexus.close(model)


def table_model(folder: Path, table: torch.Tensor, phase: int) -> Any:
    """A model with this table, in a file whose tensors begin `phase` bytes past a multiple of 16.

    The usual writer would align them.
    """

    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(*table.shape, dtype=table.dtype)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    model = Tables().requires_grad_(False)
    model.embed.weight.copy_(table)
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64"}
    header, data = {}, b""
    for name, tensor in model.state_dict().items():
        begin = len(data)
        data += tensor.view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header).encode()
    text += b" " * ((phase - 8 - len(text)) % 16)
    path = folder / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return model


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
@pytest.mark.parametrize("phase", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_at_odd_offsets_are_right(
    tmp_path: Path, io: str, phase: int, dtype: torch.dtype
) -> None:
    table = torch.randn(300, 33).to(dtype)
    model = table_model(tmp_path, table, phase)
    nexus.stream(model, tmp_path / "odd.safetensors", by_rows="embed", io=io)
    ids = torch.cat([torch.arange(300), torch.randint(0, 300, (50,))])
    assert torch.equal(model.embed(ids), table[ids])
    nexus.close(model)


@pytest.mark.parametrize("ids", [torch.tensor([1.7, 2.2]), torch.tensor([True])])
def test_ids_that_are_no_integers_are_refused_as_ever(net: Any, ids: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="scalar types: Long, Int"):
        net.twin[0].embed(ids)
    with pytest.raises((NexusError, RuntimeError)):
        net.embed(ids)


@pytest.mark.parametrize("bad", [-1, VOCABULARY, 2**40])
def test_an_id_without_a_row_is_refused(net: Any, bad: int) -> None:
    with pytest.raises(StreamError, match=r"must lie in \[0, 700\), got"):
        net.embed(torch.tensor([1, bad]))
    assert torch.equal(net.embed(IDS), net.twin[0].embed(IDS))


@pytest.mark.parametrize(
    "chance", ["errno_ppm", "again_ppm", "short_ppm", "refuse_ppm", "delay_ppm"]
)
def test_faulty_reads_of_rows_are_mended(maker: Maker, chance: str) -> None:
    resident = maker.resident()
    nexus_options = {chance: 300_000, "seed": 7, "delay_us": 500}
    model = None
    for seed in range(30):
        try:
            model = maker.streamed(
                resident, "embed", faults=Faults(**{**nexus_options, "seed": seed}), budget="1GiB"
            )
            break
        except NexusError:
            continue  # a resident group could not be read
    assert model is not None
    for _ in range(20):
        ids = torch.randint(0, VOCABULARY, (40,))
        assert torch.equal(model.embed(ids), resident.embed(ids))
    # Once a file has refused direct reads, nobody asks it again.
    if chance != "refuse_ppm":
        assert (nexus.stats(model).num_row_retries > 0) == (chance != "delay_ppm")


def test_a_file_that_changed_is_noticed(maker: Maker, tmp_path: Path) -> None:
    resident = maker.resident()
    model = maker.streamed(resident, "embed")
    (tmp_path / "elsewhere").mkdir()
    other = shutil.copy(maker.path, tmp_path / "elsewhere" / "model.safetensors")
    Path(other).replace(maker.path)
    with pytest.raises(CheckpointChanged):
        model.embed(IDS)


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_a_file_that_was_written_to_is_noticed(maker: Maker, io: str) -> None:
    resident = maker.resident()
    with maker.streamed(resident, "embed", io=io) as model:
        assert torch.equal(model.embed(IDS), resident.embed(IDS))
        (entry,) = model._nexus.streamer._tables
        with open(maker.path, "r+b") as file:
            file.seek(entry.offset)
            file.write(bytes(entry.nbytes))
        with pytest.raises(CheckpointChanged, match="was written to"):
            model.embed(IDS)


@pytest.mark.parametrize("io", ["direct", "buffered"])  # mapped, it kills: see README
@pytest.mark.parametrize(
    ("num_left", "ids", "kind"),
    [
        (350, [0, 699], TruncatedCheckpoint),
        (699.5, [699], TruncatedCheckpoint),
        (350, [0, 1], CheckpointChanged),
    ],
)
def test_a_file_that_was_cut_is_noticed(
    maker: Maker, io: str, num_left: float, ids: list[int], kind: type[NexusError]
) -> None:
    with maker.streamed(maker.resident(), "embed", io=io) as model:
        (entry,) = model._nexus.streamer._tables
        os.truncate(maker.path, entry.offset + int(num_left * WIDTH * 4))
        with pytest.raises(kind):
            model.embed(torch.tensor(ids))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by_rows", "message"),
    [
        ("nothing", "by_rows must name a Linear or an Embedding.*got 'nothing'.*embed"),
        ("layers.0.norm", "'layers.0.norm' is a LayerNorm"),
        (["head", "layers.*.none"], r"got 'layers\.\*\.none', which fits none"),
    ],
)
def test_what_cannot_be_read_by_rows_is_named(maker: Maker, by_rows: Any, message: str) -> None:
    resident = maker.resident()
    with pytest.raises(StreamError, match=message):
        nexus.stream(resident, maker.path, budget="1GiB", by_rows=by_rows)


def test_a_convolution_cannot_be_read_by_rows(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), *(nn.Linear(4, 4) for _ in range(3)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(StreamError, match=r"'0' is a Conv1d\. Leave it out"):
        nexus.stream(model, tmp_path, by_rows="0", budget="1GiB")


def test_who_takes_the_weight_past_forward_is_told(tmp_path: Path) -> None:
    """As attention does: it computes with its output projection's weight."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    model = nn.Sequential(*(Attention() for _ in range(3))).requires_grad_(False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    nexus.stream(model, tmp_path, by_rows="*.out_proj", budget="1GiB")
    with pytest.raises(StreamError, match=r"out_proj\.weight"):
        model(torch.zeros(2, 3, WIDTH))
    nexus.close(model)


def test_an_embedding_that_changes_its_rows_is_refused(maker: Maker) -> None:
    resident = maker.resident()
    resident.embed.max_norm = 1.0
    with pytest.raises(StreamError, match="max_norm changes its rows"):
        nexus.stream(resident, maker.path, budget="1GiB", by_rows="embed")


def test_tiles_are_verified_and_single_rows_cannot_be(maker: Maker) -> None:
    resident = maker.resident()
    with maker.streamed(resident, "head", verify="always") as model:
        model(IDS)
        before = nexus.stats(model).num_verified
        model(IDS)
        num_tiles = -(-VOCABULARY // 64)
        assert nexus.stats(model).num_verified - before >= num_tiles - 3
    with pytest.raises(ConfigError, match=r"single rows of embed\.weight have no digest"):
        nexus.stream(resident, maker.path, budget="1GiB", by_rows="embed", verify="first")


def test_a_weight_read_by_rows_cannot_be_had_whole(net: Any) -> None:
    for weight in (net.head.weight, net.embed.weight):
        with pytest.raises(StreamError, match="can be used while its block runs"):
            functional.linear(torch.zeros(1, WIDTH, dtype=torch.float64), weight)


def test_an_id_of_a_closed_model_names_nothing(maker: Maker) -> None:
    model = maker.streamed(maker.resident(), ["head", "embed"])
    nexus.close(model)
    for use in (
        lambda: model.head(torch.zeros(1, WIDTH)),
        lambda: model.embed(IDS),
        lambda: OPS.streamed_linear(torch.zeros(1, WIDTH), None, torch.tensor(12345), 4),
        lambda: OPS.streamed_embedding(IDS, model.head._nexus_row_id, 4, torch.float32),
    ):
        with pytest.raises(EngineClosed):
            use()


def test_inputs_of_another_dtype_are_refused_but_under_autocast(maker: Maker) -> None:
    resident = maker.resident()
    with maker.streamed(resident, "head", tile_bytes="1MiB") as model:
        x = torch.randn(3, WIDTH)
        with pytest.raises(StreamError, match="must have the dtype of its weight"):
            model.head(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            got, want = model.head(x), resident.head(x)
        assert got.dtype == want.dtype == torch.bfloat16
        assert torch.equal(got, want)


@pytest.mark.parametrize("tile_bytes", ["1MiB", "4KiB"])
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_does_what_it_does_to_the_resident_model(
    maker: Maker, dtype: torch.dtype, lower: torch.dtype, tile_bytes: str
) -> None:
    """float64 it leaves alone."""
    resident = maker.resident(dtype)
    with maker.streamed(resident, ALL, tile_bytes=tile_bytes) as model:
        x = torch.randn(3, WIDTH, dtype=dtype)
        for ours, theirs in (
            (model.layers[0].up, resident.layers[0].up),
            (model.head, resident.head),
        ):
            with torch.autocast("cpu", lower):
                got, want = ours(x), theirs(x)
            assert got.dtype == want.dtype
            near = torch.finfo(want.dtype).eps
            assert torch.allclose(got, want, rtol=near, atol=near)
            assert tile_bytes == "4KiB" or torch.equal(got, want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_compiled_under_autocast_too(maker: Maker, backend: str, has_bias: bool) -> None:
    resident = maker.resident()
    with maker.streamed(resident, ALL, tile_bytes="1MiB") as model, torch.no_grad():
        ours = model.layers[0].up if has_bias else model.head
        theirs = resident.layers[0].up if has_bias else resident.head
        x = torch.randn(3, WIDTH)
        with torch.autocast("cpu", torch.bfloat16):
            run = torch.compile(lambda x: ours(torch.tanh(x)), backend=backend, fullgraph=True)
            assert torch.equal(run(x), theirs(torch.tanh(x)))
