"""Two processes share one memory, and two nodes one store: what the second one reads is counted.

The model lies on a hub that counts what it sends; the driver of the store counts what it gives.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem
from huggingface_hub import constants
from torch import nn

from nexus_ext.cache.shared_folder import default_folder
from nexus_ext.demo import make_llama
from nexus_ext.sli import IOOptimizer, LayerCache, download_from_hub
from tests.conftest import RecordCount
from tests.hub_server import HubServer

NAME = "org/model"
NUM_LAYERS = 6

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    path = folder / "llama"
    make_llama(path, num_blocks=NUM_LAYERS, hidden=128, intermediate=352, vocabulary=128)
    return path


@pytest.fixture(scope="module")
def resident(llama: Path) -> Any:
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The origin of the model; nothing of it is on this machine."""
    server = HubServer(NAME, {file.name: file.read_bytes() for file in llama.iterdir()})
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.close()


def fill(cache: LayerCache) -> list[nn.Module]:
    """As the guide does it: what is not in the cache is downloaded, and cached."""
    layers = []
    for index in range(NUM_LAYERS):
        assert cache.get_layer(NAME, index) is None
        layer = download_from_hub(NAME, index)
        cache.cache_layer(NAME, index, layer)
        layers.append(layer)
    return layers


def sha256_of(layer: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(layer.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def nbytes_of(layers: list[nn.Module]) -> int:
    return sum(tensor.nbytes for layer in layers for tensor in layer.state_dict().values())


# A process of its own, with nothing of the model but its config. It has the same functions.
CHILD = """
import hashlib, json, sys
import torch, transformers
from nexus_ext.sli import LayerCache
name, config, folder, remote, num_layers = sys.argv[1:]
model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(config))
def sha256_of(layer):
    digest = hashlib.sha256()
    for key, tensor in sorted(layer.state_dict().items()):
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
with LayerCache(folder, remote=remote or None) as cache:
    cache.set_template(name, lambda index: model.model.layers[index])
    found = [sha256_of(cache.get_layer(name, index)) for index in range(int(num_layers))]
    stats = cache.get_stats()
names = ("memory_mode", "memory_hits", "ssd_hits", "remote_hits", "misses")
names += ("ssd_read_bytes", "remote_bytes")
print(json.dumps({"layers": found} | {name: stats[name] for name in names}))
"""


@pytest.fixture
def second(
    hub: HubServer, llama: Path, tmp_path: Path, run_python: Callable[..., str]
) -> Callable[..., Any]:
    """Runs a second process over a folder: what it got, and what that took."""

    def run(folder: Path, remote: str = "") -> Any:
        places = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "another_hub")}
        arguments = (NAME, llama, folder, remote, NUM_LAYERS)
        return json.loads(run_python(CHILD, *arguments, **places).splitlines()[-1])

    return run


# -- two processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [(), (1, 4)], ids=["all in memory", "all but two"])
def test_a_second_process_reads_only_what_memory_has_not(
    hub: HubServer,
    second: Callable[..., Any],
    tmp_path: Path,
    missing: tuple[int, ...],
    record_count: RecordCount,
) -> None:
    with LayerCache(tmp_path / "cache") as cache:
        layers = fill(cache)
        sent, asked = hub.sent.total(), hub.asked.total()
        assert hub.sent["model.safetensors"] == len(hub.files["model.safetensors"])
        entries = {entry.about["layer"]: entry for entry in cache.disk.entries()}  # type: ignore[union-attr]
        for index in missing:
            assert cache.ram.evict(entries[index].digest)
        got = second(tmp_path / "cache")
    from_network = hub.sent.total() - sent + got["remote_bytes"]
    record_count(
        f"bytes of layers that a second process got; {len(missing)} were not in memory",
        nbytes_of(layers),
        {"it read from disk": got["ssd_read_bytes"], "from the network": from_network},
    )
    assert got["layers"] == [sha256_of(layer) for layer in layers]
    assert got["memory_mode"] == "shared"
    assert (got["memory_hits"], got["ssd_hits"]) == (NUM_LAYERS - len(missing), len(missing))
    assert got["ssd_read_bytes"] == sum(entries[index].nbytes for index in missing)
    assert (from_network, hub.asked.total()) == (0, asked)


# -- two nodes -------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of an empty store."""
    if request.param == "file":
        yield f"file://{tmp_path}/shared"
        return
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield "memory://shared"
    MemoryFileSystem.store.clear()


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Bytes that the driver of the store gave, of objects ("blobs") and of what keys mean."""
    counts: Counter[str] = Counter()
    for driver in (MemoryFileSystem, AbstractFileSystem):

        def counting(
            self: Any, path: str, *args: Any, _real: Any = driver.cat_file, **kw: Any
        ) -> Any:
            data = _real(self, path, *args, **kw)
            counts["blobs" if "/blobs/" in path else "keys"] += len(data)
            return data

        monkeypatch.setattr(driver, "cat_file", counting)
    return counts


def test_a_second_node_gets_every_layer_from_the_store_and_nothing_from_the_origin(
    hub: HubServer,
    resident: Any,
    url: str,
    given: Counter[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_count: RecordCount,
) -> None:
    with LayerCache(tmp_path / "a", remote=url, publish=True) as first:
        layers = fill(first)
        published = first.get_stats()["published_bytes"]
    # Another machine: other folders, other memory, no copy of the model, and the origin is down.
    assert default_folder(str(tmp_path / "a")) != default_folder(str(tmp_path / "b"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another_hub"))
    sent, asked = hub.sent.total(), hub.asked.total()
    hub.status = 503
    given.clear()
    hidden = resident.model.embed_tokens(torch.randint(0, 128, (1, 9)))
    rotary = resident.model.rotary_emb(hidden, torch.arange(9)[None])
    want = hidden
    with LayerCache(tmp_path / "b", remote=url) as cache, IOOptimizer(cache) as optimizer:
        cache.set_template(NAME, lambda index: resident.model.layers[index])
        for index in range(NUM_LAYERS):
            layer = optimizer.get_layer_with_prefetch(NAME, index, NUM_LAYERS)
            assert sha256_of(layer) == sha256_of(layers[index])
            hidden = layer(hidden, position_embeddings=rotary)
            want = resident.model.layers[index](want, position_embeddings=rotary)
        stats = optimizer.get_stats()
    assert torch.equal(hidden, want)
    from_origin = hub.sent.total() - sent
    protocol = url.partition(":")[0]
    record_count(
        f"bytes of layers that a second node got over {protocol}://",
        nbytes_of(layers),
        {"from the store": given.total(), "from the origin": from_origin},
    )
    assert stats["prefetcher"]["from_remote"] == NUM_LAYERS
    assert given["blobs"] == stats["cache"]["remote_bytes"] == published
    assert 0 < given["keys"] < 1000 * NUM_LAYERS
    assert (from_origin, hub.asked.total()) == (0, asked)


def test_a_second_node_that_is_a_process_of_its_own(
    hub: HubServer, second: Callable[..., Any], tmp_path: Path, record_count: RecordCount
) -> None:
    url = f"file://{tmp_path}/shared"
    with LayerCache(tmp_path / "a", remote=url, publish=True) as first:
        layers = fill(first)
        published = first.get_stats()["published_bytes"]
    sent, asked = hub.sent.total(), hub.asked.total()
    for number, tier in enumerate(("remote_hits", "ssd_hits")):
        got = second(tmp_path / "b", url)
        assert got["layers"] == [sha256_of(layer) for layer in layers]
        assert (got[tier], got["misses"]) == (NUM_LAYERS, 0)
        assert got["remote_bytes"] == (0 if number else published)
    record_count(
        "bytes of layers that a second node, a process of its own, got",
        nbytes_of(layers),
        {"from the store": published, "from the origin": hub.sent.total() - sent},
    )
    assert (hub.sent.total(), hub.asked.total()) == (sent, asked)
