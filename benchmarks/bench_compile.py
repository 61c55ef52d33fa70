"""What the compiler makes of a streamed model: overhead, speed, number of graphs.

per group   tiny blocks, plain and streamed, eager and compiled: microseconds the wrapper costs
step        a Llama of four times its budget, one token: eager, compiled whole, blocks compiled
regional    32 identical blocks, three rings: how many graphs, and seconds to compile them
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.utils import counters

import nexus_ext as nexus
from nexus_ext.bench import machine
from nexus_ext.blocks import find_blocks
from nexus_ext.demo import make_llama


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def alternate(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round; two warm-up rounds compile."""
    for run in (*arms.values(), *arms.values()):
        run()
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            taken[name].append(seconds(run))
    return taken


class Block(nn.Module):
    """As little as can be compiled: torch passes over bare layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        return result


def tiny(num_blocks: int) -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(num_blocks))).requires_grad_(False)


def compiled_blocks(model: nn.Module) -> nn.Module:
    for _, block in find_blocks(model, None):
        block.compile(fullgraph=True)
    return model


def per_group(folder: Path, num_blocks: int, rounds: int) -> dict[str, float]:
    """Each streamed form against the plain model in the same form."""
    save_file(tiny(num_blocks).state_dict(), folder / "blocks.safetensors")
    x = torch.randn(1, 8)
    result = {}
    # A streamed group takes 320 bytes. Mapped: this is about the wrapper, not about waiting.
    for where, budget in (("resident", 1 << 30), ("streamed", 320 * (num_blocks // 4))):
        forms: dict[str, Callable[[nn.Module], Any]] = {
            "eager": lambda model: model,
            "whole": lambda model: torch.compile(model, fullgraph=True),
            "blocks": compiled_blocks,
        }
        arms, streamed = {}, []
        for form, made in forms.items():
            streamed.append(
                nexus.stream(
                    tiny(num_blocks), folder / "blocks.safetensors", budget=budget, io="mmap"
                )
            )
            arms[form] = made(streamed[-1])
            arms[f"plain {form}"] = made(tiny(num_blocks))
        runs = {name: (lambda model=model: model(x)) for name, model in arms.items()}
        taken = alternate(runs, rounds)
        for form in forms:
            pairs = zip(taken[form], taken[f"plain {form}"], strict=True)
            cost = median(ours - plain for ours, plain in pairs)
            result[f"{form}_{where}_us_per_group"] = cost / num_blocks * 1e6
        for model in streamed:
            nexus.close(model)
    return result


def step(folder: Path, is_toy: bool) -> dict[str, Any]:
    rounds = 2 if is_toy else 15
    small: dict[str, int] = {"hidden": 256, "intermediate": 512} if is_toy else {}
    make_llama(folder / "llama", num_blocks=18, vocabulary=4096 // (4 if is_toy else 1), **small)
    size = sum(file.stat().st_size for file in (folder / "llama").glob("*.safetensors"))

    def make() -> nn.Module:
        return nexus.from_pretrained(folder / "llama", budget=size // 4, io="direct")

    eager, whole, blocks = make(), make(), make()
    compiled = torch.compile(whole, fullgraph=True)
    compiled_blocks(blocks)
    x = torch.randint(0, 1024, (1, 1))
    arms: dict[str, Callable[[], object]] = {
        "eager": lambda: eager(x, use_cache=False),
        "whole": lambda: compiled(x, use_cache=False),
        "blocks": lambda: blocks(x, use_cache=False),
    }
    taken = alternate(arms, rounds)
    return {
        "model_bytes": size,
        "streamed_groups": nexus.stats(eager).streamed_groups,
        "seconds": {name: median(times) for name, times in taken.items()},
        "rounds": taken,
        # Rounds are compared one by one: this machine drifts.
        "whole_over_eager": median(
            a / b for a, b in zip(taken["whole"], taken["eager"], strict=True)
        ),
        "blocks_over_eager": median(
            a / b for a, b in zip(taken["blocks"], taken["eager"], strict=True)
        ),
    }


def regional(folder: Path, num_blocks: int) -> dict[str, Any]:
    """Compile the blocks of one model, then give it other rings."""
    save_file(tiny(num_blocks).state_dict(), folder / "ring.safetensors")
    torch._dynamo.reset()
    counters.clear()
    model = nexus.stream(tiny(num_blocks), folder / "ring.safetensors", budget=320 * 5)
    x = torch.randn(1, 8)
    compiling = seconds(lambda: compiled_blocks(model)(x))
    for budget in (320 * 7, 320 * (num_blocks // 2), 1 << 30):
        nexus.close(model)
        nexus.stream(model, folder / "ring.safetensors", budget=budget)
        model(x)
    graphs = counters["stats"]["unique_graphs"]
    nexus.close(model)
    return {"blocks": num_blocks, "rings": 4, "graphs": graphs, "compile_seconds": compiling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        result = {
            "regional": regional(folder, 32),
            "per_group": per_group(folder, 8 if options.toy else 40, 3 if options.toy else 101),
            "step": step(folder, options.toy),
            "machine": machine(),
        }
    Console().print(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
