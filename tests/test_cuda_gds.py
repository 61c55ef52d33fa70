"""io="gds" from the command to the arena: kvikio really reads into device memory, in whatever mode.

Without a GPU kvikio reads by itself, with the simulated driver under it, and must say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nexus_ext as nexus
from nexus_ext import gds
from nexus_ext.device import Device
from nexus_ext.errors import CheckpointChanged, ConfigError, MissingExtra

pytest.importorskip("kvikio", reason="kvikio is not installed: make setup installs it")
pytestmark = pytest.mark.takes_simcuda

WIDTH = 128


@pytest.fixture
def device(kept_gpu: Any) -> Device:
    return kept_gpu.device  # kvikio's streams outlive a test


@pytest.fixture
def resident(device: Device, tmp_path: Path) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6))).requires_grad_(False)
    save_file(
        {name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    return model.to(device.torch_device)


@pytest.fixture
def streamed(resident: nn.Module, device: Device, tmp_path: Path) -> Iterator[Any]:
    made: list[nn.Module] = []

    def stream(**options: Any) -> nn.Module:
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
        # Nothing stays in RAM.
        chosen: dict[str, Any] = {"budget": "200KiB", "io": "gds", "chunk_bytes": "64KiB"}
        chosen["ram_budget"] = 3 * (64 * 1024 + 8192)
        nexus.stream(model, tmp_path, device=device, **(chosen | options))
        made.append(model)
        return model

    yield stream
    for model in made:
        nexus.close(model)


@pytest.fixture
def x(device: Device) -> torch.Tensor:
    return torch.randn(3, WIDTH).to(device.torch_device)


@pytest.mark.parametrize("verify", ["off", "first", "always"])
def test_a_model_streams_past_host_memory(
    streamed: Any, resident: nn.Module, x: torch.Tensor, verify: str
) -> None:
    model = streamed(verify=verify)
    for _ in range(3):
        assert torch.equal(model(x), resident(x))
    stats = nexus.stats(model)
    # Most bytes landed where they belong; heads and tails of pages went through the ring.
    assert stats.bytes_direct > 4 * stats.bytes_staged > 0
    assert stats.reader.startswith("gds")
    assert stats.io_mode in ("gds", "compat")
    assert stats.io_mode == "gds" or stats.refusal


@pytest.mark.needs_simcuda
def test_without_a_gpu_kvikio_reads_by_itself_and_says_so(streamed: Any, x: torch.Tensor) -> None:
    model = streamed()
    model(x)
    stats = nexus.stats(model)
    assert (stats.io_mode_requested, stats.io_mode) == ("gds", "compat")
    assert stats.refusal == "no arena lies on a CUDA device"


@pytest.mark.needs_simcuda
def test_automatic_reading_says_why_it_is_not_direct_to_the_device(
    streamed: Any, x: torch.Tensor
) -> None:
    stats = nexus.stats(streamed(io="auto"))
    assert stats.io_mode in ("direct", "buffered", "mmap")
    assert "no GPUDirect Storage: there is no CUDA device" in stats.io_reason or (
        stats.io_mode == "mmap"
    )


def test_without_kvikio_an_explicit_wish_is_refused(
    streamed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Any:
        raise MissingExtra("kvikio is not there")

    monkeypatch.setattr(gds, "import_kvikio", missing)
    with pytest.raises(MissingExtra, match="kvikio is not there"):
        streamed()


def test_a_processor_has_no_gpu_direct_storage(tmp_path: Path, resident: nn.Module) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)))
    with pytest.raises(ConfigError, match="memory of a GPU"):
        nexus.stream(model, tmp_path, device="cpu", io="gds", budget="200KiB")


def test_a_file_that_changes_is_noticed(streamed: Any, x: torch.Tensor, tmp_path: Path) -> None:
    model = streamed()
    model(x)
    # In place: a file that is cut and written again is short for a moment, another error.
    with (tmp_path / "model.safetensors").open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(first)
    with pytest.raises(CheckpointChanged):
        model(x)


def test_closing_ends_the_threads_that_read(streamed: Any, x: torch.Tensor) -> None:
    import threading

    model = streamed()
    model(x)
    assert any(thread.name.startswith("nexus-gds") for thread in threading.enumerate())
    nexus.close(model)
    assert not any(thread.name.startswith("nexus-gds") for thread in threading.enumerate())
