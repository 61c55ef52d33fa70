"""Ways to run the one model: resident, streamed from RAM, disk or by GDS, and the peers' ways.

An arm is made here and measured in gpu_stream.py. Every arm gives the resident one's numbers.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_llama import BLOCKS, empty_llama, fill, forward, resident_llama, weights_of
from gpu_place import Place
from torch import nn

import nexus_ext as nexus
from nexus_ext.bench import drop_page_cache
from nexus_ext.errors import MissingExtra
from nexus_ext.gds import import_kvikio
from nexus_ext.plan import Plan
from nexus_ext.pretrained import plan_pretrained

MIB = 1 << 20
# Groups that a disk reads in about this time stream; a step need not take seconds.
_DISK_SECONDS = 0.4
_FEWEST_STREAMED = 3  # two arenas, and one group that waits for its turn
# Whole passes from a slower disk would take all the time there is.
_LONGEST_SECONDS = 6
# Nothing came back for so long: what was prefetched is there.
_QUIET_SECONDS = 0.03


class Arm:
    """A model and how its steps are taken.

    Attributes:
        name: As it is printed.
        source: Where weights come from: "" (nowhere), "ram" or "disk".
        is_rare: Takes long, and is seen in few rounds and with few batches.
        is_primed: Whether a step leaves something for the next one, and so one goes before.
        rival: Of a peer: the name of our arm that moves the same bytes.
        held_bytes: Of device memory between steps; None where nobody counts.
    """

    def __init__(self, name: str, place: Place, model: nn.Module, source: str = "") -> None:
        self.name = name
        self.source = source
        self.place = place
        self.model = model
        self.is_rare = False
        self.is_primed = True
        self.rival = ""
        self.held_bytes: int | None = None

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        return forward(self.model, ids)

    def settle(self) -> None:
        """Until nothing moves any more."""
        self.place.synchronize()

    def counters(self) -> dict[str, Any]:
        """What was counted since the beginning; nothing but ours counts."""
        return {}

    def close(self) -> None:
        """Nothing is read afterwards."""


class Streamed(Arm):
    """Ours. Attribute `plan`: what is resident and what streams."""

    def __init__(
        self,
        name: str,
        place: Place,
        folder: Path,
        source: str,
        *,
        is_rare: bool = False,
        **options: Any,
    ) -> None:
        model = empty_llama(folder)
        nexus.stream(model, folder, device=place.device, groups=BLOCKS, lookahead=1, **options)
        super().__init__(name, place, model, source)
        self.is_rare = is_rare
        self.plan: Plan = nexus.plan_of(model)
        self._streamer: Any = model._nexus.streamer  # type: ignore[union-attr]

    def sweep(self) -> None:
        """All groups, and nothing computed."""
        self._streamer.sweep()

    def counters(self) -> dict[str, Any]:
        return dict(self._streamer.engine.stats())

    def settle(self) -> None:
        before: list[int] = []
        moving = ("bytes_read", "bytes_copied", "num_landed")
        while (now := [self.counters()[key] for key in moving]) != before:
            before = now
            time.sleep(_QUIET_SECONDS)
        self.place.synchronize()

    def close(self) -> None:
        nexus.close(self.model)


@dataclass(frozen=True)
class Budget:
    """Sizes of a model, and what budgets follow."""

    plan: Plan

    @classmethod
    def of(cls, folder: Path, place: Place) -> Budget:
        return cls(plan_pretrained(folder, groups=BLOCKS, device=place.device, budget="1000GiB"))

    @property
    def num_groups(self) -> int:
        return self.plan.num_groups

    def streaming(self, num_streamed: int) -> int:
        """The budget of which so many groups stream, through two arenas."""
        largest = max(self.plan.group_bytes)
        return self.plan.outside_bytes + (self.num_groups - num_streamed + 2) * largest

    def within(self, bytes_per_second: float) -> int:
        """As many groups as a disk reads in a moment."""
        affordable = int(bytes_per_second * _DISK_SECONDS / max(self.plan.group_bytes))
        return min(self.num_groups, max(_FEWEST_STREAMED + 1, affordable))

    def why_not_all(self, bytes_per_second: float) -> str:
        seconds = sum(self.plan.group_bytes) / bytes_per_second
        return f"a pass from this disk takes {seconds:.0f} s" if seconds > _LONGEST_SECONDS else ""


def _staging(place: Place) -> dict[str, Any]:
    """So little RAM that no group stays there."""
    if not place.is_simulated:
        return {"ram_budget": 256 * MIB}
    return {"chunk_bytes": 64 << 10, "ram_budget": 10 * ((64 << 10) + 8192)}


def arms_of(
    place: Place, folder: Path, disk_gbps: float
) -> dict[str, tuple[str, Callable[[], Arm]]]:
    """By name: why an arm cannot be made here (empty if it can), and how it is made."""
    budget = Budget.of(folder, place)
    everything = budget.streaming(budget.num_groups)
    some = budget.streaming(budget.within(disk_gbps * 1e9))
    few = budget.streaming(_FEWEST_STREAMED)
    ram = 2 * sum(budget.plan.group_bytes) + 1024 * MIB
    little = _staging(place)

    def streamed(name: str, source: str, **options: Any) -> Callable[[], Arm]:
        return lambda: Streamed(name, place, folder, source, **options)

    direct = {"io": "direct"} | little
    slow = budget.why_not_all(disk_gbps * 1e9)
    return {
        "ram": ("", streamed("ram", "ram", budget=everything, ram_budget=ram, io="direct")),
        "disk": ("", streamed("disk", "disk", budget=some, **direct)),
        "disk_few": ("", streamed("disk_few", "disk", budget=few, **direct)),
        "gds": (
            _why_no_gds(place),
            streamed("gds", "disk", budget=some, **little | {"io": "gds"}),
        ),
        "disk_all": (
            slow,
            streamed("disk_all", "disk", is_rare=True, budget=everything, **direct),
        ),
        "accelerate_cpu": (_why_no("accelerate"), lambda: _accelerate_cpu(place, folder)),
        "accelerate_disk": (
            slow or _why_no("accelerate"),
            lambda: _accelerate_disk(place, folder),
        ),
        "diffusers_group": (_why_no("diffusers"), lambda: _diffusers(place, folder)),
    }


def _why_no_gds(place: Place) -> str:
    if place.is_simulated:
        return "simulated: tests/test_gds.py has kvikio read there"
    try:
        import_kvikio()
    except MissingExtra as error:
        return str(error)
    return ""


# -- peers -----------------------------------------------------------------------------------------


class Peer(Arm):
    """A model that another library streams. The page cache of `files` is dropped before steps."""

    def __init__(
        self, name: str, place: Place, model: nn.Module, rival: str, files: Sequence[Path] = ()
    ) -> None:
        super().__init__(name, place, model, source="disk" if files else "ram")
        self.rival = rival
        self.is_rare = True
        self.is_primed = False
        self._files = files

    def settle(self) -> None:
        super().settle()
        drop_page_cache(self._files)


def _why_no(package: str) -> str:
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def _accelerate_cpu(place: Place, folder: Path) -> Arm:
    """Blocks in RAM; all else on the device, as with ours."""
    model = resident_llama(folder, torch.device("cpu"))
    return Peer("accelerate_cpu", place, _dispatched(place, model, "cpu"), "ram")


def _accelerate_disk(place: Place, folder: Path) -> Arm:
    """Blocks in the safetensors file; all else on the device, as with ours."""
    file = weights_of(folder)
    model = empty_llama(folder)
    outside = [name for name, _ in model.named_parameters() if not name.startswith(BLOCKS)]
    fill(model, folder, place.where, outside)
    index = {
        name: {"safetensors_file": str(file), "weight_name": name, "dtype": "bfloat16"}
        for name, _ in model.named_parameters()
    }
    model = _dispatched(place, model, "disk", offload_index=index)
    return Peer("accelerate_disk", place, model, "disk_all", [file])


def _dispatched(place: Place, model: nn.Module, where: str, **options: Any) -> nn.Module:
    import accelerate

    main: Any = place.where.index if place.where.type == "cuda" else "cpu"
    outside = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    dispatched: nn.Module = accelerate.dispatch_model(
        model,
        dict.fromkeys(outside, main) | {BLOCKS: where},
        main_device=main,
        force_hooks=True,
        **options,
    )
    return dispatched


def _diffusers(place: Place, folder: Path) -> Arm:
    """One block at a time from RAM, on a GPU pinned and on a stream of its own."""
    from diffusers.hooks import apply_group_offloading

    model: Any = resident_llama(folder, torch.device("cpu"))
    # A head that is the embedding would move with it.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(place.where, copy=True), False)
    apply_group_offloading(
        model.model,
        onload_device=place.where,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=place.where.type == "cuda",
    )
    return Peer("diffusers_group", place, model, "ram")
