"""Downloads in bad weather: two thousand bad networks, two hundred kills, several processes."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_server import Act, Asked, Server, pattern

import nexus_ext
from nexus_ext import errors
from nexus_ext.download import Download, Downloader, patience
from tests.conftest import RecordCount

PATIENCE_SECONDS = 120
NUM_NETWORKS = 2000
NUM_AT_ONCE = 50
BLOCK = 4 << 10


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- bad networks ----------------------------------------------------------------------------------

SMALL = pattern(5 * BLOCK + 77)
RIGHT = sha256(SMALL)


def weather(rng: random.Random) -> Act:
    """One answer of a bad network."""
    some = rng.randrange(len(SMALL))
    return rng.choice(
        [
            Act(),
            Act(cut=some % BLOCK),
            Act(cut=some % BLOCK, reset=True),
            Act(silent=True),
            Act(silent=True, reset=True),
            Act(ignore_range=True),
            Act(ignore_range=True, cut=some),
            Act(ignore_range=True, chunked=True, cut=some),
            Act(chunked=True),
            Act(halve=True),
            Act(until_close=True),
            Act(lie=rng.randrange(-9, 9)),
            Act(headers={"Content-Range": None}),
            Act(headers={"Content-Length": str(some)}, cut=some),
            Act(headers={"ETag": None}),
            Act(headers={"ETag": f'"{some % 2}"'}),
            Act(headers={"Content-Encoding": "gzip"}),
            Act(headers={"Content-Type": "text/html"}),
            Act(status=rng.choice([400, 403, 404, 408, 416, 429, 500, 502, 503])),
            Act(status=503, headers={"Retry-After": "0"}),
            Act(redirect=f"/again{some}"),
            Act(raw=rng.randbytes(some % 200)),
            Act(extra=rng.randbytes(20)),
        ]
    )


class Networks:
    """A seeded sequence of answers for each file, told apart by the query."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, Iterator[Act | None]] = {}

    def __call__(self, asked: Asked) -> Act | None:
        name = asked.headers["x-network"]
        with self._lock:
            return next(self._of.setdefault(name, self._answers(int(name))))

    def _answers(self, seed: int) -> Iterator[Act | None]:
        rng = random.Random(seed)
        badness = rng.choice([0.05, 0.2, 0.5, 0.9])
        while True:
            yield weather(rng) if rng.random() < badness else None


def test_two_thousand_bad_networks_give_the_right_file_or_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_count: RecordCount
) -> None:
    monkeypatch.setattr(patience, "_FIRST_SECONDS", 0.0005)
    monkeypatch.setattr(patience, "_MOST_SECONDS", 0.002)
    outcomes: Counter[str] = Counter()
    with (
        Server(SMALL, Networks()) as server,
        Downloader(max_connections=4, chunk_bytes=4 * BLOCK, max_retries=4) as loader,
    ):
        for first in range(0, NUM_NETWORKS, NUM_AT_ONCE):
            runs = []
            for seed in range(first, first + NUM_AT_ONCE):
                # Redirects stay on the host, so the header comes along; every second has a digest.
                digest = RIGHT if seed % 2 else None
                headers = {"X-Network": str(seed)}
                path = tmp_path / str(seed) / "file"
                runs.append(loader.start(Download(server.url, path, None, digest, headers)))
            for seed, run in enumerate(runs, first):
                outcomes[outcome(run, tmp_path / str(seed))] += 1
    record_count("bad networks of downloads", outcomes.total(), outcomes)
    assert outcomes.total() == NUM_NETWORKS
    assert outcomes["right"] >= NUM_NETWORKS // 10
    assert len(outcomes) >= 5


def outcome(run: Any, folder: Path) -> str:
    try:
        fetched = run.result()
    except (errors.DownloadError, errors.WriteError) as error:
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        kept = {name.rpartition(".")[2] for name in names}
        may_keep = isinstance(error, errors.SourceUnavailable | errors.AccessDenied)
        assert kept == set() or (may_keep and kept == {"journal", "part"})
        return type(error).__name__
    names = sorted(os.listdir(folder))
    assert (folder / "file").read_bytes() == SMALL
    assert (fetched.nbytes, fetched.sha256) == (len(SMALL), RIGHT)
    assert names == ["file"]
    return "right"


# -- kills and processes ---------------------------------------------------------------------------


class Nursery:
    """Forks children that download: see download_child.py."""

    def __init__(self) -> None:
        child = Path(__file__).parent / "download_child.py"
        self._process = subprocess.Popen(
            [sys.executable, str(child), str(Path(nexus_ext.__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, **what: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def begin(self, url: str, path: Path, **options: Any) -> int:
        settings = {"sha256": None, "chunk_bytes": 4 * BLOCK, "flock": True} | options
        return self._ask(url=url, path=str(path), **settings)

    def end(self, pid: int) -> int:
        """Wait until it has ended; its status."""
        return self._ask(reap=pid)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(PATIENCE_SECONDS) == 0
        self._process.stdout.close()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


NUM_KILLS = 200
LARGE = pattern(400 * BLOCK + 5)


class Countdown:
    """Lets so many requests pass, then says so and answers no more until it is set anew."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left = 0
        self.is_spent = threading.Event()

    def allow(self, num_requests: int) -> None:
        with self._changed:
            self._left = num_requests
            self.is_spent.clear()
            self._changed.notify_all()

    def __call__(self, asked: Asked) -> Act | None:
        with self._changed:
            self._left -= 1
            if self._left < 0:
                self.is_spent.set()
                return Act(cut=0, stall=True)
        return None


def test_a_kill_costs_a_chunk_at_most(
    tmp_path: Path, nursery: Nursery, record_count: RecordCount
) -> None:
    rng = random.Random(1)
    countdown = Countdown()
    kills = rounds = 0
    with Server(LARGE, countdown) as server:
        while kills < NUM_KILLS:
            rounds += 1
            target = tmp_path / f"file{rounds}"
            sent_before, kills_before = server.sent, kills
            while True:
                countdown.allow(rng.randrange(1, 40) if kills < NUM_KILLS else 10**9)
                pid = nursery.begin(server.url, target)
                # Killed while all connections are busy, or it was the last one and is through.
                deadline = time.monotonic() + PATIENCE_SECONDS
                while not countdown.is_spent.wait(0.002) and not target.exists():
                    assert time.monotonic() < deadline
                if target.exists():
                    assert nursery.end(pid) == 0
                    break
                os.kill(pid, signal.SIGKILL)
                assert nursery.end(pid) == -signal.SIGKILL
                kills += 1
            assert target.read_bytes() == LARGE
            assert set(os.listdir(tmp_path)) == {f"file{n + 1}" for n in range(rounds)}
            served = server.sent - sent_before
            assert served <= len(LARGE) + (kills - kills_before) * 4 * BLOCK
    record_count("download kills", kills, {"files that were right in the end": rounds})


@pytest.mark.parametrize("flock", [True, False])
@pytest.mark.parametrize("digest", [None, sha256(LARGE)])
def test_processes_that_fetch_the_same_file_do_not_disturb_each_other(
    tmp_path: Path, nursery: Nursery, flock: bool, digest: str | None
) -> None:
    rng = random.Random(2)
    count = itertools.count()
    with Server(LARGE, lambda asked: Act(cut=99) if next(count) % 50 == 0 else None) as server:
        for _ in range(5):
            pids = [
                nursery.begin(server.url, tmp_path / "file", sha256=digest, flock=flock)
                for _ in range(4)
            ]
            killed = rng.sample(pids, 2)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            statuses = {pid: nursery.end(pid) for pid in pids}
            assert [statuses[pid] for pid in pids if pid not in killed] == [0, 0]
            assert (tmp_path / "file").read_bytes() == LARGE
        last = nursery.begin(server.url, tmp_path / "file", sha256=digest, flock=flock)
        assert nursery.end(last) == 0
    assert (tmp_path / "file").read_bytes() == LARGE
    assert os.listdir(tmp_path) == ["file"]


def test_two_versions_never_mix_when_locks_are_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two downloaders, one target, no digest, two versions: the file is one of them."""
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    old, new = pattern(40 * BLOCK, 1), pattern(40 * BLOCK, 2)
    for _ in range(10):
        with (
            Server(old, etag='"old"') as one,
            Server(new, etag='"new"') as two,
            Downloader(max_connections=2, chunk_bytes=2 * BLOCK) as loader,
        ):
            runs = [
                loader.start(Download(server.url, tmp_path / "file")) for server in (one, two, one)
            ]
            assert {run.result().sha256 for run in runs} == {sha256(old), sha256(new)}
        assert (tmp_path / "file").read_bytes() in (old, new)
        assert os.listdir(tmp_path) == ["file"]
