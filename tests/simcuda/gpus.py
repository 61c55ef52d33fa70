"""A GPU for tests: the real one through torch, or the simulated one through its controls.

Tests are written once. What a kernel does to an arena, `read` does: it reads when its turn on the
current stream comes, and not when it is called.
"""

from __future__ import annotations

import contextlib
import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from nexus_ext.device import Device

PAGE = 4096


class Gpu(ABC):
    """What a test needs of a GPU."""

    device: Device
    sim: Any = None  # the simulator's controls, where there is one

    @abstractmethod
    def memory(self, nbytes: int, phase: int = 0) -> torch.Tensor:
        """uint8 on the device, `phase` bytes behind a page boundary, full of garbage."""

    @abstractmethod
    def read(self, source: torch.Tensor) -> torch.Tensor:
        """Enqueue a kernel that reads device memory; the result is there after `synchronize`."""

    @abstractmethod
    def delay(self, us: int) -> None:
        """Enqueue a kernel that takes time."""

    @abstractmethod
    def stream(self) -> contextlib.AbstractContextManager[None]:
        """A new current stream, that begins when the one before has come this far."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything."""


class RealGpu(Gpu):
    def __init__(self) -> None:
        self.device = Device.of("cuda")

    def memory(self, nbytes: int, phase: int = 0) -> torch.Tensor:
        return self.device.allocate(nbytes, phase).fill_(0xDB)

    def read(self, source: torch.Tensor) -> torch.Tensor:
        out = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        return out.copy_(source, non_blocking=True)

    def delay(self, us: int) -> None:
        torch.cuda._sleep(us * 1500)

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        before, inner = torch.cuda.current_stream(), torch.cuda.Stream()
        inner.wait_stream(before)
        with torch.cuda.stream(inner):
            yield
        before.wait_stream(inner)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class SimDevice(Device):
    """What it allocates is declared to the simulator, and kept until the next reset."""

    def __init__(self, sim: Any, declared: list[torch.Tensor], index: int = 0) -> None:
        super().__init__(f"cuda:{index}", torch.device("cpu"))
        object.__setattr__(self, "_sim", sim)
        object.__setattr__(self, "_declared", declared)
        object.__setattr__(self, "_index", index)

    def allocate(self, nbytes: int, phase: int = 0) -> torch.Tensor:
        memory = torch.empty(nbytes + 2 * PAGE, dtype=torch.uint8)
        start = -memory.data_ptr() % PAGE + phase
        made = memory[start : start + nbytes]
        self._declared.append(made)  # type: ignore[attr-defined]
        if nbytes:
            self._sim.declare_device(made.data_ptr(), nbytes, self._index)  # type: ignore[attr-defined]
        return made


class SimGpu(Gpu):
    """The simulated one. Its device memory is host memory that was declared."""

    def __init__(self, sim: Any) -> None:
        self.sim = sim
        self._declared: list[torch.Tensor] = []
        self.device = SimDevice(sim, self._declared)
        self._current: int | None = None

    def second(self) -> Device:
        """Another GPU."""
        return SimDevice(self.sim, self._declared, index=1)

    def reset(self, seed: int = 0, max_delay_us: int = 0) -> None:
        """A new world. No engine may be open."""
        self.sim.reset(seed, max_delay_us)
        self._declared.clear()
        self._check("cuInit", 0)
        self._current = self.sim.create_stream()
        self.sim.set_default_stream(self._current)

    def retain(self) -> None:
        """Hold the primary context, as torch does; others look for one that is held."""
        context = ctypes.c_void_p()
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)

    def memory(self, nbytes: int, phase: int = 0) -> torch.Tensor:
        return self.device.allocate(nbytes, phase)

    def read(self, source: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(source.shape, dtype=source.dtype)
        nbytes = source.numel() * source.element_size()
        self.sim.enqueue_copy(self._current, out.data_ptr(), source.data_ptr(), nbytes)
        return out

    def delay(self, us: int) -> None:
        self.sim.enqueue_delay(self._current, us)

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        before, inner = self._current, self.sim.create_stream()
        self._order(before, inner)
        self._current = inner
        self.sim.set_default_stream(inner)
        yield
        self._order(inner, before)
        self._current = before
        self.sim.set_default_stream(before)

    def _order(self, first: int | None, second: int | None) -> None:
        """`second` waits for `first`, as torch's wait_stream does."""
        self.synchronize()

    def synchronize(self) -> None:
        self.sim.drain()

    def _check(self, name: str, *arguments: Any) -> None:
        code = getattr(self.sim.library, name)(*arguments)
        assert code == 0, f"{name} returned {code}"
