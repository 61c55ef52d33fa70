"""The I/O guide runs: every code block, as it stands there, and what it promises is looked at.

Two texts are changed: the package's name, and a mount point of another machine.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import http.server
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nexus_ext.demo import make_llama
from nexus_ext.quant import NF4Config
from nexus_ext.sli import IOOptimizer, LayerCache, ParallelDownloader, download_from_hub
from nexus_ext.sli.presets import PRESETS
from tests.guide_snippets import CLAIMS, SNIPPETS

NUM_LAYERS = 6
GB = 10**9
CLOSED = (LayerCache, IOOptimizer, ParallelDownloader)

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    """A model of six blocks on disk."""
    path = folder / "llama"
    make_llama(path, num_blocks=NUM_LAYERS, hidden=128, intermediate=352, vocabulary=128)
    return path


@pytest.fixture(scope="module")
def resident(llama: Path) -> Any:
    """The same in memory, as transformers has it."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ~ is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NEXUS_HOME")
    return tmp_path / "home"


@pytest.fixture
def run(home: Path, llama: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a block with some names; returns all names there are then."""
    made: list[Any] = []

    def run_block(name: str, **given: Any) -> dict[str, Any]:
        text = SNIPPETS[name].replace("nexus_final", "nexus_ext")
        text = text.replace("/nvme/nexus_cache", str(home / "nvme"))
        names: dict[str, Any] = {
            "torch": torch,
            "model_id": str(llama),
            "num_layers": NUM_LAYERS,
            **given,
        }
        exec(compile(text, f"guide: {name}", "exec"), names)
        made.extend(one for one in names.values() if isinstance(one, CLOSED))
        return names

    yield run_block
    for one in reversed(made):
        one.close()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[LayerCache]:
    with LayerCache(tmp_path / "cache") as made:
        yield made


def prompt(resident: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedded tokens, and what the model makes of them."""
    ids = torch.randint(0, 128, (2, 9))
    return resident.model.embed_tokens(ids), resident(ids).logits


def logits(resident: Any, output: torch.Tensor) -> torch.Tensor:
    return resident.lm_head(resident.model.norm(output))


def test_all_blocks_of_the_guide_are_run_here() -> None:
    here = Path(__file__).read_text()
    assert [name for name in SNIPPETS if f'"{name}"' not in here] == []
    assert len(SNIPPETS) == 10


def test_caching_a_layer_costs_one_download_for_ever(
    run: Callable[..., dict[str, Any]], home: Path, resident: Any
) -> None:
    asked: list[tuple[str, int]] = []

    def download(model: str, index: int) -> nn.Module:
        asked.append((model, index))
        return download_from_hub(model, index)

    first = run("caching", layer_idx=3, download_from_hub=download)
    assert asked == [(first["model_id"], 3)]
    blobs = list((home / ".cache/nexus/layers/blobs").rglob("*.nx"))
    assert len(blobs) == 1
    nbytes = sum(p.nbytes for p in resident.model.layers[3].parameters())
    assert nbytes < blobs[0].stat().st_size < nbytes + 16384

    first["cache"].close()  # the last one: nothing stays in memory
    second = run("caching", layer_idx=3, download_from_hub=download)
    assert len(asked) == 1
    stats = second["cache"].get_stats()
    assert (stats["ssd_hits"], stats["memory_hits"], stats["misses"]) == (1, 0, 0)
    hidden, _ = prompt(resident)
    rotary = resident.model.rotary_emb(hidden, torch.arange(9)[None])
    expected = resident.model.layers[3](hidden, position_embeddings=rotary)
    assert torch.equal(second["layer"](hidden), expected)

    again = second["cache"].get_layer("model", 3)
    assert second["cache"].get_stats()["memory_hits"] == 1
    assert torch.equal(again(hidden), expected)


def test_fetching_ahead_gives_the_models_own_answer(
    run: Callable[..., dict[str, Any]], cache: LayerCache, resident: Any
) -> None:
    hidden, expected = prompt(resident)
    names = run("prefetching", cache=cache, output=hidden)
    assert torch.equal(logits(resident, names["output"]), expected)
    stats = names["optimizer"].get_stats()
    counts = stats["prefetcher"]
    assert counts["total_requests"] == NUM_LAYERS
    assert counts["from_source"] == NUM_LAYERS  # each layer is read once
    assert counts["prefetch_issued"] == NUM_LAYERS - 1  # all but the first
    # What is on a local disk is not copied to it.
    assert stats["cache"]["ssd_bytes"] == 0

    run("prefetching", cache=cache, output=hidden)
    reads = names["optimizer"].layer_cache.ram.stats()
    assert reads.fills == NUM_LAYERS  # the second pass is served from memory


class _Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def base_url(tmp_path: Path) -> Iterator[str]:
    """A server with eight layers."""
    folder = tmp_path / "served"
    folder.mkdir()
    for index in range(8):
        torch.save(nn.Linear(64, 64 + index), folder / f"layer_{index}.pt")
    handler = functools.partial(_Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_layers_are_downloaded_in_parallel(
    run: Callable[..., dict[str, Any]],
    base_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("downloads", base_url=base_url)
    for index, fetched in enumerate(names["results"]):
        there = (tmp_path / "served" / f"layer_{index}.pt").read_bytes()
        assert (tmp_path / f"local_layer_{index}.pt").read_bytes() == there
        assert fetched.path == tmp_path / f"local_layer_{index}.pt"
        assert fetched.sha256 == hashlib.sha256(there).hexdigest()
    stats = names["downloader"].get_stats()
    assert (stats.finished_downloads, stats.failed_downloads, stats.active_downloads) == (8, 0, 0)


def test_a_quantised_layer_takes_a_quarter_and_computes_nearly_the_same(
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> None:
    path = folder / "bfloat16"
    make_llama(
        path, num_blocks=2, hidden=512, intermediate=1408, vocabulary=64, dtype=torch.bfloat16
    )
    monkeypatch.chdir(tmp_path)
    original = download_from_hub(path, 0)
    torch.save(original, "layer.pt")
    names = run("quantization", layer=download_from_hub(path, 0))
    assert names["config"] == NF4Config()
    sizes = [(tmp_path / name).stat().st_size for name in ("layer_quantized.pt", "layer.pt")]
    assert 0.2 < sizes[0] / sizes[1] < 0.3
    # The user's own file, and the user's decision to unpickle it.
    loaded = torch.load("layer_quantized.pt", weights_only=False)
    x = torch.randn(1, 5, 512, dtype=torch.bfloat16)
    result = loaded(x)
    assert torch.equal(result, names["layer"](x))
    # A block adds to its input: what it adds is what has an error.
    added, exact = (result - x).float(), (original(x) - x).float()
    assert (added - exact).norm() < 0.2 * exact.norm()


def test_a_pipeline_runs_to_its_end(
    run: Callable[..., dict[str, Any]], cache: LayerCache, resident: Any
) -> None:
    hidden, expected = prompt(resident)
    with IOOptimizer(cache) as optimizer:
        names = run("overlap", prefetcher=optimizer.prefetcher, output=hidden)
        assert names["layer"] is None
        assert torch.equal(logits(resident, names["output"]), expected)
        counts = optimizer.get_stats()["prefetcher"]
        assert counts["total_requests"] == counts["from_source"] == NUM_LAYERS
        assert counts["prefetch_issued"] == NUM_LAYERS  # the first one too


def test_writes_go_to_the_zone_with_the_fewest_bytes(
    run: Callable[..., dict[str, Any]], home: Path
) -> None:
    for number in range(8):
        names = run("wear_leveling", id=number)
        names["cache_path"].write_bytes(b"x" * 100)
    zones = [home / ".cache/nexus" / f"zone_{number}" for number in range(4)]
    assert [len(list(zone.glob("layer_*.pt"))) for zone in zones] == [2, 2, 2, 2]
    assert list(names["wear_leveling"].written_bytes().values()) == [200] * 4


@pytest.mark.parametrize(
    ("block", "on_disk", "in_memory", "lookahead"),
    [
        ("high_performance", 100 * GB, 8 * GB, 3),
        ("network_constrained", 200 * GB, 4 * GB, 5),
    ],
)
def test_configurations_do_what_they_say(
    run: Callable[..., dict[str, Any]], block: str, on_disk: int, in_memory: int, lookahead: int
) -> None:
    names = run(block, LayerCache=LayerCache, IOOptimizer=IOOptimizer)
    cache, optimizer = names["cache"], names["optimizer"]
    assert (cache.disk.stats().max_bytes, cache.ram.max_bytes) == (on_disk, in_memory)
    assert optimizer.prefetcher.lookahead == lookahead
    assert optimizer.wear_leveling is None
    assert optimizer.downloader is not None
    assert [path.exists() for path in cache.folders] == [True]
    preset = PRESETS[block.replace("_", "-")]
    with LayerCache.preset(block.replace("_", "-")) as same:
        assert same.disk is not None
        assert (same.disk.stats().max_bytes, same.ram.max_bytes) == (on_disk, in_memory)
        with IOOptimizer.preset(block.replace("_", "-"), same) as other:
            assert other.prefetcher.lookahead == lookahead
    assert preset.weights is None


def test_a_machine_with_little_memory_keeps_little_there(
    run: Callable[..., dict[str, Any]], home: Path, resident: Any
) -> None:
    names = run("memory_constrained", LayerCache=LayerCache)
    cache = names["cache"]
    assert cache.folders == [home / ".cache/nexus/layers"]
    assert (cache.disk.stats().max_bytes, cache.ram.max_bytes) == (500 * GB, GB // 2)
    assert names["config"] == NF4Config()
    with LayerCache.preset("memory-constrained") as same:
        assert same.disk is not None
        assert (same.disk.stats().max_bytes, same.ram.max_bytes) == (500 * GB, GB // 2)
    assert PRESETS["memory-constrained"].weights == "nf4"


def test_monitoring_prints_what_happened(
    run: Callable[..., dict[str, Any]],
    cache: LayerCache,
    resident: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hidden, _ = prompt(resident)
    optimizer = run("prefetching", cache=cache, output=hidden)["optimizer"]
    capsys.readouterr()
    names = run("monitoring", optimizer=optimizer)
    counts = names["stats"]["prefetcher"]
    assert capsys.readouterr().out.splitlines() == [
        f"Cache hit ratio: {counts['cache_hits'] / NUM_LAYERS:.1%}",
        f"Avg latency: {counts['avg_latency_ms']:.2f}ms",
        "Active downloads: 0",
    ]
    assert counts["avg_latency_ms"] > 0
    verdicts = names["stats"]["verdicts"]
    assert [one.target for one in verdicts.values()] == ["> 85 %", "< 100 ms", "> 70 %", "2 to 4"]
    ratio = counts["cache_hits"] / NUM_LAYERS
    assert (verdicts["cache_hit_ratio"].measured, verdicts["cache_hit_ratio"].is_met) == (
        ratio,
        ratio > 0.85,
    )


# -- docs/guide.md ---------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
ROWS = [
    tuple(cell.strip() for cell in line.strip("|").split(" | "))
    for line in (ROOT / "docs/guide.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| the guide says")
]
QUOTED = re.compile(r"`([^`]+)`")


@functools.cache
def functions_of(stem: str) -> set[str]:
    tree = ast.parse((ROOT / f"tests/{stem}.py").read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@functools.cache
def words_of_the_package() -> set[str]:
    sources = (path.read_text() for path in (ROOT / "nexus_ext").rglob("*.py"))
    return {word for text in sources for word in re.findall(r"\w+", text)}


def test_every_statement_of_the_guide_has_its_row() -> None:
    assert [row[0].strip("| ") for row in ROWS] == CLAIMS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_row_names_what_there_is(row: tuple[str, ...]) -> None:
    said, here, seen = row[0], row[1], row[2].strip("| ")
    assert seen or "not measured" in here.lower(), f"nobody has seen that {said!r}"
    assert QUOTED.sub("", seen).strip(", ") == ""
    for name in QUOTED.findall(seen):
        if name.startswith("bench_"):
            assert (ROOT / "benchmarks" / name).is_file(), name
            continue
        stem, _, function = name.partition("::")
        assert (ROOT / f"tests/{stem}.py").is_file(), name
        assert not function or function in functions_of(stem), name
    for name in QUOTED.findall(here):
        words = {word for word in re.findall(r"\w+", name) if not word.isdigit()}
        assert words <= words_of_the_package(), name
