"""Which architectures stream, and which survive the compiler: the table of docs/compile.md.

eager      the streamed model against the resident one
fullgraph  torch.compile(model, fullgraph=True)
regional   each block compiled, fullgraph: identical blocks share a graph
dynamic    torch.compile(model, fullgraph=True, dynamic=True), two sizes
export     nexus.export of one block, run between passes of the model

Models are tiny and random, with two arenas for all their blocks, whose freed memory is poisoned.
Every cell compares with the resident model run the same way, bit for bit; what differs is printed
as the largest difference. A cell that fails for the resident model too says so.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.utils._pytree import tree_leaves

import nexus_ext as nexus
from nexus_ext.bench import machine
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.config import StreamConfig
from nexus_ext.device import Device
from nexus_ext.layout import lay_out
from nexus_ext.streamer import plan_groups

Inputs = dict[str, Any]
COLUMNS = ("eager", "fullgraph", "regional", "dynamic", "export")
# As far apart as two orders of adding up float32 may be, for values around one.
TOLERANCE = 1e-4


@dataclass
class Cell:
    """One architecture in one column."""

    passes: bool
    note: str = ""
    graphs: int = 0
    breaks: int = 0
    clones: int = 0
    largest_difference: float = 0.0

    def __str__(self) -> str:
        if not self.passes:
            return f"no: {self.note}"
        counts = f"{self.graphs} graph{'s' * (self.graphs != 1)}, " if self.graphs else ""
        equal = f"±{self.largest_difference:.0e}" if self.largest_difference else "equal"
        return f"{counts}{self.clones} clones, {equal}"


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny one, and its arguments for two sizes."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    sizes: tuple[int, int] = (7, 12)
    groups: tuple[str, ...] | None = field(default=None)


# -- the architectures -----------------------------------------------------------------------------

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
GROUPED = {**TEXT, "num_key_value_heads": 1, "use_cache": False}


def of_transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return made

    return build


def of_diffusers(model: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        made: nn.Module = getattr(diffusers, model)(**options)
        return made

    return build


def text(size: int) -> Inputs:
    return {"input_ids": torch.arange(2 * size).reshape(2, size) % 50}


def text_pair(size: int) -> Inputs:
    return {**text(size), "decoder_input_ids": text(size)["input_ids"][:, :5], "use_cache": False}


def image(size: int) -> Inputs:
    return {"pixel_values": torch.sin(torch.arange(size * 3 * 16 * 16.0)).reshape(size, 3, 16, 16)}


def sound(size: int) -> Inputs:
    features = torch.sin(torch.arange(size * 8 * 40.0)).reshape(size, 8, 40)
    ids = torch.arange(5 * size).reshape(size, 5) % 50
    return {"input_features": features, "decoder_input_ids": ids, "use_cache": False}


def latent(size: int) -> Inputs:
    return {
        "hidden_states": torch.sin(torch.arange(size * 4 * 64.0)).reshape(size, 4, 8, 8),
        "timestep": torch.arange(size),
        "class_labels": torch.arange(size) % 10,
    }


def flux(size: int) -> Inputs:
    return {
        "hidden_states": torch.sin(torch.arange(size * 4.0)).reshape(1, size, 4),
        "encoder_hidden_states": torch.sin(torch.arange(6 * 32.0)).reshape(1, 6, 32),
        "pooled_projections": torch.sin(torch.arange(32.0)).reshape(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.arange(size * 3.0).reshape(size, 3),
        "txt_ids": torch.zeros(6, 3),
    }


ARCHITECTURES = {
    "Llama": Architecture(of_transformers("LlamaForCausalLM", "LlamaConfig", **GROUPED), text),
    "Qwen3": Architecture(
        of_transformers("Qwen3ForCausalLM", "Qwen3Config", **GROUPED, head_dim=16), text
    ),
    "Gemma 3": Architecture(
        of_transformers(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **{**GROUPED, "head_dim": 16, "sliding_window": 4},
            layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        ),
        text,
    ),
    "GPT-2": Architecture(
        of_transformers(
            "GPT2LMHeadModel",
            "GPT2Config",
            n_embd=32,
            n_layer=5,
            n_head=2,
            vocab_size=50,
            n_positions=64,
            use_cache=False,
        ),
        text,
    ),
    "T5": Architecture(
        of_transformers(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=3,
            num_heads=2,
            vocab_size=50,
        ),
        text_pair,
    ),
    "BERT": Architecture(of_transformers("BertModel", "BertConfig", **TEXT), text),
    "ViT": Architecture(
        of_transformers(
            "ViTModel",
            "ViTConfig",
            **{k: v for k, v in TEXT.items() if k != "vocab_size"},
            image_size=16,
            patch_size=4,
        ),
        image,
        (2, 3),
    ),
    "Whisper": Architecture(
        of_transformers(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            d_model=32,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            vocab_size=50,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        sound,
        (2, 3),
    ),
    "Mamba": Architecture(
        of_transformers(
            "MambaForCausalLM",
            "MambaConfig",
            hidden_size=32,
            state_size=4,
            num_hidden_layers=5,
            vocab_size=50,
            use_cache=False,
        ),
        text,
        (4, 6),
    ),
    "DiT": Architecture(
        of_diffusers(
            "DiTTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=5,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        ),
        latent,
        (2, 3),
    ),
    "Flux": Architecture(
        of_diffusers(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=4,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        flux,
        (16, 25),
    ),
}


# -- one cell --------------------------------------------------------------------------------------


class Subject:
    """One architecture: the resident model, and how to make streamed twins of it."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        torch.manual_seed(0)
        self.resident = architecture.build().eval().requires_grad_(False)
        self.inputs = [architecture.inputs(size) for size in architecture.sizes]
        self._path = folder / "model.safetensors"
        save_file({n: t.clone() for n, t in self.resident.state_dict().items()}, self._path)
        self._groups = architecture.groups

    def streamed(self) -> nn.Module:
        """As little memory as there can be: two arenas."""
        model, checkpoint = copy.deepcopy(self.resident), Checkpoint.open(self._path)
        layout = lay_out(model, checkpoint, self._groups)
        config, device = StreamConfig.of(budget="64GiB"), Device.of("cpu")
        plan, _ = plan_groups(checkpoint, layout.groups, layout.outside, config, device)
        streamed = nexus.stream(
            model, checkpoint, budget=plan.minimum_bytes, groups=self._groups, io="direct"
        )
        assert len(nexus.plan_of(streamed).arena_bytes) == 2
        return streamed


def blocks_of(model: nn.Module, like: nn.Module) -> list[nn.Module]:
    """The modules of `model` whose twins in `like` are streamed blocks."""
    names = [name for name, module in like.named_modules() if "_nexus_group" in module.__dict__]
    return [model.get_submodule(name) for name in names]


def tensors(value: Any) -> list[torch.Tensor]:
    """Of any output: tuples, dicts, transformers' outputs."""
    value = dict(value) if isinstance(value, dict) else value
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def difference(got: Any, want: Any) -> float:
    """0 when every bit is equal; NaN counts as infinite."""
    pairs = list(zip(tensors(got), tensors(want), strict=True))
    assert pairs, "nothing to compare"
    if all(torch.equal(a, b) for a, b in pairs):
        return 0.0
    worst = max(
        float((a.double() - b.double()).abs().nan_to_num(float("inf")).max()) for a, b in pairs
    )
    return max(worst, 1e-30)


def eager(subject: Subject, model: nn.Module, twin: nn.Module) -> tuple[Any, Any]:
    return lambda x: model(**x), lambda x: twin(**x)


def whole(**options: Any) -> Callable[..., tuple[Any, Any]]:
    def compiled(subject: Subject, model: nn.Module, twin: nn.Module) -> tuple[Any, Any]:
        ours = torch.compile(model, fullgraph=True, **options)
        theirs = torch.compile(twin, fullgraph=True, **options)
        return lambda x: ours(**x), lambda x: theirs(**x)

    return compiled


def regional(subject: Subject, model: nn.Module, twin: nn.Module) -> tuple[Any, Any]:
    for block in (*blocks_of(twin, model), *blocks_of(model, model)):
        block.compile(fullgraph=True)
    return eager(subject, model, twin)


def export(subject: Subject, model: nn.Module, twin: nn.Module) -> tuple[Any, Any]:
    """The second block, with the arguments that a pass gave it."""
    block, like = blocks_of(model, model)[1], blocks_of(twin, model)[1]
    seen: list[Any] = []
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    model(**subject.inputs[0])
    hook.remove()
    args, kwargs = seen[0]
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    # A block that torch cannot export resident is not ours to judge.
    theirs = torch.export.export(like, args, kwargs).module()
    ours = nexus.export(block, args, kwargs).module()

    def run(x: Inputs) -> Any:
        model(**x)
        return ours(*args, **kwargs)

    return run, lambda x: theirs(*args, **kwargs)


FORMS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "eager": eager,
    "fullgraph": whole(),
    "regional": regional,
    "dynamic": whole(dynamic=True),
    "export": export,
}


def one_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return f"{type(error).__name__}: {text}"[:120].replace("|", "/")


def measure(subject: Subject, column: str) -> Cell:
    """Never raises: a failure is a cell that says so."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    sizes = subject.inputs if column in ("eager", "dynamic") else subject.inputs[:1]
    model, twin = subject.streamed(), copy.deepcopy(subject.resident)
    try:
        run, reference = FORMS[column](subject, model, twin)
        with fresh_cache():
            try:
                wanted = [reference(x) for x in sizes]
            except Exception as error:
                return Cell(False, f"resident too: {one_line(error)}")
            counters.clear()
            (first, codes), worst = run_and_get_code(run, sizes[0]), 0.0
            for _ in range(2):
                for x, want in zip(sizes, wanted, strict=True):
                    worst = max(worst, difference(run(x), want), difference(first, wanted[0]))
        cell = Cell(
            worst <= TOLERANCE,
            graphs=counters["stats"]["unique_graphs"] if column not in ("eager", "export") else 0,
            breaks=sum(counters["graph_break"].values()),
            clones=nexus.stats(model).num_cloned + copied_arenas("\n".join(codes)),
            largest_difference=worst,
        )
        return judged(cell)
    except Exception as error:
        traceback.print_exc()
        return Cell(False, one_line(error))
    finally:
        nexus.close(model)


def judged(cell: Cell) -> Cell:
    if cell.largest_difference > TOLERANCE:
        cell.note = f"differs by {cell.largest_difference:.0e}"
    elif cell.breaks or cell.clones:
        cell.passes, cell.note = False, f"{cell.breaks} breaks, {cell.clones} clones"
    return cell


def copied_arenas(code: str) -> int:
    """Buffers of bytes in generated code: nothing but a copy of an arena would be one."""
    return len(re.findall(r"empty_strided_cpu\([^)]*\)[^)]*torch\.uint8\)", code))


def table(cells: dict[str, dict[str, Cell]], columns: list[str]) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |"
        for name, row in cells.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="one architecture, two columns")
    parser.add_argument("--only", action="append", choices=ARCHITECTURES)
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = options.only or (["GPT-2"] if options.toy else list(ARCHITECTURES))
    columns = ["eager", "export"] if options.toy else options.columns
    os.environ["NEXUS_POISON"] = "1"
    cells: dict[str, dict[str, Cell]] = {}
    with torch.no_grad():
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                subject = Subject(ARCHITECTURES[name], Path(folder))
                cells[name] = {column: measure(subject, column) for column in columns}
            print(name, *map(str, cells[name].values()), sep=" | ", file=sys.stderr, flush=True)
    print(table(cells, columns))
    failed = [f"{name} {c}" for name, row in cells.items() for c in columns if not row[c].passes]
    print(f"\nfailed: {', '.join(failed) or 'none'}")
    if options.json:
        plain = {name: {c: asdict(cell) for c, cell in row.items()} for name, row in cells.items()}
        options.json.write_text(json.dumps({"cells": plain, "machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
