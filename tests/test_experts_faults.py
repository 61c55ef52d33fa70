"""Disks that err while experts load, and files that change: right logits or a typed error."""

from __future__ import annotations

import collections
import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import nexus_ext as nexus
from nexus_ext.attachment import attachment_of
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.engine import Faults
from nexus_ext.errors import (
    CheckpointChanged,
    CorruptCheckpoint,
    EngineClosed,
    NexusError,
    ReadError,
    ThreadConflict,
    TruncatedCheckpoint,
)
from nexus_ext.pretrained import build_empty
from tests.conftest import RecordCount
from tests.expert_subjects import (
    MODES,
    PROMPT,
    PROMPTS,
    ROOMY,
    TEXT,
    TEXTS,
    Subject,
    experts_of,
    ids,
    logits,
)

pytestmark = pytest.mark.usefixtures("one_quiet_thread", "poisoned_arenas")


def report_of(model: Any) -> dict[str, Any]:
    """The counters of the experts' engine."""
    experts: Any = attachment_of(model).experts
    report: dict[str, Any] = experts.runner.store.stats()
    return report


def num_injected(model: Any) -> collections.Counter[str]:
    return collections.Counter(
        {name: n for name, n in report_of(model).items() if name.startswith("num_injected")}
    )


# -- disks that err ------------------------------------------------------------------------------

STORM = Faults(
    errno_ppm=8_000,
    again_ppm=150_000,
    short_ppm=150_000,
    delay_ppm=50_000,
    flip_ppm=20_000,
    delay_us=500,
)
FAULTS_PER_MODE = 1_500
# A storm may reach the dense weights as well: these are what it may come to.
TYPED = (ReadError, CorruptCheckpoint)


@pytest.mark.timeout(200)
def test_thousands_of_faults_give_the_right_logits_or_typed_errors(
    qwen: Subject, record_count: RecordCount
) -> None:
    """Decoding through few slots, prefills through as few, in every mode."""
    injected: collections.Counter[str] = collections.Counter()
    told: list[str] = []
    seen: collections.Counter[str] = collections.Counter()
    prompts = [(ids(2, length, seed=length), length) for length in (1, 1, 1, 9)]
    want = [qwen.resident(prompt).logits for prompt, _ in prompts]
    # Digests are of the bytes as they are.
    nexus.close(qwen.stream(verify="first", expert_budget="30%"))
    for seed, (name, mode) in enumerate(MODES.items()):
        faults = Faults(**{**STORM.__dict__, "seed": seed})
        stream_in_a_storm(qwen, expert_budget="30%", verify="always", faults=faults, **mode)
        while num_injected(qwen.model).total() < FAULTS_PER_MODE:
            for (prompt, _), wanted in zip(prompts, want, strict=True):
                try:
                    with torch.inference_mode():
                        got = qwen.model(prompt).logits
                except TYPED as error:
                    told.append(str(error))
                    seen[type(error).__name__] += 1
                    continue
                assert torch.equal(got, wanted), name
                seen["right"] += 1
        injected += num_injected(qwen.model)
        report = report_of(qwen.model)
        assert report["num_retries"] > 0
        assert report["num_short_reads"] > 0
        assert report["num_healed"] > 0
        assert nexus.stats(qwen.model).experts.num_failed > 0
        nexus.close(qwen.model)
    record_count("faults of the disk under experts", injected.total(), seen)
    assert injected.total() >= 4 * FAULTS_PER_MODE
    assert all(
        injected[f"num_injected_{kind}"] > 0
        for kind in ("errors", "retries", "shorts", "delays", "flips")
    )
    assert all(str(qwen.folder) in text for text in told)
    assert seen["right"] > 100
    assert seen["ReadError"] > 0


def stream_in_a_storm(subject: Subject, **options: Any) -> None:
    """What stays is read at once: that too may fail."""
    for _ in range(100):
        try:
            subject.stream(**options)
        except TYPED:
            continue
        return
    raise AssertionError("a hundred errors in a row")


@pytest.mark.parametrize("mode", MODES)
def test_after_an_error_the_next_forward_is_right(qwen: Subject, mode: str) -> None:
    """Every second forward or so fails; the one after it finds nothing half done."""
    want = logits(qwen.resident, PROMPT, TEXT[:, :3])
    stream_in_a_storm(
        qwen, expert_budget="30%", faults=Faults(seed=7, errno_ppm=15_000), **MODES[mode]
    )
    outcomes: list[str] = []
    while outcomes.count("error") < 8 or outcomes[-1] == "error":
        assert len(outcomes) < 3_000
        try:
            assert torch.equal(logits(qwen.model, PROMPT, TEXT[:, :3]), want)
        except ReadError:
            outcomes.append("error")
        else:
            outcomes.append("right")
    assert ("error", "right") in itertools.pairwise(outcomes)
    assert nexus.stats(qwen.model).experts.num_failed > 0


def test_a_disk_that_is_gone_is_an_error_each_time(
    qwen: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts_fail(monkeypatch, Faults(errno_ppm=1_000_000))
    model = qwen.stream(expert_budget="30%")
    for prompt in (PROMPT, TEXT[:, :1], PROMPTS, PROMPT):
        with pytest.raises(ReadError, match=r"at offset \d+ .*errno 5") as caught, torch.no_grad():
            model(prompt)
        assert str(qwen.folder) in str(caught.value)
    stats = nexus.stats(model).experts
    assert stats.num_failed == 4
    assert stats.num_present <= stats.num_staying


def experts_fail(monkeypatch: pytest.MonkeyPatch, faults: Faults) -> None:
    """Of both engines of a model, that of the experts alone."""
    import nexus_ext.experts.store as store_module

    engine = store_module.Engine

    def failing(*args: Any, **options: Any) -> Any:
        return engine(*args, **{**options, "faults": faults})

    monkeypatch.setattr(store_module, "Engine", failing)


@pytest.mark.parametrize("mode", ["direct", "buffered", "mapped, kept"])
def test_bits_that_flip_every_time_are_corruption(
    qwen: Subject, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexus.close(qwen.stream(verify="first", expert_budget="30%"))
    experts_fail(monkeypatch, Faults(flip_ppm=1_000_000))
    model = qwen.stream(expert_budget="30%", verify="always", **MODES[mode])
    for prompt in (PROMPT, TEXT[:, :1]):
        with pytest.raises(CorruptCheckpoint, match="in two reads"), torch.no_grad():
            model(prompt)


def test_a_flip_without_verification_would_be_seen(
    qwen: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook works: otherwise the tests above would prove nothing."""
    experts_fail(monkeypatch, Faults(flip_ppm=1_000_000))
    model = qwen.stream(expert_budget="30%")
    assert not torch.equal(logits(model, PROMPT, TEXT), logits(qwen.resident, PROMPT, TEXT))


def test_verified_experts_are_counted(qwen: Subject) -> None:
    for verify in ("first", "always"):
        with qwen.stream(expert_budget="30%", verify=verify, io="direct") as model:
            for _ in range(2):
                logits(model, PROMPTS, TEXTS)
            stats = nexus.stats(model).experts
            loads = stats.num_preloaded + stats.num_misses + stats.num_prefill_misses
            assert stats.num_verified >= 36
            assert (stats.num_verified <= 36) == (verify == "first")
            assert verify == "first" or stats.num_verified >= loads


# -- files that change ---------------------------------------------------------------------------


@pytest.fixture
def own(qwen: Subject, tmp_path: Path) -> Iterator[Any]:
    """A model whose file no other test has: streamed through the fewest slots."""
    path = Path(shutil.copytree(qwen.folder, tmp_path / "own"))
    checkpoint = Checkpoint.open(path)
    model: Any = build_empty(path, checkpoint)
    nexus.stream(model, checkpoint, budget=ROOMY, expert_budget=qwen.floor, io="direct")
    assert torch.equal(logits(model, PROMPT, TEXT), logits(qwen.resident, PROMPT, TEXT))
    yield model
    nexus.close(model)


def file_of(model: Any) -> Path:
    found: Path = attachment_of(model).streamer._checkpoint.files[0].path
    return found


def every_forward_raises(model: Any, kind: type[NexusError], message: str) -> None:
    for prompt in (PROMPT, TEXT[:, :1], PROMPTS):
        with pytest.raises(kind, match=message) as caught, torch.no_grad():
            model(prompt)
        assert str(file_of(model)) in str(caught.value)


def test_a_file_that_is_cut_while_it_streams_is_an_error(own: Any) -> None:
    os.truncate(file_of(own), 10_000)
    every_forward_raises(own, TruncatedCheckpoint, "ends at offset")


def test_a_file_that_is_replaced_while_it_streams_is_an_error(own: Any) -> None:
    path = file_of(own)
    other = path.with_suffix(".new")
    shutil.copy(path, other)
    os.replace(other, path)
    every_forward_raises(own, CheckpointChanged, "another file stands at its path")


def test_a_file_that_is_written_to_while_it_streams_is_an_error(own: Any) -> None:
    path = file_of(own)
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size - 100)
        file.write(b"other bytes")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    every_forward_raises(own, CheckpointChanged, "it was written to")


def test_a_file_that_is_deleted_while_it_streams_is_an_error(own: Any) -> None:
    file_of(own).unlink()
    every_forward_raises(own, CheckpointChanged, "No such file")


def test_a_model_that_is_closed_says_so(own: Any) -> None:
    nexus.close(own)
    with pytest.raises(EngineClosed):
        logits(own, PROMPT, TEXT)
    nexus.close(own)


# -- threads -------------------------------------------------------------------------------------


def test_forwards_of_two_threads_come_one_after_the_other(qwen: Subject) -> None:
    asked = [(PROMPT, TEXT), (PROMPTS, TEXTS)]
    want = [logits(qwen.resident, *each) for each in asked]
    barrier = threading.Barrier(2)

    def work(number: int) -> bool:
        barrier.wait()
        rounds = (logits(qwen.model, *asked[number]) for _ in range(4))
        return all(torch.equal(got, want[number]) for got in rounds)

    qwen.stream(budget=qwen.dense_bytes + qwen.floor, expert_budget=qwen.floor)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (0, 1))) == [True, True]


def test_experts_that_two_threads_call_by_themselves_are_right_too(qwen: Subject) -> None:
    """No pass of the model holds them apart here: the cache does."""
    qwen.stream(expert_budget=qwen.floor)
    hidden = torch.randn(12, 64).to(torch.bfloat16)
    index = torch.arange(12).view(-1, 1)
    weights = torch.ones(12, 1, dtype=torch.bfloat16)
    with torch.no_grad():
        want = [theirs(hidden, index, weights) for theirs in experts_of(qwen.resident)]
    barrier = threading.Barrier(2)

    def work(first: int) -> list[str]:
        barrier.wait()
        seen = []
        for turn in range(30):
            layer = (first + turn) % 3
            try:
                with torch.no_grad():
                    got = experts_of(qwen.model)[layer](hidden, index, weights)
            except ThreadConflict:
                seen.append("conflict")
            else:
                seen.append("right" if torch.equal(got, want[layer]) else "wrong")
        return seen

    with ThreadPoolExecutor(2) as pool:
        seen = collections.Counter(itertools.chain(*pool.map(work, (0, 1))))
    assert seen["wrong"] == 0
    assert seen["right"] > 0


def test_closing_from_another_thread_is_an_error_and_no_hang(
    qwen: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts_fail(monkeypatch, Faults(delay_ppm=1_000_000, delay_us=20_000))
    model = qwen.stream(expert_budget=qwen.floor, io="buffered")
    began, seen = threading.Event(), []

    def work() -> None:
        began.set()
        try:
            while True:
                seen.append(torch.equal(logits(model, PROMPT, TEXT), want))
        except NexusError as error:
            seen.append(type(error).__name__)

    want = logits(qwen.resident, PROMPT, TEXT)
    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    nexus.close(model)
    thread.join(60)
    assert not thread.is_alive()
    assert seen[-1] == "EngineClosed"
    assert all(seen[:-1])
