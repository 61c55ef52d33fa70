"""find_experts: the bytes it names are those of the model's experts, however the checkpoint has
them; and what it says of a checkpoint that lacks some.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import conversion_mapping, core_model_loading

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.conversion import Conversion
from nexus_ext.errors import CheckpointError, CheckpointFormatError, CheckpointMismatch, StreamError
from nexus_ext.experts.find import (
    Expert,
    ExpertLayer,
    ExpertPiece,
    ExpertTensor,
    Source,
    find_experts,
)
from nexus_ext.layout import lay_out
from nexus_ext.pretrained import build_empty
from nexus_ext.quant import NF4Config
from nexus_ext.quant.packed import pack
from nexus_ext.quant.packing import INT8, NF4, NestedNF4
from tests.test_quant_formats import decoded

Tensors = dict[str, torch.Tensor]

BASE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 48, "num_local_experts": 4},
    # Twelve: 10 comes after 9.
    "Qwen3Moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "num_experts": 12,
        "head_dim": 16,
    },
    "DeepseekV3": {
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    "GptOss": {
        "intermediate_size": 32,
        "num_local_experts": 4,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "Olmoe": {"intermediate_size": 32, "num_experts": 8},
    "Phimoe": {"intermediate_size": 32, "num_local_experts": 4},
    "Jamba": {
        "num_hidden_layers": 4,
        "intermediate_size": 32,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    # No gate, and names that begin otherwise in files.
    "NemotronH": {
        "num_hidden_layers": None,
        "layers_block_type": ["moe", "attention", "moe"],
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    # One tensor for all experts in files too, under another name.
    "GraniteMoe": {"intermediate_size": 32, "num_local_experts": 4},
    "Lfm2Moe": {
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
    "Qwen2Moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
    },
    # Its router is a Linear layer, in float32.
    "HunYuanMoEV1": {
        "intermediate_size": 32,
        "num_experts": 4,
        "moe_topk": [2, 2],
        "head_dim": 16,
    },
    "Ernie4_5_Moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 32,
        "moe_num_experts": 4,
        "moe_k": 2,
    },
}
# What has one tensor for all experts in what `save_pretrained` writes.
STACKED = {"GptOss", "GraniteMoe"}
# How a checkpoint is written.
FORMS = ["saved", "sharded", "fused", "fused and sharded"]


def make_moe(family: str, **changes: Any) -> nn.Module:
    """A random model in bfloat16."""
    torch.manual_seed(3)
    fields = {k: v for k, v in (BASE | FAMILIES[family] | changes).items() if v is not None}
    config = getattr(transformers, f"{family}Config")(**fields)
    torch.set_default_dtype(torch.bfloat16)  # leaves in float32 what a model wants so
    try:
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():  # some begin as zeros, which all look alike
        parameter.data.uniform_(-1, 1)
    return model.eval()


def write_moe(model: Any, folder: Path, form: str) -> Path:
    model.save_pretrained(folder, max_shard_size="60KB" if form == "sharded" else "5GB")
    if "fused" in form:
        once = {tensor.data_ptr(): name for name, tensor in reversed(model.state_dict().items())}
        tensors = {name: model.state_dict()[name].clone() for name in reversed(once.values())}
        write_tensors(folder, tensors, num_shards=3 if "sharded" in form else 1)
    return folder


def write_tensors(folder: Path, tensors: Tensors, num_shards: int = 1) -> Path:
    """Instead of the tensors that are there."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{i}.safetensors" for i in range(num_shards)]
    place = {tensor: names[i % num_shards] for i, tensor in enumerate(tensors)}
    for name in names:
        own = {tensor: tensors[tensor] for tensor in tensors if place[tensor] == name}
        save_file(own, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return folder


def tensors_of(folder: Path) -> Tensors:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def find(folder: Path) -> tuple[Checkpoint, nn.Module, list[ExpertLayer]]:
    checkpoint = Checkpoint.open(folder)
    model = build_empty(folder, checkpoint)
    return checkpoint, model, find_experts(model, checkpoint)


def read_tensor(checkpoint: Checkpoint, tensor: ExpertTensor) -> torch.Tensor:
    data = bytearray()
    for source in tensor.sources:
        with open(checkpoint.files[source.file].path, "rb") as file:
            file.seek(source.offset)
            data += file.read(source.nbytes)
    return torch.frombuffer(data, dtype=tensor.dtype).reshape(tensor.shape)


def read_weight(
    checkpoint: Checkpoint, expert: Expert, leaf: str, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """One parameter of one expert, from its bytes."""
    tensors = {tensor.name: tensor for tensor in expert.tensors}
    rows = []
    for piece in expert.weights[leaf]:
        parts = {p: read_tensor(checkpoint, tensors[name]) for p, name in piece.parts.items()}
        if piece.packing is None:
            rows.append(parts[""])
        else:
            rows.append(piece.packing.decode(parts | dict(piece.constants), dtype))
    return torch.cat(rows)


def check_bytes(folder: Path, model: nn.Module) -> list[ExpertLayer]:
    """Every plain expert is the model's, to the last bit."""
    checkpoint, _, layers = find(folder)
    assert layers
    for layer in layers:
        module = model.get_submodule(layer.path)
        assert len(layer.experts) == module.num_experts
        assert layer.parameters == tuple(n for n, _ in module.named_parameters(recurse=False))
        for number, expert in enumerate(layer.experts):
            assert expert.weights.keys() == set(layer.parameters)
            assert [t.name for t in expert.tensors] == list(layer.parameters)
            for leaf in layer.parameters:
                [piece] = expert.weights[leaf]
                assert piece == ExpertPiece(None, {"": leaf}, {})
                want = module.get_parameter(leaf)[number]
                assert torch.equal(read_weight(checkpoint, expert, leaf), want)
    return layers


# -- where the bytes are ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_models_experts(tmp_path: Path, family: str, form: str) -> None:
    model = make_moe(family)
    layers = check_bytes(write_moe(model, tmp_path, form), model)
    names = tensors_of(tmp_path).keys()
    sources = frozenset().union(*(layer.sources for layer in layers))
    claimed = frozenset().union(*(layer.claimed for layer in layers))
    assert sources <= names
    is_stacked = family in STACKED or "fused" in form
    sizes = {len(t.sources) for x in layers[0].experts for t in x.tensors}
    assert sizes == ({1} if is_stacked or family == "NemotronH" else {1, 2})
    of_experts = {n for n, _ in model.named_parameters() if ".experts." in n}
    assert claimed == of_experts
    if "fused" in form:
        assert sources == claimed
    assert all(".experts." not in name for name in names - sources)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_else_belongs_to_groups_or_stays_outside(
    tmp_path: Path, family: str, form: str
) -> None:
    folder = write_moe(make_moe(family), tmp_path, form)
    checkpoint, model, layers = find(folder)
    layout = lay_out(model, checkpoint, strict=True, experts=layers)
    groups = {member.name for group in layout.groups for member in group.members}
    outside = {member.name for member in layout.outside.members}
    sources = frozenset().union(*(layer.sources for layer in layers))
    assert groups.isdisjoint(sources)
    assert outside.isdisjoint(sources)
    assert groups | outside | sources == checkpoint.entries.keys()


def test_without_experts_a_layout_misses_them(tmp_path: Path) -> None:
    checkpoint, model, _ = find(write_moe(make_moe("Mixtral"), tmp_path, "fused"))
    layout = lay_out(model, checkpoint, strict=True)
    assert any(member.name.endswith("experts.down_proj") for member in layout.groups[0].members)
    folder = write_moe(make_moe("Mixtral"), tmp_path, "saved")
    with pytest.raises(StreamError, match=r"is made of .*experts\.0\.w1\.weight"):
        lay_out(build_empty(folder, Checkpoint.open(folder)), Checkpoint.open(folder))


def test_gate_and_up_are_one_tensor_of_two_sources(tmp_path: Path) -> None:
    checkpoint, _, [first, *_] = find(write_moe(make_moe("Mixtral"), tmp_path, "saved"))
    entries = checkpoint.entries
    for number, expert in enumerate(first.experts):
        gate_up, down = expert.tensors
        stem = f"model.layers.0.block_sparse_moe.experts.{number}"
        pair = [entries[f"{stem}.{w}.weight"] for w in ("w1", "w3")]
        assert gate_up.sources == tuple(Source(e.file, e.offset, e.nbytes) for e in pair)
        assert (gate_up.name, gate_up.shape) == ("gate_up_proj", (96, 64))
        assert (down.name, down.shape) == ("down_proj", (64, 48))
        assert expert.names["gate_up_proj"] == tuple(e.name for e in pair)


def test_no_byte_of_a_weight_is_read(tmp_path: Path) -> None:
    folder = write_moe(make_moe("Qwen3Moe"), tmp_path, "saved")
    checkpoint = Checkpoint.open(folder)
    model = build_empty(folder, checkpoint)
    before = find_experts(model, checkpoint)
    (folder / "model.safetensors").unlink()
    assert find_experts(model, checkpoint) == before


def test_a_model_that_is_not_on_meta_has_the_same_experts(tmp_path: Path) -> None:
    model = make_moe("Olmoe")
    checkpoint, _, layers = find(write_moe(model, tmp_path, "saved"))
    assert find_experts(model, checkpoint) == layers
    assert find_experts(model, checkpoint, Conversion.of(model, checkpoint)) == layers


def test_a_model_without_experts_has_none(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert find_experts(nn.Linear(2, 2, bias=False), checkpoint) == []
    # Experts that no interface dispatches are an ordinary module.
    config = transformers.Llama4TextConfig(**BASE | {"intermediate_size": 32, "head_dim": 16})
    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(config)
    assert find_experts(model, checkpoint) == []


# -- without transformers --------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, count: int = 3, hidden: int = 64, width: int = 32) -> None:
        super().__init__()
        self.num_experts = count
        self.has_bias, self.is_transposed, self.has_gate, self.is_concatenated = [False] * 4
        self.up_proj = nn.Parameter(torch.randn(count, width, hidden))
        self.down_proj = nn.Parameter(torch.randn(count, hidden, width))
        self.scale = nn.Parameter(torch.randn(hidden))


class Blocks(nn.Module):
    def __init__(self, num_blocks: int = 2, **sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts(**sizes) for _ in range(num_blocks))


def saved(model: nn.Module, folder: Path) -> Checkpoint:
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    return Checkpoint.open(folder)


def test_a_module_of_ones_own_with_names_as_they_are(tmp_path: Path) -> None:
    model = Blocks()
    checkpoint = saved(model, tmp_path)
    layers = find_experts(model, checkpoint)
    assert [layer.path for layer in layers] == ["layers.0", "layers.1"]
    for layer, module in zip(layers, model.layers, strict=True):
        assert layer.parameters == ("up_proj", "down_proj")
        for number, expert in enumerate(layer.experts):
            for leaf in layer.parameters:
                want = module.get_parameter(leaf)[number]
                assert torch.equal(read_weight(checkpoint, expert, leaf), want)
    assert layers[0].claimed == layers[0].sources == {"layers.0.up_proj", "layers.0.down_proj"}


def test_names_may_be_renamed_by_a_function(tmp_path: Path) -> None:
    checkpoint = saved(nn.ModuleDict({"old": Blocks()}), tmp_path)
    layers = find_experts(Blocks(), checkpoint, lambda name: f"old.{name}")
    assert layers[1].claimed == {"layers.1.up_proj", "layers.1.down_proj"}
    assert layers[1].sources == {"old.layers.1.up_proj", "old.layers.1.down_proj"}


def test_a_root_may_be_the_experts_module(tmp_path: Path) -> None:
    model = Experts()
    [layer] = find_experts(model, saved(model, tmp_path))
    assert layer.path == ""
    assert layer.claimed == {"up_proj", "down_proj"}


def test_a_module_at_two_places_is_found_once_and_claims_all_its_names(tmp_path: Path) -> None:
    shared = Experts()
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"inner": shared})})
    save_file({f"b.inner.{n}": t for n, t in shared.state_dict().items()}, tmp_path / "m")
    [layer] = find_experts(model, Checkpoint.open(tmp_path / "m"))
    assert layer.claimed == {
        f"{at}.{leaf}" for at in ("a", "b.inner") for leaf in ("up_proj", "down_proj")
    }
    assert layer.sources == {"b.inner.up_proj", "b.inner.down_proj"}


def test_transformers_is_not_needed(tmp_path: Path, run_python: Callable[..., str]) -> None:
    saved(Blocks(), tmp_path)
    script = """
import sys
sys.modules["transformers"] = None
import torch
from torch import nn
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.experts.find import find_experts
class Experts(nn.Module):
    num_experts, has_bias, is_transposed = 3, False, False
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(3, 32, 64, device="meta"))
        self.down_proj = nn.Parameter(torch.empty(3, 64, 32, device="meta"))
model = nn.ModuleDict({"layers": nn.ModuleList([Experts()])})
[layer] = find_experts(model, Checkpoint.open(sys.argv[1]))
print(len(layer.experts), [len(t.sources) for t in layer.experts[2].tensors])
"""
    assert run_python(script, tmp_path).strip() == "3 [1, 1]"


# -- packed, one tensor for each expert ------------------------------------------------------------


def bitsandbytes(weight: torch.Tensor, name: str, kind: str, blocksize: int = 64) -> Tensors:
    """What bitsandbytes writes for one weight; INT8 as `nexus convert` does."""
    from bitsandbytes import functional

    from nexus_ext.quant import INT8Config

    if kind == "int8":
        return pack(weight, INT8Config()).stored(name, weight.dtype)
    q, state = functional.quantize_4bit(
        weight,
        blocksize=blocksize,
        compress_statistics="nested" in kind,
        quant_type=kind.split("-")[0],
    )
    return {name: q} | {f"{name}.{part}": t for part, t in state.as_dict(packed=True).items()}


def packed_moe(folder: Path, family: str, kind: str, **options: Any) -> Tensors:
    """A checkpoint whose experts, each by itself, are packed; returns its tensors."""
    tensors = tensors_of(write_moe(make_moe(family, **options.pop("config", {})), folder, "saved"))
    for name in [name for name in tensors if ".experts." in name]:
        tensors |= bitsandbytes(tensors[name], name, kind, **options)
    write_tensors(folder, tensors)
    return tensors


def check_packed(folder: Path, tensors: Tensors) -> list[ExpertLayer]:
    """Every expert decodes to what its tensors decode to by the reference."""
    checkpoint, _, layers = find(folder)
    for layer in layers:
        for expert in layer.experts:
            for leaf, names in expert.names.items():
                want = torch.cat(
                    [
                        tensors[n] if tensors[n].is_floating_point() else decoded(tensors, n)
                        for n in names
                    ]
                )
                assert torch.equal(read_weight(checkpoint, expert, leaf), want), (leaf, names)
    return layers


PACKINGS = {
    "nf4": (NF4, 1, {"q", "absmax"}, set()),
    "fp4": (NF4, 1, {"q", "absmax"}, {"code"}),
    "nf4-nested": (
        NestedNF4,
        2,
        {"q", "absmax", "nested_absmax"},
        {"nested_code", "nested_offset"},
    ),
    "int8": (INT8, 1, {"q", "scale"}, set()),
}


@pytest.mark.parametrize("kind", PACKINGS)
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Jamba", "NemotronH"])
def test_packed_experts_decode_as_the_reference_decodes_them(
    tmp_path: Path, family: str, kind: str
) -> None:
    tensors = packed_moe(tmp_path, family, kind)
    layers = check_packed(tmp_path, tensors)
    packing, num_pieces, parts, constants = PACKINGS[kind]
    [expert, *_] = layers[0].experts
    up = expert.weights.get("gate_up_proj", expert.weights.get("up_proj"))
    assert up is not None
    assert len(up) == (1 if family == "NemotronH" else num_pieces)
    for piece in up:
        assert type(piece.packing) is packing
        assert piece.parts.keys() == parts
        assert piece.constants.keys() == constants
    sources = frozenset().union(*(layer.sources for layer in layers))
    assert sources == {name for name in tensors if ".experts." in name}
    checkpoint = Checkpoint.open(tmp_path)
    model = build_empty(tmp_path, checkpoint)
    layout = lay_out(model, checkpoint, strict=True, experts=layers)
    assert not any(".experts." in name for name in layout.source)


def test_joined_parts_have_two_sources(tmp_path: Path) -> None:
    packed_moe(tmp_path, "Mixtral", "nf4")
    _, _, [layer, *_] = find(tmp_path)
    shapes = {t.name: (t.shape, len(t.sources)) for t in layer.experts[0].tensors}
    assert shapes == {
        "gate_up_proj.q": ((96 * 64 // 2, 1), 2),
        "gate_up_proj.absmax": ((96,), 2),
        "down_proj.q": ((64 * 48 // 2, 1), 1),
        "down_proj.absmax": ((48,), 1),
    }
    assert layer.experts[0].weights["gate_up_proj"][0].packing == NF4((96, 64), 64)


def test_two_pieces_have_numbered_tensors(tmp_path: Path) -> None:
    packed_moe(tmp_path, "Mixtral", "nf4-nested")
    _, _, [layer, *_] = find(tmp_path)
    names = {t.name for t in layer.experts[0].tensors}
    parts = ("q", "absmax", "nested_absmax")
    assert names == {
        *(f"gate_up_proj.{i}.{part}" for i in range(2) for part in parts),
        *(f"down_proj.{part}" for part in parts),
    }


def test_a_block_that_gate_does_not_fill_keeps_gate_and_up_apart(tmp_path: Path) -> None:
    tensors = packed_moe(tmp_path, "Mixtral", "nf4", blocksize=2048)  # of 48 * 64
    layers = check_packed(tmp_path, tensors)
    assert [p.packing.shape for p in layers[0].experts[0].weights["gate_up_proj"]] == [
        (48, 64),
        (48, 64),
    ]


def test_gate_and_up_that_are_packed_differently_stay_two_pieces(tmp_path: Path) -> None:
    tensors = tensors_of(write_moe(make_moe("Mixtral"), tmp_path, "saved"))
    for name in [name for name in tensors if ".w1." in name]:
        tensors |= bitsandbytes(tensors[name], name, "nf4")
    for name in [name for name in tensors if ".w2.weight" in name]:
        tensors |= bitsandbytes(tensors[name], name, "int8")
    layers = check_packed(write_tensors(tmp_path, tensors), tensors)
    gate, up = layers[0].experts[0].weights["gate_up_proj"]
    assert (type(gate.packing), up.packing) == (NF4, None)
    for name in [name for name in tensors if ".w3.weight" in name]:
        tensors |= bitsandbytes(tensors[name], name, "nf4", blocksize=128)
    layers = check_packed(write_tensors(tmp_path, tensors), tensors)
    assert [p.packing.blocksize for p in layers[0].experts[0].weights["gate_up_proj"]] == [64, 128]


def test_int8_of_compressed_tensors_joins_by_rows_only(tmp_path: Path) -> None:
    plain = tensors_of(write_moe(make_moe("Mixtral"), tmp_path, "saved"))
    for scale_shape, num_pieces in (((48, 1), 1), ((48, 4), 1), ((1,), 2)):
        tensors = dict(plain)
        for name in [name for name in plain if ".w1." in name or ".w3." in name]:
            tensors[name] = torch.randint(-127, 128, (48, 64), dtype=torch.int8)
            tensors[f"{name}_scale"] = torch.rand(scale_shape).to(torch.bfloat16)
        checkpoint, _, layers = find(write_tensors(tmp_path, tensors))
        for expert in layers[0].experts:
            assert len(expert.weights["gate_up_proj"]) == num_pieces
            want = []
            for name in expert.names["gate_up_proj"]:
                scale = tensors[f"{name}_scale"].float().reshape(scale_shape[0], -1, 1)
                rows = tensors[name].float().reshape(48, scale.shape[1], -1) * scale
                want.append(rows.reshape(48, 64).bfloat16())
            ours = read_weight(checkpoint, expert, "gate_up_proj")
            assert torch.equal(ours, torch.cat(want))


# -- packed, one tensor for all experts ------------------------------------------------------------


def packed_whole(
    folder: Path, family: str, kind: str, blocksize: int = 64, **config: Any
) -> Tensors:
    """A checkpoint with all experts in one tensor, packed flat; returns its tensors."""
    model = make_moe(family, **config)
    tensors = tensors_of(write_moe(model, folder, "fused"))
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        if ".experts." in name:
            tensors |= bitsandbytes(tensors[name].contiguous(), name, kind, blocksize)
    write_tensors(folder, tensors)
    return tensors


@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "GraniteMoe"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4-nested"])
def test_experts_are_cut_from_a_packed_tensor(tmp_path: Path, family: str, kind: str) -> None:
    # 256 * 128 and 128 * 128 elements: whole nested blocks of 64 * 256.
    sizes = {"hidden_size": 128, "intermediate_size": 128} if "nested" in kind else {}
    tensors = packed_whole(tmp_path, family, kind, **sizes)
    checkpoint, _, layers = find(tmp_path)
    assert len(layers) == 2
    for layer in layers:
        for leaf in ("gate_up_proj", "down_proj"):
            whole = decoded(tensors, f"{layer.path}.{leaf}")
            for number, expert in enumerate(layer.experts):
                [piece] = expert.weights[leaf]
                assert piece.packing is not None
                assert piece.packing.shape == whole.shape[1:]
                assert torch.equal(read_weight(checkpoint, expert, leaf), whole[number])
        if family == "GptOss":
            assert layer.experts[0].weights["down_proj_bias"][0].packing is None
    named = frozenset().union(*(layer.sources for layer in layers))
    assert named == {name for name in tensors if ".experts." in name}


def refused(folder: Path, tensors: Tensors, error: type[CheckpointError]) -> str:
    write_tensors(folder, tensors)
    with pytest.raises(error) as caught:
        find(folder)
    return str(caught.value)


def test_experts_that_share_a_block_cannot_be_cut(tmp_path: Path) -> None:
    tensors = packed_whole(tmp_path, "GptOss", "nf4", 4096, intermediate_size=48)
    text = refused(tmp_path, tensors, CheckpointFormatError)
    assert "a multiple of the 4096 elements that share a scale; got 6144 of [64, 96]" in text
    assert "weights='nf4'" in text


def test_experts_that_share_a_nested_block_cannot_be_cut(tmp_path: Path) -> None:
    tensors = packed_whole(tmp_path, "GptOss", "nf4-nested")
    text = refused(tmp_path, tensors, CheckpointFormatError)
    assert "a multiple of the 16384 elements that share a scale" in text


def test_a_packed_tensor_of_other_experts_is_refused(tmp_path: Path) -> None:
    tensors = packed_whole(tmp_path, "GptOss", "nf4")
    name = "model.layers.1.mlp.experts.down_proj"
    whole = torch.randn(5, 32, 64, dtype=torch.bfloat16)
    text = refused(tmp_path, tensors | bitsandbytes(whole, name, "nf4"), CheckpointMismatch)
    assert f"{name} is [4, 32, 64] in the model and [5, 32, 64], packed" in text
    whole = torch.randn(4, 64, 32, dtype=torch.bfloat16)
    text = refused(tmp_path, tensors | bitsandbytes(whole, name, "nf4"), CheckpointMismatch)
    assert f"expert 0 of {name} is bfloat16[32, 64]" in text
    assert "[64, 32], packed" in text


def test_parts_of_a_packed_tensor_are_checked(tmp_path: Path) -> None:
    tensors = packed_whole(tmp_path, "GptOss", "nf4")
    name = "model.layers.1.mlp.experts.down_proj"
    del tensors[f"{name}.absmax"]
    assert f"{name}.absmax" in refused(tmp_path, tensors, CheckpointFormatError)


def test_int8_of_all_experts_is_no_format(tmp_path: Path) -> None:
    tensors = packed_whole(tmp_path, "GptOss", "nf4")
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = {n: t for n, t in tensors.items() if not n.startswith(f"{name}.")}
    tensors[name] = torch.zeros(4, 32, 64, dtype=torch.int8)
    assert f"got {name} int8[4, 32, 64]" in refused(tmp_path, tensors, CheckpointMismatch)


# -- what is not there -----------------------------------------------------------------------------


@pytest.fixture
def mixtral(tmp_path: Path) -> tuple[Path, Tensors]:
    write_moe(make_moe("Mixtral"), tmp_path, "saved")
    return tmp_path, tensors_of(tmp_path)


LAYER = "model.layers.1.block_sparse_moe.experts"


@pytest.mark.parametrize("which", ["w1", "w2", "w3"])
@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_missing_expert_is_named(mixtral: Any, number: int, which: str) -> None:
    folder, tensors = mixtral
    name = f"{LAYER}.{number}.{which}.weight"
    del tensors[name]
    text = refused(folder, tensors, CheckpointMismatch)
    leaf = "down_proj" if which == "w2" else "gate_up_proj"
    assert f"expert {number} of model.layers.1.mlp.experts.{leaf} needs {name}" in text
    assert str(folder / "model.safetensors") in text
    assert "3 of 4" in text
    assert "download" in text


def test_all_gates_missing(mixtral: Any) -> None:
    folder, tensors = mixtral
    tensors = {n: t for n, t in tensors.items() if not (n.startswith(LAYER) and ".w1." in n)}
    text = refused(folder, tensors, CheckpointMismatch)
    assert "expert 0 of model.layers.1.mlp.experts.gate_up_proj needs" in text
    assert ".experts.0.w1.weight" in text


def test_a_layer_without_any_expert(mixtral: Any) -> None:
    folder, tensors = mixtral
    tensors = {n: t for n, t in tensors.items() if not n.startswith(LAYER)}
    text = refused(folder, tensors, CheckpointMismatch)
    assert "the experts of model.layers.1.mlp.experts need" in text
    assert "model.layers.1.mlp.experts.gate_up_proj" in text
    assert ".experts.0.w1.weight and .experts.0.w3.weight" in text


def test_more_experts_than_the_model_has(mixtral: Any) -> None:
    folder, tensors = mixtral
    tensors[f"{LAYER}.4.w2.weight"] = torch.zeros(64, 48, dtype=torch.bfloat16)
    text = refused(folder, tensors, CheckpointMismatch)
    assert "has 4 experts" in text
    assert f"has more: {LAYER}.4.w2.weight" in text


def test_names_that_no_number_tells_apart(mixtral: Any) -> None:
    folder, tensors = mixtral
    tensors[f"{LAYER}.one.w2.weight"] = tensors.pop(f"{LAYER}.1.w2.weight")
    text = refused(folder, tensors, CheckpointMismatch)
    assert "expert 0 of model.layers.1.mlp.experts.down_proj needs .experts.0.w2.weight" in text


@pytest.mark.parametrize("shape", [(64, 47), (48, 64), (64, 48, 1), (64 * 48,), ()])
def test_an_expert_of_another_shape_is_refused(mixtral: Any, shape: tuple[int, ...]) -> None:
    folder, tensors = mixtral
    tensors[f"{LAYER}.2.w2.weight"] = torch.zeros(shape, dtype=torch.bfloat16)
    text = refused(folder, tensors, CheckpointMismatch)
    assert "expert 2 of model.layers.1.mlp.experts.down_proj is bfloat16[64, 48], got" in text
    assert f"{LAYER}.2.w2.weight bfloat16{list(shape)} in {folder}" in text


@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
def test_an_expert_of_another_dtype_is_refused(mixtral: Any, name: str) -> None:
    folder, tensors = mixtral
    tensors[f"{LAYER}.2.{name}.weight"] = tensors[f"{LAYER}.2.{name}.weight"].half()
    text = refused(folder, tensors, CheckpointMismatch)
    assert "expert 2 of model.layers.1.mlp.experts" in text
    assert f"{LAYER}.2.{name}.weight float16" in text


@pytest.mark.parametrize(
    ("leaf", "shape"),
    [
        ("down_proj", (32, 64)),
        ("down_proj", (3, 32, 64)),
        ("down_proj", (4, 64, 32)),
        ("down_proj_bias", (64,)),  # would be the bias of every expert
        ("down_proj_bias", (4, 1, 64)),
        ("gate_up_proj", (4, 64, 62)),
        ("gate_up_proj", ()),
    ],
)
def test_a_tensor_of_all_experts_of_another_shape_is_refused(
    tmp_path: Path, leaf: str, shape: tuple[int, ...]
) -> None:
    tensors = tensors_of(write_moe(make_moe("GptOss"), tmp_path, "fused"))
    name = f"model.layers.0.mlp.experts.{leaf}"
    tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)
    text = refused(tmp_path, tensors, CheckpointMismatch)
    assert f"expert 0 of {name} is bfloat16" in text
    assert f"got {name} bfloat16{list(shape)}" in text


def test_a_tensor_of_all_experts_that_is_missing_is_named(tmp_path: Path) -> None:
    tensors = tensors_of(write_moe(make_moe("GptOss"), tmp_path, "fused"))
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[f"{name}_blocks"] = tensors.pop(name)
    text = refused(tmp_path, tensors, CheckpointMismatch)
    assert f"need {name}" in text
    assert f"{name}_blocks" in text


def test_experts_that_are_packed_unlike_are_refused(tmp_path: Path) -> None:
    tensors = packed_moe(tmp_path, "Mixtral", "nf4")
    plain = make_moe("Mixtral").model.layers[1].mlp.experts.down_proj[3].detach()
    name = f"{LAYER}.3.w2.weight"
    others = {n: t for n, t in tensors.items() if not n.startswith(name)}
    for instead in (
        {name: plain},
        bitsandbytes(plain, name, "nf4", 128),
        bitsandbytes(plain, name, "fp4"),
        bitsandbytes(plain, name, "int8"),
    ):
        text = refused(tmp_path, others | instead, CheckpointMismatch)
        assert "All experts of model.layers.1.mlp.experts must have the same tensors" in text
        assert "expert 3" in text


def test_a_model_in_float64_cannot_have_packed_experts(tmp_path: Path) -> None:
    model = Experts(width=64)
    tensors = dict(model.state_dict())
    tensors |= bitsandbytes(tensors["up_proj"], "up_proj", "nf4")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"float64.*packed"):
        find_experts(model.double(), Checkpoint.open(tmp_path))


# -- what cannot be done with ranges of bytes ------------------------------------------------------


def convert_by(monkeypatch: pytest.MonkeyPatch, kind: str, *rules: Any) -> None:
    """Other rules for a kind of model."""
    conversion_mapping.get_checkpoint_conversion_mapping(kind)  # they are there now
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    monkeypatch.setitem(cache, kind, list(rules))


def converter(sources: list[str], target: str, *operations: Any) -> Any:
    return core_model_loading.WeightConverter(sources, target, operations=list(operations))


@pytest.mark.parametrize(
    "operations",
    [
        [core_model_loading.MergeModulelist(0), core_model_loading.Transpose(1, 2)],
        [core_model_loading.MergeModulelist(0), core_model_loading.Concatenate(2)],
        [core_model_loading.MergeModulelist(1)],
        [core_model_loading.Interleave(dim=1)],
    ],
    ids=lambda operations: "-".join(map(repr, operations)),
)
def test_an_operation_that_moves_bytes_is_named(
    mixtral: Any, monkeypatch: pytest.MonkeyPatch, operations: list[Any]
) -> None:
    folder, _ = mixtral
    rename = core_model_loading.WeightRenaming(".block_sparse_moe.", ".mlp.")
    down = converter([".experts.*.w2.weight"], ".experts.down_proj", *operations)
    gate = converter(
        [".experts.*.w1.weight", ".experts.*.w3.weight"],
        ".experts.gate_up_proj",
        core_model_loading.MergeModulelist(0),
        core_model_loading.Concatenate(1),
    )
    convert_by(monkeypatch, "mixtral", rename, gate, down)
    with pytest.raises(StreamError) as caught:
        find(folder)
    text = str(caught.value)
    assert "model.layers.0.mlp.experts.down_proj is made of" in text
    assert f"{operations[-1]!r} is neither" in text
    assert "save_original_format=False" in text


def test_gates_of_all_experts_are_joined_with_ups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Step-3's files: [experts, rows, columns] of gates, and of ups."""
    model = make_moe("Olmoe")
    tensors = tensors_of(write_moe(model, tmp_path, "fused"))
    for name in [name for name in tensors if name.endswith("gate_up_proj")]:
        stem = name.removesuffix("mlp.experts.gate_up_proj")
        gate, up = tensors.pop(name).chunk(2, dim=1)
        tensors |= {
            f"{stem}moe.{n}_proj.weight": t.clone() for n, t in (("gate", gate), ("up", up))
        }
    convert_by(
        monkeypatch,
        "olmoe",
        converter(
            ["moe.gate_proj.weight", "moe.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            core_model_loading.Concatenate(1),
        ),
    )
    layers = check_bytes(write_tensors(tmp_path, tensors), model)
    assert [len(t.sources) for t in layers[0].experts[1].tensors] == [2, 1]
    packed = dict(tensors)
    for name in [name for name in tensors if ".moe." in name]:
        packed |= bitsandbytes(tensors[name], name, "nf4")
    checkpoint, _, layers = find(write_tensors(tmp_path, packed))
    for layer in layers:
        stem = layer.path.removesuffix("mlp.experts")
        pair = [decoded(packed, f"{stem}moe.{n}_proj.weight") for n in ("gate", "up")]
        for number, expert in enumerate(layer.experts):
            assert len(expert.weights["gate_up_proj"]) == 1
            ours = read_weight(checkpoint, expert, "gate_up_proj")
            assert torch.equal(ours, torch.cat([whole[number] for whole in pair]))
    del tensors["model.layers.1.moe.up_proj.weight"]
    text = refused(tmp_path, tensors, CheckpointMismatch)
    assert "needs one tensor for moe.up_proj.weight" in text


def test_a_config_of_quantisation_is_not_asked(tmp_path: Path) -> None:
    """What is packed is told by the tensors, expert by expert."""
    tensors = packed_moe(tmp_path, "Qwen3Moe", "nf4")
    fields = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in fields
    check_packed(tmp_path, tensors)
    weight = tensors_of(write_moe(make_moe("Qwen3Moe"), tmp_path, "saved"))
    name = "model.layers.1.mlp.experts.11.down_proj.weight"
    assert pack(weight[name], NF4Config()).packing == NF4((64, 32), 64)
