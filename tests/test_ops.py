"""The ops, and streamed models under torch.compile: the eager bits, one graph, and no copied arena.

Freed arenas are poisoned throughout, so code that read one would answer NaN. What a compiler may
reorder is in test_compiled_order.py.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code

import nexus_ext as nexus
from nexus_ext import ops
from nexus_ext.errors import BudgetError, EngineClosed, EngineError, StreamError

WIDTH = 48
BACKENDS = ["eager", "aot_eager", "inductor"]


class Block(nn.Module):
    def __init__(self, hidden: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def stack(*hidden: int) -> Stack:
    torch.manual_seed(0)
    return Stack([Block(width) for width in hidden]).requires_grad_(False)


X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NEXUS_POISON", "1")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Pair:
    """A resident model, and the same one streamed with the least memory of a lookahead."""

    def __init__(self, resident: Any, folder: Path, lookahead: int = 2, **options: Any) -> None:
        self.resident = resident
        self.streamed = copy.deepcopy(resident)
        self.path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in resident.state_dict().items()}
        save_file(tensors, self.path)
        self.options = {"lookahead": lookahead, "io": "direct"} | options
        self.stream(self.streamed)
        self.plan = nexus.plan_of(self.streamed)

    def stream(self, model: nn.Module) -> Any:
        with pytest.raises(BudgetError) as refused:
            nexus.stream(model, self.path, budget=0, **self.options)
        budget = int(re.search(r"needed (\d+) =", str(refused.value))[1])
        return nexus.stream(model, self.path, budget=budget, **self.options)

    @property
    def num_acquired(self) -> int:
        stats = nexus.stats(self.streamed)
        return stats.num_hits + stats.num_waits


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Twelve identical blocks over three arenas."""
    return Pair(stack(*[WIDTH] * 12), tmp_path)


def compile_blocks(model: Any, backend: Any, *, fullgraph: bool = True) -> None:
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=fullgraph)


# -- the ops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("number", [0, 11])
def test_opcheck_finds_nothing_wrong_with_acquire(
    pair: Pair, requires_grad: bool, number: int
) -> None:
    slot = pair.streamed.blocks[number]._nexus_group
    dep = torch.randn(2, 3, requires_grad=requires_grad)
    results = torch.library.opcheck(torch.ops.nexus.acquire_.default, (slot.arena, dep, slot.id))
    assert set(results.values()) == {"SUCCESS"}
    with torch.no_grad():
        assert torch.equal(pair.streamed(X), pair.resident(X))


@pytest.mark.parametrize("op", ["acquire_.default", "acquire_.held", "release_.default"])
def test_ops_that_wait_say_that_they_change_the_arena_and_suit_no_cuda_graph(op: str) -> None:
    packet, _, overload = op.partition(".")
    found = getattr(getattr(torch.ops.nexus, packet), overload)
    written = [a.name for a in found._schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["arena"] if op == "acquire_.default" else ["arena", "turn"]
    assert torch.Tag.cudagraph_unsafe in found.tags
    assert found._schema.returns == []


def test_the_fake_of_acquire_touches_no_engine_and_takes_any_size() -> None:
    with torch._subclasses.FakeTensorMode():
        arena = torch.empty(123, dtype=torch.uint8)
        no_engine = torch.tensor(1 << 62)
        torch.ops.nexus.acquire_(arena, torch.empty(2), no_engine)
        with pytest.raises(RuntimeError):
            torch.ops.nexus.acquire_(arena.float(), arena, no_engine)
        with pytest.raises(RuntimeError):
            torch.ops.nexus.acquire_(arena, arena, torch.zeros(2, dtype=torch.int64))


def test_acquiring_into_another_tensor_fills_it(pair: Pair) -> None:
    slot = pair.streamed.blocks[5]._nexus_group
    other = torch.empty_like(slot.arena)
    ops.acquire_(other, X, slot.id)
    assert torch.equal(other, slot.arena)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(pair.streamed(X), pair.resident(X))


def test_an_arena_of_another_size_is_refused(pair: Pair) -> None:
    slot = pair.streamed.blocks[0]._nexus_group
    with pytest.raises(EngineError, match="bytes"):
        ops.acquire_(slot.arena[1:], X, slot.id)


@pytest.mark.parametrize("number", [13, 2**24 - 1])
def test_a_group_that_is_not_there_is_refused(pair: Pair, number: int) -> None:
    slot = pair.streamed.blocks[0]._nexus_group
    with pytest.raises(EngineError, match="group id"):
        ops.acquire_(slot.arena, X, slot.id // 2**24 * 2**24 + number)


def test_an_engine_that_is_not_there_is_a_closed_one(pair: Pair) -> None:
    slot = pair.streamed.blocks[0]._nexus_group
    with pytest.raises(EngineClosed):
        ops.acquire_(slot.arena, X, slot.id + 2**24)


def test_errors_that_are_not_ours_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ops.call(torch.mm, torch.empty(2, 3), torch.empty(2, 3))
    assert ops.call(torch.add, torch.ones(1), torch.ones(1)) == 2


# -- the same bits -------------------------------------------------------------------------------


def assert_compiled_is_eager(
    pair: Pair, backend: Any, x: torch.Tensor = X, num_calls: int = 3
) -> None:
    """Whole model, one graph; against the resident model under the same compiler."""
    compiled = torch.compile(pair.streamed, backend=backend, fullgraph=True)
    reference = torch.compile(pair.resident, backend=backend, fullgraph=True)
    with torch.no_grad():
        want = reference(x)
        for number in range(1, num_calls + 1):
            before = pair.num_acquired
            assert torch.equal(compiled(x), want)
            # No call of the op was merged, moved out or lost.
            assert pair.num_acquired - before == len(pair.plan.streamed), number
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("backend", "num_blocks"),
    [("eager", 12), ("eager", 7), ("aot_eager", 12), ("aot_eager", 7), ("inductor", 7)],
)
def test_a_stack_of_blocks_compiles_to_the_same_bits(
    tmp_path: Path, backend: str, num_blocks: int
) -> None:
    pair = Pair(stack(*[WIDTH] * num_blocks), tmp_path)
    assert len(pair.plan.streamed) == num_blocks
    assert len(pair.plan.arena_bytes) == 3
    assert_compiled_is_eager(pair, backend)
    if backend != "aot_eager":
        assert nexus.stats(pair.streamed).num_mispredicted == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_several_sizes_compile_to_the_same_bits(tmp_path: Path, backend: str) -> None:
    pair = Pair(stack(16, 48, 7, 16, 33), tmp_path, lookahead=1)
    assert_compiled_is_eager(pair, backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_resident_and_streamed_blocks_mix(tmp_path: Path, backend: str) -> None:
    pair = Pair(stack(*[WIDTH] * 8), tmp_path, lookahead=1)
    nexus.close(pair.streamed)
    budget = pair.plan.minimum_bytes + 3 * max(pair.plan.group_bytes)
    nexus.stream(pair.streamed, pair.path, budget=budget, **pair.options)
    pair.plan = nexus.plan_of(pair.streamed)
    assert len(pair.plan.resident) == 3
    assert_compiled_is_eager(pair, backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_mapped_arenas_compile_to_the_same_bits(tmp_path: Path, backend: str) -> None:
    pair = Pair(stack(*[WIDTH] * 7), tmp_path, io="mmap")
    assert_compiled_is_eager(pair, backend)


def llama() -> Any:
    """Two decoder layers of transformers: four groups, as each is cut in two."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        use_cache=False,
    )

    class Logits(transformers.LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids=input_ids).logits

    return Logits(config).eval().requires_grad_(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_llama_of_two_layers_compiles_to_the_same_bits(tmp_path: Path, backend: str) -> None:
    groups = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")]
    pair = Pair(llama(), tmp_path, lookahead=1, groups=groups)
    assert len(pair.plan.streamed) == 4
    assert_compiled_is_eager(pair, backend, torch.randint(0, 50, (2, 7)), num_calls=2)


# -- one graph -----------------------------------------------------------------------------------


def test_a_whole_model_is_one_graph(pair: Pair) -> None:
    counter = CompileCounter()
    assert_compiled_is_eager(pair, "eager")
    torch._dynamo.reset()
    compiled = torch.compile(pair.streamed, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            compiled(X)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lookahead", [1, 2, 4])
def test_identical_blocks_compile_once_for_all(
    tmp_path: Path, backend: str, lookahead: int
) -> None:
    pair = Pair(stack(*[WIDTH] * 12), tmp_path, lookahead)
    ours, theirs = CompileCounterWithBackend(backend), CompileCounterWithBackend(backend)
    compile_blocks(pair.streamed, ours)
    compile_blocks(pair.resident, theirs)
    with torch.no_grad():
        for _ in range(3):
            before = pair.num_acquired
            assert torch.equal(pair.streamed(X), pair.resident(X))
            assert pair.num_acquired - before == 12
    assert ours.frame_count == theirs.frame_count == 1
    assert not counters["graph_break"]


def test_resident_and_streamed_blocks_share_a_graph(tmp_path: Path) -> None:
    pair = Pair(stack(*[WIDTH] * 8), tmp_path, lookahead=1)
    nexus.close(pair.streamed)
    nexus.stream(
        pair.streamed, pair.path, budget=5 * max(pair.plan.group_bytes) + 9472, lookahead=1
    )
    assert 0 < len(nexus.plan_of(pair.streamed).resident) < 8
    counter = CompileCounter()
    compile_blocks(pair.streamed, counter)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(pair.streamed(X), pair.resident(X))
    assert counter.frame_count == 1


def test_rings_of_every_length_are_right_under_the_compiler(tmp_path: Path) -> None:
    for lookahead in (1, 2, 3, 4):
        for num_blocks in (lookahead + 2, 2 * lookahead + 3, 11):
            torch._dynamo.reset()
            pair = Pair(stack(*[WIDTH] * num_blocks), tmp_path, lookahead)
            compile_blocks(pair.streamed, "aot_eager" if num_blocks == 11 else "eager")
            with torch.no_grad():
                for _ in range(3):
                    assert torch.equal(pair.streamed(X), pair.resident(X))
            nexus.close(pair.streamed)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_two_streamed_models_of_one_class_run_compiled(tmp_path: Path, backend: str) -> None:
    pairs = []
    for name, num_blocks in (("one", 5), ("two", 8)):
        (tmp_path / name).mkdir()
        pairs.append(Pair(stack(*[WIDTH] * num_blocks), tmp_path / name, lookahead=1))
    for pair in pairs:
        compile_blocks(pair.streamed, backend)
        compile_blocks(pair.resident, backend)
    with torch.no_grad():
        for pair in pairs * 2:
            assert torch.equal(pair.streamed(X), pair.resident(X))


# -- what is generated ---------------------------------------------------------------------------


@pytest.mark.parametrize("is_whole", [True, False])
def test_generated_code_acquires_every_group_and_copies_no_arena(
    pair: Pair, is_whole: bool
) -> None:
    with fresh_cache(), torch.no_grad():
        if is_whole:
            run = torch.compile(pair.streamed, fullgraph=True)
        else:
            compile_blocks(pair.streamed, "inductor")
            run = pair.streamed
        _, codes = run_and_get_code(run, X)
    code = "\n".join(codes)
    num_calls = 12 if is_whole else 1
    assert len(re.findall(r"torch\.ops\.nexus\.acquire_\.\w+\(", code)) == num_calls
    assert len(re.findall(r"torch\.ops\.nexus\.release_\.\w+\(", code)) == num_calls
    assert "clone" not in code
    assert "copy_" not in code
    assert not re.findall(r"empty_strided_cpu\(.*torch\.uint8\)", code)
    assert nexus.stats(pair.streamed).num_cloned == 0


# -- eager and compiled by turns -----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_whole", [True, False])
def test_eager_and_compiled_passes_may_alternate(pair: Pair, backend: str, is_whole: bool) -> None:
    compiled = torch.compile(pair.streamed, backend=backend, fullgraph=True)
    if not is_whole:
        compile_blocks(pair.streamed, backend)
        compiled = pair.streamed
    eager = type(pair.streamed).forward
    with torch.no_grad():
        want = pair.resident(X)
        for _ in range(3):
            assert torch.allclose(compiled(X), want, atol=1e-5)
            assert torch.allclose(eager(pair.streamed, X), want, atol=1e-5)
            assert all(block.up.weight.is_meta for block in pair.streamed.blocks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_and_eager_blocks_may_stand_side_by_side(pair: Pair, backend: str) -> None:
    for block in pair.streamed.blocks[::2]:
        block.compile(backend=backend, fullgraph=True)
    for block in pair.resident.blocks[::2]:
        block.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(pair.streamed(X), pair.resident(X))


def test_a_weight_is_not_taken_for_live_after_compiled_code_ran(pair: Pair) -> None:
    with torch.no_grad():
        pair.streamed.blocks[4](X)
        assert not pair.streamed.blocks[4].up.weight.is_meta
        torch.compile(pair.streamed, backend="eager", fullgraph=True)(X)
        assert all(block.up.weight.is_meta for block in pair.streamed.blocks)


def test_a_closed_model_says_so_when_compiled_and_may_be_streamed_again(pair: Pair) -> None:
    def run() -> torch.Tensor:
        return torch.compile(pair.streamed, backend="aot_eager", fullgraph=True)(X)

    with torch.no_grad():
        want = run()
        nexus.close(pair.streamed)
        with pytest.raises(RuntimeError, match="EngineClosed"):
            run()
        pair.stream(pair.streamed)
        for _ in range(2):
            assert torch.equal(run(), want)


def answers_of_two_threads(run: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    """What both got, 60 times each: a tensor or an error."""
    answers: list[Any] = []

    def ask() -> None:
        for _ in range(60):
            with torch.no_grad():
                try:
                    answers.append(run(X))
                except RuntimeError as error:
                    answers.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_two_threads_take_turns_in_a_model_of_compiled_blocks(pair: Pair) -> None:
    compile_blocks(pair.streamed, "aot_eager")
    with torch.no_grad():
        want = pair.streamed(X)
    assert all(torch.equal(answer, want) for answer in answers_of_two_threads(pair.streamed))


def test_two_threads_in_a_model_compiled_whole_are_right_or_refused(pair: Pair) -> None:
    compiled = torch.compile(pair.streamed, backend="eager", fullgraph=True)
    with torch.no_grad():
        want = compiled(X)
    for answer in answers_of_two_threads(compiled):
        assert "ThreadConflict" in answer if isinstance(answer, str) else torch.equal(answer, want)
    with torch.no_grad():
        assert torch.equal(compiled(X), want)


def test_two_threads_in_a_resident_model_compiled_whole_are_right(tmp_path: Path) -> None:
    pair = Pair(stack(*[WIDTH] * 5), tmp_path, lookahead=1)
    nexus.close(pair.streamed)
    nexus.stream(pair.streamed, pair.path, budget="1GiB")
    compiled = torch.compile(pair.streamed, backend="eager", fullgraph=True)
    with torch.no_grad():
        want = compiled(X)
    assert all(torch.equal(answer, want) for answer in answers_of_two_threads(compiled))


# -- gradients -----------------------------------------------------------------------------------


# Dynamo looks at .grad of every input (torch 2.13, for resident models too).
looks_at_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def gradient(run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    x = X.clone().requires_grad_()
    run(x).sum().backward()
    return x.grad


@looks_at_grad
@pytest.mark.parametrize("is_whole", [True, False])
def test_compiled_streamed_blocks_refuse_inputs_that_want_a_gradient(
    pair: Pair, is_whole: bool
) -> None:
    run = torch.compile(pair.streamed, backend="aot_eager", fullgraph=True)
    if not is_whole:
        compile_blocks(pair.streamed, "aot_eager")
        run = pair.streamed
    with pytest.raises((Unsupported, StreamError)):
        gradient(run)
    with torch.no_grad():
        assert torch.equal(run(X), pair.resident(X))


class InPairs(nn.Module):
    """Takes what it computes with in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> Any:
        return self.up(pair[0]) * pair[1], pair[1]


@looks_at_grad
def test_an_input_in_a_tuple_that_wants_a_gradient_is_refused_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(InPairs() for _ in range(5))).requires_grad_(False)
    pair = Pair(model, tmp_path, lookahead=1)
    run = torch.compile(pair.streamed, backend="aot_eager", fullgraph=True)
    with pytest.raises((Unsupported, StreamError)):
        run((X, X.clone().requires_grad_()))
    with torch.no_grad():
        assert torch.equal(run((X, X))[0], pair.resident((X, X))[0])


@looks_at_grad
@pytest.mark.parametrize("is_whole", [True, False])
def test_without_fullgraph_what_wants_a_gradient_is_run_eagerly(pair: Pair, is_whole: bool) -> None:
    run = torch.compile(pair.streamed, backend="aot_eager")
    if not is_whole:
        compile_blocks(pair.streamed, "aot_eager", fullgraph=False)
        run = pair.streamed
    for _ in range(3):
        assert torch.allclose(gradient(run), gradient(pair.resident), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_resident_blocks_have_gradients(tmp_path: Path, backend: str) -> None:
    pair = Pair(stack(*[WIDTH] * 5), tmp_path, lookahead=1)
    nexus.close(pair.streamed)
    nexus.stream(pair.streamed, pair.path, budget="1GiB")
    want = gradient(pair.resident)
    run = torch.compile(pair.streamed, backend=backend, fullgraph=True)
    for _ in range(2):
        assert torch.allclose(gradient(run), want, atol=1e-5)


def test_inputs_that_want_none_compile_with_gradients_on(pair: Pair) -> None:
    run = torch.compile(pair.streamed, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert torch.allclose(run(X), pair.resident(X), atol=1e-5)
