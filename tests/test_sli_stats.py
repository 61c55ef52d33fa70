"""`nexus cache stats` over what a `LayerCache` keeps: one folder, or tiers together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from nexus_ext.cache import DiskTier, Tier
from nexus_ext.cache.totals import COUNTED
from nexus_ext.cli import app
from nexus_ext.cli_cache import joined
from nexus_ext.demo import make_llama
from nexus_ext.sli import IOOptimizer, LayerCache

NUM_LAYERS = 6
STORED_BYTES = 6 * 4096  # of a layer below, and a page
runner = CliRunner()


def stats(tmp_path: Path, *folders: Path) -> tuple[str, Any]:
    """What the command prints, and writes."""
    options = [word for folder in folders for word in ("--folder", str(folder))]
    report = tmp_path / "report.json"
    command = ["cache", "stats", *options, "--json", str(report)]
    result = runner.invoke(app, command, catch_exceptions=False, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result.stdout, json.loads(report.read_text())


def counted(**counts: int) -> dict[str, int]:
    return dict.fromkeys(COUNTED, 0) | counts


@pytest.mark.parametrize(
    ("folders", "hits", "misses"),
    [
        ([counted(hits=5, misses=2)], 5, 2),
        # Tiers: what the fast one has not, the slow one is asked for.
        ([counted(hits=5, misses=4), counted(hits=3, misses=1)], 8, 1),
        ([counted(hits=5), counted()], 5, 0),
        ([counted(misses=3), counted(hits=2, misses=1), counted(misses=1)], 2, 1),
        # Zones: the first one counts for all.
        ([counted(hits=5, misses=4), counted(), counted()], 5, 4),
        ([counted(), counted()], 0, 0),
    ],
)
def test_requests_of_several_folders_count_once(
    folders: list[dict[str, int]], hits: int, misses: int
) -> None:
    together = joined(folders)
    assert (together["hits"], together["misses"]) == (hits, misses)
    assert together.keys() == set(COUNTED)


def test_tiers_are_shown_together_and_one_by_one(tmp_path: Path) -> None:
    tiers = [
        Tier(tmp_path / "nvme", 2 * STORED_BYTES, compress="off"),
        Tier(tmp_path / "hdd", 20 * STORED_BYTES, compress="off"),
    ]
    with LayerCache(tiers=tiers, max_memory_cache_size_gb=0) as cache:
        for index in range(NUM_LAYERS):
            cache.cache_layer("m", index, nn.Linear(64, 64))
        for index in range(NUM_LAYERS + 2):  # two that are nowhere
            cache.get_layer("m", index)
        counters = cache.get_stats()
    text, found = stats(tmp_path, tmp_path / "nvme", tmp_path / "hdd")
    totals = found["totals"]
    assert (totals["hits"], totals["misses"]) == (6, 2) == (counters["hits"], counters["misses"])
    ratio = found["figures"][0]
    assert (ratio["value"], ratio["shown"], ratio["verdict"]) == (0.75, "75.0%", "missed")
    assert [one["totals"]["hits"] for one in found["folders"]] == [2, 4]
    assert [one["entries"] for one in found["folders"]] == [2, 4]
    assert [tier["hits"] for tier in counters["tiers"]] == [2, 4]
    assert "6 entries" in text
    assert 0 < text.index("33.3%") < text.index("66.7%")
    # Looking is no use of it.
    assert stats(tmp_path, tmp_path / "nvme", tmp_path / "hdd")[1]["totals"] == totals


def test_a_folder_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    with DiskTier(tmp_path / "one", "1MiB") as tier:
        tier.put("a", [torch.zeros(10, dtype=torch.uint8)])
        tier.load("a")
    _, found = stats(tmp_path, tmp_path / "one", tmp_path / "one")
    assert (found["totals"]["hits"], len(found["folders"])) == (1, 1)


def test_what_is_fetched_ahead_is_shown(tmp_path: Path) -> None:
    make_llama(tmp_path / "llama", num_blocks=4, hidden=64, intermediate=96, vocabulary=64)
    tiers = [Tier(tmp_path / "nvme", "1MiB"), Tier(tmp_path / "hdd", "1MiB")]
    with LayerCache(tiers=tiers) as cache, IOOptimizer(cache, prefetch_lookahead=1) as optimizer:
        for _ in range(2):
            for index in range(4):
                optimizer.get_layer_with_prefetch(tmp_path / "llama", index)
        counts = optimizer.get_stats()["prefetcher"]
    text, found = stats(tmp_path, tmp_path / "nvme", tmp_path / "hdd")
    figures = {one["name"]: one for one in found["figures"]}
    wanted = counts["prefetch_used"] / counts["prefetch_issued"]
    assert figures["prefetch hit rate"]["value"] == wanted
    assert figures["queue depth"]["value"] == counts["avg_queue_depth"]
    assert "not measured" not in " ".join(
        line for line in text.splitlines() if "prefetch" in line or "queue" in line
    )
