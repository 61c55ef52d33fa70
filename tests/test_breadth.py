"""The zoo: modules nested, shared, parametrized, hooked, and run in orders nobody declared."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import nexus_ext as nexus
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.config import StreamConfig
from nexus_ext.device import Device
from nexus_ext.errors import NexusError
from nexus_ext.layout import lay_out
from nexus_ext.streamer import plan_groups

WIDTH = 24
X = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _poisoned_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.a(x)))


@pytest.fixture
def twins(tmp_path: Path) -> Callable[..., tuple[Any, Any]]:
    """A resident model, and one streamed in as little memory as there can be."""

    def make(model: nn.Module, **options: Any) -> tuple[Any, Any]:
        resident = model.eval().requires_grad_(False)
        tensors = {name: tensor.clone() for name, tensor in resident.state_dict().items()}
        save_file(tensors, tmp_path / "model.safetensors")
        streamed, checkpoint = copy.deepcopy(resident), Checkpoint.open(tmp_path)
        layout = lay_out(streamed, checkpoint, options.get("groups"))
        config, device = StreamConfig.of(budget="8GiB"), Device.of("cpu")
        whole, _ = plan_groups(checkpoint, layout.groups, layout.outside, config, device)
        nexus.stream(streamed, checkpoint, budget=whole.minimum_bytes, io="direct", **options)
        assert len(nexus.plan_of(streamed).arena_bytes) == 2
        return resident, streamed

    return make


def blocks_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "_nexus_group" in module.__dict__]


def assert_equal(resident: Any, streamed: Any, *inputs: Any, passes: int = 3) -> None:
    for _ in range(passes):
        for x in inputs or (X,):
            assert torch.equal(streamed(x), resident(x))


# -- containers ------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Lists of lists, and a dictionary of lists."""

    def __init__(self, container: str) -> None:
        super().__init__()
        stages = [nn.ModuleList(Block() for _ in range(3)) for _ in range(3)]
        self.stages: Any = nn.ModuleList(stages)
        if container == "dict":
            self.stages = nn.ModuleDict({f"stage{i}": stage for i, stage in enumerate(stages)})
        if container == "sequential":
            self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stages = self.stages.values() if isinstance(self.stages, nn.ModuleDict) else self.stages
        for stage in stages:
            for block in stage:
                x = block(x)
        return x


@pytest.mark.parametrize(("container", "num_blocks"), [("list", 9), ("dict", 9)])
def test_lists_of_lists_stream_what_is_called(twins: Any, container: str, num_blocks: int) -> None:
    resident, streamed = twins(Nested(container))
    assert len(blocks_of(streamed)) == num_blocks
    assert_equal(resident, streamed)


def test_sequences_in_a_list_stream_even_if_their_parts_are_called(twins: Any) -> None:
    """A Sequential can be called, and is a block; here somebody calls its parts instead."""
    resident, streamed = twins(Nested("sequential"))
    assert len(blocks_of(streamed)) == 3
    assert_equal(resident, streamed)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(Block() for _ in range(3))
        self.middle = Block()
        self.up = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
        x = self.middle(x)
        for block in self.up:
            x = block(x + kept.pop())
        return x


def test_down_and_up(twins: Any) -> None:
    resident, streamed = twins(UNet())
    assert len(blocks_of(streamed)) == 6
    assert_equal(resident, streamed)


# -- order -----------------------------------------------------------------------------------------


class Routed(nn.Module):
    """Which blocks run depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(8))

    def forward(self, x: torch.Tensor, route: list[int]) -> torch.Tensor:
        for index in route:
            x = self.blocks[index](x)
        return x


@pytest.mark.parametrize(
    "route",
    [[0, 1, 2, 3], [0, 1, 1, 2, 2, 3, 0], [7, 5, 3, 1, 6, 4], [0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 2, 3]],
)
def test_any_route_is_right_and_soon_foreseen(twins: Any, route: list[int]) -> None:
    resident, streamed = twins(Routed())
    want = resident(X, route)
    for _ in range(3):
        assert torch.equal(streamed(X, route), want)
    before = nexus.stats(streamed).num_mispredicted
    for _ in range(3):
        assert torch.equal(streamed(X, route), want)
    assert nexus.stats(streamed).num_mispredicted == before


def test_layer_drop_costs_stalls_and_no_bits(twins: Any) -> None:
    resident, streamed = twins(Routed())
    choose = random.Random(0)
    for _ in range(40):
        route = [index for index in range(8) if choose.random() > 0.3]
        assert torch.equal(streamed(X, route), resident(X, route))
    assert nexus.stats(streamed).num_mispredicted > 0


class Shared(nn.Module):
    """One block in two places of two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block() for _ in range(4))
        self.second = nn.ModuleList([self.first[1], Block(), self.first[3], Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.first, *self.second):
            x = block(x)
        return x


def test_blocks_in_two_places(twins: Any) -> None:
    assert_equal(*twins(Shared()))


class Reaching(nn.Module):
    """Uses a part of a block outside of it, and inside of others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Asking() for _ in range(5))
        for index, block in enumerate(self.blocks):
            block.__dict__["other"] = self.blocks[(index + 2) % 5]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x + self.blocks[0].own(x)


class Asking(nn.Module):
    other: Any

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale  # taken before, used after the other's weights were in the arena
        x = torch.tanh(self.other.own(x))
        return self.own(x) * scale * self.scale


@pytest.mark.parametrize("trains", [False, True])
def test_parts_of_blocks_may_be_called_from_anywhere(twins: Any, trains: bool) -> None:
    model = Reaching()
    resident = copy.deepcopy(model).eval().requires_grad_(False)
    _, streamed = twins(model)
    for index, block in enumerate(streamed.blocks):
        block.__dict__["other"] = streamed.blocks[(index + 2) % 5]
    assert_equal(resident, streamed)
    if trains:
        got, want = X.clone().requires_grad_(), X.clone().requires_grad_()
        streamed(got).square().sum().backward()
        resident(want).square().sum().backward()
        assert torch.equal(got.grad, want.grad)


# -- what modules are made of ----------------------------------------------------------------------


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


@pytest.mark.parametrize("kind", ["parametrize", "weight_norm", "spectral_norm"])
def test_parametrized_weights_stream(twins: Any, kind: str) -> None:
    model = nn.Sequential(*(Block() for _ in range(5)))
    for block in model:
        if kind == "parametrize":
            parametrize.register_parametrization(block.a, "weight", Halved())
        else:
            getattr(parametrizations, kind)(block.a)
    resident, streamed = twins(model)
    assert_equal(resident, streamed)
    assert nexus.stats(streamed).bytes_read > 0


def test_parametrizing_afterwards_is_right_or_refused(twins: Any) -> None:
    resident, streamed = twins(nn.Sequential(*(Block() for _ in range(5))))
    parametrize.register_parametrization(resident[2].a, "weight", Halved())
    try:
        parametrize.register_parametrization(streamed[2].a, "weight", Halved())
        got = streamed(X)
    except NexusError:
        return
    assert torch.equal(got, resident(X))


class Mixed(nn.Module):
    """Several dtypes, a buffer that changes, and one that rolls."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, WIDTH)
        self.narrow = nn.Linear(WIDTH, WIDTH).bfloat16()
        self.gain = nn.Parameter(torch.rand(WIDTH).half())
        self.register_buffer("mask", torch.randint(0, 2, (WIDTH,), dtype=torch.int8))
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("memory", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        y = self.wide(x) * self.gain + self.narrow(x.bfloat16()) * self.mask + self.memory
        self.memory = y.mean(0)
        return y


def test_dtypes_mix_and_buffers_change(twins: Any) -> None:
    resident, streamed = twins(nn.Sequential(*(Mixed() for _ in range(5))))
    assert_equal(resident, streamed)
    for ours, theirs in zip(streamed, resident, strict=True):
        assert ours.num_calls == theirs.num_calls == 3
        assert torch.equal(ours.memory, theirs.memory)


def test_blocks_of_several_kinds_and_sizes(twins: Any) -> None:
    kinds: list[nn.Module] = []
    for _ in range(3):
        kinds += [Block(), nn.Linear(WIDTH, WIDTH, bias=False), nn.LayerNorm(WIDTH), Mixed()]
    assert_equal(*twins(nn.Sequential(*kinds)))


# -- hooks and modes -------------------------------------------------------------------------------


def test_hooks_that_change_what_goes_in_and_out(twins: Any) -> None:
    def hook(model: Any) -> None:
        for block in model:
            block.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
            block.a.register_forward_hook(lambda m, args, y: y + m.weight.sum())
            block.register_forward_hook(lambda m, args, kwargs, y: y - m.b.bias, with_kwargs=True)

    resident, streamed = twins(nn.Sequential(*(Block() for _ in range(5))))
    hook(resident)
    hook(streamed)
    assert_equal(resident, streamed)


def test_global_hooks_see_every_module(twins: Any) -> None:
    resident, streamed = twins(nn.Sequential(*(Block() for _ in range(5))))
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: seen.append(type(module).__name__)
    )
    try:
        want = resident(X)
        theirs = seen.copy()
        seen.clear()
        assert torch.equal(streamed(X), want)
        assert seen == theirs
    finally:
        handle.remove()


def test_autocast(twins: Any) -> None:
    resident, streamed = twins(nn.Sequential(*(Block() for _ in range(5))))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(resident, streamed)


def test_vmap(twins: Any) -> None:
    resident, streamed = twins(nn.Sequential(*(Block() for _ in range(5))))
    with torch.no_grad():
        want = torch.vmap(resident)(X)
        for _ in range(2):
            assert torch.equal(torch.vmap(streamed)(X), want)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_other_weights_for_one_call_are_used(twins: Any, is_compiled: bool) -> None:
    torch._dynamo.reset()
    resident, streamed = twins(nn.Sequential(*(Block() for _ in range(5))))
    other = {name: tensor + 1 for name, tensor in resident.state_dict().items() if "2" in name}

    def call(model: Any) -> Any:
        run = lambda x: torch.func.functional_call(model, other, (x,))  # noqa: E731
        return torch.compile(run, backend="eager", fullgraph=True) if is_compiled else run

    with torch.no_grad():
        assert torch.equal(call(streamed)(X), call(resident)(X))
        assert not torch.equal(call(streamed)(X), resident(X))
    assert_equal(resident, streamed)


# -- diffusion models ------------------------------------------------------------------------------


def dit() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=5,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "class_labels": torch.tensor([1, 9]),
    }
    return model, inputs


def flux() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    return model, inputs


def unet() -> tuple[nn.Module, dict[str, Any]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    inputs = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }
    return model, inputs


@pytest.mark.parametrize("build", [dit, flux, unet])
def test_diffusion_models_stream_unchanged(twins: Any, build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    groups = ["down_blocks", "up_blocks", "mid_block"] if build is unet else None
    resident, streamed = twins(model, **({"groups": groups} if groups else {}))
    with torch.no_grad():
        for _ in range(3):
            (got,), (want,) = (m(**inputs, return_dict=False) for m in (streamed, resident))
            assert torch.equal(got, want)
    assert nexus.stats(streamed).bytes_read > 0
