"""Processes that die in the middle, and processes that work side by side: see cache_children.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import RecordCount

CHILDREN = Path(__file__).parent / "cache_children.py"
NUM_CYCLES = 200

Run = Callable[..., dict[str, int]]


@pytest.fixture
def run() -> Run:
    """Runs the program; what it printed is in the log of a test that fails."""

    def start(*args: object) -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, str(CHILDREN), *map(str, args)],
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
            timeout=550,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        counts: dict[str, int] = json.loads(done.stdout)
        print(counts, done.stderr[-3000:])
        return counts

    return start


def test_who_is_killed_loses_nothing_that_was_acknowledged(
    run: Run, tmp_path: Path, record_count: RecordCount
) -> None:
    check(run("kills", tmp_path, NUM_CYCLES, 17), record_count, "the cache")


def test_who_is_killed_while_entries_move_and_are_fetched_loses_nothing(
    run: Run, tmp_path: Path, record_count: RecordCount
) -> None:
    counts = run("kill-tiers", tmp_path, NUM_CYCLES, 23)
    check(counts, record_count, "tiers over a shared store")
    assert counts["over budget"] == counts["dropped"] == 0
    assert counts["fetched"] > 0


def check(counts: dict[str, int], record_count: RecordCount, whom: str) -> None:
    told = ("killed", "checked", "unfinished", "lost", "torn", "corrupt", "temporaries")
    outcomes = {name: counts.get(name, 0) for name in told}
    record_count(f"kill -9 cycles of {whom}", counts["cycles"], outcomes)
    assert counts["cycles"] == NUM_CYCLES
    assert counts["checked"] > NUM_CYCLES
    # Some died while they wrote: else nothing was tried.
    assert counts["unfinished"] > 0
    for what in (
        "ended",
        "lost",
        "returned",
        "torn",
        "corrupt",
        "rebuilt",
        "temporaries",
        "unknown files",
    ):
        assert counts[what] == 0, what


@pytest.mark.parametrize("num_processes", [2, 8])
def test_processes_share_the_same_keys(
    run: Run, tmp_path: Path, num_processes: int, record_count: RecordCount
) -> None:
    counts = run("together", tmp_path / "cache", num_processes, 480 // num_processes, 5)
    outcomes = {name: counts.get(name, 0) for name in ("bad", "wrong", "over budget")}
    record_count("processes on the same keys of the cache", counts["exit 0"], outcomes)
    assert counts["exit 0"] == num_processes
    assert counts["bad"] == counts["wrong"] == counts["over budget"] == 0
    assert counts["blobs"] > 0


def test_locks_that_lock_nothing_cost_no_right_byte(run: Run, tmp_path: Path) -> None:
    counts = run("together", tmp_path / "cache", 4, 100, 9, "no-locks")
    assert counts["exit 0"] == 4
    assert counts["bad"] == counts["wrong"] == 0
