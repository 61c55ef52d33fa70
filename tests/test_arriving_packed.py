"""Packed models that stream while they are downloaded: the few bytes that describe their weights
come first, the weights themselves when they are needed; the bits are those of the fetched model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nexus_ext as nexus
from nexus_ext import hub as hub_module
from nexus_ext.arriving import Inbound
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.demo import make_llama
from nexus_ext.errors import CheckpointFormatError, DownloadCancelled
from nexus_ext.pretrained import plan_pretrained
from nexus_ext.quant.formats import PackedWeights, descriptions
from tests.arrivals import (
    BLOCK_BYTES,
    GENEROUS_SECONDS,
    NAME,
    SMALL,
    Dam,
    logits_of,
    meets,
    serve,
    spans_of,
    wait_for_arrivals,
)
from tests.hub_server import HubServer

pytestmark = pytest.mark.usefixtures("poisoned_arenas")

SMALL_LLAMA = {"num_blocks": 4, "hidden": 128, "intermediate": 256, "vocabulary": 128}
FORMATS = ["nf4", "nf4-nested", "int8", "mixed", "nf4 as others write it", "compressed-tensors"]


def write_as_others(packed: Path, folder: Path) -> Path:
    """The tensors in safetensors' own order, by dtype and name, so that descriptions lie among the
    weights; in two shards.
    """
    folder.mkdir()
    tensors = {}
    for file in packed.glob("*.safetensors"):
        tensors |= load_file(file)
    weight_map = {name: f"model-{1 + ('layers.2' in name)}.safetensors" for name in tensors}
    for shard in sorted(set(weight_map.values())):
        own = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        save_file(own, folder / shard)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    (folder / "config.json").write_text((packed / "config.json").read_text())
    return folder


def write_compressed(plain: Path, folder: Path) -> Path:
    """As compressed-tensors writes symmetric int8, a scale for each row."""
    folder.mkdir()
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors[name]
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((plain / "config.json").read_text())
    return folder


@pytest.fixture(scope="module", params=FORMATS)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_llama(folder / "plain", **SMALL_LLAMA)
    word = request.param.partition(" ")[0]
    if word == "compressed-tensors":
        return write_compressed(folder / "plain", folder / "packed")
    nexus.convert(folder / "plain", folder / "packed", word)
    if word == request.param:
        return folder / "packed"
    return write_as_others(folder / "packed", folder / "resaved")


@pytest.fixture
def hub(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    files = {file.name: file.read_bytes() for file in packed.iterdir()}
    yield from serve(files, tmp_path, monkeypatch)


def test_the_first_block_computes_before_the_last_has_come(hub: HubServer, packed: Path) -> None:
    with nexus.from_pretrained(packed) as model:
        want = logits_of(model)
    last = max(
        spans_of(packed, "model.layers.3."), key=lambda span: (span[2] - span[1], span)
    )  # of the weights: descriptions fill no block
    dam = Dam(hub, [(last[0], last[2] - BLOCK_BYTES, last[2])])
    budget = plan_pretrained(packed).minimum_bytes
    with nexus.from_pretrained(NAME, budget=budget) as model, ThreadPoolExecutor(1) as pool:
        is_through = threading.Event()
        handle = model.model.layers[2].register_forward_hook(  # type: ignore[union-attr,index]
            lambda *args: is_through.set()
        )
        future = pool.submit(logits_of, model)
        try:
            assert is_through.wait(GENEROUS_SECONDS)
            assert nexus.stats(model).is_arriving
            assert not future.done()
        finally:
            dam.is_open.set()
        assert torch.equal(future.result(GENEROUS_SECONDS), want)
        handle.remove()
        wait_for_arrivals()
        assert not nexus.stats(model).is_arriving
        assert torch.equal(logits_of(model), want)


def arrive() -> Inbound:
    source = hub_module.arrive(NAME, **SMALL)  # type: ignore[arg-type]
    assert isinstance(source, Inbound)
    return source


def test_descriptions_are_all_that_is_read_before_the_gate(hub: HubServer, packed: Path) -> None:
    """Whatever is no description may be held back: what is known of the weights is the same."""
    checkpoint = Checkpoint.open(packed)
    described = {(entry.file, entry.offset) for entry in descriptions(checkpoint)}
    blocks = {(file, offset // BLOCK_BYTES) for file, offset in described}
    first_blocks = {(number, 0) for number in range(len(checkpoint.files))}
    held = [
        (checkpoint.files[number].path.name, block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
        for number, file in enumerate(checkpoint.files)
        for block in range(file.stamp.size // BLOCK_BYTES)
        if (number, block) not in blocks | first_blocks and not _has_header(packed, number, block)
    ]
    hub.refuses = lambda *one: meets(one, held)
    source = arrive()
    try:
        found = source.open()
        source.bring([(one.file, one.offset, one.nbytes) for one in descriptions(found)])
        assert PackedWeights(found).names() == PackedWeights(checkpoint).names()
        for name in checkpoint.entries:
            here, there = PackedWeights(found).find(name), PackedWeights(checkpoint).find(name)
            assert (here is None) == (there is None)
            if here is not None and there is not None:
                assert (here.packing, here.parts) == (there.packing, there.parts)
                assert here.constants.keys() == there.constants.keys()
                for part, constant in here.constants.items():
                    assert torch.equal(constant, there.constants[part])
    finally:
        source.close()
    if described:
        with pytest.raises(DownloadCancelled):
            PackedWeights(found).names()


def _has_header(folder: Path, number: int, block: int) -> bool:
    path = Checkpoint.open(folder).files[number].path
    with path.open("rb") as file:
        return block * BLOCK_BYTES < 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("packed", ["nf4", "int8"], indirect=True)
def test_a_description_that_lies_is_refused_before_anything_streams(
    hub: HubServer, packed: Path
) -> None:
    checkpoint = Checkpoint.open(packed)
    entry = next(
        entry
        for entry in descriptions(checkpoint)
        if entry.name.endswith(("bitsandbytes__nf4", "weight_format"))
    )
    name = checkpoint.files[entry.file].path.name
    lie = bytearray(hub.files[name])
    lie[entry.offset : entry.offset + entry.nbytes] = b"\x07" * entry.nbytes
    hub.lies[name] = bytes(lie)
    with pytest.raises(CheckpointFormatError, match="got"):
        nexus.from_pretrained(NAME)
    wait_for_arrivals()  # or they would go on for ever
