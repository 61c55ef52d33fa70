"""Owns what stays: for every expert how much it is worth to keep, from what was used so far.

An expert is a key: its number among the experts of all layers, layer by layer. A policy sees
which keys each forward of a layer used, and says which of the keys that are present should leave.
It knows neither bytes nor devices.

Note [The cyclic order]: the layers of a decoder come in a circle, one turn a token. When a layer
has passed, a key of the next layer may be used at once, one of that layer only a turn later. A
turn begins when a layer comes that is not behind the last one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from nexus_ext.errors import ConfigError

__all__ = ["POLICIES", "Lfu", "Lru", "Policy", "Reuse", "make_policy"]

# Selections that may wait until somebody wants to know.
_MOST_UNREAD = 64

_NEVER = torch.tensor(math.inf, dtype=torch.float64)


class Policy(ABC):
    """What to keep. For one thread at a time; nothing here waits for anything."""

    name: ClassVar[str]
    _worth: Tensor

    def __init__(self, layer_of: Sequence[int]) -> None:
        """`layer_of` is the layer of every key: numbers that ascend in forward order.

        Raises:
            ConfigError: They do not ascend.
        """
        self.layer_of = tuple(layer_of)
        self.num_keys = len(self.layer_of)
        if any(layer > after for layer, after in pairwise(self.layer_of)):
            raise ConfigError(
                "keys must be numbered layer by layer, in forward order; got layers that descend; "
                "sort them"
            )
        self._turn = 0
        self._last_layer: float = math.inf
        self._unread: list[tuple[int, tuple[int, ...], bool]] = []

    def select(self, layer: int, keys: Sequence[int], *, is_prefill: bool = False) -> None:
        """One forward of `layer` used these distinct keys, all of that layer.

        A prefill is a forward of many tokens of a prompt: it says little about those to come.
        """
        self._unread.append((layer, tuple(keys), is_prefill))
        if len(self._unread) == _MOST_UNREAD:
            self._read()

    def worth(self) -> Tensor:
        """What keeping each key is worth now: finite float64, one a key; the lowest leaves first.

        Only the order means something. The tensor is the policy's own and changes with it.
        """
        self._read()
        return self._worth

    def victims(self, count: int, present: Tensor, held: Collection[int] = ()) -> list[int]:
        """The `count` keys of least worth, least first, that are present and not held.

        Args:
            count: How many; fewer are returned if there are not so many.
            present: Bool, one a key.
            held: Keys that must stay.
        """
        if count <= 0 or self.num_keys == 0:
            return []
        worth = torch.where(present, self.worth(), _NEVER)
        if held:
            worth[_index(held)] = math.inf
        least, keys = worth.topk(min(count, self.num_keys), largest=False)
        num_found = int(least.isfinite().count_nonzero())
        return keys[:num_found].tolist()

    def hottest(self, count: int) -> list[int]:
        """The `count` keys most used, most first: what to load before the first token comes."""
        self._read()
        most = self._heat().topk(min(max(count, 0), self.num_keys))
        return most.indices.tolist()

    def state(self) -> dict[str, Any]:
        """What is worth remembering until the next run, in types that JSON knows."""
        self._read()
        return {"name": self.name} | self._remembered()

    def restore(self, state: dict[str, Any]) -> None:
        """Start from what another policy of the same name and model remembered.

        Raises:
            ConfigError: It is of another policy or model, or no state at all.
        """
        self._unread.clear()
        self._restore(state)

    def _read(self) -> None:
        """Several selections at a time: between two layers' weights, every line of code and every
        number here has left the processor's caches, and one costs what four do together.
        """
        unread, self._unread = self._unread, []
        for layer, keys, is_prefill in unread:
            self._note(layer, keys, is_prefill)

    @abstractmethod
    def _note(self, layer: int, keys: Sequence[int], is_prefill: bool) -> None:
        """As `select`: changes `_worth`."""

    @abstractmethod
    def _remembered(self) -> dict[str, Any]: ...

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None: ...

    def _heat(self) -> Tensor:
        return self._worth

    def _advance(self, layer: int) -> bool:
        """Note that `layer` passes; whether that begins a turn (see [The cyclic order])."""
        begins = layer <= self._last_layer
        self._turn += begins
        self._last_layer = layer
        return begins


class Lru(Policy):
    """Least recently used leaves. Over a circle that does not fit it never hits."""

    name: ClassVar[str] = "lru"

    def __init__(self, layer_of: Sequence[int]) -> None:
        super().__init__(layer_of)
        self._clock = 0
        self._worth = torch.zeros(self.num_keys, dtype=torch.float64)

    def _note(self, layer: int, keys: Sequence[int], is_prefill: bool) -> None:
        self._clock += 1
        self._worth[_index(keys)] = self._clock

    def _remembered(self) -> dict[str, Any]:
        return {"used": self._worth.tolist()}

    def _restore(self, state: dict[str, Any]) -> None:
        self._worth = _values(self, state, "used", (self.num_keys,))
        self._clock = int(self._worth.max()) if self.num_keys else 0


class Lfu(Policy):
    """Least often used leaves, of equals the one not used for longest; use is forgotten.

    Hotness is 1 more with every use, and halved, rounded down, every 16 tokens.

    Source: document 001, "evolved LRU"; reference/moe_streaming.md, section 2.3.
    """

    name: ClassVar[str] = "lfu"
    _HALVED_EVERY = 16
    # One byte. Only prefills come near it: 16 + 8 + ... is below 32.
    _HOTTEST = 255
    # Worth is hotness and clock in one number; float64 holds both exactly.
    _CLOCKS = 2**40

    def __init__(self, layer_of: Sequence[int]) -> None:
        super().__init__(layer_of)
        self._clock = 0
        self._hotness = torch.zeros(self.num_keys, dtype=torch.float64)
        self._worth = torch.zeros(self.num_keys, dtype=torch.float64)

    def _note(self, layer: int, keys: Sequence[int], is_prefill: bool) -> None:
        self._clock += 1
        if not is_prefill and self._advance(layer) and self._turn > self._HALVED_EVERY:
            self._turn -= self._HALVED_EVERY
            self._halve()
        index = _index(keys)
        hotness = (self._hotness[index] + 1).clamp_(max=self._HOTTEST)
        self._hotness[index] = hotness
        self._worth[index] = hotness * self._CLOCKS + self._clock

    def _remembered(self) -> dict[str, Any]:
        return {"hotness": self._hotness.tolist()}

    def _restore(self, state: dict[str, Any]) -> None:
        self._hotness = _values(self, state, "hotness", (self.num_keys,))
        self._worth = self._hotness * self._CLOCKS

    def _halve(self) -> None:
        clocks = self._worth - self._hotness * self._CLOCKS
        self._hotness.div_(2, rounding_mode="floor")
        self._worth = self._hotness * self._CLOCKS + clocks


class Reuse(Policy):
    """What is used soonest is worth most; how soon is learned from averages of past uses.

    Note [Worth as a discount]: were T the turns until a key's next use, it would be worth G**T, for
    a discount G below 1. Let V be the expectation of G**(T - 1) when the key's own layer has just
    passed: with y = 1 if the next turn uses the key, else 0, and V' its V after that turn,
    V = E[y + (1 - y) * G * V']. V is a logistic function of features of the key, and its weights
    are learned from that equation (temporal differences, Sutton 1988): one model for the next turn
    and for all later ones. What is left of G**T is how far the layer is in the circle. In the
    logarithm that is a summand of the layer alone, and put as a point in time instead of a
    distance it changes only when the layer passes. So every select computes one layer's worth.

    Note [Features]: of every key, averages of its use over 2, 8, 32 and 128 tokens (half-lives): a
    burst, a topic, a text, a habit. Each as log-odds, less those of the layer's mean, after a few
    uses of that mean were added, since an average over few tokens is worth little alone. What
    each is good for differs between models, so the weights are learned; all layers share them, so
    that they learn fast.

    A prefill says nothing about the order of use, so it counts only where nothing else is known.
    """

    name: ClassVar[str] = "reuse"
    # exp(-1) a turn; from exp(-0.5) to exp(-4) synthetic traces made a difference below 0.5 %.
    _DISCOUNT = 1.0
    # Thousands of examples a token for five weights: slow is enough, and always 0.015 was worse.
    # Learning begins faster, for texts of a few hundred tokens.
    _LEARNING_RATE, _FIRST_LEARNING_RATE = 0.003, 0.01
    # Where learning went on synthetic traces.
    _FIRST_WEIGHTS = (0.25, 0.6, -0.1, 0.1)
    _FIRST_BIAS = -0.2

    def __init__(self, layer_of: Sequence[int]) -> None:
        super().__init__(layer_of)
        self._weights = torch.tensor(self._FIRST_WEIGHTS)
        self._bias = self._FIRST_BIAS
        self._num_learned = 0
        self._layers = {
            layer: _Habits(first, count) for layer, first, count in _ranges(self.layer_of)
        }
        self._rank_of = {layer: rank for rank, layer in enumerate(self._layers)}
        self._worth = torch.zeros(self.num_keys, dtype=torch.float64)
        self._place_all()

    def _note(self, layer: int, keys: Sequence[int], is_prefill: bool) -> None:
        if self._advance(layer):
            self._place_skipped()
        habits = self._layers[layer]
        habits.turn = self._turn
        if is_prefill:
            habits.glimpse(keys)
            self._place(layer, habits)
        else:
            features, guessed = habits.features, habits.value
            habits.note(keys)
            self._place(layer, habits)
            self._learn(habits, features, guessed, len(keys))

    def _remembered(self) -> dict[str, Any]:
        layers = self._layers.values()
        averages = [average for habits in layers for average in habits.averages.t().tolist()]
        return {
            "averages": [[round(share, 5) for share in average] for average in averages],
            "num_tokens": [habits.num_tokens for habits in layers],
            "weights": [*self._weights.tolist(), self._bias],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        num_averages = len(self._FIRST_WEIGHTS)
        averages = _values(self, state, "averages", (self.num_keys, num_averages))
        num_tokens = _values(self, state, "num_tokens", (len(self._layers),))
        weights = _values(self, state, "weights", (num_averages + 1,)).tolist()
        self._weights, self._bias = torch.tensor(weights[:-1]), weights[-1]
        for habits, tokens in zip(self._layers.values(), num_tokens.tolist(), strict=True):
            habits.remember(averages[habits.keys], int(tokens))
        self._place_all()

    def _heat(self) -> Tensor:
        # The habit alone: the topics of the next run are others.
        return torch.cat([torch.zeros(0), *(h.averages[-1] for h in self._layers.values())])

    def _learn(self, habits: _Habits, features: Tensor, guessed: Tensor, num_used: int) -> None:
        """Move the weights towards what came of a guess (see [Worth as a discount])."""
        came = torch.maximum(habits.value * math.exp(-self._DISCOUNT), habits.used)
        error = came.sub_(guessed)
        self._num_learned += 1
        falling = min(self._FIRST_LEARNING_RATE, 0.2 / math.sqrt(self._num_learned))
        rate = max(self._LEARNING_RATE, falling) / max(1, num_used)
        self._weights.add_(torch.mv(features, error), alpha=rate)
        self._bias += rate * float(error.sum())

    def _place(self, layer: int, habits: _Habits) -> None:
        """Worth of one layer's keys: V, and when the layer comes next."""
        share = habits.share
        # V of an average key, were every turn like the others; weights and bias say what differs.
        usual = share / (1 - (1 - share) * math.exp(-self._DISCOUNT))
        log_odds = torch.mv(habits.features.t(), self._weights).add_(_logit(usual) + self._bias)
        habits.value = log_odds.sigmoid()
        comes = habits.turn + 1 + self._rank_of[layer] / len(self._layers)
        # log(sigmoid(x)); torch's own wakes all its threads for a handful of numbers.
        log_value = softplus(-log_odds).neg_().double()
        self._worth[habits.keys] = log_value.sub_(self._DISCOUNT * comes)

    def _place_all(self) -> None:
        for layer, habits in self._layers.items():
            habits.turn = self._turn
            self._place(layer, habits)

    def _place_skipped(self) -> None:
        """Layers that the last turn left out come a turn later than was thought."""
        for habits in self._layers.values():
            turns = self._turn - 1 - habits.turn
            if turns > 0:
                self._worth[habits.keys] -= self._DISCOUNT * turns
                habits.turn += turns


class _Habits:
    """How often each key of one layer was used lately: averages, features, and their V."""

    # Per token, of half-lives of 2, 8, 32 and 128 tokens.
    _RATES = torch.tensor([1 - 0.5 ** (1 / tokens) for tokens in (2, 8, 32, 128)]).unsqueeze(1)
    _SLOWEST = float(_RATES.min())
    # Uses of the mean that are added to every average, which is one of about 1 / rate tokens.
    _ADDED = 2.0
    # Of the keys of a layer; a guess that serves until its first token.
    _SHARE = 1 / 8
    # Not 0: averages that fade to denormal numbers are slow.
    _UNUSED = 1e-6

    def __init__(self, first: int, count: int) -> None:
        self.keys = slice(first, first + count)
        self.turn = 0
        self.share = self._SHARE
        self.num_tokens = 0
        self.averages = torch.full((len(self._RATES), count), self.share)
        self.features = torch.zeros_like(self.averages)
        self.used = torch.zeros(count)
        self.value = torch.full((count,), self.share)

    def note(self, keys: Sequence[int]) -> None:
        """One decode forward used these keys."""
        self._mark(keys)
        share = min(max(len(keys) / len(self.used), 1e-4), 0.99)
        if self.num_tokens == 0:
            self.averages *= share / self.share
        self.num_tokens += 1
        # A plain average while there are fewer tokens than it is long.
        least = 1 / (self.num_tokens + 2)
        rates = self._RATES.clamp(min=least) if least > self._SLOWEST else self._RATES
        self.share += (share - self.share) / min(self.num_tokens, 32)
        self.averages.lerp_(self.used.expand_as(self.averages), rates)
        self._refresh(rates)

    def glimpse(self, keys: Sequence[int]) -> None:
        """A prefill used these keys, in an order and how often nobody knows."""
        if self.num_tokens == 0:
            self._mark(keys)
            self.averages.copy_((self.used + 0.5).mul_(self.share).expand_as(self.averages))
            self._refresh(self._RATES)

    def remember(self, averages: Tensor, num_tokens: int) -> None:
        """Averages of an earlier run, one row a key."""
        self.averages.copy_(averages.t()).clamp_(self._UNUSED, 1)
        self.num_tokens = num_tokens
        self.share = min(max(float(self.averages[-1].mean()), 1e-4), 0.99)
        self._refresh(self._RATES)

    def _mark(self, keys: Sequence[int]) -> None:
        self.used.fill_(self._UNUSED)
        self.used[_index([key - self.keys.start for key in keys])] = 1

    def _refresh(self, rates: Tensor) -> None:
        shares = torch.add(self.averages, rates, alpha=self._ADDED * self.share)
        # With what was added a share may be above 1, by less than the mean's share.
        odds = shares.div_(1 + 2 * self.share - shares)
        self.features = odds.log_().sub_(_logit(self.share))


def _index(keys: Collection[int]) -> Tensor:
    return torch.tensor(list(keys), dtype=torch.int64)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _ranges(layer_of: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Layer, first key and number of keys, in order."""
    first = 0
    for layer, members in groupby(layer_of):
        count = len(list(members))
        yield layer, first, count
        first += count


def _values(policy: Policy, state: dict[str, Any], what: str, shape: tuple[int, ...]) -> Tensor:
    """The numbers called `what` in a state of this policy, float64, of this shape."""
    if state.get("name") != policy.name:
        raise ConfigError(
            f"a state must be of the policy {policy.name!r}, got {state.get('name')!r}; "
            "start without it"
        )
    try:
        values = torch.tensor(state.get(what), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"a state must have numbers as {what!r}, got something else; start without it"
        ) from error
    if values.shape != shape or not values.isfinite().all():
        raise ConfigError(
            f"a state must have {shape} finite numbers as {what!r}, got {tuple(values.shape)}; "
            "it is of another model: start without it"
        )
    return values


_POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (Lru, Lfu, Reuse)}
POLICIES = tuple(_POLICIES)


def make_policy(name: str, layer_of: Sequence[int]) -> Policy:
    """The policy called `name`, for keys of these layers.

    Raises:
        ConfigError: There is no such policy.
    """
    if name not in _POLICIES:
        raise ConfigError(f"the policy must be one of {', '.join(POLICIES)}; got {name!r}")
    return _POLICIES[name](layer_of)
