"""Real architectures with random weights: streamed, their outputs are the resident model's bits.

Freed arenas are poisoned throughout, so a block that read one would answer NaN.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import nn

import nexus_ext as nexus
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.engine import ReadMode, measure_read
from nexus_ext.errors import BudgetError
from nexus_ext.plan import Plan
from nexus_ext.profiling import Stats

NUM_PASSES = 3


@dataclass(frozen=True)
class Architecture:
    """A class, a small config, what to feed it, and how many blocks it repeats."""

    kind: str
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    num_blocks: int
    rename: Callable[[str], str] = str

    def build(self) -> Any:
        torch.manual_seed(0)
        return getattr(transformers, self.kind)(self.config()).eval()


def tokens(length: int = 9) -> torch.Tensor:
    return torch.randint(0, 100, (2, length), generator=torch.Generator().manual_seed(1))


def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# transformers 5 saves ViT under its names of old.
OLD_VIT_NAMES = {
    "layers.": "encoder.layer.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
    "attention.o_proj.": "attention.output.dense.",
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
}


def old_vit_name(name: str) -> str:
    for new, old in OLD_VIT_NAMES.items():
        name = name.replace(new, old)
    return name


ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=7,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=100,
        ),
        lambda: {"input_ids": tokens()},
        7,
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            n_embd=128, n_layer=5, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0
        ),
        lambda: {"input_ids": tokens()},
        5,
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        lambda: transformers.T5Config(
            d_model=64,
            d_kv=16,
            d_ff=192,
            num_layers=4,
            num_heads=4,
            vocab_size=100,
            decoder_start_token_id=0,
        ),
        lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(5)},
        8,
    ),
    "vit": Architecture(
        "ViTModel",
        lambda: transformers.ViTConfig(
            hidden_size=64,
            num_hidden_layers=5,
            num_attention_heads=4,
            intermediate_size=192,
            image_size=32,
            patch_size=8,
        ),
        lambda: {"pixel_values": image()},
        5,
        old_vit_name,
    ),
}


def with_data_at(source: Path, target: Path, phase: int) -> Path:
    """The same checkpoint; spaces in its header move its data to `phase` modulo 64."""
    raw = source.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8:end])).encode()
    header += b" " * ((phase - 8 - len(header)) % 64)
    target.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    return target


@dataclass(frozen=True)
class Subject:
    """One architecture: the resident model, its output, and its checkpoints."""

    architecture: Architecture
    resident: Any
    empty: nn.Module
    inputs: dict[str, torch.Tensor]
    want: list[torch.Tensor]
    aligned: Path
    odd: Path

    def fresh(self) -> Any:
        """The model again, without weights."""
        return copy.deepcopy(self.empty)

    def stream(self, model: Any, checkpoint: Path | None = None, **options: Any) -> Any:
        """Stream `model` from the aligned checkpoint, or from another one."""
        return nexus.stream(
            model, checkpoint or self.aligned, rename=self.architecture.rename, **options
        )


@pytest.fixture(autouse=True)
def _poisoned_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")


@pytest.fixture(autouse=True, scope="module")
def _one_compute_thread() -> Iterator[None]:
    """These models are too small to share out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return prepare(request.param, tmp_path_factory.mktemp(request.param))


def prepare(name: str, folder: Path) -> Subject:
    architecture = ARCHITECTURES[name]
    transformers.utils.logging.disable_progress_bar()
    # Frozen, as streamed weights are: torch itself multiplies by others in another way.
    resident = architecture.build().requires_grad_(False)
    resident.save_pretrained(folder)
    with accelerate.init_empty_weights(include_buffers=False):
        empty = getattr(transformers, architecture.kind)(architecture.config()).eval()
    empty.tie_weights()
    inputs = architecture.inputs()
    saved = folder / "model.safetensors"
    return Subject(
        architecture,
        resident,
        empty,
        inputs,
        outputs(resident, inputs),
        with_data_at(saved, folder / "aligned.safetensors", 0),
        with_data_at(saved, folder / "odd.safetensors", 13),
    )


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Every tensor the model answers with."""
    return [value for value in model(**inputs).values() if isinstance(value, torch.Tensor)]


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert len(got) == len(want) > 0
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def smallest_budget(subject: Subject, lookahead: int | str = "auto") -> int:
    """What the error for a budget of nothing asks for."""
    with pytest.raises(BudgetError) as refused:
        subject.stream(subject.fresh(), budget=0, lookahead=lookahead)
    return int(re.search(r"needed (\d+) =", str(refused.value))[1])


def budgets(subject: Subject, lookahead: int) -> Iterator[int]:
    """From the smallest through two between to everything."""
    low, high = smallest_budget(subject, lookahead), Checkpoint.open(subject.aligned).nbytes
    yield from (low, low + (high - low) // 3, low + 2 * (high - low) // 3, 2 * high)


def assert_streamed(before: Stats, after: Stats, plan: Plan, num_passes: int = NUM_PASSES) -> None:
    """The counters of `num_passes` passes: everything streamed moved each time, as foreseen."""
    num_acquired = after.num_hits + after.num_waits - before.num_hits - before.num_waits
    assert num_acquired == num_passes * len(plan.streamed)
    num_resident = after.num_resident_hits - before.num_resident_hits
    assert num_resident == num_passes * len(plan.resident)
    assert after.bytes_read >= num_passes * plan.streamed_bytes
    assert after.num_landed >= num_passes * len(plan.streamed)
    assert after.num_failed == after.num_stale_reads == 0
    assert after.num_mispredicted == 0


@pytest.mark.parametrize("lookahead", [1, 2, 3, 4])
@pytest.mark.parametrize("io", ["direct", "buffered", "mmap", "auto"])
def test_outputs_are_those_of_the_resident_model_at_every_budget(
    subject: Subject, io: str, lookahead: int
) -> None:
    num_streamed = set()
    for budget in budgets(subject, lookahead):
        model = subject.fresh()
        with subject.stream(model, budget=budget, io=io, lookahead=lookahead):
            plan, before = nexus.plan_of(model), nexus.stats(model)
            for _ in range(NUM_PASSES):
                assert_equal(outputs(model, subject.inputs), subject.want)
            assert_streamed(before, nexus.stats(model), plan)
            assert plan.device_bytes <= budget
            assert plan.lookahead == (lookahead if plan.streamed else 0)
            num_streamed.add(len(plan.streamed))
    assert min(num_streamed) == 0
    # As many arenas as groups would be residents.
    assert max(num_streamed) > 0 or plan.num_groups == lookahead + 1
    assert plan.num_groups == subject.architecture.num_blocks


@pytest.mark.parametrize("use_uring", [True, False])
@pytest.mark.parametrize("io", ["direct", "buffered", "mmap", "auto"])
def test_tensors_at_odd_offsets_are_staged_and_equal(
    subject: Subject, io: str, use_uring: bool
) -> None:
    model = subject.fresh()
    budget = smallest_budget(subject)
    with subject.stream(model, subject.odd, budget=budget, io=io, use_uring=use_uring):
        before = nexus.stats(model)
        for _ in range(NUM_PASSES):
            assert_equal(outputs(model, subject.inputs), subject.want)
        after = nexus.stats(model)
        assert_streamed(before, after, nexus.plan_of(model))
    assert after.io_mode_requested == io
    assert after.num_views == 0
    if after.io_mode == "direct":
        assert after.bytes_staged > 0
        assert after.bytes_direct == 0
        assert after.reader.startswith("io_uring") or not use_uring or after.refusal


@pytest.mark.parametrize("use_uring", [True, False])
def test_direct_reads_land_in_the_arena_where_offsets_allow(
    subject: Subject, use_uring: bool
) -> None:
    effective = measure_read(str(subject.aligned), ReadMode("direct"), 1 << 20)["io_mode"]
    model = subject.fresh()
    with subject.stream(model, budget=smallest_budget(subject), io="direct", use_uring=use_uring):
        assert_equal(outputs(model, subject.inputs), subject.want)
        stats = nexus.stats(model)
    assert stats.io_mode == effective
    assert stats.bytes_direct > 0
    assert use_uring or stats.reader == "threads"


def test_mapped_groups_are_used_where_they_lie(subject: Subject) -> None:
    model = subject.fresh()
    with subject.stream(model, budget=smallest_budget(subject), io="mmap"):
        plan = nexus.plan_of(model)
        assert_equal(outputs(model, subject.inputs), subject.want)
        stats = nexus.stats(model)
    assert stats.io_mode == stats.reader == "mmap"
    assert stats.num_views == len(plan.streamed) > 0


def test_a_model_with_other_weights_gets_those_of_the_checkpoint(subject: Subject) -> None:
    torch.manual_seed(9)
    model = getattr(transformers, subject.architecture.kind)(subject.architecture.config()).eval()
    assert not torch.equal(outputs(model, subject.inputs)[0], subject.want[0])
    with subject.stream(model, budget=smallest_budget(subject)):
        assert_equal(outputs(model, subject.inputs), subject.want)


def test_everything_a_model_can_tell_is_equal(subject: Subject) -> None:
    told = {"output_hidden_states": True, "output_attentions": True}
    model, resident = subject.fresh(), copy.deepcopy(subject.resident)
    for one in (model, resident):
        one.set_attn_implementation("eager")
    with torch.no_grad(), subject.stream(model, subject.odd, budget=smallest_budget(subject)):
        got, want = model(**subject.inputs, **told), resident(**subject.inputs, **told)
        assert got.keys() == want.keys()
        for key in want:
            # gpt2 names cross attentions that it does not have.
            if isinstance(want[key], tuple) and want[key]:
                assert_equal(list(got[key]), list(want[key]))
    # It can be streamed again: recording left nothing on the blocks.
    with subject.stream(model, subject.odd, budget=smallest_budget(subject)):
        outputs(model, subject.inputs)


@pytest.mark.parametrize("io", ["direct", "mmap"])
@pytest.mark.parametrize("subject", ["llama", "gpt2", "t5"], indirect=True)
def test_generated_tokens_and_scores_are_those_of_the_resident_model(
    subject: Subject, io: str
) -> None:
    want = generate(subject.resident, subject)
    model = subject.fresh()
    with subject.stream(model, budget=smallest_budget(subject), io=io, lookahead=1):
        before = nexus.stats(model)
        got = generate(model, subject)
        after = nexus.stats(model)
    assert torch.equal(got.sequences, want.sequences)
    assert_equal(list(got.scores), list(want.scores))
    assert after.num_hits + after.num_waits - before.num_hits - before.num_waits >= 12


def generate(model: Any, subject: Subject) -> Any:
    """Twelve greedy tokens, by way of the cache."""
    return model.generate(
        subject.inputs["input_ids"],
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )


@pytest.mark.parametrize("subject", ["t5"], indirect=True)
def test_both_stacks_stream_and_what_they_share_stays(subject: Subject) -> None:
    model = subject.fresh()
    with subject.stream(model, budget=smallest_budget(subject)):
        assert nexus.plan_of(model).num_groups == 8
        embeddings = model.get_input_embeddings().weight
        assert model.encoder.embed_tokens.weight is embeddings
        assert model.decoder.embed_tokens.weight is embeddings
        assert not embeddings.is_meta
        assert model.encoder.block[0].layer[0].SelfAttention.q.weight.is_meta
        assert model.decoder.block[3].layer[0].SelfAttention.q.weight.is_meta


@pytest.mark.parametrize("subject", ["t5"], indirect=True)
def test_one_of_two_stacks_may_stream_alone(subject: Subject) -> None:
    model = subject.fresh()
    plan_budget = Checkpoint.open(subject.aligned).nbytes - 1
    with subject.stream(model, groups="decoder.block", budget=plan_budget):
        assert nexus.plan_of(model).num_groups == 4
        assert len(nexus.plan_of(model).streamed) > 0
        assert not model.encoder.block[0].layer[0].SelfAttention.q.weight.is_meta
        assert_equal(outputs(model, subject.inputs), subject.want)
