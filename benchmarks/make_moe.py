"""Writes a mixture-of-experts checkpoint of random weights whose real router behaves like a text's.

    embedding = common + topic + noise of the token     rows of the routers: random directions
    text      = topics of Zipf's popularity, each for tens of tokens

Random weights route at random, and no cache can profit from that. Here the residual stream keeps
the embedding (layers add little to it), so that tokens of one topic choose alike, and what all
tokens have in common makes some experts popular. The topic's share is tuned, on the model's own
routers, until consecutive tokens share the wanted part of their experts. `prompt_ids.json` holds a
text: greedy tokens of random weights would leave its topics, so it is to be fed token by token.

Nothing is ever in memory but one tensor and the embeddings.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

PAGE_BYTES = 4096
GIB = 1 << 30
# Of a shard; more than any tensor here.
SHARD_BYTES = GIB
BFLOAT16_BYTES = 2
NUM_TOPICS = 24
TOPIC_TOKENS = 40
TOPIC_ZIPF = 1.0
# Of an embedding's variance, what all tokens have in common: popular experts.
COMMON_SHARE = 0.12
# What a layer adds to the residual stream, of the stream's own size.
LAYER_SHARE = 0.06
# Standard deviation of a router's logits: weights of a selection differ, none is all.
LOGIT_SCALE = 1.2
PROMPT_TOKENS = 16384
console = Console(stderr=True)


@dataclass(frozen=True)
class Shape:
    """Of a Qwen3-MoE. `overlap` is the wanted share of experts that consecutive tokens share."""

    layers: int
    experts: int = 64
    top_k: int = 8
    hidden: int = 1024
    intermediate: int = 512
    vocabulary: int = 8192
    overlap: float = 0.38
    seed: int = 0

    @property
    def head_dim(self) -> int:
        return min(64, self.hidden // 4)

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * BFLOAT16_BYTES

    @property
    def layer_bytes(self) -> int:
        return self.experts * self.expert_bytes

    @classmethod
    def of_size(cls, nbytes: int, **others: int | float) -> Shape:
        """As many layers as come closest to a size on disk."""
        one = cls(1, **others)  # type: ignore[arg-type]
        return cls(max(1, round(nbytes / one.layer_bytes)), **others)  # type: ignore[arg-type]


# -- the text --------------------------------------------------------------------------------------


def topic_of(shape: Shape) -> torch.Tensor:
    """The topic of every token of the vocabulary."""
    return torch.arange(shape.vocabulary) % NUM_TOPICS


def write_text(shape: Shape, num_tokens: int) -> list[int]:
    """Token ids: about `TOPIC_TOKENS` of a topic, then another, the popular ones more often."""
    random = torch.Generator().manual_seed(shape.seed + 1)
    popularity = (torch.arange(NUM_TOPICS) + 1.0).pow(-TOPIC_ZIPF)
    words = [torch.where(topic_of(shape) == topic)[0] for topic in range(NUM_TOPICS)]
    ids: list[int] = []
    topic = 0
    for _ in range(num_tokens):
        if not ids or float(torch.rand((), generator=random)) < 1 / TOPIC_TOKENS:
            topic = int(torch.multinomial(popularity, 1, generator=random))
        choice = torch.randint(len(words[topic]), (), generator=random)
        ids.append(int(words[topic][choice]))
    return ids


def make_embeddings(shape: Shape, topic_share: float) -> torch.Tensor:
    """[vocabulary, hidden], float32, unit variance."""
    random = torch.Generator().manual_seed(shape.seed + 2)
    common = torch.randn(shape.hidden, generator=random)
    topics = torch.randn(NUM_TOPICS, shape.hidden, generator=random)
    noise = torch.randn(shape.vocabulary, shape.hidden, generator=random)
    rest = 1 - COMMON_SHARE - topic_share
    return (
        math.sqrt(COMMON_SHARE) * common
        + math.sqrt(topic_share) * topics[topic_of(shape)]
        + noise.mul_(math.sqrt(rest))
    )


def tune_topic_share(shape: Shape) -> float:
    """The share with which consecutive tokens share `shape.overlap` of their experts."""
    ids = torch.tensor(write_text(shape, 1024))
    routers = [_router(shape, layer) for layer in range(min(4, shape.layers))]
    low, high = 0.0, 0.95 - COMMON_SHARE
    for _ in range(12):
        middle = (low + high) / 2
        hidden = make_embeddings(shape, middle)[ids]
        chosen = torch.stack([(hidden @ w.t()).topk(shape.top_k).indices for w in routers])
        if overlap_of(chosen) < shape.overlap:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def overlap_of(chosen: torch.Tensor) -> float:
    """Of [layers, tokens, top_k]: the mean share of experts that the token before chose too."""
    before, after = chosen[:, :-1, :, None], chosen[:, 1:, None, :]
    return float((before == after).any(dim=2).float().mean())


def popularity_of(chosen: torch.Tensor, num_experts: int) -> tuple[float, float]:
    """Of [layers, tokens, top_k]: the share of the most used fifth, and the first over the mean."""
    shares, tops = [], []
    for layer in chosen:
        counts = torch.bincount(layer.flatten(), minlength=num_experts).float()
        counts = counts.sort(descending=True).values / counts.sum()
        shares.append(float(counts[: max(1, round(num_experts / 5))].sum()))
        tops.append(float(counts[0]) * num_experts)
    return sum(shares) / len(shares), sum(tops) / len(tops)


# -- tensors ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A tensor to be written: normal numbers of `std`, or ones where it is 0."""

    name: str
    shape: tuple[int, ...]
    std: float

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BFLOAT16_BYTES


def _router(shape: Shape, layer: int) -> torch.Tensor:
    """float32 [experts, hidden]."""
    random = torch.Generator().manual_seed(1000 * (shape.seed + 1) + layer)
    weight = torch.randn(shape.experts, shape.hidden, generator=random)
    return weight.mul_(LOGIT_SCALE / math.sqrt(shape.hidden))


def expert_specs(shape: Shape, layer: int, *, is_fused: bool) -> Iterator[Spec]:
    prefix = f"model.layers.{layer}.mlp.experts"
    into = 1 / math.sqrt(shape.hidden)
    # silu(gate) * up of unit normals has a standard deviation of about 0.6; a weighted sum of k
    # experts has about 1 / sqrt(k) of one.
    out = LAYER_SHARE * math.sqrt(shape.top_k) / (0.6 * math.sqrt(shape.intermediate))
    inner, outer = (shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    if is_fused:
        both = (shape.experts, 2 * shape.intermediate, shape.hidden)
        yield Spec(f"{prefix}.down_proj", (shape.experts, *outer), out)
        yield Spec(f"{prefix}.gate_up_proj", both, into)
        return
    for expert in range(shape.experts):
        yield Spec(f"{prefix}.{expert}.down_proj.weight", outer, out)
        yield Spec(f"{prefix}.{expert}.gate_proj.weight", inner, into)
        yield Spec(f"{prefix}.{expert}.up_proj.weight", inner, into)


def dense_specs(shape: Shape) -> Iterator[Spec]:
    into = 1 / math.sqrt(shape.hidden)
    num_heads = shape.hidden // shape.head_dim
    keys = max(1, num_heads // 4) * shape.head_dim
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield Spec(f"{prefix}.input_layernorm.weight", (shape.hidden,), 0)
        yield Spec(f"{prefix}.post_attention_layernorm.weight", (shape.hidden,), 0)
        yield Spec(f"{prefix}.self_attn.q_norm.weight", (shape.head_dim,), 0)
        yield Spec(f"{prefix}.self_attn.k_norm.weight", (shape.head_dim,), 0)
        yield Spec(f"{prefix}.self_attn.q_proj.weight", (shape.hidden, shape.hidden), into)
        yield Spec(f"{prefix}.self_attn.k_proj.weight", (keys, shape.hidden), into)
        yield Spec(f"{prefix}.self_attn.v_proj.weight", (keys, shape.hidden), into)
        yield Spec(
            f"{prefix}.self_attn.o_proj.weight", (shape.hidden, shape.hidden), LAYER_SHARE * into
        )
        yield Spec(f"{prefix}.mlp.gate.weight", (shape.experts, shape.hidden), LOGIT_SCALE * into)
    yield Spec("model.norm.weight", (shape.hidden,), 0)
    yield Spec("model.embed_tokens.weight", (shape.vocabulary, shape.hidden), 1)
    yield Spec("lm_head.weight", (shape.vocabulary, shape.hidden), into)


def _values(shape: Shape, spec: Spec, number: int, embeddings: torch.Tensor) -> torch.Tensor:
    if spec.name == "model.embed_tokens.weight":
        return embeddings
    if spec.name.endswith(".mlp.gate.weight"):
        return _router(shape, int(spec.name.split(".")[2]))
    if spec.std == 0:
        return torch.ones(spec.shape)
    random = torch.Generator().manual_seed((shape.seed + 1) * 1_000_003 + number)
    return torch.randn(spec.shape, generator=random).mul_(spec.std)


# -- files -----------------------------------------------------------------------------------------


def shards(specs: list[Spec], most: int) -> list[list[Spec]]:
    """As many tensors in a file as fit."""
    files: list[list[Spec]] = [[]]
    used = 0
    for spec in specs:
        if files[-1] and used + spec.nbytes > most:
            files.append([])
            used = 0
        files[-1].append(spec)
        used += spec.nbytes
    return files


def header(specs: list[Spec], alignment: int) -> bytes:
    """Of a safetensors file, so long that the first tensor begins at a multiple of `alignment`."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        offsets = [end, end + spec.nbytes]
        entries[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": offsets}
        end += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % alignment)
    return len(text).to_bytes(8, "little") + text


def make_moe(
    path: Path, shape: Shape, *, is_fused: bool = False, is_aligned: bool = True
) -> dict[str, object]:
    """Write the model's folder: all of it, or nothing.

    Args:
        path: The folder; must not exist.
        shape: Of the model.
        is_fused: One tensor for all experts of a layer, not three for each expert.
        is_aligned: Whether every expert's tensor begins on a page of its file; else tensors are in
            the order of their names, at multiples of 8 as in most files in the world.

    Returns:
        topic_share, bytes and layers, as also written to make_moe.json.

    Raises:
        ValueError: Aligned experts whose tensors are no whole pages.
    """
    tensor_bytes = shape.hidden * shape.intermediate * BFLOAT16_BYTES
    if is_aligned and tensor_bytes % PAGE_BYTES:
        raise ValueError(
            f"hidden x intermediate must be whole pages to be aligned, got {tensor_bytes} bytes; "
            "take a product that is a multiple of 2048, or --no-aligned"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        facts = _write(temporary, shape, is_fused=is_fused, is_aligned=is_aligned)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return facts


def _write(folder: Path, shape: Shape, *, is_fused: bool, is_aligned: bool) -> dict[str, object]:
    experts = [s for n in range(shape.layers) for s in expert_specs(shape, n, is_fused=is_fused)]
    dense = list(dense_specs(shape))
    # Experts first: they are whole pages, and what is not comes behind them.
    specs = experts + dense if is_aligned else sorted(experts + dense, key=lambda s: s.name)
    numbers = {spec.name: number for number, spec in enumerate(sorted(specs, key=lambda s: s.name))}
    topic_share = tune_topic_share(shape)
    embeddings = make_embeddings(shape, topic_share)
    files = shards(specs, SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for index, inside in enumerate(files, 1):
        name = f"model-{index:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys((spec.name for spec in inside), name)
        with (folder / name).open("wb") as out:
            out.write(header(inside, PAGE_BYTES if is_aligned else 8))
            for spec in inside:
                values = _values(shape, spec, numbers[spec.name], embeddings)
                out.write(values.to(torch.bfloat16).view(torch.uint8).numpy().data)
    nbytes = sum(spec.nbytes for spec in specs)
    index_content = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_content))
    (folder / "prompt_ids.json").write_text(json.dumps(write_text(shape, PROMPT_TOKENS)))
    _write_config(folder, shape)
    facts = asdict(shape) | {
        "topic_share": topic_share,
        "bytes": nbytes,
        "expert_bytes": shape.layers * shape.layer_bytes,
        "is_fused": is_fused,
        "is_aligned": is_aligned,
    }
    (folder / "make_moe.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _write_config(folder: Path, shape: Shape) -> None:
    from transformers import Qwen3MoeConfig

    num_heads = shape.hidden // shape.head_dim
    Qwen3MoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        moe_intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(1, num_heads // 4),
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        max_position_embeddings=max(32768, PROMPT_TOKENS),
        architectures=["Qwen3MoeForCausalLM"],
        dtype=torch.bfloat16,
    ).save_pretrained(folder)


# -- what came of it -------------------------------------------------------------------------------


def measure_routing(path: Path, num_tokens: int = 1024) -> dict[str, float]:
    """Run the plain model over its text and look at what its routers chose. Needs its memory.

    Returns:
        overlap: Share of experts that the token before chose too, in the same layer.
        popular_share: Of selections, those of each layer's most used fifth of experts.
        popular_over_mean: Use of each layer's most used expert, over the mean.
        logits_std: Of the outputs; finite, or this raises.

    Raises:
        ValueError: An output is not finite.
    """
    from transformers import Qwen3MoeForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = Qwen3MoeForCausalLM.from_pretrained(path, dtype="auto").eval()
    ids = torch.tensor([json.loads((path / "prompt_ids.json").read_text())[:num_tokens]])
    chosen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, result: chosen.append(result[2]))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        logits = model(ids).logits.float()
    for hook in hooks:
        hook.remove()
    if not bool(logits.isfinite().all()):
        raise ValueError(f"outputs of {path} are not finite")
    stacked = torch.stack(chosen)
    share, top = popularity_of(stacked, model.config.num_experts)
    return {
        "overlap": overlap_of(stacked),
        "popular_share": share,
        "popular_over_mean": top,
        "logits_std": float(logits.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=4, help="size of all experts, about")
    parser.add_argument("--layers", type=int, help="instead of --gib")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--overlap", type=float, default=0.38)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fused", action="store_true", help="one tensor for a layer's experts")
    parser.add_argument("--aligned", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, default=True)
    options = vars(parser.parse_args())
    names = ("experts", "top_k", "hidden", "intermediate", "vocabulary", "overlap", "seed")
    fields = {name: options[name] for name in names}
    layers = options["layers"]
    shape = (
        Shape(layers, **fields) if layers else Shape.of_size(int(options["gib"] * GIB), **fields)
    )
    facts = make_moe(
        options["folder"], shape, is_fused=options["fused"], is_aligned=options["aligned"]
    )
    if options["measure"]:
        facts |= measure_routing(options["folder"])
        (options["folder"] / "make_moe.json").write_text(json.dumps(facts, indent=2) + "\n")
    console.print_json(data=facts)


if __name__ == "__main__":
    sys.exit(main())
