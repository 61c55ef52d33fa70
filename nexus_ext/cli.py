"""The command line: `nexus run | fetch | bench | plan | convert | doctor | demo | cache`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from nexus_ext import cli_cache
from nexus_ext.errors import MissingExtra, NexusError
from nexus_ext.memory import format_bytes, parse_bytes
from nexus_ext.quant.convert import PackedModule

__all__ = ["app", "bench_table", "conversion_table", "main"]

app = typer.Typer(
    help="Run PyTorch models that do not fit.", no_args_is_help=True, add_completion=False
)
app.add_typer(cli_cache.app, name="cache")
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A folder with safetensors, or a hub id.")]
Budget = Annotated[str, typer.Option(help="Device bytes for weights: 1GiB, 500MB, auto.")]
Device = Annotated[str, typer.Option(help="Where the model computes: cpu, cuda or cuda:1.")]
Io = Annotated[str, typer.Option(help="direct, buffered, mmap, gds or auto.")]
Lookahead = Annotated[str, typer.Option(help="Groups fetched ahead, or auto.")]
RamBudget = Annotated[
    str, typer.Option(help="Host bytes for staging and for groups kept in RAM; auto.")
]
Verify = Annotated[str, typer.Option(help="off, first or always.")]
Prefault = Annotated[
    str | None, typer.Option(help="auto, on or off (mmap); default: NEXUS_PREFAULT or auto.")
]
ByRows = Annotated[
    list[str] | None,
    typer.Option(help="A Linear or Embedding (or a pattern) to read by rows; may be repeated."),
]
Weights = Annotated[
    str | None,
    typer.Option(help="nf4, nf4-nested, nf4-fine, int8 or mixed: pack once, and stream that."),
]
ExpertBudget = Annotated[
    str, typer.Option(help="Bytes for single experts, or a share of them all: 4GiB, 30%, auto.")
]
ExpertPolicy = Annotated[str, typer.Option(help="Which experts stay: reuse, lfu or lru.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result here.")]


def main() -> None:
    """Entry point: an error of ours is one line and exit code 1, never a traceback."""
    try:
        app()
    except NexusError as error:
        err.print(f"[bold red]error[/] {type(error).__name__}: ", end="")
        err.print(str(error), markup=False, highlight=False)
        sys.exit(1)


@app.command()
def run(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    device: Device = "cpu",
    budget: Budget = "auto",
    io: Io = "auto",
    lookahead: Lookahead = "auto",
    ram_budget: RamBudget = "auto",
    verify: Verify = "off",
    prefault: Prefault = None,
    by_rows: ByRows = None,
    weights: Weights = None,
    expert_budget: ExpertBudget = "auto",
    expert_policy: ExpertPolicy = "reuse",
    expert_hotness: Annotated[
        Path | None, typer.Option(help="Begin with the experts of this file; it is written anew.")
    ] = None,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks (torch.compile).")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    json_file: JsonFile = None,
) -> None:
    """Generate text, streaming the weights.

    A model that is not here streams while it is downloaded. Afterwards this waits until the rest is
    here and right; Ctrl-C leaves the rest for the next run.
    """
    from nexus_ext.arriving import Inbound
    from nexus_ext.blocks import find_blocks
    from nexus_ext.module import close, save_hotness, stats
    from nexus_ext.pretrained import from_pretrained, source_of

    options: dict[str, Any] = {
        "device": device,
        "budget": budget,
        "io": io,
        "lookahead": lookahead,
        "ram_budget": ram_budget,
        "verify": verify,
        "prefault": prefault,
        "weights": weights,
        "expert_budget": expert_budget,
        "expert_policy": expert_policy,
        "expert_hotness": expert_hotness if expert_hotness and expert_hotness.exists() else None,
    }
    watching = _Watching()
    with ExitStack() as stack:
        with watching.bars():
            source = source_of(model, progress=watching, **options)
            if isinstance(source, Inbound):
                stack.callback(source.close)
            tokenizer = _tokenizer(source if isinstance(source, Path) else source.folder)
            streamed: Any = from_pretrained(
                source, by_rows=by_rows or (), progress=watching, **options
            )
            stack.callback(close, streamed)
            if compile_blocks:
                for _, block in find_blocks(streamed, None):
                    block.compile()
            inputs = tokenizer(prompt, return_tensors="pt").to(device)
            watching.begin("generating")
            tokens, seconds = _generate(streamed, inputs, max_new_tokens)
        text = tokenizer.decode(tokens[0], skip_special_tokens=True)
        out.print(text, markup=False, highlight=False)
        if isinstance(source, Inbound):
            with watching.bars():
                source.wait()
        counters = stats(streamed)
        if expert_hotness is not None:
            save_hotness(streamed, expert_hotness)
    num_new = tokens.shape[1] - inputs["input_ids"].shape[1]
    err.print(f"{num_new} tokens in {seconds:.2f} s ({num_new / seconds:.2f} tokens/s); {counters}")
    if counters.experts is not None:
        err.print(f"experts: {counters.experts}")
    if counters.prefault_bytes:
        err.print(
            f"pre-fault: {format_bytes(counters.prefault_bytes)} warmed in "
            f"{counters.prefault_seconds:.2f} s"
        )
    _write(
        json_file,
        {
            "text": text,
            "tokens": tokens[0].tolist(),
            "seconds": seconds,
            "tokens_per_second": num_new / seconds,
            "stats": asdict(counters),
        },
    )


def _generate(model: Any, inputs: Any, max_new_tokens: int) -> tuple[Any, float]:
    """Token ids, and how long they took."""
    import torch

    began = time.perf_counter()
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokens, time.perf_counter() - began


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="A hub id, or a URL (https, s3, gs, ...).")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    connections: Annotated[int, typer.Option(min=1, max=64, help="At the same time.")] = 8,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare files that are here with their digests, too.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Bring a model here, checked; an interrupted download goes on where it stopped."""
    from nexus_ext.hub import fetch as bring

    with _byte_progress() as progress:
        report = bring(
            model,
            revision=revision,
            verify=verify,
            max_connections=connections,
            progress=progress,
        )
    out.print(str(report.path), markup=False, highlight=False)
    err.print(
        f"{report.num_files} files, {format_bytes(report.nbytes)}: "
        f"{format_bytes(report.bytes_received)} received, {format_bytes(report.bytes_reused)} "
        f"reused, {format_bytes(report.bytes_present)} were here; {report.seconds:.1f} s"
    )
    _write(json_file, asdict(report))


@app.command()
def bench(
    model: Model,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of one forward.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Rounds; figures are medians.")] = 5,
    device: Device = "cpu",
    budget: Budget = "auto",
    io: Io = "auto",
    lookahead: Lookahead = "auto",
    ram_budget: RamBudget = "auto",
    verify: Verify = "off",
    against: Annotated[
        str, typer.Option(help="Peers, with commas: resident, accelerate. '' for none.")
    ] = "resident",
    memory_limit: Annotated[
        str | None, typer.Option(help="Bytes each process may use (cgroup), e.g. 2GiB.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure a step against its bounds, the disk's ceiling, and peers.

    A model that is not here is fetched whole first: a download would be measured too.
    """
    from nexus_ext.bench import bench as measure

    with err.status("starting") as status:
        result = measure(
            model,
            num_tokens=tokens,
            num_steps=steps,
            against=[peer.strip() for peer in against.split(",") if peer.strip()],
            memory_limit=None if memory_limit is None else parse_bytes(memory_limit),
            progress=_narrator(status.update),
            device=device,
            budget=budget,
            io=io,
            lookahead=lookahead,
            ram_budget=ram_budget,
            verify=verify,
        )
    out.print(bench_table(result))
    _write(json_file, result)


@app.command("bench-experts")
def bench_experts(
    model: Model,
    budgets: Annotated[
        str, typer.Option(help="For experts, with commas: 5,10,50,100% of them, or 1,2GiB.")
    ] = "5,10,20,40,60,80,100%",
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="direct, mmap, residency-lru or buffered; may be repeated."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    segment_tokens: Annotated[int, typer.Option(min=1, help="Of one arm's turn.")] = 16,
    prefills: Annotated[int, typer.Option(min=1, help="Rounds of the prompt.")] = 3,
    prompt_ids: Annotated[
        Path | None, typer.Option(help="JSON list of ids; default: the model's prompt_ids.json.")
    ] = None,
    warm: Annotated[
        bool, typer.Option("--warm", help="Begin with the files in the page cache: from RAM.")
    ] = False,
    policy: ExpertPolicy = "reuse",
    predict: Annotated[str, typer.Option(help="Fetch experts ahead: auto, on or off.")] = "auto",
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the result: FILE.png.")] = None,
) -> None:
    """Measure a mixture of experts by strategy and budget, beside itself in memory.

    A model that is not here is fetched whole first.
    """
    from nexus_ext.bench_experts import bench_experts as measure
    from nexus_ext.bench_experts import parse_budgets
    from nexus_ext.expert_report import check_can_plot, experts_tables, plot_experts
    from nexus_ext.expert_work import Work
    from nexus_ext.hub import locate

    if plot is not None:
        check_can_plot()
    parsed, path = parse_budgets(budgets), locate(model)
    work = Work.of(
        path,
        prompt_tokens,
        new_tokens,
        batch=batch,
        prompt_ids=prompt_ids,
        segment_tokens=segment_tokens,
        num_prefills=prefills,
        is_warm=warm,
    )
    with err.status("starting") as status:
        result = measure(
            path,
            work=work,
            budgets=parsed,
            strategies=strategy or ["direct"],
            policy=policy,
            predict=predict,
            progress=_narrator(status.update),
        )
    out.print(*experts_tables(result))
    _write(json_file, result)
    if plot is not None:
        plot_experts(result, plot)


@app.command()
def plan(
    model: Model,
    device: Device = "cpu",
    budget: Budget = "auto",
    lookahead: Lookahead = "auto",
    ram_budget: RamBudget = "auto",
    by_rows: ByRows = None,
    expert_budget: ExpertBudget = "auto",
    json_file: JsonFile = None,
) -> None:
    """Show what would stay, what would stream, and the step that predicts. Reads no weights.

    Of a model that is not here, headers and descriptions are fetched, and for a CPU no more; what
    this brings is kept.
    """
    from nexus_ext.pretrained import plan_pretrained

    made = plan_pretrained(
        model,
        device=device,
        budget=budget,
        lookahead=lookahead,
        ram_budget=ram_budget,
        by_rows=by_rows or (),
        expert_budget=expert_budget,
    )
    out.print(made.describe(), markup=False, highlight=False)
    _write(json_file, asdict(made) | {"device_bytes": made.device_bytes})


@app.command()
def convert(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="Where to write; new, or interrupted before.")],
    weights: Annotated[str, typer.Option(help="nf4, nf4-nested, nf4-fine, int8 or mixed.")] = "nf4",
    json_file: JsonFile = None,
) -> None:
    """Pack a model's weights: a quarter (NF4) or half (INT8) of the bytes to stream."""
    from nexus_ext.pretrained import convert as pack

    with _byte_progress() as progress:
        report = pack(model, folder, weights, progress=progress)
    out.print(conversion_table(report))
    _write(json_file, {"modules": [line.__dict__ for line in report]})


@app.command()
def doctor(
    path: Annotated[Path | None, typer.Argument(help="A big file on the disk to test.")] = None,
    tune: Annotated[bool, typer.Option(help="Also try depths and chunk sizes on it.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Say what this machine offers, which modes will be used, and why."""
    from nexus_ext import doctor as surgery

    if tune and path is None:
        raise typer.BadParameter("--tune needs the file to tune for: nexus doctor FILE --tune")
    with err.status("reading"):
        facts = surgery.examine(path)
        rates = surgery.tune(path) if tune and path is not None else []
    table = Table(show_header=False)
    for name, fact in facts.items():
        table.add_row(name, str(fact))
    out.print(table)
    for rate in rates:
        out.print(
            f"depth={rate['depth']:<3} chunk_bytes={format_bytes(rate['chunk_bytes']):<11} "
            f"{rate['gbps']:.2f} GB/s"
        )
    _write(json_file, facts | {"tune": rates})


@app.command()
def demo(json_file: JsonFile = None) -> None:
    """Stream a random 1 GB Llama under a quarter of its size; compare it with itself in memory."""
    from nexus_ext.demo import demo as show

    with err.status("starting") as status:
        result = show(progress=_narrator(status.update))
    out.print(bench_table(result))
    _write(json_file, result)
    if not result["tokens_equal"]:
        err.print("[bold red]the streamed model's tokens differ from the resident model's[/]")
        raise typer.Exit(1)


def _tokenizer(path: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra("`nexus run` needs transformers: pip install 'nexus_ext[hf]'.") from None
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise NexusError(
            f"A prompt needs the model's tokenizer beside its weights; {path}: {error}"
        ) from error


def _narrator(update: Callable[[str], None]) -> Callable[[str], None]:
    """On a terminal the status line changes; in a log every line stays."""
    if err.is_terminal:
        return update
    return lambda what: err.print(what, markup=False, highlight=False)


class _Bytes(DownloadColumn):
    """Nothing where nobody knows how much there is."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task)


class _Watching:
    """Who is told of progress, from any thread. A download outlives the bars that it began under:
    what is told while there are none is not shown.
    """

    def __init__(self) -> None:
        self._shown: tuple[Progress, dict[str, TaskID]] | None = None

    @contextmanager
    def bars(self) -> Iterator[None]:
        columns = (TextColumn("{task.description}"), BarColumn(), _Bytes(binary_units=True))
        with Progress(*columns, console=err, transient=True) as bars:
            self._shown = bars, {}
            try:
                yield
            finally:
                self._shown = None

    def begin(self, what: str) -> None:
        """Something of which nobody knows how long it takes."""
        if self._shown is not None:
            self._shown[0].add_task(what, total=None)

    def __call__(self, what: str, done: int, total: int) -> None:
        shown = self._shown  # once: another thread may end it
        if shown is None:
            return
        bars, tasks = shown
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)


@contextmanager
def _byte_progress() -> Iterator[_Watching]:
    watching = _Watching()
    with watching.bars():
        yield watching


def conversion_table(report: Sequence[PackedModule]) -> Table:
    """Modules by their last name and kind: how many, how exact, how small."""
    table = Table(title=f"{len(report)} modules packed")
    for column in ("modules", "weights", "count", "worst error", "before", "after"):
        table.add_column(column, justify="left" if column in ("modules", "weights") else "right")
    kinds: dict[tuple[str, str], list[PackedModule]] = {}
    for line in report:
        kinds.setdefault((line.name.rpartition(".")[2], line.weights), []).append(line)
    for (name, weights), lines in kinds.items():
        table.add_row(
            f"*.{name}",
            weights,
            str(len(lines)),
            f"{max(line.error for line in lines):.2%}",
            format_bytes(sum(line.bytes_before for line in lines)),
            format_bytes(sum(line.bytes_after for line in lines)),
        )
    return table


def bench_table(r: dict[str, Any]) -> Table:
    """What `bench` measured, for people: each figure with what it is to be compared to."""
    table = Table(title=f"{r['num_tokens']} token(s) a step, {r['machine']['cpu']}")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_column("beside it")
    rows = [
        ("step", f"{r['step_seconds']:.3f} s", f"predicted {r['predicted_step_seconds']:.3f} s"),
        (
            "its parts",
            f"{r['slack_x']:.2f}x the larger",
            f"compute {r['compute_seconds']:.3f} s, I/O {r['io_seconds']:.3f} s",
        ),
        ("waiting for weights", f"{r['weight_stall_ratio']:.0%}", "of the step"),
        (
            "streamed",
            f"{r['stream_gbps']:.2f} GB/s",
            f"{format_bytes(r['bytes_streamed_per_step'])} a step",
        ),
        (
            "share of the disk's ceiling",
            f"{r['share_of_ceiling']:.0%}",
            f"{r['disk_ceiling_gbps']:.2f} GB/s ({r['disk_ceiling_source']})",
        ),
        ("model", format_bytes(r["model_bytes"]), f"budget {format_bytes(r['budget_bytes'])}"),
        (
            "groups",
            f"{r['streamed_groups']} streamed",
            f"{r['resident_groups']} resident, lookahead {r['lookahead']}",
        ),
        (
            "peak memory",
            format_bytes(r["peak_rss_bytes"]),
            f"{format_bytes(r['baseline_rss_bytes'])} of it before any weight",
        ),
        ("page cache growth", format_bytes(r["file_cache_growth_bytes"]), "of the model's files"),
        ("I/O mode", r["io_mode"], f"{r['reader']}; asked for {r['io_mode_requested']}"),
    ]
    for kind, peer in r["peers"].items():
        rows.append(
            (
                f"against {kind}",
                f"{peer['nexus_speedup']:.2f}x its speed",
                f"{peer['step_seconds']:.3f} s, peak {format_bytes(peer['peak_rss_bytes'])}",
            )
        )
    if "tokens_equal" in r:
        verdict = "equal" if r["tokens_equal"] else "DIFFERENT"
        rows.append(("tokens", verdict, f"to the resident model's: {len(r['tokens'])} tokens"))
    for row in rows:
        table.add_row(*row)
    return table


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=2, default=_plain) + "\n")


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else list(value)  # type: ignore[call-overload]
