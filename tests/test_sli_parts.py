"""Zones, downloads and packing under the guide's names: what the guide's own blocks do not show."""

from __future__ import annotations

import copy
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nexus_ext.demo import make_llama
from nexus_ext.download import Download
from nexus_ext.errors import ConfigError, ContentMismatch, SourceMissing, WriteError
from nexus_ext.quant import MixedConfig, NF4Config, PackedLinear
from nexus_ext.sli import (
    IOOptimizer,
    LayerCache,
    ParallelDownloader,
    SSDWearLeveling,
    download_from_hub,
    quantize_layer,
)
from tests.http_server import Act, Server, pattern

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


# -- zones -----------------------------------------------------------------------------------------


def test_the_zone_with_the_fewest_bytes_is_next_whoever_wrote_them(tmp_path: Path) -> None:
    wear = SSDWearLeveling(tmp_path, num_zones=3)
    assert [zone.name for zone in wear.zones] == ["zone_0", "zone_1", "zone_2"]
    assert {stat.S_IMODE(zone.stat().st_mode) for zone in wear.zones} == {0o700}
    (wear.zones[0] / "a").write_bytes(b"x" * 10)
    (wear.zones[2] / "b").write_bytes(b"x" * 5)
    assert wear.get_write_zone() == wear.zones[1]
    (wear.zones[1] / "c").write_bytes(b"x" * 100)
    assert wear.get_write_zone() == wear.zones[2]


def test_zones_without_bytes_take_turns(tmp_path: Path) -> None:
    wear = SSDWearLeveling(tmp_path, num_zones=3)
    assert [wear.zones.index(wear.get_write_zone()) for _ in range(6)] == [0, 1, 2, 0, 1, 2]


def test_bytes_count_once_and_for_ever(tmp_path: Path) -> None:
    wear = SSDWearLeveling(tmp_path, num_zones=2)
    path = wear.zones[0] / "a"
    path.write_bytes(b"x" * 10)
    for _ in range(2):
        assert list(wear.written_bytes().values()) == [10, 0]
    path.unlink()
    path.write_bytes(b"y" * 20)
    os.utime(path, ns=(1, 1))  # however coarse the clock is
    assert list(wear.written_bytes().values()) == [30, 0]
    path.unlink()
    again = SSDWearLeveling(tmp_path, num_zones=2)
    assert list(again.written_bytes().values()) == [30, 0]
    (again.zones[0] / ".written.json").write_text("nonsense")
    assert list(again.written_bytes().values()) == [0, 0]


def test_zones_may_be_devices(tmp_path: Path) -> None:
    wear = SSDWearLeveling([tmp_path / "nvme0", tmp_path / "nvme1"])
    assert wear.zones == [tmp_path / "nvme0", tmp_path / "nvme1"]


@pytest.mark.parametrize("number", [0, -1, 1.5, True, 100000])
def test_numbers_of_zones_that_cannot_be(tmp_path: Path, number: Any) -> None:
    with pytest.raises(ConfigError, match="num_zones"):
        SSDWearLeveling(tmp_path, num_zones=number)


def test_folders_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        SSDWearLeveling(tmp_path / "file")
    with pytest.raises(ConfigError, match="needs a zone"):
        SSDWearLeveling([])
    wear = SSDWearLeveling(tmp_path / "zones")
    (wear.zones[0] / "a").write_bytes(b"x")
    (wear.zones[0] / ".written.json").mkdir()
    with pytest.raises(WriteError, match="could not be written"):
        wear.get_write_zone()


def test_an_optimizer_offers_zones_beside_its_cache(tmp_path: Path) -> None:
    with (
        LayerCache(tmp_path) as cache,
        IOOptimizer(cache, enable_wear_leveling=True) as optimizer,
    ):
        assert optimizer.wear_leveling is not None
        zone = optimizer.wear_leveling.get_write_zone()
        (zone / "mine").write_bytes(b"x" * 7)
        assert sum(optimizer.get_stats()["wear_leveling"].values()) == 7
        assert zone.is_relative_to(tmp_path)


# -- downloads -------------------------------------------------------------------------------------


def test_downloads_that_fail_leave_the_others(tmp_path: Path) -> None:
    data = pattern(100_000)
    with (
        Server(data) as good,
        Server(always=Act(status=404)) as bad,
        ParallelDownloader(max_connections=4) as downloader,
    ):
        with pytest.raises(SourceMissing):
            downloader.download_layers_parallel(
                [(bad.url, tmp_path / "bad"), (good.url, tmp_path / "good")]
            )
        with pytest.raises(ContentMismatch):
            downloader.download_layers_parallel(
                [Download(good.url, tmp_path / "other", sha256="0" * 64)]
            )
        stats = downloader.get_stats()
    assert (tmp_path / "good").read_bytes() == data
    assert not (tmp_path / "bad").exists()
    assert not (tmp_path / "other").exists()
    assert (stats.finished_downloads, stats.failed_downloads) == (1, 2)


def test_connections_are_used_again(tmp_path: Path) -> None:
    with Server(pattern(1000)) as server, ParallelDownloader(max_connections=1) as downloader:
        for number in range(5):
            downloader.download_layers_parallel([(server.url, tmp_path / str(number))])
        assert downloader.get_stats().connections_reused > 0
        assert server.num_connections == downloader.get_stats().connections_opened


@pytest.mark.parametrize("number", [0, -1, 1000])
def test_numbers_of_connections_that_cannot_be(tmp_path: Path, number: int) -> None:
    with pytest.raises(ConfigError, match="max_connections"):
        ParallelDownloader(max_connections=number)


def test_an_optimizer_without_parallel_downloads(tmp_path: Path) -> None:
    with (
        LayerCache(tmp_path) as cache,
        IOOptimizer(cache, enable_parallel_download=False) as optimizer,
    ):
        assert optimizer.downloader is None
        assert optimizer.get_stats()["downloader"] == {"active_downloads": 0}


# -- packing ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    path = folder / "llama"
    make_llama(
        path, num_blocks=2, hidden=256, intermediate=704, vocabulary=64, dtype=torch.bfloat16
    )
    return path


@pytest.mark.parametrize(
    ("mode", "least", "most"), [("nf4", 0.26, 0.31), ("int8", 0.50, 0.54), ("mixed", 0.28, 0.40)]
)
def test_sizes_of_packed_layers(
    llama: Path, tmp_path: Path, mode: str, least: float, most: float
) -> None:
    torch.save(download_from_hub(llama, 0), tmp_path / "plain.pt")
    layer = quantize_layer(download_from_hub(llama, 0), mode)
    torch.save(layer, tmp_path / "packed.pt")
    share = (tmp_path / "packed.pt").stat().st_size / (tmp_path / "plain.pt").stat().st_size
    assert least < share < most
    loaded = torch.load(tmp_path / "packed.pt", weights_only=False)
    x = torch.randn(1, 3, 256, dtype=torch.bfloat16)
    assert torch.equal(loaded(x), layer(x))


def test_a_packed_layer_lets_go_of_the_plain_one(tmp_path: Path) -> None:
    with LayerCache(tmp_path) as cache:
        cache.cache_layer("m", 0, nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512)))
        layer: Any = quantize_layer(cache.get_layer("m", 0))  # type: ignore[arg-type]
        assert layer[1].weight.untyped_storage().nbytes() == layer[1].weight.nbytes
        assert type(layer[0]) is PackedLinear


def test_a_config_wins_over_a_mode() -> None:
    layer = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    packed: Any = quantize_layer(
        copy.deepcopy(layer), mode="int8", config=NF4Config(blocksize=32, skip=("1",))
    )
    assert packed[0].packing.blocksize == 32
    assert torch.equal(packed[1].weight, layer[1].weight)
    mixed = MixedConfig(attention=None, attention_patterns=("0",))
    assert type(quantize_layer(copy.deepcopy(layer), config=mixed)[0]) is nn.Linear  # type: ignore[index]


def test_packing_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="nf4"):
        quantize_layer(nn.Linear(64, 64), mode="int3")
    with pytest.raises(ConfigError, match="nn\\.Linear"):
        quantize_layer(nn.ReLU())
