"""How fast a mixture of experts runs when some of its experts fit, by strategy and budget.

    mmap           pages of the file, left to the page cache: the baseline
    residency-lru  pages of the file, given back behind what was used
    direct         memory of our own, read past the page cache ("nommap")
    buffered       memory of our own, read through the page cache and given back

For every strategy and budget a process streams the model, and one beside it has all of it in
memory. Both are told the same tokens in turn, a segment of one and a segment of the other, so that
a noisy machine is noisy for both; figures are medians of these segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from nexus_ext.bench import drop_page_cache, machine
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.engine import ReadMode, cached_bytes, measure_read
from nexus_ext.errors import ConfigError, StreamError
from nexus_ext.expert_arms import RESIDENT_IMPLEMENTATION, ExpertArm, ExpertSpec
from nexus_ext.expert_figures import COLUMNS, Measured, memory_of, rounds_of, summarize
from nexus_ext.expert_work import Work
from nexus_ext.experts.find import find_experts
from nexus_ext.hub import locate
from nexus_ext.memory import available_bytes, default_budget, format_bytes, parse_bytes
from nexus_ext.pretrained import build_empty

__all__ = [
    "DEFAULT_BUDGETS",
    "STRATEGIES",
    "Bench",
    "bench_experts",
    "parse_budgets",
]

# Options of `stream` behind each name.
STRATEGIES: dict[str, dict[str, Any]] = {
    "mmap": {"io": "mmap", "trailing_drop": False},
    "residency-lru": {"io": "mmap", "trailing_drop": True},
    "direct": {"io": "direct"},
    "buffered": {"io": "buffered"},
}
# Pages that are given back would have to come from the disk the next time.
_WARM_OPTIONS: dict[str, dict[str, Any]] = {"buffered": {"trailing_drop": False}}
DEFAULT_BUDGETS = "5,10,20,40,60,80,100%"
_RATE_BYTES = 1 << 30
# Dense weights are resident beside any budget of experts; this much is for padding.
_ROOM_BYTES = 64 << 20


class Bench:
    """A model, the tokens it is told, and arms that are measured in turn."""

    def __init__(self, model: str | Path, work: Work) -> None:
        self.path = locate(model)
        self.work = work
        self.checkpoint = Checkpoint.open(self.path)
        self.files = [file.path for file in self.checkpoint.files]

    def stream(self, options: Mapping[str, Any], memory_limit: int | None = None) -> ExpertArm:
        """Start a process that streams the model, with `options` of `stream`.

        Raises:
            StreamError: The model has no experts that can be streamed.
            NexusError: As `from_pretrained`.
        """
        roomy = {"budget": self.checkpoint.nbytes + self.checkpoint.nbytes // 8 + _ROOM_BYTES}
        return ExpertArm(
            self._spec("streamed_experts", roomy | dict(options)), self.files, memory_limit
        )

    def check_experts(self) -> None:
        """Look for experts in headers alone.

        Raises:
            StreamError: The model has none that can be streamed.
        """
        model = build_empty(self.path, self.checkpoint)
        if not find_experts(model, self.checkpoint):
            raise StreamError(
                f"This benchmark is for models with experts that transformers can dispatch; "
                f"{type(model).__name__} has none. Use `nexus bench`."
            )

    def resident(self) -> ExpertArm:
        """Start a process that has all of the model in memory."""
        return ExpertArm(self._spec("resident_experts", {}), self.files)

    def why_not_resident(self) -> str | None:
        """Why the whole model cannot be beside a streamed one; None if it can."""
        room = default_budget(available_bytes())
        if self.checkpoint.nbytes <= room:
            return None
        return f"it has {format_bytes(self.checkpoint.nbytes)}, {format_bytes(room)} are free"

    def set_pages(self) -> None:
        """The files' pages as they shall be when an arm begins."""
        drop_page_cache(self.files)
        if self.work.is_warm:
            for file in self.files:
                _read_through(file)

    def cached_bytes(self) -> int:
        """Of the model's files, in the page cache now."""
        return sum(max(0, cached_bytes(str(file))) for file in self.files)

    def disk_bytes_per_second(self) -> float:
        """Measured now, with direct reads of the largest file."""
        largest = max(self.files, key=lambda file: file.stat().st_size)
        return float(measure_read(str(largest), ReadMode("direct"), _RATE_BYTES)["gbps"]) * 1e9

    def measure(self, arms: Mapping[str, ExpertArm]) -> dict[str, Measured]:
        """All prefills, then all tokens, each arm in its turn; every second round backwards."""
        # What only a process's first forward costs is no arm's speed.
        found = {name: Measured(arm.call("prefill")) for name, arm in arms.items()}
        for number in range(self.work.num_prefills):
            for name, arm in _in_turn(arms, number):
                if arm.is_streamed:
                    arm.call("settle")
                    self.set_pages()
                found[name].prefills.append(arm.call("prefill"))
        for arm in arms.values():
            if arm.is_streamed:
                arm.call("begin_record")
        for number, num_tokens in enumerate(self.work.segments):
            for name, arm in _in_turn(arms, number):
                found[name].segments.append(arm.call("decode", num_tokens))
        for name, arm in arms.items():
            found[name].logits = arm.call("logits")
            if arm.is_streamed:
                found[name].record = arm.call("end_record")
        return found

    def _spec(self, kind: str, options: dict[str, Any]) -> ExpertSpec:
        return ExpertSpec(kind, self.path, self.work.num_prompt, options, self.work.ids)


def bench_experts(
    model: str | Path,
    *,
    work: Work,
    budgets: str | Sequence[str | int] = DEFAULT_BUDGETS,
    strategies: Sequence[str] = ("direct",),
    policy: str = "reuse",
    predict: str = "auto",
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Measure prefill and decoding under every budget with every strategy. Blocks for minutes.

    Args:
        model: Folder or hub id of a mixture-of-experts model.
        work: What every arm does.
        budgets: Bytes for experts, or shares of them all: "10,50,100%" or "1GiB,2GiB".
        strategies: Names of `STRATEGIES`.
        policy, predict: As `expert_policy` and `expert_predict` of `stream`.
        progress: Told what is going on.

    Returns:
        What was asked for, `machine`, and in `lines` one entry for each strategy and budget; what
        `columns` does not explain is bytes, seconds, tokens a second or 1e9 bytes a second.

    Raises:
        ConfigError: No such strategy or budget, or tokens that the model does not have.
        StreamError: The model has no experts that can be streamed.
    """
    parsed = parse_budgets(budgets) if isinstance(budgets, str) else list(budgets)
    options = {name: _options_of(name, work, policy, predict) for name in strategies}
    bench = Bench(model, work)
    lines: list[dict[str, Any]] = []
    resident: ExpertArm | None = None
    bench.check_experts()
    why = bench.why_not_resident()
    with ExitStack() as stack:
        if why is None:
            progress("loading: resident")
            resident = stack.enter_context(bench.resident())
        for strategy, budget in _pairs(options, parsed):
            progress(f"{strategy}, {_budget_text(budget)} for experts")
            line = {"strategy": strategy, "budget": budget, "options": options[strategy]}
            streamed = options[strategy] | {"expert_budget": budget}
            lines.append(line | _line(bench, streamed, resident))
    return {
        "model": bench.path.name,
        "model_bytes": bench.checkpoint.nbytes,
        **work.describe(),
        "policy": policy,
        "predict": predict,
        "resident": f"skipped: {why}" if why else RESIDENT_IMPLEMENTATION,
        "lines": lines,
        "columns": COLUMNS,
        "machine": machine() | {"transformers": version("transformers")},
    }


# -- one line --------------------------------------------------------------------------------------


def _line(bench: Bench, options: dict[str, Any], resident: ExpertArm | None) -> dict[str, Any]:
    bench.set_pages()
    cached_before = bench.cached_bytes()
    rates = [bench.disk_bytes_per_second()]
    with bench.stream(options) as arm:
        found = bench.measure({"streamed": arm} | ({"resident": resident} if resident else {}))
        rates.append(bench.disk_bytes_per_second())
        return {
            **summarize(bench.work, arm, found["streamed"], found.get("resident"), mean(rates)),
            **memory_of(arm, cached_before),
            "rounds": {name: rounds_of(one) for name, one in found.items()},
        }


# -- what is asked for -----------------------------------------------------------------------------


def parse_budgets(text: str) -> list[str | int]:
    """Budgets of a list: shares as text ("10%"), bytes as numbers.

    A number without a unit has that of the next one that has one: "5,10,20%", "8,16GiB".

    Raises:
        ConfigError: One is no size and no share above 0 % and up to 100 %, or none is there.
    """
    rule = "budgets are shares ('5,10,50%') or sizes ('1GiB,2GiB') with commas"
    found: list[str | int] = []
    unit = ""
    for item in reversed([item.strip() for item in text.split(",")]):
        number = item.rstrip("%KMGTPEkmgtpeiIbB ")
        unit = item[len(number) :].strip() or unit
        try:
            found.append(_budget(number, unit))
        except (ConfigError, ValueError):
            raise ConfigError(
                f"{rule}, shares above 0 % and up to 100 %; got {item!r} in {text!r}."
            ) from None
    return found[::-1]


def _budget(number: str, unit: str) -> str | int:
    if unit != "%":
        nbytes = parse_bytes(f"{number}{unit}")
        if nbytes == 0:
            raise ValueError("nothing")
        return nbytes
    if not 0 < float(number) <= 100:
        raise ValueError("no share")
    return f"{number}%"


def _options_of(strategy: str, work: Work, policy: str, predict: str) -> dict[str, Any]:
    if strategy not in STRATEGIES:
        raise ConfigError(f"A strategy is one of {', '.join(STRATEGIES)}; got {strategy!r}.")
    warm = _WARM_OPTIONS.get(strategy, {}) if work.is_warm else {}
    return STRATEGIES[strategy] | warm | {"expert_policy": policy, "expert_predict": predict}


def _pairs(
    options: Mapping[str, Any], budgets: Sequence[str | int]
) -> Iterator[tuple[str, str | int]]:
    return ((strategy, budget) for strategy in options for budget in budgets)


def _budget_text(budget: str | int) -> str:
    return format_bytes(budget) if isinstance(budget, int) else budget


def _in_turn(arms: Mapping[str, ExpertArm], number: int) -> list[tuple[str, ExpertArm]]:
    turns = list(arms.items())
    return turns[::-1] if number % 2 else turns


def _read_through(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(8 << 20)
        while file.readinto(buffer):
            pass
