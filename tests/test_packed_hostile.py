"""Packed models whose store, folder or cache is damaged, strange, full or used by others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import nexus_ext as nexus
from nexus_ext import packed_store
from nexus_ext.errors import CheckpointFormatError, ReadError, WriteError
from nexus_ext.quant import convert as conversion
from tests.test_packed_store import INDEX, entries, made, packed, tier
from tests.test_quant_formats import logits, write_llama


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "plain")


def described(home: Path) -> Path:
    [folder] = [path for path in (home / "converted").iterdir() if path.is_dir()]
    return folder


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "\xff"]
)
def test_a_damaged_index_is_written_anew(plain: Path, nexus_home: Path, text: str) -> None:
    with packed(plain) as model:
        want = logits(model)
    before = made(nexus_home)
    (described(nexus_home) / INDEX).write_bytes(text.encode("latin-1"))
    with packed(plain) as model:
        assert torch.equal(logits(model), want)
    assert made(nexus_home) == before, "the shards are as they were"


@pytest.mark.parametrize("about", [{}, {"report": 3}, {"report": [{"name": "x"}]}, {"report": [3]}])
def test_a_shard_without_its_report_is_packed_again(
    plain: Path, nexus_home: Path, about: Any
) -> None:
    """Another node may have put it."""
    with packed(plain) as model:
        want = logits(model)
    with tier(nexus_home) as cache:
        first, second = sorted(entries(nexus_home).items())[:2]
        payload = cache.read(first[1])
        assert cache.evict(first[0])
        assert cache.put(first[0], [payload], kind="packed", about=about)
        assert cache.evict(second[0])
    with packed(plain) as model:
        assert torch.equal(logits(model), want)


@pytest.mark.parametrize("name", ["", ".", "..", "x" * 300])
def test_a_description_names_plain_files(plain: Path, nexus_home: Path, name: str) -> None:
    nexus.close(packed(plain))
    folder = described(nexus_home)
    shutil.rmtree(folder)
    with tier(nexus_home) as cache:
        [key] = [entry.key for entry in cache.entries() if entry.key.endswith("/description")]
        cache.put(key, [json.dumps({name: "e30="}).encode()], kind="packed")
    with pytest.raises(CheckpointFormatError, match="described by plain files"):
        packed(plain)
    assert not folder.is_file()


def test_what_is_interrupted_while_it_is_described_again(
    plain: Path, nexus_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexus.close(packed(plain))
    with tier(nexus_home) as cache:
        assert cache.evict(sorted(entries(nexus_home))[1])
    copies = {path.name: path.read_bytes() for path in described(nexus_home).iterdir()}

    def interrupted(source: Path, target: Path) -> None:
        target.write_bytes(b"")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion.shutil, "copyfile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed(plain)
    nexus.close(packed(plain))
    assert {path.name: path.read_bytes() for path in described(nexus_home).iterdir()} == copies


def test_entries_that_go_while_the_model_opens(
    plain: Path, nexus_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process knows nothing of what is held here."""
    with packed(plain) as model:
        want = logits(model)
    is_complete = packed_store._is_complete

    def and_then_they_go(*args: Any) -> bool:
        answer = is_complete(*args)
        for blob in (nexus_home / "cache").rglob("*.nx"):
            blob.unlink()
        return answer

    monkeypatch.setattr(packed_store, "_is_complete", and_then_they_go)
    with packed(plain) as model:
        assert torch.equal(logits(model), want)


def test_a_process_without_descriptors_says_so(
    plain: Path, nexus_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nexus.close(packed(plain))
    before = made(nexus_home)

    def refuse(path: Path) -> int:
        raise ReadError(f"cannot open {path}: Too many open files")

    monkeypatch.setattr(packed_store, "open_blob", refuse)
    with pytest.raises(ReadError, match="Too many open files"):
        packed(plain)
    assert made(nexus_home) == before


def test_a_description_that_the_disk_refuses(plain: Path, nexus_home: Path) -> None:
    nexus.close(packed(plain))
    folder = described(nexus_home)
    shutil.rmtree(folder)
    folder.write_text("in its place")
    with pytest.raises(WriteError):
        packed(plain)


def test_a_home_that_cannot_be_written_to(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "converted").write_text("in its place")
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))
    with pytest.raises(WriteError):
        packed(plain)


def test_who_was_killed_before_it_described_a_model_does_it_next_time(
    plain: Path, nexus_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else other nodes never find it."""

    def interrupted(shards: packed_store.StoredShards, folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packed_store.StoredShards, "describe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed(plain)
    nexus.close(packed(plain))
    with tier(nexus_home) as cache:
        assert any(entry.key.endswith("/description") for entry in cache.entries())
