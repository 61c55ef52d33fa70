"""Compiled models whose weights stream to a GPU, real or simulated; see test_compile.py for what a
graph must survive.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import nexus_ext as nexus
from tests.test_cuda_module import (
    NUM_BLOCKS,
    SLOT,
    SMALL,
    Maker,
    _poisoned_arenas,
    device,
    ids,
    twins,
)

pytestmark = [
    pytest.mark.takes_simcuda,
    # torch's own tools warn about each other.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]
__all__ = ["_poisoned_arenas", "device", "ids", "twins"]  # fixtures

TIERS = {"disk": {"ram_budget": 3 * SLOT, **SMALL}, "ram": {"ram_budget": "8MiB"}}


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def compile_blocks(model: Any, **how: Any) -> None:
    for layer in model.layers:
        layer.compile(fullgraph=True, **how)


@pytest.mark.parametrize("tier", TIERS)
def test_a_whole_model_is_one_graph(twins: Maker, ids: torch.Tensor, tier: str) -> None:
    resident, streamed = twins(**TIERS[tier])
    run = torch.compile(streamed, backend="eager", fullgraph=True)
    for _ in range(4):
        assert torch.equal(run(ids), resident(ids))
    assert nexus.stats(streamed).num_cloned == 0


def test_a_backend_that_clones_arenas_gets_copies(
    gpu: Any, twins: Maker, ids: torch.Tensor
) -> None:
    if gpu.sim is not None:
        gpu.sim.set_any_memory_is_device(True)  # the clones
    resident, streamed = twins(**TIERS["disk"])
    want = torch.compile(resident, backend="aot_eager")(ids)
    run = torch.compile(streamed, backend="aot_eager", fullgraph=True)
    for _ in range(4):
        assert torch.equal(run(ids), want)
    assert nexus.stats(streamed).num_cloned > 0


def test_blocks_that_are_alike_share_one_graph(twins: Maker, ids: torch.Tensor) -> None:
    resident, streamed = twins(**TIERS["disk"])
    compile_blocks(resident)
    want = resident(ids)
    before = counters["stats"]["unique_graphs"]
    compile_blocks(streamed)
    for _ in range(3):
        assert torch.equal(streamed(ids), want)
    assert counters["stats"]["unique_graphs"] == before + 1
    assert nexus.stats(streamed).num_cloned == 0


def test_a_graph_goes_on_over_another_ring(twins: Maker, ids: torch.Tensor) -> None:
    resident, streamed = twins(**TIERS["disk"])
    run = torch.compile(streamed, backend="eager", fullgraph=True)
    want = run(ids)
    assert torch.equal(want, resident(ids))
    before = counters["stats"]["unique_graphs"]
    for options in ({"budget": "260KiB"}, {"budget": "1GiB"}, {"lookahead": 2, **TIERS["ram"]}):
        nexus.close(streamed)
        chosen = {"budget": "300KiB", "io": "direct", "ram_budget": "8MiB", **options}
        nexus.stream(streamed, twins.folder, device=twins.device, **chosen)
        for _ in range(2):
            assert torch.equal(run(ids), want)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.needs_cuda
@pytest.mark.parametrize("whole", [True, False])
def test_cuda_graphs_leave_streaming_out(twins: Maker, ids: torch.Tensor, whole: bool) -> None:
    resident, streamed = twins(**TIERS["disk"])
    assert len(nexus.plan_of(streamed).streamed) == NUM_BLOCKS
    if whole:
        run = torch.compile(streamed, mode="reduce-overhead", fullgraph=True)
        want = torch.compile(resident, fullgraph=True)(ids).clone()
    else:
        compile_blocks(streamed, mode="reduce-overhead")
        compile_blocks(resident)
        run, want = streamed, resident(ids).clone()
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(run(ids), want)
