"""Whole models whose weights stream to a GPU, real or simulated, equal resident ones bit for bit.

On the simulated driver the model computes on the processor: the caller's stream is the thread itself,
and arenas are host memory that only the driver's copies may fill.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nexus_ext as nexus
from nexus_ext.device import Device

pytestmark = pytest.mark.takes_simcuda

WIDTH = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, 2 * WIDTH)
        self.b = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.a(self.norm(x))))


class Model(nn.Module):
    """Something before the blocks, blocks, something after them, and a buffer of its own."""

    def __init__(self, num_blocks: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.register_buffer("scale", torch.rand(WIDTH), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


Twins = Callable[..., tuple[Any, Any]]


@pytest.fixture
def device(gpu: Any) -> Device:
    if gpu.sim is not None:
        gpu.sim.set_any_memory_is_device(True)
        gpu.sim.set_inline_current(True)
    return gpu.device


@pytest.fixture
def twins(device: Device, tmp_path: Path) -> Iterator[Twins]:
    """A resident model on the device, and one streamed there from its checkpoint."""
    made: list[Any] = []

    def make(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
        resident = Model().to(dtype).eval().requires_grad_(False)
        tensors = {name: tensor.clone() for name, tensor in resident.state_dict().items()}
        save_file(tensors, tmp_path / "model.safetensors")
        streamed = copy.deepcopy(resident)
        chosen = {"budget": "200KiB", "io": "direct", "ram_budget": "8MiB"} | options
        nexus.stream(streamed, tmp_path, device=device, **chosen)
        made.append(streamed)
        return resident.to(device.torch_device), streamed

    yield make
    for model in made:
        nexus.close(model)


@pytest.fixture
def ids(device: Device) -> torch.Tensor:
    return torch.arange(12, device=device.torch_device).view(2, 6)


def assert_equal(resident: Any, streamed: Any, ids: torch.Tensor, passes: int = 3) -> None:
    with torch.inference_mode():
        want = resident(ids)
        for _ in range(passes):
            assert torch.equal(streamed(ids), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("io", ["direct", "buffered", "mmap", "auto"])
def test_a_streamed_model_equals_a_resident_one(
    twins: Twins, ids: torch.Tensor, io: str, dtype: torch.dtype
) -> None:
    resident, streamed = twins(
        dtype, io=io, budget=260 * 1024 if dtype == torch.float32 else 140 * 1024
    )
    assert nexus.plan_of(streamed).streamed
    assert_equal(resident, streamed, ids)
    stats = nexus.stats(streamed)
    assert stats.device == "cuda:0"
    assert stats.num_copies > 0
