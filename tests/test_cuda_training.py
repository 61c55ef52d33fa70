"""Training adapters while the frozen base streams to a GPU, real or simulated: losses and weights
are the resident model's, bit for bit.

On a real GPU backward runs in a thread of its own. On the simulated one, as on any processor, it
runs in the thread that calls it; some tests call it from another.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nexus_ext as nexus
from nexus_ext import attachment
from nexus_ext.device import Device
from tests.test_cuda_module import SLOT, SMALL, _poisoned_arenas, device
from tests.test_training import IDS, NUM_LAYERS, by_hand, by_peft, llama, trainable

pytestmark = [
    pytest.mark.takes_simcuda,
    # transformers is renaming these.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
__all__ = ["_poisoned_arenas", "device"]  # fixtures

BUDGET = 100_000
TIERS = {"disk": {"ram_budget": 3 * SLOT, **SMALL}, "ram": {"ram_budget": "8MiB"}}
Stream = Callable[..., Any]


@pytest.fixture
def stream(device: Device, tmp_path: Path) -> Iterator[Stream]:
    """Seven groups over two arenas."""
    made = []
    tensors = {name: tensor.clone() for name, tensor in llama().state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")

    def make(model: Any = None, tier: str = "disk", **options: Any) -> Any:
        streamed = nexus.stream(
            llama() if model is None else model,
            tmp_path / "model.safetensors",
            device=device,
            **{"budget": BUDGET, "io": "direct", "lookahead": 1, **TIERS[tier], **options},
        )
        assert len(nexus.plan_of(streamed).streamed) == NUM_LAYERS
        made.append(streamed)
        return streamed

    yield make
    for model in made:
        nexus.close(model)


def without_adapters(name: str) -> str:
    for part in ("self_attn.v_proj", "mlp.down_proj"):
        name = name.replace(f"{part}.base.", f"{part}.")
    return name


def train(model: Any, num_steps: int = 4) -> tuple[list[float], list[torch.Tensor]]:
    """Losses, and adapter weights afterwards."""
    weights = trainable(model)
    ids = IDS.to(weights[0].device)
    optimiser = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    for _ in range(num_steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, [weight.detach().clone() for weight in weights]


def assert_trained_alike(ours: Any, theirs: Any) -> None:
    assert ours[0] == theirs[0]
    assert len(ours[1]) == len(theirs[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))
    assert theirs[0][-1] < theirs[0][0]  # something was learnt


# -- steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", TIERS)
def test_kept_adapters_train_alike(stream: Stream, device: Device, tier: str) -> None:
    model = stream(by_hand(llama()), tier, keep="*lora*", rename=without_adapters)
    assert {weight.device for weight in trainable(model)} == {device.torch_device}
    assert_trained_alike(train(model), train(by_hand(llama()).to(device.torch_device)))
    assert nexus.stats(model).num_cloned == 0


@pytest.mark.parametrize("tier", TIERS)
def test_adapters_put_on_afterwards_train_alike(stream: Stream, device: Device, tier: str) -> None:
    adapted = by_peft(stream(tier=tier))
    # Where the weights will be, though none is there now.
    assert {weight.device for weight in trainable(adapted)} == {device.torch_device}
    resident = by_peft(llama())
    assert_trained_alike(train(adapted), train(resident.to(device.torch_device)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_trains_alike(
    stream: Stream, device: Device, reentrant: bool
) -> None:
    def checkpointing(model: Any) -> Any:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    ours = train(checkpointing(by_peft(stream())))
    resident = by_peft(llama()).to(device.torch_device)
    assert_trained_alike(ours, train(checkpointing(resident)))


def test_adapters_train_through_weights_read_by_rows(stream: Stream, device: Device) -> None:
    by_rows = ["lm_head", "model.embed_tokens", "model.layers.*.mlp.up_proj"]
    ours = train(by_peft(stream(by_rows=by_rows)))
    assert_trained_alike(ours, train(by_peft(llama()).to(device.torch_device)))


def test_backward_asks_for_the_groups_in_reverse(stream: Stream) -> None:
    model = by_peft(stream())
    train(model, 3)
    before = nexus.stats(model.base_model.model)
    train(model, 2)
    after = nexus.stats(model.base_model.model)
    assert after.num_mispredicted - before.num_mispredicted <= 2


# -- in which thread -------------------------------------------------------------------------------


def in_another_thread(run: Callable[[], object]) -> None:
    """Run it there; raise here what it raised."""
    failures: list[BaseException] = []

    def target() -> None:
        try:
            run()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


class Stack(nn.Module):
    """Blocks that can be run one by one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(6)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture
def stacks(device: Device, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    resident = Stack().requires_grad_(False)
    save_file(resident.state_dict(), tmp_path / "stack.safetensors")
    streamed = nexus.stream(
        copy.deepcopy(resident),
        tmp_path / "stack.safetensors",
        device=device,
        budget=20_000,
        lookahead=1,
        io="direct",
        **TIERS["disk"],
    )
    assert len(nexus.plan_of(streamed).streamed) == 6
    yield resident.to(device.torch_device), streamed
    nexus.close(streamed)


Run = Callable[[Any, torch.Tensor], torch.Tensor]


def gradient(model: Any, x: torch.Tensor, run: Run, backward_in: Any) -> torch.Tensor:
    leaf = x.clone().requires_grad_(True)
    loss = run(model, leaf).square().sum()
    backward_in(loss.backward)
    assert leaf.grad is not None
    return leaf.grad


def here(run: Callable[[], object]) -> None:
    run()


def whole(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def last_blocks(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.blocks[5](model.blocks[4](x))


def first_blocks(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model.blocks[1](model.blocks[0](x))


@pytest.mark.parametrize("backward_in", [here, in_another_thread])
@pytest.mark.parametrize("run", [whole, last_blocks])
def test_backward_may_run_in_another_thread_than_forward(
    stacks: tuple[Any, Any], device: Device, run: Run, backward_in: Any
) -> None:
    resident, streamed = stacks
    x = torch.randn(4, 32).to(device.torch_device)
    want = gradient(resident, x, run, here)
    for _ in range(4):
        assert torch.equal(gradient(streamed, x, run, backward_in), want)
        with torch.no_grad():
            assert torch.equal(streamed(x), resident(x))


def test_backward_may_run_in_another_thread_than_blocks_called_by_themselves(
    stacks: tuple[Any, Any], device: Device
) -> None:
    resident, streamed = stacks
    x = torch.randn(4, 32).to(device.torch_device)
    want = gradient(resident, x, first_blocks, here)
    for _ in range(4):
        assert torch.equal(gradient(streamed, x, first_blocks, in_another_thread), want)


def test_gradients_may_be_asked_for_within_forward(stacks: tuple[Any, Any], device: Device) -> None:
    """As models of energies do, whose forces are gradients."""
    resident, streamed = stacks

    def forces(model: Any, x: torch.Tensor) -> torch.Tensor:
        leaf = x.clone().requires_grad_(True)
        (force,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
        return force

    x = torch.randn(4, 32).to(device.torch_device)
    for _ in range(3):
        assert torch.equal(forces(streamed, x), forces(resident, x))


class _CallsBackElsewhere:
    """Autograd's engine, whose last words are spoken in another thread than backward ran in: so it
    is on a GPU, when the gradient that comes last is that of a tensor of the host.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def queue_callback(self, callback: Callable[[], None]) -> None:
        self._engine.queue_callback(lambda: in_another_thread(callback))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.needs_simcuda
def test_backward_may_end_in_another_thread_than_it_ran(
    stacks: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, streamed = stacks
    x = torch.randn(4, 32)
    want = gradient(resident, x, whole, here)
    engine = _CallsBackElsewhere(torch.autograd.Variable._execution_engine)
    monkeypatch.setattr(attachment.torch.autograd.Variable, "_execution_engine", engine)
    for _ in range(3):
        assert torch.equal(gradient(streamed, x, whole, in_another_thread), want)


@pytest.mark.needs_cuda
def test_gradients_may_end_in_the_host(stacks: tuple[Any, Any], device: Device) -> None:
    resident, streamed = stacks
    x = torch.randn(4, 32)

    def moved(model: Any, leaf: torch.Tensor) -> torch.Tensor:
        return model(leaf.to(device.torch_device))

    want = gradient(resident, x, moved, here)
    for _ in range(3):
        assert torch.equal(gradient(streamed, x, moved, here), want)
