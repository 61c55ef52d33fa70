"""Whole models whose weights stream to a GPU, real or simulated, equal resident ones bit for bit.

On the simulated driver the model computes on the processor: the caller's stream is the thread
itself, and arenas are host memory that only the driver's copies may fill. Freed arenas are poisoned
throughout, so a block that read one would answer NaN.
"""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nexus_ext as nexus
from nexus_ext.device import Device
from nexus_ext.errors import BudgetError, EngineClosed, StreamError

pytestmark = pytest.mark.takes_simcuda

WIDTH = 64
NUM_BLOCKS = 6
# The smallest chunks, so that a block is several; and as many slots as the ring may need at most.
SMALL = {"chunk_bytes": "64KiB", "depth": 2}
SLOT = (64 << 10) + 2 * 4096
LARGEST_RING = 6 * SLOT


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, 2 * WIDTH)
        self.b = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.tanh(self.a(self.norm(x))))


class Model(nn.Module):
    """Something before the blocks, blocks in any order, something after, a buffer of its own."""

    def __init__(self, num_blocks: int = NUM_BLOCKS) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.register_buffer("scale", torch.rand(WIDTH), persistent=False)

    def forward(self, ids: torch.Tensor, order: Any = None) -> torch.Tensor:
        x = self.table(ids) * self.scale
        for index in range(len(self.layers)) if order is None else order:
            x = self.layers[index](x)
        return self.head(x)


BLOCK_BYTES = 4 * sum(parameter.numel() for parameter in Block().parameters())
OUTSIDE_BYTES = 4 * 2 * 50 * WIDTH

Twins = Callable[..., tuple[Any, Any]]


@pytest.fixture(autouse=True)
def _poisoned_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")


class Maker:
    """Makes resident models on the device, and streamed twins from their checkpoints."""

    def __init__(self, device: Device, folder: Path) -> None:
        self.device = device
        self.folder = folder
        self.made: list[Any] = []

    def resident(self, dtype: torch.dtype = torch.float32, build: Any = Model) -> Any:
        """On the host still; its checkpoint is `folder`."""
        resident = build().to(dtype).eval().requires_grad_(False)
        tensors = {name: tensor.clone() for name, tensor in resident.state_dict().items()}
        save_file(tensors, self.folder / "model.safetensors")
        return resident

    def streamed(self, resident: Any, device: Device | None = None, **options: Any) -> Any:
        chosen = {"budget": "200KiB", "io": "direct", "ram_budget": "8MiB", **options}
        streamed = copy.deepcopy(resident)
        self.made.append(streamed)
        nexus.stream(streamed, self.folder, device=device or self.device, **chosen)
        return streamed

    def __call__(
        self, dtype: torch.dtype = torch.float32, build: Any = Model, **options: Any
    ) -> tuple[Any, Any]:
        resident = self.resident(dtype, build)
        streamed = self.streamed(resident, **options)
        return resident.to(self.device.torch_device), streamed

    def smallest_budget(self, resident: Any, **options: Any) -> int:
        with pytest.raises(BudgetError) as refused:
            self.streamed(resident, budget=0, **options)
        return int(re.search(r"needed (\d+) =", str(refused.value))[1])

    def close(self) -> None:
        for model in self.made:
            if "_nexus" in model.__dict__:
                nexus.close(model)


@pytest.fixture
def device(gpu: Any) -> Device:
    if gpu.sim is not None:
        gpu.sim.set_inline_current(True)
    return gpu.device


@pytest.fixture
def twins(device: Device, tmp_path: Path) -> Iterator[Maker]:
    made = Maker(device, tmp_path)
    yield made
    made.close()


@pytest.fixture
def ids(device: Device) -> torch.Tensor:
    return torch.arange(12, device=device.torch_device).view(2, 6)


def assert_equal(resident: Any, streamed: Any, ids: torch.Tensor, passes: int = 3) -> None:
    with torch.inference_mode():
        want = resident(ids)
        for _ in range(passes):
            assert torch.equal(streamed(ids), want)


def grown(model: Any, run: Callable[[], object]) -> dict[str, Any]:
    """By how much the counters grow meanwhile."""
    before = vars(nexus.stats(model))
    run()
    after = vars(nexus.stats(model))
    return {
        name: after[name] - before[name]
        for name in after
        if name.startswith(("num_", "bytes_")) or name.endswith("_bytes_read")
    }


# -- budgets, lookahead, ways to read --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("io", ["direct", "buffered", "mmap", "auto"])
def test_a_streamed_model_equals_a_resident_one(
    twins: Maker, ids: torch.Tensor, io: str, dtype: torch.dtype
) -> None:
    resident, streamed = twins(
        dtype, io=io, budget=260 * 1024 if dtype == torch.float32 else 140 * 1024
    )
    assert nexus.plan_of(streamed).streamed
    assert_equal(resident, streamed, ids)
    stats = nexus.stats(streamed)
    assert stats.device == "cuda:0"
    assert stats.num_copies > 0
    # Mapped pages are no device's memory: nothing is used in place.
    assert stats.num_views == 0
    assert stats.num_cloned == 0


@pytest.mark.parametrize("lookahead", [1, 2, "auto"])
@pytest.mark.parametrize("num_resident", ["floor", 1, 2, "all"])
def test_any_budget_gives_the_same_answer(
    twins: Maker, ids: torch.Tensor, num_resident: Any, lookahead: Any
) -> None:
    resident = twins.resident()
    budget = twins.smallest_budget(resident, lookahead=lookahead)
    extra = {"floor": 0, "all": NUM_BLOCKS}.get(num_resident, num_resident)
    streamed = twins.streamed(
        resident,
        budget=budget + extra * BLOCK_BYTES,
        lookahead=lookahead,
        ram_budget=3 * SLOT,
        **SMALL,
    )
    plan = nexus.plan_of(streamed)
    if num_resident == "all":
        assert not plan.streamed
    elif lookahead != "auto":
        assert plan.lookahead == lookahead
        assert len(plan.resident) == extra
    assert plan.device_bytes <= plan.budget_bytes
    assert_equal(resident.to(twins.device.torch_device), streamed, ids)


def test_resident_models_copy_once_and_keep_nothing_in_ram(twins: Maker, ids: torch.Tensor) -> None:
    resident, streamed = twins(budget="1GiB")
    assert grown(streamed, lambda: assert_equal(resident, streamed, ids))["bytes_copied"] == 0
    stats = nexus.stats(streamed)
    assert stats.bytes_copied == NUM_BLOCKS * BLOCK_BYTES + OUTSIDE_BYTES
    assert stats.ram_bytes == stats.ram_groups == 0


@pytest.mark.parametrize("verify", ["first", "always"])
def test_verified_models_equal_too(twins: Maker, ids: torch.Tensor, verify: str) -> None:
    resident, streamed = twins(verify=verify)
    assert_equal(resident, streamed, ids)
    assert nexus.stats(streamed).num_verified >= NUM_BLOCKS


# -- the tier in RAM -------------------------------------------------------------------------------

ROOM = {
    "none": 3 * SLOT,
    "some": LARGEST_RING + 5 * BLOCK_BYTES // 2,
    "all": LARGEST_RING + NUM_BLOCKS * BLOCK_BYTES,
}


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
@pytest.mark.parametrize("room", ROOM)
def test_groups_stay_in_ram_as_far_as_there_is_room(
    twins: Maker, ids: torch.Tensor, room: str, io: str
) -> None:
    resident, streamed = twins(ram_budget=ROOM[room], io=io, lookahead=1, **SMALL)
    plan = nexus.plan_of(streamed)
    assert len(plan.streamed) == NUM_BLOCKS
    num_kept = len(plan.in_ram)
    assert {"none": num_kept == 0, "some": 2 <= num_kept <= 3, "all": num_kept == NUM_BLOCKS}[room]
    assert_equal(resident, streamed, ids, passes=2)
    more = grown(streamed, lambda: assert_equal(resident, streamed, ids))
    assert (more["bytes_read"] == 0) == (room == "all")
    assert (more["num_ram_loads"] > 0) == (room != "none")
    stats = nexus.stats(streamed)
    assert stats.ram_groups == num_kept
    assert stats.is_pinned
    assert stats.staging_bytes + stats.ram_bytes <= ROOM[room] + 4096 * (num_kept + 1)


def test_a_second_pass_from_ram_needs_no_file(twins: Maker, ids: torch.Tensor) -> None:
    resident, streamed = twins()
    assert_equal(resident, streamed, ids, passes=2)
    with open(twins.folder / "model.safetensors", "r+b") as file:
        file.truncate(100)
    assert_equal(resident, streamed, ids)


def test_the_plan_says_what_is_in_ram(twins: Maker) -> None:
    _, streamed = twins()
    plan = nexus.plan_of(streamed)
    assert plan.in_ram == plan.streamed
    assert f"in RAM    groups: {NUM_BLOCKS}" in plan.describe()
    assert plan.predicted_step_seconds is not None
    assert plan.disk_bytes == 0


# -- page-locked memory that the driver refuses ----------------------------------------------------


@pytest.mark.needs_simcuda
def test_without_page_locked_memory_copies_are_pageable_and_right(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    sim_gpu.sim.set_registered_limit(0)
    resident, streamed = twins()
    assert_equal(resident, streamed, ids)
    stats = nexus.stats(streamed)
    assert not stats.is_pinned
    assert "CUDA_ERROR_OUT_OF_MEMORY" in stats.pin_refusal
    assert stats.ram_bytes == 0
    assert stats.bytes_read > 2 * NUM_BLOCKS * BLOCK_BYTES


@pytest.mark.needs_simcuda
def test_with_less_page_locked_memory_the_ring_is_smaller(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    # The ring has from 11 to 18 slots, as the rates have it; half of it fits.
    sim_gpu.sim.set_registered_limit(9 * SLOT)
    resident, streamed = twins(chunk_bytes="64KiB", depth=8)
    assert_equal(resident, streamed, ids)
    stats = nexus.stats(streamed)
    assert stats.is_pinned
    assert 5 <= stats.num_slots <= 9
    assert "CUDA_ERROR_OUT_OF_MEMORY" in stats.pin_refusal


@pytest.mark.needs_simcuda
def test_groups_that_find_no_page_locked_memory_stream_from_disk(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    sim_gpu.sim.set_registered_limit(LARGEST_RING + 2 * BLOCK_BYTES + 3 * 4096)
    resident, streamed = twins(**SMALL)
    assert len(nexus.plan_of(streamed).in_ram) == NUM_BLOCKS
    assert_equal(resident, streamed, ids)
    more = grown(streamed, lambda: assert_equal(resident, streamed, ids))
    assert more["num_ram_loads"] > 0
    assert more["bytes_read"] > 0
    stats = nexus.stats(streamed)
    assert 0 < stats.ram_bytes <= 3 * (BLOCK_BYTES + 8192)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in stats.pin_refusal


# -- blocks in any order, ties, parts that are kept ------------------------------------------------


@pytest.mark.parametrize("ram_budget", [3 * SLOT, "8MiB"], ids=["disk", "ram"])
def test_blocks_may_be_skipped_repeated_and_reordered(
    twins: Maker, ids: torch.Tensor, ram_budget: Any
) -> None:
    resident, streamed = twins(ram_budget=ram_budget, lookahead=1, **SMALL)
    orders = [
        [0, 2, 4],
        [5, 4, 3, 2, 1, 0],
        [3, 3, 3],
        [1, 0, 1, 0, 5, 5, 2],
        [],
        list(range(NUM_BLOCKS)) * 2,
        [4],
    ]
    with torch.inference_mode():
        for order in orders * 2:
            assert torch.equal(streamed(ids, order), resident(ids, order)), order


class Tied(Model):
    """The head shares the table; two blocks share a weight; one has a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.table.weight
        self.layers[1].a.weight = self.layers[4].a.weight
        self.layers[2].twin = self.layers[2].a


def test_tied_weights_stay_tied(twins: Maker, ids: torch.Tensor) -> None:
    resident = Tied().eval().requires_grad_(False)
    tensors = {
        name: tensor.clone()
        for name, tensor in resident.state_dict().items()
        if name != "head.weight" and "twin" not in name
    }
    save_file(tensors, twins.folder / "model.safetensors")
    streamed = twins.streamed(resident, budget="300KiB")
    assert nexus.plan_of(streamed).streamed
    assert streamed.head.weight is streamed.table.weight
    assert streamed.layers[1].a.weight is streamed.layers[4].a.weight
    assert_equal(resident.to(twins.device.torch_device), streamed, ids)


class Adapted(Model):
    """A parameter of a block and one outside that no checkpoint holds, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.gain = nn.Parameter(torch.rand(WIDTH))
            layer.register_buffer("shift", torch.rand(WIDTH), persistent=False)
        self.gain = nn.Parameter(torch.rand(WIDTH))

    def forward(self, ids: torch.Tensor, order: Any = None) -> torch.Tensor:
        x = self.table(ids) * self.scale * self.gain
        for layer in self.layers:
            x = layer(x) * layer.gain + layer.shift
        return self.head(x)


def test_what_the_checkpoint_lacks_moves_to_the_device(twins: Maker, ids: torch.Tensor) -> None:
    resident = Adapted().eval()
    tensors = {n: t.detach() for n, t in resident.state_dict().items() if "gain" not in n}
    save_file(tensors, twins.folder / "model.safetensors")
    gains = [resident.gain, *(layer.gain for layer in resident.layers)]
    streamed = twins.streamed(resident, keep="*gain")
    where = twins.device.torch_device
    kept = [streamed.gain, *(layer.gain for layer in streamed.layers)]
    assert all(parameter.device == where and parameter.requires_grad for parameter in kept)
    assert all(torch.equal(ours.cpu(), gain) for ours, gain in zip(kept, gains, strict=True))
    assert streamed.scale.device == where
    assert all(layer.shift.device == where for layer in streamed.layers)
    # Where it is not there, it says where it will be.
    assert all(parameter.device == where for parameter in streamed.parameters())
    assert all(buffer.device == where for buffer in streamed.buffers())
    assert_equal(resident.to(where), streamed, ids)


def test_gradients_move_with_their_parameters(twins: Maker, ids: torch.Tensor) -> None:
    resident = Adapted().eval()
    tensors = {n: t.detach() for n, t in resident.state_dict().items() if "gain" not in n}
    save_file(tensors, twins.folder / "model.safetensors")
    streamed = copy.deepcopy(resident)
    for model in (resident, streamed):
        model.gain.grad = torch.ones(WIDTH)
    nexus.stream(streamed, twins.folder, device=twins.device, keep="*gain", budget="1GiB")
    twins.made.append(streamed)
    assert streamed.gain.grad is not None
    assert streamed.gain.grad.device == twins.device.torch_device
    streamed(ids).sum().backward()
    resident.to(twins.device.torch_device)(ids).sum().backward()
    assert torch.equal(streamed.gain.grad, resident.gain.grad)


# -- weights by rows -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "by_rows", ["table", "head", "layers.*.a", ["table", "head", "layers.*.a", "layers.*.b"]]
)
def test_weights_may_be_read_by_rows(twins: Maker, ids: torch.Tensor, by_rows: Any) -> None:
    resident, streamed = twins(by_rows=by_rows, tile_bytes="16KiB")
    with torch.inference_mode():
        want = resident(ids)
        for _ in range(3):
            # A product in tiles may round otherwise than one.
            torch.testing.assert_close(streamed(ids), want)
    if by_rows == "table":
        assert_equal(resident, streamed, ids)
    stats = nexus.stats(streamed)
    assert (stats.num_rows > 0) == ("table" in by_rows)
    assert streamed.table(ids).device == twins.device.torch_device


# -- several models, several devices ---------------------------------------------------------------


def test_two_models_share_one_budget(twins: Maker, device: Device, ids: torch.Tensor) -> None:
    residents = []
    requests = []
    for index, num_blocks in enumerate((4, 7)):
        model = Model(num_blocks).eval().requires_grad_(False)
        folder = twins.folder / str(index)
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        residents.append(model)
        requests.append((copy.deepcopy(model), folder, {}))
    budget = 7 * BLOCK_BYTES + 2 * OUTSIDE_BYTES
    streamed = nexus.stream_all(
        requests, budget=budget, device=device, io="direct", ram_budget="4MiB"
    )
    twins.made += streamed
    plans = [nexus.plan_of(model) for model in streamed]
    assert sum(plan.device_bytes for plan in plans) <= budget
    assert all(plan.streamed for plan in plans)
    residents = [model.to(device.torch_device) for model in residents]
    with torch.inference_mode():
        for index in (0, 1, 1, 0, 0, 1):
            assert torch.equal(streamed[index](ids), residents[index](ids))


def test_several_models_in_turn_on_one_device(twins: Maker, ids: torch.Tensor) -> None:
    resident, first = twins()
    second = twins.streamed(copy.deepcopy(resident).cpu(), ram_budget=3 * SLOT, **SMALL)
    with torch.inference_mode():
        want = resident(ids)
        for _ in range(3):
            assert torch.equal(first(ids), want)
            assert torch.equal(second(ids), want)


@pytest.mark.needs_simcuda
def test_engines_of_several_devices_do_not_meddle(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    sim = sim_gpu.sim
    sim.set_default_stream(sim.create_stream(1))
    resident, first = twins()
    second = twins.streamed(resident, ram_budget=3 * SLOT, **SMALL)
    other = twins.streamed(resident, sim_gpu.second())
    assert nexus.stats(other).device == "cuda:1"
    with torch.inference_mode():
        want = resident(ids)
        for _ in range(3):
            for model in (first, other, second):
                assert torch.equal(model(ids), want)
    assert all(count > 0 for count in sim.counts()["retains"])
    nexus.close(other)
    assert sim.counts()["retains"][1] == 0
    assert_equal(resident, first, ids)
    twins.close()
    assert not {name for name in sim.leaks() if name != "retains"}


@pytest.mark.needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs an NVIDIA GPU more")
def test_another_gpu_than_the_current_one(twins: Maker, ids: torch.Tensor) -> None:
    resident = twins.resident()
    streamed = twins.streamed(resident, Device.of("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert_equal(resident.to("cuda:1"), streamed, ids.to("cuda:1"))
    assert torch.cuda.current_device() == 0


# -- nobody waits ----------------------------------------------------------------------------------


@pytest.mark.needs_simcuda
def test_from_ram_the_caller_waits_for_nobody(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    resident, streamed = twins()
    assert_equal(resident, streamed, ids, passes=2)
    sim_gpu.sim.mark_caller_thread()
    more = grown(streamed, lambda: assert_equal(resident, streamed, ids, passes=5))
    assert sim_gpu.sim.counts()["num_synchronize_caller"] == 0
    assert more["num_waits"] == 0
    assert more["num_mispredicted"] == 0
    assert more["num_hits"] == 5 * NUM_BLOCKS


@pytest.mark.needs_cuda
def test_a_steady_step_synchronises_nothing(twins: Maker, ids: torch.Tensor) -> None:
    resident, streamed = twins()
    assert_equal(resident, streamed, ids, passes=2)
    torch.cuda.synchronize()
    with torch.inference_mode():
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = [streamed(ids) for _ in range(5)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        want = resident(ids)
    assert all(torch.equal(mine, want) for mine in ours)


@pytest.mark.needs_cuda
def test_torch_counts_every_byte_and_they_fit_the_budget(twins: Maker, ids: torch.Tensor) -> None:
    resident = twins.resident()
    with torch.inference_mode():
        copy.deepcopy(resident).to(twins.device.torch_device)(ids)  # workspaces of matmuls stay
    gc.collect()
    before = torch.cuda.memory_allocated()
    streamed = twins.streamed(resident)
    plan = nexus.plan_of(streamed)
    attached = torch.cuda.memory_allocated() - before
    # The allocator rounds every tensor up to 512 bytes; buffers and the turn are beside the plan.
    assert plan.device_bytes <= attached <= plan.device_bytes + 512 * 16
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        streamed(ids)
        streamed(ids)
    activations = 1 << 20
    assert torch.cuda.max_memory_allocated() - before - attached < activations
    nexus.close(streamed)
    del streamed
    twins.made.clear()
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.needs_simcuda
def test_passes_may_run_on_streams_that_are_not_ordered(sim_gpu: Any, bench: Any) -> None:
    """Of resident weights nobody asks in which order they are read."""
    rig = bench.rig(num_arenas=2)
    for _ in range(4):
        for group in range(5):
            if group == 4:
                sim_gpu.delay(20_000)
            rig.use(group)
        rig.engine.end_pass()
        sim_gpu._current = sim_gpu.sim.create_stream()
        sim_gpu.sim.set_default_stream(sim_gpu._current)
    assert rig.num_wrong() == 0


@pytest.mark.needs_cuda
def test_forwards_may_run_on_streams_that_are_not_ordered(twins: Maker, ids: torch.Tensor) -> None:
    resident, streamed = twins()
    assert_equal(resident, streamed, ids)
    hook = streamed.layers[5].norm.register_forward_hook(
        lambda *_: torch.cuda._sleep(100_000_000)  # after the block was acquired
    )
    torch.cuda.synchronize()
    with torch.inference_mode():
        want = resident(ids)
        torch.cuda.synchronize()
        ours = []
        for _ in range(4):
            with torch.cuda.stream(torch.cuda.Stream()):
                ours.append(streamed(ids))
        hook.remove()
        torch.cuda.synchronize()
        assert all(torch.equal(mine, want) for mine in ours)


@pytest.mark.needs_cuda
def test_another_stream_may_be_current(twins: Maker, ids: torch.Tensor) -> None:
    resident, streamed = twins(ram_budget=3 * SLOT, **SMALL)
    with torch.inference_mode():
        want = resident(ids)
        for _ in range(3):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                ours = streamed(ids)
            torch.cuda.current_stream().wait_stream(stream)
            assert torch.equal(ours, want)


# -- what a streamed model is ----------------------------------------------------------------------


def test_stand_ins_say_where_their_weights_will_be(twins: Maker) -> None:
    _, streamed = twins()
    weight = streamed.layers[0].a.weight
    for stand_in in (weight, weight.data, weight.detach(), *streamed.state_dict().values()):
        assert stand_in.device == twins.device.torch_device
    for stand_in in (weight, weight.data, weight.detach()):
        assert stand_in.is_meta
        with pytest.raises(StreamError, match=r"asked for layers\.0\.a\.weight"):
            stand_in + 1


def test_a_block_may_be_called_by_itself(twins: Maker, device: Device) -> None:
    resident, streamed = twins()
    x = torch.randn(3, WIDTH).to(device.torch_device)
    with torch.inference_mode():
        for index in (2, 0, 5, 5, 1):
            assert torch.equal(streamed.layers[index](x), resident.layers[index](x))
            assert torch.equal(streamed.layers[index].a(x), resident.layers[index].a(x))


def test_a_closed_model_frees_everything_and_may_stream_again(
    gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    resident, streamed = twins()
    assert_equal(resident, streamed, ids)
    nexus.close(streamed)
    nexus.close(streamed)
    if gpu.sim is not None:
        assert not {name for name in gpu.sim.leaks() if name != "retains"}
        assert gpu.sim.counts()["retains"] == [0, 0]
    with pytest.raises(EngineClosed):
        streamed(ids)
    with pytest.raises(EngineClosed):
        nexus.stats(streamed)
    nexus.stream(streamed, twins.folder, device=twins.device, budget="200KiB", ram_budget="8MiB")
    assert_equal(resident, streamed, ids)


def test_a_model_that_nobody_holds_frees_everything(
    gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    resident, streamed = twins()
    assert_equal(resident, streamed, ids)
    twins.made.clear()
    del streamed
    gc.collect()
    if gpu.sim is not None:
        assert not gpu.sim.leaks()


def test_a_model_may_move_from_the_host_to_the_device_by_streaming_again(
    twins: Maker, ids: torch.Tensor
) -> None:
    resident, streamed = twins(device=Device.of("cpu"))
    assert nexus.stats(streamed).device == "cpu"
    with torch.inference_mode():
        assert torch.isfinite(streamed(ids.cpu())).all()
    nexus.close(streamed)
    nexus.stream(streamed, twins.folder, device=twins.device, budget="200KiB", ram_budget="8MiB")
    assert nexus.stats(streamed).device == "cuda:0"
    assert_equal(resident, streamed, ids)


def test_a_streamed_model_may_be_put_where_it_is_and_nowhere_else(
    twins: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers' pipelines and trainers do without being asked."""
    _, streamed = twins()
    # As on a real GPU.
    there = Device("cuda:0", torch.device("cuda", 0))
    monkeypatch.setattr(streamed._nexus.streamer, "device", there)
    assert streamed.to("cuda:0") is streamed
    assert streamed.to(there.torch_device) is streamed
    for other in ("cpu", "cuda:1", "meta"):
        with pytest.raises(StreamError, match="cannot be moved"):
            streamed.to(other)


@pytest.mark.needs_simcuda
@pytest.mark.parametrize("seed", range(8))
def test_late_copies_change_nothing(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor, seed: int
) -> None:
    """As the seed has it: what is resident, what is in RAM, and how late every copy is."""
    sim_gpu.reset(seed, max_delay_us=400)
    sim_gpu.sim.set_inline_current(True)
    resident, streamed = twins(
        budget=OUTSIDE_BYTES + (2 + seed % 4) * BLOCK_BYTES,
        lookahead=1 + seed % 2 if seed % 4 else "auto",
        ram_budget=list(ROOM.values())[seed % 3],
        **SMALL,
    )
    assert_equal(resident, streamed, ids, passes=4)
    nexus.close(streamed)
    counts = sim_gpu.sim.counts()
    assert not sim_gpu.sim.leaks()
    assert counts["num_use_after_free"] == counts["num_unregistered_in_use"] == 0
    assert counts["num_bad_pointers"] == counts["num_bad_handles"] == 0
