"""Models that stream while they are downloaded: nothing is read before it came, what is needed
first comes first, and what turns out wrong is not used further.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import nexus_ext as nexus
from nexus_ext import hub as hub_module
from nexus_ext import pretrained
from nexus_ext.arriving import Inbound
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.demo import make_llama
from nexus_ext.engine import Engine, ReadMode
from nexus_ext.errors import (
    BudgetError,
    CheckpointChanged,
    ConfigError,
    ContentMismatch,
    EngineClosed,
    EngineError,
    NexusError,
    SourceMissing,
    SourceUnavailable,
)
from nexus_ext.pretrained import plan_pretrained
from tests.arrivals import (
    GENEROUS_SECONDS,
    NAME,
    PROMPT,
    SMALL,
    Dam,
    logits_of,
    meets,
    serve,
    spans_of,
    wait_for_arrivals,
)
from tests.hub_server import COMMIT, HubServer

TINY = {"num_blocks": 6, "hidden": 64, "intermediate": 96, "vocabulary": 128}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In shards, so that a later one can be seen to come later."""
    folder = tmp_path_factory.mktemp("models")
    make_llama(folder / "whole", **TINY)
    model = LlamaForCausalLM.from_pretrained(folder / "whole", dtype="auto")
    model.save_pretrained(folder / "sharded", max_shard_size="150KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 3
    return folder / "sharded"


@pytest.fixture(scope="module")
def want(llama: Path) -> torch.Tensor:
    with nexus.from_pretrained(llama) as model, torch.inference_mode():
        logits: torch.Tensor = model(PROMPT).logits
    return logits


@pytest.fixture(scope="module")
def budget(llama: Path) -> int:
    return plan_pretrained(llama).minimum_bytes


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    files = {file.name: file.read_bytes() for file in llama.iterdir()}
    yield from serve(files, tmp_path, monkeypatch)


def later_data(llama: Path, num_first: int) -> list[tuple[str, int, int]]:
    """The weights of all blocks but the first ones."""
    numbers = range(num_first, TINY["num_blocks"])
    return [span for number in numbers for span in spans_of(llama, f"model.layers.{number}.")]


def test_the_first_group_computes_before_the_last_is_asked_for(
    hub: HubServer, llama: Path, want: torch.Tensor, budget: int
) -> None:
    last = spans_of(llama, f"model.layers.{TINY['num_blocks'] - 1}.")
    dam = Dam(hub, later_data(llama, 3))
    with nexus.from_pretrained(NAME, budget=budget) as model:
        assert nexus.stats(model).streamed_groups == TINY["num_blocks"]
        asked_then: list[bool] = []
        is_through = threading.Event()

        def first_is_through(*args: Any) -> None:
            asked_then.append(any(meets(one, last) for one in list(hub.ranges)))
            is_through.set()

        handle = model.model.layers[0].register_forward_hook(first_is_through)  # type: ignore
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(logits_of, model)
            try:
                assert is_through.wait(GENEROUS_SECONDS)
                assert nexus.stats(model).is_arriving
                assert not future.done(), "the rest is behind the dam"
            finally:
                dam.is_open.set()
            assert torch.equal(future.result(GENEROUS_SECONDS), want)
        handle.remove()
        assert asked_then == [False]
        wait_for_arrivals()
        stats = nexus.stats(model)
        assert not stats.is_arriving
        assert stats.network_bytes == sum(
            len(data) for name, data in hub.files.items() if name.endswith((".json", "tensors"))
        )
        assert torch.equal(logits_of(model), want)


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_it_lies_in_the_hubs_layout_in_the_end(
    hub: HubServer, want: torch.Tensor, budget: int, io: str, tmp_path: Path
) -> None:
    with nexus.from_pretrained(NAME, budget=budget, io=io) as model:
        assert torch.equal(logits_of(model), want)
        wait_for_arrivals()
        assert torch.equal(logits_of(model), want)
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    for file in snapshot.iterdir():
        assert file.is_symlink()
        assert file.read_bytes() == hub.files[file.name]
    assert {file.name for file in snapshot.iterdir()} == hub.files.keys()
    blobs = tmp_path / "hub" / "models--org--tiny" / "blobs"
    assert not [file.name for file in blobs.iterdir() if file.name.startswith(".")]
    assert (blobs.parent / "refs" / "main").read_text() == COMMIT
    num_asked = hub.asked["file"]
    with nexus.from_pretrained(NAME, budget=budget, io=io) as model:
        assert torch.equal(logits_of(model), want)
        assert nexus.stats(model).network_bytes == 0
    assert (hub.asked["file"], hub.asked["info"]) == (num_asked, 1)


def test_bytes_are_asked_for_in_the_order_of_the_plan(
    hub: HubServer, llama: Path, want: torch.Tensor, budget: int
) -> None:
    with nexus.from_pretrained(NAME, budget=budget) as model:
        assert torch.equal(logits_of(model), want)
        wait_for_arrivals()
    first_asked = []
    for number in range(TINY["num_blocks"]):
        spans = spans_of(llama, f"model.layers.{number}.")
        first_asked.append(min(n for n, one in enumerate(hub.ranges) if meets(one, spans)))
    assert first_asked == sorted(first_asked)


@pytest.mark.parametrize("shard", [0, -1])
def test_a_wrong_digest_in_the_end_refuses_the_model(
    hub: HubServer, want: torch.Tensor, budget: int, shard: int, tmp_path: Path
) -> None:
    name = sorted(name for name in hub.files if name.endswith(".safetensors"))[shard]
    lie = bytearray(hub.files[name])
    lie[-1] ^= 1
    hub.lies[name] = bytes(lie)
    with pytest.raises(ContentMismatch, match="SHA-256"):
        use(NAME, budget)
    wait_for_arrivals()
    kept = (tmp_path / "hub" / "models--org--tiny" / "blobs").iterdir()
    assert hub.lies[name] not in [file.read_bytes() for file in kept]
    hub.lies.clear()
    with nexus.from_pretrained(NAME, budget=budget) as model:
        assert torch.equal(logits_of(model), want)


def use(name: str, budget: int) -> None:
    """Until the model is whole, and once more."""
    with nexus.from_pretrained(name, budget=budget) as model:
        wait_for_arrivals()
        logits_of(model)


def test_a_refused_model_stays_refused(hub: HubServer, llama: Path, budget: int) -> None:
    spans = spans_of(llama, f"model.layers.{TINY['num_blocks'] - 1}.")
    name, wrong, _ = spans[0]
    lie = bytearray(hub.files[name])
    lie[wrong] ^= 1
    hub.lies[name] = bytes(lie)
    dam = Dam(hub, spans)
    model = nexus.from_pretrained(NAME, budget=budget)
    dam.is_open.set()
    wait_for_arrivals()
    for _ in range(2):
        with pytest.raises(ContentMismatch, match="SHA-256"):
            logits_of(model)
    nexus.close(model)
    with pytest.raises(EngineClosed):
        logits_of(model)


def test_a_server_that_gives_up_is_an_error_of_the_forward_that_needs_it(
    hub: HubServer, llama: Path, want: torch.Tensor, budget: int
) -> None:
    dam = Dam(hub, later_data(llama, 3))
    model = nexus.from_pretrained(NAME, budget=budget)
    assert dam.is_reached.wait(GENEROUS_SECONDS)
    saved, hub.files = hub.files, {n: d for n, d in hub.files.items() if n.endswith(".json")}
    # What waits behind the dam is answered as ever; whatever is asked for afterwards is gone.
    hub.before = lambda file, first, end: None
    dam.is_open.set()
    for _ in range(2):
        with pytest.raises(SourceMissing):
            logits_of(model)
    assert not nexus.stats(model).is_arriving
    nexus.close(model)
    wait_for_arrivals()
    hub.files = saved
    with nexus.from_pretrained(NAME, budget=budget) as model:
        assert torch.equal(logits_of(model), want)


def test_closing_in_the_middle_keeps_what_came(
    hub: HubServer, llama: Path, want: torch.Tensor, budget: int
) -> None:
    dam = Dam(hub, later_data(llama, 4))
    model = nexus.from_pretrained(NAME, budget=budget)
    assert dam.is_reached.wait(GENEROUS_SECONDS)
    nexus.close(model)
    dam.is_open.set()
    wait_for_arrivals()
    hub.before = lambda file, first, end: None
    sent = sum(hub.sent[file] for file in hub.files)
    with nexus.from_pretrained(NAME, budget=budget) as model:
        assert torch.equal(logits_of(model), want)
        wait_for_arrivals()
    total = sum(len(data) for data in hub.files.values())
    again = sum(hub.sent[file] for file in hub.files) - sent
    assert 0 < again < total
    # What was behind the dam may have been sent and not taken: one block for each connection.
    assert total <= sent + again <= total + SMALL["chunk_bytes"]


CHILD = """
import functools, sys
from nexus_ext import from_pretrained, hub, pretrained
name, budget, connections, chunk = sys.argv[1], *map(int, sys.argv[2:])
pretrained.arrive = functools.partial(hub.arrive, max_connections=connections, chunk_bytes=chunk)
model = from_pretrained(name, budget=budget)
print("streaming", flush=True)
sys.stdin.read()
"""


def test_a_kill_costs_one_chunk(
    hub: HubServer, llama: Path, want: torch.Tensor, budget: int, tmp_path: Path
) -> None:
    dam = Dam(hub, later_data(llama, 4))
    places = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub")}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, NAME, str(budget), *map(str, SMALL.values())],
        env=os.environ | places,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"streaming\n"
        assert dam.is_reached.wait(GENEROUS_SECONDS)
        child.kill()
    hub.before = lambda file, first, end: None
    dam.is_open.set()
    with nexus.from_pretrained(NAME, budget=budget) as model:
        assert torch.equal(logits_of(model), want)
        wait_for_arrivals()
        received = nexus.stats(model).network_bytes
    total = sum(len(data) for data in hub.files.values())
    before = sum(end - first for file, first, end in hub.ranges) - received
    assert 0 < received < total
    assert total <= before + received <= total + SMALL["chunk_bytes"]


def test_a_write_by_a_stranger_is_noticed_when_it_is_whole(
    hub: HubServer, want: torch.Tensor, budget: int, tmp_path: Path
) -> None:
    with nexus.from_pretrained(NAME, budget=budget) as model:
        assert torch.equal(logits_of(model), want)
        wait_for_arrivals()
        for blob in (tmp_path / "hub" / "models--org--tiny" / "blobs").iterdir():
            os.utime(blob, ns=(1, 1))
        with pytest.raises(CheckpointChanged, match="written to"):
            logits_of(model)


def test_a_url_streams_as_it_comes(
    hub: HubServer, want: torch.Tensor, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{hub.url}/{NAME}/resolve/{COMMIT}"
    with nexus.from_pretrained(url, budget=budget) as model:
        assert torch.equal(logits_of(model), want)
        wait_for_arrivals()
    num_asked = hub.asked["file"]
    with nexus.from_pretrained(url, budget=budget) as model:
        assert torch.equal(logits_of(model), want)
    assert hub.asked["file"] == num_asked


def test_modes_that_need_whole_files_wait_for_them(
    hub: HubServer, want: torch.Tensor, budget: int
) -> None:
    with nexus.from_pretrained(NAME, budget=budget, io="mmap") as model:
        assert not nexus.stats(model).is_arriving
        assert torch.equal(logits_of(model), want)


def test_rows_wait_for_their_bytes(hub: HubServer, llama: Path) -> None:
    prompt = torch.tensor([[1, 60, 100, 2]])  # rows in the midst of the table
    with nexus.from_pretrained(llama) as model:
        want = logits_of(model, prompt)
    rows = spans_of(llama, "model.embed_tokens.")
    dam = Dam(hub, rows)
    by_rows = ["model.embed_tokens"]
    budget = plan_pretrained(llama, by_rows=by_rows).minimum_bytes
    with (
        nexus.from_pretrained(NAME, budget=budget, by_rows=by_rows) as model,
        ThreadPoolExecutor(1) as pool,
    ):
        future = pool.submit(logits_of, model, prompt)
        try:
            assert dam.is_reached.wait(GENEROUS_SECONDS)
            assert not future.done()
        finally:
            dam.is_open.set()
        assert torch.equal(future.result(GENEROUS_SECONDS), want)


class Told:
    """A gate that keeps what it was told."""

    def __init__(self) -> None:
        self.announced: set[tuple[int, int, int]] = set()
        self.settled: dict[int, int] = {}
        self.errors: list[NexusError] = []
        self.has_news = threading.Event()

    def announce(self, spans: Sequence[tuple[int, int, int]]) -> None:
        self.announced |= set(spans)
        self.has_news.set()

    def settle(self, file: int, mtime_ns: int) -> None:
        self.settled[file] = mtime_ns

    def end_arrival(self, error: NexusError) -> None:
        self.errors.append(error)

    def refuse(self, error: NexusError) -> None:
        self.errors.append(error)


def begin() -> Inbound:
    source = hub_module.arrive(NAME, **SMALL)  # type: ignore[arg-type]
    assert isinstance(source, Inbound)
    source.open()
    return source


def test_a_gate_that_joins_late_is_told_what_it_missed(hub: HubServer, llama: Path) -> None:
    source = begin()
    early, late = Told(), Told()
    source.feed(early, [])
    source.wait()
    assert not source.is_arriving
    source.join(late)
    sizes = [file.stamp.size for file in Checkpoint.open(llama).files]
    assert late.announced == {(number, 0, size) for number, size in enumerate(sizes)}
    assert late.settled == early.settled
    assert len(late.settled) == len(sizes)
    # Its files can still be opened, whatever stands at their paths.
    assert [os.fstat(descriptor).st_size for descriptor in source.descriptors] == sizes
    source.close()
    assert not source.descriptors


def test_a_gate_that_joins_after_a_wrong_digest_is_refused(hub: HubServer) -> None:
    name = max(name for name in hub.files if name.endswith(".safetensors"))
    lie = bytearray(hub.files[name])
    lie[-1] ^= 1
    hub.lies[name] = bytes(lie)
    source = begin()
    early, late = Told(), Told()
    source.feed(early, [])
    with pytest.raises(ContentMismatch):
        source.wait()
    source.join(late)
    assert early.errors == late.errors
    assert [type(error) for error in late.errors] == [ContentMismatch]
    source.close()


def test_gates_hear_the_same_from_the_moment_they_join(hub: HubServer, llama: Path) -> None:
    dam = Dam(hub, later_data(llama, TINY["num_blocks"] - 1)[:1])
    source = begin()
    early, late = Told(), Told()
    source.feed(early, [])
    assert early.has_news.wait(GENEROUS_SECONDS)
    source.join(late)
    dam.is_open.set()
    source.wait()
    assert late.settled == early.settled
    sizes = [file.stamp.size for file in Checkpoint.open(llama).files]
    whole = {(number, 0, size) for number, size in enumerate(sizes)}
    assert whole <= late.announced
    assert whole <= early.announced
    source.close()


def test_options_that_need_all_of_it_are_refused_for_what_is_on_its_way(hub: HubServer) -> None:
    source = begin_source()
    with pytest.raises(ConfigError, match="nexus fetch"):
        nexus.from_pretrained(source, io="mmap")
    source.close()


def begin_source() -> Inbound:
    source = pretrained.source_of(NAME)
    assert isinstance(source, Inbound)
    return source


def test_what_was_begun_ends_with_an_error(hub: HubServer, want: torch.Tensor, budget: int) -> None:
    with pytest.raises(BudgetError):
        nexus.from_pretrained(NAME, budget=1000)
    wait_for_arrivals()  # or they would go on for ever
    with nexus.from_pretrained(NAME, budget=budget) as model:
        assert torch.equal(logits_of(model), want)


def test_a_file_that_arrives_is_not_mapped_and_has_no_digest(llama: Path) -> None:
    checkpoint = Checkpoint.open(llama)
    file = checkpoint.files[0]
    with file.path.open("rb") as opened:
        descriptors = [opened.fileno()]
        with pytest.raises(ConfigError, match="still arrives"):
            Engine([file], ReadMode(io="mmap"), descriptors=descriptors)
        engine = Engine([file], ReadMode(), descriptors=descriptors)
    entry = next(entry for entry in checkpoint.entries.values() if entry.file == 0)
    group = checkpoint.group("g", [entry.name])
    arena = torch.zeros(group.nbytes, dtype=torch.uint8)
    engine.attach([arena], [group], [0], [], 1)
    with pytest.raises(EngineError, match="still arrives"):
        engine.digest(0)
    with pytest.raises(EngineError, match="lies in a file"):
        engine.announce([(0, file.stamp.size, 1)])
    engine.announce([(0, entry.offset, entry.nbytes // 2)])
    engine.end_arrival(SourceUnavailable("gone"))
    with pytest.raises(SourceUnavailable, match="gone"):
        engine.wait(0)
    engine.announce([(0, entry.offset + entry.nbytes // 2, entry.nbytes - entry.nbytes // 2)])
    engine.wait(0)
    data = file.path.read_bytes()[entry.offset : entry.offset + entry.nbytes]
    assert bytes(arena[: entry.nbytes].numpy()) == data
    engine.close()
