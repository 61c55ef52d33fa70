"""Models of `make_moe` route as they say, and `nexus bench-experts` accounts for what it did."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from nexus_ext import expert_report
from nexus_ext.arms import KINDS
from nexus_ext.bench_experts import STRATEGIES, parse_budgets
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.cli import app
from nexus_ext.demo import make_llama
from nexus_ext.errors import ConfigError, MissingExtra, StreamError
from nexus_ext.expert_arms import ExpertSpec, Record
from nexus_ext.expert_figures import Measured, summarize
from nexus_ext.expert_report import experts_tables, plot_experts
from nexus_ext.expert_work import Work

PAGE_BYTES = 4096
NUM_PROMPT, NUM_NEW = 24, 12


def _load_make_moe() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "make_moe.py"
    spec = importlib.util.spec_from_file_location("make_moe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_moe"] = module
    spec.loader.exec_module(module)
    return module


moe = _load_make_moe()


def toy(**others: Any) -> Any:
    sizes = {"layers": 3, "experts": 32, "top_k": 4, "hidden": 64, "intermediate": 32}
    return moe.Shape(**(sizes | {"vocabulary": 256} | others))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "moe"
    moe.make_moe(path, toy())
    return path


# -- the models ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (8, 2)])
def test_routes_are_those_of_a_text(tmp_path: Path, experts: int, top_k: int) -> None:
    moe.make_moe(tmp_path / "m", toy(experts=experts, top_k=top_k))
    found = moe.measure_routing(tmp_path / "m", 512)
    assert 0.30 <= found["overlap"] <= 0.45
    # Of uniform choices the most used fifth would have a fifth.
    assert 0.3 <= found["popular_share"] <= 0.8
    assert 0.1 < found["logits_std"] < 10


@pytest.mark.parametrize("is_fused", [False, True])
def test_experts_begin_on_pages(tmp_path: Path, is_fused: bool) -> None:
    moe.make_moe(tmp_path / "m", toy(), is_fused=is_fused)
    entries = Checkpoint.open(tmp_path / "m").entries.values()
    experts = [one for one in entries if ".experts." in one.name]
    assert len(experts) == 3 * (2 if is_fused else 3 * 32)
    assert all(one.offset % PAGE_BYTES == 0 for one in experts)
    assert all(one.nbytes % PAGE_BYTES == 0 for one in experts)


def test_unaligned_experts_do_not(tmp_path: Path) -> None:
    moe.make_moe(tmp_path / "m", toy(), is_aligned=False)
    entries = Checkpoint.open(tmp_path / "m").entries.values()
    assert all(one.offset % 8 == 0 for one in entries)
    assert any(one.offset % PAGE_BYTES for one in entries if ".experts." in one.name)


def test_layouts_hold_the_same_weights(tmp_path: Path) -> None:
    shape = toy(layers=1)
    moe.make_moe(tmp_path / "a", shape)
    moe.make_moe(tmp_path / "b", shape, is_aligned=False)
    found = []
    for name in ("a", "b"):
        (file,) = (tmp_path / name).glob("*.safetensors")
        with safe_open(file, "pt") as tensors:
            found.append({key: tensors.get_tensor(key) for key in tensors.keys()})  # noqa: SIM118
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert all(bool(one.isfinite().all()) for one in found[0].values())


def test_shards_are_filled_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "SHARD_BYTES", 200_000)
    moe.make_moe(tmp_path / "m", toy())
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 3
    assert Checkpoint.open(tmp_path / "m").nbytes > 3 * 32 * 3 * PAGE_BYTES


def test_a_model_that_cannot_be_aligned_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--no-aligned"):
        moe.make_moe(tmp_path / "m", toy(intermediate=24))
    assert list(tmp_path.iterdir()) == []


def test_a_size_decides_the_layers() -> None:
    shape = moe.Shape.of_size(4 << 30)
    assert abs(shape.layers * shape.layer_bytes - (4 << 30)) < shape.layer_bytes


# -- what an arm does ------------------------------------------------------------------------------


def work_of(model: Path, **others: Any) -> Work:
    return Work.of(model, NUM_PROMPT, NUM_NEW, **others)


def spec_of(model: Path, kind: str, work: Work, **options: Any) -> ExpertSpec:
    return ExpertSpec(kind, model, work.num_prompt, options, work.ids)


def run_arm(model: Path, work: Work, **options: Any) -> tuple[Any, Measured]:
    """A streamed arm, in this process."""
    options = {"budget": "64MiB"} | options
    arm: Any = KINDS["streamed_experts"](spec_of(model, "streamed_experts", work, **options))
    found = Measured(arm.prefill(), [arm.prefill()])
    arm.begin_record()
    found.segments = [arm.decode(num) for num in work.segments]
    found.logits = arm.logits()
    found.record = arm.end_record()
    return arm, found


@pytest.fixture(scope="module")
def resident_logits(model: Path) -> list[list[float]]:
    arm: Any = KINDS["resident_experts"](
        spec_of(model, "resident_experts", work_of(model, segment_tokens=5))
    )
    arm.prefill()
    arm.decode(NUM_NEW)
    logits: list[list[float]] = arm.logits()
    return logits


@pytest.fixture(
    scope="module", params=[(name, share) for name in STRATEGIES for share in ("20%", "80%")]
)
def line(request: pytest.FixtureRequest, model: Path) -> Iterator[dict[str, Any]]:
    """A line of the table, of every strategy and two budgets."""
    strategy, share = request.param
    work = work_of(model, segment_tokens=5)
    arm, found = run_arm(model, work, **STRATEGIES[strategy], expert_budget=share)
    handle: Any = type("Handle", (), {"facts": arm.facts})
    yield {
        "strategy": strategy,
        "experts": arm.report()["stats"]["experts"],
        "facts": arm.facts,
        "record": found.record,
        "segments": found.segments,
        "logits": found.logits,
        "page_bytes": arm.facts["expert_bytes"] // arm.facts["num_experts"],
    } | summarize(work, handle, found, None, 1e9)
    arm.close()


def test_a_line_accounts_for_what_was_done(
    line: dict[str, Any], resident_logits: list[list[float]]
) -> None:
    counts = line["counts"]
    assert counts["selected"] == NUM_NEW * 3 * 4
    assert counts["hits"] + counts["joined"] + counts["misses"] == counts["selected"]
    assert line["kept_rate"] <= line["belady_hit_rate"] <= 1
    assert line["belady_staying_hits"] <= line["belady_hit_rate"] * counts["selected"] + 0.5
    assert 0 < line["hit_rate"] <= 1
    assert counts["failed"] == 0
    assert line["logits"] == resident_logits
    facts = line["facts"]
    assert facts["slot_bytes"] <= facts["expert_bytes"] == 3 * 32 * 3 * PAGE_BYTES


def test_a_line_accounts_for_every_byte(line: dict[str, Any]) -> None:
    counts = line["counts"]
    if line["strategy"] == "mmap":
        pytest.skip("pages that stay mapped are read by whoever touches them")
    read = sum(one["bytes_read"] for one in line["segments"])
    # What was fetched ahead before, or is on its way still, counts here or there.
    loaded = (counts["misses"] + counts["ahead"]) * line["page_bytes"]
    assert counts["misses"] * line["page_bytes"] <= read <= loaded + 8 * line["page_bytes"]


def test_a_line_took_the_path_that_it_names(line: dict[str, Any]) -> None:
    experts, strategy = line["experts"], line["strategy"]
    wanted = {"mmap": "mmap", "residency-lru": "mmap", "buffered": "buffered"}
    assert experts["io_mode"] == wanted.get(strategy, "direct")
    assert (experts["num_views"] == experts["num_experts"]) == (wanted.get(strategy) == "mmap")
    if strategy == "direct":
        assert experts["bytes_direct"] == experts["bytes_read"] > 0
    if strategy == "residency-lru":
        assert experts["num_dropped"] > 0
    if strategy == "mmap":
        assert experts["num_dropped"] == 0


def test_a_record_gives_the_best_policy_who_was_there() -> None:
    record = Record((0, 1), [1, 1, 1, 1])
    for key in (2, 0, 3, 0):
        record.append(0, [key], 1, is_prefill=False)
    assert record.num_selected == 4
    # With two places: 0 stays for both of its uses, 2 and 3 pass by.
    assert record.belady(2) == 2
    assert Record((0,), [1, 2]).belady(3) is None


def test_several_sequences_are_told_apart(model: Path) -> None:
    work = work_of(model, batch=3, segment_tokens=6)
    assert len({row[:4] for row in work.ids}) == 3
    arm, found = run_arm(model, work, io="direct", expert_budget="40%")
    arm.close()
    assert len(found.logits) == 3
    assert found.record["num_runs"] == NUM_NEW * 3


# -- what is asked for -----------------------------------------------------------------------------


def test_budgets_take_the_unit_behind_them() -> None:
    assert parse_budgets("5,10,100%") == ["5%", "10%", "100%"]
    assert parse_budgets("8, 16GiB") == [8 << 30, 16 << 30]
    assert parse_budgets("12.5%,2MB") == ["12.5%", 2_000_000]


@pytest.mark.parametrize("text", ["", "0%", "101%", "5,x%", "-1%", "1GiB,,2GiB", "0GiB", "%"])
def test_a_bad_list_of_budgets_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="budgets are shares"):
        parse_budgets(text)


def test_ids_come_from_where_they_are(model: Path, tmp_path: Path) -> None:
    assert work_of(model).source.endswith("prompt_ids.json")
    file = tmp_path / "ids.json"
    file.write_text(json.dumps(list(range(40))))
    assert work_of(model, prompt_ids=file).ids[0] == tuple(range(NUM_PROMPT + NUM_NEW))
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    assert work_of(tmp_path).source.startswith("random")


@pytest.mark.parametrize("content", ["[1, 2, 3]", "{}", '["a"]', "no json"])
def test_a_bad_file_of_ids_is_an_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "ids.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="a JSON list of 36 numbers"):
        work_of(tmp_path, prompt_ids=file)


def test_ids_of_another_model_are_an_error(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    file.write_text(json.dumps([1000] * 40))
    with pytest.raises(ConfigError, match="below the vocabulary's 256"):
        run_arm(model, work_of(model, prompt_ids=file), expert_budget="40%")


# -- the command -----------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench-experts", *map(str, arguments)])


LINE_KEYS = {
    "strategy",
    "budget",
    "budget_bytes",
    "budget_share",
    "prefill_tps",
    "decode_tps",
    "wired_bytes",
    "used_bytes",
    "file_backed_bytes",
    "hit_rate",
    "kept_rate",
    "belady_hit_rate",
    "policy_over_belady",
    "read_bytes_per_step",
    "disk_bytes_per_step",
    "decode_ratio",
    "prefill_ratio",
    "slack_x",
    "compute_seconds",
    "disk_gbps",
    "io_mode",
    "reader",
    "counts",
    "logits_difference",
    "options",
    "rounds",
}


@pytest.fixture(scope="module")
def result(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("results") / "result.json"
    done = invoke(
        *(model, "--budgets", "50%", "--strategy", "direct", "--prompt-tokens", NUM_PROMPT),
        *("--new-tokens", NUM_NEW, "--segment-tokens", 6, "--prefills", 1, "--json", file),
    )
    assert done.exit_code == 0, done.output
    assert "direct" in done.stdout
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_the_command_writes_what_it_promises(result: dict[str, Any]) -> None:
    (line,) = result["lines"]
    assert line.keys() >= LINE_KEYS
    assert result["resident"] == "grouped_mm"
    assert result["pages"] == "dropped"
    assert result["machine"]["transformers"]
    assert result["columns"].keys() <= line.keys()
    assert line["logits_difference"] == 0
    assert line["file_backed_bytes"] <= 64 << 20
    assert line["decode_tps"] > 0
    assert set(line["rounds"]) == {"streamed", "resident"}


def test_the_tables_have_a_row_for_each_line(result: dict[str, Any]) -> None:
    twice = result | {"lines": result["lines"] * 2}
    assert [table.row_count for table in experts_tables(twice)] == [2, 2]
    # Without a resident model, or with experts of several sizes, some columns are empty.
    unknown = dict.fromkeys(("decode_ratio", "prefill_ratio", "belady_hit_rate"))
    assert experts_tables(result | {"lines": [result["lines"][0] | unknown]})


def test_the_plot_is_written(result: dict[str, Any], tmp_path: Path) -> None:
    plot_experts(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_nothing_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"nexus_ext\[plot\]"):
        expert_report.check_can_plot()
    done = invoke(model, "--plot", tmp_path / "plot.png")
    assert isinstance(done.exception, MissingExtra)


def test_an_unknown_strategy_is_an_error(model: Path) -> None:
    done = invoke(model, "--strategy", "magic")
    assert isinstance(done.exception, ConfigError)
    assert "residency-lru" in str(done.exception)


def test_a_model_without_experts_is_an_error(tmp_path: Path) -> None:
    make_llama(tmp_path / "m", num_blocks=2, hidden=32, intermediate=64, vocabulary=64)
    done = invoke(tmp_path / "m", "--budgets", "50%", "--prompt-tokens", 4, "--new-tokens", 2)
    assert isinstance(done.exception, StreamError)
    assert "has none" in str(done.exception)


def test_make_moe_is_a_program(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "make_moe.py"
    sizes = "--layers 1 --experts 4 --top-k 2 --hidden 64 --intermediate 32 --vocabulary 64"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "m"), *sizes.split(), "--no-measure"],
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "m" / "make_moe.json").read_text())["layers"] == 1
