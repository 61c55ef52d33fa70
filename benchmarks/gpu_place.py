"""Where the GPU benchmark measures: a GPU, or the simulated driver, which only shows that it runs.

Owns clocks and counters: seconds between events, bytes allocated, waits of the host. The simulated
driver of tests/simcuda moves weights with the real `device_cuda.cpp`, but over host memory, and the
processor computes: nothing that is measured there says anything about a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from nexus_ext.device import Device

Run = Callable[[], object]

_SIMCUDA = Path(__file__).parents[1] / "tests" / "simcuda" / "simcuda.py"
_PACKAGES = "nexus_ext torch triton transformers accelerate safetensors diffusers bitsandbytes"
# Late by so much at most, before each operation of a simulated stream.
_MAX_DELAY_US = 50


class Place(ABC):
    """A device, its memory, and how to measure on it."""

    is_simulated: bool
    device: Device

    @property
    def where(self) -> torch.device:
        """Where torch's tensors are."""
        return self.device.torch_device

    def memory(self, nbytes: int) -> torch.Tensor:
        """uint8 on the device, random."""
        return self.device.allocate(nbytes).random_()

    @abstractmethod
    def host_memory(self, nbytes: int) -> torch.Tensor:
        """uint8 on the host, random, page-locked where a GPU is."""

    @abstractmethod
    def steps(self, run: Run, count: int) -> list[float]:
        """Seconds of each of `count` runs back to back, on the device's clock."""

    @abstractmethod
    def captured(self, calls: Sequence[Run]) -> Run:
        """One after another, without the host's part: a CUDA graph."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything."""

    @abstractmethod
    def allocated(self) -> int | None:
        """Bytes of device memory in use; None where nobody counts."""

    @abstractmethod
    def peak_of(self, run: Run) -> int | None:
        """Bytes that a run allocates at most, beyond what was there before."""

    @abstractmethod
    def num_syncs_of(self, run: Run) -> int:
        """How often a run waits for the device where it should only enqueue."""

    @abstractmethod
    def gpu(self) -> dict[str, Any]:
        """Name and driver."""

    def steady(self, run: Run, count: int) -> list[float]:
        """The same behind a run that is not counted, and that leaves what the next one finds."""
        run()
        return self.steps(run, count)

    def machine(self) -> dict[str, Any]:
        """What the figures belong to."""
        return {
            "gpu": self.gpu(),
            "cpu": _cpu(),
            "num_cpus": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "versions": {name: _version(name) for name in _PACKAGES.split()},
        }


class RealPlace(Place):
    is_simulated = False

    def __init__(self) -> None:
        self.device = Device.of("cuda")

    def host_memory(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).random_()

    def steps(self, run: Run, count: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            run()
            mark.record()
        marks[-1].synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks)]

    def captured(self, calls: Sequence[Run]) -> Run:
        for call in calls:  # what is compiled or allocated at first cannot be captured
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def allocated(self) -> int:
        return int(torch.cuda.memory_allocated())

    def peak_of(self, run: Run) -> int:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = self.allocated()
        run()
        self.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before

    def num_syncs_of(self, run: Run) -> int:
        run()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(one.message) for one in seen)

    def gpu(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.where)
        driver = Path("/proc/driver/nvidia/version")
        return {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "num_multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": driver.read_text().splitlines()[0] if driver.exists() else "unknown",
        }


class SimulatedPlace(Place):
    is_simulated = True

    def __init__(self, driver: Path) -> None:
        """Loads the driver; before anything looks for the real one."""
        self.device = Device("cuda:0", torch.device("cpu"))
        self._sim = _simcuda().load(driver)
        self._sim.reset(seed=0, max_delay_us=_MAX_DELAY_US)
        self._sim.library.cuInit(0)
        self._sim.set_default_stream(self._sim.create_stream())
        self._sim.set_any_memory_is_device(True)
        # The thread that computes the model is the caller's stream.
        self._sim.set_inline_current(True)
        self._sim.mark_caller_thread()
        # What is computed is tiny: more threads would only wait for each other.
        torch.set_num_threads(1)

    def host_memory(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8).random_()

    def steps(self, run: Run, count: int) -> list[float]:
        marks = [time.perf_counter()]
        for _ in range(count):
            run()
            marks.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(marks)]

    def captured(self, calls: Sequence[Run]) -> Run:
        def run() -> None:
            for call in calls:
                call()

        run()
        return run

    def synchronize(self) -> None:
        self._sim.drain()

    def allocated(self) -> None:
        return None

    def peak_of(self, run: Run) -> None:
        run()

    def num_syncs_of(self, run: Run) -> int:
        run()
        before = self._sim.counts()["num_synchronize_caller"]
        run()
        return int(self._sim.counts()["num_synchronize_caller"]) - before

    def gpu(self) -> dict[str, Any]:
        return {"name": "simulated", "driver": "tests/simcuda"}


def build_simulator(folder: Path) -> Path:
    """Compile the simulated driver into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(_simcuda().build(folder))


def _simcuda() -> Any:
    spec = importlib.util.spec_from_file_location("simcuda", _SIMCUDA)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
