"""Mixtures of experts that stream while they are downloaded: nobody computes before he came, who is
waited for comes next, and who is not needed may come last.

One block of one expert is held back by the server; everything else trickles in, 4 KiB at a time.
Plain in bf16 and packed in NF4. Freed slots are poisoned.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import nexus_ext as nexus
from nexus_ext.errors import BudgetError, ContentMismatch, SourceMissing
from nexus_ext.pretrained import plan_pretrained
from tests.arrivals import (
    BLOCK_BYTES,
    GENEROUS_SECONDS,
    NAME,
    Dam,
    meets,
    serve,
    spans_of,
    wait_for_arrivals,
)
from tests.expert_subjects import (
    COMMON,
    ROOMY,
    Architecture,
    generate,
    ids,
    load_resident,
    named_bytes,
)
from tests.hub_server import HubServer

pytestmark = pytest.mark.usefixtures("one_quiet_thread", "poisoned_arenas")

NUM_TOKENS = 4
PROMPT = ids(1, 3)
NUM_EXPERTS = 12
# Large enough that a tensor has blocks of its own; few of the experts are used by so few tokens.
QWEN = Architecture(
    "Qwen3MoeForCausalLM",
    lambda: transformers.Qwen3MoeConfig(
        **COMMON,
        head_dim=128,
        num_hidden_layers=3,
        intermediate_size=64,
        moe_intermediate_size=192,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
    ),
    2,
    NUM_EXPERTS,
    3,
)
Span = tuple[str, int, int]


@dataclass
class Subject:
    """A model on disk.

    Attributes:
        folder: In shards.
        tokens: What it generates.
        used, unused: (layer, expert) that this needs, in the order of asking, and that it does not.
    """

    folder: Path
    tokens: torch.Tensor
    used: list[tuple[int, int]]
    unused: list[tuple[int, int]]

    def block_of(self, layer: int, expert: int) -> Span:
        """A block in the midst of a tensor that is the expert's alone."""
        spans = spans_of(self.folder, f"model.layers.{layer}.mlp.experts.{expert}.")
        file, first, _ = max(spans, key=lambda span: span[2] - span[1])
        return file, first, first + BLOCK_BYTES

    def stream(self, name: str | Path = NAME, **options: Any) -> Any:
        return nexus.from_pretrained(name, **{"budget": ROOMY} | options)

    def floor(self) -> dict[str, int]:
        """The smallest budgets: all streams, and nobody stays."""
        with pytest.raises(BudgetError) as refused:
            plan_pretrained(self.folder, budget=ROOMY, expert_budget=1)
        few = named_bytes(refused.value)
        plan = plan_pretrained(self.folder, budget=ROOMY, expert_budget=few)
        return {"budget": plan.minimum_bytes, "expert_budget": few}

    def budget(self, of: str) -> dict[str, Any]:
        return self.floor() if of == "floor" else {}


class Routes:
    """Who was asked for."""

    def __init__(self, runner: Any) -> None:
        self.used: list[tuple[int, int]] = []
        self._layers = runner.layers
        runner.routes = self

    def append(self, layer: int, keys: Sequence[int], num_tokens: int, *, is_prefill: bool) -> None:
        self.used += [(layer, key - self._layers[layer].start) for key in keys]


def runner_of(model: Any) -> Any:
    return model.__dict__["_nexus"].experts.runner


@pytest.fixture(scope="module", params=["bf16", "nf4"])
def subject(request: pytest.FixtureRequest, folder: Path) -> Subject:
    plain = folder / f"plain-{request.param}"
    QWEN.build(torch.bfloat16).save_pretrained(plain, max_shard_size="600KB")
    path = plain
    if request.param == "nf4":
        path = folder / "packed"
        nexus.convert(plain, path, "nf4")
    with nexus.from_pretrained(path, budget=ROOMY) as model:
        routes = Routes(runner_of(model))
        tokens = generate(model, PROMPT, NUM_TOKENS)
    if request.param == "bf16":
        assert torch.equal(tokens, generate(load_resident(plain), PROMPT, NUM_TOKENS))
    used = list(dict.fromkeys(routes.used))
    everybody = [(layer, one) for layer in range(QWEN.num_layers) for one in range(NUM_EXPERTS)]
    return Subject(path, tokens, used, [one for one in everybody if one not in used])


@pytest.fixture
def hub(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    files = {file.name: file.read_bytes() for file in subject.folder.iterdir()}
    yield from serve(files, tmp_path, monkeypatch)


def tokens_of(model: Any) -> torch.Tensor:
    return generate(model, PROMPT, NUM_TOKENS)


@pytest.mark.parametrize(("budget", "io"), [("floor", "direct"), ("all", "buffered")])
def test_tokens_come_before_the_last_expert(
    hub: HubServer, subject: Subject, budget: str, io: str
) -> None:
    dam = Dam(hub, [subject.block_of(*subject.unused[-1])])
    with subject.stream(**subject.budget(budget), io=io) as model:
        assert torch.equal(tokens_of(model), subject.tokens)
        stats = nexus.stats(model)
        assert stats.is_arriving
        assert 0 < stats.network_bytes < sum(map(len, hub.files.values()))
        dam.is_open.set()
        wait_for_arrivals()
        assert not nexus.stats(model).is_arriving
        assert torch.equal(tokens_of(model), subject.tokens)
    num_asked = hub.asked["file"]
    with subject.stream(**subject.budget(budget), io=io) as model:
        assert torch.equal(tokens_of(model), subject.tokens)
    assert hub.asked["file"] == num_asked


@pytest.mark.parametrize("budget", ["floor", "all"])
def test_an_expert_that_is_not_here_is_waited_for(
    hub: HubServer, subject: Subject, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dam = Dam(hub, [subject.block_of(*subject.used[0])])
    with subject.stream(**subject.budget(budget)) as model, ThreadPoolExecutor(1) as pool:
        is_asked_for = watch_asking(model, subject.used[0], monkeypatch)
        future = pool.submit(tokens_of, model)
        # Who did not wait is through: that is seen at once.
        future.add_done_callback(lambda _: (is_asked_for.set(), dam.is_reached.set()))
        try:
            assert is_asked_for.wait(GENEROUS_SECONDS)
            assert dam.is_reached.wait(GENEROUS_SECONDS)
            assert not future.done()
            assert nexus.stats(model).is_arriving
        finally:
            dam.is_open.set()
        assert torch.equal(future.result(GENEROUS_SECONDS), subject.tokens)


def watch_asking(
    model: Any, expert: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> threading.Event:
    """Set when a forward asks for this expert, whose load has been placed then."""
    runner, seen = runner_of(model), threading.Event()
    key, collect = runner.layers[expert[0]].start + expert[1], runner.store.collect

    def collect_and_tell(keys: Sequence[int], *, at_least: int) -> list[int]:
        if key in keys:
            seen.set()
        found: list[int] = collect(keys, at_least=at_least)
        return found

    monkeypatch.setattr(runner.store, "collect", collect_and_tell)
    return seen


@pytest.mark.parametrize("subject", ["bf16"], indirect=True)
def test_who_is_waited_for_comes_before_the_plan(hub: HubServer, subject: Subject) -> None:
    """A block of the last dense group is held, and more of that group than is asked for at a time:
    nothing that is only expected comes meanwhile.
    """
    attention = spans_of(subject.folder, "model.layers.2.self_attn.")
    file, first, _ = max(attention, key=lambda span: span[2] - span[1])
    dam = Dam(hub, [(file, first, first + BLOCK_BYTES)])
    with subject.stream(**subject.floor()) as model, ThreadPoolExecutor(1) as pool:
        is_through = threading.Event()
        handle = model.model.layers[1].register_forward_hook(lambda *args: is_through.set())
        future = pool.submit(tokens_of, model)
        try:
            assert is_through.wait(GENEROUS_SECONDS)
            assert not future.done()
        finally:
            dam.is_open.set()
        assert torch.equal(future.result(GENEROUS_SECONDS), subject.tokens)
        handle.remove()


def test_an_expert_that_never_comes_is_an_error_of_the_forward(
    hub: HubServer, subject: Subject
) -> None:
    block = subject.block_of(*subject.used[-1])
    dam = Dam(hub, [block])
    model = subject.stream(**subject.floor())
    hub.refuses = lambda *one: meets(one, [block])
    dam.is_open.set()
    for _ in range(2):
        with pytest.raises(SourceMissing):
            tokens_of(model)
    nexus.close(model)
    wait_for_arrivals()
    hub.refuses = lambda *one: False
    with subject.stream(**subject.floor()) as model:
        assert torch.equal(tokens_of(model), subject.tokens)


def test_a_wrong_digest_refuses_the_experts_too(hub: HubServer, subject: Subject) -> None:
    block = file, first, _ = subject.block_of(*subject.unused[-1])
    lie = bytearray(hub.files[file])
    lie[first] ^= 1
    hub.lies[file] = bytes(lie)
    dam = Dam(hub, [block])
    with subject.stream(**subject.floor()) as model:
        dam.is_open.set()
        wait_for_arrivals()
        with pytest.raises(ContentMismatch, match="SHA-256"):
            tokens_of(model)
        with pytest.raises(ContentMismatch, match="SHA-256"):
            runner_of(model).store.stats()
