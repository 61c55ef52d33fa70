"""Models on a hub of one's own, whose bytes come when a test lets them: for all that streams while
it is downloaded.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nexus_ext import hub as hub_module
from nexus_ext import pretrained
from nexus_ext.checkpoint import Checkpoint
from tests.hub_server import HubServer

NAME = "org/tiny"
PROMPT = torch.tensor([[1, 5, 9, 2]])
# Blocks of 4 KiB, four requests at a time: a group is many of them.
BLOCK_BYTES = 4096
SMALL = {"max_connections": 4, "chunk_bytes": 4 * BLOCK_BYTES}
GENEROUS_SECONDS = 300


def serve(
    files: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    server = HubServer(NAME, files)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(pretrained, "arrive", functools.partial(hub_module.arrive, **SMALL))
    yield server
    server.before = lambda file, first, end: None
    server.close()
    wait_for_arrivals()


def wait_for_arrivals() -> None:
    """Until nothing is on its way any more, and nobody hashes or holds a part."""
    for thread in threading.enumerate():
        if thread.name == "nexus-arrival" or thread.name.startswith("nexus-download"):
            thread.join(GENEROUS_SECONDS)
            assert not thread.is_alive()


def logits_of(model: torch.nn.Module, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(prompt).logits
    return logits


def spans_of(folder: Path, prefix: str) -> list[tuple[str, int, int]]:
    """(file, first, end) of all tensors whose names begin so, as far as they fill blocks that hold
    nothing else.
    """
    checkpoint = Checkpoint.open(folder)
    found = [
        (
            checkpoint.files[entry.file].path.name,
            -(-entry.offset // BLOCK_BYTES) * BLOCK_BYTES,
            (entry.offset + entry.nbytes) // BLOCK_BYTES * BLOCK_BYTES,
        )
        for entry in checkpoint.entries.values()
        if entry.name.startswith(prefix)
    ]
    return [(file, first, end) for file, first, end in found if first < end]


def meets(one: tuple[str, int, int], others: list[tuple[str, int, int]]) -> bool:
    file, first, end = one
    return any(file == name and first < stop and start < end for name, start, stop in others)


class Dam:
    """Holds every answer that meets some bytes, until it is opened."""

    def __init__(self, hub: HubServer, spans: list[tuple[str, int, int]]) -> None:
        self.is_open = threading.Event()
        self.is_reached = threading.Event()
        self._spans = spans
        hub.before = self._before

    def _before(self, file: str, first: int, end: int) -> None:
        if meets((file, first, end), self._spans):
            self.is_reached.set()
            assert self.is_open.wait(GENEROUS_SECONDS)
