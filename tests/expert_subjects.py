"""Mixtures of experts that tests stream: four architectures of transformers with random weights, on
disk, resident, and what is asked of them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import nexus_ext as nexus
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.errors import BudgetError
from nexus_ext.pretrained import build_empty
from nexus_ext.quant.formats import PackedWeights

VOCABULARY = 128
# Of a test's models; more than all of them need.
ROOMY = "64MiB"


@dataclass(frozen=True)
class Architecture:
    """A class of transformers and a small config.

    Attributes:
        top_k: Experts of a token.
        num_experts: Of a layer.
        num_layers: With experts.
    """

    kind: str
    config: Callable[[], Any]
    top_k: int
    num_experts: int
    num_layers: int

    def build(self, dtype: torch.dtype, seed: int = 0) -> Any:
        """With random weights, large enough that every expert can be told by the logits."""
        torch.manual_seed(seed)
        model = getattr(transformers, self.kind)(self.config()).to(dtype).eval()
        model.config.dtype = dtype
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if name.endswith("bias"):
                    tensor.normal_(std=0.2)
        return model.requires_grad_(False)


COMMON = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "mixtral": Architecture(
        "MixtralForCausalLM",
        lambda: transformers.MixtralConfig(
            **COMMON,
            num_hidden_layers=3,
            intermediate_size=32,
            num_local_experts=8,
            num_experts_per_tok=2,
        ),
        2,
        8,
        3,
    ),
    "qwen3": Architecture(
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(
            **COMMON,
            head_dim=32,
            num_hidden_layers=3,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_experts=12,
            num_experts_per_tok=4,
        ),
        4,
        12,
        3,
    ),
    "deepseek": Architecture(
        "DeepseekV3ForCausalLM",
        lambda: transformers.DeepseekV3Config(
            **COMMON,
            num_hidden_layers=3,
            first_k_dense_replace=1,
            intermediate_size=64,
            moe_intermediate_size=32,
            n_routed_experts=12,
            num_experts_per_tok=3,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=16,
        ),
        3,
        12,
        2,
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        lambda: transformers.GptOssConfig(
            **COMMON,
            head_dim=32,
            num_hidden_layers=3,
            intermediate_size=32,
            num_local_experts=12,
            num_experts_per_tok=2,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        2,
        12,
        3,
    ),
}
FORMATS = ["bf16", "nf4"]
MODES: dict[str, dict[str, Any]] = {
    "direct": {"io": "direct"},
    "buffered": {"io": "buffered"},
    "mapped, kept": {"io": "mmap", "trailing_drop": False},
    "mapped, dropped": {"io": "mmap", "trailing_drop": True},
}
BUDGETS = ["floor", "floor + 1", "20%", "80%", "100%"]


@dataclass
class Subject:
    """A model on disk, resident, and without weights.

    Attributes:
        folder: The checkpoint that streams.
        resident: With the same weights, those of packed ones decoded.
        model: Empty, or streamed; one for all tests, closed in between.
        floor: The smallest expert budget.
        slot_bytes: Of one expert.
        dense_bytes: The smallest budget for everything else.
    """

    architecture: Architecture
    folder: Path
    resident: Any
    model: Any = None
    floor: int = 0
    slot_bytes: int = 0
    dense_bytes: int = 0

    def __post_init__(self) -> None:
        self.checkpoint = Checkpoint.open(self.folder)
        self.model = build_empty(self.folder, self.checkpoint)
        with pytest.raises(BudgetError) as refused:
            self.stream(expert_budget=1)
        self.floor = named_bytes(refused.value)
        with self.stream(expert_budget=self.floor, io="direct") as model:
            plan = nexus.plan_of(model)
            self.slot_bytes = plan.experts.slot_bytes[0]
            self.dense_bytes = plan.minimum_bytes - self.floor
            self.total = plan.experts.num_experts * self.slot_bytes

    @property
    def is_packed(self) -> bool:
        return self.folder.name.endswith("packed")

    def stream(self, *, budget: int | str = ROOMY, **options: Any) -> Any:
        return nexus.stream(self.model, self.checkpoint, budget=budget, **options)

    def close(self) -> None:
        """Streamed or not."""
        if "_nexus" in self.model.__dict__:
            nexus.close(self.model)

    def expert_bytes(self, budget: str) -> int:
        """The bytes of one of `BUDGETS`."""
        if budget.endswith("%"):
            return int(float(budget[:-1]) / 100 * self.total)
        return self.floor + (self.slot_bytes if budget == "floor + 1" else 0)


def named_bytes(error: BaseException) -> int:
    """The number of bytes that a BudgetError asks for."""
    found = re.search(r"needed (\d+)", str(error))
    assert found is not None, error
    return int(found[1])


def load_resident(folder: Path, **options: Any) -> Any:
    """transformers' own, frozen as streamed weights are: torch multiplies by others differently."""
    chosen = {"experts_implementation": "grouped_mm", "dtype": "auto"} | options
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **chosen)
    return model.eval().requires_grad_(False)


def decoded(plain: Path, packed: Path, folder: Path) -> Path:
    """The checkpoint `plain` with the weights that `packed` decodes to."""
    checkpoint = Checkpoint.open(packed)
    weights = PackedWeights(checkpoint)
    tensors = load_file(plain / "model.safetensors")
    for name, tensor in tensors.items():
        found = weights.find(name)
        if found is None:
            continue
        parts = dict(found.constants)
        for part, source in found.parts.items():
            path = checkpoint.files[checkpoint.entries[source].file].path
            with safe_open(path, "pt") as file:
                parts[part] = file.get_tensor(source)
        tensors[name] = found.packing.decode(parts, tensor.dtype)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((plain / "config.json").read_text())
    return folder


@functools.cache
def make_subject(name: str, format_: str, folder: Path) -> Subject:
    """Written, converted and loaded once: "bf16", "f32", or "nf4" of the latter. (A difference in
    the last bit of float32 is none between tokens.)
    """
    architecture = ARCHITECTURES[name]
    plain = folder / f"{name}-{format_}"
    architecture.build(torch.bfloat16 if format_ == "bf16" else torch.float32).save_pretrained(
        plain
    )
    if format_ != "nf4":
        return Subject(architecture, plain, load_resident(plain))
    packed = folder / f"{name}-packed"
    nexus.convert(plain, packed, format_)
    resident = load_resident(decoded(plain, packed, folder / f"{name}-decoded"))
    return Subject(architecture, packed, resident)


# -- what is asked -------------------------------------------------------------------------------


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Tokens that are none of the special ones."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


PROMPT, PROMPTS = ids(1, 11), ids(8, 5)
# What is decoded is given: a wrong token would only be the first of many.
TEXT, TEXTS = ids(1, 24, seed=2), ids(8, 6, seed=2)


@torch.inference_mode()
def logits(model: Any, prompts: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Of a prefill, and of each token after it: [batch, length, vocabulary]."""
    answer = model(prompts, use_cache=True)
    found = [answer.logits]
    for column in text.split(1, dim=1):
        answer = model(column, past_key_values=answer.past_key_values, use_cache=True)
        found.append(answer.logits)
    return torch.cat(found, dim=1)


def generate(model: Any, prompts: torch.Tensor, num_tokens: int) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
    )
    assert tokens.shape[1] == prompts.shape[1] + num_tokens
    return tokens


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]
