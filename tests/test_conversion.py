"""Conversion: names are those that transformers would load, and what it would make of others is
refused by name.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import core_model_loading

import nexus_ext as nexus
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.conversion import Conversion
from nexus_ext.demo import make_llama
from nexus_ext.errors import CheckpointMismatch, StreamError
from nexus_ext.experts.find import find_experts
from nexus_ext.layout import lay_out
from nexus_ext.pretrained import build_empty, plan_pretrained
from tests.test_experts_find import (
    FAMILIES,
    FORMS,
    convert_by,
    converter,
    make_moe,
    tensors_of,
    write_moe,
    write_tensors,
)

Transpose = core_model_loading.Transpose
TINY = {"num_blocks": 2, "hidden": 64, "intermediate": 96, "vocabulary": 128}


def opened(folder: Path) -> tuple[Checkpoint, nn.Module, Conversion]:
    checkpoint = Checkpoint.open(folder)
    model = build_empty(folder, checkpoint)
    return checkpoint, model, Conversion.of(model, checkpoint)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    make_llama(path, **TINY)
    return path


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_renamed_tensors_are_those_that_were_saved(tmp_path: Path, family: str, form: str) -> None:
    model = make_moe(family)
    write_moe(model, tmp_path, form)
    stored = tensors_of(tmp_path)
    checkpoint, empty, conversion = opened(tmp_path)
    claimed = frozenset().union(*(x.claimed for x in find_experts(empty, checkpoint, conversion)))
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    for name, tensor in model.state_dict().items():
        if name not in claimed and name not in tied:
            assert torch.equal(stored[conversion(name)], tensor), name
            assert conversion.sources(name) == [conversion.rename(name)]
            assert conversion.converted(name) is None


def test_routers_have_their_old_names_in_mixtrals_files(tmp_path: Path) -> None:
    _, _, conversion = opened(write_moe(make_moe("Mixtral"), tmp_path, "saved"))
    name = "model.layers.1.mlp.gate.weight"
    assert conversion.rename(name) == "model.layers.1.block_sparse_moe.gate.weight"
    assert conversion.rename("model.norm.weight") == "model.norm.weight"
    assert conversion.rename("no.such.name") == "no.such.name"


def test_what_a_tensor_is_made_of_comes_in_the_order_of_numbers(tmp_path: Path) -> None:
    _, _, conversion = opened(write_moe(make_moe("Qwen3Moe"), tmp_path, "sharded"))
    stem = "model.layers.1.mlp.experts"
    made = conversion.converted(f"{stem}.gate_up_proj")
    assert made is not None
    assert list(made.sources) == [f"mlp.experts.*.{n}_proj.weight" for n in ("gate", "up")]
    gates, ups = made.sources.values()
    assert gates == tuple(f"{stem}.{i}.gate_proj.weight" for i in range(12))
    assert made.names == [*gates, *ups] == conversion.sources(f"{stem}.gate_up_proj")
    assert str(made) == "MergeModulelist(dim=0), then Concatenate(dim=1)"


def test_what_could_make_a_tensor_is_known_when_it_is_missing(tmp_path: Path) -> None:
    folder = write_moe(make_moe("Mixtral"), tmp_path, "fused")
    _, _, conversion = opened(folder)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert conversion.converted(name) is None
    assert conversion.patterns(name) == (".experts.*.w1.weight", ".experts.*.w3.weight")
    assert conversion.patterns("model.norm.weight") == ()


def test_tensors_of_the_models_own_name_count_more_than_what_could_be_made(tmp_path: Path) -> None:
    """A checkpoint that has both has the model's."""
    model = make_moe("Olmoe")
    both = tensors_of(write_moe(model, tmp_path, "saved"))
    both |= {n: t.clone() for n, t in model.state_dict().items() if ".experts." in n}
    _, _, conversion = opened(write_tensors(tmp_path, both))
    name = "model.layers.0.mlp.experts.down_proj"
    assert conversion.converted(name) is None
    assert conversion.rename(name) == name


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForCausalLM"])
@pytest.mark.parametrize("has_prefix", [True, False])
def test_the_base_models_prefix_comes_and_goes(
    llama: Path, tmp_path: Path, kind: str, has_prefix: bool
) -> None:
    tensors = {
        name if has_prefix else name.removeprefix("model."): tensor
        for name, tensor in load_file(llama / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    conversion = Conversion.of(build_empty(llama, checkpoint, kind), checkpoint)
    ours = "model.norm.weight" if kind == "LlamaForCausalLM" else "norm.weight"
    assert conversion(ours) == ("model.norm.weight" if has_prefix else "norm.weight")


def test_a_module_that_is_not_transformers_keeps_its_names(tmp_path: Path) -> None:
    model = nn.ModuleDict({"block_sparse_moe": nn.Linear(2, 2)})
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    conversion = Conversion.of(model, Checkpoint.open(tmp_path))
    assert [conversion(name) for name in model.state_dict()] == list(model.state_dict())


def test_transformers_without_rules_keeps_names(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before version 5."""
    checkpoint, model, _ = opened(llama)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    conversion = Conversion.of(model, checkpoint)
    assert {conversion(name) for name in model.state_dict()} == checkpoint.entries.keys()


def test_a_function_without_rules_is_the_identity() -> None:
    assert Conversion()("any.name") == "any.name"
    assert Conversion().sources("any.name") == ["any.name"]


@pytest.mark.parametrize("number", ["7" * 4000, "²", "٣", "-1", "0x1"])
def test_strange_numbers_in_names_are_words(llama: Path, tmp_path: Path, number: str) -> None:
    tensors = load_file(llama / "model.safetensors") | {f"other.{number}.x": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    conversion = Conversion.of(build_empty(llama, checkpoint), checkpoint)
    assert conversion("model.norm.weight") == "model.norm.weight"


# -- more than names -------------------------------------------------------------------------------


def test_a_tensor_that_is_made_of_another_is_refused_by_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(llama / "model.safetensors")
    for name in [name for name in tensors if "k_proj" in name]:
        stem = name.removesuffix("k_proj.weight")
        tensors[f"{stem}kv.weight"] = torch.cat(
            [tensors.pop(f"{stem}{leaf}_proj.weight") for leaf in ("k", "v")]
        )
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    rule = core_model_loading.WeightConverter(
        "attn.kv.weight",
        ["attn.k_proj.weight", "attn.v_proj.weight"],
        operations=[core_model_loading.Chunk(dim=0)],
    )
    convert_by(monkeypatch, "llama", rule)
    _, model, conversion = opened(tmp_path)
    for leaf in ("k_proj", "v_proj"):
        made = conversion.converted(f"model.layers.1.self_attn.{leaf}.weight")
        assert made is not None
        assert made.names == ["model.layers.1.self_attn.kv.weight"]
    wanted = r"k_proj\.weight is made of .*kv\.weight by Chunk\(dim=0\).*save_original_format=False"
    with pytest.raises(StreamError, match=wanted):
        nexus.from_pretrained(tmp_path)
    with pytest.raises(StreamError, match=wanted):
        lay_out(model, Checkpoint.open(tmp_path))
    # As it says.
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    _, model, conversion = opened(tmp_path)
    assert all(conversion.converted(name) is None for name in model.state_dict())
    with nexus.from_pretrained(tmp_path):
        pass


@pytest.mark.parametrize("checks", [True, False])
def test_a_transposition_that_looks_first_may_find_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks: bool
) -> None:
    write_moe(make_moe("Olmoe"), tmp_path, "fused")
    name = "mlp.experts.down_proj"
    convert_by(monkeypatch, "olmoe", converter([name], name, Transpose(1, 2, check_dims=checks)))
    _, _, conversion = opened(tmp_path)
    full = f"model.layers.0.{name}"
    if checks:
        assert conversion.rename(full) == full
        return
    # Its own name is there, and is not it.
    with pytest.raises(StreamError, match="Transpose"):
        conversion.rename(full)


def test_a_transposition_that_is_needed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = tensors_of(write_moe(make_moe("Olmoe"), tmp_path, "fused"))
    name = "mlp.experts.down_proj"
    full = f"model.layers.0.{name}"
    tensors[full] = tensors[full].mT.contiguous()
    convert_by(monkeypatch, "olmoe", converter([name], name, Transpose(1, 2, check_dims=True)))
    checkpoint, model, conversion = opened(write_tensors(tmp_path, tensors))
    assert conversion.converted(full) is not None
    assert conversion.converted(full.replace("0", "1")) is None
    with pytest.raises(StreamError, match=r"layers\.0\.mlp\.experts\.down_proj.*Transpose"):
        find_experts(model, checkpoint, conversion)


# -- from_pretrained -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["saved", "fused"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "DeepseekV3"])
def test_a_plan_is_made_of_what_is_no_expert(tmp_path: Path, family: str, form: str) -> None:
    plan = plan_pretrained(write_moe(make_moe(family), tmp_path, form), budget="1GiB")
    own = sum(
        tensor.nbytes for name, tensor in tensors_of(tmp_path).items() if ".experts." not in name
    )
    assert plan.outside_bytes + sum(plan.group_bytes) == pytest.approx(own, abs=64 * 64)


def test_tensors_of_experts_are_not_reported_as_unused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from nexus_ext.pretrained import _report_unused, renaming

    tensors = tensors_of(write_moe(make_moe("Mixtral"), tmp_path, "saved"))
    checkpoint, model, _ = opened(tmp_path)
    with caplog.at_level(logging.INFO, "nexus_ext"):
        _report_unused(model, checkpoint, renaming(model, checkpoint))
    assert not caplog.messages
    write_tensors(tmp_path, tensors | {"model.other": torch.zeros(1)})
    checkpoint, model, _ = opened(tmp_path)
    with caplog.at_level(logging.INFO, "nexus_ext"):
        _report_unused(model, checkpoint, renaming(model, checkpoint))
    [message] = caplog.messages
    assert "no use for 1 tensors: ['model.other']" in message


@pytest.mark.parametrize("family", ["DeepseekV3", "Ernie4_5_Moe"])
def test_what_transformers_keeps_in_float32_is_taken_so(tmp_path: Path, family: str) -> None:
    """The scores of these routers are stored in float32, between weights in bfloat16."""
    tensors = tensors_of(write_moe(make_moe(family), tmp_path, "saved"))
    scores = [name for name in tensors if name.endswith("e_score_correction_bias")]
    tensors |= {name: tensors[name].float() for name in scores}
    checkpoint, model, _ = opened(write_tensors(tmp_path, tensors))
    layout = lay_out(model, checkpoint, strict=True, experts=find_experts(model, checkpoint))
    kept = [n for n in layout.tensors if n.endswith("e_score_correction_bias")]
    assert {layout.tensors[name].dtype for name in kept} == {torch.float32}
    assert [layout.source[name] for name in kept] == scores
    dtypes = {tensor.dtype for n, tensor in layout.tensors.items() if n.endswith("proj.weight")}
    assert dtypes == {torch.bfloat16}


def test_the_dtype_of_packed_experts_is_that_of_other_weights(tmp_path: Path) -> None:
    """Scales in float32 are no weights."""
    from tests.test_experts_find import packed_whole

    packed_whole(tmp_path, "GptOss", "nf4", 32, num_local_experts=16)
    _, model, _ = opened(tmp_path)
    assert model.dtype == torch.bfloat16


def test_a_missing_router_is_named_as_the_model_has_it(tmp_path: Path) -> None:
    tensors: dict[str, Any] = tensors_of(write_moe(make_moe("Mixtral"), tmp_path, "saved"))
    del tensors["model.layers.1.block_sparse_moe.gate.weight"]
    checkpoint, model, conversion = opened(write_tensors(tmp_path, tensors))
    layers = find_experts(model, checkpoint, conversion)
    with pytest.raises(CheckpointMismatch, match=r"lacks model\.layers\.1\.mlp\.gate\.weight"):
        lay_out(model, checkpoint, rename=conversion, experts=layers)
