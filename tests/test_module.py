"""How a model uses streaming: what it must still do, what it must refuse, and what stays untouched.

Freed arenas are poisoned throughout, so a block that read one would answer NaN.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nexus_ext as nexus
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.engine import Faults
from nexus_ext.errors import (
    BudgetError,
    CheckpointFormatError,
    CheckpointMismatch,
    ConfigError,
    EngineClosed,
    NexusError,
    ReadError,
    StreamError,
)

WIDTH = 64
NUM_BLOCKS = 7


class Block(nn.Module):
    """Two linears and a way to fail in between."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)
        self.fails = False

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        hidden = torch.relu(self.a(x))
        if self.fails:
            raise ValueError("the block failed")
        y = x + self.b(hidden)
        return y if scale is None else y * scale


class Net(nn.Module):
    """Blocks between two linears, run in any order that is asked for."""

    def __init__(
        self, num_blocks: int = NUM_BLOCKS, block: Callable[[], nn.Module] = Block
    ) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(num_blocks))
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
        x = self.first(x)
        for index in range(len(self.layers)) if order is None else order:
            x = self.layers[index](x)
        return self.last(x)


class NormBlock(nn.Module):
    """A block with buffers: persistent ones that change in training, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("factor", torch.rand(WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.linear(x)) * self.factor


class TiedBlock(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH, bias=False)
        self.b = nn.Linear(WIDTH, WIDTH, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


@pytest.fixture(autouse=True)
def _poisoned_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")


def make(build: Callable[[], nn.Module] = Net) -> Any:
    torch.manual_seed(0)
    return build().requires_grad_(False)


def save(model: nn.Module, path: Path) -> Path:
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, path)
    return path


def needed(model: nn.Module, checkpoint: Path, **options: Any) -> int:
    """The smallest budget that works, from the error that names it."""
    with pytest.raises(BudgetError) as refused:
        nexus.stream(model, checkpoint, budget=0, **options)
    return int(re.search(r"needed (\d+) =", str(refused.value))[1])


def tightly(model: Any, checkpoint: Path, **options: Any) -> Any:
    """Stream with the least memory: every block moves, and two arenas serve them all."""
    options = {"lookahead": 1, "io": "direct"} | options
    return nexus.stream(model, checkpoint, budget=needed(model, checkpoint, **options), **options)


def num_acquired(model: nn.Module) -> int:
    stats = nexus.stats(model)
    return stats.num_hits + stats.num_waits


X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net() -> Net:
    return make()


@pytest.fixture
def saved(net: Net, tmp_path: Path) -> Path:
    return save(net, tmp_path / "net.safetensors")


@pytest.fixture
def streamed(net: Net, saved: Path) -> Iterator[Any]:
    """A copy of `net`, streamed tightly, under no_grad."""
    with torch.no_grad(), tightly(copy.deepcopy(net), saved) as model:
        yield model


# -- which blocks --------------------------------------------------------------------------------


def test_a_sequential_at_the_root_streams_its_children(tmp_path: Path) -> None:
    model = make(lambda: nn.Sequential(*(Block() for _ in range(5)), nn.Tanh()))
    want = model(X)
    with torch.no_grad(), tightly(model, save(model, tmp_path / "s.safetensors")):
        assert nexus.plan_of(model).num_groups == 5
        assert nexus.plan_of(model).outside_bytes == 0
        for _ in range(3):
            assert torch.equal(model(X), want)
        assert num_acquired(model) == 3 * 5


def test_blocks_in_a_dict_stream(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({name: Block() for name in "zyxw"})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts.values():
                x = part(x)
            return x

    model = make(Named)
    want = model(X)
    with torch.no_grad(), tightly(model, save(model, tmp_path / "d.safetensors")):
        assert nexus.plan_of(model).num_groups == 4
        assert torch.equal(model(X), want)
        assert torch.equal(model(X), want)


@pytest.mark.parametrize(
    ("groups", "num_groups"),
    [
        (None, NUM_BLOCKS),
        ("layers", NUM_BLOCKS),
        (["layers"], NUM_BLOCKS),
        (["layers.1", "layers.2", "layers.4", "layers.6"], 4),
        (["layers.4", "layers", "last"], NUM_BLOCKS + 1),
        (("layers.2.a", "layers.3", "layers.5", "layers.6"), 4),
        ("", 1),
        ("layers.3", 1),
    ],
)
def test_groups_may_be_named(net: Net, saved: Path, groups: Any, num_groups: int) -> None:
    want = net(X)
    model = nexus.stream(copy.deepcopy(net), saved, groups=groups, budget="1GiB")
    assert nexus.plan_of(model).num_groups == num_groups
    with torch.no_grad():
        assert torch.equal(model(X), want)
    nexus.close(model)
    if num_groups > 2:
        with torch.no_grad(), tightly(copy.deepcopy(net), saved, groups=groups) as model:
            assert len(nexus.plan_of(model).streamed) == num_groups
            assert torch.equal(model(X), want)
            assert torch.equal(model(X), want)


def test_blocks_of_several_sizes_share_arenas(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(WIDTH, wide), nn.ReLU(), nn.Linear(wide, WIDTH))
                for wide in (1, 7, 33, 64, 5, 128, 2)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    model = make(Mixed)
    want = model(X)
    with torch.no_grad(), tightly(model, save(model, tmp_path / "m.safetensors")):
        for _ in range(3):
            assert torch.equal(model(X), want)


def test_a_block_listed_twice_stays_resident_and_right(tmp_path: Path) -> None:
    model = make()
    model.layers[1] = model.layers[0]
    want = model(X)
    with torch.no_grad(), tightly(model, save(model, tmp_path / "t.safetensors")):
        assert nexus.plan_of(model).num_groups == NUM_BLOCKS - 2
        assert not model.layers[0].a.weight.is_meta
        assert model.layers[0].a.weight is model.layers[1].a.weight
        assert torch.equal(model(X), want)


@pytest.mark.timeout(60)
def test_a_block_without_bytes_of_its_own_is_no_group(tmp_path: Path) -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = nn.Parameter(torch.empty(0, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    model = make()
    model.layers.insert(2, Empty())
    want = model(X)
    with torch.no_grad(), tightly(model, save(model, tmp_path / "e.safetensors")):
        assert nexus.plan_of(model).num_groups == NUM_BLOCKS
        assert torch.equal(model(X), want)


def test_blocks_that_share_all_they_have_are_refused(tmp_path: Path) -> None:
    model = make(lambda: nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    checkpoint = save(model, tmp_path / "all.safetensors")
    with pytest.raises(StreamError, match="weights of their own"):
        nexus.stream(model, checkpoint, groups=["0", "1"])


# -- ties and buffers ----------------------------------------------------------------------------


def test_a_weight_shared_with_the_outside_stays_one_resident_object(tmp_path: Path) -> None:
    model = make()
    model.last.weight = model.layers[3].b.weight
    want = model(X)
    with torch.no_grad(), tightly(model, save(model, tmp_path / "tied.safetensors")):
        assert model.last.weight is model.layers[3].b.weight
        assert not model.last.weight.is_meta
        assert model.layers[3].a.weight.is_meta
        for _ in range(2):
            assert torch.equal(model(X), want)


def test_a_weight_shared_by_two_blocks_stays_resident(tmp_path: Path) -> None:
    model = make()
    model.layers[1].a.weight = model.layers[5].a.weight
    want = model(X)
    with torch.no_grad(), tightly(model, save(model, tmp_path / "tied.safetensors")):
        assert not model.layers[1].a.weight.is_meta
        assert model.layers[1].a.weight is model.layers[5].a.weight
        for _ in range(2):
            assert torch.equal(model(X), want)


@pytest.mark.parametrize("kept", ["a.weight", "b.weight"])
def test_a_weight_tied_within_a_block_is_read_once_under_any_of_its_names(
    tmp_path: Path, kept: str
) -> None:
    model = make(lambda: Net(block=TiedBlock))
    want = model(X)
    tensors = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if "layers" not in name or name.endswith(kept)
    }
    save_file(tensors, tmp_path / "tied.safetensors")
    with torch.no_grad(), tightly(model, tmp_path / "tied.safetensors"):
        assert nexus.plan_of(model).group_bytes[0] == 4 * WIDTH * WIDTH
        assert model.layers[0].a.weight is model.layers[0].b.weight
        assert len(list(model.parameters())) == 4 + NUM_BLOCKS
        for _ in range(2):
            assert torch.equal(model(X), want)


def test_buffers_of_a_block_stay_and_may_change(tmp_path: Path) -> None:
    model = make(lambda: Net(block=NormBlock))
    checkpoint = save(model, tmp_path / "norm.safetensors")
    resident = copy.deepcopy(model)
    for one in resident.layers:
        one.factor.fill_(0.5)
    model.load_state_dict(resident.state_dict())
    for one in model.layers:
        one.factor.fill_(0.5)
    with torch.no_grad(), tightly(model, checkpoint):
        for is_training in (True, False, True, False):
            got, want = model.train(is_training)(X), resident.train(is_training)(X)
            assert torch.equal(got, want)
        for ours, theirs in zip(model.layers, resident.layers, strict=True):
            assert ours.norm.num_batches_tracked == theirs.norm.num_batches_tracked == 2
            assert torch.equal(ours.norm.running_mean, theirs.norm.running_mean)
            assert torch.equal(ours.factor, theirs.factor)


def test_a_buffer_that_the_checkpoint_lacks_keeps_its_value(net: Net, saved: Path) -> None:
    net.register_buffer("mask", torch.arange(4.0))
    with tightly(net, saved):
        assert torch.equal(net.mask, torch.arange(4.0))


def test_a_buffer_of_a_block_listed_twice_is_read(tmp_path: Path) -> None:
    model = make(lambda: Net(block=NormBlock))
    model.layers[1] = model.layers[0]
    model.layers[0].norm.running_mean.fill_(3)
    model.eval()
    want = model(X)
    checkpoint = save(model, tmp_path / "norm.safetensors")
    model.layers[0].norm.running_mean.fill_(0)
    with torch.no_grad(), tightly(model, checkpoint):
        assert torch.equal(model(X), want)


def test_weights_of_every_dtype_stream(tmp_path: Path) -> None:
    kinds = (torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool)

    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            values = [(torch.randn(3, 5) * 9).to(dtype) for dtype in kinds]
            values += [torch.tensor(2.5), torch.empty(2, 0)]
            self.values = nn.ParameterList(nn.Parameter(value, False) for value in values)

        def forward(self) -> list[torch.Tensor]:
            return [value.clone() for value in self.values]

    model = make(lambda: nn.ModuleList(Kinds() for _ in range(4)))
    want = [block() for block in model]
    with tightly(model, save(model, tmp_path / "kinds.safetensors")):
        for _ in range(2):
            for block, values in zip(model, want, strict=True):
                assert all(map(torch.equal, block(), values))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 5, enable_nested_tensor=False)


def normalised_linears() -> nn.Module:
    weight_norm = torch.nn.utils.parametrizations.weight_norm
    return nn.Sequential(*(weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(5)))


class Recurrent(nn.LSTM):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.ParameterDict({"bias": torch.randn(WIDTH), "gain": torch.randn(WIDTH)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * self.words["gain"] + self.words["bias"])


@pytest.mark.parametrize(
    "build",
    [
        transformer,
        normalised_linears,
        lambda: nn.Sequential(*(Recurrent(WIDTH, WIDTH) for _ in range(5))),
        lambda: nn.Sequential(*(Dictionary() for _ in range(5))),
    ],
)
def test_modules_that_reach_for_weights_in_their_own_ways_get_them(
    tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    model = make(build).eval()
    x = torch.stack([X, X * 2])
    with torch.no_grad():
        want = model(x)
    checkpoint = save(model, tmp_path / "model.safetensors")
    for parameter in model.parameters():
        parameter.zero_()
    with torch.no_grad(), tightly(model, checkpoint):
        assert len(nexus.plan_of(model).streamed) == 5
        for _ in range(3):
            assert torch.equal(model(x), want)


# -- what stays as it was ------------------------------------------------------------------------


def test_names_shapes_and_words_stay(net: Net, saved: Path) -> None:
    before, shown = net.state_dict(), repr(net)
    names = [name for name, _ in net.named_parameters()]
    kinds = [(type(m).__name__, type(m).__qualname__, type(m).__module__) for m in net.modules()]
    with tightly(net, saved):
        after = net.state_dict()
        assert list(after) == list(before)
        for name, tensor in after.items():
            assert (tensor.shape, tensor.dtype) == (before[name].shape, before[name].dtype)
            assert tensor.is_meta == name.startswith("layers.")
        assert repr(net) == shown
        assert [name for name, _ in net.named_parameters()] == names
        assert kinds == [
            (type(m).__name__, type(m).__qualname__, type(m).__module__) for m in net.modules()
        ]
        assert type(net).__doc__ == Net.__doc__


def test_modules_are_still_what_they_were_and_alike_ones_share_a_class(streamed: Any) -> None:
    assert isinstance(streamed, Net)
    assert isinstance(streamed, nexus.StreamedModule)
    assert all(isinstance(block, Block) for block in streamed.layers)
    assert isinstance(streamed.layers[0].a, nn.Linear)
    assert len({type(block) for block in streamed.layers}) == 1
    assert len({type(linear) for b in streamed.layers for linear in (b.a, b.b)}) == 1
    assert type(streamed.first) is nn.Linear


def test_everything_is_frozen(net: Net, saved: Path) -> None:
    net.requires_grad_(True)
    with tightly(net, saved):
        assert not any(parameter.requires_grad for parameter in net.parameters())


def test_loaded_weights_leave_memory(net: Net, saved: Path) -> None:
    gone = weakref.ref(net.layers[2].a.weight)
    with tightly(net, saved):
        gc.collect()
        assert gone() is None
        assert all(parameter.is_meta for parameter in net.layers.parameters())


def test_a_model_on_meta_gets_every_weight(net: Net, saved: Path) -> None:
    with torch.device("meta"):
        model = Net()
    with torch.no_grad(), tightly(model, saved):
        assert torch.equal(model(X), net(X))
        assert not any(p.is_meta for p in (*model.first.parameters(), *model.last.parameters()))


def test_hooks_on_blocks_and_leaves_fire_and_see_weights(net: Net, streamed: Any) -> None:
    seen = []

    def look(name: str, want: torch.Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, *_: object) -> None:
            linear = module if isinstance(module, nn.Linear) else module.a
            seen.append((name, torch.equal(linear.weight, want)))

        return hook

    for index, (block, resident) in enumerate(zip(streamed.layers, net.layers, strict=True)):
        block.a.register_forward_pre_hook(look(f"before {index}", resident.a.weight))
        block.a.register_forward_hook(look(f"leaf {index}", resident.a.weight))
        block.register_forward_hook(look(f"block {index}", resident.a.weight))
    assert torch.equal(streamed(X), net(X))
    words = [
        f"{word} {index}" for index in range(NUM_BLOCKS) for word in ("before", "leaf", "block")
    ]
    assert seen == [(word, True) for word in words]


def test_blocks_take_keywords_and_other_arguments(net: Net, streamed: Any) -> None:
    scale = torch.tensor(0.5)
    for index in (0, 4):
        got = streamed.layers[index](x=X, scale=scale)
        assert torch.equal(got, net.layers[index](X, scale))
        assert torch.equal(streamed.layers[index](X, scale=scale), got)


def test_a_model_moves_to_where_it_is(net: Net, streamed: Any) -> None:
    assert streamed.to("cpu") is streamed
    assert streamed.to(torch.device("cpu"), non_blocking=True) is streamed
    assert streamed.eval() is streamed
    assert streamed.requires_grad_(False) is streamed
    assert torch.equal(streamed(X), net(X))


def test_switching_modes_reaches_every_block(streamed: Any) -> None:
    assert all(module.training for module in streamed.train().modules())
    assert not any(module.training for module in streamed.eval().modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("mode_at_start", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_gradient_mode_gives_the_same_values(
    net: Net, saved: Path, mode: Any, mode_at_start: Any
) -> None:
    want = net(X)
    with mode_at_start():
        model = tightly(net, saved)
    with model, mode():
        for _ in range(2):
            assert torch.equal(model(X), want)


# -- what is refused -----------------------------------------------------------------------------


def test_a_weight_outside_its_acquisition_is_a_meta_tensor(net: Net, streamed: Any) -> None:
    def is_meta() -> list[bool]:
        return [block.a.weight.is_meta for block in streamed.layers]

    assert all(is_meta())
    seen = []
    for block in streamed.layers:
        block.register_forward_hook(lambda *_: seen.append(is_meta()))
    streamed(X)
    assert all(is_meta())
    assert seen == [[other != one for other in range(NUM_BLOCKS)] for one in range(NUM_BLOCKS)]


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight @ X[0],
        lambda weight: X @ weight,
        lambda weight: torch.nn.functional.linear(X, weight),
        lambda weight: weight.detach() + 1,
        lambda weight: weight.data.sum().item(),
        lambda weight: weight.T.contiguous(),
        lambda weight: weight.cpu(),
        lambda weight: weight.tolist(),
        lambda weight: torch.equal(weight, weight),
    ],
)
def test_a_weight_cannot_be_used_outside_its_acquisition(
    streamed: Any, use: Callable[[torch.Tensor], object]
) -> None:
    for tensor in (streamed.layers[0].a.weight, streamed.state_dict()["layers.0.a.weight"]):
        with pytest.raises(StreamError, match="can be used while its block runs"):
            use(tensor)


def test_a_weight_tells_its_kind_at_any_time(net: Net, streamed: Any) -> None:
    weight, want = streamed.layers[0].a.weight, net.layers[0].a.weight
    for tensor in (weight, weight.data, weight.detach()):
        assert (tensor.shape, tensor.dtype, tensor.device) == (want.shape, want.dtype, want.device)
        assert (tensor.numel(), tensor.dim(), tensor.stride()) == (want.numel(), 2, want.stride())
        assert tensor.is_meta
        assert "size=(64, 64)" in repr(tensor)
    assert isinstance(weight, nn.Parameter)


def test_assigning_a_streamed_weight_is_refused_and_changes_nothing(
    net: Net, streamed: Any
) -> None:
    linear = streamed.layers[0].a
    for value in (nn.Parameter(torch.zeros(WIDTH, WIDTH)), None):
        with pytest.raises(StreamError, match="'weight' of Linear"):
            linear.weight = value
    with pytest.raises(StreamError, match="cannot be assigned"):
        linear.register_parameter("bias", nn.Parameter(torch.zeros(WIDTH)))
    with pytest.raises(TypeError):
        linear.weight = torch.zeros(WIDTH, WIDTH)
    assert torch.equal(streamed(X), net(X))


def test_a_streamed_module_takes_other_parameters(net: Net, streamed: Any) -> None:
    streamed.layers[0].a.extra = nn.Parameter(torch.ones(3))
    assert "layers.0.a.extra" in streamed.state_dict()
    assert torch.equal(streamed(X), net(X))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_into_a_streamed_model_is_refused_and_changes_nothing(
    net: Net, streamed: Any, assign: bool
) -> None:
    others = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items()}
    with pytest.raises(StreamError, match="loaded into"):
        streamed.load_state_dict(others, assign=assign)
    with pytest.raises(StreamError, match="loaded into"):
        streamed.layers[0].load_state_dict(net.layers[0].state_dict(), assign=assign)
    assert torch.equal(streamed(X), net(X))


@pytest.mark.parametrize(
    "act",
    [
        copy.deepcopy,
        copy.copy,
        pickle.dumps,
        lambda model: model.half(),
        lambda model: model.to(torch.float16),
        lambda model: model.to("cuda"),
        lambda model: model.to("meta"),
        lambda model: model.double(),
        lambda model: model.to_empty(device="cpu"),
        lambda model: model.share_memory(),
        lambda model: copy.deepcopy(model.layers),
        lambda model: copy.deepcopy(model.layers[1]),
        lambda model: pickle.dumps(model.layers[1].a),
        lambda model: model.layers[1].half(),
        lambda model: model.layers.half(),
    ],
)
def test_what_would_need_all_weights_is_refused_and_changes_nothing(
    net: Net, streamed: Any, act: Callable[[Any], object]
) -> None:
    with pytest.raises(StreamError, match="cannot be"):
        act(streamed)
    assert torch.equal(streamed(X), net(X))


def test_streaming_what_streams_already_is_refused(net: Net, streamed: Any, saved: Path) -> None:
    with pytest.raises(StreamError, match="streamed already"):
        nexus.stream(streamed, saved)
    assert torch.equal(streamed(X), net(X))


@pytest.mark.parametrize("ask", [nexus.stats, nexus.plan_of, nexus.close])
def test_a_plain_model_has_no_stats_plan_or_end(net: Net, ask: Callable[[Any], object]) -> None:
    with pytest.raises(StreamError, match="needs a streamed model; Net is none"):
        ask(net)


# -- gradients -----------------------------------------------------------------------------------


def gradient(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    model(x).sum().backward()
    return x.grad


def test_backward_through_streamed_blocks_is_right(net: Net, saved: Path) -> None:
    want = gradient(net, X)
    with tightly(net, saved) as model:
        for _ in range(3):
            assert torch.equal(gradient(model, X), want)


def test_backward_through_resident_blocks_is_right(net: Net, saved: Path) -> None:
    want = gradient(net, X)
    with nexus.stream(net, saved, budget="1GiB") as model:
        for _ in range(2):
            assert torch.equal(gradient(model, X), want)


@pytest.mark.parametrize("index", range(NUM_BLOCKS))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_backward_through_one_block_is_right_at_once_and_later(
    net: Net, saved: Path, index: int, mode: Any
) -> None:
    want = gradient(net.layers[index], X)
    with tightly(copy.deepcopy(net), saved) as model:
        assert torch.equal(gradient(model.layers[index], X), want)
        x = X.clone().requires_grad_()
        y = model.layers[index](x)
        with mode():
            model(X)
        y.sum().backward()
        assert torch.equal(x.grad, want)


def test_backward_through_a_weight_that_was_read_outside_its_block_raises(
    net: Net, saved: Path
) -> None:
    with tightly(net, saved) as model:
        x = X.clone().requires_grad_()
        model.layers[2](X)
        y = torch.nn.functional.linear(x, model.layers[2].a.weight)
        with torch.no_grad():
            model(X)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# -- any order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lookahead", [1, 2, 3])
@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_blocks_may_be_skipped_repeated_and_run_backwards(
    net: Net, saved: Path, io: str, lookahead: int
) -> None:
    orders = [
        [0, 2, 4, 6],
        [0, 0, 1, 1, 2, 2],
        [6, 5, 4, 3, 2, 1, 0],
        [3],
        [5, 1, 5, 1, 5, 1],
        [],
        None,
        None,
    ]
    with torch.no_grad(), tightly(copy.deepcopy(net), saved, io=io, lookahead=lookahead) as model:
        for order in orders:
            assert torch.equal(model(X, order), net(X, order))
        assert nexus.stats(model).num_mispredicted > 0
        assert nexus.stats(model).num_failed == 0


def test_only_surprises_count_as_mispredicted(tmp_path: Path) -> None:
    net = make(lambda: Net(8))
    saved = save(net, tmp_path / "net.safetensors")
    with torch.no_grad(), tightly(copy.deepcopy(net), saved, lookahead=2) as model:
        for _ in range(3):
            model(X)
        assert nexus.stats(model).num_mispredicted == 0
        model(X, [0, 1, 6])
        assert nexus.stats(model).num_mispredicted == 1
        before = nexus.stats(model)
        model(X, [6, 6, 6])
        after = nexus.stats(model)
        assert after.num_mispredicted == 1
        assert after.num_hits - before.num_hits == 3
        assert after.num_landed - before.num_landed <= 2


def test_a_block_called_alone_gives_its_own_values(net: Net, streamed: Any) -> None:
    for index in (4, 4, 0, 6, 3):
        assert torch.equal(streamed.layers[index](X), net.layers[index](X))
    assert torch.equal(streamed(X), net(X))


def test_an_exception_in_a_block_leaves_the_model_usable(net: Net, streamed: Any) -> None:
    want = net(X)
    for index in (0, 3, NUM_BLOCKS - 1):
        streamed.layers[index].fails = True
        with pytest.raises(ValueError, match="the block failed"):
            streamed(X)
        assert all(block.a.weight.is_meta for block in streamed.layers)
        streamed.layers[index].fails = False
        for _ in range(2):
            assert torch.equal(streamed(X), want)


def test_a_failed_read_is_raised_and_the_next_pass_may_be_right(net: Net, saved: Path) -> None:
    want = net(X)
    outcomes: list[bool | str] = []
    budget = needed(net, saved, lookahead=1)
    # About one read in ten fails; the seed is one where the residents arrive.
    with (
        nexus.stream(
            net,
            saved,
            budget=budget,
            lookahead=1,
            io="buffered",
            faults=Faults(seed=5, errno_ppm=100_000),
        ) as model,
        torch.no_grad(),
    ):
        for _ in range(60):
            try:
                outcomes.append(torch.equal(model(X), want))
            except ReadError as error:
                outcomes.append(str(error))
    assert True in outcomes
    assert False not in outcomes
    assert any("offset" in str(outcome) for outcome in outcomes)


# -- threads, several models, the end ------------------------------------------------------------


def test_two_threads_take_turns_and_both_are_right(net: Net, streamed: Any) -> None:
    inputs = [X, X * 2]
    wants, wrong = [net(x) for x in inputs], []

    def run(x: torch.Tensor, want: torch.Tensor) -> None:
        for _ in range(60):
            with torch.no_grad():
                if not torch.equal(streamed(x), want):
                    wrong.append(x)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, wants, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert num_acquired(streamed) >= 120 * NUM_BLOCKS


def test_a_thread_after_another_may_go_on(net: Net, streamed: Any) -> None:
    want, got = net(X), []
    for _ in range(3):
        with pytest.raises(IndexError):
            streamed(X, [0, 1, 99])
        thread = threading.Thread(target=lambda: got.append(streamed(X)))
        thread.start()
        thread.join()
    assert all(torch.equal(one, want) for one in got)
    assert len(got) == 3


def test_two_streamed_models_may_be_interleaved(tmp_path: Path) -> None:
    torch.manual_seed(3)
    nets = [Net(5).requires_grad_(False), Net(8).requires_grad_(False)]
    paths = [save(net, tmp_path / f"{i}.safetensors") for i, net in enumerate(nets)]
    with torch.no_grad():
        models = [tightly(copy.deepcopy(n), p) for n, p in zip(nets, paths, strict=True)]
        states = [X, X]
        for _ in range(2):
            for index in range(5):
                states = [m.layers[index](s) for m, s in zip(models, states, strict=True)]
                assert all(not s.isnan().any() for s in states)
        want = [X, X]
        for _ in range(2):
            for index in range(5):
                want = [n.layers[index](s) for n, s in zip(nets, want, strict=True)]
        assert all(map(torch.equal, states, want))
        nexus.close(models[0])
        assert torch.equal(models[1](X), nets[1](X))
        nexus.close(models[1])


def test_the_end_of_a_with_block_closes(net: Net, saved: Path) -> None:
    with tightly(net, saved) as model:
        assert model is net
    with pytest.raises(EngineClosed):
        nexus.stats(model)


def test_a_with_block_closes_after_an_exception(net: Net, saved: Path) -> None:
    with pytest.raises(KeyError), tightly(net, saved):
        raise KeyError("somewhere else")
    with pytest.raises(EngineClosed):
        nexus.stats(net)


def test_a_closed_model_says_so_and_may_be_closed_again(net: Net, saved: Path) -> None:
    model = tightly(net, saved)
    with torch.no_grad():
        model(X)
    nexus.close(model)
    nexus.close(model)
    for use in (lambda: model(X), lambda: model.layers[2](X), lambda: nexus.stats(model)):
        with pytest.raises(EngineClosed, match="Stream the model again"):
            use()
    assert all(parameter.is_meta for parameter in model.layers.parameters())


def test_a_closed_model_may_be_streamed_again(net: Net, saved: Path) -> None:
    want, kinds = net(X), [type(module) for module in net.modules()]
    for io in ("direct", "mmap", "buffered", "direct"):
        with torch.no_grad(), tightly(net, saved, io=io):
            for _ in range(2):
                assert torch.equal(net(X), want)
    # Refused, but already given its own classes back.
    with pytest.raises(BudgetError):
        nexus.stream(net, saved, budget=1)
    assert [type(module) for module in net.modules()] == kinds


def test_a_model_may_be_streamed_again_with_other_groups(net: Net, saved: Path) -> None:
    want = net(X)
    with torch.no_grad():
        for groups in ("layers", ["layers.0", "layers.1", "layers.2", "first"], None):
            with tightly(net, saved, groups=groups):
                assert torch.equal(net(X), want)


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_collecting_a_model_stops_its_engine_and_threads(tmp_path: Path, io: str) -> None:
    model = make()
    checkpoint = save(model, tmp_path / "net.safetensors")
    num_threads = len(os.listdir("/proc/self/task"))
    tightly(model, checkpoint, io=io, use_uring=False)
    with torch.no_grad():
        model(X)
    handle, block = model._nexus.streamer.engine.handle, model.layers[0]
    torch.ops.nexus.engine_stats(handle)
    assert len(os.listdir("/proc/self/task")) > num_threads
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="EngineClosed"):
        torch.ops.nexus.engine_stats(handle)
    assert len(os.listdir("/proc/self/task")) <= num_threads
    with pytest.raises(EngineClosed):
        block(X)


# -- errors before anything is changed -----------------------------------------------------------


def swapped(
    model: nn.Module, path: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> Path:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(tensors)
    save_file(tensors, path)
    return path


@pytest.fixture
def refuses(net: Net) -> Iterator[Callable[..., str]]:
    """Stream `net`, expect an error, give its message; and in the end `net` must be as it was."""
    shown, kinds = repr(net), [type(module) for module in net.modules()]
    tensors, want = dict(net.state_dict(keep_vars=True)), net(X)

    def refuse(kind: type[NexusError], *args: Any, **options: Any) -> str:
        with pytest.raises(kind) as refused:
            nexus.stream(net, *args, **options)
        assert type(refused.value) is kind
        return str(refused.value)

    yield refuse
    assert repr(net) == shown
    assert [type(module) for module in net.modules()] == kinds
    assert all(tensor is tensors[name] for name, tensor in net.state_dict(keep_vars=True).items())
    assert not any(key.startswith("_nexus") for module in net.modules() for key in vars(module))
    assert torch.equal(net(X), want)


def test_a_missing_tensor_is_named(net: Net, refuses: Any, tmp_path: Path) -> None:
    checkpoint = swapped(net, tmp_path / "n.safetensors", lambda t: t.pop("layers.2.a.bias"))
    for strict in (True, False):
        message = refuses(CheckpointMismatch, checkpoint, strict=strict)
        assert "lacks layers.2.a.bias" in message
        assert str(checkpoint) in message


def test_an_unexpected_tensor_is_named_unless_it_may_be_there(
    net: Net, refuses: Any, tmp_path: Path
) -> None:
    extra = {"position_ids": torch.arange(3)}
    checkpoint = swapped(net, tmp_path / "n.safetensors", lambda t: t.update(extra))
    assert "the model lacks position_ids" in refuses(CheckpointMismatch, checkpoint)
    with torch.no_grad(), tightly(copy.deepcopy(net), checkpoint, strict=False) as model:
        assert torch.equal(model(X), net(X))


def test_many_missing_tensors_are_counted(net: Net, refuses: Any, tmp_path: Path) -> None:
    checkpoint = swapped(net, tmp_path / "n.safetensors", lambda t: [t.pop(n) for n in list(t)[4:]])
    assert "and 18 more" in refuses(CheckpointMismatch, checkpoint)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (torch.zeros(WIDTH, WIDTH, dtype=torch.bfloat16), "bfloat16[64, 64]"),
        (torch.zeros(WIDTH, 2 * WIDTH), "float32[64, 128]"),
        (torch.zeros(WIDTH * WIDTH), "float32[4096]"),
    ],
)
@pytest.mark.parametrize("name", ["layers.4.b.weight", "first.weight"])
def test_another_dtype_or_shape_is_named_with_file_and_offset(
    net: Net, refuses: Any, tmp_path: Path, name: str, other: torch.Tensor, words: str
) -> None:
    checkpoint = swapped(net, tmp_path / "n.safetensors", lambda t: t.update({name: other}))
    offset = Checkpoint.open(checkpoint).entries[name].offset
    message = refuses(CheckpointMismatch, checkpoint)
    assert f"{name} is float32[64, 64] in the model and {words} in {checkpoint}" in message
    assert f"at offset {offset}" in message


@pytest.mark.parametrize("lookahead", [1, 2, 3, "auto"])
def test_a_budget_too_small_names_the_smallest_which_works(
    net: Net, saved: Path, refuses: Any, lookahead: Any
) -> None:
    message = refuses(BudgetError, saved, budget=1, lookahead=lookahead)
    smallest = int(re.search(r"needed (\d+) =", message)[1])
    refuses(BudgetError, saved, budget=smallest - 1, lookahead=lookahead)
    with (
        torch.no_grad(),
        nexus.stream(copy.deepcopy(net), saved, budget=smallest, lookahead=lookahead) as model,
    ):
        assert nexus.plan_of(model).device_bytes == smallest
        assert torch.equal(model(X), net(X))
        assert f"works is {nexus.plan_of(model).minimum_bytes} bytes" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "warp"}, "warp"),
        ({"device": "cuda"}, "cuda"),
        ({"device": "cuda:1"}, "cuda:1"),
        ({"device": torch.device("meta")}, "meta"),
        ({"device": None}, "None"),
        ({"io": "fast"}, "auto, direct, buffered, mmap"),
        ({"verify": "sometimes"}, "off, first, always"),
        ({"prefault": "maybe"}, "auto, on, off"),
        ({"lookahead": 0}, "got 0"),
        ({"lookahead": -3}, "got -3"),
        ({"lookahead": "far"}, "far"),
        ({"lookahead": None}, "None"),
        ({"budget": -1}, "-1"),
        ({"budget": "lots"}, "lots"),
        ({"ram_budget": "lots"}, "lots"),
        ({"depth": 1}, "2..1024"),
        ({"depth": 5000}, "2..1024"),
        ({"chunk_bytes": "1KiB"}, "at least 65536"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_those_that_can(
    saved: Path, refuses: Any, options: dict[str, Any], words: str
) -> None:
    assert words in refuses(ConfigError, saved, **options)


def test_an_unknown_option_is_refused(net: Net, saved: Path) -> None:
    with pytest.raises(TypeError, match="speed"):
        nexus.stream(net, saved, speed="fast")
    assert not isinstance(net, nexus.StreamedModule)


def test_a_ram_budget_for_less_than_two_reads_is_refused(saved: Path, refuses: Any) -> None:
    message = refuses(BudgetError, saved, ram_budget="1MiB")
    assert "staging slots of 1056768 bytes, got 1048576" in message
    allowed = int(re.search(r"allow (\d+)", message)[1])
    refuses(BudgetError, saved, ram_budget=allowed - 1)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ("nowhere", "there is no 'nowhere'"),
        (["layers.1", "layers.1.a", "layers.2"], "'layers.1.a' lies inside 'layers.1'"),
        (["layers", ""], "lies inside"),
        ([], "Streaming needs repeated blocks"),
        ("layers.0.a.weight", "there is no"),
    ],
)
def test_groups_that_cannot_be_are_refused(
    saved: Path, refuses: Any, groups: Any, words: str
) -> None:
    assert words in refuses(StreamError, saved, groups=groups)


def test_a_model_without_repetition_is_refused(tmp_path: Path) -> None:
    model = make(Block)
    checkpoint = save(model, tmp_path / "b.safetensors")
    with pytest.raises(StreamError, match="Block shows none"):
        nexus.stream(model, checkpoint)
    assert type(model) is Block


def test_a_block_whose_forward_was_replaced_is_refused(net: Net, saved: Path) -> None:
    net.layers[2].forward = lambda x: x
    with pytest.raises(StreamError, match=r"'layers\.2' was replaced"):
        nexus.stream(net, saved)
    assert not any(parameter.is_meta for parameter in net.parameters())


def test_a_computed_buffer_left_on_meta_is_refused(saved: Path) -> None:
    model = make()
    model.layers[0].register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(StreamError, match=r"layers\.0\.table"):
        nexus.stream(model, saved)
    assert type(model) is Net


def test_a_checkpoint_that_is_not_there_is_refused(refuses: Any, tmp_path: Path) -> None:
    assert "nowhere" in refuses(CheckpointFormatError, tmp_path / "nowhere")


def test_what_the_checkpoint_calls_a_tensor_may_differ(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({f"model.{name}": t.clone() for name, t in net.state_dict().items()}, path)
    with torch.no_grad(), tightly(copy.deepcopy(net), path, rename="model.{}".format) as model:
        assert torch.equal(model(X), net(X))


def test_a_checkpoint_may_be_open_already(net: Net, saved: Path) -> None:
    with torch.no_grad(), tightly(copy.deepcopy(net), Checkpoint.open(saved)) as model:
        assert torch.equal(model(X), net(X))


def test_progress_is_told_of_every_resident_byte(net: Net, saved: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with nexus.stream(net, saved, budget="1GiB", progress=lambda *what: told.append(what)) as model:
        total = nexus.plan_of(model).device_bytes
    assert {what for what, _, _ in told} == {"reading resident weights"}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1:] == (total, total)
    assert len(told) == NUM_BLOCKS + 2
