"""What a packed model is called says which bytes it was made of; nothing else may lie under it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

import nexus_ext as nexus
from nexus_ext import hub as hub_module
from nexus_ext import pretrained
from nexus_ext.errors import CheckpointChanged, ConfigError, CorruptCheckpoint
from tests.arrivals import NAME, serve
from tests.hub_server import COMMIT, HubServer
from tests.test_packed_store import as_the_hub_has_it, entries, packed
from tests.test_quant_formats import logits, write_llama


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def source(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "source"))


def other_weights(plain: Path) -> bytes:
    """Of the same names and shapes."""
    tensors = load_file(plain / "model.safetensors")
    return save({name: -tensor for name, tensor in tensors.items()}, {"format": "pt"})


def new_home(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setenv("NEXUS_HOME", str(path))


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_model_of_a_local_folder_goes_to_no_other_node(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inode and time are of one machine: on another one they may be those of other bytes."""
    monkeypatch.setenv("NEXUS_STORE", f"file://{tmp_path}/store")
    new_home(monkeypatch, tmp_path / "one")
    with packed(source) as model:
        first = logits(model)
    weights = source / "model.safetensors"
    status = weights.stat()
    assert len(other_weights(source)) == status.st_size
    weights.write_bytes(other_weights(source))
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    new_home(monkeypatch, tmp_path / "another machine")
    with packed(source) as model:
        assert not torch.equal(logits(model), first)
    assert files_in(tmp_path / "store") == []


def test_a_source_that_changes_while_it_is_packed(source: Path, nexus_home: Path) -> None:
    others = other_weights(source)

    def change(what: str, done: int, total: int) -> None:
        if what == "packing":
            (source / "new").write_bytes(others)
            os.replace(source / "new", source / "model.safetensors")

    with pytest.raises(CheckpointChanged):
        packed(source, progress=change)
    assert len(entries(nexus_home)) == 1, "what was packed before it changed"


def test_the_class_is_part_of_the_name(tmp_path: Path, nexus_home: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_heads": 2}
    config = T5Config(**sizes, num_layers=2, num_decoder_layers=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    nexus.convert(tmp_path / "t5", tmp_path / "nf4", "nf4")
    ids = torch.tensor([[1, 2, 3]])
    with nexus.from_pretrained(tmp_path / "nf4") as model:
        want = model(input_ids=ids, decoder_input_ids=ids).logits
    nexus.close(packed(tmp_path / "t5", model_class="T5EncoderModel"))
    with packed(tmp_path / "t5") as model:
        assert torch.equal(model(input_ids=ids, decoder_input_ids=ids).logits, want)


def test_what_describes_a_model_is_that_of_its_folder(source: Path) -> None:
    for tokens in (5, 7):
        described = source / "generation_config.json"
        fields = json.loads(described.read_text()) | {"max_new_tokens": tokens}
        described.write_text(json.dumps(fields))
        with packed(source) as model:
            assert model.generation_config.max_new_tokens == tokens


def test_a_blob_that_is_not_what_it_is_called_goes_to_no_other_node(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_STORE", f"file://{tmp_path}/store")
    node = as_the_hub_has_it(plain, tmp_path / "hub")
    blob = (node / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="SHA-256"):
        packed(node)
    assert files_in(tmp_path / "store") == []


@pytest.fixture
def hub(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    files = {file.name: file.read_bytes() for file in plain.iterdir()}
    yield from serve(files, tmp_path, monkeypatch)


def test_what_is_packed_is_the_commit_that_was_listed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch moves between the list and the weights."""
    monkeypatch.setenv("NEXUS_STORE", f"file://{tmp_path}/store")
    source = pretrained.source_of(NAME, weights="nf4")
    assert isinstance(source, hub_module.Outline)
    asked: list[str | None] = []
    list_repo = hub_module.list_repo

    def listed(name: str, revision: str | None) -> Any:
        asked.append(revision)
        repo = list_repo(name, revision)
        return replace(repo, commit="d" * 40) if revision is None else repo

    monkeypatch.setattr(hub_module, "list_repo", listed)
    nexus.close(nexus.from_pretrained(source, weights="nf4"))
    assert asked == [None, COMMIT]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "3"),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}'),
        ("generation_config.json", ""),
        ("generation_config.json", "[]"),
    ],
)
@pytest.mark.parametrize("weights", [None, "nf4"])
def test_a_strange_description_is_a_typed_error(
    source: Path, file: str, text: str, weights: str | None
) -> None:
    (source / file).write_text(text)
    with pytest.raises(ConfigError, match=file):
        nexus.from_pretrained(source, weights=weights)
