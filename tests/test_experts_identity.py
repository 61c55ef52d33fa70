"""Models whose experts stream answer with the bits of the resident model.

Four architectures (Mixtral, Qwen3-MoE, DeepSeek-V3, GPT-OSS) with random weights, plain in bf16 and
packed in NF4, against transformers' own model with experts_implementation="grouped_mm".

Covered: every architecture and format at every budget and every way to read, logits of a prefill
and of what is decoded after it, 24 tokens for a batch of one and 6 for a batch of 8 in turn, every
other budget with the dense weights streamed beside; 256 tokens of `generate` for every architecture
at the smallest budget and two others, ways to read in turn; 64 tokens packed, and 64 of a batch of
8. NF4's reference has the decoded weights:
its tokens are equal, its logits close, and all budgets and ways to read give the same bits. Freed
slots are poisoned: an expert that was read too late would answer NaN.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import nexus_ext as nexus
from nexus_ext.errors import BudgetError
from tests.expert_subjects import (
    ARCHITECTURES,
    BUDGETS,
    FORMATS,
    MODES,
    PROMPT,
    PROMPTS,
    ROOMY,
    TEXT,
    TEXTS,
    Subject,
    decoded,
    experts_of,
    generate,
    load_resident,
    logits,
    make_subject,
    named_bytes,
)

pytestmark = pytest.mark.usefixtures("one_quiet_thread", "poisoned_arenas")


@pytest.fixture(params=list(itertools.product(ARCHITECTURES, FORMATS)), ids="-".join)
def subject(request: pytest.FixtureRequest, folder: Path) -> Iterator[Subject]:
    made = make_subject(*request.param, folder)
    yield made
    made.close()


# -- logits --------------------------------------------------------------------------------------


ASKED = {1: (PROMPT, TEXT), 8: (PROMPTS, TEXTS)}
_wanted: dict[tuple[Path, int], torch.Tensor] = {}


def wanted_logits(subject: Subject, batch: int) -> torch.Tensor:
    """What every budget and way to read must give: the resident model's, or, packed, those of the
    first that was asked, which must be close to them.
    """
    key = (subject.folder, batch)
    if key not in _wanted:
        want = logits(subject.resident, *ASKED[batch])
        if subject.is_packed:
            near, want = want, logits(subject.model, *ASKED[batch])
            torch.testing.assert_close(want, near, rtol=1e-3, atol=1e-3)
        _wanted[key] = want
    return _wanted[key]


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_the_resident_models_at_every_budget(subject: Subject, mode: str) -> None:
    per_token = subject.architecture.top_k * subject.architecture.num_layers
    for number, budget in enumerate(BUDGETS):
        batch = (1, 8)[(number + list(MODES).index(mode)) % 2]
        expert_bytes = subject.expert_bytes(budget)
        # In turn everything dense is resident, and as little of it as can be.
        total = ROOMY if number % 2 else expert_bytes + subject.dense_bytes
        with subject.stream(budget=total, expert_budget=expert_bytes, **MODES[mode]) as model:
            want = wanted_logits(subject, batch)
            before = nexus.stats(model).experts
            assert torch.equal(logits(model, *ASKED[batch]), want), budget
            plan, stats = nexus.plan_of(model), nexus.stats(model).experts
        assert plan.device_bytes <= plan.budget_bytes
        assert plan.experts.nbytes <= expert_bytes
        assert (len(plan.streamed) > 0) == (total != ROOMY)
        assert stats.io_mode == MODES[mode]["io"]
        if subject.is_packed:  # converted so that everything is aligned
            assert stats.num_views == (stats.num_experts if stats.io_mode == "mmap" else 0)
        asked = sum(
            getattr(stats, name) - getattr(before, name)
            for name in ("num_hits", "num_joined", "num_misses")
        )
        # One token asks for top-k experts in each layer, eight tokens for that many at least.
        assert asked >= per_token * ASKED[batch][1].shape[1]
        assert asked == per_token * TEXT.shape[1] or batch == 8
        if budget == "100%":
            assert stats.num_misses == stats.num_evicted == stats.num_waves == 0
        else:
            assert stats.num_misses > before.num_misses
            assert stats.num_evicted > before.num_evicted
        assert stats.num_failed == 0


@pytest.mark.parametrize("subject", [(name, "bf16") for name in ARCHITECTURES], indirect=True)
def test_the_logits_tell_every_expert(subject: Subject) -> None:
    """Otherwise a wrong expert would pass in this file: two that are exchanged must be seen."""
    subject.stream()
    want = logits(subject.resident, PROMPTS, TEXTS[:, :1])
    for layer in [m for m in subject.resident.modules() if hasattr(m, "_is_expert_parallel")]:
        count = layer.num_experts
        for one in range(count):
            exchanged = [*range(count)]
            exchanged[one], exchanged[one - 1] = exchanged[one - 1], exchanged[one]
            before = layer.down_proj.data
            layer.down_proj.data = before[exchanged]
            assert not torch.equal(logits(subject.resident, PROMPTS, TEXTS[:, :1]), want)
            layer.down_proj.data = before


# -- tokens --------------------------------------------------------------------------------------


_tokens: dict[tuple[Path, int, int], torch.Tensor] = {}


def wanted_tokens(subject: Subject, batch: int, num_tokens: int) -> torch.Tensor:
    key = (subject.folder, batch, num_tokens)
    if key not in _tokens:
        _tokens[key] = generate(subject.resident, PROMPTS[:batch], num_tokens)
    return _tokens[key]


def runs() -> list[Any]:
    """For each architecture one of 256 tokens at the smallest budget and at two others, one that is
    packed, and one of a batch; all budgets and ways to read take turns.

    With NEXUS_ALL_TOKENS=1 all of them, 256 tokens each: 320 runs.
    """
    if os.environ.get("NEXUS_ALL_TOKENS") == "1":
        every = itertools.product(ARCHITECTURES, FORMATS, BUDGETS, MODES, (1, 8))
        return [
            pytest.param((name, format_), budget, mode, batch, 256)
            for name, format_, budget, mode, batch in every
        ]
    budgets, modes = itertools.cycle(BUDGETS[1:]), itertools.cycle(MODES)
    return [
        pytest.param(
            (name, format_),
            budget or next(budgets),
            next(modes),
            batch,
            num_tokens,
            id=f"{name}-{format_}-{batch}-{number}",
        )
        for name in ARCHITECTURES
        for number, (format_, budget, batch, num_tokens) in enumerate(
            [
                ("bf16", "floor", 1, 256),
                ("bf16", None, 1, 256),
                ("bf16", None, 1, 256),
                ("nf4", "floor", 1, 64),
                ("bf16", "20%", 8, 64),
            ]
        )
    ]


@pytest.mark.parametrize(
    ("subject", "budget", "mode", "batch", "num_tokens"), runs(), indirect=["subject"]
)
def test_tokens_are_the_resident_models(
    subject: Subject, budget: str, mode: str, batch: int, num_tokens: int
) -> None:
    want = wanted_tokens(subject, batch, num_tokens)
    assert len(want[:, PROMPTS.shape[1] :].unique()) > 4, "it says something"
    with subject.stream(expert_budget=subject.expert_bytes(budget), **MODES[mode]) as model:
        assert torch.equal(generate(model, PROMPTS[:batch], num_tokens), want)
        assert nexus.stats(model).experts.num_failed == 0


@pytest.mark.parametrize("subject", [(name, "bf16") for name in ARCHITECTURES], indirect=True)
def test_tokens_are_those_of_transformers_default(subject: Subject) -> None:
    """What users compare with: nothing is said about experts."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(subject.folder, dtype="auto").eval()
    want = generate(plain, PROMPTS, 24)
    with nexus.from_pretrained(subject.folder, budget=ROOMY, expert_budget="20%") as model:
        assert torch.equal(generate(model, PROMPTS, 24), want)


# -- choices that routers seldom make ------------------------------------------------------------


CHOICES: dict[str, Callable[[int], torch.Tensor]] = {
    "one expert for all": lambda count: torch.full((7, 1), count - 1),
    "the same expert twice": lambda count: torch.tensor([[2, 2], [0, count - 1], [5, 5]]),
    "the same expert three times and another": lambda count: torch.tensor([[1, 4, 1, 1]] * 3),
    "some are never used": lambda count: torch.arange(20).view(10, 2) % 3,
    "every token needs all": lambda count: torch.arange(count).repeat(3, 1),
    "all in the other order": lambda count: torch.arange(count).flip(0).repeat(2, 1),
    "no tokens": lambda count: torch.empty(0, 2, dtype=torch.int64),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    "subject", [("qwen3", "bf16"), ("gpt-oss", "bf16"), ("qwen3", "nf4")], indirect=True
)
def test_any_choice_gives_the_resident_modules_rows(subject: Subject, choice: str) -> None:
    index = CHOICES[choice](subject.architecture.num_experts)
    generator = torch.Generator().manual_seed(3)
    dtype = subject.resident.dtype
    hidden = torch.randn(len(index), 64, generator=generator).to(dtype)
    weights = torch.rand(index.shape, generator=generator).to(dtype)
    first: dict[int, torch.Tensor] = {}
    for budget in BUDGETS:
        with (
            torch.inference_mode(),
            subject.stream(expert_budget=subject.expert_bytes(budget)) as model,
        ):
            modules = zip(experts_of(model), experts_of(subject.resident), strict=True)
            for number, (mine, theirs) in enumerate(modules):
                got, want = mine(hidden, index, weights), theirs(hidden, index, weights)
                assert got.shape == want.shape
                assert got.dtype == want.dtype
                if subject.is_packed:
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
                    assert torch.equal(got, first.setdefault(number, got))
                else:
                    assert torch.equal(got, want)
            stats = nexus.stats(model).experts
            distinct = len(index.unique())
            assert (stats.num_waves > 0) == (distinct > stats.num_slots)


# -- other files, same model ---------------------------------------------------------------------


def save_as_the_model_has_them(model: Any, folder: Path) -> None:
    """Experts fused, as they never are in the wild for these architectures."""
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def save_sharded(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 5


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "by expert": lambda model, folder: model.save_pretrained(folder),
    "fused": save_as_the_model_has_them,
    "sharded": save_sharded,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_however_the_files_are_cut_the_logits_are_the_same(
    name: str, writer: str, folder: Path, tmp_path: Path
) -> None:
    subject = make_subject(name, "bf16", folder)
    WRITERS[writer](ARCHITECTURES[name].build(torch.bfloat16), tmp_path / "model")
    want = logits(subject.resident, PROMPT, TEXT[:, :8])
    for mode in ("direct", "mapped, dropped"):
        with nexus.from_pretrained(
            tmp_path / "model", budget=ROOMY, expert_budget="20%", **MODES[mode]
        ) as model:
            assert torch.equal(logits(model, PROMPT, TEXT[:, :8]), want)
            assert nexus.stats(model).experts.num_misses > 0


PACKINGS: dict[str, Any] = {
    "nested": "nf4-nested",
    "fine": "nf4-fine",
    "8 bits": "int8",
    "mixed": "mixed",
    "experts of one layer": nexus.NF4Config(skip=("*layers.0.*",)),
    "experts alone": nexus.NF4Config(skip=("*attn*", "lm_head")),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_however_experts_are_packed_all_budgets_agree(
    packing: str, folder: Path, tmp_path: Path
) -> None:
    """Also where layers have experts of two sizes, and slots of two classes."""
    plain = make_subject("qwen3", "nf4", folder).folder.with_name("qwen3-nf4")
    nexus.convert(plain, tmp_path / "packed", PACKINGS[packing])
    resident = load_resident(decoded(plain, tmp_path / "packed", tmp_path / "decoded"))
    near = logits(resident, PROMPT, TEXT[:, :8])
    seen = []
    for budget, mode in (("100%", "direct"), ("30%", "buffered"), (0, "direct")):
        if budget == 0:
            with pytest.raises(BudgetError) as refused:
                nexus.from_pretrained(tmp_path / "packed", budget=ROOMY, expert_budget=1)
            budget = named_bytes(refused.value)
        with nexus.from_pretrained(
            tmp_path / "packed", budget=ROOMY, expert_budget=budget, **MODES[mode]
        ) as model:
            seen.append(logits(model, PROMPT, TEXT[:, :8]))
            plan = nexus.plan_of(model).experts
        assert len(plan.num_slots) == (2 if packing == "experts of one layer" else 1)
    torch.testing.assert_close(seen[0], near, rtol=2e-3, atol=2e-3)
    assert all(torch.equal(seen[0], other) for other in seen[1:])
