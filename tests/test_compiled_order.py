"""A compiler may run readers of a block after the next block was acquired: they must see its bytes.

Side outputs that nobody needs before the end (router logits, say) are such readers. With the plain
`acquire_` in compiled blocks, which frees the arena of the block before, inductor's code read the
poison here (seen on torch 2.13); `acquire_.held` and `release_` say what is true.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nexus_ext as nexus
from nexus_ext.module import plan_of

WIDTH = 128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(WIDTH, WIDTH)
        self.side = nn.Linear(WIDTH, 32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(self.main(x)) + x, self.side(x)


class WithSideOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(7))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sides = []
        for block in self.blocks:
            x, side = block(x)
            sides.append(side)
        late = torch.stack([torch.softmax(side, -1) for side in sides]).sum(0)
        return x, late, torch.cat([side * 2 for side in reversed(sides)])


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, nn.Module]:
    monkeypatch.setenv("NEXUS_POISON", "1")
    torch.manual_seed(0)
    torch._dynamo.reset()
    plain = WithSideOutputs().eval()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    group = 4 * (WIDTH * WIDTH + WIDTH + 32 * WIDTH + 32)
    streamed = nexus.stream(
        WithSideOutputs().eval(), tmp_path, budget=2 * group + 1024, io="direct"
    )
    assert len(plan_of(streamed).arena_bytes) == 2
    return plain, streamed


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_late_readers_of_a_block_see_its_bytes(
    models: tuple[nn.Module, nn.Module], backend: str
) -> None:
    plain, streamed = models
    x = torch.randn(4, WIDTH)
    compiled = torch.compile(streamed, fullgraph=True, backend=backend)
    reference = torch.compile(plain, fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(4):
            for ours, theirs in zip(compiled(x), reference(x), strict=True):
                assert torch.equal(ours, theirs)
        for ours, theirs in zip(streamed(x), plain(x), strict=True):
            assert torch.equal(ours, theirs)


def test_compiled_blocks_still_load_ahead(models: tuple[nn.Module, nn.Module]) -> None:
    _, streamed = models
    compiled = torch.compile(streamed, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.randn(4, WIDTH))
    stats = nexus.stats(streamed)
    assert stats.num_cloned == 0
    assert stats.num_mispredicted <= 1  # 7 groups over 2 arenas: where the pass wraps, at most
    assert stats.num_hits + stats.num_waits >= 3 * 7


def test_a_graph_that_clones_arenas_is_served_and_counted(
    models: tuple[nn.Module, nn.Module],
) -> None:
    plain, streamed = models
    compiled = torch.compile(streamed, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x)[0], plain(x)[0])
            # What the graph wrote back into the arenas is not taken for a group.
            assert torch.equal(streamed(x)[0], plain(x)[0])
    assert nexus.stats(streamed).num_cloned > 0


@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck_of_held_acquire_and_release(
    models: tuple[nn.Module, nn.Module], needs_grad: bool
) -> None:
    _, streamed = models
    slot = streamed.blocks[0]._nexus_group
    dep = torch.randn(2, WIDTH, requires_grad=needs_grad)
    ops = torch.ops.nexus
    torch.library.opcheck(ops.acquire_.held, (slot.arena, slot.turn, dep, slot.id))
    torch.library.opcheck(ops.release_.default, (slot.arena, slot.turn, [dep], slot.id))


class Gated(nn.Module):
    """A side output that a compiler would rather compute together with those of other blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Of the first block's input: nothing but the gate ties it to its place.
        return torch.relu(self.main(x)) + x, torch.sigmoid(self.gate)


class WithGates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gated() for _ in range(7))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gates = []
        for block in self.blocks:
            x, gate = block(x)
            gates.append(gate)
        return x, gates[0] + gates[1] + gates[2] + gates[3] + gates[4] + gates[5] + gates[6]


def test_a_turn_keeps_blocks_in_order_whose_arenas_share_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arenas look like different tensors: without `turn`, fused gates are computed after the last
    acquire, and those of refilled arenas are wrong.
    """
    monkeypatch.setenv("NEXUS_POISON", "1")
    torch.manual_seed(0)
    torch._dynamo.reset()
    plain = WithGates().eval().requires_grad_(False)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    group = 4 * (WIDTH * WIDTH + 2 * WIDTH)
    streamed = nexus.stream(
        WithGates().eval(), tmp_path, budget=2 * group + 1024, io="direct", lookahead=1
    )
    x = torch.randn(4, WIDTH)
    compiled = torch.compile(streamed, fullgraph=True)
    reference = torch.compile(plain, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            for ours, theirs in zip(compiled(x), reference(x), strict=True):
                assert torch.equal(ours, theirs)
