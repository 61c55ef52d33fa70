"""Which way experts took: the counters of each path, and that every path was taken."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import nexus_ext as nexus
from nexus_ext.attachment import attachment_of
from nexus_ext.engine import Faults, cached_bytes
from nexus_ext.errors import BudgetError
from nexus_ext.experts.policy import POLICIES
from nexus_ext.experts.stats import ExpertStats
from nexus_ext.pretrained import plan_pretrained
from tests.conftest import PATIENCE_SECONDS, takes_direct_reads
from tests.expert_subjects import (
    ARCHITECTURES,
    COMMON,
    PROMPT,
    PROMPTS,
    ROOMY,
    TEXT,
    Architecture,
    Subject,
    experts_of,
    ids,
    load_resident,
    logits,
    make_subject,
    named_bytes,
)

pytestmark = pytest.mark.usefixtures("one_quiet_thread", "poisoned_arenas")

# Loads take long enough that whoever asks at once finds them on their way.
SLOW_DISK = Faults(delay_ppm=1_000_000, delay_us=20_000)


# -- looking in ----------------------------------------------------------------------------------


def counts(model: Any) -> ExpertStats:
    stats = nexus.stats(model).experts
    assert isinstance(stats, ExpertStats)
    return stats


def runner_of(model: Any) -> Any:
    experts: Any = attachment_of(model).experts
    return experts.runner


def present(model: Any) -> set[int]:
    """The experts that have a slot, as numbers over all layers."""
    return {key for key, slot in enumerate(runner_of(model).cache.slot_of) if slot >= 0}


def emptied(model: Any) -> Any:
    """What was loaded before anybody asked has left."""
    runner_of(model).cache.clear()
    return model


def added(before: ExpertStats, after: ExpertStats, *names: str) -> tuple[int, ...]:
    """How far these counters have come."""
    return tuple(getattr(after, name) - getattr(before, name) for name in names)


def ask(model: Any, layer: int, experts: Sequence[int]) -> torch.Tensor:
    """One token for each expert through one layer."""
    index = torch.tensor(experts).view(-1, 1)
    hidden = ids(len(experts), 64).to(torch.bfloat16)
    with torch.inference_mode():
        answer: torch.Tensor = experts_of(model)[layer](
            hidden, index, torch.ones(index.shape, dtype=torch.bfloat16)
        )
    return answer


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


# -- hits, misses, waves -------------------------------------------------------------------------


def test_every_expert_that_a_token_asks_for_is_counted_once(qwen: Subject) -> None:
    with qwen.stream(expert_budget="50%") as model:
        logits(model, PROMPT, TEXT)
        stats = counts(model)
    assert stats.num_runs == 3 * TEXT.shape[1]
    assert stats.num_hits + stats.num_joined + stats.num_misses == 4 * stats.num_runs
    assert stats.num_prefill_runs == 3
    in_prefill = stats.num_prefill_hits + stats.num_prefill_joined + stats.num_prefill_misses
    assert 3 * 4 <= in_prefill <= 3 * 12
    assert stats.hit_rate == stats.num_hits / (4 * stats.num_runs)
    assert stats.wait_seconds > 0
    assert stats.seconds_per_token > 0
    assert str(stats).startswith(f"{stats.num_staying} of 36 experts stay (reuse)")


def test_what_was_there_is_a_hit_and_what_was_not_a_miss(qwen: Subject) -> None:
    with qwen.stream(expert_budget="50%", expert_predict="off") as model:
        emptied(model)
        for experts, hits, misses in (
            ([0, 1, 2], 0, 3),
            ([0, 1, 2], 3, 0),
            ([2, 3, 4, 5], 1, 3),
            ([0, 1, 2, 3, 4, 5], 6, 0),
        ):
            before = counts(model)
            ask(model, 1, experts)
            done = added(before, counts(model), "num_hits", "num_misses", "num_joined")
            assert done == (hits, misses, 0)
        assert present(model) == {12, 13, 14, 15, 16, 17}


def test_what_is_on_its_way_is_joined(qwen: Subject) -> None:
    options = {"io": "buffered", "faults": SLOW_DISK, "expert_predict": "off"}
    with qwen.stream(expert_budget="50%", **options) as model:
        stats = counts(model)
        assert stats.num_preloaded == stats.num_staying
        # As attach left it: on the way, and read once.
        want = ask(model, 0, [0, 1, 2, 3])
        after = counts(model)
        assert after.num_joined > 0
        assert after.num_hits + after.num_joined == 4
        assert after.num_misses == 0
        runner_of(model).cache.wait()
        assert counts(model).bytes_read == stats.num_staying * expert_nbytes(qwen)
        assert torch.equal(ask(model, 0, [0, 1, 2, 3]), want)


def expert_nbytes(subject: Subject) -> int:
    """Of one expert in the file: three matrices of 32 * 64 in bf16."""
    return 3 * 32 * 64 * subject.resident.dtype.itemsize


def test_a_selection_beyond_the_slots_comes_in_waves(qwen: Subject) -> None:
    want = ask(qwen.resident, 2, range(12))
    with qwen.stream(expert_budget=qwen.floor, io="buffered", expert_predict="off") as model:
        emptied(model)
        before = counts(model)
        assert torch.equal(ask(model, 2, range(12)), want)
        after = counts(model)
    assert after.num_slots == 2
    # Two of twelve at a time, or one by one.
    assert 5 <= after.num_waves <= 10
    assert added(before, after, "num_misses", "bytes_read") == (12, 12 * expert_nbytes(qwen))


def test_at_most_what_may_stay_is_there_between_runs(qwen: Subject) -> None:
    with qwen.stream(expert_budget="60%", expert_predict="off") as model:
        stats = counts(model)
        assert 0 < stats.num_staying < stats.num_slots < 36
        for layer in (0, 1, 2, 0, 2, 1):
            ask(model, layer, range(12))
            assert counts(model).num_present == len(present(model)) <= stats.num_staying
        assert counts(model).num_evicted > 0


def test_with_room_for_all_every_byte_is_read_once(qwen: Subject) -> None:
    nbytes = 36 * expert_nbytes(qwen)
    for io in ("buffered", "direct", "mmap"):
        with qwen.stream(expert_budget="100%", io=io) as model:
            runner_of(model).cache.wait()
            before = counts(model)
            assert before.num_preloaded == before.num_staying == before.num_slots == 36
            # Direct reads round to whole blocks at both ends of an extent.
            slack = 36 * 3 * 2 * 4096 if before.io_mode == "direct" else 0
            assert nbytes <= before.bytes_read <= nbytes + slack
            for _ in range(2):
                logits(model, PROMPT, TEXT)
            after = counts(model)
        assert after.bytes_read == before.bytes_read
        assert after.num_hits == 2 * 3 * 4 * TEXT.shape[1]
        assert after.num_misses == after.num_joined == after.num_waves == after.num_evicted == 0


# -- prefill -------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["30%", "60%"])
def test_a_prefill_reads_every_expert_once_and_evicts_nobody(qwen: Subject, budget: str) -> None:
    prompt = ids(8, 40)
    with qwen.stream(expert_budget=budget, io="buffered", expert_predict="off") as model:
        logits(model, PROMPT, TEXT)
        kept, before = present(model), counts(model)
        num_passing = before.num_slots - before.num_staying
        assert 0 <= len(kept) - before.num_staying <= num_passing // 2
        with torch.inference_mode():
            got = model(prompt).logits
            assert torch.equal(got, qwen.resident(prompt).logits)
        after = counts(model)
        assert present(model) == kept
    names = ("num_prefill_hits", "num_prefill_joined", "num_prefill_misses")
    assert sum(added(before, after, *names)) == 36, "320 tokens choose everybody"
    read = 36 - len(kept)
    assert added(before, after, "bytes_read") == (read * expert_nbytes(qwen),)
    assert added(before, after, "num_evicted", "num_ahead_wasted", "num_runs") == (0, 0, 0)


def test_a_prefill_reads_the_next_layer_while_one_computes(qwen: Subject) -> None:
    with qwen.stream(expert_budget="30%", io="buffered", expert_predict="off") as model:
        emptied(model)
        before = counts(model)
        with torch.inference_mode():
            model(ids(8, 40))
        after = counts(model)
        num_ahead, num_used = added(before, after, "num_ahead", "num_ahead_used")
    assert not after.is_predicting
    # Of the second layer and the third, never more than pass through.
    assert 0 < num_used == num_ahead <= 2 * after.num_slots


def test_one_position_is_no_prefill_however_many_sequences(qwen: Subject) -> None:
    with qwen.stream(expert_budget="50%") as model, torch.inference_mode():
        model(ids(64, 1))
        assert (counts(model).num_runs, counts(model).num_prefill_runs) == (3, 0)
        model(ids(1, 2))
        assert (counts(model).num_runs, counts(model).num_prefill_runs) == (3, 3)
        model(inputs_embeds=torch.randn(1, 5, 64, dtype=torch.bfloat16))
        assert (counts(model).num_runs, counts(model).num_prefill_runs) == (3, 6)


# -- ahead of the router -------------------------------------------------------------------------


def faint_experts() -> Any:
    """Layers that add little to what they are given: the next router sees nearly the same."""
    model = ARCHITECTURES["qwen3"].build(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj")):
            parameter.data *= 0.02
    return model


def test_experts_of_the_next_layer_are_predicted(folder: Path) -> None:
    faint_experts().save_pretrained(folder / "faint")
    subject = Subject(ARCHITECTURES["qwen3"], folder / "faint", load_resident(folder / "faint"))
    want = logits(subject.resident, PROMPT, TEXT)
    in_memory = {"io": "buffered", "trailing_drop": False}
    with subject.stream(expert_budget="50%", expert_predict="on", **in_memory) as model:
        assert counts(model).is_predicting
        # How much may be guessed depends on what was measured.
        wait_until(
            lambda: (
                torch.equal(logits(model, PROMPT, TEXT), want) and counts(model).num_ahead_used > 20
            )
        )
        stats = counts(model)
        assert stats.num_ahead >= stats.num_ahead_used + stats.num_ahead_wasted
        # The router of the next layer is asked: most of what it says comes true.
        assert stats.num_ahead_used > 2 * stats.num_ahead_wasted
    with subject.stream(expert_budget="50%", expert_predict="off") as model:
        # No prefill, which reads ahead too.
        got = logits(model, TEXT[:, :1], TEXT[:, 1:])
        assert torch.equal(got, logits(subject.resident, TEXT[:, :1], TEXT[:, 1:]))
        assert not counts(model).is_predicting
        assert counts(model).num_ahead == 0


# -- pages ---------------------------------------------------------------------------------------


def wide_config() -> Any:
    return transformers.Qwen3MoeConfig(
        **{**COMMON, "hidden_size": 256},
        head_dim=32,
        num_hidden_layers=3,
        intermediate_size=64,
        moe_intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
    )


WIDE = Architecture("Qwen3MoeForCausalLM", wide_config, 2, 8, 3)
WIDE_BYTES = 3 * 256 * 256 * 2


@pytest.fixture(scope="module")
def _wide(folder: Path) -> Subject:
    """Experts of hundreds of pages, all of a layer in one tensor, aligned for mapping."""
    model = WIDE.build(torch.bfloat16)
    path = folder / "wide"
    path.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for padding in range(64):
        save_file(tensors, path / "model.safetensors", {"format": "pt", "padding": " " * padding})
        with (path / "model.safetensors").open("rb") as file:
            if (8 + int.from_bytes(file.read(8), "little")) % 64 == 0:
                break
    with (path / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())  # dirty pages could not leave the cache
    # What it is loaded from stays mapped, and mapped pages cannot leave the cache.
    return Subject(WIDE, path, load_resident(Path(shutil.copytree(path, folder / "wide copy"))))


@pytest.fixture
def wide(_wide: Subject) -> Iterator[Subject]:
    yield _wide
    _wide.close()


def unmap(subject: Subject) -> None:
    """A closed model keeps the views that it had until it streams again."""
    nexus.close(subject.stream(io="direct"))


@pytest.mark.parametrize("trailing_drop", [True, False])
def test_mapped_experts_are_used_where_they_lie(
    wide: Subject, trailing_drop: bool, drop_from_cache: Callable[[Path], None]
) -> None:
    path, text = wide.folder / "model.safetensors", TEXT.repeat(8, 1)
    want = logits(wide.resident, PROMPTS, text)
    unmap(wide)
    drop_from_cache(path)
    with wide.stream(expert_budget="20%", io="mmap", trailing_drop=trailing_drop) as model:
        assert torch.equal(logits(model, PROMPTS, text), want)
        stats = counts(model)
        assert stats.num_views == stats.num_experts == 24
        assert stats.bytes_staged == 0
        if not trailing_drop:
            assert stats.num_dropped == 0
            assert cached_bytes(str(path)) >= 24 * WIDE_BYTES
            return
        # Two tensors each; those who came back before their turn were not dropped.
        assert stats.num_evicted < stats.num_dropped <= 2 * (stats.num_evicted + stats.num_passed)
        emptied(model)
        # Dense weights stay, and what shares a folio with a neighbour.
        wait_until(lambda: cached_bytes(str(path)) < 24 * WIDE_BYTES // 2)
        assert torch.equal(logits(model, PROMPTS, text), want)


def test_direct_reads_of_experts_leave_no_page_in_the_cache(
    wide: Subject, drop_from_cache: Callable[[Path], None], tmp_path: Path
) -> None:
    if not takes_direct_reads(tmp_path):
        pytest.skip("direct reads are refused in the folder for temporary files")
    path = wide.folder / "model.safetensors"
    unmap(wide)
    drop_from_cache(path)
    with wide.stream(expert_budget="20%", io="direct") as model:
        logits(model, PROMPTS, TEXT.repeat(8, 1))
        stats = counts(model)
    assert stats.io_mode == "direct"
    assert stats.bytes_direct > 10 * WIDE_BYTES
    assert cached_bytes(str(path)) == 0


# -- what stays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_the_same_logits(qwen: Subject, policy: str) -> None:
    want = logits(qwen.resident, PROMPT, TEXT)
    with qwen.stream(expert_budget="40%", expert_policy=policy) as model:
        for _ in range(2):
            assert torch.equal(logits(model, PROMPT, TEXT), want)
        stats = counts(model)
    assert stats.policy == policy
    assert stats.num_hits > 0
    assert stats.num_evicted > 0


def favour(model: Any, num_tokens: int = 12) -> None:
    """Decode with experts 8 to 11 of every layer: not those a cold start begins with."""
    for _ in range(num_tokens):
        for layer in range(3):
            ask(model, layer, range(8, 12))


@pytest.mark.parametrize("policy", POLICIES)
def test_hotness_outlives_the_process(qwen: Subject, policy: str, tmp_path: Path) -> None:
    options = {"expert_budget": "50%", "expert_policy": policy, "expert_predict": "off"}
    with qwen.stream(**options) as model:
        assert not present(model) & set(range(8, 12)), "those of a cold start are others"
        favour(model)
        hot = present(model)
        nexus.save_hotness(model, tmp_path / "hotness.json")
        room = counts(model).num_staying
    wanted = {12 * layer + expert for layer in range(3) for expert in range(8, 12)}
    assert wanted <= hot
    first: dict[str, int] = {}
    for name, more in (("cold", {}), ("hot", {"expert_hotness": tmp_path / "hotness.json"})):
        with nexus.from_pretrained(qwen.folder, budget=ROOMY, **options, **more) as model:
            assert counts(model).num_preloaded == len(present(model)) == room
            assert (wanted <= present(model)) == (name == "hot")
            runner_of(model).cache.wait()
            favour(model, 1)
            first[name] = counts(model).num_hits
    assert first == {"cold": 0, "hot": 12}


def test_hotness_that_was_saved_before_anything_ran_is_a_cold_start(
    qwen: Subject, tmp_path: Path
) -> None:
    with qwen.stream(expert_budget="50%") as model:
        nexus.save_hotness(model, str(tmp_path / "hotness.json"))
    with qwen.stream(expert_budget="50%", expert_hotness=str(tmp_path / "hotness.json")) as model:
        assert counts(model).num_preloaded == counts(model).num_staying
        assert torch.equal(logits(model, PROMPT, TEXT), logits(qwen.resident, PROMPT, TEXT))


# -- budgets -------------------------------------------------------------------------------------


def test_experts_may_be_computed_on_the_cpu(qwen: Subject) -> None:
    want = logits(qwen.resident, PROMPT, TEXT)
    with qwen.stream(expert_budget="40%", expert_device="cpu") as model:
        assert torch.equal(logits(model, PROMPT, TEXT), want)
        assert counts(model).device == "cpu"
        assert counts(model).num_syncs == 0


def test_the_plan_shows_the_experts(qwen: Subject) -> None:
    with qwen.stream(expert_budget="50%") as model:
        plan = nexus.plan_of(model)
        stats = counts(model)
    [line] = [line for line in plan.describe().splitlines() if line.startswith("experts")]
    assert f"{stats.num_staying} of 36 stay" in line
    assert f"{stats.num_slots - stats.num_staying} slots to pass through" in line
    assert plan.device_bytes == plan.experts.nbytes + plan.outside_bytes + plan.resident_bytes


def test_one_budget_is_divided_and_never_exceeded(qwen: Subject) -> None:
    """From the smallest that works to more than everything, a few pages at a time."""
    low, high = qwen.dense_bytes + qwen.floor, qwen.checkpoint.nbytes + 36 * 8192
    want = logits(qwen.resident, PROMPT, TEXT[:, :2])
    seen = []
    for budget in [*range(low, high, 37_777), high]:
        with qwen.stream(budget=budget, io="direct") as model:
            plan = nexus.plan_of(model)
            assert plan.device_bytes <= plan.budget_bytes == budget
            assert plan.minimum_bytes == low
            assert torch.equal(logits(model, PROMPT, TEXT[:, :2]), want)
            seen.append((len(plan.streamed), sum(plan.experts.num_slots)))
    streamed, slots = zip(*seen, strict=True)
    assert seen[0] == (3, 2)
    assert seen[-1] == (0, 36)
    assert list(streamed) == sorted(streamed, reverse=True)
    assert list(slots) == sorted(slots)
    # Dense weights first: experts get more than they need once nothing dense streams.
    assert all(num_slots == 2 for num_streamed, num_slots in seen if num_streamed)


def test_dense_weights_and_experts_stream_side_by_side(qwen: Subject) -> None:
    budget = qwen.dense_bytes + qwen.floor + qwen.slot_bytes
    want = logits(qwen.resident, PROMPT, TEXT)
    with qwen.stream(budget=budget, expert_budget=qwen.floor + qwen.slot_bytes) as model:
        before = nexus.stats(model)
        assert torch.equal(logits(model, PROMPT, TEXT), want)
        after, plan = nexus.stats(model), nexus.plan_of(model)
    passes = 1 + TEXT.shape[1]
    assert len(plan.streamed) == 3
    assert after.num_hits + after.num_waits - before.num_hits - before.num_waits == 3 * passes
    assert after.bytes_read - before.bytes_read >= (passes - 1) * plan.streamed_bytes
    assert added(before.experts, after.experts, "num_runs", "num_prefill_runs") == (
        3 * TEXT.shape[1],
        3,
    )
    assert after.experts.bytes_read > before.experts.bytes_read


def test_several_models_share_one_budget(qwen: Subject, folder: Path) -> None:
    """What a model with experts can do without counts its experts."""
    other = make_subject("mixtral", "bf16", folder)
    subjects = (qwen, other)
    models = [(s.model, s.checkpoint, {"strict": False}) for s in subjects]
    least = sum(s.dense_bytes + s.floor for s in subjects)
    with pytest.raises(BudgetError) as refused:
        nexus.stream_all(models, budget=least - 1, io="direct")
    assert named_bytes(refused.value) == least
    try:
        for budget in (least, least + 200_000):
            nexus.stream_all(models, budget=budget, io="direct")
            assert sum(nexus.plan_of(s.model).device_bytes for s in subjects) <= budget
            for subject in subjects:
                want = logits(subject.resident, PROMPT, TEXT)
                assert torch.equal(logits(subject.model, PROMPT, TEXT), want)
                nexus.close(subject.model)
    finally:
        other.close()


def test_a_plan_from_headers_is_the_plan_that_streams(qwen: Subject) -> None:
    for options in ({"expert_budget": "30%"}, {"budget": qwen.dense_bytes + qwen.floor}):
        wanted = {"budget": ROOMY, "io": "direct"} | options
        planned = plan_pretrained(qwen.folder, **wanted)
        with nexus.from_pretrained(qwen.folder, **wanted) as model:
            streamed = nexus.plan_of(model)
        for name in ("experts", "device_bytes", "minimum_bytes", "streamed", "resident"):
            assert getattr(planned, name) == getattr(streamed, name), name
