"""What `nexus bench-experts` found, for people: two tables and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from nexus_ext.errors import MissingExtra, WriteError

__all__ = ["check_can_plot", "experts_tables", "plot_experts"]

_GIB = 1 << 30


def experts_tables(result: Mapping[str, Any]) -> list[Table]:
    """Document 001's table, and one that says why: a row for each strategy and budget in both."""
    speeds = _table(
        ("budget", "share", "prefill\nt/s", "decode\nt/s", "wired", "used", "file-\nbacked"),
        title=f"{result['model']}: {_work(result)}; GiB",
    )
    causes = _table(
        ("share", "pre-\nfill", "decode", "step/\nbound", "hits", "kept", "Belady", "MB a\ntoken"),
        title="over the resident model's speed; its bound; experts",
        caption=_caption(result),
    )
    for line in result["lines"]:
        speeds.add_row(line["strategy"], *_speeds(line))
        causes.add_row(line["strategy"], *_causes(line))
    return [speeds, causes]


def _table(columns: tuple[str, ...], *, title: str, caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption)
    table.add_column("strategy", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _work(result: Mapping[str, Any]) -> str:
    batch = f" of {result['batch']} sequences" if result["batch"] > 1 else ""
    return (
        f"{result['num_new']} tokens{batch} after {result['num_prompt']}, pages {result['pages']}"
    )


def _caption(result: Mapping[str, Any]) -> str:
    return (
        f"resident: {result['resident']}; ids: {result['ids']}; policy {result['policy']}, "
        f"predict {result['predict']}; {result['machine']['cpu']}. Bound: the larger of compute "
        "and miss bytes / disk rate. Kept: neither loaded nor fetched ahead."
    )


def _speeds(line: Mapping[str, Any]) -> list[str]:
    return [
        f"{line['budget_bytes'] / _GIB:.2f}",
        f"{line['budget_share']:.0%}",
        f"{line['prefill_tps']:.1f}",
        f"{line['decode_tps']:.2f}",
        f"{line['wired_bytes'] / _GIB:.2f}",
        f"{line['used_bytes'] / _GIB:.2f}",
        f"{line['file_backed_bytes'] / _GIB:.3f}",
    ]


def _causes(line: Mapping[str, Any]) -> list[str]:
    return [
        f"{line['budget_share']:.0%}",
        _percent(line["prefill_ratio"]),
        _percent(line["decode_ratio"]),
        f"{line['slack_x']:.2f}x",
        f"{line['hit_rate']:.1%}",
        f"{line['kept_rate']:.1%}",
        _percent(line["belady_hit_rate"]),
        f"{line['read_bytes_per_step'] / 1e6:.1f}",
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


# -- the plot --------------------------------------------------------------------------------------


def check_can_plot() -> None:
    """Raises MissingExtra, before anything was measured."""
    _pyplot()


def plot_experts(result: Mapping[str, Any], path: Path) -> None:
    """Decoding, prefill and hits over the budget, a line for each strategy, as a PNG.

    Raises:
        MissingExtra: matplotlib is not installed.
        WriteError: The file cannot be written.
    """
    pyplot = _pyplot()
    figure, (decode, prefill, hits) = pyplot.subplots(1, 3, figsize=(16, 4.6))
    _panel(decode, result, "decode_tps", "decode_ratio", "decode, tokens/s")
    _panel(prefill, result, "prefill_tps", "prefill_ratio", "prefill, tokens/s")
    for strategy, lines in _by_strategy(result).items():
        budgets = _budgets(lines)
        (drawn,) = hits.plot(budgets, [one["hit_rate"] for one in lines], "o-", label=strategy)
        best = [one["belady_hit_rate"] for one in lines]
        if None not in best:
            hits.plot(budgets, best, "--", color=drawn.get_color(), alpha=0.6)
    _label(hits, "hit rate (dashed: Belady)")
    figure.suptitle(f"{result['model']}: {_work(result)}", fontsize=9)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise WriteError(f"A plot must be writable; {path}: {error}. Name another path.") from error
    finally:
        pyplot.close(figure)


def _panel(axes: Any, result: Mapping[str, Any], key: str, ratio: str, title: str) -> None:
    for strategy, lines in _by_strategy(result).items():
        axes.plot(_budgets(lines), [one[key] for one in lines], "o-", label=strategy)
    resident = [one[key] / one[ratio] for one in result["lines"] if one[ratio]]
    if resident:
        speed = sorted(resident)[len(resident) // 2]
        axes.axhline(speed, color="gray", linestyle="--", label="resident")
    axes.set_ylim(bottom=0)
    _label(axes, title)


def _label(axes: Any, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("GiB for experts")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _by_strategy(result: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in sorted(result["lines"], key=lambda one: one["budget_bytes"]):
        found.setdefault(line["strategy"], []).append(line)
    return found


def _budgets(lines: list[Mapping[str, Any]]) -> list[float]:
    return [line["budget_bytes"] / _GIB for line in lines]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("A plot needs matplotlib: pip install 'nexus_ext[plot]'.") from None
    matplotlib.use("Agg")  # Files only: there may be no screen.
    from matplotlib import pyplot

    return pyplot
