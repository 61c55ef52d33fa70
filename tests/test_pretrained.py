"""from_pretrained: transformers folders, names, dtypes, and what a bad folder says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import nexus_ext as nexus
from nexus_ext.demo import make_llama
from nexus_ext.errors import CheckpointMismatch, ConfigError
from nexus_ext.hub import locate
from nexus_ext.pretrained import plan_pretrained

PROMPT = torch.tensor([[1, 5, 9, 2]])
TINY = {"num_blocks": 5, "hidden": 64, "intermediate": 96, "vocabulary": 128}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    make_llama(path, **TINY, data_alignment=72)
    return path


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def resident_logits(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        return LlamaForCausalLM.from_pretrained(path, dtype="auto").eval()(PROMPT).logits


def streamed_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROMPT).logits


def test_logits_and_tokens_equal_those_of_transformers(llama: Path) -> None:
    resident = LlamaForCausalLM.from_pretrained(llama).eval()
    smallest = plan_pretrained(llama).minimum_bytes
    with nexus.from_pretrained(llama, budget=smallest, io="direct") as model:
        assert isinstance(model, LlamaForCausalLM)
        assert torch.equal(streamed_logits(model), resident_logits(llama))
        ours = model.generate(PROMPT, max_new_tokens=8, do_sample=False)
        theirs = resident.generate(PROMPT, max_new_tokens=8, do_sample=False)
        assert torch.equal(ours, theirs)
        assert nexus.stats(model).streamed_groups == TINY["num_blocks"]


def test_a_bfloat16_checkpoint_streams_in_bfloat16(tmp_path: Path) -> None:
    make_llama(tmp_path / "m", **TINY, dtype=torch.bfloat16)
    with nexus.from_pretrained(
        tmp_path / "m", budget=plan_pretrained(tmp_path / "m").minimum_bytes
    ) as model:
        logits = streamed_logits(model)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, resident_logits(tmp_path / "m"))


def test_sharded_folders_stream(tmp_path: Path, llama: Path) -> None:
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with nexus.from_pretrained(tmp_path, budget=plan_pretrained(tmp_path).minimum_bytes) as model:
        assert torch.equal(streamed_logits(model), resident_logits(llama))


def test_tied_embeddings_stay_one_parameter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=2, n_embd=32, vocab_size=64)).eval()
    plain.save_pretrained(tmp_path)
    with nexus.from_pretrained(tmp_path, budget=plan_pretrained(tmp_path).minimum_bytes) as model:
        assert model.lm_head.weight is model.transformer.wte.weight
        with torch.inference_mode():
            assert torch.equal(model(PROMPT).logits, plain(PROMPT).logits)


def test_the_base_model_of_a_checkpoint_with_a_head(llama: Path) -> None:
    from transformers import LlamaModel

    resident = LlamaModel.from_pretrained(llama).eval()
    with nexus.from_pretrained(llama, model_class="LlamaModel") as model, torch.inference_mode():
        ours, theirs = model(PROMPT), resident(PROMPT)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


def test_the_plan_is_made_from_headers_alone(llama: Path) -> None:
    plan = plan_pretrained(llama, budget="1GiB")
    assert plan.streamed == ()
    assert plan.num_groups == TINY["num_blocks"]
    total = sum(t.numel() * 4 for t in load_file(llama / "model.safetensors").values())
    assert plan.outside_bytes + sum(plan.group_bytes) == pytest.approx(total, abs=64 * 64)


def test_a_missing_tensor_is_named(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        nexus.from_pretrained(copied)


def test_a_folder_without_config_is_refused(copied: Path) -> None:
    (copied / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        nexus.from_pretrained(copied)


def test_an_unknown_class_is_refused(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["architectures"] = ["NoSuchModel"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="NoSuchModel"):
        nexus.from_pretrained(copied)


def test_a_path_that_is_not_there_is_no_hub_id() -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        locate("/no/such/model/folder")


def test_a_hub_id_is_looked_up_in_the_hubs_cache(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own layout: a snapshot of links to blobs."""
    root = tmp_path / "models--org--tiny"
    commit = "0" * 40
    snapshot = root / "snapshots" / commit
    for folder in (snapshot, root / "refs", root / "blobs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for number, file in enumerate(llama.iterdir()):
        blob = root / "blobs" / str(number)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = locate("org/tiny")
    assert found.resolve() == snapshot.resolve()
    with nexus.from_pretrained(found) as model:
        assert torch.equal(streamed_logits(model), resident_logits(llama))


def test_an_id_that_no_cache_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="org/absent"):
        locate("org/absent")
