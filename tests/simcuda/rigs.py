"""Engines on a GPU, real or simulated, and what their kernels see.

A consumer acquires groups and enqueues a kernel that reads each; what the kernels saw is compared
when all is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nexus_ext.checkpoint import Group
from nexus_ext.engine import Engine, Faults, ReadMode

KIB = 1 << 10
CHUNK = 64 * KIB


@dataclass
class CudaRig:
    """An attached engine on a GPU, and what its kernels saw."""

    gpu: Any
    engine: Engine
    source: Any
    groups: Sequence[Group]
    arenas: Sequence[torch.Tensor]
    arena_of: Sequence[int]
    seen: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def use(self, group: int) -> None:
        """Acquire, and enqueue a kernel that reads."""
        arena = self.arenas[self.arena_of[group]]
        self.engine.acquire(group, arena)
        self.seen.append((group, self.gpu.read(arena[: self.groups[group].nbytes])))

    def sweep(self, passes: int = 1) -> None:
        for _ in range(passes):
            for group in range(len(self.groups)):
                self.use(group)
            self.engine.end_pass()

    def num_wrong(self) -> int:
        """Bytes that kernels saw and that are not the file's. Waits for them."""
        self.gpu.synchronize()
        wrong = 0
        for group, seen in self.seen:
            for extent in self.groups[group].extents:
                have = seen.numpy()[extent.group_offset : extent.group_offset + extent.nbytes]
                want = self.source.data[extent.offset : extent.offset + extent.nbytes]
                wrong += extent.nbytes - int(np.count_nonzero(have == want))
        self.seen.clear()
        return wrong

    @property
    def stats(self) -> dict[str, Any]:
        return self.engine.stats()


class Bench:
    """Makes rigs; closes them."""

    def __init__(self, gpu: Any, lab: Any) -> None:
        self.gpu = gpu
        self.lab = lab
        self.source = lab.source(2 << 20)
        self._rigs: list[CudaRig] = []

    def groups(self, count: int = 5, nbytes: int = 150 * KIB) -> list[Group]:
        """At odd offsets, each of two extents that lie apart in the file."""
        made = []
        for index in range(count):
            begin = index * (nbytes + 5000) + 13
            first = nbytes // 3
            places = ((0, begin, first), (0, begin + first + 700, nbytes - first))
            made.append(self.lab.group(*places))
        return made

    @staticmethod
    def mode(**given: Any) -> ReadMode:
        return ReadMode(**{"chunk_bytes": CHUNK, "depth": 4} | given)

    def rig(
        self,
        groups: Sequence[Group] | None = None,
        *,
        num_arenas: int = 3,
        num_resident: int = 0,
        in_ram: Sequence[int] = (),
        poison: bool = False,
        faults: Faults | None = None,
        verify: str = "off",
        **mode: Any,
    ) -> CudaRig:
        groups = self.groups() if groups is None else groups
        engine = self.lab.engine(
            [self.source],
            self.mode(**mode),
            device=self.gpu.device.name,
            poison=poison,
            faults=faults,
        )
        largest = max(group.nbytes for group in groups)
        arenas = [self.gpu.memory(group.nbytes) for group in groups[:num_resident]]
        arenas += [self.gpu.memory(largest) for _ in range(num_arenas)]
        arena_of = [
            index if index < num_resident else num_resident + (index - num_resident) % num_arenas
            for index in range(len(groups))
        ]
        order = range(num_resident, len(groups))
        engine.attach(arenas, groups, arena_of, order, num_arenas - 1, in_ram=in_ram)
        if verify != "off":
            engine.set_digests([engine.digest(index) for index in range(len(groups))], verify)
        rig = CudaRig(self.gpu, engine, self.source, groups, arenas, arena_of)
        self._rigs.append(rig)
        return rig

    def close(self) -> None:
        for rig in self._rigs:
            rig.engine.close()
        self._rigs.clear()
        self.lab.close()
        self.lab._engines.clear()
