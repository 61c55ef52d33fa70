"""`nexus cache`: what it shows is what is there, and what all processes counted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nexus_ext.cache import DiskTier
from nexus_ext.cache.totals import COUNTED
from nexus_ext.cli import app
from nexus_ext.cli_cache import figures_of
from nexus_ext.errors import ConfigError

PAGE = 4096
runner = CliRunner()


def invoke(*arguments: object, code: int = 0) -> str:
    command = ["cache", *map(str, arguments)]
    result = runner.invoke(app, command, catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.stdout


def written(tmp_path: Path, *arguments: object, code: int = 0) -> Any:
    report = tmp_path / "report.json"
    invoke(*arguments, "--json", report, code=code)
    return json.loads(report.read_text())


def data(number: int) -> torch.Tensor:
    return torch.full((PAGE,), number, dtype=torch.uint8)


@pytest.fixture
def folder(nexus_home: Path) -> Path:
    """The default cache, with three layers; five uses of two of them, and a miss."""
    path = nexus_home / "cache"
    with DiskTier(path, "1MiB") as tier:
        for index in range(3):
            tier.put(f"model/{index}", [data(index)], kind="layer")
        for _ in range(3):
            tier.load("model/0")
    with DiskTier(path, "1MiB") as tier:  # another day
        tier.load("model/1")
        tier.load("model/1")
        tier.load("model/9")
    return path


def test_nothing_is_made_where_there_is_no_cache(nexus_home: Path, tmp_path: Path) -> None:
    assert "0 entries" in invoke("ls")
    assert written(tmp_path, "ls") == []
    assert "there is no cache" in invoke("verify")
    assert "there is no cache" in invoke("stats")
    assert "removed 0 files" in invoke("clear")
    assert not (nexus_home / "cache").exists()
    with pytest.raises(ConfigError, match="A cache is a folder"):
        invoke("ls", "--folder", tmp_path / "nowhere")


def test_ls_shows_sizes_and_uses_the_latest_first(folder: Path, tmp_path: Path) -> None:
    text = invoke("ls")
    assert "3 entries, 12.00 KiB" in text
    rows = [line for line in text.splitlines() if "model/" in line]
    assert [next(k for k in ("model/0", "model/1", "model/2") if k in row) for row in rows] == [
        "model/1",
        "model/0",
        "model/2",
    ]
    assert all(" ago" in row for row in rows)
    entries = {entry["key"]: entry for entry in written(tmp_path, "ls", "--folder", folder)}
    assert [entries[f"model/{index}"]["uses"] for index in range(3)] == [3, 2, 0]
    assert {entry["nbytes"] for entry in entries.values()} == {PAGE}


def test_stats_are_of_all_processes_beside_their_targets(folder: Path, tmp_path: Path) -> None:
    text = invoke("stats")
    assert "83.3%" in text  # 5 of 6
    for target in ("> 85 % missed", "< 100 ms", "> 70 %", "2-4"):
        assert target in text
    assert text.count("not measured") == 2
    found = written(tmp_path, "stats")
    totals = found["totals"]
    assert {name: totals[name] for name in ("hits", "misses", "puts", "evictions", "reads")} == {
        "hits": 5,
        "misses": 1,
        "puts": 3,
        "evictions": 0,
        "reads": 5,
    }
    assert totals["read_bytes"] == 5 * PAGE
    assert totals["read_ns"] > 0
    # Looking is no use of it.
    assert written(tmp_path, "stats")["totals"] == totals


def test_what_is_fetched_ahead_is_counted_by_who_does_it(folder: Path, tmp_path: Path) -> None:
    with DiskTier(folder, "1MiB") as tier:
        tier.count("prefetched", 10)
        tier.count("prefetch_used", 8)
        tier.count("queue_looks", 2)
        tier.count("queue_depths", 6)
        with pytest.raises(ConfigError, match="What is counted"):
            tier.count("anything")
        assert tier.totals()["prefetched"] == 10
    figures = {one["name"]: one for one in written(tmp_path, "stats")["figures"]}
    assert figures["prefetch hit rate"]["value"] == 0.8
    assert figures["queue depth"]["value"] == 3
    assert figures["queue depth"]["verdict"] == "met"


def test_figures_are_judged() -> None:
    counted = dict.fromkeys(COUNTED, 0)
    assert [one["shown"] for one in figures_of(counted)] == ["not measured"] * 4
    good = counted | {"hits": 9, "misses": 1, "reads": 2, "read_ns": 100_000_000}
    assert [one["verdict"] for one in figures_of(good)] == ["met", "met", "", ""]
    bad = counted | {"hits": 1, "misses": 1, "reads": 1, "read_ns": 200_000_000}
    bad |= {"prefetched": 2, "prefetch_used": 1, "queue_looks": 1, "queue_depths": 9}
    assert [one["verdict"] for one in figures_of(bad)] == ["missed"] * 4
    assert [one["shown"] for one in figures_of(bad)] == ["50.0%", "200.0 ms", "50.0%", "9.0"]


def test_totals_survive_a_lost_process_but_for_its_last_seconds(nexus_home: Path) -> None:
    first = DiskTier(nexus_home / "cache", "1MiB")
    second = DiskTier(nexus_home / "cache", "1MiB")
    first.put("a", [data(1)])
    first.load("a")
    second.load("a")
    second.close()
    # The first one has told nothing of its hit yet, or all: nothing is counted twice.
    first.close()
    with DiskTier(nexus_home / "cache", "1MiB") as third:
        assert (third.totals()["hits"], third.totals()["puts"]) == (2, 1)


def test_a_lost_index_starts_the_totals_anew(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("index-*"):
        path.unlink()
    found = written(tmp_path, "stats")
    assert found["totals"]["hits"] == 0
    assert found["zones"][0]["entries"] == 3


def test_verify_finds_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    assert "3 files, 12.00 KiB right; 0 wrong" in invoke("verify")
    with DiskTier(folder, "1MiB") as tier:
        path = tier.entries()[0].path
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    found = written(tmp_path, "verify", code=1)
    assert (found["num_blobs"], len(found["bad"])) == (2, 1)
    assert found["bad"][0][0] == str(path)
    assert "2 files" in invoke("verify")


def test_clear_removes_everything(folder: Path, tmp_path: Path) -> None:
    found = written(tmp_path, "clear")
    assert found == {"removed": 3, "freed_bytes": 3 * 2 * PAGE}
    assert written(tmp_path, "ls") == []
    assert list(folder.rglob("*.nx")) == []


def test_the_commands_do_not_shrink_a_cache_to_a_budget(folder: Path) -> None:
    invoke("stats")
    invoke("ls")
    with DiskTier(folder, "1MiB") as tier:
        assert len(tier.entries()) == 3


def test_a_key_is_shown_as_it_is(nexus_home: Path) -> None:
    with DiskTier(nexus_home / "cache", "1MiB") as tier:
        tier.put("[red]model[/]", [data(1)])
    assert "[red]model[/]" in invoke("ls")
