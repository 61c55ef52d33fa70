"""The commands, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from nexus_ext.cli import app
from nexus_ext.demo import make_llama

BENCH_KEYS = {
    "step_seconds",
    "compute_seconds",
    "io_seconds",
    "slack_x",
    "weight_stall_ratio",
    "bytes_streamed_per_step",
    "stream_gbps",
    "disk_ceiling_gbps",
    "share_of_ceiling",
    "budget_bytes",
    "peak_rss_bytes",
    "file_cache_growth_bytes",
    "io_mode_requested",
    "io_mode",
    "resident_groups",
    "streamed_groups",
    "lookahead",
    "predicted_step_seconds",
    "peers",
}
runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    make_llama(path, num_blocks=6, hidden=64, intermediate=128, vocabulary=256)
    words = {f"w{i}": i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(path)
    return path


def invoke(*arguments: object) -> str:
    result = runner.invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def nexus(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed program itself."""
    program = Path(sys.executable).with_name("nexus")
    return subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=240,
        check=False,
    )


def test_run_prints_the_same_text_at_every_budget(model: Path, tmp_path: Path) -> None:
    prompt = ("--prompt", "w3 w7 w11", "--max-new-tokens", 4)
    everything = invoke("run", model, *prompt)
    report = tmp_path / "run.json"
    streamed = invoke(
        "run", model, *prompt, "--budget", 600_000, "--io", "direct", "--json", report
    )
    assert streamed == everything
    written = json.loads(report.read_text())
    assert written["stats"]["streamed_groups"] == 6
    assert len(written["tokens"]) == 7
    assert written["text"] in streamed


@pytest.mark.parametrize(
    "options", [("--by-rows", "lm_head", "--by-rows", "*embed*"), ("--compile",)]
)
def test_run_reads_by_rows_and_compiles(
    model: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    texts = []
    for index, more in enumerate(((), options)):
        report = tmp_path / f"{index}.json"
        nexus("run", model, "--prompt", "a b", "--max-new-tokens", 4, "--json", report, *more)
        texts.append(json.loads(report.read_text())["tokens"])
    assert texts[0] == texts[1]


def test_plan_counts_what_is_read_by_rows(model: Path) -> None:
    assert "by rows" in nexus("plan", model, "--by-rows", "lm_head").stdout


def test_plan_shows_the_split_and_the_smallest_budget(model: Path, tmp_path: Path) -> None:
    shown = invoke("plan", model, "--budget", "700KB", "--json", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert "smallest that works" in shown
    assert plan["device_bytes"] <= 700_000
    assert len(plan["streamed"]) + len(plan["resident"]) == 6


def test_bench_writes_every_stable_key(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "bench.json"
    invoke(
        "bench", model, "--tokens", 2, "--steps", 1, "--budget", 600_000, "--io", "direct",
        "--against", "resident,accelerate", "--json", report,
    )  # fmt: skip
    result = json.loads(report.read_text())
    assert result.keys() >= BENCH_KEYS
    assert set(result["peers"]) == {"resident", "accelerate"}
    assert result["streamed_groups"] == 6
    assert result["bytes_streamed_per_step"] > 0
    assert result["file_cache_growth_bytes"] <= 64 << 20


def test_doctor_names_the_effective_mode(model: Path) -> None:
    shown = invoke("doctor", model / "model.safetensors")
    assert "io asked / effective" in shown
    assert "alignment" in shown


def test_doctor_tunes_on_a_file(model: Path) -> None:
    shown = invoke("doctor", model / "model.safetensors", "--tune")
    assert shown.count("chunk_bytes=") == 12


def test_the_demo_compares_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path))
    make_llama(
        tmp_path / "demo" / "llama-1gb",
        num_blocks=9,
        hidden=64,
        intermediate=256,
        vocabulary=64,
    )
    report = tmp_path / "demo.json"
    invoke("demo", "--json", report)
    result = json.loads(report.read_text())
    assert result["tokens_equal"] is True
    assert len(result["tokens"]) == 17
    assert result["budget_bytes"] * 4 <= result["model_bytes"] + 4096
    assert result["streamed_groups"] > 0


def test_an_error_is_one_message_and_exit_code_1(model: Path) -> None:
    done = nexus("run", model, "--prompt", "w1", "--budget", "1KB")
    assert done.returncode == 1
    assert "BudgetError" in done.stderr
    assert "smallest budget that works" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "/no/such/folder"), "ConfigError"),
        (("bench", "MODEL", "--against", "nobody"), "resident and accelerate"),
        (("run", "MODEL", "--prompt", "w1", "--io", "telepathy"), "io must be one of"),
        (("plan", "MODEL", "--budget", "lots"), "ConfigError"),
    ],
)
def test_bad_input_is_named(model: Path, arguments: tuple[str, ...], said: str) -> None:
    done = nexus(*(str(model) if a == "MODEL" else a for a in arguments))
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_every_command() -> None:
    shown = invoke("--help")
    for command in ("run", "bench", "plan", "doctor", "demo"):
        assert command in shown


def test_convert_packs_and_run_streams_what_it_made(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    shown = invoke("convert", model, tmp_path / "packed", "--weights", "int8", "--json", report)
    assert "42 modules packed" in shown
    modules = json.loads(report.read_text())["modules"]
    assert {line["weights"] for line in modules} == {"int8"}
    assert all(line["bytes_after"] < 0.6 * line["bytes_before"] for line in modules)
    text = invoke("run", tmp_path / "packed", "--prompt", "w1 w2", "--max-new-tokens", 4)
    assert text == invoke(
        "run", model, "--weights", "int8", "--prompt", "w1 w2", "--max-new-tokens", 4
    )


def test_convert_into_a_folder_of_something_else_is_one_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    done = nexus("convert", model, tmp_path)
    assert done.returncode == 1
    assert "A destination must be new" in done.stderr
    assert "Traceback" not in done.stderr
