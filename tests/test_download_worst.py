"""Downloads at their worst moments: what may not come out wrong, hang or stay."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from http_server import Act, Asked, Server, Version, pattern

from nexus_ext import errors
from nexus_ext.download import Download, Downloader, patience
from nexus_ext.download.partial import Partial
from nexus_ext.download.ranges import Ranges
from nexus_ext.download.schedule import Schedule

PATIENCE_SECONDS = 60
BLOCK = 32 << 10
DATA = pattern(3 * BLOCK)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_FIRST_SECONDS", 0.001)
    monkeypatch.setattr(patience, "_MOST_SECONDS", 0.004)


def downloader(num_connections: int = 1, **options: Any) -> Downloader:
    settings: dict[str, Any] = {"timeout_seconds": PATIENCE_SECONDS} | options
    return Downloader(
        max_connections=num_connections, chunk_bytes=num_connections * BLOCK, **settings
    )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- wrong bytes -----------------------------------------------------------------------------------


def test_a_late_write_never_changes_what_was_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong block stands still before its write; meanwhile an answer with all brings it too."""
    is_writing, write = threading.Event(), Partial.write

    def script(asked: Asked) -> Act | None:
        if asked.span == (BLOCK, 2 * BLOCK):
            return Act(flip=5)
        if asked.span == (2 * BLOCK, 3 * BLOCK):
            assert is_writing.wait(PATIENCE_SECONDS)
            return Act(ignore_range=True)
        return None

    def slow(partial: Partial, data: bytes | memoryview, offset: int) -> None:
        if offset == BLOCK and data != DATA[BLOCK : 2 * BLOCK]:
            is_writing.set()
            with transfer.changed:
                landed = partial.landed
                assert transfer.changed.wait_for(
                    lambda: (
                        transfer.is_over
                        or (landed.covers(2 * BLOCK, 3 * BLOCK) and not landed.covers(0, 2 * BLOCK))
                    ),
                    PATIENCE_SECONDS,
                )
        write(partial, data, offset)

    monkeypatch.setattr(Partial, "write", slow)
    target = tmp_path / "file"
    with Server(DATA, script) as server, downloader(2) as loader:
        gate = server.gate = threading.Event()
        arriving = loader.start(Download(server.url, target, sha256=sha256(DATA)))
        transfer = arriving._transfer
        gate.set()
        with pytest.raises(errors.ContentMismatch):
            arriving.result()
    assert os.listdir(tmp_path) == []


def test_pieces_under_a_weak_etag_are_never_put_together(tmp_path: Path) -> None:
    """Equal weak ETags do not promise equal bytes."""
    new = pattern(len(DATA), seed=1)

    def script(asked: Asked) -> None:
        if len(server.asked) > 1:
            server.version = Version(new, 'W/"v1"')

    with Server(DATA, script, etag='W/"v1"') as server, downloader() as loader:
        loader.fetch(Download(server.url, tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() in (DATA, new)


# -- waiting for ever ------------------------------------------------------------------------------


def test_what_is_wanted_stays_so_until_it_has_landed() -> None:
    """Though others look for work while its request is under way, and that fails."""
    schedule, landed = Schedule(BLOCK), Ranges()
    schedule.begin(landed, len(DATA))
    schedule.want([(2 * BLOCK, 3 * BLOCK)])
    span = schedule.take(len(DATA), True, landed)
    assert span == (2 * BLOCK, 3 * BLOCK)
    assert schedule.take(len(DATA), True, landed) is None
    schedule.give_back(landed, span)
    assert schedule.take(len(DATA), True, landed) == span
    schedule.give_back(landed, span)
    assert schedule.take(len(DATA), False, landed) == span  # before the rest


def test_what_had_landed_in_a_part_that_was_given_up_is_wanted_again() -> None:
    schedule, landed = Schedule(BLOCK), Ranges()
    schedule.begin(landed, len(DATA))
    schedule.want([(0, BLOCK)])
    assert schedule.take(len(DATA), True, landed) == (0, BLOCK)
    landed.add(0, BLOCK)
    assert schedule.take(len(DATA), True, landed) is None
    schedule.begin(Ranges(), len(DATA))
    assert schedule.take(len(DATA), True, Ranges()) == (0, BLOCK)


def test_a_file_of_untold_length_that_became_shorter_is_fetched_anew(tmp_path: Path) -> None:
    def script(asked: Asked) -> Act:
        if len(server.asked) == 1:
            return Act(chunked=True, ignore_range=True, cut=2 * BLOCK)
        server.version = Version(DATA[:BLOCK], None)
        return Act(chunked=True, ignore_range=True)

    with Server(DATA, script, etag=None) as server, downloader() as loader:
        assert loader.fetch(Download(server.url, tmp_path / "file")).nbytes == BLOCK
    assert (tmp_path / "file").read_bytes() == DATA[:BLOCK]
    assert os.listdir(tmp_path) == ["file"]


# -- without bounds --------------------------------------------------------------------------------


def test_a_body_without_end_ends_where_the_file_does(tmp_path: Path) -> None:
    data = pattern(4 << 20)
    endless = Act(chunked=True, ignore_range=True)
    with Server(data, always=endless) as server, downloader(max_retries=0) as loader:
        with pytest.raises(errors.ContentMismatch, match="asked for"):
            loader.fetch(Download(server.url, tmp_path / "file", nbytes=5))
        assert loader.stats().bytes_received <= BLOCK
    assert os.listdir(tmp_path) == []
