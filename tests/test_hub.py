"""Models that come from a hub or a URL: what is fetched, what is checked, what is asked again."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import nexus_ext as nexus
from nexus_ext import pretrained
from nexus_ext.cache import DiskTier
from nexus_ext.cli import app
from nexus_ext.demo import make_llama
from nexus_ext.errors import (
    CheckpointFormatError,
    ConfigError,
    ContentMismatch,
    SourceMissing,
    SourceUnavailable,
)
from nexus_ext.hub import fetch, locate
from nexus_ext.pretrained import plan_pretrained
from tests.hub_server import COMMIT, HubServer

NAME = "org/tiny"
PATIENCE_SECONDS = 60
TINY = {"num_blocks": 3, "hidden": 64, "intermediate": 96, "vocabulary": 128}
PROMPT = torch.tensor([[1, 5, 9, 2]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    make_llama(path, **TINY)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    files = {file.name: file.read_bytes() for file in llama.iterdir()}
    server = HubServer(NAME, files)
    server.files |= {"README.md": b"# no weights", "evil.bin": b"pickle"}
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.close()


def weights(hub: HubServer) -> int:
    return len(hub.files["model.safetensors"])


def until_it_is_here(model: Any) -> None:
    """All bytes may have been used before the last digest was compared."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while nexus.stats(model).is_arriving:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_hub_id_streams_and_the_bytes_come_once(hub: HubServer, llama: Path) -> None:
    with nexus.from_pretrained(llama) as model, torch.inference_mode():
        want = model(PROMPT).logits
    for _ in range(2):
        with nexus.from_pretrained(NAME) as model, torch.inference_mode():
            assert torch.equal(model(PROMPT).logits, want)
            until_it_is_here(model)
    assert hub.sent["model.safetensors"] == weights(hub)
    assert hub.asked["info"] == 1, "a model that was fetched is not asked for again"


def test_it_lies_as_the_hubs_own_library_would_have_it(hub: HubServer) -> None:
    report = fetch(NAME)
    from huggingface_hub import snapshot_download

    assert report.path == Path(snapshot_download(NAME, local_files_only=True))
    assert report.path.name == report.revision == COMMIT
    wanted = {name: data for name, data in hub.files.items() if not name.endswith((".md", ".bin"))}
    assert {file.name for file in report.path.iterdir()} == wanted.keys()
    for file in report.path.iterdir():
        assert file.is_symlink()
        assert file.read_bytes() == hub.files[file.name]
    assert (report.path.parents[1] / "refs" / "main").read_text() == COMMIT
    nbytes = sum(map(len, wanted.values()))
    assert (report.nbytes, report.bytes_received, report.bytes_present) == (nbytes, nbytes, 0)


def test_fetching_again_asks_and_receives_nothing(hub: HubServer) -> None:
    fetch(NAME)
    num_files = hub.asked["file"]
    again = fetch(NAME)
    assert (again.bytes_received, again.bytes_present) == (0, again.nbytes)
    assert (hub.asked["info"], hub.asked["file"]) == (2, num_files)


def test_what_others_fetched_is_not_fetched_again(hub: HubServer) -> None:
    path = fetch(NAME).path
    (path / "config.json").resolve().unlink()
    report = fetch(NAME)
    assert report.bytes_received == len(hub.files["config.json"])


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_the_right_size_with_the_wrong_bytes_is_refused(hub: HubServer, file: str) -> None:
    data = bytearray(hub.files[file])
    data[len(data) // 2] ^= 1
    hub.lies[file] = bytes(data)
    with pytest.raises(ContentMismatch):
        fetch(NAME)
    hub.lies.clear()
    report = fetch(NAME)
    assert (report.path / file).read_bytes() == hub.files[file]


def test_damage_on_the_disk_is_found_when_asked(hub: HubServer) -> None:
    path = (fetch(NAME).path / "model.safetensors").resolve()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert fetch(NAME).bytes_received == 0, "the size is right"
    assert fetch(NAME, verify=True).bytes_received == len(data)
    assert path.read_bytes() == hub.files["model.safetensors"]


@pytest.mark.parametrize("evil", ["../../escaped.json", "/etc/escaped.json", "a\\b.json"])
def test_a_file_that_would_leave_the_folder_is_refused(
    hub: HubServer, evil: str, tmp_path: Path
) -> None:
    hub.listed["config.json"] = evil
    with pytest.raises(CheckpointFormatError, match="path inside"):
        fetch(NAME)
    assert not list(tmp_path.rglob("escaped.json"))


def test_without_the_hub_what_is_here_is_used(
    hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch(NAME).path
    hub.status = 503
    with caplog.at_level(logging.WARNING, "nexus_ext"):
        assert fetch(NAME).path == path
    assert "cache has it" in caplog.text
    assert locate(NAME) == path


def test_a_hub_that_cannot_be_reached_is_a_typed_error(hub: HubServer) -> None:
    hub.status = 503
    with pytest.raises(SourceUnavailable):
        fetch(NAME)
    hub.close()
    with pytest.raises(SourceUnavailable):
        fetch(NAME)


def test_an_id_that_nobody_knows(hub: HubServer) -> None:
    hub.status = 404
    with pytest.raises(ConfigError, match="org/tiny"):
        fetch(NAME)
    with pytest.raises(ConfigError, match="folder, a URL or a hub id"):
        fetch("a/b/c")


def test_the_token_goes_to_the_hub_and_into_no_message(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    hub.lies["model.safetensors"] = b"\0" * weights(hub)
    with caplog.at_level(logging.DEBUG, "nexus_ext"), pytest.raises(ContentMismatch) as refused:
        fetch(NAME)
    assert hub.tokens == {"Bearer hf_verysecret"}
    assert "verysecret" not in caplog.text + str(refused.value)


# -- URLs ------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(llama: Path) -> Iterator[Any]:
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in llama.iterdir():
        memory.pipe(f"/bucket/llama/{file.name}", file.read_bytes())
    yield memory
    memory.rm("/bucket", recursive=True)


def test_a_folder_behind_any_url_streams(bucket: Any, llama: Path) -> None:
    with nexus.from_pretrained(llama) as model, torch.inference_mode():
        want = model(PROMPT).logits
    with nexus.from_pretrained("memory://bucket/llama") as model, torch.inference_mode():
        assert torch.equal(model(PROMPT).logits, want)
        until_it_is_here(model)
    bucket.rm("/bucket/llama/model.safetensors")
    with nexus.from_pretrained("memory://bucket/llama") as model, torch.inference_mode():
        assert torch.equal(model(PROMPT).logits, want), "it is here"


def test_one_file_behind_a_url(hub: HubServer) -> None:
    url = f"{hub.url}/{NAME}/resolve/{COMMIT}/model.safetensors?signature=secret"
    path = locate(url)
    assert path.read_bytes() == hub.files["model.safetensors"]
    assert "secret" not in str(path)


def test_shards_behind_a_url(bucket: Any, llama: Path) -> None:
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    bucket.pipe("/bucket/sharded/model.safetensors.index.json", json.dumps(index).encode())
    for name in ("one", "two"):
        bucket.pipe(f"/bucket/sharded/{name}.safetensors", name.encode())
    report = fetch("memory://bucket/sharded")
    assert sorted(file.name for file in report.path.iterdir()) == [
        "model.safetensors.index.json",
        "one.safetensors",
        "two.safetensors",
    ]


@pytest.mark.parametrize("name", ["../up.safetensors", "a/b.safetensors", "..", 3, ""])
def test_an_index_cannot_name_files_elsewhere(bucket: Any, name: Any) -> None:
    index = json.dumps({"weight_map": {"a": name}}).encode()
    bucket.pipe("/bucket/evil/model.safetensors.index.json", index)
    with pytest.raises(CheckpointFormatError, match="plain files"):
        fetch("memory://bucket/evil")


def test_a_url_without_weights(bucket: Any) -> None:
    with pytest.raises(SourceMissing):
        fetch("memory://bucket/nothing")


# -- the command -----------------------------------------------------------------------------------


def test_nexus_fetch_says_where_it_lies(hub: HubServer, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["fetch", NAME, "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert Path(report["path"]) == locate(NAME)
    assert report["bytes_received"] == report["nbytes"]


def test_nexus_run_streams_while_it_downloads(hub: HubServer, llama: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    asked = ["--prompt", "w1 w2", "--max-new-tokens", "4", "--json", str(report)]
    local = CliRunner().invoke(app, ["run", str(llama), *asked], catch_exceptions=False)
    budget = str(plan_pretrained(llama).minimum_bytes)
    asked += ["--budget", budget]
    first = CliRunner().invoke(app, ["run", NAME, *asked], catch_exceptions=False)
    assert (first.exit_code, first.stdout) == (0, local.stdout), first.output
    stats = json.loads(report.read_text())["stats"]
    # As it came, and not before; and all of it is here and right when the command ends.
    assert stats["network_bytes"] > weights(hub)
    assert not stats["is_arriving"]
    hub.close()
    second = CliRunner().invoke(app, ["run", NAME, *asked], catch_exceptions=False)
    assert (second.exit_code, second.stdout) == (0, local.stdout)
    assert json.loads(report.read_text())["stats"]["network_bytes"] == 0


def test_nexus_run_fails_where_the_model_turns_out_wrong(hub: HubServer) -> None:
    lie = bytearray(hub.files["model.safetensors"])
    lie[-1] ^= 1
    hub.lies["model.safetensors"] = bytes(lie)
    asked = ["run", NAME, "--prompt", "w1 w2", "--max-new-tokens", "4"]
    with pytest.raises(ContentMismatch, match="SHA-256"):
        CliRunner().invoke(app, asked, catch_exceptions=False)


def test_nexus_plan_fetches_headers_alone(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "_HEADERS_CHUNK", "32KiB")  # requests are 4 KiB
    asked = ["plan", NAME, "--budget", "1MiB", "--json", str(tmp_path / "plan.json")]
    result = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    sent = hub.sent["model.safetensors"]
    length = int.from_bytes(hub.files["model.safetensors"][:8], "little")
    assert 0 < sent <= length + 8 + (4 << 10) < weights(hub) / 4
    local = plan_pretrained(locate(NAME), budget="1MiB")  # what came is kept
    assert hub.sent["model.safetensors"] == weights(hub)
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert planned["group_bytes"] == list(local.group_bytes)
    assert planned["resident"] == list(local.resident)


def test_a_second_run_fetches_nothing_and_converts_nothing(
    hub: HubServer, nexus_home: Path, record_count: Callable[..., None]
) -> None:
    asked = ["run", NAME, "--prompt", "w1 w2", "--weights", "nf4", "--max-new-tokens", "4"]
    first = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    [packed] = (nexus_home / "converted").glob("*/*.index.json")
    made = {file: file.stat().st_mtime_ns for file in packed.parent.iterdir()}
    with DiskTier(nexus_home / "cache", "1GB") as cache:
        shards = {entry.key: entry.created_seconds for entry in cache.entries()}
        written = cache.totals()["puts"]
    counts = dict(hub.asked)
    hub.close()
    second = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert second.exit_code == 0, second.output
    assert second.stdout == first.stdout
    assert dict(hub.asked) == counts
    assert {file: file.stat().st_mtime_ns for file in packed.parent.iterdir()} == made
    with DiskTier(nexus_home / "cache", "1GB") as cache:
        assert {entry.key: entry.created_seconds for entry in cache.entries()} == shards
        assert cache.totals()["puts"] == written == len(shards)
    record_count("second runs of a fetched, packed model: bytes from the network, shards packed", 0)


def test_a_node_with_a_store_fetches_what_another_one_packed(
    hub: HubServer,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_count: Callable[..., None],
) -> None:
    monkeypatch.setenv("NEXUS_STORE", f"file://{tmp_path}/store")
    answers, sent = [], []
    for node in ("a", "b"):
        monkeypatch.setenv("NEXUS_HOME", str(tmp_path / node / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / node / "hub"))
        before = hub.sent["model.safetensors"]
        with nexus.from_pretrained(NAME, weights="nf4") as model, torch.inference_mode():
            answers.append(model(PROMPT).logits)
        sent.append(hub.sent["model.safetensors"] - before)
    assert torch.equal(*answers)
    assert sent == [weights(hub), 0]
    counts = dict(hub.asked)
    with nexus.from_pretrained(NAME, weights="nf4") as model, torch.inference_mode():
        assert torch.equal(model(PROMPT).logits, answers[0])
    assert dict(hub.asked) == counts, "the second time nobody is asked"
    record_count("weights that the first of two nodes got from the hub, bytes", sent[0])
    record_count("weights that the second got from the hub, bytes", sent[1])
    # What the store has lost is packed again, of the original.
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "c" / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "c" / "hub"))
    stored = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    max(stored, key=lambda path: path.stat().st_size).unlink()
    with nexus.from_pretrained(NAME, weights="nf4") as model, torch.inference_mode():
        assert torch.equal(model(PROMPT).logits, answers[0])
    assert hub.sent["model.safetensors"] == 2 * weights(hub)


@pytest.mark.parametrize("text", ["[]", "no json", '{"../../evil": ""}', '{"config.json": 1}'])
def test_a_strange_description_is_refused(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nexus_home: Path, text: str
) -> None:
    with nexus.from_pretrained(NAME, weights="nf4"):
        pass
    shutil.rmtree(nexus_home / "converted")
    with DiskTier(nexus_home / "cache", "1GB") as cache:
        [key] = [entry.key for entry in cache.entries() if entry.key.endswith("/description")]
        cache.put(key, [text.encode()], kind="packed")
    with pytest.raises(CheckpointFormatError, match="described by plain files"):
        nexus.from_pretrained(NAME, weights="nf4")
    assert not list(tmp_path.rglob("evil"))
