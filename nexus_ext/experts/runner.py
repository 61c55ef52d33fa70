"""Runs the selections of a model's layers: cache, predictor and clock together.

    run(layer, experts) ──▶ cache.run ──▶ compute
            └─ meanwhile: what will the next layer want? ──▶ cache.fetch_ahead

Owns the store, the cache and what is learnt of the routes. Experts are numbered within their layer
outside, and over all layers (keys) inside.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from nexus_ext.checkpoint import Checkpoint, Entry
from nexus_ext.engine import Faults
from nexus_ext.errors import ConfigError, WriteError
from nexus_ext.experts.budget import Division
from nexus_ext.experts.cache import ExpertCache
from nexus_ext.experts.find import ExpertLayer
from nexus_ext.experts.policy import make_policy
from nexus_ext.experts.predict import Admission, Predictor, Trial
from nexus_ext.experts.stats import ExpertStats
from nexus_ext.experts.store import ExpertStore
from nexus_ext.memory import available_bytes, should_prefault
from nexus_ext.mode import Choice

__all__ = ["ExpertRunner"]

# Where nobody says how many positions a pass has, this many tokens are a prefill.
_PREFILL_TOKENS = 32
_HOTNESS_FORMAT = "nexus-hotness/1"


class RouteLog(Protocol):
    """Where selections are recorded."""

    def append(
        self, layer: int, keys: Sequence[int], num_tokens: int, *, is_prefill: bool
    ) -> None: ...


class ExpertRunner:
    """The experts of one streamed model.

    Attributes:
        layers: The keys of each layer's experts.
        cache, store, policy: Its parts.
        routes: Where selections are recorded, or None.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[ExpertLayer],
        division: Division,
        choice: Choice,
        gates: Sequence[Entry | None],
        *,
        faults: Faults | None = None,
    ) -> None:
        """Open the files, take the memory, and begin to load what is likely to be wanted.

        Args:
            checkpoint: Where the experts are.
            layers: Which there are.
            division: Slots and settings.
            choice: How to read.
            gates: Each layer's router, where it is known and plain.
            faults: Test hook.

        Raises:
            ConfigError: A policy or a hotness file that cannot be.
            BudgetError, ReadError, CheckpointChanged: As the store.
        """
        config = division.config
        self._config = config
        self._checkpoint = checkpoint
        self._slots = division.slots
        self.layers = _key_ranges(layers)
        layer_of = [number for number, keys in enumerate(self.layers) for _ in keys]
        self.policy = make_policy(config.expert_policy, layer_of)
        if config.expert_hotness is not None:
            self._restore_hotness(config.expert_hotness)
        self.store = ExpertStore(
            checkpoint,
            division.classes,
            division.slots,
            choice,
            division.device,
            verify=config.verify,
            faults=faults,
        )
        try:
            self.cache = ExpertCache(
                self.store, self.policy, self.layers, division.slots.num_passing
            )
            self._prepare(choice, gates)
        except BaseException:
            self.store.close()
            raise

    def _prepare(self, choice: Choice, gates: Sequence[Entry | None]) -> None:
        self._expert_bytes = _mean_bytes(self.store, self._slots)
        self._gates = self._read_gates(gates) if self._config.expert_predict != "off" else []
        self._predictor = Predictor([len(keys) for keys in self.layers])
        self._admission = Admission(
            bandwidth=choice.rates.disk_bytes_per_second, expert_bytes=self._expert_bytes
        )
        self._trial = Trial(mode=self._config.expert_predict)
        self._last_layer: float = math.inf
        self._is_announced = False
        self._num_positions: int | None = None
        self._token_began: float | None = None
        self._decode_seconds: deque[float] = deque(maxlen=512)
        self._tables: dict[int, torch.Tensor] = {}
        self.num_syncs = 0
        self.routes: RouteLog | None = None
        if self.store.num_views and choice.mode.io == "mmap":
            self._prefault()
        self.cache.preload(self._likely())

    # -- what a layer calls --------------------------------------------------------------------

    def run(
        self,
        layer: int,
        hidden: torch.Tensor,
        experts: Sequence[int],
        compute: Callable[[Sequence[int]], None],
    ) -> None:
        """Have `compute` called with all of `experts` (numbers within the layer), as they land."""
        begins = layer <= self._last_layer
        self._last_layer = layer
        if begins and not self._is_announced:
            # So it is when the model is compiled as a whole. The last pass says nothing of this.
            self._num_positions = None
        self._is_announced = False
        if not experts:  # no tokens
            return
        first = self.layers[layer].start
        keys = [first + expert for expert in experts]
        is_prefill = self._is_prefill(len(hidden))
        self.num_syncs += hidden.is_cuda
        if self.routes is not None:
            self.routes.append(layer, keys, len(hidden), is_prefill=is_prefill)
        if begins:
            self._begin_token(is_prefill)
        learns = not is_prefill and self._trial.is_on
        if learns and not begins:
            self._admission.note_idle(time.perf_counter() - self.cache.idle_since)
        num_read = self.cache.num_read
        self.cache.run(
            layer,
            keys,
            lambda landed: compute([key - first for key in landed]),
            is_prefill=is_prefill,
            meanwhile=(lambda: self._look_ahead(layer, hidden)) if learns else None,
        )
        if not is_prefill:
            self._admission.note_missed(layer, self.cache.num_read - num_read)
        if learns:
            self._predictor.observe(layer, experts)

    def tensors(self, layer: int, expert: int) -> Mapping[str, torch.Tensor]:
        """An expert's tensors by name, while `run` computes it."""
        key = self.layers[layer].start + expert
        return self.store.tensors(key, self.cache.slot_of[key])

    def slot(self, layer: int, expert: int) -> int:
        """The slot of an expert that has landed."""
        return self.cache.slot_of[self.layers[layer].start + expert]

    def slot_table(self, layer: int) -> torch.Tensor | None:
        """The slot of each expert of a layer [num_experts], where all are there and stay.

        Blocks until they are, the first time.
        """
        if layer not in self._tables:
            keys = self.layers[layer]
            if not self.cache.all_stay(keys):
                return None
            table = torch.tensor([self.cache.slot_of[key] for key in keys])
            self._tables[layer] = table.to(self.store.device.torch_device)
        return self._tables[layer]

    def begin_pass(self, num_positions: int | None) -> None:
        """A forward of the model begins, over so many positions of each sequence, if known."""
        self._num_positions = num_positions
        self._is_announced = True

    def _is_prefill(self, num_tokens: int) -> bool:
        if self._num_positions is not None:
            return self._num_positions > 1
        return num_tokens > _PREFILL_TOKENS

    def _begin_token(self, is_prefill: bool) -> None:
        """The clock that says whether guessing pays."""
        now = time.perf_counter()
        before, self._token_began = self._token_began, None if is_prefill else now
        if before is not None and not is_prefill:
            self._decode_seconds.append(now - before)
            self._trial.step(now - before)

    def _look_ahead(self, layer: int, hidden: torch.Tensor) -> None:
        """Fetch what the next layer will want, as far as the disk has time."""
        following = layer + 1
        if following == len(self.layers) or not self._admission.is_worth_asking(following):
            return
        keys = self.layers[following]
        count = round(self._admission.allow() / self._expert_bytes)
        if count == 0 or all(self.cache.slot_of[key] >= 0 for key in keys):
            return
        gate = self._gates[following]
        scores = None if gate is None else hidden.to("cpu", gate.dtype) @ gate.t()
        chance = self._predictor.guess(following, scores)
        likely = (chance > _LIKELY).nonzero().flatten().tolist()
        likely.sort(key=chance.tolist().__getitem__, reverse=True)
        self.cache.fetch_ahead([keys.start + expert for expert in likely], count)

    # -- restart-warm --------------------------------------------------------------------------

    def save_hotness(self, path: str | Path) -> None:
        """Write what is known of the routes, as JSON: a later start preloads the hottest experts.

        Raises:
            WriteError: The file cannot be written.
        """
        content = {
            "format": _HOTNESS_FORMAT,
            "policy": self.policy.name,
            "experts": [len(keys) for keys in self.layers],
            "state": self.policy.state(),
        }
        try:
            Path(path).write_text(json.dumps(content))
        except OSError as error:
            raise WriteError(
                f"A hotness file must be writable; {path}: {error}. Name another path."
            ) from error

    def _restore_hotness(self, path: Path) -> None:
        rule = "expert_hotness must name a file that nexus_ext.save_hotness wrote for this model"
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{rule}; {path}: {error}. Leave it out for a cold start.") from error
        wanted = (_HOTNESS_FORMAT, self.policy.name, [len(keys) for keys in self.layers])
        found = None
        if isinstance(content, dict) and isinstance(content.get("state"), dict):
            found = (content.get("format"), content.get("policy"), content.get("experts"))
        if found != wanted:
            raise ConfigError(
                f"{rule} and this policy; {path} has {found}, wanted {wanted}. Leave it out for a "
                "cold start, or choose the policy it was written with."
            )
        self.policy.restore(content["state"])

    def _likely(self) -> list[int]:
        """Experts in the order in which they should be there; without knowledge, some of each
        layer.
        """
        num_keys = self.layers[-1].stop
        if self._config.expert_hotness is not None:
            return self.policy.hottest(num_keys)
        deepest = max(map(len, self.layers))
        return [keys[n] for n in range(deepest) for keys in self.layers if n < len(keys)]

    # -- setting up ------------------------------------------------------------------------------

    def _read_gates(self, entries: Sequence[Entry | None]) -> list[torch.Tensor | None]:
        known = [entry for entry in entries if entry is not None]
        read = iter(self.store.read(known))
        return [None if entry is None else next(read) for entry in entries]

    def _prefault(self) -> None:
        nbytes = sum(file.stamp.size for file in self._checkpoint.files)
        wanted, _ = should_prefault(self._config.prefault, nbytes, available_bytes())
        if wanted:
            self.store.engine.prefault(background=True)

    def stats(self) -> ExpertStats:
        """A snapshot."""
        seconds = list(self._decode_seconds)
        return ExpertStats.of(
            self.cache.counts,
            self.store.stats(),
            self._slots,
            policy=self.policy.name,
            num_present=self.cache.num_present,
            num_views=self.store.num_views,
            num_syncs=self.num_syncs,
            is_predicting=self._trial.is_on,
            prediction_value=self._trial.value,
            prediction_switches=self._trial.num_switches,
            seconds_per_token=statistics.median(seconds) if seconds else 0.0,
        )

    def close(self) -> None:
        """May be called twice."""
        self.store.close()


# Guesses below this are not worth a read.
_LIKELY = 0.5


def _key_ranges(layers: Sequence[ExpertLayer]) -> list[range]:
    ranges, end = [], 0
    for layer in layers:
        ranges.append(range(end, end + len(layer.experts)))
        end += len(layer.experts)
    return ranges


def _mean_bytes(store: ExpertStore, slots: Any) -> int:
    total = sum(slots.slot_bytes[index] for index in store.class_of)
    return int(total // len(store.class_of))
