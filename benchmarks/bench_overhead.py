"""What the wrapper costs when nothing has to move: microseconds a group, and a whole model.

per group   200 tiny blocks, all resident, plain and streamed, steps alternating
model       a Llama that fits its budget, against the plain one, steps alternating
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

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

import nexus_ext as nexus
from nexus_ext.bench import machine
from nexus_ext.demo import make_llama


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def alternate(one: Callable[[], object], other: Callable[[], object], rounds: int) -> list[float]:
    """Medians of both, visited in turn."""
    one(), other()
    pairs = [(seconds(one), seconds(other)) for _ in range(rounds)]
    return [median(pair[side] for pair in pairs) for side in (0, 1)]


def per_group(folder: Path, num_blocks: int, rounds: int) -> dict[str, float]:
    plain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(num_blocks)))
    save_file(plain.state_dict(), folder / "blocks.safetensors")
    x = torch.randn(1, 8)
    streamed = {}
    with torch.inference_mode():
        for name, budget in (("resident", 1 << 30), ("streamed", 64 * (num_blocks // 4) * 6)):
            twin = nn.Sequential(*(nn.Linear(8, 8) for _ in range(num_blocks)))
            model = nexus.stream(twin, folder / "blocks.safetensors", budget=budget, io="buffered")
            base, ours = alternate(lambda: plain(x), lambda model=model: model(x), rounds)
            streamed[f"{name}_us_per_group"] = (ours - base) / num_blocks * 1e6
            nexus.close(model)
    return streamed


def whole_model(folder: Path, num_blocks: int, num_tokens: int, rounds: int) -> dict[str, float]:
    from transformers import LlamaForCausalLM

    make_llama(folder / "llama", num_blocks=num_blocks)
    plain = LlamaForCausalLM.from_pretrained(folder / "llama").eval()
    ours = nexus.from_pretrained(folder / "llama", budget="64GiB")
    x = torch.randint(0, 4096, (1, num_tokens))
    with torch.inference_mode():
        assert torch.equal(plain(x).logits, ours(x).logits)
        base, with_nexus = alternate(lambda: plain(x), lambda: ours(x), rounds)
    nexus.close(ours)
    return {"plain_seconds": base, "resident_seconds": with_nexus, "ratio": with_nexus / base}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds = 3 if options.toy else 31
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "per_group": per_group(folder, 20 if options.toy else 200, rounds),
            "model": whole_model(folder, 2 if options.toy else 8, 16, rounds),
            "machine": machine(),
        }
    Console().print(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
