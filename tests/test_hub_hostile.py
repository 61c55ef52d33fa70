"""Hubs and URLs that lie, change or cannot be filed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from nexus_ext import files as files_module
from nexus_ext.arriving import Inbound
from nexus_ext.download import Downloader
from nexus_ext.errors import (
    CheckpointFormatError,
    ConfigError,
    ContentMismatch,
    NexusError,
    SourceUnavailable,
    WriteError,
)
from nexus_ext.files import write_whole
from nexus_ext.hub import fetch, find_local, locate
from nexus_ext.quant.shards import JOURNAL, FolderShards
from tests.arrivals import NAME, serve
from tests.hub_server import HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    files = {"config.json": b"{}", "model.safetensors": bytes(2000)}
    yield from serve(files, tmp_path, monkeypatch)


@pytest.mark.parametrize("where", ["sha", "blobId", "sha256"])
@pytest.mark.parametrize("what", ["../../../victim", "", None, "x" * 40, 7])
def test_a_digest_is_a_digest(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: Any
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    info = hub.info()
    if where == "sha":
        info["sha"] = what
    elif where == "blobId":
        info["siblings"][0]["blobId"] = what
    else:
        info["siblings"][1]["lfs"]["sha256"] = what
    monkeypatch.setattr(hub, "info", lambda: info)
    with pytest.raises(CheckpointFormatError):
        fetch(NAME)
    assert victim.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["victim"]


@pytest.mark.parametrize("size", [None, -1, "7"])
def test_a_size_is_a_number(hub: HubServer, monkeypatch: pytest.MonkeyPatch, size: Any) -> None:
    info = hub.info()
    info["siblings"][0]["size"] = size
    monkeypatch.setattr(hub, "info", lambda: info)
    with pytest.raises(CheckpointFormatError):
        fetch(NAME)


@pytest.mark.parametrize("folder", ["snapshots", "blobs", "refs"])
def test_a_cache_that_cannot_be_written_to(hub: HubServer, tmp_path: Path, folder: str) -> None:
    root = tmp_path / "hub" / "models--org--tiny"
    root.mkdir(parents=True)
    (root / folder).write_text("in its place")
    with pytest.raises(WriteError):
        fetch(NAME)


def test_a_home_that_cannot_be_written_to(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "file" / "home"))
    with caplog.at_level(logging.WARNING, "nexus_ext"):
        assert (fetch(NAME).path / "config.json").read_bytes() == b"{}"
    assert "asked for again" in caplog.text


@pytest.mark.parametrize("name", ["~nobody-has-this-name/x", "x" * 300, "a\0b", "a/" + "b" * 300])
def test_a_name_that_cannot_be(hub: HubServer, name: str) -> None:
    for ask in (fetch, locate):
        with pytest.raises(ConfigError):
            ask(name)


def test_a_long_url_is_a_url_and_its_secret_stays_one(hub: HubServer) -> None:
    signature = "secret" * 700  # longer than a path may be
    url = f"{hub.url}/{NAME}/resolve/{hub.info()['sha']}/model.safetensors?signature={signature}"
    assert find_local(url) is None
    assert locate(url).read_bytes() == hub.files["model.safetensors"]


def test_what_a_url_has_no_more_goes(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    old = {"config.json": b"{}", "generation_config.json": b"{}", "one.safetensors": b"one"}
    index = {"weight_map": {"a": "one.safetensors"}}
    for name, data in (old | {"model.safetensors.index.json": json.dumps(index).encode()}).items():
        memory.pipe(f"/changing/llama/{name}", data)
    fetch("memory://changing/llama")
    memory.rm("/changing", recursive=True)
    memory.pipe("/changing/llama/config.json", b"{}")
    memory.pipe("/changing/llama/model.safetensors", b"two")
    path = fetch("memory://changing/llama", verify=True).path
    assert (path / "model.safetensors").read_bytes() == b"two"
    assert not (path / "generation_config.json").exists()
    assert not (path / "model.safetensors.index.json").exists()
    memory.rm("/changing", recursive=True)


# -- what arrives ----------------------------------------------------------------------------------


class Ended:
    """A file whose download is through."""

    has_ended = True
    nbytes = 100

    def __init__(self, path: Path, error: NexusError | None) -> None:
        path.write_bytes(bytes(self.nbytes))
        self._path, self._error = path, error

    def open(self) -> BinaryIO:
        return self._path.open("rb")

    def want(self, ranges: Sequence[tuple[int, int]]) -> None:
        pass

    def want_all(self) -> None:
        pass

    def wait(self, offset: int, nbytes: int) -> None:
        pass

    def landed(self) -> list[tuple[int, int]]:
        return [(0, self.nbytes)]

    def result(self) -> object:
        if self._error is not None:
            raise self._error
        return self._path


class Told:
    """A gate that keeps what it was told."""

    def __init__(self) -> None:
        self.ended: NexusError | None = None
        self.refused: NexusError | None = None

    def announce(self, spans: Sequence[tuple[int, int, int]]) -> None:
        pass

    def settle(self, file: int, mtime_ns: int) -> None:
        pass

    def end_arrival(self, error: NexusError) -> None:
        self.ended = error

    def refuse(self, error: NexusError) -> None:
        self.refused = error


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_wrong_bytes_are_not_hidden_by_a_file_that_did_not_come(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    errors = [SourceUnavailable("gone"), ContentMismatch("another")]
    shards = {f"{n}": Ended(tmp_path / f"{n}", errors[which]) for n, which in enumerate(order)}
    inbound = Inbound(
        Downloader(),
        tmp_path,
        tmp_path / "index",
        shards,
        {name: tmp_path / name for name in shards},
        lambda: None,
        window_bytes=10,
    )
    inbound._descriptors = [os.open(tmp_path / name, os.O_RDONLY) for name in shards]
    gate = Told()
    inbound.feed(gate, [])
    with pytest.raises(ContentMismatch):
        inbound.wait()
    assert isinstance(gate.refused, ContentMismatch)
    inbound.close()


# -- small files -----------------------------------------------------------------------------------


def test_an_interrupt_just_behind_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def interrupted(source: str, target: Path) -> None:
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(files_module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("line", ["[]", "3", "{}", '{"shard": []}', '{"shard": "a"}'])
def test_a_strange_journal(tmp_path: Path, line: str) -> None:
    (tmp_path / JOURNAL).write_text('{"source": "s"}\n' + line + "\n")
    assert FolderShards(tmp_path).begin({"source": "s"}, ["a"]) == {}


def test_a_single_file_of_an_earlier_time_is_not_taken_for_the_model() -> None:
    import fsspec
    import torch
    from safetensors.torch import save

    from nexus_ext.checkpoint import Checkpoint

    memory = fsspec.filesystem("memory")
    memory.pipe("/growing/llama/model.safetensors", save({"a": torch.zeros(3)}))
    fetch("memory://growing/llama")
    memory.rm("/growing/llama/model.safetensors")
    memory.pipe("/growing/llama/one.safetensors", save({"a": torch.ones(3)}))
    index = {"weight_map": {"a": "one.safetensors"}}
    memory.pipe("/growing/llama/model.safetensors.index.json", json.dumps(index).encode())
    path = fetch("memory://growing/llama", verify=True).path
    assert [file.path.name for file in Checkpoint.open(path).files] == ["one.safetensors"]
    memory.rm("/growing", recursive=True)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"<html>", b"null", b'{"siblings": 3}', b'{"id": "x", "sha": 3}']
)
def test_a_list_that_is_none(hub: HubServer, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    answer = hub._answer

    def strange(request: Any) -> None:
        if request.path.startswith("/api/"):
            hub._send(request, 200, body, {})
        else:
            answer(request)

    monkeypatch.setattr(hub, "_answer", strange)
    with pytest.raises((SourceUnavailable, CheckpointFormatError)):
        fetch(NAME)


@pytest.mark.parametrize("lfs", [{"size": 3}, 3, "x", {"sha256": "a" * 64}])
def test_a_list_with_strange_files(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, lfs: Any
) -> None:
    info = hub.info()
    info["siblings"][0]["lfs"] = lfs
    monkeypatch.setattr(hub, "info", lambda: info)
    with pytest.raises(SourceUnavailable):
        fetch(NAME)
