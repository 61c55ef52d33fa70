"""Owns the plan: what stays resident, what streams, in which order, how long a step will take.

Numbers in, a frozen `Plan` out; no torch, no models, no files. Bytes and seconds throughout.

Note [A fixed resident set]: a dense forward visits the groups in a circle, and least-recently-
used over a circle that does not fit never hits. Keeping any k of N groups saves k/N of the reads;
spreading the k evenly hides each read behind the compute of the residents around it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

from nexus_ext.errors import BudgetError, ConfigError
from nexus_ext.memory import format_bytes

__all__ = ["Plan", "Rates", "choose_shared", "divide_budget", "make_plan", "predict_step"]

# Deeper than this only costs: the link is full, and every arena takes the place of a resident.
_DEEPEST_AUTO = 4


@dataclass(frozen=True)
class Rates:
    """Measured speeds, None where unknown; compute is the mean over the groups. The link is what
    leads from host memory to the device; there is none where weights stream to host memory.
    """

    disk_bytes_per_second: float | None = None
    compute_seconds_per_group: float | None = None
    link_bytes_per_second: float | None = None


class ExpertSlots(Protocol):
    """What the experts of a model get; see `nexus_ext.experts.slots.SlotPlan`."""

    @property
    def nbytes(self) -> int: ...
    def describe(self) -> str: ...


@dataclass(frozen=True)
class Plan:
    """What goes where. Groups are indices in forward order; every figure is bytes or seconds.

    `streamed[i]` always lives in the shared arena `arena_of[i]`, `arena_bytes[arena_of[i]]` big.
    There are `lookahead` + 1 of these; none, and lookahead 0, when everything is resident.
    `in_ram` are the streamed groups that stay in page-locked host memory: they take the link alone,
    all others the disk too. `shared` are used where they lie, in memory of all processes: they
    neither move nor count as device memory.
    `tiled_bytes` of projections are read by rows in every pass, through `tile_arena_bytes`.
    `minimum_bytes` is the smallest budget `make_plan` accepts, as a rule that of lookahead 1. A
    prediction is None while its rates are unknown; with unknown compute the step is the I/O bound.
    `experts` are slots for single experts, beside everything else and in the same budget.
    """

    budget_bytes: int
    outside_bytes: int
    group_bytes: tuple[int, ...]
    resident: tuple[int, ...]
    streamed: tuple[int, ...] = ()
    arena_of: tuple[int, ...] = ()
    arena_bytes: tuple[int, ...] = ()
    lookahead: int = 0
    in_ram: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    minimum_bytes: int = 0
    tiled_bytes: int = 0
    tile_arena_bytes: int = 0
    predicted_io_seconds: float | None = None
    predicted_compute_seconds: float | None = None
    predicted_step_seconds: float | None = None
    experts: ExpertSlots | None = None

    @property
    def num_groups(self) -> int:
        return len(self.group_bytes)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the resident groups, without the weights outside the groups."""
        return sum(self.group_bytes[group] for group in self.resident)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that move in every pass."""
        return sum(self.group_bytes[group] for group in self.streamed) + self.tiled_bytes

    @property
    def ram_bytes(self) -> int:
        """Bytes of the groups that stay in host memory, page-locked or shared."""
        return self.locked_bytes + sum(self.group_bytes[group] for group in self.shared)

    @property
    def locked_bytes(self) -> int:
        """Bytes of the groups that stay in page-locked memory."""
        return sum(self.group_bytes[group] for group in self.in_ram)

    @property
    def disk_bytes(self) -> int:
        """Bytes read from disk in every pass but the first."""
        return self.streamed_bytes - self.locked_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory in use; never more than the budget."""
        arenas = sum(self.arena_bytes) + self.tile_arena_bytes
        experts = 0 if self.experts is None else self.experts.nbytes
        return self.outside_bytes + self.resident_bytes + arenas + experts

    def describe(self) -> str:
        """The plan as a table for people, one fact a line."""
        size, step = format_bytes, self.predicted_step_seconds
        tiles = (
            f"by rows   {size(self.tiled_bytes)} a pass through {size(self.tile_arena_bytes)}\n"
            if self.tiled_bytes
            else ""
        )
        num_in_ram = len(self.in_ram) + len(self.shared)
        ram = f"in RAM    groups: {num_in_ram}, {size(self.ram_bytes)}\n" * bool(num_in_ram)
        experts = "" if self.experts is None else f"{self.experts.describe()}\n"
        compute = self.predicted_compute_seconds
        bound = "at least " if compute is None and step is not None else ""
        return (
            f"outside   {size(self.outside_bytes)}, always on the device\n"
            f"resident  groups: {len(self.resident)}, {size(self.resident_bytes)}\n"
            f"streamed  groups: {len(self.streamed)}, {size(self.streamed_bytes)} a pass\n"
            f"arenas    {len(self.arena_bytes)}, {size(sum(self.arena_bytes))}, "
            f"lookahead {self.lookahead}\n"
            f"{ram}{tiles}{experts}"
            f"device    {size(self.device_bytes)} of a budget of {size(self.budget_bytes)}; "
            f"the smallest that works is {size(self.minimum_bytes)}\n"
            f"step      {bound}{_seconds(step)}: I/O {_seconds(self.predicted_io_seconds)}, "
            f"compute {_seconds(compute)}"
        )


def make_plan(
    group_bytes: Sequence[int],
    outside_bytes: int,
    budget_bytes: int,
    lookahead: int | Literal["auto"] = "auto",
    rates: Rates = Rates(),
    in_flight_bytes: int = 16 << 20,
    tiled_bytes: int = 0,
    tile_arena_bytes: int = 0,
    ram_bytes: int = 0,
    shared: Collection[int] = (),
) -> Plan:
    """Split the groups into resident and streamed ones so that the budget holds.

    Args:
        group_bytes: Bytes of each group, in forward order.
        outside_bytes: Bytes of the weights outside the groups, always on the device.
        budget_bytes: Bytes of device memory for weights.
        lookahead: Groups fetched ahead. "auto" is 1, and up to 4 when `in_flight_bytes` is more
            than a mean group, as far as the budget reaches.
        rates: Measured speeds for the prediction.
        in_flight_bytes: Bytes the disk wants requested at any time to run at full speed.
        tiled_bytes: Bytes of projections that are read by rows in every pass.
        tile_arena_bytes: Bytes of the arenas they are read through.
        ram_bytes: Bytes of host memory for streamed groups that stay there.
        shared: Groups that lie in memory of all processes; see `choose_shared`.

    Raises:
        BudgetError: The budget is too small, altogether or for the lookahead asked for.
        ConfigError: A negative size, an impossible rate, or a lookahead below 1.
    """
    _check(
        lookahead, rates, (*group_bytes, outside_bytes, budget_bytes, in_flight_bytes, ram_bytes)
    )
    sizes = tuple(group_bytes)
    everything = Plan(
        budget_bytes,
        outside_bytes,
        sizes,
        tuple(group for group in range(len(sizes)) if group not in shared),
        tiled_bytes=tiled_bytes,
        tile_arena_bytes=tile_arena_bytes,
        shared=tuple(sorted(shared)),
    )
    depths = _depths(sizes, lookahead, in_flight_bytes)
    smallest = {depth: _smallest(everything, depth) for depth in (1, *depths)}
    minimum = min(plan.device_bytes for plan in smallest.values())
    fitting = [plan for depth in depths if (plan := _fit(everything, depth)) is not None]
    if not fitting:
        raise _too_small(smallest[depths[0]], minimum)
    # Arenas that no two groups share would be better spent on residents: then go less deep.
    frugal = [plan for plan in fitting if len(plan.streamed) >= 2 * len(plan.arena_bytes)]
    plan = _with_ram((frugal or fitting[:1])[-1], ram_bytes)
    return _predicted(replace(plan, minimum_bytes=minimum), rates)


def choose_shared(group_bytes: Sequence[int], shared_bytes: int) -> tuple[int, ...]:
    """Groups for memory of all processes: as many as fit when they are spread evenly, so that a
    process which asks for twice the bytes finds those of the others among its own.
    """
    size = len(group_bytes)
    spreads = (_spread(size, count) for count in range(size, -1, -1))
    chosen = next(
        groups for groups in spreads if sum(group_bytes[g] for g in groups) <= shared_bytes
    )
    return tuple(sorted(chosen))


def divide_budget(budget_bytes: int, plans: Sequence[Plan]) -> list[int]:
    """One budget for several models: each gets what it cannot do without, and of the rest the same
    share of what it could use.

    Args:
        budget_bytes: For all of them together.
        plans: With everything resident, one per model.

    Raises:
        BudgetError: The budget is smaller than what they cannot do without.
    """
    needed = sum(plan.minimum_bytes for plan in plans)
    if needed > budget_bytes:
        each = " + ".join(str(plan.minimum_bytes) for plan in plans)
        raise BudgetError(
            f"a budget for several models holds the smallest that works for each; got "
            f"{budget_bytes} bytes, needed {needed} = {each}; give at least that "
            f"({format_bytes(needed)}), or stream fewer models at a time"
        )
    useful = sum(plan.device_bytes - plan.minimum_bytes for plan in plans)
    share = min(1.0, (budget_bytes - needed) / useful) if useful else 1.0
    return [
        plan.minimum_bytes + int(share * (plan.device_bytes - plan.minimum_bytes)) for plan in plans
    ]


def predict_step(
    group_bytes: Sequence[int],
    streamed: Sequence[int],
    arena_of: Sequence[int],
    compute_seconds: Sequence[float],
    disk_bytes_per_second: float,
    *,
    in_ram: Collection[int] = (),
    link_bytes_per_second: float = math.inf,
) -> float:
    """Simulate one warm pass: seconds of the second, when the steady state is reached.

    One disk reads in order, one at a time, and goes on across the end of a pass; one link carries
    what was read, as it comes, and what stays in RAM. A load waits until its arena is free: until
    the computation asks for the group, resident or streamed, after the one that lies there. A
    streamed group computes once its load has landed.

    Args:
        group_bytes: Bytes of each group, in forward order.
        streamed: Indices of the streamed groups, in order.
        arena_of: The shared arena of each streamed group.
        compute_seconds: Seconds of compute of each group.
        disk_bytes_per_second: Rate of the disk, above 0; may be infinite.
        in_ram: Indices of the streamed groups that are not read again.
        link_bytes_per_second: Rate of the link, above 0; may be infinite.
    """
    arenas = dict(zip(streamed, arena_of, strict=True))
    freed: dict[int | None, float] = {}
    previous: int | None = None
    clock = read = carried = start = 0.0
    for _ in range(2):
        start = clock
        for group, seconds in enumerate(compute_seconds):
            freed[previous], previous = clock, arenas.get(group)
            if previous is not None:
                begin = freed.get(previous, 0.0)
                if group not in in_ram:
                    begin = max(read, begin)
                    read = begin + group_bytes[group] / disk_bytes_per_second
                carried = max(carried, begin) + group_bytes[group] / link_bytes_per_second
                carried = carried if group in in_ram else max(carried, read)
                clock = max(clock, carried)
            clock += seconds
    return clock - start


def _check(lookahead: object, rates: Rates, sizes: Sequence[int]) -> None:
    if min(sizes) < 0:
        raise ConfigError(f"sizes are bytes, 0 or more; got {min(sizes)}; pass measured sizes")
    if isinstance(lookahead, bool) or not (
        lookahead == "auto" or (isinstance(lookahead, int) and lookahead >= 1)
    ):
        raise ConfigError(f"lookahead is 'auto' or an int from 1; got {lookahead!r}; use 'auto'")
    compute = rates.compute_seconds_per_group
    speeds = (rates.disk_bytes_per_second, rates.link_bytes_per_second)
    if any(not (rate is None or rate > 0) for rate in speeds) or not (
        compute is None or compute >= 0
    ):
        raise ConfigError(f"a rate is positive, or None if unknown; got {rates}; measure it again")


def _depths(
    sizes: tuple[int, ...], lookahead: int | Literal["auto"], in_flight_bytes: int
) -> Sequence[int]:
    """The lookaheads to try, the shallowest first."""
    if lookahead == "auto":
        wanted = -(-in_flight_bytes * len(sizes) // max(1, sum(sizes)))
        return range(1, 1 + max(1, min(wanted, _DEEPEST_AUTO)))
    return (lookahead,)


def _split(everything: Plan, resident: frozenset[int], depth: int) -> Plan:
    """The plan that keeps these residents and lets the others share `depth` + 1 arenas."""
    streamed = tuple(group for group in everything.resident if group not in resident)
    if len(streamed) <= depth + 1:  # each would have an arena of its own: that is a resident
        return everything
    arena_of, arena_bytes = _assign_arenas(len(streamed), depth + 1), [0] * (depth + 1)
    for group, arena in zip(streamed, arena_of, strict=True):
        arena_bytes[arena] = max(arena_bytes[arena], everything.group_bytes[group])
    return replace(
        everything,
        resident=tuple(sorted(resident)),
        streamed=streamed,
        arena_of=arena_of,
        arena_bytes=tuple(arena_bytes),
        lookahead=depth,
    )


def _assign_arenas(num_streamed: int, num_arenas: int) -> tuple[int, ...]:
    """Give each streamed group its arena, as far as can be from the next group that uses it.

    Some arena serves at least ceil(n / A) groups, so on a ring of n two of them lie no further
    apart than n // ceil(n / A). That many blocks 0, 1, 2, ... of nearly equal length, the longer
    ones first, reach exactly this. A ring too short for blocks as long as A leaves arenas idle;
    they take the tail of the last block. Needs more groups than arenas.
    """
    num_blocks = -(-num_streamed // num_arenas)
    short, num_longer = divmod(num_streamed, num_blocks)
    tail = range(short + bool(num_longer), num_arenas)
    blocks = [range(short + (block < num_longer)) for block in range(num_blocks)]
    walk = [arena for block in blocks for arena in block]
    return (*walk[: num_streamed - len(tail)], *tail)


def _spread(num_groups: int, count: int) -> frozenset[int]:
    """`count` of the groups, evenly: gaps on the ring differ by at most one (error diffusion)."""
    return frozenset(-(-num_groups * nth // count) - 1 for nth in range(1, count + 1))


def _spreads(everything: Plan, depth: int) -> Iterator[Plan]:
    """A plan for every number of residents, most first."""
    groups = everything.resident
    spreads = (_spread(len(groups), count) for count in range(len(groups), -1, -1))
    return (
        _split(everything, frozenset(groups[place] for place in places), depth)
        for places in spreads
    )


def _smallest(everything: Plan, depth: int) -> Plan:
    return min(_spreads(everything, depth), key=lambda plan: plan.device_bytes)


def _fit(everything: Plan, depth: int) -> Plan | None:
    """The most evenly spread residents that fit, then every further group that still does."""
    plan = next(filter(_within_budget, _spreads(everything, depth)), None)
    while plan is not None:
        grown = {
            group: _split(everything, frozenset((*plan.resident, group)), depth)
            for group in plan.streamed
        }
        fitting = [group for group in plan.streamed if _within_budget(grown[group])]
        if not fitting:
            break
        plan = grown[max(fitting, key=partial(_isolation, plan))]
    return plan


def _with_ram(plan: Plan, ram_bytes: int) -> Plan:
    """Streamed groups that stay in RAM: as many as fit when they are spread as the residents are
    (between two that come from disk lies the time to read one), then every other that still does.
    """
    spreads = (_spread(len(plan.streamed), count) for count in range(len(plan.streamed), -1, -1))
    kept = next(
        kept
        for places in spreads
        if (kept := _keeping(plan, [plan.streamed[place] for place in places])).locked_bytes
        <= ram_bytes
    )
    for group in sorted(plan.streamed, key=lambda group: plan.group_bytes[group]):
        if group not in kept.in_ram and kept.locked_bytes + plan.group_bytes[group] <= ram_bytes:
            kept = _keeping(plan, [*kept.in_ram, group])
    return kept


def _keeping(plan: Plan, groups: Collection[int]) -> Plan:
    return replace(plan, in_ram=tuple(sorted(groups)))


def _within_budget(plan: Plan) -> bool:
    return plan.device_bytes <= plan.budget_bytes


def _isolation(plan: Plan, group: int) -> int:
    """Steps around the ring from a group to the nearest resident."""
    steps = ((group - other) % plan.num_groups for other in plan.resident)
    return min((min(step, plan.num_groups - step) for step in steps), default=plan.num_groups)


def _predicted(plan: Plan, rates: Rates) -> Plan:
    disk, mean = rates.disk_bytes_per_second, rates.compute_seconds_per_group
    link = rates.link_bytes_per_second or math.inf
    seconds = [mean or 0.0] * plan.num_groups
    plan = replace(plan, predicted_compute_seconds=None if mean is None else sum(seconds))
    if plan.disk_bytes and disk is None:
        return plan
    rate = disk or math.inf
    step = predict_step(
        plan.group_bytes,
        plan.streamed,
        plan.arena_of,
        seconds,
        rate,
        in_ram=frozenset(plan.in_ram),
        link_bytes_per_second=link,
    )
    io = max(plan.disk_bytes / rate, plan.streamed_bytes / link)
    # Projections computed by rows take about as long as their bytes.
    step += plan.tiled_bytes / rate
    return replace(plan, predicted_io_seconds=io, predicted_step_seconds=step)


def _too_small(needed: Plan, minimum: int) -> BudgetError:
    tiles = f" + tiles {needed.tile_arena_bytes}" if needed.tile_arena_bytes else ""
    return BudgetError(
        "a budget holds the weights outside the groups, the residents and lookahead + 1 arenas; "
        f"got {needed.budget_bytes} bytes, needed {needed.device_bytes} = "
        f"outside {needed.outside_bytes} + resident {needed.resident_bytes} + "
        f"{len(needed.arena_bytes)} arenas {sum(needed.arena_bytes)} (lookahead "
        f"{needed.lookahead}){tiles}; give at least that; the smallest budget that works is "
        f"{minimum} bytes ({format_bytes(minimum)}) with lookahead='auto'"
    )


def _seconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds:.3g} s"
