"""convert and experts: each is packed under its own name, or all of them in one tensor that is cut
again, and decodes to what it was packed to.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import nexus_ext as nexus
from nexus_ext.errors import (
    CheckpointFormatError,
    CheckpointMismatch,
    ConfigError,
    QuantizationError,
)
from nexus_ext.experts.find import Expert, ExpertLayer, find_experts
from nexus_ext.layout import lay_out
from nexus_ext.quant import INT8Config, MixedConfig, NF4Config
from nexus_ext.quant import selection as selection_module
from nexus_ext.quant.config import config_of
from nexus_ext.quant.convert import REPORT, PackedModule
from nexus_ext.quant.packed import pack
from nexus_ext.quant.packing import INT8, NF4, NestedNF4
from nexus_ext.quant.stacked import config_for, pack_stacked
from tests.test_experts_find import (
    check_bytes,
    find,
    make_moe,
    read_weight,
    tensors_of,
    write_moe,
    write_tensors,
)
from tests.test_quant_formats import decoded

MODES = ["nf4", "nf4-nested", "nf4-fine", "int8", "mixed"]
FORMS = ["saved", "sharded", "fused"]
# Each expert by itself in what is saved, or all in one; with a gate or without.
FAMILIES = ["Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss", "Jamba", "NemotronH", "HunYuanMoEV1"]


def converted(tmp_path: Path, family: str, form: str, mode: Any, **config: Any) -> Any:
    """The model, the folder it was converted to, and the report."""
    model = make_moe(family, **config)
    report = nexus.convert(write_moe(model, tmp_path / "plain", form), tmp_path / "packed", mode)
    return model, tmp_path / "packed", report


def packing_of(expert: Expert, leaf: str) -> set[type]:
    return {type(piece.packing) for piece in expert.weights[leaf]}


def config_for_experts(mode: str) -> NF4Config | INT8Config:
    config = config_of(mode)
    if isinstance(config, MixedConfig):
        assert isinstance(config.feed_forward, NF4Config)
        return config.feed_forward
    return config


def reference_of(plain: torch.Tensor, config: NF4Config | INT8Config) -> torch.Tensor:
    """One tensor of the source, packed and decoded."""
    made = pack(plain, config)
    return made.packing.decode(made.parts, torch.bfloat16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_experts_decode_to_what_they_were_packed_to(
    tmp_path: Path, family: str, form: str, mode: str
) -> None:
    check_round_trip(tmp_path, family, form, mode)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES[2:])
def test_experts_of_more_families(tmp_path: Path, family: str, mode: str) -> None:
    check_round_trip(tmp_path, family, "saved", mode)


def check_round_trip(tmp_path: Path, family: str, form: str, mode: str) -> None:
    _, folder, report = converted(tmp_path, family, form, mode)
    plain = tensors_of(tmp_path / "plain")
    packed = tensors_of(folder)
    checkpoint, model, layers = find(folder)
    words = {line.name: line.weights for line in report}
    for layer in layers:
        for number, expert in enumerate(layer.experts):
            for leaf, names in expert.names.items():
                ours = read_weight(checkpoint, expert, leaf)
                is_stacked = plain[names[0]].dim() == ours.dim() + 1
                config: Any = config_for_experts(mode)
                if ours.dim() == 1:
                    config = None
                elif is_stacked:
                    config = config_for(plain[names[0]].shape, config)[0]
                parts = [plain[name][number] if is_stacked else plain[name] for name in names]
                if config is None:
                    assert torch.equal(ours, torch.cat(parts))
                    assert packing_of(expert, leaf) == {type(None)}
                    continue
                assert words[names[0].removesuffix(".weight")] in ("nf4", "nf4-nested", "int8")
                assert torch.equal(ours, torch.cat([reference_of(part, config) for part in parts]))
                if not is_stacked:
                    assert torch.equal(ours, torch.cat([decoded(packed, name) for name in names]))
    names = {
        name for layer in layers for e in layer.experts for n in e.names.values() for name in n
    }
    assert names == {n for n in plain if ".experts." in n or n.endswith("_linear.weight")}
    layout = lay_out(model, checkpoint, strict=True, experts=layers)
    assert not any(".experts." in name for name in layout.source)
    for name in plain:
        if any(word in name for word in ("norm", "router", "mlp.gate.weight", "moe.gate.weight")):
            assert torch.equal(packed[name], plain[name]), name


@pytest.mark.parametrize("mode", ["nf4", "nf4-nested"])
def test_all_experts_in_one_tensor_are_packed_as_a_whole(tmp_path: Path, mode: str) -> None:
    """128 * 256 and 128 * 128 elements: whole nested blocks."""
    sizes = {"hidden_size": 128, "intermediate_size": 128}
    _, folder, report = converted(tmp_path, "GptOss", "saved", mode, **sizes)
    plain, packed = tensors_of(tmp_path / "plain"), tensors_of(folder)
    checkpoint, _, layers = find(folder)
    kind = NestedNF4 if "nested" in mode else NF4
    by_name = {line.name: line for line in report}
    for layer in layers:
        for leaf in ("gate_up_proj", "down_proj"):
            name = f"{layer.path}.{leaf}"
            whole = pack(plain[name], config_for_experts(mode))
            want = whole.packing.decode(whole.parts, torch.bfloat16)
            assert torch.equal(decoded(packed, name), want)
            assert by_name[name].weights == mode
            assert by_name[name].bytes_before == plain[name].nbytes
            assert by_name[name].error == pytest.approx(whole.error(plain[name]), rel=1e-4)
            for number, expert in enumerate(layer.experts):
                assert packing_of(expert, leaf) == {kind}
                assert torch.equal(read_weight(checkpoint, expert, leaf), want[number])
        assert torch.equal(packed[f"{name}_bias"], plain[f"{name}_bias"])


# -- what is not packed, or not as asked -----------------------------------------------------------


def test_int8_leaves_all_experts_in_one_tensor_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, folder, report = converted(tmp_path, "GptOss", "saved", "int8")
    check_bytes(folder, model)
    assert {line.weights for line in report} == {"int8"}
    assert not any(".experts." in line.name for line in report)
    said = [message for message in caplog.messages if "is not packed as asked" in message]
    assert len(said) == 4
    assert (
        "layers.0.mlp.experts.gate_up_proj is not packed as asked: INT8 packs matrices" in said[0]
    )
    # transformers can load it: what it would pack, it finds packed.
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert fields["quant_method"] == "bitsandbytes"


def test_nested_scales_that_would_be_shared_by_experts_are_not_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, folder, report = converted(tmp_path, "GptOss", "saved", "nf4-nested")
    _, _, layers = find(folder)
    assert packing_of(layers[0].experts[0], "down_proj") == {NF4}
    kinds = {line.name.split(".")[-2]: line.weights for line in report}
    assert kinds["experts"] == "nf4"
    assert kinds["self_attn"] == "nf4-nested"
    assert any("that share a nested scale" in message for message in caplog.messages)


def test_blocks_that_experts_would_share_leave_them_plain(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = NF4Config(blocksize=4096)
    model, folder, _ = converted(tmp_path, "GptOss", "saved", config, intermediate_size=48)
    check_bytes(folder, model)
    assert any("end within a block of 4096" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("shape", "config", "want"),
    [
        ((4, 64, 64), None, None),
        ((4, 64, 64), NF4Config(), NF4Config()),
        ((4, 64, 33), NF4Config(), NF4Config()),
        ((4, 7, 33), NF4Config(), None),
        ((4, 7, 33), NF4Config(nested=True), None),
        ((4, 128, 128), NF4Config(nested=True), NF4Config(nested=True)),
        ((4, 128, 64), NF4Config(nested=True), NF4Config()),
        ((4, 128, 64), NF4Config(32, nested=True), NF4Config(32, nested=True)),
        ((4, 64, 64), INT8Config(), None),
    ],
)
def test_what_can_be_cut_again_is_known_from_the_shape(
    shape: tuple[int, ...], config: Any, want: NF4Config | None
) -> None:
    made, why = config_for(shape, config)
    assert made == want
    assert bool(why) == (made != config)


@pytest.mark.parametrize(
    "config", [NF4Config(), NF4Config(nested=True), NF4Config(32, num_scales=4)]
)
def test_experts_one_after_the_other_pack_like_all_of_them(config: NF4Config) -> None:
    weight = torch.randn(3, 128, 256)
    asked: list[int] = []

    def expert(number: int) -> torch.Tensor:
        asked.append(number)
        return weight[number]

    ours, error = pack_stacked(expert, weight.shape, config, "w")
    theirs = pack(weight, config)
    assert ours.packing == theirs.packing
    assert ours.parts.keys() == theirs.parts.keys()
    for part, tensor in theirs.parts.items():
        assert torch.equal(ours.parts[part].reshape(-1), tensor.reshape(-1)), part
    assert error == pytest.approx(theirs.error(weight), rel=1e-4)
    assert asked == [0, 1, 2] * 2


def test_experts_of_zeros_have_no_error() -> None:
    made, error = pack_stacked(lambda number: torch.zeros(8, 8), (2, 8, 8), NF4Config(), "w")
    assert error == 0.0
    assert not made.packing.decode(made.parts, torch.float32).any()


@pytest.mark.parametrize("form", ["saved", "fused"])
def test_an_expert_that_is_not_finite_is_named(tmp_path: Path, form: str) -> None:
    tensors = tensors_of(write_moe(make_moe("Mixtral"), tmp_path / "plain", form))
    name = next(name for name in tensors if ".experts." in name and ".layers.1." in name)
    tensors[name].view(-1)[-1] = math.inf
    write_tensors(tmp_path / "plain", tensors)
    with pytest.raises(QuantizationError) as caught:
        nexus.convert(tmp_path / "plain", tmp_path / "packed")
    assert name in str(caught.value)
    assert ("expert 3 of" in str(caught.value)) == (form == "fused")


def test_a_config_may_skip_experts(tmp_path: Path) -> None:
    config = NF4Config(skip=("*.layers.0.*", "*.experts.2.*"))
    _, folder, report = converted(tmp_path, "Qwen3Moe", "saved", config)
    names = {line.name for line in report}
    assert not any(".layers.0." in name or ".experts.2." in name for name in names)
    assert "model.layers.1.mlp.experts.11.up_proj" in names
    with pytest.raises(CheckpointMismatch, match=r"packed in the same way.*expert 2 has"):
        find(folder)


def test_routers_stay_as_they_are(tmp_path: Path) -> None:
    """Be they Linear, as HunYuan's, or not; and Qwen2's gate of what is shared."""
    for family, routers in {
        "HunYuanMoEV1": ("mlp.gate.wg.weight",),
        "Qwen2Moe": ("mlp.gate.weight", "mlp.shared_expert_gate.weight"),
        "Mixtral": ("block_sparse_moe.gate.weight",),
        "GptOss": ("mlp.router.weight", "mlp.router.bias"),
    }.items():
        _, folder, report = converted(tmp_path / family, family, "saved", "nf4")
        plain, packed = tensors_of(tmp_path / family / "plain"), tensors_of(folder)
        for router in routers:
            found = [name for name in plain if name.endswith(router)]
            assert len(found) >= 2
            assert all(torch.equal(packed[name], plain[name]) for name in found)
        packed_names = {line.name for line in report}
        assert not any("gate.weight" in n or "gate.wg" in n or "router" in n for n in packed_names)
        assert any("self_attn" in name for name in packed_names)


def test_skipped_modules_of_an_unpacked_mixture_name_the_routers(tmp_path: Path) -> None:
    config = NF4Config(skip=("*.experts.*",))
    model, folder, _ = converted(tmp_path, "HunYuanMoEV1", "saved", config)
    check_bytes(folder, model)
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert fields["quant_method"] == "bitsandbytes"
    assert "model.layers.1.mlp.gate.wg" in fields["llm_int8_skip_modules"]
    assert not any(".experts." in name for name in fields["llm_int8_skip_modules"])


def test_packing_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would pack none"):
        converted(tmp_path, "Mixtral", "saved", NF4Config(skip=("*",)))


def test_packed_experts_are_not_packed_again(tmp_path: Path) -> None:
    for form in ("saved", "fused"):
        _, folder, _ = converted(tmp_path / form, "Mixtral", form, "nf4")
        with pytest.raises(CheckpointFormatError, match="belongs to packed ones"):
            nexus.convert(folder, tmp_path / form / "again")


# -- what is written -------------------------------------------------------------------------------


def test_the_report_and_the_config_name_experts(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    write_moe(make_moe("Mixtral"), tmp_path / "plain", "saved")
    report = nexus.convert(
        tmp_path / "plain", tmp_path / "packed", progress=lambda *step: steps.append(step)
    )
    experts = [line for line in report if ".experts." in line.name]
    stem = "model.layers.0.block_sparse_moe.experts.0"
    assert [line.name for line in experts[:3]] == [f"{stem}.{w}" for w in ("w1", "w3", "w2")]
    assert len(experts) == 2 * 4 * 3
    assert all(0.05 < line.error < 0.12 for line in experts)
    kept = json.loads((tmp_path / "packed" / REPORT).read_text())
    assert [PackedModule(**line) for line in kept] == report
    # transformers joins experts while it loads, and cannot join packed ones.
    fields = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert fields["quant_method"] == "nexus_ext"
    assert fields["modules"][f"{stem}.w1"] == "nf4"
    assert steps[-1][1] == steps[-1][2]
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)


def one_read(layers: list[ExpertLayer]) -> bool:
    """Whether each expert lies in one piece, in the order of its tensors."""
    for layer in layers:
        for expert in layer.experts:
            sources = [source for tensor in expert.tensors for source in tensor.sources]
            ends = [(s.file, s.offset + s.nbytes) for s in sources[:-1]]
            if ends != [(s.file, s.offset) for s in sources[1:]]:
                return False
    return True


@pytest.mark.parametrize("form", ["saved", "sharded"])
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_one_read_brings_an_expert(tmp_path: Path, mode: str, form: str) -> None:
    _, folder, _ = converted(tmp_path, "Mixtral", form, mode, intermediate_size=64)
    _, _, layers = find(folder)
    assert one_read(layers)
    assert {t.sources[0].offset % 64 for e in layers[1].experts for t in e.tensors} == {0}


def test_a_shard_has_whole_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two experts of 3 * 64 * 48 elements of two bytes.
    monkeypatch.setattr(selection_module, "_MOST_SHARD_BYTES", 2 * 3 * 64 * 48 * 2)
    _, folder, _ = converted(tmp_path, "Mixtral", "saved", "nf4")
    assert len(list(folder.glob("*.safetensors"))) == 1 + 2 + 2 * 2
    _, _, layers = find(folder)
    for layer in layers:
        files = [{s.file for t in e.tensors for s in t.sources} for e in layer.experts]
        assert all(len(one) == 1 for one in files)
        assert files[0] == files[1] != files[2] == files[3]
    monkeypatch.setattr(selection_module, "_MOST_SHARD_BYTES", 1)
    _, folder, _ = converted(tmp_path / "small", "GptOss", "saved", "nf4")
    # Weights and biases of all experts are one tensor each, so the first expert has them all.
    assert len(list(folder.glob("*.safetensors"))) == 1 + 2 + 2


def test_an_interrupted_conversion_of_experts_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexus_ext.quant import shards

    write_moe(make_moe("Mixtral"), tmp_path / "plain", "saved")
    nexus.convert(tmp_path / "plain", tmp_path / "whole")
    write = shards.write_safetensors

    def fail_last(path: Path, tensors: Any) -> None:
        if "00005" in path.name:
            raise OSError(28, "No space left on device")
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_safetensors", fail_last)
        with pytest.raises(nexus.NexusError, match="No space left"):
            nexus.convert(tmp_path / "plain", tmp_path / "packed")
    nexus.convert(tmp_path / "plain", tmp_path / "packed")
    whole, packed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("whole", "packed")
    )
    assert packed == whole


def test_layers_without_experts_are_converted_as_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first layer of DeepSeek's is dense, and shared experts are Linear layers."""
    with caplog.at_level(logging.WARNING):
        _, folder, report = converted(tmp_path, "DeepseekV3", "saved", "mixed")
    assert not [m for m in caplog.messages if "not packed as asked" in m]
    kinds = {line.name: line.weights for line in report}
    assert kinds["model.layers.0.mlp.up_proj"] == "nf4"
    assert kinds["model.layers.1.mlp.shared_experts.up_proj"] == "nf4"
    assert kinds["model.layers.1.mlp.experts.7.up_proj"] == "nf4"
    assert kinds["model.layers.1.self_attn.o_proj"] == "int8"
    checkpoint, model, layers = find(folder)
    layout = lay_out(model, checkpoint, strict=True, experts=layers)
    packed = {name for name, weight in layout.packed.items()}
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in packed
    assert find_experts(model, checkpoint) == layers
    assert {type(w.packing) for w in layout.packed.values()} == {INT8, NF4}
