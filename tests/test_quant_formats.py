"""Checkpoints that others packed: streamed as they are, trained over and compiled; and what a
broken one says. Freed arenas are poisoned throughout.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters

import nexus_ext as nexus
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.errors import (
    BudgetError,
    CheckpointFormatError,
    CheckpointMismatch,
    NexusError,
    StreamError,
)
from nexus_ext.pretrained import plan_pretrained
from nexus_ext.quant import INT8Config, NF4Config, reference
from nexus_ext.quant.packed import pack

NUM_LAYERS = 6
NUM_PASSES = 8
IDS = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(3))
IO = ["direct", "buffered", "mmap"]
Tensors = dict[str, torch.Tensor]

# torch's own tools warn about each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    # peft asks transformers under a name that is being changed.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NEXUS_POISON", "1")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# -- what bitsandbytes wrote -----------------------------------------------------------------------

_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_NESTED = _NF4 | {"bnb_4bit_use_double_quant": True}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": _NF4,
    "nf4-nested": _NESTED,
    "fp4": _NF4 | {"bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "stored as bfloat16": _NF4 | {"bnb_4bit_quant_storage": torch.bfloat16},
    "in many shards": _NESTED,
}


def write_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        pad_token_id=0,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_with_bitsandbytes(plain: Path, folder: Path, kind: str) -> torch.Tensor:
    """Returns the logits of bitsandbytes itself."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        plain,
        quantization_config=BitsAndBytesConfig(
            bnb_4bit_compute_dtype=torch.bfloat16, **KINDS[kind]
        ),
        device_map="cpu",
        dtype=torch.bfloat16,
    )
    # First: its forward on a CPU repacks its own weights.
    model.save_pretrained(folder, max_shard_size="78KB" if kind == "in many shards" else "5GB")
    return logits(model)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(ids).logits
    return result


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def written(plain: Path) -> Callable[[str], tuple[Path, torch.Tensor]]:
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def write(kind: str) -> tuple[Path, torch.Tensor]:
        if kind not in made:
            folder = plain.parent / kind.replace(" ", "-")
            made[kind] = folder, write_with_bitsandbytes(plain, folder, kind)
        return made[kind]

    return write


@functools.cache
def least_budget(path: Path) -> int:
    return plan_pretrained(path, lookahead=1).minimum_bytes


def open_llama(path: Path, **options: Any) -> Any:
    """Two arenas for six blocks, unless the options say otherwise."""
    least = least_budget(path)
    options = {"budget": least, "io": "direct", "lookahead": 1} | options
    model = nexus.from_pretrained(path, **options)
    if options["budget"] == least:
        assert len(nexus.plan_of(model).streamed) == NUM_LAYERS
    else:
        assert len(nexus.plan_of(model).resident) == NUM_LAYERS
    return model


def stored_in(folder: Path) -> Tensors:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def decoded(tensors: Tensors, name: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The weight, by the reference."""
    q, scale = tensors[name], tensors.get(name.removesuffix("weight") + "SCB")
    if scale is not None:
        return reference.dequantize_int8(q, scale, dtype)
    [state] = [n for n in tensors if n.startswith(f"{name}.quant_state.bitsandbytes__")]
    fields = json.loads(bytes(tensors[state].tolist()))
    absmax = tensors[f"{name}.absmax"]
    if "nested_offset" in fields:
        absmax = reference.dequantize_absmax(
            absmax,
            tensors[f"{name}.nested_absmax"],
            tensors[f"{name}.nested_quant_map"],
            torch.tensor(fields["nested_offset"]),
            fields["nested_blocksize"],
        )
    code = tensors[f"{name}.quant_map"]
    return reference.dequantize_nf4(q, absmax, fields["blocksize"], fields["shape"], dtype, code)


def weights_seen(model: nn.Module, run: Callable[[], object]) -> Tensors:
    """The weights of all Linear layers, read while each is called."""
    seen: Tensors = {}

    def reading(name: str) -> Callable[..., None]:
        def read(module: nn.Module, args: object) -> None:
            seen[f"{name}.weight"] = module.weight.detach().clone()

        return read

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [module.register_forward_pre_hook(reading(name)) for name, module in linears]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_model_answers_as_the_resident_one(written: Any, kind: str) -> None:
    path, _ = written(kind)
    inputs = (IDS, IDS[:1, :1], IDS[:, :3])
    with open_llama(path, budget="1GiB") as model:
        wants = [logits(model, ids) for ids in inputs]
    assert all(want.isfinite().all() for want in wants)
    for io in IO:
        with open_llama(path, io=io) as model:
            for ids, want in zip(inputs * 2, wants * 2, strict=True):
                assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_close_to_those_of_bitsandbytes(written: Any, kind: str) -> None:
    path, theirs = written(kind)
    with open_llama(path) as model:
        assert torch.allclose(logits(model), theirs, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_reference(plain: Path, written: Any, kind: str) -> None:
    from transformers import LlamaForCausalLM

    path, _ = written(kind)
    tensors = stored_in(path)
    with open_llama(path) as model:
        seen = weights_seen(model, lambda: logits(model))
        ours = logits(model)
    twin = LlamaForCausalLM.from_pretrained(plain, dtype="auto").eval().requires_grad_(False)
    assert len(seen) == 7 * NUM_LAYERS + 1
    for name, weight in seen.items():
        want = tensors[name] if name == "lm_head.weight" else decoded(tensors, name)
        assert torch.equal(weight, want), name
        twin.get_parameter(name).copy_(want)
    # Decoded and multiplied tile by tile: the last bits may differ.
    assert torch.allclose(ours, logits(twin), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "fp4", "stored as bfloat16"])
def test_four_bits_decode_as_bitsandbytes_decodes_them(written: Any, kind: str) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    path, _ = written(kind)
    tensors = stored_in(path)
    with open_llama(path) as model:
        seen = weights_seen(model, lambda: logits(model))
    for name in seen.keys() - {"lm_head.weight"}:
        parts = {n: t for n, t in tensors.items() if n.startswith(f"{name}.")}
        theirs = Params4bit.from_prequantized(tensors[name], parts, device="cpu")
        weight = dequantize_4bit(theirs.data, theirs.quant_state)
        assert torch.equal(seen[name], weight), name


def test_parts_of_one_weight_may_lie_in_several_shards(written: Any) -> None:
    path, _ = written("in many shards")
    places = Checkpoint.open(path).entries
    files = {
        name: {entry.file for other, entry in places.items() if other.startswith(name)}
        for name in places
        if name.endswith("proj.weight")
    }
    assert max(len(own) for own in files.values()) > 1


def test_only_what_moves_is_read_again(written: Any) -> None:
    path, _ = written("nf4")
    with open_llama(path) as model:
        members = {m.name for group in model._nexus.streamer.groups for m in group.members}
        plan = nexus.plan_of(model)
        logits(model)
        before = nexus.stats(model).bytes_read
        for _ in range(NUM_PASSES):
            logits(model)
        moved = nexus.stats(model).bytes_read - before
    assert not any("quant_" in name for name in members)
    # What the first pass had asked for ahead may land after it was counted.
    ahead = sum(plan.arena_bytes)
    assert moved < 1.1 * NUM_PASSES * sum(plan.group_bytes) + ahead


def test_tokens_are_generated_alike(written: Any) -> None:
    path, _ = written("nf4-nested")
    asked = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    tokens = []
    for budget in ({}, {"budget": "1GiB"}):
        with open_llama(path, **budget) as model:
            tokens.append(model.generate(IDS, **asked))
    assert torch.equal(*tokens)
    assert tokens[0].shape == (2, 15)


# -- by hand ---------------------------------------------------------------------------------------

ODD = (33, 7)  # so many elements that neither codes nor scales end on a boundary
X = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def blocks(width: int = 64, hidden: int = 96, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    made = nn.Sequential(*(Block(width, hidden) for _ in range(NUM_LAYERS)))
    return made.to(dtype).eval().requires_grad_(False)


PACKINGS = {
    "nf4": NF4Config(),
    "nf4 in larger blocks": NF4Config(blocksize=256),
    "nf4-nested": NF4Config(blocksize=32, nested=True),
    "int8": INT8Config(),
}


def packed(model: nn.Module, kind: str = "nf4") -> Tensors:
    """A state_dict whose matrices are packed."""
    tensors: Tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("weight"):
            tensors |= pack(tensor, PACKINGS[kind]).stored(name, tensor.dtype)
        else:
            tensors[name] = tensor
    return {name: tensor.clone() for name, tensor in tensors.items()}


def stream(model: nn.Module, path: Path, **options: Any) -> Any:
    """Two arenas for six blocks, unless the options say otherwise."""
    options = {"io": "direct", "lookahead": 1, **options}
    if "budget" not in options:
        with pytest.raises(BudgetError) as refused:
            nexus.stream(model, path, budget=0, **options)
        options["budget"] = int(re.search(r"needed (\d+) =", str(refused.value))[1])
    return nexus.stream(model, path, **options)


def run(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    x = x.to(model[0].up.bias.dtype)
    with torch.no_grad():
        y: torch.Tensor = model(x)
    return y


def shift(path: Path, phase: int) -> None:
    """Rewrite a file so that its data begin `phase` bytes past a multiple of 16."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip(b" ")
    header += b" " * ((phase - 8 - len(header)) % 16)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize("io", IO)
def test_parts_at_any_offset_are_read_right(tmp_path: Path, kind: str, io: str) -> None:
    path, model = tmp_path / "odd.safetensors", blocks(*ODD)
    tensors = packed(model, kind)
    save_file(tensors, path)
    x, first = torch.randn(12, ODD[0]), None
    for phase in range(16) if io == "direct" else (0, 1, 7):
        shift(path, phase)
        with stream(copy.deepcopy(model), path, io=io) as streamed:
            assert len(nexus.plan_of(streamed).streamed) == NUM_LAYERS
            for name, weight in weights_seen(streamed, lambda m=streamed: run(m, x)).items():
                assert torch.equal(weight, decoded(tensors, name)), (phase, name)
            first = run(streamed, x) if first is None else first
            assert torch.equal(run(streamed, x), first)


def test_a_weight_outside_the_blocks_is_packed_as_well(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layers": blocks(), "head": nn.Linear(64, 40, dtype=torch.bfloat16)})
    tensors = packed(model)
    save_file(tensors, tmp_path / "model.safetensors")
    x = X.bfloat16()
    with stream(model.requires_grad_(False), tmp_path, groups="layers"), torch.no_grad():
        assert torch.equal(model.head.weight, decoded(tensors, "head.weight"))
        like = nn.functional.linear(x, decoded(tensors, "head.weight"), model.head.bias)
        assert torch.allclose(model.head(x), like, rtol=2e-2, atol=1e-2)


# -- compressed-tensors ----------------------------------------------------------------------------

STRATEGIES = {"channel": 1, "group": 4, "tensor": 0}


def compressed(model: nn.Module, strategy: str) -> Tensors:
    """As compressed-tensors writes symmetric int8: a scale for each row, group of one, or matrix"""
    tensors = dict(model.state_dict())
    for name in [name for name in tensors if name.endswith("weight")]:
        weight = tensors[name].float()
        parts = STRATEGIES[strategy]
        cells = weight.reshape(len(weight) * parts, -1) if parts else weight.reshape(1, -1)
        scale = (cells.abs().amax(1, keepdim=True) / 127).bfloat16()
        q = (cells / scale.float()).round().clamp(-128, 127).to(torch.int8)
        tensors[name] = q.reshape(weight.shape)
        tensors[f"{name}_scale"] = scale.reshape(len(weight), parts) if parts else scale.reshape(1)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def by_hand(tensors: Tensors, name: str) -> torch.Tensor:
    q, scale = tensors[name].float(), tensors[f"{name}_scale"].float()
    if scale.numel() > 1:
        scale = scale.repeat_interleave(q.shape[1] // scale.shape[1], dim=1)
    return (q * scale).to(torch.bfloat16)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("io", IO)
def test_compressed_tensors_stream_as_they_are(tmp_path: Path, strategy: str, io: str) -> None:
    model = blocks()
    tensors = compressed(model, strategy)
    save_file(tensors, tmp_path / "model.safetensors")
    resident = stream(copy.deepcopy(model), tmp_path, budget="1GiB")
    with resident, stream(copy.deepcopy(model), tmp_path, io=io) as streamed:
        assert len(nexus.plan_of(streamed).streamed) == NUM_LAYERS
        seen = weights_seen(streamed, lambda: run(streamed))
        assert len(seen) == 2 * NUM_LAYERS
        for name, weight in seen.items():
            assert torch.equal(weight, by_hand(tensors, name)), name
            model.get_parameter(name).copy_(weight)
        for x in (X, X[:1]):
            assert torch.equal(run(streamed, x), run(resident, x))
            assert torch.allclose(run(streamed, x), run(model, x), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_package_itself_decodes_the_same_weights(strategy: str) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    tensors = compressed(blocks(), strategy)
    size = 16 if strategy == "group" else None
    for name in ("0.up.weight", "5.down.weight"):
        width = tensors[name].shape[1]
        asked = QuantizationArgs(
            num_bits=8, strategy=strategy, group_size=size and width // STRATEGIES[strategy]
        )
        theirs = dequantize(tensors[name], tensors[f"{name}_scale"], args=asked)
        assert torch.equal(theirs, by_hand(tensors, name))


# -- bad input -------------------------------------------------------------------------------------

W = "1.up.weight"  # [96, 64]
STATE = f"{W}.quant_state.bitsandbytes__nf4"
ABSENT = object()
Spoil = Callable[[Tensors], None]


def text(raw: str | bytes) -> Spoil:
    data = raw.encode() if isinstance(raw, str) else raw

    def spoil(tensors: Tensors) -> None:
        tensors[STATE] = torch.tensor(list(data), dtype=torch.uint8)

    return spoil


def fields(**changes: Any) -> Spoil:
    def spoil(tensors: Tensors) -> None:
        found = json.loads(bytes(tensors[STATE].tolist())) | changes
        kept = {name: value for name, value in found.items() if value is not ABSENT}
        text(json.dumps(kept))(tensors)

    return spoil


def instead(name: str, tensor: torch.Tensor | None) -> Spoil:
    def spoil(tensors: Tensors) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return spoil


def renamed(tensors: Tensors) -> None:
    tensors[STATE.replace("nf4", "fp4")] = tensors.pop(STATE)


def cut(tensors: Tensors) -> None:
    tensors[STATE] = tensors[STATE][:-7].clone()


ZEROS = torch.zeros(192)
# How to spoil it, what the message says of the rule and of what was got, and the tensor it names.
NIBBLES: dict[str, tuple[Spoil, str, str]] = {
    "truncated JSON": (cut, r"must be JSON, got b'{", STATE),
    "no UTF-8": (text(b"\xff\xfe{}"), r"must be JSON, got", STATE),
    "nothing": (text(b""), r"must be JSON, got b''", STATE),
    "no object": (text('["nf4"]'), r"must be a JSON object, got \['nf4'\]", STATE),
    "deep": (text("[" * 60_000), r"must be (a )?JSON", STATE),
    "huge": (text("{" + " " * 70_000 + "}"), r"at most 65536 bytes, got 70002", STATE),
    "unknown type": (fields(quant_type="nf3"), r"one of nf4, fp4.*got 'nf3'", STATE),
    "no type": (fields(quant_type=ABSENT), r"one of nf4, fp4.*got None", STATE),
    "another type": (fields(quant_type="fp4"), r"that of its name, got 'fp4' in 'nf4'", STATE),
    "another name": (renamed, r"that of its name, got 'nf4' in 'fp4'", STATE.replace("nf4", "fp4")),
    "no shape": (fields(shape=ABSENT), r"shape must be a list of sizes, got None", STATE),
    "a shape of text": (fields(shape=["96", 64]), r"list of sizes, got \['96', 64\]", STATE),
    "a negative shape": (fields(shape=[-96, -64]), r"list of sizes, got \[-96, -64\]", STATE),
    "a vast shape": (fields(shape=[2**62, 2**62]), r"bytes of codes, got 3072", W),
    "blocksize 48": (fields(blocksize=48), r"power of two from 32 to 4096, got 48", STATE),
    "blocksize 16": (fields(blocksize=16), r"power of two from 32 to 4096, got 16", STATE),
    "blocksize 8192": (fields(blocksize=8192), r"power of two from 32 to 4096, got 8192", STATE),
    "blocksize true": (fields(blocksize=True), r"power of two from 32 to 4096, got True", STATE),
    "blocksize none": (fields(blocksize=None), r"power of two from 32 to 4096, got None", STATE),
    "blocksize 64.0": (fields(blocksize=64.0), r"power of two from 32 to 4096, got 64\.0", STATE),
    "nested_blocksize 0": (fields(nested_blocksize=0), r"nested_blocksize is .* got 0", STATE),
    "offset of text": (
        fields(nested_offset="1"),
        r"nested_offset must be a number .* got '1",
        STATE,
    ),
    "offset none": (
        fields(nested_offset=None),
        r"nested_offset must be a number .* got None",
        STATE,
    ),
    "a vast offset": (fields(nested_offset=10**400), r"nested_offset must be .* got 10", STATE),
    "offset NaN": (fields(nested_offset=float("nan")), r"nested_offset must be .* got nan", STATE),
    "no absmax": (instead(f"{W}.absmax", None), r"needs '1\.up\.weight\.absmax'.*none", STATE),
    "no quant_map": (instead(f"{W}.quant_map", None), r"needs '.*\.quant_map'.*none", STATE),
    "no nested_absmax": (instead(f"{W}.nested_absmax", None), r"needs '.*nested_absmax'", STATE),
    "no nested map": (instead(f"{W}.nested_quant_map", None), r"needs '.*nested_quant_map'", STATE),
    "short absmax": (
        instead(f"{W}.absmax", ZEROS[:-1].byte()),
        r"hold 192 elements of torch.uint8, got \[191\]",
        f"{W}.absmax",
    ),
    "absmax of float32": (
        instead(f"{W}.absmax", ZEROS.clone()),
        r"192 elements of torch.uint8, got \[192\] of torch.float32",
        f"{W}.absmax",
    ),
    "bytes without nesting": (
        fields(nested_offset=ABSENT),
        r"192 elements of torch.float32, got \[192\] of torch.uint8",
        f"{W}.absmax",
    ),
    "long nested_absmax": (
        instead(f"{W}.nested_absmax", torch.ones(2)),
        r"1 elements of torch.float32, got \[2\]",
        f"{W}.nested_absmax",
    ),
    "short quant_map": (
        instead(f"{W}.quant_map", torch.ones(15)),
        r"16 elements of torch.float32, got \[15\]",
        f"{W}.quant_map",
    ),
    "short nested map": (
        instead(f"{W}.nested_quant_map", torch.ones(255)),
        r"256 elements of torch.float32, got \[255\]",
        f"{W}.nested_quant_map",
    ),
    "few codes": (
        instead(W, torch.zeros(3071, 1, dtype=torch.uint8)),
        r"shape \[96, 64\] has 3072 bytes of codes, got 3071",
        W,
    ),
}


def refused(folder: Path, tensors: Tensors, error: type[Exception] = CheckpointFormatError) -> str:
    path = folder / "model.safetensors"
    save_file(tensors, path)
    model = blocks()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(error) as caught:
        nexus.stream(model, path, strict=False)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)
    assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == before
    return str(caught.value)


@pytest.mark.parametrize("flaw", NIBBLES)
def test_a_broken_four_bit_weight_is_refused(tmp_path: Path, flaw: str) -> None:
    spoil, said, name = NIBBLES[flaw]
    tensors = packed(blocks(), "nf4-nested")
    spoil(tensors)
    message = refused(tmp_path, tensors)
    assert re.search(said, message)
    assert f"; {name} in " in message
    assert re.search(r"at offset \d+\. \w+", message)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested"])
def test_scales_without_their_bytes_name_the_first_that_lacks(tmp_path: Path, kind: str) -> None:
    """A description beside a weight that is gone."""
    tensors = packed(blocks(), kind)
    del tensors[W]
    message = refused(tmp_path, tensors, CheckpointMismatch)
    assert f"lacks {W}" in message


SCB = "1.up.SCB"
ROWS = torch.ones(96)
BYTES: dict[str, tuple[Spoil, str, str]] = {
    "long scales": (instead(SCB, torch.ones(97)), r"hold 96 float32, .* got \[97\]", SCB),
    "scales of float16": (instead(SCB, ROWS.half()), r"96 float32, .* of torch.float16", SCB),
    "weights of float16": (
        instead(W, torch.ones(96, 64).half()),
        r"belong to an int8 matrix '1\.up\.weight', got \[96, 64\] of torch.float16",
        SCB,
    ),
    "a flat weight": (
        instead(W, torch.ones(96 * 64, dtype=torch.int8)),
        r"belong to an int8 matrix .* got \[6144\] of torch.int8",
        SCB,
    ),
    "columns first": (
        instead(f"{W}_format", torch.tensor(1, dtype=torch.uint8)),
        r"row by row \(0\), got 1",
        f"{W}_format",
    ),
}


@pytest.mark.parametrize("flaw", BYTES)
def test_a_broken_int8_weight_is_refused(tmp_path: Path, flaw: str) -> None:
    spoil, said, name = BYTES[flaw]
    tensors = packed(blocks(), "int8")
    spoil(tensors)
    message = refused(tmp_path, tensors)
    assert re.search(said, message)
    assert f"; {name} in " in message


SCALE = f"{W}_scale"
EQUAL = r"A scale belongs to the matrix, a row, or one of equal parts of a row, got "
COMPRESSED: dict[str, tuple[Spoil, str, str]] = {
    "zero points": (
        instead(f"{W}_zero_point", torch.zeros(96, 1, dtype=torch.int8)),
        r"Only symmetric int8 is read, got zero points",
        f"{W}_zero_point",
    ),
    "float8": (
        instead(W, torch.ones(96, 64).to(torch.float8_e4m3fn)),
        r"int8 matrix '1\.up\.weight', got \[96, 64\] of torch.float8_e4m3fn",
        SCALE,
    ),
    "long scales": (instead(SCALE, torch.ones(97, 1)), EQUAL + r"\[97, 1\]", SCALE),
    "unequal parts": (instead(SCALE, torch.ones(96, 5)), EQUAL + r"\[96, 5\]", SCALE),
    "no scales": (instead(SCALE, torch.ones(0)), EQUAL + r"\[0\]", SCALE),
    "whole numbers": (instead(SCALE, ROWS.int()), EQUAL + r"\[96\] of torch.int32", SCALE),
    "blocks of rows": (instead(SCALE, torch.ones(48, 2)), EQUAL + r"\[48, 2\]", SCALE),
}


@pytest.mark.parametrize("flaw", COMPRESSED)
def test_a_broken_compressed_tensor_is_refused(tmp_path: Path, flaw: str) -> None:
    spoil, said, name = COMPRESSED[flaw]
    tensors = compressed(blocks(), "channel")
    spoil(tensors)
    message = refused(tmp_path, tensors)
    assert re.search(said, message)
    assert f"; {name} in " in message


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_packed_weight_of_another_shape_is_refused(tmp_path: Path, kind: str) -> None:
    tensors = packed(blocks(), kind)
    other = nn.Sequential(Block(96, 64)).requires_grad_(False)
    for name, tensor in packed(other, kind).items():
        if name.startswith("0.up.weight") or name == "0.up.SCB":
            tensors[name.replace("0", "1", 1)] = tensor
    message = refused(tmp_path, tensors, CheckpointMismatch)
    assert f"{W} is [96, 64] in the model and [64, 96], packed, in " in message


def test_int8_without_scales_is_refused(tmp_path: Path) -> None:
    tensors = packed(blocks(), "int8")
    del tensors[SCB]
    message = refused(tmp_path, tensors, CheckpointMismatch)
    assert f"{W} is bfloat16[96, 64] in the model and int8[96, 64] in" in message


def test_packed_weights_are_not_read_by_rows(tmp_path: Path) -> None:
    save_file(packed(blocks()), tmp_path / "model.safetensors")
    with pytest.raises(StreamError, match=r"plain weights, and that of '0\.up' is packed"):
        nexus.stream(blocks(), tmp_path, by_rows="*.up")


def test_a_folder_with_a_broken_weight_is_refused(written: Any, tmp_path: Path) -> None:
    path, _ = written("nf4")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight.absmax"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    with pytest.raises(CheckpointFormatError, match=re.escape(name)):
        nexus.from_pretrained(tmp_path)


# -- a model's own ---------------------------------------------------------------------------------


class Own(nn.Module):
    """Packed by its author: these are the tensors it computes with."""

    def __init__(self, as_buffers: bool) -> None:
        super().__init__()
        weight = torch.randint(-128, 128, (16, 16), dtype=torch.int8)
        for name, tensor in (("weight", weight), ("weight_scale", torch.rand(16))):
            if as_buffers:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = nn.Parameter(torch.randn(16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weight.dtype == torch.int8
        return torch.tanh(x @ (self.weight.float() * self.weight_scale[:, None] / 99) + self.bias)


@pytest.mark.parametrize("as_buffers", [True, False])
@pytest.mark.parametrize("zero_point", [True, False])
def test_a_model_that_is_packed_itself_streams_as_it_is(
    tmp_path: Path, as_buffers: bool, zero_point: bool
) -> None:
    resident = nn.Sequential(*(Own(as_buffers) for _ in range(5)))
    if zero_point:
        for block in resident:
            block.register_buffer("weight_zero_point", torch.zeros(16))
    save_file(resident.state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(3, 16)
    with stream(copy.deepcopy(resident), tmp_path) as model:
        for _ in range(3):
            assert torch.equal(model(x), resident(x))


def test_scales_beside_a_plain_weight_of_the_model_are_left_alone(
    plain: Path, tmp_path: Path
) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(384, 1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    with open_llama(plain) as model, open_llama(tmp_path) as other:
        assert torch.equal(logits(other), logits(model))


def test_a_model_in_float64_cannot_be_packed(tmp_path: Path) -> None:
    model = blocks(dtype=torch.float64)
    tensors = packed(blocks(dtype=torch.float32))
    biases = {name: tensor.double() for name, tensor in tensors.items() if "bias" in name}
    save_file(tensors | biases, tmp_path / "model.safetensors")
    with (
        pytest.raises(NexusError, match="float32, float16 or bfloat16"),
        stream(model, tmp_path) as streamed,
    ):
        run(streamed)


# -- compiled --------------------------------------------------------------------------------------


def compiled_like(model: Any, backend: str, is_whole: bool) -> Any:
    if is_whole:
        return torch.compile(model, backend=backend, fullgraph=True)
    for block in model:
        block.compile(backend=backend, fullgraph=True)
    return model


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, "eager") for kind in PACKINGS), ("nf4", "inductor"), ("nf4-nested", "aot_eager")],
)
def test_one_graph_serves_all_packed_blocks(
    tmp_path: Path, kind: str, backend: str, is_whole: bool
) -> None:
    model = blocks(dtype=torch.float32)
    save_file(packed(model, kind), tmp_path / "model.safetensors")
    resident = stream(copy.deepcopy(model), tmp_path, budget="1GiB")
    with resident, stream(model, tmp_path) as streamed:
        want = run(resident)
        if backend == "inductor":
            assert torch.allclose(run(resident), want, rtol=1e-5, atol=1e-5)
        compiled, like = (compiled_like(m, backend, is_whole) for m in (streamed, resident))
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(compiled(X), like(X))
                assert torch.allclose(compiled(X), want, rtol=1e-5, atol=1e-5)
                assert backend == "inductor" or torch.equal(compiled(X), want)
        # Resident and streamed blocks may share theirs; whole models do not.
        assert counters["stats"]["unique_graphs"] <= 2
        assert not counters["graph_break"]
        # aot_eager puts nothing back in place.
        assert backend == "aot_eager" or nexus.stats(streamed).num_cloned == 0


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "int8"])
def test_a_streamed_llama_compiles_whole(written: Any, kind: str) -> None:
    path, _ = written(kind)
    with open_llama(path) as model:
        want = logits(model)
        run = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(run(IDS, use_cache=False).logits, want)
        assert counters["stats"]["unique_graphs"] == 1
        assert nexus.stats(model).num_cloned == 0


# -- trained over ----------------------------------------------------------------------------------


class LoRA(nn.Module):
    """By hand: a linear and its low-rank correction."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        draw = torch.Generator().manual_seed(base.out_features)
        down = torch.randn(4, base.in_features, generator=draw) / 8
        up = torch.randn(base.out_features, 4, generator=draw) / 8
        self.lora_down, self.lora_up = (nn.Parameter(m.bfloat16()) for m in (down, up))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x) + x @ self.lora_down.T @ self.lora_up.T
        return y


def lora_by_hand(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.v_proj = LoRA(layer.self_attn.v_proj)
        layer.mlp.down_proj = LoRA(layer.mlp.down_proj)
    return model


def lora_by_peft(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def trained(model: Any) -> tuple[list[float], Tensors]:
    """Losses of three steps, and the gradients of the last."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in weights)
    optimiser = torch.optim.AdamW(weights.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("kind", "adapt"),
    [
        ("nf4", lora_by_peft),
        *((kind, lora_by_hand) for kind in ("nf4", "nf4-nested", "int8")),
    ],
)
def test_adapters_train_as_over_the_resident_base(
    written: Any, kind: str, adapt: Callable[[Any], Any]
) -> None:
    path, _ = written(kind)
    results = []
    for options in ({}, {"budget": "1GiB"}):
        with open_llama(path, **options) as model:
            model.requires_grad_(False)
            results.append(trained(adapt(model)))
            assert nexus.stats(model).num_cloned == 0
    (losses, gradients), (like, likewise) = results
    assert losses == like
    assert losses[-1] < losses[0]
    assert gradients.keys() == likewise.keys()
    assert all(torch.equal(gradients[name], likewise[name]) for name in gradients)


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "int8"])
def test_neither_an_arena_nor_a_decoded_weight_is_saved(written: Any, kind: str) -> None:
    path, _ = written(kind)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with open_llama(path) as model:
        lora_by_hand(model.requires_grad_(False))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=IDS, labels=IDS).loss
        arenas = {model._nexus.streamer.arena(index).data_ptr() for index in range(NUM_LAYERS)}
        assert len(kept) > 10 * NUM_LAYERS
        assert arenas.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in kept)
        assert {384 * 128, 128 * 128}.isdisjoint(tensor.numel() for tensor in kept)
        loss.backward()


@pytest.mark.parametrize("kind", PACKINGS)
def test_gradients_of_inputs_are_those_of_the_decoded_weights(tmp_path: Path, kind: str) -> None:
    twin = blocks(dtype=torch.float32)
    tensors = packed(twin, kind)
    save_file(tensors, tmp_path / "model.safetensors")
    for name, weight in twin.named_parameters():
        if name.endswith("weight"):
            weight.copy_(decoded(tensors, name, torch.float32))
    with stream(blocks(dtype=torch.float32), tmp_path) as model:
        x, y = (X.clone().requires_grad_() for _ in range(2))
        for net, given in ((model, x), (twin, y)):
            (net(given).square().sum() + net(given * 2).sum()).backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-4)
