"""`nexus demo`: a model of about 1 GB, made here, streamed under a quarter of its size.

No network. The model is a Llama with random weights; its greedy tokens must equal those of the
same model in memory.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nexus_ext.bench import bench
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.config import home_folder
from nexus_ext.errors import MissingExtra

__all__ = ["demo", "make_llama"]

_NUM_BLOCKS = 20
_NUM_TOKENS = 16


def demo(progress: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Make the model if it is not there, stream it, compare it. Blocks for a minute or so.

    Returns:
        What `bench` returns; `tokens_equal` is the verdict.
    """
    path = home_folder() / "demo" / "llama-1gb"
    if not (path / "config.json").exists():
        progress(f"writing a random Llama of 1 GB to {path}")
        make_llama(path, num_blocks=_NUM_BLOCKS)
    budget = Checkpoint.open(path).nbytes // 4
    return bench(
        path,
        num_steps=5,
        budget=budget,
        io="direct",
        generate_tokens=_NUM_TOKENS,
        progress=progress,
    )


def make_llama(
    path: Path,
    *,
    num_blocks: int,
    hidden: int = 1024,
    intermediate: int = 2816,
    vocabulary: int = 4096,
    dtype: torch.dtype = torch.float32,
    data_alignment: int = 4096,
) -> None:
    """Write a Llama with seeded random weights as a transformers folder: all of it, or nothing.

    Args:
        path: The folder; must not exist.
        num_blocks: Decoder blocks; with the defaults 51 MB each.
        hidden, intermediate, vocabulary, dtype: Of the model.
        data_alignment: Where in the file the weights begin is a multiple of this. From 64 on they
            can be read in place; most files in the world have 8.

    Raises:
        MissingExtra: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingExtra("The demo needs transformers: pip install 'nexus_ext[hf]'.") from None
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )
    model: Any = LlamaForCausalLM(config)
    model = model.to(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        config.architectures = ["LlamaForCausalLM"]
        config.dtype = dtype
        config.save_pretrained(temporary)
        _save(model.state_dict(), temporary / "model.safetensors", data_alignment)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save(tensors: dict[str, torch.Tensor], path: Path, data_alignment: int) -> None:
    """A plain safetensors file; a metadata entry pads the header to the alignment."""
    from safetensors.torch import save_file

    metadata = {"format": "pt", "padding": ""}
    save_file(tensors, path, metadata)
    unpadded = _data_offset(path)
    metadata["padding"] = " " * (-unpadded % data_alignment)
    save_file(tensors, path, metadata)


def _data_offset(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
