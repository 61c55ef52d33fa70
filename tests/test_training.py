"""Training adapters over a streamed, frozen base: the resident model's losses and weights, bit for
bit, with no weight kept for backward and the groups read ahead in reverse.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import nexus_ext as nexus
from nexus_ext.engine import Faults
from nexus_ext.errors import EngineClosed, ReadError, StreamError, ThreadConflict

NUM_LAYERS = 7
IDS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(3))

# transformers is renaming these.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture(autouse=True)
def _poisoned_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        vocab_size=60,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


class LoRA(nn.Module):
    """By hand: a linear and its low-rank correction."""

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(rank)
        weight = base.weight
        self.lora_down = nn.Parameter(torch.randn(rank, weight.shape[1], generator=generator) / 8)
        self.lora_up = nn.Parameter(torch.randn(weight.shape[0], rank, generator=generator) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x) + x @ self.lora_down.T @ self.lora_up.T
        return y


def by_hand(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.v_proj = LoRA(layer.self_attn.v_proj)
        layer.mlp.down_proj = LoRA(layer.mlp.down_proj)
    return model


def by_peft(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.fixture
def resident(tmp_path: Path) -> Any:
    model = llama()
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    return model


@pytest.fixture
def stream(resident: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Seven groups over two arenas."""
    made = []

    def make(model: Any = None, **options: Any) -> Any:
        streamed = nexus.stream(
            llama() if model is None else model,
            tmp_path / "model.safetensors",
            **{"budget": 100_000, "io": "direct", "lookahead": 1, **options},
        )
        assert len(nexus.plan_of(streamed).streamed) == NUM_LAYERS
        assert len(nexus.plan_of(streamed).arena_bytes) == 2
        made.append(streamed)
        return streamed

    yield make
    for model in made:
        nexus.close(model)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: Any, num_steps: int = 10) -> tuple[list[float], list[torch.Tensor]]:
    """Losses, and adapter weights afterwards."""
    optimiser = torch.optim.AdamW(trainable(model), lr=1e-2)
    losses = []
    for _ in range(num_steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, [parameter.detach().clone() for parameter in trainable(model)]


def assert_trained_alike(ours: Any, theirs: Any) -> None:
    assert ours[0] == theirs[0]
    assert len(ours[1]) == len(theirs[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))
    assert theirs[0][-1] < theirs[0][0]  # something was learnt


def gradients(model: Any, run: Callable[[Any], torch.Tensor] | None = None) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss if run is None else run(model)
    loss.backward()
    return [parameter.grad.clone() for parameter in trainable(model)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- ten steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", [by_peft, by_hand])
def test_ten_steps_are_those_of_the_resident_model(
    resident: Any, stream: Any, adapt: Callable[[Any], Any]
) -> None:
    model = stream()
    assert_trained_alike(train(adapt(model)), train(adapt(resident)))
    assert nexus.stats(model).num_cloned == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_trains_alike(resident: Any, stream: Any, reentrant: bool) -> None:
    def checkpointing(model: Any) -> Any:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    ours, theirs = train(checkpointing(by_peft(stream()))), train(checkpointing(by_peft(resident)))
    assert_trained_alike(ours, theirs)


def test_adapters_that_were_there_before_are_kept(
    resident: Any, stream: Any, tmp_path: Path
) -> None:
    adapted = by_hand(llama())
    names = {f"{part}.base.": f"{part}." for part in ("self_attn.v_proj", "mlp.down_proj")}

    def rename(name: str) -> str:
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        return name

    model = stream(adapted, keep="*lora*", rename=rename)
    assert_trained_alike(train(model), train(by_hand(resident)))


def test_keep_must_name_something(resident: Any, stream: Any) -> None:
    with pytest.raises(StreamError, match="keep must name a parameter"):
        stream(keep="*nothing*")


# -- shapes of training ----------------------------------------------------------------------------


class Stack(nn.Module):
    """Blocks whose parts can be checkpointed."""

    def __init__(self, how: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Inner(how) for _ in range(NUM_LAYERS))
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = list(self.blocks)
        if self.how == "pairs":
            while blocks:
                pair, blocks = blocks[:2], blocks[2:]
                x = checkpoint(lambda y, pair=pair: run_all(pair, y), x, use_reentrant=False)
            return x
        return run_all(blocks, x)


def run_all(blocks: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x = block(x)
    return x


class Inner(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.second = nn.Linear(24, 24)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        if self.how == "inside":
            return x + checkpoint(self.part, x, use_reentrant=False)
        return x + self.part(x)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.second(torch.tanh(x)))


X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A resident stack and a streamed one over two arenas."""
    how = getattr(request, "param", "none")
    resident = Stack(how).requires_grad_(False)
    save_file(resident.state_dict(), tmp_path / "stack.safetensors")
    streamed = nexus.stream(
        copy.deepcopy(resident), tmp_path / "stack.safetensors", budget=2 * 5120, io="direct"
    )
    assert len(nexus.plan_of(streamed).streamed) == NUM_LAYERS
    return resident, streamed


def gradient(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("pair", ["none", "pairs", "inside"], indirect=True)
def test_any_part_may_be_checkpointed(pair: Any) -> None:
    resident, streamed = pair
    for _ in range(3):
        assert torch.equal(gradient(streamed), gradient(resident))


def test_backward_twice_and_late_and_crossed(pair: Any) -> None:
    resident, streamed = pair

    def crossed(model: nn.Module) -> list[torch.Tensor]:
        a, b = X.clone().requires_grad_(), (2 * X).requires_grad_()
        first, second = model(a).square().sum(), model(b).square().sum()
        first.backward(retain_graph=True)
        with torch.no_grad():
            model(X)
        second.backward()
        first.backward()
        return [a.grad, b.grad, *torch.autograd.grad(model(a).sum(), a)]

    assert same(crossed(streamed), crossed(resident))


def test_second_derivatives_are_refused_and_not_wrong(pair: Any) -> None:
    resident, streamed = pair
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(streamed(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.square().sum().backward()
    assert torch.equal(gradient(streamed), gradient(resident))


def test_backward_hooks_fire_with_the_same_gradients(pair: Any) -> None:
    def seen(model: Any) -> list[torch.Tensor]:
        got: list[torch.Tensor] = []
        for module in (*model.blocks, *(block.second for block in model.blocks)):
            module.register_full_backward_hook(lambda m, into, out: got.extend([*into, *out]))
        gradient(model)
        return got

    resident, streamed = pair
    ours, theirs = seen(streamed), seen(resident)
    assert len(ours) == 4 * NUM_LAYERS
    assert same(ours, theirs)


# -- what is kept ----------------------------------------------------------------------------------


def arenas_of(model: Any) -> set[int]:
    return {block._nexus_group.arena.untyped_storage().data_ptr() for block in model.blocks}


def test_no_weight_is_saved_for_backward(pair: Any) -> None:
    resident, streamed = pair
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = X.clone().requires_grad_()
        loss = streamed(x).square().sum()
        # The user's hooks got the activations, and no weight.
        shapes = [tuple(tensor.shape) for tensor in saved]
        assert shapes.count((5, 24)) >= 2 * NUM_LAYERS
        assert (24, 24) not in shapes
        assert not arenas_of(streamed) & {t.untyped_storage().data_ptr() for t in saved}
        saved.clear()
        resident(X.clone().requires_grad_())
        assert (24, 24) in [tuple(tensor.shape) for tensor in saved]
    loss.backward()
    assert torch.equal(x.grad, gradient(resident))


def test_activations_may_go_elsewhere(pair: Any) -> None:
    resident, streamed = pair
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(gradient(streamed), gradient(resident))


def test_backward_reads_again_and_ahead(pair: Any) -> None:
    _, streamed = pair
    gradient(streamed)
    surprises = None
    for _ in range(4):
        before = nexus.stats(streamed)
        x = X.clone().requires_grad_()
        loss = streamed(x).square().sum()
        middle = nexus.stats(streamed)
        loss.backward()
        after = nexus.stats(streamed)
        # All but what the turn leaves in its arena was read for backward.
        assert after.num_loads - middle.num_loads >= NUM_LAYERS - 2
        assert middle.num_loads > before.num_loads
        if surprises is not None:
            assert after.num_mispredicted == surprises
        surprises = after.num_mispredicted
    # The first backward alone was not foreseen, and only its turn.
    assert surprises <= 3


def test_graphs_leave_nothing_behind(pair: Any) -> None:
    _, streamed = pair
    x = X.clone().requires_grad_()
    hidden: list[Any] = []
    # What this linear is given is the result of a tanh, which backward needs.
    hook = streamed.blocks[3].second.register_forward_pre_hook(
        lambda module, args: hidden.append(StorageWeakRef(args[0].untyped_storage()))
    )
    gc.disable()
    try:
        loss = streamed(x).square().sum()
        assert not hidden[0].expired()
        loss.backward()
        del loss
        # Without the garbage collector: there is no circle.
        assert hidden[0].expired()
    finally:
        gc.enable()
        hook.remove()


# -- what can go wrong -----------------------------------------------------------------------------


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.sigmoid(self.linear(x))
        result = hidden * hidden
        hidden.zero_()  # backward needs it
        return result


def test_an_activation_changed_in_place_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(*(InPlace() for _ in range(5)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    nexus.stream(model, tmp_path / "model.safetensors", budget=2 * 2560, io="direct")
    with pytest.raises((StreamError, RuntimeError), match="modified by an inplace operation"):
        gradient(model)


def test_backward_after_the_end_says_so(pair: Any) -> None:
    _, streamed = pair
    loss = streamed(X.clone().requires_grad_()).square().sum()
    nexus.close(streamed)
    with pytest.raises(EngineClosed):
        loss.backward()


def test_an_exception_in_backward_leaves_the_model_usable(pair: Any) -> None:
    resident, streamed = pair

    def fail(grad: torch.Tensor) -> None:
        raise ValueError("in a hook")

    x = X.clone().requires_grad_()
    hidden = streamed.blocks[0](x)
    hidden.register_hook(fail)
    with pytest.raises(ValueError, match="in a hook"):
        run_all(list(streamed.blocks[1:]), hidden).sum().backward()
    for _ in range(2):
        assert torch.equal(gradient(streamed), gradient(resident))


def test_failed_reads_are_typed_and_the_next_step_is_right(pair: Any, tmp_path: Path) -> None:
    resident, streamed = pair
    nexus.close(streamed)
    want, failed, right = gradient(resident), 0, 0
    # Residents must land: the fault plan begins with the first read, so seeds are tried.
    for seed in range(40):
        try:
            nexus.stream(
                streamed,
                tmp_path / "stack.safetensors",
                budget=2 * 5120,
                io="direct",
                faults=Faults(seed=seed, errno_ppm=30_000),
            )
        except ReadError:
            continue
        for _ in range(3):
            try:
                assert torch.equal(gradient(streamed), want)
                right += 1
            except ReadError:
                failed += 1
        nexus.close(streamed)
    assert right > 10
    assert failed > 10


def test_forward_in_another_thread_during_backward_is_right_or_refused(pair: Any) -> None:
    resident, streamed = pair
    want, want_grad = resident(X), gradient(resident)
    outcomes: list[object] = []

    def attempt(run: Callable[[], torch.Tensor], wanted: torch.Tensor) -> None:
        for _ in range(40):
            try:
                outcomes.append(torch.equal(run(), wanted))
            except ThreadConflict:
                outcomes.append("refused")

    threads = [
        threading.Thread(target=attempt, args=(lambda: gradient(streamed), want_grad)),
        threading.Thread(target=attempt, args=(lambda: streamed(X), want)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 80
    assert False not in outcomes
    assert True in outcomes
    assert torch.equal(gradient(streamed), want_grad)


def test_streamed_weights_stay_frozen(pair: Any) -> None:
    _, streamed = pair
    with pytest.raises(StreamError, match="cannot be trained as a whole"):
        streamed.requires_grad_(True)
    assert streamed.requires_grad_(False) is streamed
    gradient(streamed)
    assert all(parameter.grad is None for parameter in streamed.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_blocks_with_adapters_refuse_to_train(resident: Any, stream: Any) -> None:
    torch._dynamo.reset()
    model = by_hand(stream())
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    # No input requires a gradient; the adapters do.
    with pytest.raises((Unsupported, StreamError)):
        run(IDS)
    with torch.no_grad():
        want = torch.compile(by_hand(resident), backend="aot_eager", fullgraph=True)(IDS).logits
        assert torch.equal(run(IDS).logits, want)
    torch._dynamo.reset()
