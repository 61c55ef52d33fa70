"""Graphs that outlive what they were made for: other rings, other files, other lengths, export."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import aoti_compile_and_package

import nexus_ext as nexus
from nexus_ext.errors import EngineClosed, StreamError
from tests.test_ops import WIDTH, Pair, X, compile_blocks, llama, stack

NUM_BLOCKS = 7

# torch's own tools warn about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NEXUS_POISON", "1")
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(stack(*[WIDTH] * NUM_BLOCKS), tmp_path)


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


# -- one graph for all rings -----------------------------------------------------------------------

RINGS: dict[str, dict[str, Any]] = {
    "a longer ring": {"lookahead": 4},
    "a shorter ring": {"lookahead": 1},
    "some resident": {"lookahead": 1, "budget": 140_000},
    "all resident": {"budget": "1GiB"},
    "mapped": {"io": "mmap"},
    "buffered": {"io": "buffered"},
}


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("is_whole", [True, False])
def test_another_ring_or_file_needs_no_other_graph(
    pair: Pair, tmp_path: Path, backend: str, is_whole: bool
) -> None:
    if is_whole:
        run: Any = torch.compile(pair.streamed, backend=backend, fullgraph=True)
        want = torch.compile(pair.resident, backend=backend, fullgraph=True)(X)
    else:
        compile_blocks(pair.streamed, backend)
        compile_blocks(pair.resident, backend)
        run, want = pair.streamed, pair.resident(X)
    assert torch.equal(run(X), want)
    before = num_graphs()
    (tmp_path / "copy").mkdir()
    copied = shutil.copy(pair.path, tmp_path / "copy" / "model.safetensors")
    for options in ({}, *RINGS.values()):
        for path in (pair.path, copied):
            nexus.close(pair.streamed)
            # A budget that leaves the ring to the lookahead, unless the ring says otherwise.
            needed = nexus.plan_of(pair.streamed).outside_bytes + 19_200 * 5
            nexus.stream(pair.streamed, path, **{"io": "direct", "budget": needed, **options})
            for _ in range(2):
                assert torch.equal(run(X), want), options
    assert num_graphs() == before
    assert nexus.stats(pair.streamed).num_cloned == 0


class Ordered(nn.Module):
    """Two weights that look alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.second = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.first) @ self.second


def test_a_graph_does_not_serve_weights_laid_out_in_another_order(tmp_path: Path) -> None:
    plain = nn.Sequential(*(Ordered() for _ in range(5))).requires_grad_(False)
    swapped = {"first": "y", "second": "x"}  # files are in the order of names
    for folder, names in (("one", {}), ("two", swapped)):
        (tmp_path / folder).mkdir()
        tensors = {}
        for name, tensor in plain.state_dict().items():
            index, leaf = name.split(".")
            tensors[f"{index}.{names.get(leaf, leaf)}"] = tensor.clone()
        save_file(tensors, tmp_path / folder / "model.safetensors")

    def rename(name: str) -> str:
        index, leaf = name.split(".")
        return f"{index}.{swapped[leaf]}"

    model, budget = copy.deepcopy(plain), 3 * 2 * WIDTH * WIDTH * 4
    for block in model:
        block.compile(backend="eager", fullgraph=True)
    places = []
    for folder, how in (("one", None), ("two", rename), ("one", None)):
        nexus.stream(model, tmp_path / folder, rename=how, budget=budget)
        places.append(model[0]._nexus_group.place(".first")[0])
        for _ in range(2):
            assert torch.allclose(model(X), plain(X), rtol=1e-4)
        nexus.close(model)
    assert places == [0, WIDTH * WIDTH * 4, 0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_dynamic_graph_serves_every_length(pair: Pair, backend: str) -> None:
    run = torch.compile(pair.streamed, backend=backend, fullgraph=True, dynamic=True)
    like = torch.compile(pair.resident, backend=backend, fullgraph=True, dynamic=True)
    for length in (3, 5, 8, 33):
        x = torch.randn(length, WIDTH)
        assert torch.equal(run(x), like(x))
    assert num_graphs() == 2  # one of each model
    assert not counters["graph_break"]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_of_the_compiler_fall_back_on_a_cpu(pair: Pair, mode: str) -> None:
    run = torch.compile(pair.streamed, mode=mode, fullgraph=True)
    like = torch.compile(pair.resident, mode=mode, fullgraph=True)
    for _ in range(3):
        assert torch.equal(run(X), like(X))


def test_compiled_under_inference_mode(pair: Pair) -> None:
    with torch.inference_mode():
        run = torch.compile(pair.streamed, fullgraph=True)
        want = torch.compile(pair.resident, fullgraph=True)(X)
        for _ in range(3):
            assert torch.equal(run(X), want)


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_generate_with_a_static_cache(tmp_path: Path, how: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=2,
        vocab_size=50,
        pad_token_id=0,
    )
    pair = Pair(LlamaForCausalLM(config).eval().requires_grad_(False), tmp_path, lookahead=1)
    assert len(pair.plan.streamed) == 5
    ids = torch.randint(1, 50, (1, 6))
    asked = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    want = pair.resident.generate(ids, cache_implementation="static", **asked)
    if how == "whole":
        pair.streamed.forward = torch.compile(
            pair.streamed.forward, backend="aot_eager", fullgraph=True
        )
    else:
        for layer in pair.streamed.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    # Each layer has its number in its attributes: transformers' blocks are a graph each.
    with torch._dynamo.config.patch(recompile_limit=64):
        got = pair.streamed.generate(ids, cache_implementation="static", **asked)
    assert torch.equal(got, want)
    assert num_graphs() >= 1
    assert not counters["graph_break"]


# -- export --------------------------------------------------------------------------------------


def interleaved(pair: Pair, run: Callable[[torch.Tensor], torch.Tensor], index: int) -> None:
    """The exported block and the model take turns on the same arenas."""
    for _ in range(3):
        assert torch.equal(run(X), pair.resident.blocks[index](X))
        assert torch.equal(pair.streamed(X), pair.resident(X))


def test_an_exported_block_computes_with_the_arena_itself(pair: Pair) -> None:
    program = nexus.export(pair.streamed.blocks[3], (X,))
    assert len(program.state_dict) == 0
    interleaved(pair, program.module(), 3)
    assert nexus.stats(pair.streamed).num_cloned == 0


def test_an_exported_block_takes_dynamic_shapes_and_keywords(pair: Pair) -> None:
    length = torch.export.Dim("length", min=2, max=64)
    for shapes in (({0: length},), {"x": {0: length}}):
        program = nexus.export(pair.streamed.blocks[1], (X,), dynamic_shapes=shapes)
        for size in (2, 9):
            x = torch.randn(size, WIDTH)
            assert torch.equal(program.module()(x), pair.resident.blocks[1](x))
    program = nexus.export(pair.streamed.blocks[1], (), {"x": X}, dynamic_shapes={"x": {0: length}})
    assert torch.equal(program.module()(x=x), pair.resident.blocks[1](x))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_torch_export_of_a_block_works_too(pair: Pair) -> None:
    for strict in (False, True):
        program = torch.export.export(pair.streamed.blocks[2], (X,), strict=strict)
        interleaved(pair, program.module(), 2)


@pytest.fixture
def package(pair: Pair) -> Iterator[str]:
    """Block 3 of the pair, compiled ahead of time."""
    program = nexus.export(pair.streamed.blocks[3], (X,))
    with tempfile.TemporaryDirectory() as folder:
        yield str(aoti_compile_and_package(program, package_path=f"{folder}/block.pt2"))


def test_a_compiled_package_computes_with_the_block_it_is_given(
    pair: Pair, package: str, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    run = nexus.load_package(package, pair.streamed.blocks[3])
    interleaved(pair, run, 3)
    interleaved(pair, nexus.load_package(package, pair.streamed.blocks[5]), 5)
    assert nexus.stats(pair.streamed).num_cloned == 0

    torch.save((X, pair.resident.blocks[4](X)), tmp_path / "expected.pt")
    script = """
import sys, torch, nexus_ext as nexus
from tests.test_ops import stack, WIDTH
package, weights, expected = sys.argv[1:]
x, want = torch.load(expected)
model = nexus.stream(stack(*[WIDTH] * 7), weights, budget=100_000, io="direct")
with torch.no_grad():
    run = nexus.load_package(package, model.blocks[4])
    for _ in range(2):
        model(x)
        print(torch.equal(run(x), want))
"""
    root = Path(__file__).parents[1]
    printed = run_python(script, package, pair.path, tmp_path / "expected.pt", PYTHONPATH=str(root))
    assert printed.split() == ["True", "True"]


def test_a_package_of_a_closed_model_says_so(pair: Pair, package: str) -> None:
    run = nexus.load_package(package, pair.streamed.blocks[3])
    nexus.close(pair.streamed)
    with pytest.raises(EngineClosed):
        run(X)


def test_only_blocks_of_streamed_models_can_be_exported(pair: Pair, package: str) -> None:
    for module in (nn.Linear(3, 3), pair.streamed, pair.resident.blocks[0]):
        with pytest.raises(StreamError, match="needs a block of a streamed model"):
            nexus.export(module, (X,))
        with pytest.raises(StreamError, match="needs a block of a streamed model"):
            nexus.load_package(package, module)


def test_a_package_of_something_else_is_refused(pair: Pair, tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(WIDTH, WIDTH), (X,))
    other = str(aoti_compile_and_package(program, package_path=str(tmp_path / "other.pt2")))
    with pytest.raises(StreamError, match=r"must come from nexus_ext\.export"):
        nexus.load_package(other, pair.streamed.blocks[3])


def test_a_llama_block_with_keywords_is_exported(tmp_path: Path) -> None:
    pair = Pair(llama(), tmp_path, lookahead=1, groups="model.layers", strict=True)
    block, twin = pair.streamed.model.layers[1], pair.resident.model.layers[1]
    seen: list[Any] = []
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    pair.streamed(torch.randint(0, 50, (2, 7)))
    handle.remove()
    args, kwargs = seen[0]
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    program = nexus.export(block, args, kwargs)
    assert torch.equal(program.module()(*args, **kwargs), twin(*args, **kwargs))
