"""What cannot be: checkpoints, budgets, options and routes of models with experts. Messages say the
rule, what was got, and what to do.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nexus_ext as nexus
from nexus_ext.errors import (
    BudgetError,
    CheckpointMismatch,
    ConfigError,
    NexusError,
    StreamError,
    WriteError,
)
from nexus_ext.experts.attach import register
from tests.expert_subjects import (
    BUDGETS,
    PROMPT,
    ROOMY,
    TEXT,
    Subject,
    experts_of,
    load_resident,
    logits,
    make_subject,
    named_bytes,
)

pytestmark = pytest.mark.usefixtures("one_quiet_thread", "poisoned_arenas")


def still_streams(subject: Subject) -> None:
    """After a refusal the model can be used as if nothing had been asked."""
    with subject.stream(expert_budget="30%", io="direct") as model:
        assert torch.equal(logits(model, PROMPT, TEXT), logits(subject.resident, PROMPT, TEXT))


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def copied(qwen: Subject, tmp_path: Path) -> Path:
    return Path(shutil.copytree(qwen.folder, tmp_path / "copy"))


LOST = "model.layers.1.mlp.experts.7.up_proj.weight"


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_an_expert_that_is_not_there_is_named(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors.pop(LOST))
    message = rf"expert 7 of .*layers\.1.* needs {re.escape(LOST)}.*11 of 12.*download"
    with pytest.raises(CheckpointMismatch, match=message):
        nexus.from_pretrained(copied, budget=ROOMY)


def test_a_layer_without_experts_is_named(copied: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.2.mlp.experts." in name]:
            del tensors[name]

    rewrite(copied, change)
    with pytest.raises(CheckpointMismatch, match=r"model\.layers\.2\.mlp\.experts"):
        nexus.from_pretrained(copied, budget=ROOMY)


@pytest.mark.parametrize("kind", ["shape", "dtype"])
def test_an_expert_unlike_the_models_is_named(copied: Path, kind: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[LOST]
        tensors[LOST] = tensor[:-1].clone() if kind == "shape" else tensor.float()

    rewrite(copied, change)
    with pytest.raises(CheckpointMismatch, match=re.escape(LOST)):
        nexus.from_pretrained(copied, budget=ROOMY)


def test_an_expert_too_many_is_named(copied: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("up_proj", "gate_proj", "down_proj"):
            path = "model.layers.1.mlp.experts."
            tensors[f"{path}12.{part}.weight"] = tensors[f"{path}3.{part}.weight"].clone()

    rewrite(copied, change)
    with pytest.raises(CheckpointMismatch, match=r"experts\.12\.\w+\.weight"):
        nexus.from_pretrained(copied, budget=ROOMY)


# -- budgets -------------------------------------------------------------------------------------


def test_an_expert_budget_below_two_experts_names_the_smallest(qwen: Subject) -> None:
    for too_few in (1, 4096, qwen.floor - 1, "2%", 0.02):
        with pytest.raises(BudgetError, match="two experts of each size") as refused:
            qwen.stream(expert_budget=too_few)
        assert named_bytes(refused.value) == qwen.floor
        assert re.search(r"got \d+ bytes, needed \d+ .*give at least that", str(refused.value))
    with qwen.stream(expert_budget=qwen.floor) as model:
        assert sum(nexus.plan_of(model).experts.num_slots) == 2
        assert torch.equal(logits(model, PROMPT, TEXT), logits(qwen.resident, PROMPT, TEXT))


def test_a_budget_that_is_too_small_names_one_that_works(qwen: Subject) -> None:
    """One number for dense weights and experts, whoever finds it too small."""
    least = qwen.dense_bytes + qwen.floor
    for budget in (0, 1, qwen.floor, qwen.floor + 1, least - 1):
        with pytest.raises(BudgetError) as refused:
            qwen.stream(budget=budget)
        assert named_bytes(refused.value) == least, refused.value
        assert f"got {budget} bytes" in str(refused.value)
    with qwen.stream(budget=least) as model:
        assert nexus.plan_of(model).device_bytes <= least
        assert torch.equal(logits(model, PROMPT, TEXT), logits(qwen.resident, PROMPT, TEXT))


@pytest.mark.parametrize("budget", BUDGETS[1:])
def test_a_budget_below_what_was_asked_for_experts_names_one_that_works(
    qwen: Subject, budget: str
) -> None:
    wanted = qwen.expert_bytes(budget)
    with pytest.raises(BudgetError, match="lower") as refused:
        qwen.stream(budget=wanted, expert_budget=wanted)
    named = named_bytes(refused.value)
    with pytest.raises(BudgetError):
        qwen.stream(budget=named - 1, expert_budget=wanted)
    with qwen.stream(budget=named, expert_budget=wanted) as model:
        assert nexus.plan_of(model).device_bytes <= named


def test_more_than_all_experts_is_all_of_them(qwen: Subject) -> None:
    with qwen.stream(expert_budget="1GiB") as model:
        plan = nexus.plan_of(model)
        assert plan.experts.num_staying == 36
        assert plan.experts.nbytes == qwen.total


# -- options -------------------------------------------------------------------------------------

SHARES = ["0%", "-5%", "101%", "abc%", "%", "nan%", "inf%", 0.0, 1.5, -0.1, float("nan")]


@pytest.mark.parametrize("share", SHARES)
def test_a_share_must_be_above_0_and_up_to_100_percent(qwen: Subject, share: Any) -> None:
    message = r"expert_budget must be .*above 0 % and up to 100 % \('30%'\).*got " + re.escape(
        repr(share)
    )
    with pytest.raises(ConfigError, match=message):
        qwen.stream(expert_budget=share)


@pytest.mark.parametrize("nbytes", [-3, "lots", None, True, [1]])
def test_what_is_no_number_of_bytes_is_refused(qwen: Subject, nbytes: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"got {nbytes!r}; write it like '1.5GiB'")):
        qwen.stream(expert_budget=nbytes)


@pytest.mark.parametrize("nothing", [0, "0", "0 MiB", "1e-9%"])
def test_nothing_is_no_budget_for_experts(qwen: Subject, nothing: Any) -> None:
    with pytest.raises(ConfigError, match=r"above 0 %, got .*; '30%' keeps about a third"):
        qwen.stream(expert_budget=nothing)


@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ({"expert_policy": "fifo"}, "lru, lfu, reuse"),
        ({"expert_device": "gpu"}, "auto, cpu"),
        ({"expert_predict": "maybe"}, "auto, on, off"),
        ({"trailing_drop": "yes"}, "True, False or 'auto'"),
    ],
)
def test_an_option_that_cannot_be_lists_those_that_can(
    qwen: Subject, option: dict[str, Any], allowed: str
) -> None:
    [value] = option.values()
    with pytest.raises(ConfigError, match=rf"{allowed}.*got {value!r}"):
        qwen.stream(**option)
    still_streams(qwen)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nexus_ext.demo import make_llama

    path = tmp_path_factory.mktemp("dense") / "llama"
    make_llama(path, num_blocks=3, hidden=64, intermediate=96, vocabulary=128)
    return path


@pytest.mark.parametrize(
    "option",
    [{"expert_budget": "30%"}, {"expert_device": "cpu"}, {"expert_hotness": "hotness.json"}],
)
def test_options_of_experts_are_refused_where_there_are_none(
    dense: Path, option: dict[str, Any]
) -> None:
    [name] = option
    message = f"{name} is for models with experts.*LlamaForCausalLM has none. Leave it out"
    with pytest.raises(StreamError, match=message):
        nexus.from_pretrained(dense, budget=ROOMY, **option)
    with nexus.from_pretrained(dense, budget=ROOMY) as model:
        assert nexus.stats(model).experts is None
        assert nexus.plan_of(model).experts is None


def test_experts_cannot_be_kept(qwen: Subject) -> None:
    with pytest.raises(StreamError, match=r"keep is for .*gate_up_proj.*Leave them out of keep"):
        qwen.stream(keep="*layers.1.mlp.experts.gate*")
    still_streams(qwen)


# -- hotness -------------------------------------------------------------------------------------


def test_hotness_of_another_model_is_refused(qwen: Subject, folder: Path, tmp_path: Path) -> None:
    other = make_subject("mixtral", "bf16", folder)
    with other.stream(expert_budget="50%", io="direct") as model:
        nexus.save_hotness(model, tmp_path / "hotness.json")
    message = r"for this model and this policy.*\[8, 8, 8\].*wanted.*\[12, 12, 12\].*cold start"
    with pytest.raises(ConfigError, match=message):
        qwen.stream(expert_hotness=tmp_path / "hotness.json")
    still_streams(qwen)


def test_hotness_of_another_policy_is_refused(qwen: Subject, tmp_path: Path) -> None:
    with qwen.stream(expert_policy="lru", io="direct") as model:
        nexus.save_hotness(model, tmp_path / "hotness.json")
    with pytest.raises(ConfigError, match=r"'lru'.*wanted.*'lfu'.*choose the policy"):
        qwen.stream(expert_policy="lfu", expert_hotness=tmp_path / "hotness.json")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json",
        "[1, 2]",
        "null",
        '{"format": "nexus-hotness/1"}',
        "\udcff\udcfe",
        "[" * 100_000,
    ],
    ids=["empty", "text", "list", "null", "half", "bytes", "deep"],
)
def test_a_file_that_is_no_hotness_is_refused(qwen: Subject, tmp_path: Path, content: str) -> None:
    path = tmp_path / "hotness.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    message = rf"must name a file that nexus_ext\.save_hotness wrote.*{re.escape(str(path))}"
    with pytest.raises(ConfigError, match=message):
        qwen.stream(expert_hotness=path)


@pytest.mark.parametrize("policy", ["lru", "lfu", "reuse"])
@pytest.mark.parametrize("change", ["no state", "a list", "too few", "no numbers", "infinite"])
def test_hotness_that_was_tampered_with_is_refused(
    qwen: Subject, tmp_path: Path, policy: str, change: str
) -> None:
    path = tmp_path / "hotness.json"
    with qwen.stream(expert_policy=policy, io="direct") as model:
        nexus.save_hotness(model, path)
    content = json.loads(path.read_text())
    values = next(name for name in ("used", "hotness", "averages") if name in content["state"])
    if change == "no state":
        del content["state"]
    elif change == "a list":
        content["state"] = [1, 2]
    else:
        content["state"][values] = {
            "too few": content["state"][values][1:],
            "no numbers": ["a"] * 36,
            "infinite": [float("inf")] * 36,
        }[change]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"start"):
        qwen.stream(expert_policy=policy, expert_hotness=path)


def test_hotness_needs_experts_and_a_place_to_be_written(
    qwen: Subject, dense: Path, tmp_path: Path
) -> None:
    message = "Only experts have hotness; LlamaForCausalLM"
    with (
        nexus.from_pretrained(dense, budget=ROOMY) as model,
        pytest.raises(StreamError, match=message),
    ):
        nexus.save_hotness(model, tmp_path / "hotness.json")
    assert not (tmp_path / "hotness.json").exists()
    message = r"must be writable; .*Name another path"
    with qwen.stream(io="direct") as model, pytest.raises(WriteError, match=message):
        nexus.save_hotness(model, tmp_path / "nowhere" / "hotness.json")
    with pytest.raises(NexusError):
        nexus.save_hotness(nn.Linear(1, 1), tmp_path / "hotness.json")


# -- models and routes ---------------------------------------------------------------------------


def test_the_implementation_needs_a_streamed_model(qwen: Subject) -> None:
    register()
    model = load_resident(qwen.folder, experts_implementation="nexus")
    with pytest.raises(StreamError, match=r"needs a model whose experts stream.*from_pretrained"):
        logits(model, PROMPT, TEXT)
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(logits(model, PROMPT, TEXT), logits(qwen.resident, PROMPT, TEXT))


@pytest.mark.parametrize("wrong", [12, 13, -1, 1 << 40])
def test_ids_of_experts_that_are_elsewhere_are_refused(qwen: Subject, wrong: int) -> None:
    """Expert parallelism marks them with the number of experts."""
    hidden = torch.randn(3, 64).to(torch.bfloat16)
    index = torch.tensor([[0, 1], [2, wrong], [3, 4]])
    weights = torch.ones(3, 2, dtype=torch.bfloat16)
    with qwen.stream(io="direct") as model, torch.no_grad():
        least, most = min(0, wrong), max(4, wrong)
        message = rf"in \[0, 12\), got {least} to {most}\. Expert parallelism"
        with pytest.raises(StreamError, match=message):
            experts_of(model)[0](hidden, index, weights)
        index[1, 1] = 5
        got = experts_of(model)[0](hidden, index, weights)
        assert torch.equal(got, experts_of(qwen.resident)[0](hidden, index, weights))


def test_a_model_that_streams_is_not_streamed_again(qwen: Subject) -> None:
    with qwen.stream(io="direct") as model:
        with pytest.raises(StreamError, match="streamed already"):
            nexus.stream(model, qwen.checkpoint, budget=ROOMY)
        assert torch.equal(logits(model, PROMPT, TEXT), logits(qwen.resident, PROMPT, TEXT))


class HandMade(nn.Module):
    """Looks like an experts module of transformers, and computes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.has_bias, self.is_transposed = 4, False, False
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 4))
        self.down_proj = nn.Parameter(torch.randn(4, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = torch.einsum("ti,eoi->teo", x, self.gate_up_proj)
        return torch.einsum("tei,eoi->to", up[..., :4] * up[..., 4:], self.down_proj)


def test_experts_that_nobody_dispatches_stream_with_their_blocks(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), HandMade()) for _ in range(5)))
    model.requires_grad_(False)
    x = torch.randn(3, 4)
    want = model(x)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(StreamError, match="expert_budget is for models with experts"):
        nexus.stream(model, tmp_path / "model.safetensors", expert_budget="50%")
    with nexus.stream(model, tmp_path / "model.safetensors", budget=3 * 1024) as streamed:
        assert len(nexus.plan_of(streamed).streamed) > 0
        assert torch.equal(streamed(x), want)
        assert nexus.stats(streamed).experts is None
