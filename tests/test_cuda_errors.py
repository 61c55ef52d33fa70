"""What a user is told when the GPU cannot do something, and what works afterwards.

The driver's answers are the simulated one's. A closed model leaves nothing behind, come what may.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import nexus_ext as nexus
from nexus_ext.engine import Faults
from nexus_ext.errors import (
    BudgetError,
    ConfigError,
    DeviceError,
    DeviceLost,
    EngineClosed,
    NexusError,
)
from tests.test_cuda_module import (
    BLOCK_BYTES,
    NUM_BLOCKS,
    OUTSIDE_BYTES,
    SLOT,
    SMALL,
    WIDTH,
    Maker,
    Model,
    _poisoned_arenas,
    assert_equal,
    device,
    ids,
    twins,
)

pytestmark = pytest.mark.takes_simcuda
__all__ = ["_poisoned_arenas", "device", "ids", "twins"]  # fixtures

# CUresults.
INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, LAUNCH_FAILED = 1, 2, 700, 719

FROM_DISK = {"ram_budget": 3 * SLOT, "lookahead": 1, **SMALL}


@pytest.fixture(params=["disk", "ram"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(FROM_DISK) if request.param == "disk" else {"lookahead": 1}


@pytest.fixture
def nothing_is_left(sim_gpu: Any, twins: Maker) -> Iterator[None]:
    """Once everything is closed."""
    yield
    twins.close()
    assert not sim_gpu.sim.leaks()


# -- before the first weight -----------------------------------------------------------------------


def test_a_budget_too_small_names_the_smallest_that_works(
    gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    resident = twins.resident()
    needed = twins.smallest_budget(resident, **FROM_DISK)
    assert needed == OUTSIDE_BYTES + 2 * BLOCK_BYTES
    with pytest.raises(BudgetError, match=f"smallest budget that works is {needed} bytes"):
        twins.streamed(resident, budget=needed - 1, **FROM_DISK)
    if gpu.sim is not None:
        assert not gpu.sim.leaks()
    streamed = twins.streamed(resident, budget=needed, **FROM_DISK)
    assert_equal(resident.to(twins.device.torch_device), streamed, ids)


def test_a_ram_budget_too_small_names_the_smallest_that_works(
    gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    resident = twins.resident()
    with pytest.raises(BudgetError, match=f"allow {3 * SLOT} or lower chunk_bytes"):
        twins.streamed(resident, **{**FROM_DISK, "ram_budget": 3 * SLOT - 1})
    if gpu.sim is not None:
        assert not gpu.sim.leaks()
    streamed = twins.streamed(resident, **FROM_DISK)
    assert_equal(resident.to(twins.device.torch_device), streamed, ids)


@pytest.mark.parametrize("where", ["cuda:99", "mps", "nonsense"])
def test_a_device_that_cannot_be_changes_nothing(
    twins: Maker, ids: torch.Tensor, where: str
) -> None:
    resident = twins.resident()
    with pytest.raises(ConfigError, match=f"device.*{where}"):
        nexus.stream(resident, twins.folder, device=where)
    assert type(resident) is Model
    assert_equal(resident, resident, ids.cpu())


@pytest.mark.needs_simcuda
@pytest.mark.parametrize(
    "call",
    [
        "cuInit",
        "cuDevicePrimaryCtxRetain",
        "cuStreamCreate",
        "cuEventCreate",
        "cuMemcpyHtoDAsync",
        "aoti_torch_get_current_cuda_stream",
    ],
)
def test_a_model_that_cannot_be_attached_is_as_before(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor, call: str
) -> None:
    resident = twins.resident()
    before = {name: parameter.clone() for name, parameter in resident.named_parameters()}
    sim_gpu.sim.fail(call, 0, OUT_OF_MEMORY)
    with pytest.raises(DeviceError):
        nexus.stream(resident, twins.folder, device=twins.device, budget="200KiB", **FROM_DISK)
    gc.collect()
    assert not sim_gpu.sim.leaks()
    assert type(resident) is Model
    assert all(torch.equal(p, before[name]) for name, p in resident.named_parameters())
    assert_equal(resident, twins.streamed(resident, **FROM_DISK), ids)


@pytest.mark.needs_simcuda
@pytest.mark.parametrize("nth", [0, 3, 9, 15])
def test_a_device_that_is_lost_while_attaching(sim_gpu: Any, twins: Maker, nth: int) -> None:
    resident = twins.resident()
    sim_gpu.sim.fail_async(nth, ILLEGAL_ADDRESS)
    try:
        streamed = twins.streamed(resident)
    except DeviceLost:
        pass
    else:  # it is noticed later
        assert type(fails_within(3, lambda: streamed(torch.arange(3)))) is DeviceLost
    twins.close()
    gc.collect()
    assert not sim_gpu.sim.leaks()


# -- in the middle of the work ---------------------------------------------------------------------


def fails_within(passes: int, run: Callable[[], object]) -> NexusError:
    """The first error of some passes: what fails ahead of its time is told when it is asked for."""
    for _ in range(passes):
        try:
            run()
        except NexusError as error:
            return error
    pytest.fail("nothing failed")


@pytest.mark.needs_simcuda
@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("sticky", [True, False], ids=["when it is asked", "when it runs"])
def test_a_device_that_is_lost_ends_streaming(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor, options: Any, sticky: bool
) -> None:
    resident, streamed = twins(**options)
    assert_equal(resident, streamed, ids)
    if sticky:
        sim_gpu.sim.fail("cuMemcpyHtoDAsync", 2, ILLEGAL_ADDRESS, sticky=True)
    else:
        sim_gpu.sim.fail_async(2, LAUNCH_FAILED)
    lost = fails_within(3, lambda: streamed(ids))
    assert type(lost) is DeviceLost
    message = str(lost)
    assert "a new process is needed" in message
    assert ("ILLEGAL_ADDRESS" if sticky else "LAUNCH_FAILED") in message
    for _ in range(3):
        with pytest.raises(DeviceLost):
            streamed(ids)
    with pytest.raises(DeviceLost):
        streamed.layers[0](torch.zeros(1, WIDTH))
    nexus.close(streamed)
    nexus.close(streamed)
    with pytest.raises(EngineClosed):
        streamed(ids)


@pytest.mark.needs_simcuda
@pytest.mark.usefixtures("nothing_is_left")
def test_a_device_that_is_lost_is_told_in_backward_too(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    _, streamed = twins(**FROM_DISK)
    x = torch.randn(2, WIDTH, requires_grad=True)
    y = streamed.layers[3](streamed.layers[1](x))
    sim_gpu.sim.fail("cuMemcpyHtoDAsync", 0, ILLEGAL_ADDRESS, sticky=True)
    with pytest.raises(DeviceLost):
        y.sum().backward()
    with pytest.raises(DeviceLost):
        streamed(ids)


@pytest.mark.needs_simcuda
@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync", "cuStreamWaitEvent"])
def test_calls_that_fail_for_a_while_fail_forwards_for_a_while(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor, options: Any, call: str
) -> None:
    resident, streamed = twins(**options)
    assert_equal(resident, streamed, ids)
    for nth in range(30):
        sim_gpu.sim.fail(call, nth, OUT_OF_MEMORY)
    error = fails_within(3, lambda: assert_equal(resident, streamed, ids, passes=1))
    assert type(error) is DeviceError
    assert "CUDA_ERROR_OUT_OF_MEMORY" in str(error)
    assert "may be tried again" in str(error)
    while sim_gpu.sim.counts()["num_failures"] < 30:
        with contextlib.suppress(DeviceError):
            assert_equal(resident, streamed, ids, passes=1)
    with contextlib.suppress(DeviceError):  # of the last failure
        streamed(ids)
    assert_equal(resident, streamed, ids)


@pytest.mark.needs_simcuda
@pytest.mark.usefixtures("nothing_is_left")
def test_a_copy_that_fails_once_fails_one_forward_at_most(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor, options: Any
) -> None:
    """What failed ahead of its time is loaded once more without a word."""
    resident, streamed = twins(**options)
    assert_equal(resident, streamed, ids)
    for nth in range(8):
        sim_gpu.sim.fail("cuMemcpyHtoDAsync", nth, OUT_OF_MEMORY)
        with contextlib.suppress(DeviceError):
            assert_equal(resident, streamed, ids, passes=2)
        assert_equal(resident, streamed, ids, passes=2)
    assert sim_gpu.sim.counts()["num_failures"] == 8


@pytest.mark.needs_simcuda
@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("call", ["cuEventRecord", "cuEventQuery"])
def test_a_lost_order_is_a_lost_device(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor, call: str
) -> None:
    """Nobody would know what may be overwritten."""
    resident, streamed = twins(**FROM_DISK)
    assert_equal(resident, streamed, ids)
    sim_gpu.sim.fail(call, 1, INVALID_VALUE)
    lost = fails_within(3, lambda: streamed(ids))
    assert type(lost) is DeviceLost
    assert "Stream the model again" in str(lost)
    # The device is well: as it says, the model may be streamed again.
    nexus.close(streamed)
    nexus.stream(streamed, twins.folder, device=twins.device, budget="200KiB", **FROM_DISK)
    assert_equal(resident, streamed, ids)


@pytest.mark.needs_simcuda
@pytest.mark.usefixtures("nothing_is_left")
def test_a_captured_stream_is_refused_with_advice(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor, options: Any
) -> None:
    resident, streamed = twins(**options)
    assert_equal(resident, streamed, ids)
    stream = sim_gpu._current
    sim_gpu.sim.set_capturing(stream)
    with pytest.raises(DeviceError, match="reduce-overhead") as refused:
        streamed(ids)
    assert not isinstance(refused.value, DeviceLost)
    sim_gpu.sim.set_capturing(stream, 0)
    assert_equal(resident, streamed, ids)


@pytest.mark.needs_cuda
def test_a_real_capture_is_refused_with_advice(twins: Maker, ids: torch.Tensor) -> None:
    resident, streamed = twins()
    assert_equal(resident, streamed, ids)
    with (
        torch.inference_mode(),
        torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"),
        pytest.raises(DeviceError, match="reduce-overhead"),
    ):
        streamed(ids)
    assert_equal(resident, streamed, ids)


SLOW_READS = Faults(delay_ppm=1_000_000, delay_us=30_000)


@pytest.mark.needs_simcuda
@pytest.mark.usefixtures("nothing_is_left")
def test_something_else_may_be_captured_while_groups_are_read_ahead(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    """In CUDA's global mode, torch.cuda.graph's default, which forbids other threads to ask how far
    a copy is, unless they say that they know what they do.
    """
    resident, streamed = twins(faults=SLOW_READS, **FROM_DISK)
    assert_equal(resident, streamed, ids, passes=1)
    other = sim_gpu.sim.create_stream()
    sim_gpu.sim.set_capturing(other, 2)
    threading.Event().wait(0.2)
    sim_gpu.sim.set_capturing(other, 0)
    assert_equal(resident, streamed, ids, passes=1)


@pytest.mark.needs_cuda
def test_something_else_may_really_be_captured_while_groups_are_read_ahead(
    twins: Maker, ids: torch.Tensor
) -> None:
    resident, streamed = twins(faults=SLOW_READS, **FROM_DISK)
    assert_equal(resident, streamed, ids, passes=1)
    x = torch.ones(8, device=twins.device.torch_device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
        threading.Event().wait(0.2)
    graph.replay()
    assert torch.equal(y, x + 1)
    assert_equal(resident, streamed, ids, passes=1)


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.needs_simcuda
@pytest.mark.usefixtures("nothing_is_left")
def test_two_models_on_a_lost_device_both_say_so(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    resident, first = twins()
    second = twins.streamed(resident, **FROM_DISK)
    assert_equal(resident, first, ids)
    assert_equal(resident, second, ids)
    sim_gpu.sim.fail("*", 0, ILLEGAL_ADDRESS, sticky=True)
    for model in (first, second, first):
        with pytest.raises(DeviceLost):
            model(ids)


@pytest.mark.needs_simcuda
@pytest.mark.usefixtures("nothing_is_left")
def test_without_a_driver_any_more_a_model_closes(
    sim_gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    """As at the end of a process."""
    resident, streamed = twins()
    assert_equal(resident, streamed, ids)
    sim_gpu.sim.deinitialise()
    nexus.close(streamed)
    gc.collect()
    sim_gpu.reset()


def test_after_close_everything_is_refused(twins: Maker, ids: torch.Tensor) -> None:
    _, streamed = twins(by_rows=["head", "table"])
    x = torch.zeros(1, WIDTH, device=twins.device.torch_device)
    with torch.inference_mode():
        streamed(ids)
    nexus.close(streamed)
    for run in (
        lambda: streamed(ids),
        lambda: streamed.layers[0](x),
        lambda: streamed.head(x),
        lambda: streamed.table(ids),
        lambda: nexus.stats(streamed),
    ):
        with pytest.raises(EngineClosed):
            run()
    assert nexus.plan_of(streamed).num_groups == NUM_BLOCKS
