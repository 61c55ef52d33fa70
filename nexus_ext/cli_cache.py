"""`nexus cache ls | verify | clear | stats`: what is kept in a cache, and what it is good for."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nexus_ext.config import cache_folder
from nexus_ext.errors import ConfigError
from nexus_ext.memory import format_bytes

__all__ = ["app", "figures_of", "joined"]

app = typer.Typer(help="What is kept of what was fetched.", no_args_is_help=True)
out = Console()

# The command only looks: nothing must go because it has another idea of the budget.
_NO_LIMIT_BYTES = 1 << 62

Folder = Annotated[
    list[Path] | None,
    typer.Option(help="The cache's folder; may be repeated. Default: NEXUS_HOME/cache."),
]
Shared = Annotated[bool, typer.Option(help="Others may write to it, and you trust them.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result here.")]


@app.command()
def ls(folder: Folder = None, shared: Shared = False, json_file: JsonFile = None) -> None:
    """List what is there: size, age, use."""
    with _open(folder, shared) as tier:
        entries = [] if tier is None else tier.entries()
    now = time.time()
    table = Table(title=f"{len(entries)} entries, {format_bytes(sum(e.nbytes for e in entries))}")
    for name in ("key", "kind", "size", "made", "used", "uses"):
        table.add_column(name)
    for entry in reversed(entries):
        table.add_row(
            escape(entry.key),
            escape(entry.kind),
            format_bytes(entry.nbytes),
            _age(now - entry.created_seconds),
            _age(now - entry.used_seconds),
            str(entry.uses),
        )
    out.print(table)
    _write(json_file, [asdict(entry) for entry in entries])


@app.command()
def verify(folder: Folder = None, shared: Shared = False, json_file: JsonFile = None) -> None:
    """Read every byte and compare; what is wrong is set aside. Exit code 1 if anything was."""
    with _open(folder, shared) as tier:
        report = None if tier is None else tier.verify()
    if report is None:
        out.print("there is no cache")
        _write(json_file, {"num_blobs": 0, "nbytes": 0, "bad": []})
        return
    out.print(
        f"{report.num_blobs} files, {format_bytes(report.nbytes)} right; {len(report.bad)} wrong, "
        f"{report.num_adopted} were unknown, {report.num_missing} were gone"
    )
    for path, why in report.bad:
        out.print(f"{path}: {why}", markup=False, highlight=False)
    _write(json_file, asdict(report))
    if report.bad:
        raise typer.Exit(1)


@app.command()
def clear(folder: Folder = None, shared: Shared = False, json_file: JsonFile = None) -> None:
    """Remove everything."""
    with _open(folder, shared) as tier:
        before = 0 if tier is None else tier.stats().stored_bytes
        number = 0 if tier is None else tier.clear()
        after = 0 if tier is None else tier.stats().stored_bytes
    out.print(f"removed {number} files, {format_bytes(before - after)}")
    _write(json_file, {"removed": number, "freed_bytes": before - after})


@app.command()
def stats(folder: Folder = None, shared: Shared = False, json_file: JsonFile = None) -> None:
    """Hits, latency and writes of all processes so far, beside their targets.

    Of several tiers name the folders as the store has them, the fastest first.
    """
    seen = [_seen(path, shared) for path in _folders(folder)]
    if not seen:
        out.print("there is no cache")
        _write(json_file, {})
        return
    counted = joined([one["totals"] for one in seen])
    figures = figures_of(counted)
    _print_figures(figures, seen)
    if len(seen) > 1:
        _print_folders(seen)
    for name in ("hits", "misses", "puts", "evictions", "corruptions"):
        out.print(f"{name}: {counted[name]}")
    zones = [zone for one in seen for zone in one["zones"]]
    for zone in zones:
        out.print(
            f"{zone['folder']}: {format_bytes(zone['written_bytes'])} written, "
            f"{format_bytes(zone['written_bytes_of_day'])} of it in 24 hours; "
            f"{format_bytes(zone['free_bytes'])} free",
            markup=False,
            highlight=False,
        )
    _write(json_file, {"totals": counted, "figures": figures, "zones": zones, "folders": seen})


def joined(totals: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The counters of several folders together: tiers, fastest first, or zones of one tier.

    Every tier counts what it was asked for: what a slow one has is a miss of those above it. So
    what nobody had are the misses of the last one that was asked. Of zones the first one counts for
    all. Moves between tiers are puts and evictions, too.
    """
    together = {name: sum(one[name] for one in totals) for name in totals[0]}
    asked = [one for one in totals if one["hits"] or one["misses"]]
    return together | {"misses": asked[-1]["misses"] if asked else 0}


def _seen(folder: Path, shared: bool) -> dict[str, Any]:
    """What lies in one folder, and what was counted there."""
    with _open([folder], shared) as tier:
        counted, state = tier.totals(), tier.stats()
    return {
        "folder": str(folder),
        "entries": state.entries,
        "stored_bytes": state.stored_bytes,
        "totals": counted,
        "zones": [asdict(zone) for zone in state.zones],
    }


def _print_figures(figures: list[dict[str, Any]], seen: list[dict[str, Any]]) -> None:
    entries = sum(one["entries"] for one in seen)
    stored = sum(one["stored_bytes"] for one in seen)
    table = Table(title=f"{entries} entries, {format_bytes(stored)} of disk")
    for name in ("what", "measured", "target"):
        table.add_column(name)
    for figure in figures:
        table.add_row(figure["name"], figure["shown"], f"{figure['target']} {figure['verdict']}")
    out.print(table)


def _print_folders(seen: list[dict[str, Any]]) -> None:
    """Where hits were, and how long they took there."""
    hits = sum(one["totals"]["hits"] for one in seen)
    table = Table()
    table.add_column("folder", overflow="fold")  # where the terminal is narrow, numbers stay whole
    for name in ("entries", "of disk", "hits", "share of hits", "average load"):
        table.add_column(name, no_wrap=True)
    for one in seen:
        counted = one["totals"]
        share, load = _ratio(counted["hits"], hits), _load_ms(counted)
        table.add_row(
            escape(one["folder"]),
            str(one["entries"]),
            format_bytes(one["stored_bytes"]),
            str(counted["hits"]),
            "" if share is None else f"{share:.1%}",
            "" if load is None else f"{load:.1f} ms",
        )
    out.print(table)


def figures_of(counted: Mapping[str, int]) -> list[dict[str, Any]]:
    """The figures that a cache is judged by, of `DiskTier.totals` or `joined`.

    Each with its name, value (None where nothing was counted), target and verdict.
    """
    hits = _ratio(counted["hits"], counted["hits"] + counted["misses"])
    load = _load_ms(counted)
    ahead = _ratio(counted["prefetch_used"], counted["prefetched"])
    queue = _ratio(counted["queue_depths"], counted["queue_looks"])
    return [
        _figure("cache hit ratio", hits, "> 85 %", hits is not None and hits > 0.85, "{:.1%}"),
        _figure("average load", load, "< 100 ms", load is not None and load < 100, "{:.1f} ms"),
        _figure("prefetch hit rate", ahead, "> 70 %", ahead is not None and ahead > 0.7, "{:.1%}"),
        _figure("queue depth", queue, "2-4", queue is not None and 2 <= queue <= 4, "{:.1f}"),
    ]


def _figure(
    name: str, value: float | None, target: str, is_met: bool, template: str
) -> dict[str, Any]:
    if value is None:
        shown, verdict = "not measured", ""
    else:
        shown, verdict = template.format(value), "met" if is_met else "missed"
    return {"name": name, "value": value, "shown": shown, "target": target, "verdict": verdict}


def _load_ms(counted: Mapping[str, int]) -> float | None:
    return _ratio(counted["read_ns"] / 1e6, counted["reads"])


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _folders(named: list[Path] | None) -> list[Path]:
    """Those that are there: the named ones, or the default.

    Raises:
        ConfigError: One that was named is not there.
    """
    chosen = [folder.expanduser() for folder in named or [cache_folder()]]
    missing = [folder for folder in chosen if not folder.is_dir()]
    if missing and named:
        raise ConfigError(
            f"A cache is a folder; {missing[0]} is none. Name the folder that holds blobs/."
        )
    return list(dict.fromkeys(folder for folder in chosen if folder not in missing))


@contextmanager
def _open(folders: list[Path] | None, shared: bool) -> Iterator[Any]:
    """A DiskTier on what is there; None where there is nothing, and nothing is made."""
    chosen = _folders(folders)
    if not chosen:
        yield None
        return
    from nexus_ext.cache import DiskTier

    with DiskTier(chosen, _NO_LIMIT_BYTES, shared=shared) as tier:
        yield tier


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def _write(path: Path | None, result: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2, default=str) + "\n")
