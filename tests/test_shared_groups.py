"""Groups in memory that processes share: the same bits, read from disk once for all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nexus_ext as nexus
from nexus_ext.cache.ram import RamTier
from nexus_ext.cache.shared_folder import default_folder
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.errors import CorruptCheckpoint
from nexus_ext.plan import choose_shared, make_plan

NUM_BLOCKS = 8
WIDTH = 64
BLOCK_BYTES = 2 * WIDTH * WIDTH * 4 + 2 * WIDTH * 4
CHUNK_BYTES = 64 << 10
# What two reads in flight stage through.
RING_BYTES = 3 * (CHUNK_BYTES + 2 * 4096)
# Two arenas, what is outside, and a resident.
BUDGET = 3 * BLOCK_BYTES + (WIDTH + 1) * WIDTH * 4 + 4096


class Net(nn.Module):
    """Blocks one behind the other, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(NUM_BLOCKS)
        )
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    torch.manual_seed(5)
    save_file(Net().state_dict(), tmp_path / "net.safetensors")
    yield tmp_path / "net.safetensors"
    assert not _folder(tmp_path / "net.safetensors").exists(), "who comes last takes it along"


def _folder(path: Path) -> Path:
    checkpoint = Checkpoint.open(path)
    return default_folder(f"groups of {checkpoint.path}: {checkpoint.fingerprint}")


def streamed(path: Path, num_shared: int, **options: object) -> nn.Module:
    with torch.device("meta"):
        net = Net()
    room = RING_BYTES + num_shared * BLOCK_BYTES + 100
    asked = {"io": "direct", "budget": BUDGET, "ram_budget": room, "depth": 2} | options
    return nexus.stream(net, path, groups="blocks", chunk_bytes=CHUNK_BYTES, **asked)


def resident(path: Path) -> nn.Module:
    from safetensors.torch import load_file

    net = Net()
    net.load_state_dict(load_file(path))
    return net


def same(model: nn.Module, other: nn.Module, passes: int = 3) -> bool:
    with torch.no_grad():
        inputs = [torch.randn(4, WIDTH) for _ in range(passes)]
        return all(torch.equal(model(x), other(x)) for x in inputs)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")


@pytest.mark.parametrize("verify", ["off", "first", "always"])
@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("num_shared", [0, 1, 3, 5, NUM_BLOCKS])
def test_what_is_shared_computes_the_same_bits(
    path: Path, num_shared: int, io: str, verify: str
) -> None:
    model = streamed(path, num_shared, io=io, verify=verify)
    assert same(model, resident(path))
    stats = nexus.stats(model)
    assert stats.ram_groups == num_shared
    assert stats.ram_bytes == num_shared * BLOCK_BYTES
    assert stats.ram_bytes_read == num_shared * BLOCK_BYTES
    assert stats.ram_mode == ("shared" if num_shared else "off")
    assert stats.device_bytes <= BUDGET
    nexus.close(model)


def test_what_is_shared_is_not_read_in_any_pass(path: Path) -> None:
    model = streamed(path, 3)
    before = nexus.stats(model)
    streams = before.streamed_groups
    assert streams == NUM_BLOCKS - 3 - before.resident_groups
    assert same(model, resident(path), passes=10)
    after = nexus.stats(model)
    # The last pass has asked for the next one's first groups: every arena may be on its way.
    most = (10 * streams + after.lookahead + 1) * BLOCK_BYTES + (WIDTH + 1) * WIDTH * 4
    assert 9 * streams * BLOCK_BYTES < after.bytes_read <= most + before.bytes_read
    nexus.close(model)


CHILD = """
import json, sys, torch, nexus_ext as nexus
sys.path.insert(0, {tests!r})
from test_shared_groups import *
path = Path({path!r})
model = streamed(path, 5)
print(json.dumps({{"same": same(model, resident(path)), "read": nexus.stats(model).ram_bytes_read,
                  "shared": nexus.stats(model).ram_groups, "mode": nexus.stats(model).ram_mode}}))
nexus.close(model)
"""


def test_a_second_process_reads_nothing_of_what_is_shared(path: Path) -> None:
    model = streamed(path, 5)
    code = CHILD.format(tests=str(Path(__file__).parent), path=str(path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer == {"same": True, "read": 0, "shared": 5, "mode": "shared"}
    assert same(model, resident(path)), "who leaves takes nothing away from the others"
    nexus.close(model)


def test_processes_that_begin_together_read_it_once(path: Path) -> None:
    code = CHILD.format(tests=str(Path(__file__).parent), path=str(path))
    model = streamed(path, 1)  # keeps the folder while they come and go
    start = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        for _ in range(3)
    ]
    answers = [json.loads(child.communicate(timeout=300)[0].splitlines()[-1]) for child in start]
    nexus.close(model)
    assert all(answer["same"] for answer in answers)
    # One of five may be the one that was there.
    assert sum(answer["read"] for answer in answers) in (4 * BLOCK_BYTES, 5 * BLOCK_BYTES)


def test_two_models_of_one_process_share_too(path: Path) -> None:
    first, second = streamed(path, NUM_BLOCKS), streamed(path, NUM_BLOCKS)
    assert nexus.stats(second).ram_bytes_read == 0

    def spoil(module: nn.Linear, *_: object) -> None:
        module.weight.fill_(float("nan"))  # what is written stays with who writes

    for block in first.blocks:  # type: ignore[union-attr]
        block[0].register_forward_pre_hook(spoil)
    with torch.no_grad():
        assert first(torch.randn(4, WIDTH)).isnan().all()
    assert same(second, resident(path))
    nexus.close(first)
    assert same(second, resident(path))
    nexus.close(second)


def test_what_finds_no_room_streams(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill, calls = RamTier.fill, []

    def refuse_some(tier: RamTier, *args: object, **options: object) -> torch.Tensor | None:
        calls.append(args)
        return None if len(calls) % 2 else fill(tier, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(RamTier, "fill", refuse_some)
    model = streamed(path, 4)
    assert nexus.stats(model).ram_groups == 2
    assert same(model, resident(path))
    nexus.close(model)


def test_without_shared_memory_it_is_private_and_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere" / "folder"
    monkeypatch.setattr("nexus_ext.shared_groups.default_folder", lambda name: nowhere)
    model = streamed(path, 3)
    assert nexus.stats(model).ram_mode.startswith("private: ")
    assert nexus.stats(model).ram_groups == 3
    assert same(model, resident(path))
    nexus.close(model)


def test_a_file_that_changed_gets_segments_of_its_own(path: Path) -> None:
    first = streamed(path, 4)
    torch.manual_seed(6)
    other = Net().state_dict()
    nexus.close(first)
    save_file(other, path)
    second = streamed(path, 4)
    assert nexus.stats(second).ram_bytes_read == 4 * BLOCK_BYTES
    assert same(second, resident(path))
    nexus.close(second)


def test_a_byte_flipped_on_disk_is_found_before_it_is_shared(path: Path) -> None:
    nexus.close(streamed(path, NUM_BLOCKS, verify="first"))  # digests are recorded
    entry, status = Checkpoint.open(path).entries["blocks.3.0.weight"], path.stat()
    with path.open("r+b") as file:
        file.seek(entry.offset + 100)
        byte = file.read(1)[0]
        file.seek(entry.offset + 100)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CorruptCheckpoint):
        streamed(path, NUM_BLOCKS, verify="first")


def test_mapped_files_are_shared_as_they_are(path: Path) -> None:
    model = streamed(path, 3, io="mmap")
    assert nexus.stats(model).ram_mode == "off"
    assert same(model, resident(path))
    nexus.close(model)


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_groups", [1, 2, 7, 16])
def test_as_many_are_shared_as_fit(num_groups: int) -> None:
    sizes = [10 + index % 3 for index in range(num_groups)]
    for room in range(sum(sizes) + 1):
        shared = choose_shared(sizes, room)
        assert sum(sizes[group] for group in shared) <= room
        assert len(shared) == len(set(shared))
    assert choose_shared(sizes, sum(sizes)) == tuple(range(num_groups))


def test_who_shares_twice_as_many_has_those_of_the_others() -> None:
    sizes = [10] * 24
    for count in (1, 2, 3, 5, 12):
        assert set(choose_shared(sizes, 10 * count)) <= set(choose_shared(sizes, 20 * count))


def test_what_is_shared_takes_no_budget_and_no_part_in_the_ring() -> None:
    sizes = [10] * 12
    plan = make_plan(sizes, 5, 5 + 20 + 20, 1, shared=(0, 3, 6, 9))
    assert plan.shared == (0, 3, 6, 9)
    assert plan.device_bytes <= 45
    assert {*plan.resident, *plan.streamed, *plan.shared} == set(range(12))
    assert len(plan.resident) + len(plan.streamed) + len(plan.shared) == 12
    assert len(plan.resident) == 2
    # Neighbours in the ring's order have different arenas.
    ring = plan.arena_of
    assert all(ring[i] != ring[(i + 1) % len(ring)] for i in range(len(ring)))
    assert plan.ram_bytes == 40
    assert plan.disk_bytes == plan.streamed_bytes == 60


def test_all_that_is_left_may_fit() -> None:
    plan = make_plan([10] * 6, 0, 30, shared=(0, 2, 4))
    assert plan.streamed == ()
    assert plan.resident == (1, 3, 5)
    assert "in RAM    groups: 3, 30" in plan.describe()
