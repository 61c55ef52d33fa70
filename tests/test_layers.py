"""Who knows whom: the imports are those of the table, and nothing points upwards.

The table is the architecture. A new import is a new line here, or a mistake.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nexus_ext"
CSRC = ROOT / "csrc"

# What a module may import from this package, lower floors first.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "profiling": set(),
    "memory": {"errors"},
    "config": {"errors", "memory"},
    "blocks": {"errors"},
    "header": {"errors"},
    "places": set(),
    "safetensors_header": {"errors", "header", "places"},
    "checkpoint_files": {"errors", "header", "places", "safetensors_header"},
    "checkpoint": {"checkpoint_files", "errors", "header", "places", "safetensors_header"},
    "plan": {"errors", "memory"},
    "ops": {"_native", "errors"},
    "files": set(),
    "owners": set(),
    "drivers": set(),
    "digests": {"checkpoint", "files"},
    "engine": {"checkpoint", "errors", "ops"},
    "device": {"errors", "memory"},
    "gds": {"errors"},
    "mode": {"checkpoint", "config", "device", "engine", "errors", "gds", "memory", "plan"},
    "rows": {"checkpoint", "engine", "errors", "ops"},
    "cache.parts": {"errors"},
    "cache.header": {"cache.parts", "errors", "ops"},
    "cache.blob": {"cache.header", "cache.parts", "errors"},
    "cache.reading": {"cache.blob", "device", "engine", "errors", "ops"},
    "cache.report": set(),
    "cache.index_file": {"owners"},
    "cache.forks": set(),
    "cache.index_connection": {"cache.forks", "cache.index_file", "errors"},
    "cache.index_row": set(),
    "cache.index": {"cache.index_connection", "cache.index_file", "cache.index_row"},
    "cache.touches": {"cache.index"},
    "cache.folder": {"cache.index_file", "errors", "owners"},
    "cache.holds": {"cache.blob", "errors"},
    "cache.scanning": {"cache.blob", "cache.folder", "cache.header", "cache.index_row", "errors"},
    "cache.zone": {
        "cache.blob",
        "cache.folder",
        "cache.holds",
        "cache.index",
        "cache.reading",
        "cache.report",
        "cache.scanning",
        "errors",
    },
    "cache.checking": {"cache.report", "cache.zone", "errors"},
    "cache.room": {"cache.zone"},
    "cache.rotation": set(),
    "cache.totals": {"cache.index", "errors"},
    "cache.ledger": {"cache.report", "cache.totals", "errors"},
    "cache.uses": {"cache.ledger", "cache.touches", "cache.zone", "errors"},
    "cache.writing": {
        "cache.header",
        "cache.index_row",
        "cache.ledger",
        "cache.report",
        "cache.room",
        "cache.rotation",
        "cache.uses",
        "cache.zone",
        "errors",
    },
    "cache.disk": {
        "cache.checking",
        "cache.holds",
        "cache.index",
        "cache.ledger",
        "cache.parts",
        "cache.reading",
        "cache.report",
        "cache.totals",
        "cache.uses",
        "cache.writing",
        "cache.zone",
        "engine",
        "errors",
        "memory",
    },
    "cache.segment": {"errors", "ops"},
    "cache.shared_folder": {"errors", "owners"},
    "cache.private_segments": {"cache.shared_folder"},
    "cache.ram_report": set(),
    "cache.seen": set(),
    "cache.turns": set(),
    "cache.ram": {
        "cache.blob",
        "cache.private_segments",
        "cache.ram_report",
        "cache.seen",
        "cache.segment",
        "cache.shared_folder",
        "cache.turns",
        "errors",
        "memory",
    },
    "cache.work_locks": set(),
    "cache.rates": {"cache.blob", "cache.folder", "cache.reading", "errors"},
    "cache.compression": {"cache.blob", "errors"},
    "cache.level": {
        "cache.blob",
        "cache.compression",
        "cache.disk",
        "cache.holds",
        "cache.rates",
        "cache.reading",
        "cache.report",
        "cache.work_locks",
        "cache.zone",
        "errors",
    },
    "cache.remote_object": {"errors"},
    "cache.remote_files": {"errors"},
    "cache.remote_report": {"cache.compression"},
    "cache.remote_wire": {"cache.parts", "cache.remote_object", "errors"},
    "cache.remote": {
        "cache.compression",
        "cache.parts",
        "cache.reading",
        "cache.remote_files",
        "cache.remote_object",
        "cache.remote_report",
        "cache.remote_wire",
        "errors",
        "memory",
    },
    "cache.tier_report": {"cache.compression", "cache.rates", "cache.remote", "cache.report"},
    "cache.levels": {"cache.level", "cache.report", "errors"},
    "cache.tiers": {
        "cache.blob",
        "cache.level",
        "cache.levels",
        "cache.rates",
        "cache.remote",
        "cache.remote_object",
        "cache.report",
        "cache.tier_report",
        "errors",
    },
    "cache": {
        "cache.disk",
        "cache.ram",
        "cache.remote",
        "cache.report",
        "cache.tier_report",
        "cache.tiers",
    },
    "shared_groups": {
        "cache.ram",
        "cache.segment",
        "cache.shared_folder",
        "cache.work_locks",
        "checkpoint",
        "config",
        "digests",
        "engine",
    },
    "streamer": {
        "checkpoint",
        "config",
        "device",
        "digests",
        "engine",
        "gds",
        "memory",
        "mode",
        "plan",
        "profiling",
        "rows",
        "shared_groups",
    },
    "quant.reference": {"errors"},
    "quant.cuda": {"errors", "kernels", "profiling", "quant.reference"},
    "quant.registration": {"ops", "quant.cuda", "quant.reference"},
    "quant.packing": {"ops", "quant.reference", "quant.registration"},
    "quant.gguf_file": {"checkpoint", "errors", "quant.packing"},
    "quant.formats": {
        "checkpoint",
        "errors",
        "quant.gguf_file",
        "quant.packing",
        "quant.reference",
    },
    "quant.config": {"errors"},
    "quant.packed": {
        "errors",
        "ops",
        "quant.config",
        "quant.packing",
        "quant.reference",
        "quant.registration",
    },
    "quant.layer": {"errors", "quant.config", "quant.packed"},
    "quant": {"quant.config", "quant.layer"},
    "conversion": {"checkpoint", "errors"},
    "experts": set(),
    "experts.pieces": {"checkpoint", "quant.packing"},
    "experts.gather": {"checkpoint", "conversion", "errors"},
    "experts.find": {
        "checkpoint",
        "conversion",
        "errors",
        "experts.gather",
        "experts.pieces",
        "quant.formats",
        "quant.packing",
    },
    "quant.stacked": {
        "quant.config",
        "quant.packed",
        "quant.packing",
        "quant.reference",
        "quant.registration",
    },
    "quant.selection": {"checkpoint", "experts.find", "quant.config", "quant.stacked"},
    "quant.shards": {"checkpoint", "errors", "quant.packed"},
    "quant.convert": {
        "checkpoint",
        "errors",
        "experts.find",
        "files",
        "quant.config",
        "quant.packed",
        "quant.selection",
        "quant.shards",
        "quant.stacked",
    },
    "packed_store": {
        "cache",
        "cache.blob",
        "cache.work_locks",
        "checkpoint",
        "checkpoint_files",
        "config",
        "errors",
        "files",
        "quant.shards",
    },
    "layout": {
        "blocks",
        "checkpoint",
        "conversion",
        "errors",
        "experts.find",
        "quant.formats",
        "quant.packing",
    },
    "experts.policy": {"errors"},
    "experts.routes": {"errors"},
    "experts.replay": {"errors", "experts.policy", "experts.routes"},
    "experts.predict": set(),
    "experts.cache": {"experts.policy"},
    "experts.slots": {"checkpoint", "errors", "experts.find", "memory"},
    "experts.stats": {"experts.cache", "experts.slots"},
    "experts.budget": {
        "checkpoint",
        "config",
        "device",
        "errors",
        "experts.find",
        "experts.slots",
        "layout",
        "memory",
        "plan",
        "streamer",
    },
    "experts.store": {
        "checkpoint",
        "config",
        "device",
        "digests",
        "engine",
        "experts.slots",
        "gds",
        "mode",
    },
    "experts.runner": {
        "checkpoint",
        "engine",
        "errors",
        "experts.budget",
        "experts.cache",
        "experts.find",
        "experts.policy",
        "experts.predict",
        "experts.stats",
        "experts.store",
        "memory",
        "mode",
    },
    "experts.pool": {"experts.find", "experts.store", "ops", "quant.packing"},
    "experts.layer": {"errors", "experts.find", "experts.pool", "ops", "profiling"},
    "attachment": {
        "checkpoint",
        "errors",
        "ops",
        "quant.formats",
        "quant.packing",
        "streamer",
    },
    "experts.attach": {
        "attachment",
        "checkpoint",
        "errors",
        "experts.find",
        "experts.layer",
        "experts.pool",
        "experts.runner",
        "experts.stats",
    },
    "subclass": {"attachment", "errors", "ops", "quant.packing"},
    "export": {"attachment", "errors", "ops"},
    "module": {
        "attachment",
        "checkpoint",
        "config",
        "conversion",
        "device",
        "engine",
        "errors",
        "experts.attach",
        "experts.budget",
        "experts.find",
        "experts.runner",
        "layout",
        "memory",
        "mode",
        "plan",
        "profiling",
        "quant.formats",
        "quant.gguf_file",
        "streamer",
        "subclass",
    },
    "download.ranges": set(),
    "download.progress": set(),
    "download.writeback": set(),
    "download.journal": set(),
    "download.facts": {"errors"},
    "download.patience": {"errors"},
    "download.schedule": {"download.ranges"},
    "download.body": {"download.patience"},
    "download.line": {"download.body", "errors"},
    "download.source": {"download.body", "download.line"},
    "download.web": {
        "download.body",
        "download.facts",
        "download.line",
        "download.patience",
        "download.source",
        "errors",
    },
    "download.filesystem": {
        "download.body",
        "download.facts",
        "download.line",
        "download.patience",
        "download.source",
        "drivers",
        "errors",
    },
    "download.partial": {
        "download.journal",
        "download.ranges",
        "download.writeback",
        "errors",
        "owners",
    },
    "download.leftovers": {"download.journal", "download.partial", "owners"},
    "download.verdicts": {
        "download.facts",
        "download.partial",
        "download.patience",
        "download.source",
        "errors",
    },
    "download.transfer": {
        "download.facts",
        "download.line",
        "download.partial",
        "download.patience",
        "download.progress",
        "download.schedule",
        "download.source",
        "download.verdicts",
        "errors",
    },
    "download.follower": {"download.partial", "download.patience", "download.transfer", "errors"},
    "download.fetching": {
        "download.journal",
        "download.leftovers",
        "download.line",
        "download.partial",
        "download.patience",
        "download.source",
        "download.transfer",
        "download.verdicts",
        "errors",
    },
    "download.arrival": {"download.facts", "download.transfer", "errors"},
    "download.downloader": {
        "download.arrival",
        "download.facts",
        "download.fetching",
        "download.filesystem",
        "download.follower",
        "download.line",
        "download.patience",
        "download.progress",
        "download.source",
        "download.transfer",
        "download.web",
        "errors",
        "memory",
    },
    "download": {"download.arrival", "download.downloader", "download.facts"},
    "shards": {"errors"},
    "asking": {"shards"},
    "arriving": {"asking", "checkpoint", "download", "errors", "shards"},
    "hub_repo": {"download", "errors", "files", "shards"},
    "url_model": {"config", "download", "download.facts", "errors", "shards"},
    "hub": {
        "arriving",
        "config",
        "download",
        "errors",
        "files",
        "hub_repo",
        "memory",
        "url_model",
    },
    "pretrained": {
        "arriving",
        "checkpoint",
        "config",
        "conversion",
        "device",
        "errors",
        "experts.budget",
        "experts.find",
        "files",
        "hub",
        "layout",
        "module",
        "packed_store",
        "plan",
        "quant.config",
        "quant.convert",
        "quant.formats",
        "quant.gguf_file",
        "quant.shards",
        "streamer",
    },
    "sli.limits": {"errors"},
    "sli.presets": set(),
    "sli.counters": set(),
    "sli.prefetch_counts": set(),
    "sli.storing": {
        "cache.blob",
        "checkpoint",
        "errors",
        "quant",
        "quant.packing",
        "safetensors_header",
    },
    "sli.skeleton": {"errors", "quant", "quant.packed", "quant.packing", "sli.storing"},
    "sli.calling": {"blocks", "errors", "pretrained"},
    "sli.source": {
        "blocks",
        "checkpoint",
        "engine",
        "errors",
        "layout",
        "pretrained",
        "quant.formats",
        "quant.gguf_file",
        "sli.calling",
        "sli.skeleton",
        "sli.storing",
    },
    "sli.sources": {"checkpoint", "hub", "sli.source"},
    "sli.templates": {"errors", "sli.skeleton", "sli.sources", "sli.storing"},
    "sli.order": set(),
    "sli.loaded": {"cache.ram"},
    "sli.disk_side": {
        "cache.disk",
        "cache.remote",
        "cache.report",
        "cache.tier_report",
        "cache.tiers",
        "errors",
    },
    "sli.layer_bytes": {
        "cache.blob",
        "cache.ram",
        "cache.report",
        "cache.shared_folder",
        "errors",
        "sli.disk_side",
    },
    "sli.layer_cache": {
        "cache.disk",
        "cache.remote",
        "cache.tiers",
        "config",
        "errors",
        "sli.counters",
        "sli.disk_side",
        "sli.layer_bytes",
        "sli.loaded",
        "sli.presets",
        "sli.storing",
        "sli.templates",
    },
    "sli.loading": {"sli.layer_cache", "sli.loaded", "sli.source", "sli.sources"},
    "sli.prefetch": {
        "errors",
        "sli.layer_cache",
        "sli.limits",
        "sli.loaded",
        "sli.loading",
        "sli.order",
        "sli.prefetch_counts",
    },
    "sli.pipeline": {"errors", "sli.limits", "sli.prefetch"},
    "sli.downloads": {"download"},
    "sli.wear": {"errors", "sli.limits"},
    "sli.io_optimizer": {
        "errors",
        "sli.downloads",
        "sli.layer_cache",
        "sli.pipeline",
        "sli.prefetch",
        "sli.prefetch_counts",
        "sli.presets",
        "sli.wear",
    },
    "sli.quantization": {"quant", "sli.storing"},
    "sli": {"sli.io_optimizer", "sli.layer_cache", "sli.quantization", "sli.sources"},
    "__init__": {
        "checkpoint",
        "errors",
        "export",
        "module",
        "plan",
        "pretrained",
        "profiling",
        "quant",
        "subclass",
    },
}
# The command line and what it runs: they see everything below, and nobody below sees them.
TOOLS = {
    "arms",
    "bench",
    "bench_experts",
    "ceiling",
    "cli",
    "cli_cache",
    "demo",
    "doctor",
    "expert_arms",
    "expert_figures",
    "expert_report",
    "expert_work",
    "limit",
}


def name_of(path: Path) -> str:
    """The module of a file, below the package: "plan", "quant", "quant.formats"."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = sorted(map(name_of, PACKAGE.rglob("*.py")))
PACKAGES = {"nexus_ext.cache", "nexus_ext.quant"}
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu"})


def tree_of(module: str) -> ast.Module:
    path = PACKAGE / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())


def imported(module: str) -> set[str]:
    """Modules of this package that a module imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "nexus_ext":
            names = [f"nexus_ext.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
            outer = node.module.removeprefix("nexus_ext.")
            inner = [f"{outer}.{alias.name}" for alias in node.names]
            names = [f"nexus_ext.{name if name in MODULES else outer}" for name in inner]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [str(node.module)]
        else:
            continue
        found |= {
            name.removeprefix("nexus_ext.") for name in names if name.startswith("nexus_ext.")
        }
    return found


def test_every_module_has_its_place() -> None:
    assert set(MODULES) == ALLOWED.keys() | TOOLS


@pytest.mark.parametrize("module", ALLOWED)
def test_a_module_imports_what_the_table_allows_and_no_more(module: str) -> None:
    assert imported(module) == ALLOWED[module]


def test_the_table_points_downwards_only() -> None:
    below: set[str] = {"_native", "kernels"}
    for module, targets in ALLOWED.items():
        assert targets <= below, module
        below.add(module)


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_a_tool_imports_from_below_and_from_other_tools_without_a_circle(tool: str) -> None:
    reached, waiting = set(), imported(tool) & TOOLS
    while waiting:
        reached |= waiting
        waiting = set().union(*map(imported, waiting)) & TOOLS - reached
    assert tool not in reached
    assert imported(tool) <= set(MODULES)


def names_in(module: str) -> set[str]:
    """Every dotted name that a module reads, and every module that it imports."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Attribute | ast.Name):
            names.add(ast.unparse(node))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_no_module_unpickles(module: str) -> None:
    names = names_in(module)
    assert not {name for name in names if name.split(".")[0] in {"pickle", "dill", "joblib"}}
    assert "torch.load" not in names


@pytest.mark.parametrize("module", MODULES)
def test_only_config_reads_the_environment(module: str) -> None:
    reads = {"os.environ", "os.getenv", "os.environb"} & names_in(module)
    assert not reads or module == "config"


def handlers(module: str) -> list[ast.ExceptHandler]:
    return [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.ExceptHandler)]


def catches_everything(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or "Exception" in re.findall(r"\w+", ast.unparse(handler.type))


@pytest.mark.parametrize("module", MODULES)
def test_no_module_catches_everything(module: str) -> None:
    lines = [handler.lineno for handler in handlers(module) if catches_everything(handler)]
    assert lines == []


@pytest.mark.parametrize("module", MODULES)
def test_what_catches_base_exceptions_raises_them_again(module: str) -> None:
    for handler in handlers(module):
        if handler.type is not None and "BaseException" in ast.unparse(handler.type):
            assert isinstance(handler.body[-1], ast.Raise)
            assert handler.body[-1].exc is None


# -- native code ---------------------------------------------------------------------------------


TORCH_DOORS = ("library.cpp", "quant/ops.cpp")


def includes(path: Path) -> set[str]:
    return set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE))


def relative(path: Path) -> str:
    return str(path.relative_to(CSRC))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_readers_and_helpers_do_not_know_the_engine(path: Path) -> None:
    folder = path.relative_to(CSRC).parts[0]
    may_include = {
        "common": {"common"},
        "io": {"common", "io"},
        "device": {"common", "device"},
        "quant": {"common", "quant"},
        "stream": {"common", "device", "io", "stream"},
    }
    known = {name.split("/")[0] for name in includes(path) if (CSRC / name).is_file()}
    if folder in may_include:
        assert known <= may_include[folder]


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_torch_and_python_come_in_by_one_door_each(path: Path) -> None:
    names = includes(path)
    has_torch = any(name.startswith(("torch/", "ATen/", "c10/")) for name in names)
    assert not has_torch or relative(path) in TORCH_DOORS
    assert "Python.h" not in names or relative(path) == "python_module.cpp"


@pytest.mark.parametrize("door", TORCH_DOORS)
def test_torch_is_used_by_its_stable_interface_only(door: str) -> None:
    names = [name for name in includes(CSRC / door) if name.startswith("torch/")]
    assert names
    assert all(name.startswith(("torch/csrc/stable/", "torch/headeronly/")) for name in names)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_native_code_has_never_heard_of_a_model(path: Path) -> None:
    words = r"\b(layers?|experts?|llama|transformers?|attention|tokens?|embeddings?)\b"
    # What a message tells the user, who has heard of models, is not knowledge.
    code = re.sub(r'"(?:[^"\\]|\\.)*"', '""', path.read_text())
    assert re.findall(words, code, re.IGNORECASE) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_native_code_does_not_read_the_environment(path: Path) -> None:
    assert "getenv" not in path.read_text()
