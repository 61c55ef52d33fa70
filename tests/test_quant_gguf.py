"""GGUF files, written by the gguf package, stream as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

import nexus_ext as nexus
from nexus_ext.errors import CheckpointFormatError
from nexus_ext.quant import reference
from nexus_ext.quant.gguf_file import open_checkpoint

OPS = torch.ops.nexus
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
KINDS = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}
HEADS, KEY_HEADS = 4, 2
# What transformers takes a Qwen3 in GGUF to have.
HEAD_DIM = {"llama": 16, "qwen3": 128}


@pytest.fixture(autouse=True)
def _poisoned_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")


def tiny(architecture: str) -> Any:
    torch.manual_seed(0)
    kind = {"llama": "Llama", "qwen3": "Qwen3"}[architecture]
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD_DIM[architecture],
        vocab_size=32,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp stores queries and keys: a row and the one half a head behind it, in turn."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def write(path: Path, model: Any, architecture: str, kind: str) -> Any:
    """The model as GGUF; what is packed is rounded in the model too, which is returned."""
    writer = gguf.GGUFWriter(path, architecture)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_key_length(HEAD_DIM[architecture])
    writer.add_value_length(HEAD_DIM[architecture])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if tensor.dim() != 2:
            writer.add_tensor(own, tensor.numpy())
            continue
        heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(own.split(".")[-2], 0)
        reordered = heads > 0 and architecture == "llama"
        stored = interleaved(tensor, heads) if reordered else tensor
        blocks = gguf.quants.quantize(stored.contiguous().numpy(), KINDS[kind])
        writer.add_tensor(own, blocks, raw_dtype=KINDS[kind])
        rounded = torch.from_numpy(gguf.quants.dequantize(blocks, KINDS[kind]).astype(np.float32))
        if reordered:
            rows, width = rounded.shape
            pairs = rounded.view(heads, rows // heads // 2, 2, width)
            rounded = pairs.transpose(1, 2).reshape(rows, width)
        tensor.copy_(rounded)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codec", ["scalar", "auto"])
def test_blocks_decode_to_the_bits_of_the_gguf_package(
    kind: str, dtype: torch.dtype, codec: str
) -> None:
    OPS.use_codec(codec)
    try:
        weight = torch.randn(37, 96) * torch.logspace(-6, 4, 37)[:, None]
        blocks = gguf.quants.quantize(weight.numpy(), KINDS[kind])
        want = torch.from_numpy(gguf.quants.dequantize(blocks, KINDS[kind])).to(dtype)
        packed = torch.from_numpy(blocks)
        got = OPS.dequantize_ggml(packed, kind, [37, 96], dtype)
        assert torch.equal(got, want)
        assert torch.equal(reference.dequantize_ggml(packed, kind, (37, 96), dtype), want)
    finally:
        OPS.use_codec("auto")


@pytest.fixture(params=[("llama", "q8_0"), ("llama", "q4_0"), ("qwen3", "q8_0")], ids=str)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    architecture, kind = request.param
    path = tmp_path / "model.gguf"
    return path, write(path, tiny(architecture), architecture, kind)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_streams_as_it_is(written: tuple[Path, Any]) -> None:
    path, resident = written
    model = nexus.from_pretrained(path, budget="1GiB", io="direct")
    plan = nexus.plan_of(model)
    want = model(IDS).logits
    assert torch.allclose(want, resident(IDS).logits, atol=1e-5)
    nexus.close(model)
    smallest = plan.outside_bytes + 2 * max(plan.group_bytes)
    with nexus.from_pretrained(path, budget=smallest, io="direct", lookahead=1) as model:
        assert len(nexus.plan_of(model).streamed) == 5
        for _ in range(2):
            assert torch.equal(model(IDS).logits, want)


def test_any_module_with_names_of_its_own(tmp_path: Path) -> None:
    resident = write(tmp_path / "model.gguf", tiny("qwen3"), "qwen3", "q8_0")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    model = nexus.stream(
        tiny("qwen3"), checkpoint, rename=checkpoint.rename, budget="1GiB", strict=False
    )
    with model:
        assert torch.allclose(model(IDS).logits, resident(IDS).logits, atol=1e-5)


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(CheckpointFormatError, match="must be a GGUF file"):
        open_checkpoint(tmp_path / "bad.gguf")
    with pytest.raises(CheckpointFormatError, match="must be a GGUF file"):
        open_checkpoint(tmp_path / "missing.gguf")


def test_an_architecture_with_other_tensors_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma2")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointFormatError, match="of 'gemma2'"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "tensor", "kind"),
    [
        ("blk.0.ffn_up.weight", np.zeros((8, 256), np.float32), "Q6_K"),
        ("blk.0.attn_q.weight", np.zeros((8, 256), np.float32), "F32"),
    ],
)
def test_kinds_that_are_not_read_are_named(
    tmp_path: Path, name: str, tensor: np.ndarray, kind: str
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    if kind == "F32":
        writer.add_tensor(name, tensor)
    else:
        blocks = np.zeros((8, 210), np.uint8)
        writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointFormatError, match=f"{name} in .* is {kind}"):
        open_checkpoint(tmp_path / "model.gguf")


def test_blocks_of_another_size_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"take 34 contiguous bytes, got 33"):
        OPS.dequantize_ggml(torch.zeros(33, dtype=torch.uint8), "q8_0", [32], torch.float32)
    with pytest.raises(RuntimeError, match=r'read as "q8_0" or "q4_0", got "q6_k"'):
        OPS.dequantize_ggml(torch.zeros(34, dtype=torch.uint8), "q6_k", [32], torch.float32)
