"""Models packed on the way: packed once, kept in the cache, streamed from there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import nexus_ext as nexus
from nexus_ext import packed_store
from nexus_ext.cache import DiskTier, Entry
from nexus_ext.cli import app
from nexus_ext.errors import ConfigError, CorruptCheckpoint, WriteError
from nexus_ext.quant import NF4Config
from tests.test_experts_find import make_moe, write_moe
from tests.test_quant_formats import NUM_LAYERS, logits, open_llama, write_llama

NUM_SHARDS = NUM_LAYERS + 1
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def _poisoned_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def converted(plain: Path) -> Path:
    nexus.convert(plain, plain.parent / "nf4", "nf4")
    return plain.parent / "nf4"


def packed(source: Path, weights: Any = "nf4", **options: Any) -> Any:
    return nexus.from_pretrained(source, weights=weights, io="direct", lookahead=1, **options)


def tier(home: Path) -> DiskTier:
    return DiskTier(home / "cache", 1 << 62)


def entries(home: Path) -> dict[str, Entry]:
    """The shards."""
    with tier(home) as cache:
        return {e.key: e for e in cache.entries() if e.key.endswith(".safetensors")}


def stored_bytes(home: Path) -> int:
    """Of the files; one may have several keys."""
    return sum(path.stat().st_size for path in {e.path for e in entries(home).values()})


def made(home: Path) -> dict[str, float]:
    """When each shard was packed."""
    return {key: entry.created_seconds for key, entry in entries(home).items()}


def smallest_budget(folder: Path) -> int:
    return nexus.pretrained.plan_pretrained(folder, lookahead=1).minimum_bytes


def test_it_is_packed_once_and_streams_from_the_cache(
    plain: Path, converted: Path, nexus_home: Path
) -> None:
    budget = smallest_budget(converted)
    with open_llama(converted) as model:
        want = logits(model)
    with packed(plain, budget=budget) as model:
        assert torch.equal(logits(model), want)
        assert torch.equal(logits(model), want)
        stats = nexus.stats(model)
        assert stats.streamed_groups >= NUM_LAYERS - 1
        assert stats.io_mode == "direct"
        assert not stats.bytes_staged or stats.bytes_direct
    before = made(nexus_home)
    assert len(before) == NUM_SHARDS
    for weights in ("nf4", NF4Config()):
        with packed(plain, weights, budget=budget) as model:
            assert torch.equal(logits(model), want)
    assert made(nexus_home) == before


def test_an_entry_holds_the_bytes_that_convert_writes(
    plain: Path, converted: Path, nexus_home: Path
) -> None:
    nexus.close(packed(plain))
    with tier(nexus_home) as cache:
        for key, entry in entries(nexus_home).items():
            payload = bytes(cache.read(entry).tolist())
            assert payload == (converted / key.split("/")[1]).read_bytes()
            assert entry.kind == "packed"
        assert cache.verify().bad == ()
    [folder] = [path for path in (nexus_home / "converted").iterdir() if path.is_dir()]
    described = {path.name for path in converted.iterdir() if path.suffix != ".safetensors"}
    assert {path.name for path in folder.iterdir()} == described


def test_what_was_asked_for_is_part_of_the_name(
    plain: Path, nexus_home: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "source"))

    def models() -> int:
        return len({key.split("/")[0] for key in entries(nexus_home)})

    nexus.close(packed(source))
    nexus.close(packed(source, "nf4-nested"))
    assert models() == 2
    os.utime(source / "model.safetensors")
    nexus.close(packed(source))
    assert models() == 2 + 1 or len(entries(nexus_home)) == 2 * NUM_SHARDS, "equal bytes are one"
    for epsilon in (1e-6, 1e-3):
        fields = json.loads((source / "config.json").read_text()) | {"rms_norm_eps": epsilon}
        (source / "config.json").write_text(json.dumps(fields))
        with packed(source) as model:
            assert model.config.rms_norm_eps == epsilon


def test_groups_may_be_any_iterable(plain: Path) -> None:
    with packed(plain, groups=(name for name in ["model.layers"])) as model:
        assert nexus.plan_of(model).num_groups == NUM_LAYERS


@pytest.mark.parametrize("number", [0, 2, NUM_SHARDS - 1])
def test_what_was_evicted_is_packed_again_and_nothing_else(
    plain: Path, nexus_home: Path, number: int
) -> None:
    with packed(plain) as model:
        want = logits(model)
    before = made(nexus_home)
    gone = sorted(before)[number]
    with tier(nexus_home) as cache:
        assert cache.evict(gone)
    with packed(plain) as model:
        assert torch.equal(logits(model), want)
    after = made(nexus_home)
    assert after.keys() == before.keys()
    assert {key for key in before if after[key] != before[key]} == {gone}


@pytest.mark.parametrize("harm", ["header", "cut", "gone", "a link"])
def test_a_damaged_file_is_packed_again(plain: Path, nexus_home: Path, harm: str) -> None:
    with packed(plain) as model:
        want = logits(model)
    entry = sorted(entries(nexus_home).items())[1][1]
    if harm == "header":
        with entry.path.open("r+b") as file:
            file.seek(100)
            file.write(b"!!!!")
    elif harm == "cut":
        os.truncate(entry.path, entry.path.stat().st_size - 1)
    else:
        entry.path.unlink()
        if harm == "a link":
            entry.path.symlink_to("/etc/hostname")
    with packed(plain) as model:
        assert torch.equal(logits(model), want)
    with tier(nexus_home) as cache:
        assert cache.verify().bad == ()


def test_a_flipped_byte_is_found_where_digests_are_asked_for(plain: Path, nexus_home: Path) -> None:
    nexus.close(packed(plain, verify="first"))
    entry = sorted(entries(nexus_home).items())[2][1]
    status = entry.path.stat()
    with entry.path.open("r+b") as file:
        file.seek(status.st_size - 5000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(entry.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CorruptCheckpoint), packed(plain, verify="first") as model:
        logits(model)
    with tier(nexus_home) as cache:
        assert len(cache.verify().bad) == 1


# -- room ------------------------------------------------------------------------------------------


def test_a_cache_that_is_too_small_says_what_to_do(
    plain: Path, nexus_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_CACHE_BYTES", "64KiB")
    with pytest.raises(
        WriteError, match=r"no room.*NEXUS_CACHE_BYTES|too small.*NEXUS_CACHE_BYTES"
    ):
        packed(plain)
    monkeypatch.setenv("NEXUS_CACHE_BYTES", "much")
    with pytest.raises(ConfigError, match="much"):
        packed(plain)
    monkeypatch.delenv("NEXUS_CACHE_BYTES")
    nexus.close(packed(plain))


def test_a_model_in_use_stays_and_one_that_is_not_goes(
    plain: Path, nexus_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexus.close(packed(plain))
    limit = stored_bytes(nexus_home) * 5 // 4  # not enough for two
    monkeypatch.setenv("NEXUS_CACHE_BYTES", str(limit))
    with packed(plain, "nf4-nested") as nested:  # in place of the first
        want = logits(nested)
        kept = {key.split("/")[0] for key in entries(nexus_home)}
        with pytest.raises(WriteError, match="no room"):
            packed(plain, "int8")
        assert torch.equal(logits(nested), want)
        assert kept & {key.split("/")[0] for key in entries(nexus_home)}
    assert stored_bytes(nexus_home) <= limit


def test_a_model_outlives_its_entries(plain: Path, nexus_home: Path, run_python: Any) -> None:
    """Another process knows nothing of what is held here."""
    with packed(plain) as model:
        want = logits(model)
    with packed(plain, budget=smallest_budget(plain) // 2) as model:
        assert torch.equal(logits(model), want)
        run_python(
            "import nexus_ext.cli, sys; sys.argv[1:] = ['cache', 'clear']; nexus_ext.cli.app()"
        )
        assert entries(nexus_home) == {}
        assert torch.equal(logits(model), want)


# -- interrupted -----------------------------------------------------------------------------------


def test_an_interrupted_conversion_goes_on(
    plain: Path, nexus_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = DiskTier.put

    def refuse(self: DiskTier, key: str, *args: Any, **options: Any) -> Any:
        return None if "00003" in key else put(self, key, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DiskTier, "put", refuse)
        with pytest.raises(WriteError, match="what is done stays"):
            packed(plain)
    before = made(nexus_home)
    assert len(before) == 2
    nexus.close(packed(plain))
    after = made(nexus_home)
    assert len(after) == NUM_SHARDS
    assert {key: after[key] for key in before} == before


def test_a_killed_conversion_goes_on(plain: Path, nexus_home: Path, run_python: Any) -> None:
    script = """
import os, sys, nexus_ext
def progress(what, done, total):
    if what == "packing" and done > total / 2:
        os._exit(0)
nexus_ext.from_pretrained(sys.argv[1], weights="nf4", progress=progress)
"""
    run_python(script, plain)
    before = made(nexus_home)
    assert 0 < len(before) < NUM_SHARDS
    with packed(plain) as model:
        logits(model)
    after = made(nexus_home)
    assert {key: after[key] for key in before} == before
    assert not list((nexus_home / "cache").rglob("*.tmp"))


def test_two_processes_convert_once(plain: Path, nexus_home: Path, run_python: Any) -> None:
    script = """
import sys, nexus_ext
with nexus_ext.from_pretrained(sys.argv[1], weights="int8") as model:
    print(nexus_ext.plan_of(model).num_groups)
"""
    with ThreadPoolExecutor() as pool:
        printed = list(pool.map(lambda _: run_python(script, plain).strip(), range(2)))
    assert printed == [str(NUM_LAYERS)] * 2
    with tier(nexus_home) as cache:
        assert cache.totals()["puts"] == NUM_SHARDS + 1, "and a description"


# -- nodes -----------------------------------------------------------------------------------------


def as_the_hub_has_it(source: Path, root: Path) -> Path:
    """The same files in the hub's layout: links to blobs that are called by their SHA-256."""
    snapshot = root / "models--org--name" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    blobs = root / "models--org--name" / "blobs"
    blobs.mkdir()
    for file in source.iterdir():
        data = file.read_bytes()
        blob = blobs / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def test_what_one_node_packed_another_one_finds(
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_count: Callable[[str, object], None],
) -> None:
    monkeypatch.setenv("NEXUS_STORE", f"file://{tmp_path}/store")
    nodes = [as_the_hub_has_it(plain, tmp_path / name) for name in ("a", "b")]
    answers, written, fetched = [], [], []
    opened: list[Any] = []
    store = packed_store._open_store
    monkeypatch.setattr(
        packed_store, "_open_store", lambda url: opened.append(store(url)) or opened[-1]
    )
    for number, node in enumerate(nodes):
        monkeypatch.setenv("NEXUS_HOME", str(tmp_path / f"home{number}"))
        with packed(node) as model:
            answers.append(logits(model))
            stats = opened[-1].stats()
            written.append(stats.published)
            fetched.append(stats.fetched_bytes)
    assert torch.equal(*answers)
    size = sum(entry.nbytes for entry in entries(tmp_path / "home1").values())
    assert written == [NUM_SHARDS + 1, 0], "and a description"
    assert fetched[0] == 0
    assert 0 < fetched[1] - size < 64 << 10
    record_count("packed bytes that the second node got from the first one's store", size)
    # And the third time nobody asks the store.
    shutil.rmtree(tmp_path / "store")
    with packed(nodes[1]) as model:
        assert torch.equal(logits(model), answers[0])


def test_a_store_that_is_away_is_no_reason_to_fail(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NEXUS_STORE", f"file://{tmp_path}/file/store")
    with packed(as_the_hub_has_it(plain, tmp_path / "hub")) as model:
        logits(model)


# -- others ----------------------------------------------------------------------------------------


def test_experts_come_from_the_cache_too(tmp_path: Path, nexus_home: Path) -> None:
    write_moe(make_moe("Mixtral"), tmp_path / "plain", "saved")
    nexus.convert(tmp_path / "plain", tmp_path / "nf4")
    ids = torch.tensor([[1, 2, 3, 4]])
    with nexus.from_pretrained(tmp_path / "nf4", expert_budget="50%") as model:
        want = model(ids).logits
    for _ in range(2):
        with packed(tmp_path / "plain", expert_budget="50%") as model:
            assert torch.equal(model(ids).logits, want)
            assert nexus.stats(model).experts is not None
    assert any("model-0000" in key for key in entries(nexus_home))


def test_the_command_lists_them(plain: Path, nexus_home: Path, tmp_path: Path) -> None:
    nexus.close(packed(plain))
    done = CliRunner().invoke(app, ["cache", "ls", "--json", str(tmp_path / "ls.json")])
    assert done.exit_code == 0, done.output
    listed = json.loads((tmp_path / "ls.json").read_text())
    assert {entry["kind"] for entry in listed} == {"packed"}
    assert len(listed) == NUM_SHARDS + 1, "and a description"
