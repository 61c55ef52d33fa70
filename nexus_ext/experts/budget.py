"""One budget for dense weights and experts: who gets what.

Note [Dense first]
A byte of attention, router or shared expert is used in every token, a byte of a routed expert in
some. So dense weights have first call on the budget, experts get what they cannot do without, and
what is left once everything dense is resident.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.config import StreamConfig
from nexus_ext.device import Device
from nexus_ext.errors import BudgetError, ConfigError
from nexus_ext.experts.find import ExpertLayer
from nexus_ext.experts.slots import SlotClass, SlotPlan, classes_of, plan_slots, smallest_budget
from nexus_ext.layout import Layout
from nexus_ext.memory import available_bytes, default_budget, format_bytes
from nexus_ext.plan import Plan
from nexus_ext.streamer import plan_groups

__all__ = ["Division", "divide"]

# Of free host memory, for experts that are computed on the CPU while a GPU does the rest.
_HOST_SHARE = 0.5
# More than any checkpoint needs besides its own bytes: padding, arenas of tiles.
_ROOMY = 1 << 30


@dataclass(frozen=True)
class Division:
    """What experts get, and the configuration with what is left for everything else.

    Attributes:
        config: As it was, with the dense weights' own budget.
        classes: Of slots.
        slots: How many of each.
        budget_bytes: For both together; of the dense weights alone where experts lie elsewhere.
        device: Where experts are computed.
    """

    config: StreamConfig
    classes: tuple[SlotClass, ...]
    slots: SlotPlan
    budget_bytes: int
    device: Device

    def whole_plan(self, dense: Plan) -> Plan:
        """The plan of everything, from that of the dense weights."""
        if dense.budget_bytes == self.budget_bytes:  # experts lie elsewhere
            return replace(dense, experts=self.slots)
        return replace(
            dense,
            experts=self.slots,
            budget_bytes=self.budget_bytes,
            minimum_bytes=dense.minimum_bytes + smallest_budget(self.classes),
        )


def divide(
    checkpoint: Checkpoint,
    layout: Layout,
    layers: Sequence[ExpertLayer],
    config: StreamConfig,
    device: Device,
) -> Division:
    """Divide `config.budget`; see Note [Dense first].

    Raises:
        BudgetError: Too little for the experts, or for the rest.
    """
    classes = tuple(classes_of([expert for layer in layers for expert in layer.experts]))
    home = Device.of("cpu") if config.expert_device == "cpu" else device
    total = sum(one.nbytes for one in classes)
    if config.trailing_drop is True and config.prefault == "auto":
        # The dense weights' mapping of a file would hold the pages that experts let go.
        config = replace(config, prefault="off")
    budget = config.budget
    if budget == "auto":
        budget = default_budget(device.available_bytes())
    if home != device:
        room = int(default_budget(available_bytes()) * _HOST_SHARE)
        given = _asked(config, total)
        slots = plan_slots(classes, min(total, room) if given is None else given)
        return Division(replace(config, budget=budget), classes, slots, budget, home)
    given = _asked(config, total)
    if given is None:
        dense = layout.outside.nbytes + sum(group.nbytes for group in layout.groups)
        given = min(total, max(smallest_budget(classes), budget - dense))
    slots = plan_slots(classes, given)
    beside = _least_beside(checkpoint, layout, config, device)
    needed = slots.nbytes + beside
    if budget < needed:
        raise BudgetError(
            f"budget must hold the experts' slots and the least of everything else; got {budget} "
            f"bytes, needed {needed} = slots {slots.nbytes} + {beside}; give at least that "
            f"({format_bytes(needed)}) or, where expert_budget was given, lower it"
        )
    return Division(replace(config, budget=budget - slots.nbytes), classes, slots, budget, home)


def _least_beside(
    checkpoint: Checkpoint, layout: Layout, config: StreamConfig, device: Device
) -> int:
    """Bytes that everything but the experts cannot do without."""
    roomy = replace(config, budget=2 * checkpoint.nbytes + _ROOMY)
    plan, _ = plan_groups(
        checkpoint,
        layout.groups,
        layout.outside,
        roomy,
        device,
        projections=layout.projections,
    )
    return plan.minimum_bytes


def _asked(config: StreamConfig, total: int) -> int | None:
    asked = config.expert_budget
    if asked == "auto":
        return None
    nbytes = int(asked * total) if isinstance(asked, float) else asked
    if nbytes <= 0:
        raise ConfigError(
            f"expert_budget must be bytes or a share above 0 %, got {asked!r}; '30%' keeps about "
            "a third of the experts"
        )
    return min(nbytes, total)
