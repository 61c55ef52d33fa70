"""Owns routes: which experts every forward used, recorded from a model or made up.

A trace is a list of steps (one token each in decoding), a step a list of forwards of layers in
order. In files an expert is its number within its layer; here it is a key, its number among the
experts of all layers (see policy).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_ext.errors import ConfigError

__all__ = ["Route", "RouteTrace", "load_routes", "save_routes", "synthetic_routes"]


@dataclass(frozen=True)
class Route:
    """One forward of `layer` over `num_tokens` tokens used these distinct keys."""

    layer: int
    keys: tuple[int, ...]
    num_tokens: int = 1
    is_prefill: bool = False


@dataclass(frozen=True)
class RouteTrace:
    """Steps of routes through a model; `append` records more.

    `num_experts` is the experts of every layer that has some, by layer, ascending; `sizes` is
    bytes, one a key.
    """

    num_experts: Mapping[int, int]
    steps: list[list[Route]]
    sizes: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.sizes) != self.num_keys:
            raise ConfigError(
                f"sizes must have one entry for each of {self.num_keys} experts, got "
                f"{len(self.sizes)}; give one size per expert, layer by layer"
            )

    def append(
        self, layer: int, keys: Sequence[int], num_tokens: int = 1, *, is_prefill: bool = False
    ) -> None:
        """The next forward; one whose layer is not behind the last one's begins a step."""
        if not self.steps or not self.steps[-1] or layer <= self.steps[-1][-1].layer:
            self.steps.append([])
        self.steps[-1].append(Route(layer, tuple(keys), num_tokens, is_prefill))

    @property
    def num_keys(self) -> int:
        return sum(self.num_experts.values())

    @cached_property
    def layer_of(self) -> tuple[int, ...]:
        """The layer of every key."""
        return tuple(layer for layer, count in self.num_experts.items() for _ in range(count))

    @cached_property
    def first_key(self) -> dict[int, int]:
        """The first key of every layer."""
        firsts = accumulate(self.num_experts.values(), initial=0)
        return dict(zip(self.num_experts, firsts, strict=False))

    @property
    def routes(self) -> Iterator[Route]:
        """Every forward, in order."""
        return (route for step in self.steps for route in step)

    @property
    def num_selected(self) -> int:
        return sum(len(route.keys) for route in self.routes)


def save_routes(trace: RouteTrace, path: Path) -> None:
    """Write a trace as lines of JSON, schema nexus-io/1, one record `route` a forward.

    A first record `experts` says what no route shows: how many there are, and their bytes.
    """
    with path.open("w") as out:
        head: dict[str, Any] = {"rec": "experts", "num_experts": list(trace.num_experts.items())}
        out.write(json.dumps(head | {"bytes": list(trace.sizes)}) + "\n")
        for number, step in enumerate(trace.steps):
            for route in step:
                out.write(json.dumps(_record(trace, number, route)) + "\n")


def load_routes(path: Path) -> RouteTrace:
    """Read a trace that `save_routes`, or a profile with routes in it, wrote.

    Other records are passed over. Without the record `experts` a layer has as many experts as its
    routes show, of one byte each. Without `phase` a route of several tokens is a prefill.

    Raises:
        ConfigError: A line is no such record, there is no route, or an expert that cannot be.
    """
    head, records = _read(path)
    if not records:
        raise ConfigError(f"a trace must have records of routes, {path} has none; record some")
    num_experts = dict(head["num_experts"]) if head else _count_experts(records)
    trace = RouteTrace(num_experts, [], head["bytes"] if head else [1] * sum(num_experts.values()))
    steps: dict[int, list[Route]] = {}
    for record in records:
        steps.setdefault(record["step"], []).append(_route(record, trace, path))
    trace.steps.extend(steps.values())
    return trace


def synthetic_routes(
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_tokens: int,
    *,
    skew: float = 0.6,
    locality: float = 0.5,
    seed: int = 0,
    expert_bytes: int = 1,
) -> RouteTrace:
    """Routes of a made-up decoder: the same for the same arguments.

    The logits of every layer are the sum of three parts, and a token takes the `top_k` highest:
    popularity, `-skew * log(rank)` for a random ranking of the experts (Zipf); what the text is
    about, one of a few recurring topics that last for tens of tokens and drift; and noise of each
    token (Gumbel, so that without topics the choice is Zipf's own, without replacement).

    Args:
        num_layers: Layers, numbered from 0.
        num_experts: Experts of a layer.
        top_k: Experts a token uses in a layer.
        num_tokens: Steps, one token each.
        skew: Exponent of the popularity; 0 is none.
        locality: The topic's share, in [0, 1), of the variance that topic and noise have together.
        seed: Of everything random.
        expert_bytes: Size of each expert.
    """
    if not 0 < top_k <= num_experts:
        raise ConfigError(f"top_k must be in [1, {num_experts}], got {top_k}; take less")
    if not 0 <= locality < 1:
        raise ConfigError(f"locality must be in [0, 1), got {locality}; take 0.5")
    random = torch.Generator().manual_seed(seed)
    about = _Topics(num_layers * num_experts, random)
    shape = (num_layers, num_experts)
    ranks = torch.stack([torch.randperm(num_experts, generator=random) for _ in range(num_layers)])
    popularity = -skew * (ranks + 1.0).log()
    # Gumbel's variance is pi^2 / 6.
    scale = math.sqrt(locality / (1 - locality) * math.pi**2 / 6)
    offsets = (torch.arange(num_layers) * num_experts).unsqueeze(1)
    steps = []
    for _ in range(num_tokens):
        uniform = torch.rand(shape, generator=random).clamp_(1e-12, 1 - 1e-7)
        logits = popularity + scale * about.next().view(shape) - (-uniform.log()).log()
        chosen = (logits.topk(top_k).indices + offsets).tolist()
        steps.append([Route(layer, tuple(keys)) for layer, keys in enumerate(chosen)])
    counts = dict.fromkeys(range(num_layers), num_experts)
    return RouteTrace(counts, steps, [expert_bytes] * (num_layers * num_experts))


class _Topics:
    """What the text is about, token by token: a vector of unit variance."""

    # A paragraph: tens of tokens. A text comes back to what it was about before.
    _MEAN_TOKENS = 40
    _NUM_TOPICS = 12
    # Per token of its own; half of what a topic was is gone after about 70 of its tokens.
    _KEPT = 0.99

    def __init__(self, width: int, random: torch.Generator) -> None:
        self._random = random
        self._topics = torch.randn(self._NUM_TOPICS, width, generator=random)
        self._now = 0

    def next(self) -> Tensor:
        """The vector of the next token; it changes with the call after."""
        if float(torch.rand((), generator=self._random)) < 1 / self._MEAN_TOKENS:
            self._now = int(torch.randint(self._NUM_TOPICS, (), generator=self._random))
        topic = self._topics[self._now]
        fresh = torch.randn(topic.shape, generator=self._random)
        return topic.mul_(self._KEPT).add_(fresh, alpha=math.sqrt(1 - self._KEPT**2))


def _record(trace: RouteTrace, step: int, route: Route) -> dict[str, Any]:
    first = trace.first_key[route.layer]
    return {
        "rec": "route",
        "step": step,
        "layer": route.layer,
        "experts": [key - first for key in route.keys],
        "tokens": route.num_tokens,
        "phase": "prefill" if route.is_prefill else "decode",
    }


def _route(record: dict[str, Any], trace: RouteTrace, path: Path) -> Route:
    layer, experts, tokens = record["layer"], record["experts"], record["tokens"]
    count = trace.num_experts.get(layer, 0)
    if not all(0 <= expert < count for expert in experts):
        raise ConfigError(
            f"the experts of layer {layer} must be below {count}, {path} has {experts}; "
            "its record `experts` is of another model"
        )
    phase = record.get("phase", "prefill" if tokens > 1 else "decode")
    keys = tuple(trace.first_key[layer] + expert for expert in experts)
    return Route(layer, keys, tokens, phase == "prefill")


def _count_experts(records: Sequence[dict[str, Any]]) -> dict[int, int]:
    """How many experts of each layer can be told from routes."""
    counts: dict[int, int] = {}
    for record in records:
        layer = record["layer"]
        counts[layer] = max(counts.get(layer, 0), 1 + max(record["experts"], default=-1))
    return dict(sorted(counts.items()))


_FIELDS = {
    "experts": {"num_experts", "bytes"},
    "route": {"step", "layer", "experts", "tokens"},
}


def _read(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The last record `experts`, if there is one, and those of routes."""
    head, routes = None, []
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            kind = record.get("rec") if isinstance(record, dict) else None
            missing = _FIELDS.get(kind, set()) - record.keys() if kind else {"rec"}
            if missing:
                raise ConfigError(
                    f"a line must be one record in JSON, line {number} of {path} lacks "
                    f"{', '.join(sorted(missing))}; record the trace again"
                )
            if kind == "experts":
                head = record
            elif kind == "route":
                routes.append(record)
    return head, routes
