"""Weights that are read by rows: projections in tiles, embeddings row by row."""

from __future__ import annotations

import copy
import re
import shutil
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
    StreamError,
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
