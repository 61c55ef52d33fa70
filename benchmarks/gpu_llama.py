"""The model of the GPU benchmark: the shape of Llama-3.2-3B, random weights, written once.

The weights are drawn on the device and written one after another: no time, no memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from gpu_place import Place
from safetensors import safe_open
from torch import nn

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.pretrained import build_empty

BLOCKS = "model.layers"
_SEED = 0
_WEIGHTS = "model.safetensors"
# Weights begin on a page, so that direct reads land in place on every device.
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class Shape:
    """Of a Llama, and the batches [sequences, tokens of each] by their number of tokens."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    num_blocks: int
    vocabulary: int
    batches: dict[int, tuple[int, int]]


# 5.6 GB of blocks, 201 MB each. The largest batch computes longer than any link takes.
FULL = Shape(
    3072,
    8192,
    24,
    8,
    28,
    128256,
    {1: (1, 1), 256: (1, 256), 2048: (1, 2048), 8192: (1, 8192), 65536: (8, 8192)},
)
TINY = Shape(128, 256, 4, 2, 6, 256, {1: (1, 1), 16: (1, 16), 64: (2, 32)})


def shape_for(place: Place) -> Shape:
    return TINY if place.is_simulated else FULL


def write_llama(folder: Path, shape: Shape, where: torch.device) -> int:
    """A transformers folder; returns the bytes of its weights. On disk when this returns."""
    config = _config(shape)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = _llama(config)
    # A tied head is the embedding.
    names = {name: tensor.shape for name, tensor in model.named_parameters()}
    with open(folder / _WEIGHTS, "wb") as file:
        nbytes = _write(file, names, where)
        file.flush()
        os.fsync(file.fileno())
    return nbytes


def shorten(folder: Path, short: Path, num_blocks: int) -> Path:
    """The first blocks of a model, over the same file."""
    short.mkdir()
    config = json.loads((folder / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_blocks}))
    (short / _WEIGHTS).symlink_to((folder / _WEIGHTS).resolve())
    return short


def weights_of(folder: Path) -> Path:
    return folder / _WEIGHTS


def empty_llama(folder: Path) -> nn.Module:
    """Parameters on meta."""
    return build_empty(folder, Checkpoint.open(folder)).requires_grad_(False)


def resident_llama(folder: Path, where: torch.device) -> nn.Module:
    """All of it in one memory."""
    model = empty_llama(folder)
    fill(model, folder, where, [name for name, _ in model.named_parameters()])
    return model.to(where)


def fill(model: nn.Module, folder: Path, where: torch.device, names: Iterable[str]) -> None:
    """Give a model these of its weights; the others stay where they are."""
    with safe_open(folder / _WEIGHTS, framework="pt", device=str(where)) as file:
        tensors = {name: file.get_tensor(name) for name in names}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    model.requires_grad_(False)


def ids_for(shape: Shape, where: torch.device) -> dict[int, torch.Tensor]:
    """Random tokens, by their number."""
    generator = torch.Generator().manual_seed(_SEED)
    return {
        tokens: torch.randint(0, shape.vocabulary, batch, generator=generator).to(where)
        for tokens, batch in shape.batches.items()
    }


def forward(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits of each sequence's last token."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    return logits


def _config(shape: Shape) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_blocks,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    )


def _llama(config: Any) -> nn.Module:
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(config)
    return model


def _write(file: BinaryIO, shapes: dict[str, torch.Size], where: torch.device) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _PAGE_BYTES)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in _draw(shapes, where):
        tensor.view(torch.uint8).cpu().numpy().tofile(file)
    return end


def _draw(shapes: dict[str, torch.Size], where: torch.device) -> Iterator[torch.Tensor]:
    generator = torch.Generator(where).manual_seed(_SEED)
    for shape in shapes.values():
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=where)
        is_norm = len(shape) == 1
        yield drawn.normal_(float(is_norm), 0.1 if is_norm else 0.02, generator=generator)
