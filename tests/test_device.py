"""Which device is meant, how much room there is, and memory that begins where it was asked to.

What torch says of its GPUs is made up here, so that the answers are the same on every machine.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nexus_ext.device import Device
from nexus_ext.errors import ConfigError
from nexus_ext.memory import available_bytes

GIB = 1 << 30
PAGE = 4096
HUGE_PAGE = 2 << 20


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The second one is current."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return monkeypatch


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def never(*_: Any) -> int:
        raise AssertionError("torch has no GPU to be asked about")

    monkeypatch.setattr(torch.cuda, "device_count", never)
    monkeypatch.setattr(torch.cuda, "current_device", never)
    return monkeypatch


# -- which -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("meant", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_the_host_has_one_name(meant: Any) -> None:
    device = Device.of(meant)
    assert device == Device("cpu", torch.device("cpu"))
    assert device.is_host


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("meant", "index"),
    [
        ("cuda", 1),
        (torch.device("cuda"), 1),
        ("cuda:0", 0),
        ("cuda:1", 1),
        (torch.device("cuda", 0), 0),
    ],
)
def test_a_gpu_is_the_one_that_is_named_or_the_current_one(meant: Any, index: int) -> None:
    device = Device.of(meant)
    assert device == Device(f"cuda:{index}", torch.device("cuda", index))
    assert not device.is_host


def test_a_device_is_itself() -> None:
    device = Device("cuda:7", torch.device("cpu"))
    assert Device.of(device) is device


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("meant", ["cuda", "cuda:0", "cuda:99", torch.device("cuda")])
def test_without_a_gpu_the_message_says_what_to_do(meant: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        Device.of(meant)
    message = str(refused.value)
    assert message.startswith(f"device='{meant}' needs a GPU that torch can use")
    assert torch.__version__ in message
    assert "or use device='cpu'" in message


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("meant", ["cuda:2", "cuda:99"])
def test_a_gpu_that_is_not_there_is_refused(meant: str) -> None:
    with pytest.raises(ConfigError, match=f"got '{meant}', and torch sees 2"):
        Device.of(meant)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("meant", ["mps", "xpu:0", "meta", torch.device("meta")])
def test_other_devices_are_refused(meant: Any) -> None:
    with pytest.raises(ConfigError, match="weights can stream to: 'cpu' or 'cuda'; got"):
        Device.of(meant)


@pytest.mark.parametrize("meant", ["", "gpu", "cuda:x", "cuda:-2", None, 1.5, [], {"cuda": 0}])
def test_what_names_no_device_is_refused(meant: Any) -> None:
    with pytest.raises(ConfigError, match="device must name a device"):
        Device.of(meant)


# -- how much --------------------------------------------------------------------------------------


def test_room_on_the_host_is_free_memory() -> None:
    assert Device.of("cpu").available_bytes() == pytest.approx(available_bytes(), rel=0.5)


def test_what_torch_keeps_for_itself_counts_as_free(two_gpus: pytest.MonkeyPatch) -> None:
    asked = []

    def answers(nbytes: Any) -> Any:
        def answer(device: torch.device) -> Any:
            asked.append(device)
            return nbytes

        return answer

    two_gpus.setattr(torch.cuda, "mem_get_info", answers((10 * GIB, 80 * GIB)))
    two_gpus.setattr(torch.cuda, "memory_reserved", answers(5 * GIB))
    two_gpus.setattr(torch.cuda, "memory_allocated", answers(3 * GIB))
    assert Device.of("cuda:0").available_bytes() == 12 * GIB
    assert set(asked) == {torch.device("cuda:0")}


@pytest.mark.needs_cuda
def test_room_on_a_gpu_shrinks_by_what_is_allocated() -> None:
    device = Device.of("cuda")
    before = device.available_bytes()
    taken = device.allocate(GIB)
    assert before - device.available_bytes() == pytest.approx(GIB, rel=0.1)
    del taken
    assert device.available_bytes() == pytest.approx(before, rel=0.01)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "cuda:0"])
@pytest.mark.parametrize("phase", [0, 64, 4032])
@pytest.mark.parametrize("nbytes", [0, 1, PAGE, 100_000, HUGE_PAGE - 1, HUGE_PAGE, 5_000_001])
def test_memory_begins_in_its_phase(name: str, nbytes: int, phase: int) -> None:
    """Also on a device that has pages: direct reads land there."""
    memory = Device(name, torch.device("cpu")).allocate(nbytes, phase)
    assert (memory.dtype, memory.shape) == (torch.uint8, (nbytes,))
    assert memory.is_contiguous()
    if nbytes and (phase or name == "cpu"):
        assert memory.data_ptr() % PAGE == phase
    memory.fill_(7)


def test_big_memory_begins_at_a_huge_page() -> None:
    for nbytes, page in ((HUGE_PAGE, HUGE_PAGE), (HUGE_PAGE - 1, PAGE)):
        assert Device.of("cpu").allocate(nbytes).data_ptr() % page == 0
    assert Device.of("cpu").allocate(HUGE_PAGE, 64).data_ptr() % HUGE_PAGE == 64


def test_memory_on_a_gpu_takes_no_more_than_was_asked_for() -> None:
    """Budgets are exact there; in host memory what lies around is never touched."""
    memory = Device("cuda:0", torch.device("cpu")).allocate(100_000)
    assert memory.untyped_storage().nbytes() == 100_000


@pytest.mark.needs_cuda
@pytest.mark.parametrize("phase", [0, 512])
def test_memory_of_a_gpu_is_there(phase: int) -> None:
    memory = Device.of("cuda").allocate(100_000, phase)
    assert memory.is_cuda
    assert memory.data_ptr() % (PAGE if phase else 16) == phase % PAGE
    assert int(memory.fill_(3).sum()) == 300_000
