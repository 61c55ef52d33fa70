"""Arms of `nexus bench-experts`: a process each, fed the same tokens, its memory watched.

resident_experts  transformers' own model in memory of its own
streamed_experts  the model as nexus streams it

Both are told which tokens come: greedy tokens of two programs may part, and then they route apart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nexus_ext.arms import KINDS, Arm, ArmSpec, _model_class, _Runner
from nexus_ext.engine import cached_bytes
from nexus_ext.errors import ConfigError
from nexus_ext.experts.replay import belady
from nexus_ext.experts.routes import Route, RouteTrace
from nexus_ext.module import close, plan_of, stats
from nexus_ext.pretrained import from_pretrained

__all__ = ["RESIDENT_IMPLEMENTATION", "ExpertArm", "ExpertSpec", "own_bytes"]

RESIDENT_IMPLEMENTATION = "grouped_mm"
# Looking must not be seen in the figures: at most this share of the time.
_WATCHING_SHARE = 0.01
_WATCH_SECONDS = 0.05


@dataclass(frozen=True)
class ExpertSpec(ArmSpec):
    """`ids` are the tokens of each sequence; the first `num_tokens` of each are the prompt."""

    ids: tuple[tuple[int, ...], ...] = field(default=(), repr=False)


class ExpertArm(Arm):
    """The parent's handle; what its process holds is looked at while an answer is awaited.

    Attributes:
        peak_own_bytes: Most anonymous and shared memory of the process, above its start.
        peak_cached_bytes: Most of the model's files in the page cache.
    """

    def __init__(self, spec: ExpertSpec, files: list[Path], memory_limit: int | None = None):
        self._files = files
        self._own: list[int] = []
        self.peak_cached_bytes = 0
        self._pause = _WATCH_SECONDS
        super().__init__(spec, memory_limit)

    def __enter__(self) -> ExpertArm:
        return self

    @property
    def is_streamed(self) -> bool:
        return "slot_bytes" in self.facts

    @property
    def peak_own_bytes(self) -> int:
        return max(0, max(self._own, default=0) - int(self.facts["start_bytes"]))

    def call(self, name: str, *arguments: Any) -> Any:
        """A method of the process's runner."""
        return self._ask(name, *arguments)

    def watch(self) -> None:
        """Look once."""
        began = time.perf_counter()
        self._own.append(own_bytes(self._process.pid))
        cached = sum(max(0, cached_bytes(str(file))) for file in self._files)
        self.peak_cached_bytes = max(self.peak_cached_bytes, cached)
        took = time.perf_counter() - began
        self._pause = max(_WATCH_SECONDS, took / _WATCHING_SHARE)

    def _receive(self) -> Any:
        while not self._pipe.poll(self._pause) and self._process.is_alive():
            self.watch()
        answer = super()._receive()
        self.watch()
        return answer


def own_bytes(pid: int | None = None) -> int:
    """Anonymous and shared memory of a process now; 0 when it has ended."""
    return _status_bytes("RssAnon:", "RssShmem:", pid=pid)


def _status_bytes(*names: str, pid: int | None = None) -> int:
    try:
        lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))


# -- in the process ------------------------------------------------------------------------------


class _Forced(_Runner):
    """A model that is told its tokens: a prompt in one pass, then one token of each sequence."""

    def __init__(self, spec: ArmSpec) -> None:
        assert isinstance(spec, ExpertSpec)
        # The model's code is loaded before the start is weighed.
        _model_class(spec.path)
        start_bytes = own_bytes()
        super().__init__(spec)
        vocabulary = self.model.config.get_text_config().vocab_size
        self._ids = torch.tensor(spec.ids)
        if self._ids.min() < 0 or self._ids.max() >= vocabulary:
            raise ConfigError(
                f"Token ids must be below the vocabulary's {vocabulary}, got "
                f"{int(self._ids.min())} to {int(self._ids.max())}. Take ids of this model."
            )
        self._ids = self._ids.to(self.prompt.device)
        self._num_prompt = spec.num_tokens
        self._position = 0
        self._cache: Any = None
        self._logits = torch.empty(0)
        self.facts["start_bytes"] = start_bytes

    def prefill(self) -> dict[str, float]:
        """The prompt, in one pass from nothing."""
        self._cache, self._position = None, 0
        return self._timed_steps(1, self._num_prompt)

    def decode(self, num_tokens: int) -> dict[str, float]:
        """The next tokens of every sequence, one at a time."""
        return self._timed_steps(num_tokens, 1)

    def _timed_steps(self, num_steps: int, num_positions: int) -> dict[str, float]:
        before, began = self._counters(), time.perf_counter()
        for _ in range(num_steps):
            self._step(num_positions)
        self._synchronize()
        seconds, after = time.perf_counter() - began, self._counters()
        return {"seconds": seconds} | {key: after[key] - before[key] for key in before}

    def _step(self, num_positions: int) -> None:
        end = self._position + num_positions
        with torch.inference_mode():
            result = self.model(
                input_ids=self._ids[:, self._position : end],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache, self._position = result.past_key_values, end
        self._logits = result.logits[:, -1]

    def _synchronize(self) -> None:
        if self._ids.is_cuda:
            torch.cuda.synchronize()

    def logits(self) -> list[list[float]]:
        """Of the last step, for each sequence."""
        return self._logits.float().tolist()

    def _counters(self) -> dict[str, float]:
        return {"disk_bytes": _disk_bytes()}


class _ResidentExperts(_Forced):
    def _load(self, spec: ArmSpec) -> Any:
        kind = _model_class(spec.path)
        model = kind.from_pretrained(
            spec.path, dtype="auto", experts_implementation=RESIDENT_IMPLEMENTATION
        )
        if torch.device(spec.options.get("device", "cpu")).type == "cpu":
            # What loading has left mapped would be counted as the streamed model's page cache.
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        return model.to(spec.options.get("device", "cpu")).eval()


class _StreamedExperts(_Forced):
    def _load(self, spec: ArmSpec) -> Any:
        return from_pretrained(spec.path, **spec.options)

    def __init__(self, spec: ArmSpec) -> None:
        super().__init__(spec)
        self._runner = self.model._nexus.experts.runner
        self._record = Record((), [])
        self._before = self._expert_counters()
        plan: Any = plan_of(self.model)
        self._sizes = [plan.experts.slot_bytes[c] for c in self._runner.store.class_of]
        self.facts |= {
            "expert_bytes": sum(self._sizes),
            "num_experts": len(self._sizes),
            "slot_bytes": plan.experts.nbytes,
            "staying_bytes": _staying_bytes(plan.experts),
            "dense_bytes": plan.device_bytes - plan.experts.nbytes,
        }
        self.settle()

    def settle(self) -> None:
        """Wait for what is loaded in advance: its time is that of loading the model."""
        self._runner.cache.wait()

    def decode(self, num_tokens: int) -> dict[str, float]:
        # While others had their turn nothing was decoded: that is no token's time.
        self._runner._token_began = None
        return super().decode(num_tokens)

    def _counters(self) -> dict[str, float]:
        return super()._counters() | {"bytes_read": stats(self.model).experts.bytes_read}

    def _expert_counters(self) -> dict[str, float]:
        now = asdict(stats(self.model).experts)
        return {
            name: value
            for name, value in now.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    def begin_record(self) -> None:
        """From now on routes are recorded, and counters begin anew."""
        present = [key for key, slot in enumerate(self._runner.cache.slot_of) if slot >= 0]
        self._record = Record(tuple(present), self._sizes)
        self._runner.routes = self._record
        self._before = self._expert_counters()

    def end_record(self) -> dict[str, Any]:
        """Since `begin_record`: how counters grew, and what knowing all routes would have saved."""
        self._runner.routes = None
        after = self._expert_counters()
        grown = {name: after[name] - self._before.get(name, 0) for name in after}
        return grown | {
            "num_selected": self._record.num_selected,
            "belady_hits": self._record.belady(self.facts["slot_bytes"]),
            "belady_staying_hits": self._record.belady(self.facts["staying_bytes"]),
        }

    def report(self) -> dict[str, Any]:
        counters = {"stats": asdict(stats(self.model)), "locked_bytes": _status_bytes("VmLck:")}
        return super().report() | counters

    def close(self) -> None:
        """The model streams no more."""
        close(self.model)


def _staying_bytes(slots: Any) -> int:
    classes = zip(slots.num_slots, slots.num_passing, slots.slot_bytes, strict=True)
    return sum((count - passing) * nbytes for count, passing, nbytes in classes)


class Record:
    """Routes as they come, and who was there before the first."""

    def __init__(self, present: Sequence[int], sizes: Sequence[int]) -> None:
        self._present = tuple(present)
        self._sizes = sizes
        self._routes: list[Route] = []

    def append(self, layer: int, keys: Sequence[int], num_tokens: int, *, is_prefill: bool) -> None:
        self._routes.append(Route(layer, tuple(keys), num_tokens, is_prefill))

    @property
    def num_selected(self) -> int:
        return sum(len(route.keys) for route in self._routes)

    def belady(self, capacity_bytes: int) -> int | None:
        """The most hits that any policy can have with so many bytes, beginning with who was there.

        They are given to it as one forward before all others, whose misses do not count. None
        where sizes differ: then the fewest bytes and the most hits are two things.
        """
        if len(set(self._sizes)) > 1:
            return None
        trace = RouteTrace(
            {0: len(self._sizes)},
            [[Route(0, self._present)], self._routes],
            self._sizes,
        )
        return belady(trace, capacity_bytes).hits


KINDS["resident_experts"] = _ResidentExperts
KINDS["streamed_experts"] = _StreamedExperts


def _disk_bytes() -> int:
    """What this process had read from disks, page cache misses included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
