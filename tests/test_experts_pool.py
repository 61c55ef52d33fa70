"""Products over slots, as on a GPU, here on a CPU: the stock functions see a pool as a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import nexus_ext as nexus
from nexus_ext.attachment import attachment_of
from nexus_ext.experts.pool import Pool

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "intermediate_size": 64,
}


def qwen() -> Any:
    config = transformers.Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config)


@pytest.fixture(scope="module", params=[qwen, gpt_oss])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param.__name__)
    model = request.param().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))


def stream_over_slots(path: Path, **options: Any) -> Any:
    """Streamed as on a GPU: with products over slots."""
    model = nexus.from_pretrained(path, budget="8MiB", io="direct", **options)
    experts: Any = attachment_of(model).experts
    for one in experts._modules:
        store = experts.runner.store
        index = store.class_of[experts.runner.layers[one.number].start]
        assert Pool.can_hold(one._weights[0])
        one.pool = Pool(one.module, store, index, one._weights[0])
    return model


@torch.no_grad()
@pytest.mark.parametrize("budget", ["100%", "50%"])
def test_products_over_slots_are_the_model_s_own(
    folder: Path, ids: torch.Tensor, budget: str
) -> None:
    kind = nexus.from_pretrained(folder, budget="8MiB")
    expected = type(kind).__mro__[2].from_pretrained(folder)(ids).logits
    nexus.close(kind)
    model = stream_over_slots(folder, expert_budget=budget)
    for _ in range(2):
        torch.testing.assert_close(model(ids).logits, expected)
    long = ids.repeat(1, 12)  # more rows than are gathered one by one
    plain = nexus.from_pretrained(folder, budget="8MiB", expert_budget=budget)
    torch.testing.assert_close(model(long).logits, plain(long).logits)
    nexus.close(plain)
    nexus.close(model)


@torch.no_grad()
def test_where_all_stay_nobody_asks_the_host(
    folder: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stream_over_slots(folder, expert_budget="100%")
    experts: Any = attachment_of(model).experts
    expected = model(ids).logits

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the host was asked")

    monkeypatch.setattr(experts.runner, "run", refuse)
    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    assert torch.equal(model(ids).logits, expected)
    nexus.close(model)


@torch.no_grad()
def test_where_some_leave_the_host_is_asked(folder: Path, ids: torch.Tensor) -> None:
    model = stream_over_slots(folder, expert_budget="50%")
    model(ids)
    experts: Any = attachment_of(model).experts
    assert all(experts.runner.slot_table(layer) is None for layer in range(2))
    nexus.close(model)


@torch.no_grad()
def test_packed_experts_are_decoded_in_one_launch(
    folder: Path, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexus.convert(folder, tmp_path / "packed", "nf4")
    plain = nexus.from_pretrained(tmp_path / "packed", budget="8MiB")
    expected = plain(ids[:, :4]).logits
    nexus.close(plain)
    model = stream_over_slots(tmp_path / "packed", expert_budget="100%")
    calls = []
    from nexus_ext.experts import pool

    real = pool.ops.native.dequantize_nf4_grouped

    class Counting:
        @staticmethod
        def dequantize_nf4_grouped(*args: Any) -> torch.Tensor:
            calls.append(args)
            return real(*args)

    monkeypatch.setattr(pool.ops, "native", Counting)
    experts: Any = attachment_of(model).experts
    one = experts._modules[0]
    hidden = torch.randn(3, 64)
    chosen = torch.tensor([3, 1, 3])
    over_slots = one.pool.product(hidden, experts.runner.slot_table(0)[chosen])
    assert len(calls) == 2  # gate and up, down
    monkeypatch.undo()
    for row, expert in enumerate(chosen.tolist()):
        alone = one._one_by_one(hidden[row : row + 1], [1], [expert])
        torch.testing.assert_close(over_slots[row : row + 1], alone, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(model(ids[:, :4]).logits, expected, rtol=1e-3, atol=1e-3)
    nexus.close(model)
