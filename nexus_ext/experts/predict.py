"""Owns guesses: what the next layer will select, how much may be fetched for it, whether it pays.

Fetching ahead uses time in which the disk has nothing to do; it never makes the disk faster. So
three questions are asked one after the other: which experts (`Predictor`), how many bytes
(`Admission`), and whether tokens come faster with all this than without (`Trial`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Admission", "Predictor", "Trial"]


class Predictor:
    """The chance that each expert of a layer is selected, learned while running.

    Two things are known before a layer's own router has run. Its router applied to the input of
    the router before it: hidden states change little from layer to layer. And what the tokens
    before selected there. Each layer has its own logistic weights for the two, learned by
    stochastic gradient, once for guesses with scores and once for guesses without.

    Source: speculative loading, Eliseev and Mazur 2023 (arXiv 2312.17238), made a probability.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        """`num_experts` are the experts of each layer."""
        self._layers = [_Layer(count) for count in num_experts]

    def guess(self, layer: int, gate_scores: Tensor | None = None) -> Tensor:
        """The chance of every expert of `layer` to be selected next, float32 [num_experts].

        Args:
            layer: Which.
            gate_scores: The layer's router scores of another layer's hidden state, before any
                softmax, on the CPU: [num_experts] or [num_tokens, num_experts]; None if not known.
        """
        return self._layers[layer].guess(gate_scores)

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """`layer` did select these distinct experts: learn from its last guess, if there was one.

        Experts are numbered within the layer.
        """
        self._layers[layer].observe(experts)


class _Layer:
    """Guesses of one layer."""

    # Tokens after which a selection counts half.
    _HALF_LIFE = 8
    # In standard deviations of the scores, or log-odds: beyond this nothing more is said.
    _MOST = 6.0
    # Steps begin large, so that tens of tokens are enough, and stay large enough to follow a text.
    _FIRST_RATE, _LAST_RATE = 0.1, 0.02

    def __init__(self, num_experts: int) -> None:
        self._rate = 1 - 0.5 ** (1 / self._HALF_LIFE)
        self._num_seen = 0
        self._num_used = 1
        self._recent = torch.full((num_experts,), 1 / num_experts)
        self._used = torch.zeros(num_experts)
        # Of margin, recent use, and 1; whether the scores are known is the index.
        self._weights = (torch.tensor([0.0, 1.0, 0.0]), torch.tensor([2.0, 0.3, 0.0]))
        self._num_learned = [0, 0]
        self._features = torch.ones(3, num_experts)
        self._last: tuple[int, Tensor] | None = None

    def guess(self, gate_scores: Tensor | None) -> Tensor:
        kind = int(gate_scores is not None)
        if gate_scores is None:
            self._features[0].zero_()
        else:
            self._features[0].copy_(self._margin(gate_scores))
        self._features[1].copy_(self._recent_log_odds())
        chance = torch.mv(self._features.t(), self._weights[kind]).sigmoid_()
        self._last = kind, chance
        return chance

    def observe(self, experts: Sequence[int]) -> None:
        # Not 0: averages that fade to denormal numbers are slow.
        self._used.fill_(1e-6)
        self._used[torch.tensor(experts, dtype=torch.int64)] = 1
        self._num_used = max(1, len(experts))
        if self._last is not None:
            self._learn(*self._last)
            self._last = None
        self._num_seen += 1
        # A plain average while it is shorter than the half-life.
        self._recent.lerp_(self._used, max(self._rate, 1 / (self._num_seen + 1)))

    def _learn(self, kind: int, chance: Tensor) -> None:
        self._num_learned[kind] += 1
        step = max(self._LAST_RATE, self._FIRST_RATE / math.sqrt(self._num_learned[kind]))
        error = self._used - chance
        self._weights[kind].add_(torch.mv(self._features, error), alpha=step / self._num_used)

    def _margin(self, scores: Tensor) -> Tensor:
        """How far above the bar each expert is: in standard deviations, for its best token.

        The bar is the highest score that would not be selected.
        """
        scores = scores.detach().float().reshape(-1, len(self._recent))
        # Tokens share experts: of several this is the least that each can have selected.
        count = min(math.ceil(self._num_used / len(scores)), scores.shape[1] - 1)
        bar = scores.topk(count + 1).values[:, -1:]
        margin: Tensor = (scores - bar).div_(scores.std(1, correction=0, keepdim=True)).amax(0)
        # Where all scores are equal it is no number, and one of a model's own must not stay here.
        margin.nan_to_num_(-self._MOST).clamp_(-self._MOST, self._MOST)
        return margin

    def _recent_log_odds(self) -> Tensor:
        # As if one more token had used all experts alike.
        share = self._num_used / len(self._recent) * self._rate
        odds: Tensor = (self._recent + share).div_(1 + 2 * share - self._recent)
        return odds.log_().clamp_(-self._MOST, self._MOST)


class Admission:
    """How many bytes may be fetched ahead now, so that they arrive before anybody asks for more.

        bytes = min(bandwidth * 0.8 * idle, 256 MiB)

    Idle is what the disk was from the landing of a layer's last miss to the next layer's question,
    an exponential average. Where one expert has more than 256 MiB, the limit is one expert. Where
    bandwidth or idle time are not known, it is one expert too.

    A layer that seldom misses anybody is not asked at all: the question has a price of its own.

    Source: after MoE-Infinity, pull request 180 ("overlap-aware prefetch"), which computes the idle
    time from others; here it is measured.
    """

    _SHARE = 0.8
    _MOST_BYTES = 256 << 20
    # About the last ten.
    _RATE = 0.2
    # A token; about the last twenty.
    _FEWEST_MISSED = 0.5
    _MISSED_RATE = 0.1

    def __init__(self, *, expert_bytes: int, bandwidth: float | None) -> None:
        """`bandwidth` is the disk's at full depth, bytes a second; `expert_bytes` is the mean size.

        What transfers of a few experts take is no measure of it: most of that is latency, and a
        guess that fills the gaps between them waits for nothing.
        """
        self._expert_bytes = expert_bytes
        self._bandwidth = bandwidth
        self._idle: float | None = None
        self._missed: dict[int, float] = {}

    def note_missed(self, layer: int, count: int) -> None:
        """So many experts of a layer had to be read for one token, guessed or not."""
        before = self._missed.get(layer, float(count))
        self._missed[layer] = before + self._MISSED_RATE * (count - before)

    def is_worth_asking(self, layer: int) -> bool:
        """Whether the layer misses experts often enough, as far as is known."""
        return self._missed.get(layer, math.inf) >= self._FEWEST_MISSED

    def note_idle(self, seconds: float) -> None:
        """So long nobody had asked the disk for anything, guesses not counted."""
        before = seconds if self._idle is None else self._idle
        self._idle = before + self._RATE * (seconds - before)

    @property
    def window_seconds(self) -> float:
        """For how long a transfer would not be noticed; 0 while nothing is known."""
        return self._SHARE * (self._idle or 0.0)

    def allow(self) -> int:
        """Bytes that may be asked for now."""
        if self._idle is None or self._bandwidth is None:
            return self._expert_bytes
        room = int(self._bandwidth * self.window_seconds)
        return min(room, max(self._MOST_BYTES, self._expert_bytes))


class Trial:
    """Whether prediction pays: now and then some tokens with it and some without are timed.

    Note [What a trial costs]: a trial is windows of steps without, with, with, without, so that a
    drift is as good for one as for the other, and once more while noise may be the whole of the
    difference; it ends early when the difference is plain. If it is still noise at the end,
    prediction is off: that costs nothing. What the slower of the two cost in all trials is kept
    below half a percent of the time of all steps: no trial begins before that is so. While
    prediction is off, each pause is twice as long as the one before. So prediction that is twice
    as slow costs some tens of steps at the very start, and in the long run less than 1 %.
    """

    # A first window that does not count: caches fill, and the predictor learns.
    _FIRST_WINDOWS = (True, False, True, True, False)
    _WINDOWS = (False, True, True, False)
    _MOST_ROUNDS = 4
    # After a change the first steps still have what was fetched ahead, or did not have it yet.
    _NUM_SETTLING = 2
    _NUM_ENOUGH = 4
    _PLAIN = 1.25
    # In standard errors: in one of 20 trials, noise is taken for a difference.
    _DOUBT = 2.0
    _LOSS = 0.005
    _FIRST_PAUSE, _LONGEST_PAUSE = 512, 1 << 17

    def __init__(self, mode: Literal["auto", "on", "off"] = "auto", *, window: int = 16) -> None:
        """`window` is in steps, more than two; with mode "on" or "off" nothing is tried."""
        self._is_tried = mode == "auto"
        self._window = window
        self._chosen = mode != "off"
        self._windows = list(self._FIRST_WINDOWS) if self._is_tried else []
        self._skips_first = True
        self._num_rounds = 1
        self._num_in_window = 0
        self._pause, self._num_paused = self._FIRST_PAUSE, 0
        self._total_seconds = self._lost_seconds = 0.0
        # Without and with: those that count, and all.
        self._seconds: tuple[list[float], list[float]] = ([], [])
        self._spent: tuple[list[float], list[float]] = ([], [])
        self.value: float | None = None
        self.num_switches = 0

    @property
    def is_on(self) -> bool:
        """Whether the next step is to be one with prediction."""
        return self._windows[0] if self._windows else self._chosen

    def step(self, seconds: float) -> None:
        """A decode step with prediction as `is_on` said took so long."""
        if not self._is_tried:
            return
        self._total_seconds += seconds
        if self._windows:
            self._try(seconds)
            return
        self._num_paused += 1
        may_lose = self._LOSS * self._total_seconds
        if self._num_paused >= self._pause and self._lost_seconds <= may_lose:
            self._begin()

    def _begin(self) -> None:
        self._windows = list(self._WINDOWS)
        self._num_rounds, self._num_in_window = 1, 0
        for kept in (*self._seconds, *self._spent):
            kept.clear()

    def _try(self, seconds: float) -> None:
        which = int(self.is_on)
        self._spent[which].append(seconds)
        self._num_in_window += 1
        if self._num_in_window > self._NUM_SETTLING and not self._skips_first:
            self._seconds[which].append(seconds)
        if self._num_in_window == self._window:
            self._windows.pop(0)
            self._num_in_window = 0
            self._skips_first = False
        if not self._windows or self._is_plain():
            self._judge()

    def _is_plain(self) -> bool:
        if min(map(len, self._seconds)) < self._NUM_ENOUGH:
            return False
        without, with_it = map(median, self._seconds)
        is_large = max(without, with_it) > self._PLAIN * min(without, with_it)
        return is_large and abs(with_it - without) > self._noise()

    def _noise(self) -> float:
        """By how much the medians may differ by chance, in seconds."""
        variance = 0.0
        for kept in self._seconds:
            middle = median(kept)
            # Of a normal distribution: from the median deviation, and of a median of so many.
            sigma = 1.48 * median(abs(seconds - middle) for seconds in kept)
            variance += (1.25 * sigma) ** 2 / len(kept)
        return self._DOUBT * math.sqrt(variance)

    def _judge(self) -> None:
        without, with_it = map(median, self._seconds)
        noise = self._noise()
        pays = with_it <= without - noise
        if not pays and with_it < without + noise and self._num_rounds < self._MOST_ROUNDS:
            self._num_rounds += 1
            self._windows = list(self._WINDOWS)
            return
        slower = self._spent[with_it > without]
        self._lost_seconds += max(0.0, sum(slower) - len(slower) * min(without, with_it))
        self.value = without / with_it if with_it else 1.0
        self._choose(pays)

    def _choose(self, pays: bool) -> None:
        is_new = pays != self._chosen
        self.num_switches += is_new
        # On, a mistake would cost; off, it does not.
        restarts = pays or is_new
        self._pause = self._FIRST_PAUSE if restarts else min(2 * self._pause, self._LONGEST_PAUSE)
        self._chosen, self._num_paused, self._windows = pays, 0, []
