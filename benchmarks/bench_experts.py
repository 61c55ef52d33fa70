"""The targets of a mixture of experts that streams, each measured once on a model made here.

    from_ram     decoding at 80 % of the experts' bytes, files in the page cache, over the resident
    from_disk    the same past the page cache, at every budget: speed, slack, hits, page cache
    prefill      a long prompt, where compute is the bound
    limited      the same budget under a memory limit and without one
    exceeds_ram  a prompt through a model that exceeds the memory limit: own memory against mmap
    predict      fetching ahead against not

Prints what is wanted beside what was measured, and writes both. A missed target is no error. Arms
that are compared are processes that take turns; a figure is the median of their ratios, turn by
turn. Without --json the model is left where it is, and the next run finds it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from nexus_ext.bench import machine
from nexus_ext.bench_experts import Bench, bench_experts
from nexus_ext.config import home_folder
from nexus_ext.errors import ConfigError
from nexus_ext.expert_figures import Measured
from nexus_ext.expert_report import check_can_plot, experts_tables, plot_experts
from nexus_ext.expert_work import Work
from nexus_ext.limit import MemoryLimit
from nexus_ext.memory import format_bytes

# Python may have been told not to look beside the script.
sys.path.insert(0, str(Path(__file__).parent))
from make_moe import GIB, Shape, make_moe

MIB = 1 << 20
# What a process needs besides weights: interpreter, torch, activations, the kernel's own.
PROCESS_BYTES = 1 * GIB
TOY = {"hidden": 64, "intermediate": 32, "vocabulary": 256, "experts": 8, "top_k": 2}
console = Console(stderr=True)


@dataclass(frozen=True)
class Protocol:
    """How long each part is."""

    num_prompt: int = 512
    num_new: int = 128
    segment_tokens: int = 16
    num_prefills: int = 3
    long_prompt: int = 2048
    budgets: str = "5,10,20,40,60,80,100%"
    prefill_budgets: str = "40,80%"
    ram_strategies: tuple[str, ...] = ("mmap", "buffered")
    policy: str = "reuse"

    def work(self, path: Path, **others: Any) -> Work:
        settings: dict[str, Any] = {
            "num_prompt": self.num_prompt,
            "num_new": self.num_new,
            "segment_tokens": self.segment_tokens,
            "num_prefills": self.num_prefills,
        }
        return Work.of(path, **(settings | others))


TOY_PROTOCOL = Protocol(32, 8, 4, 1, 64, "80%", "80%", ("mmap",))


@dataclass(frozen=True)
class Target:
    """One wanted figure. `got` is None where it could not be measured: `note` says why."""

    part: str
    what: str
    wanted: str
    got: float | None
    is_met: bool | None
    note: str = ""


def at_least(part: str, what: str, wanted: float, got: float | None, note: str = "") -> Target:
    return Target(part, what, f">= {wanted:g}", got, None if got is None else got >= wanted, note)


def at_most(part: str, what: str, wanted: float, got: float | None, note: str = "") -> Target:
    return Target(part, what, f"<= {wanted:g}", got, None if got is None else got <= wanted, note)


Result = tuple[list[Target], Any]


# -- the parts -------------------------------------------------------------------------------------


def from_ram(path: Path, protocol: Protocol) -> Result:
    found = bench_experts(
        path,
        work=protocol.work(path, is_warm=True),
        budgets="80%",
        strategies=protocol.ram_strategies,
        policy=protocol.policy,
        progress=console.print,
    )
    Console().print(*experts_tables(found))
    return [
        at_least("from_ram", f"decode / resident, {one['strategy']}, 80 %", 0.90, _ratio(one))
        for one in found["lines"]
    ], found


def from_disk(path: Path, protocol: Protocol) -> Result:
    found = bench_experts(
        path,
        work=protocol.work(path),
        budgets=protocol.budgets,
        strategies=["direct"],
        policy=protocol.policy,
        progress=console.print,
    )
    Console().print(*experts_tables(found))
    return list(_targets_from_disk(found["lines"])), found


def _ratio(line: dict[str, Any]) -> float | None:
    return line["decode_ratio"]


def _targets_from_disk(lines: list[dict[str, Any]]) -> Iterator[Target]:
    part = "from_disk"
    for line in lines:
        at = line["budget"]
        if at == "80%":
            yield at_least(part, "decode / resident, direct, 80 %", 0.85, _ratio(line))
        yield at_most(part, f"step / max(compute, miss / disk), {at}", 1.35, line["slack_x"])
        if line["num_staying"] < line["num_experts"]:
            got = line["policy_over_belady"]
            yield at_least(part, f"policy / Belady, {at}", 0.90, got)
    growth = max(line["file_backed_bytes"] for line in lines)
    yield at_most(part, "page cache growth, MiB", 64, growth / MIB)


def prefill(path: Path, protocol: Protocol) -> Result:
    found = bench_experts(
        path,
        work=protocol.work(path, num_prompt=protocol.long_prompt, num_new=protocol.segment_tokens),
        budgets=protocol.prefill_budgets,
        strategies=["direct"],
        policy=protocol.policy,
        progress=console.print,
    )
    Console().print(*experts_tables(found))
    return [
        at_least(
            "prefill",
            f"prefill of {protocol.long_prompt} / resident, {one['budget']}",
            0.95,
            one["prefill_ratio"],
        )
        for one in found["lines"]
    ], found


def limited(path: Path, protocol: Protocol) -> Result:
    what = "decode under a limit / without, direct, 40 %"
    if why := _why_no_limit():
        return [at_least("limited", what, 0.95, None, why)], None
    bench = Bench(path, protocol.work(path))
    options = {"io": "direct", "expert_budget": "40%", "expert_policy": protocol.policy}
    limit = _limit_for(bench, 0.4)
    bench.set_pages()
    with bench.stream(options, limit) as small, bench.stream(options) as free:
        found = bench.measure({"limited": small, "free": free})
    note = f"limit {format_bytes(limit)}"
    got = _over(found["free"], found["limited"], "segments")
    return [at_least("limited", what, 0.95, got, note)], _seconds(found) | {"limit_bytes": limit}


def exceeds_ram(path: Path, protocol: Protocol) -> Result:
    what = "prefill in own memory / mmap, 20 %"
    if why := _why_no_limit():
        return [at_least("exceeds_ram", what, 2.0, None, why)], None
    bench = Bench(path, protocol.work(path))
    limit = _limit_for(bench, 0.2)
    if limit >= bench.checkpoint.nbytes:
        why = f"the model has {format_bytes(bench.checkpoint.nbytes)}, no more than a process needs"
        return [at_least("exceeds_ram", what, 2.0, None, why)], None
    common = {"expert_budget": "20%", "expert_policy": protocol.policy}
    bench.set_pages()
    with (
        bench.stream(common | {"io": "direct"}, limit) as direct,
        bench.stream(common | {"io": "mmap", "trailing_drop": False}, limit) as mapped,
    ):
        found = bench.measure({"direct": direct, "mmap": mapped})
    decode = _over(found["mmap"], found["direct"], "segments")
    note = f"limit {format_bytes(limit)}; decode {decode:.2f}x"
    got = _over(found["mmap"], found["direct"], "prefills")
    return [at_least("exceeds_ram", what, 2.0, got, note)], _seconds(found) | {"limit_bytes": limit}


def predict(path: Path, protocol: Protocol) -> Result:
    # Long enough that what is tried at the start, to see whether it pays, is little of it.
    work = protocol.work(path, num_new=4 * protocol.num_new, num_prefills=1)
    bench = Bench(path, work)
    bench.set_pages()
    options = {"io": "direct", "expert_budget": "40%", "expert_policy": protocol.policy}
    with (
        bench.stream(options | {"expert_predict": "off"}) as off,
        bench.stream(options | {"expert_predict": "on"}) as on,
        bench.stream(options | {"expert_predict": "auto"}) as auto,
    ):
        found = bench.measure({"off": off, "on": on, "auto": auto})
        last = auto.report()["stats"]["experts"]
    note = f"switched {last['prediction_switches']} times, value {last['prediction_value']}"
    return [
        at_least(
            "predict", "decode, auto / off, 40 %", 0.99, _over(found["off"], found["auto"]), note
        ),
        at_least("predict", "decode, on / off, 40 %", 0.99, _over(found["off"], found["on"])),
    ], _seconds(found) | {"records": {name: one.record for name, one in found.items()}}


PARTS: dict[str, Callable[[Path, Protocol], Result]] = {
    "from_ram": from_ram,
    "from_disk": from_disk,
    "prefill": prefill,
    "limited": limited,
    "exceeds_ram": exceeds_ram,
    "predict": predict,
}


def _over(slow: Measured, fast: Measured, what: str = "segments") -> float:
    """How many times as fast, round by round."""
    pairs = zip(getattr(slow, what), getattr(fast, what), strict=True)
    return median(a["seconds"] / b["seconds"] for a, b in pairs)


def _seconds(found: dict[str, Measured]) -> dict[str, Any]:
    return {
        name: {
            "prefill_seconds": [turn["seconds"] for turn in one.prefills],
            "segment_seconds": [turn["seconds"] for turn in one.segments],
        }
        for name, one in found.items()
    }


def _why_no_limit() -> str | None:
    try:
        MemoryLimit(GIB).remove()
    except ConfigError as error:
        return str(error)
    return None


def _limit_for(bench: Bench, share: float) -> int:
    """Enough for a process that keeps this share of the model, and little else."""
    return int(bench.checkpoint.nbytes * share) + PROCESS_BYTES


# -- the whole -------------------------------------------------------------------------------------


def targets_table(targets: list[Target]) -> Table:
    table = Table(title="targets")
    for column in ("part", "what", "wanted", "measured", "met", "note"):
        table.add_column(column, justify="right" if column == "measured" else "left")
    words = {True: "yes", False: "[red]no[/]", None: "-"}
    for one in targets:
        got = "-" if one.got is None else f"{one.got:.3f}"
        table.add_row(one.part, one.what, one.wanted, got, words[one.is_met], one.note)
    return table


def run(path: Path, protocol: Protocol, only: list[str], report: dict[str, Any]) -> list[Target]:
    """Every part; `report` holds what is found, also when a later one fails."""
    targets: list[Target] = []
    for name, part in PARTS.items():
        if only and name not in only:
            continue
        console.print(f"[bold]{name}[/]")
        found, result = part(path, protocol)
        targets += found
        report["parts"][name] = result
        report["targets"] = [asdict(one) for one in targets]
    return targets


def _model(options: argparse.Namespace) -> Path:
    shape = {"experts": options.experts, "top_k": options.top_k, "hidden": options.hidden}
    shape |= {"intermediate": options.intermediate}
    whole = Shape(2, **TOY) if options.toy else Shape.of_size(int(options.gib * GIB), **shape)
    name = f"moe-{whole.layers}x{whole.experts}-{whole.hidden}-{whole.intermediate}"
    path = options.folder / (name + "-fused" * options.fused)
    if not path.exists():
        console.print(f"writing {path}")
        make_moe(path, whole, is_fused=options.fused)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="tiny model, one round")
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--budgets", default=Protocol.budgets)
    parser.add_argument("--policy", default=Protocol.policy)
    parser.add_argument("--only", default="", help=f"of {', '.join(PARTS)}, with commas")
    parser.add_argument("--folder", type=Path, default=home_folder() / "bench")
    parser.add_argument("--remove", action="store_true", help="the model, when done")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="of part from_disk")
    options = parser.parse_args()
    if options.plot:
        check_can_plot()
    only = [name.strip() for name in options.only.split(",") if name.strip()]
    if unknown := set(only) - PARTS.keys():
        parser.error(f"--only takes {', '.join(PARTS)}; got {', '.join(unknown)}")
    protocol = (
        TOY_PROTOCOL if options.toy else Protocol(budgets=options.budgets, policy=options.policy)
    )
    path = _model(options)
    report: dict[str, Any] = {
        "model": json.loads((path / "make_moe.json").read_text()),
        "protocol": asdict(protocol),
        "machine": machine(),
        "parts": {},
    }
    try:
        targets = run(path, protocol, only, report)
    finally:
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
        if options.remove:
            shutil.rmtree(path)
    Console().print(targets_table(targets))
    if options.plot and "from_disk" in report["parts"]:
        plot_experts(report["parts"]["from_disk"], options.plot)


if __name__ == "__main__":
    sys.exit(main())
