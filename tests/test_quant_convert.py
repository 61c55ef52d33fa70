"""convert: what it writes, that others read it, and that nothing stops it half-way for good; and
`quantize_layer`, the same for a module in memory.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import nexus_ext as nexus
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.errors import CheckpointFormatError, ConfigError, QuantizationError, WriteError
from nexus_ext.quant import INT8Config, MixedConfig, NF4Config, PackedLinear
from nexus_ext.quant.convert import REPORT, convert_checkpoint
from nexus_ext.quant.shards import JOURNAL
from tests.test_quant_formats import (
    NUM_LAYERS,
    decoded,
    logits,
    open_llama,
    stored_in,
    weights_seen,
    write_llama,
    write_with_bitsandbytes,
)

MODES = ["nf4", "nf4-nested", "int8", "mixed"]
PLAIN_MODES = MODES[:3]
NUM_SHARDS = NUM_LAYERS + 1
INDEX = "model.safetensors.index.json"
KIND_OF = {"self_attn": "int8", "mlp": "nf4"}  # in "mixed"


@pytest.fixture(autouse=True)
def _poisoned_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_POISON", "1")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def converted(plain: Path) -> Callable[[str], Path]:
    def convert(mode: str) -> Path:
        folder = plain.parent / mode
        if not folder.exists():
            nexus.convert(plain, folder, mode)
        return folder

    return convert


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


# -- what is written -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PLAIN_MODES)
def test_tensors_are_those_of_bitsandbytes(plain: Path, converted: Any, mode: str) -> None:
    folder = plain.parent / f"theirs-{mode}"
    write_with_bitsandbytes(plain, folder, mode)
    ours, theirs = stored_in(converted(mode)), stored_in(folder)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        if "quant_state" in name:
            mine, other = (json.loads(bytes(t.tolist())) for t in (ours[name], tensor))
            assert mine == other
        elif mode == "nf4-nested" and name.endswith(".weight.absmax"):
            # Ours is the nearest; theirs, on a CPU, may be the next one where two are as near.
            steps = (ours[name].int() - tensor.int()).abs()
            assert steps.max() <= 1, name
            assert steps.float().mean() < 0.02, name
        else:
            assert torch.equal(ours[name], tensor), name


def test_a_mixture_packs_attention_in_bytes_and_the_rest_in_nibbles(converted: Any) -> None:
    mixed, nf4, int8 = (stored_in(converted(mode)) for mode in ("mixed", "nf4", "int8"))
    for name, tensor in mixed.items():
        same = int8 if "self_attn" in name else nf4
        assert torch.equal(tensor, same[name]), name
    assert any(name.endswith("self_attn.q_proj.SCB") for name in mixed)
    assert any(name.endswith("mlp.up_proj.weight.absmax") for name in mixed)


@pytest.mark.parametrize("mode", MODES)
def test_a_conversion_streams_as_the_reference_decodes_it(converted: Any, mode: str) -> None:
    path = converted(mode)
    tensors = stored_in(path)
    with open_llama(path) as model:
        ours = logits(model)
        for name, weight in weights_seen(model, lambda: logits(model)).items():
            want = tensors[name] if name == "lm_head.weight" else decoded(tensors, name)
            assert torch.equal(weight, want), name
        assert torch.equal(logits(model), ours)
    with open_llama(path, budget="1GiB") as model:
        assert torch.equal(logits(model), ours)


@pytest.mark.parametrize("mode", PLAIN_MODES)
def test_transformers_loads_a_conversion(converted: Any, mode: str) -> None:
    from transformers import AutoModelForCausalLM

    path = converted(mode)
    with open_llama(path) as model:
        ours = logits(model)
    theirs = AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    assert theirs.config.quantization_config.quant_method == "bitsandbytes"
    assert torch.allclose(ours, logits(theirs), rtol=0, atol=0.02)


def test_transformers_refuses_a_mixture(converted: Any) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(converted("mixed"), device_map="cpu")
    fields = json.loads((converted("mixed") / "config.json").read_text())["quantization_config"]
    assert fields["quant_method"] == "nexus_ext"
    for name, kind in fields["modules"].items():
        assert kind == KIND_OF[name.split(".")[3]]
    assert len(fields["modules"]) == 7 * NUM_LAYERS


@pytest.mark.parametrize("mode", MODES)
def test_data_begin_on_a_page_and_other_libraries_open_them(converted: Any, mode: str) -> None:
    shards = sorted(converted(mode).glob("*.safetensors"))
    assert len(shards) == NUM_SHARDS
    for shard in shards:
        with open(shard, "rb") as file:
            assert (8 + int.from_bytes(file.read(8), "little")) % 4096 == 0
        with safe_open(shard, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert all(opened.get_tensor(name) is not None for name in opened.keys())  # noqa: SIM118


@pytest.mark.parametrize("mode", MODES)
def test_one_read_brings_a_group(converted: Any, mode: str) -> None:
    with open_llama(converted(mode)) as model:
        groups = model._nexus.streamer.groups
    assert len(groups) == NUM_LAYERS
    for group in groups:
        assert group.extents[0].offset % 4096 == 0
        ends = [extent.offset + extent.nbytes for extent in group.extents]
        assert ends[:-1] == [extent.offset for extent in group.extents[1:]]
        # Nested scales are too short to fill what they are aligned to; they stand at the end.
        assert mode == "nf4-nested" or group.is_contiguous


def test_everything_else_is_copied(plain: Path, converted: Any, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    (source / "tokenizer.json").write_text("{}")
    (source / "old.bin").write_bytes(b"weights")
    (source / "folder").mkdir()
    nexus.convert(source, tmp_path / "packed")
    found = {path.name for path in (tmp_path / "packed").iterdir()}
    names = {f"model-{i:05d}-of-{NUM_SHARDS:05d}.safetensors" for i in range(1, NUM_SHARDS + 1)}
    others = {"config.json", "generation_config.json", "tokenizer.json", REPORT, INDEX}
    assert found == names | others
    before, after = (json.loads((f / "config.json").read_text()) for f in (plain, converted("nf4")))
    del after["quantization_config"]
    assert after == before


def test_a_sharded_source_converts_to_the_same_bytes(
    plain: Path, converted: Any, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(plain, dtype="auto")
    model.save_pretrained(tmp_path / "source", max_shard_size="200KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > NUM_SHARDS
    nexus.convert(tmp_path / "source", tmp_path / "packed")
    ours, theirs = stored_in(tmp_path / "packed"), stored_in(converted("nf4"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_modules_that_are_skipped_stay_as_they_are(plain: Path, tmp_path: Path) -> None:
    nexus.convert(plain, tmp_path, NF4Config(skip=("*.k_proj", "model.layers.0.*")))
    ours, before = stored_in(tmp_path), stored_in(plain)
    for name, tensor in before.items():
        is_packed = "proj" in name and "k_proj" not in name and ".layers.0." not in name
        assert torch.equal(ours[name], tensor) != is_packed, name
    left = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "model.layers.3.self_attn.k_proj" in left["llm_int8_skip_modules"]
    with open_llama(tmp_path) as model:
        ours = logits(model)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert torch.allclose(ours, logits(theirs), rtol=0, atol=0.02)


# -- the report ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_packed_module_is_reported(plain: Path, tmp_path: Path, mode: str) -> None:
    steps: list[tuple[str, int, int]] = []
    report = nexus.convert(plain, tmp_path, mode, progress=lambda *step: steps.append(step))
    assert len(report) == 7 * NUM_LAYERS
    for line in report:
        kind = mode if mode != "mixed" else KIND_OF[line.name.split(".")[3]]
        assert line.weights == kind
        # Of normal weights: a sixteenth of the largest of 64, and half a 127th of that of a row.
        assert 0.085 < line.error < 0.1 if "nf4" in kind else 0.003 < line.error < 0.01
        share = line.bytes_after / line.bytes_before
        assert 0.25 < share < 0.35 if "nf4" in kind else 0.5 < share < 0.53
    kept = json.loads((tmp_path / REPORT).read_text())
    assert kept == [vars(line) for line in report]
    total = Checkpoint.open(plain).nbytes
    assert {what for what, _, _ in steps} == {"packing"}
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    assert len(steps) == NUM_SHARDS
    assert steps[-1][1:] == (total, total)


# -- interrupted -----------------------------------------------------------------------------------


@pytest.fixture
def stopped(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A conversion whose disk was full at its third shard; it has room again."""
    from nexus_ext.quant import shards

    write, num_calls = shards.write_safetensors, 0

    def fail_third(path: Path, tensors: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, tensors)

    folder = tmp_path / "packed"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_safetensors", fail_third)
        with pytest.raises(WriteError, match=r"No space left.*what is done stays"):
            nexus.convert(plain, folder)
    assert len(times_of(folder)) == 2
    assert not (folder / INDEX).exists()
    yield folder
    assert not list(folder.glob("*.partial"))


def test_an_interrupted_conversion_goes_on(plain: Path, converted: Any, stopped: Path) -> None:
    done = times_of(stopped)
    report = nexus.convert(plain, stopped)
    after = times_of(stopped)
    assert {name: after[name] for name in done} == done
    assert bytes_in(stopped) == bytes_in(converted("nf4"))
    assert len(report) == 7 * NUM_LAYERS
    assert not (stopped / JOURNAL).exists()


# Blocks that were promised to the file and never written.
AFTER_A_CRASH = {"in zeros": bytes(100), "in garbage": b'{"shard": "\xc3\xff'}


@pytest.mark.parametrize("torn", [1, 20, "in zeros", "in garbage", "no end of line"])
def test_a_torn_line_costs_at_most_its_shard(
    plain: Path, converted: Any, stopped: Path, torn: Any
) -> None:
    first, second = sorted(times_of(stopped))
    before = times_of(stopped)
    text = (stopped / JOURNAL).read_bytes()
    if torn in AFTER_A_CRASH:
        text += AFTER_A_CRASH[torn]
    else:
        text = text[: -(1 if torn == "no end of line" else torn + 1)]
    (stopped / JOURNAL).write_bytes(text)
    nexus.convert(plain, stopped)
    after = times_of(stopped)
    assert after[first] == before[first]
    if torn in AFTER_A_CRASH:
        assert after[second] == before[second]
    assert bytes_in(stopped) == bytes_in(converted("nf4"))


@pytest.mark.parametrize("torn", ["", "no end of line"])
def test_interrupted_twice(
    plain: Path,
    converted: Any,
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    torn: str,
) -> None:
    """What was noted after a torn line counts as well."""
    from nexus_ext.quant import shards

    if torn:
        (stopped / JOURNAL).write_bytes((stopped / JOURNAL).read_bytes()[:-5])
    write = shards.write_safetensors

    def fail_fifth(path: Path, tensors: Any) -> None:
        if "00005" in path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_safetensors", fail_fifth)
        with pytest.raises(WriteError, match="Input/output error"):
            nexus.convert(plain, stopped)
    before = times_of(stopped)
    assert len(before) == 4
    nexus.convert(plain, stopped)
    after = times_of(stopped)
    assert {name: after[name] for name in before} == before
    assert bytes_in(stopped) == bytes_in(converted("nf4"))


def test_a_killed_conversion_goes_on(
    plain: Path, converted: Any, tmp_path: Path, run_python: Callable[..., str]
) -> None:
    script = """
import os, sys, nexus_ext
def progress(what, done, total):
    if done > total / 2:
        print("killed", flush=True)
        os._exit(0)
nexus_ext.convert(sys.argv[1], sys.argv[2], progress=progress)
"""
    assert run_python(script, plain, tmp_path / "packed").split() == ["killed"]
    before = times_of(tmp_path / "packed")
    assert 0 < len(before) < NUM_SHARDS
    nexus.convert(plain, tmp_path / "packed")
    after = times_of(tmp_path / "packed")
    assert {name: after[name] for name in before} == before
    assert bytes_in(tmp_path / "packed") == bytes_in(converted("nf4"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_what_is_done(plain: Path, converted: Any, small_disk: Path) -> None:
    folder = small_disk / "packed"
    with pytest.raises(WriteError, match="No space left"):
        nexus.convert(plain, folder)
    before = times_of(folder)
    assert 0 < len(before) < NUM_SHARDS
    assert not list(folder.glob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    nexus.convert(plain, folder)
    after = times_of(folder)
    assert {name: after[name] for name in before} == before
    assert bytes_in(folder) == bytes_in(converted("nf4"))


# -- refused ---------------------------------------------------------------------------------------


def assert_untouched(folder: Path, error: type[Exception], says: str, *asked: Any) -> None:
    before = bytes_in(folder)
    with pytest.raises(error, match=says) as caught:
        nexus.convert(asked[0], folder, *asked[1:])
    assert type(caught.value) is error
    assert str(folder) in str(caught.value)
    assert bytes_in(folder) == before


def test_a_folder_with_other_things_is_left_alone(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("dear")
    assert_untouched(tmp_path, ConfigError, "must be new or an interrupted", plain)


def test_a_finished_conversion_is_not_made_again(plain: Path, tmp_path: Path) -> None:
    nexus.convert(plain, tmp_path)
    assert_untouched(tmp_path, ConfigError, "must be new or an interrupted", plain)


def test_a_source_is_not_its_own_destination(plain: Path) -> None:
    assert_untouched(plain, ConfigError, "must be new or an interrupted", plain)


@pytest.mark.parametrize("mode", ["int8", NF4Config(blocksize=128), NF4Config(skip=("a",))])
def test_a_conversion_goes_on_with_its_own_config_alone(
    plain: Path, stopped: Path, mode: Any
) -> None:
    assert_untouched(stopped, ConfigError, "another source or configuration", plain, mode)


def test_a_conversion_goes_on_with_its_own_source_alone(
    plain: Path, stopped: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(plain, tmp_path / "other")
    assert_untouched(stopped, ConfigError, "another source or configuration", other)


@pytest.mark.parametrize("journal", ["", "{", "no json\n", '{"source": 1}\n', "[]\n"])
def test_a_journal_that_is_none_is_left_alone(plain: Path, tmp_path: Path, journal: str) -> None:
    (tmp_path / JOURNAL).write_text(journal)
    assert_untouched(tmp_path, ConfigError, "another source or configuration", plain)


@pytest.mark.parametrize("mode", MODES)
def test_a_packed_source_is_refused(converted: Any, tmp_path: Path, mode: str) -> None:
    with pytest.raises(CheckpointFormatError, match=r"plain weights, and '.*(quant_state|SCB)"):
        nexus.convert(converted(mode), tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def with_weight(plain: Path, folder: Path, name: str, change: Callable[..., Any]) -> Path:
    source = Path(shutil.copytree(plain, folder / "spoilt"))
    tensors = load_file(source / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


def with_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] = value
        return weight

    return change


@pytest.mark.parametrize(
    ("mode", "value"),
    [
        *((mode, float("nan")) for mode in MODES),
        ("nf4", float("inf")),
        ("int8", float("-inf")),
    ],
)
def test_weights_that_are_not_finite_are_refused(
    plain: Path, tmp_path: Path, mode: str, value: float
) -> None:
    name = "model.layers.4.mlp.up_proj.weight"
    source = with_weight(plain, tmp_path, name, with_one(value))
    with pytest.raises(QuantizationError, match=r"finite.*model\.layers\.4\.mlp\.up_proj\.weight"):
        nexus.convert(source, tmp_path / "packed", mode)
    assert not (tmp_path / "packed" / INDEX).exists()
    assert not list((tmp_path / "packed").glob("*.partial"))


def test_what_float16_cannot_hold_is_refused_in_int8_alone(plain: Path, tmp_path: Path) -> None:
    name = "model.layers.4.mlp.up_proj.weight"
    source = with_weight(plain, tmp_path, name, with_one(1e6))
    with pytest.raises(QuantizationError, match=r"model\.layers\.4\.mlp\.up_proj\.weight"):
        nexus.convert(source, tmp_path / "int8", "int8")
    nexus.convert(source, tmp_path / "nf4", "nf4")


class Blocks(nn.Module):
    def __init__(self, num_blocks: int, width: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Linear(width, width, bias=False, device=device, dtype=dtype)
            for _ in range(num_blocks)
        )


@pytest.mark.parametrize("config", [NF4Config(), NF4Config(nested=True), INT8Config()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: torch.dtype, config: Any) -> None:
    save_file({"blocks.1.weight": torch.ones(8, 64).to(dtype)}, tmp_path / "m.safetensors")
    model = Blocks(2, 64, torch.float32, "meta")
    checkpoint = Checkpoint.open(tmp_path / "m.safetensors")
    with pytest.raises(QuantizationError, match=rf"blocks\.1\.weight is {dtype}"):
        convert_checkpoint(model, checkpoint, [["blocks.1.weight"]], tmp_path / "packed", config)


@pytest.mark.parametrize(
    "config",
    [
        NF4Config(skip=("*",)),
        INT8Config(skip=("*.mlp.*", "*.self_attn.*")),
        MixedConfig(attention=None, feed_forward=None),
    ],
)
def test_a_conversion_must_pack_something(plain: Path, tmp_path: Path, config: Any) -> None:
    with pytest.raises(ConfigError, match="would pack none"):
        nexus.convert(plain, tmp_path / "packed", config)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("weights", ["nf3", "", "NF4"])
def test_unknown_names_are_refused(plain: Path, tmp_path: Path, weights: str) -> None:
    says = f"one of nf4, nf4-nested, nf4-fine, int8, mixed, got '{weights}'"
    with pytest.raises(ConfigError, match=says):
        nexus.convert(plain, tmp_path / "packed", weights)
    with pytest.raises(ConfigError, match=says):
        nexus.from_pretrained(plain, weights=weights)
    with pytest.raises(ConfigError, match=says):
        nexus.quantize_layer(nn.Linear(64, 64), weights)
    assert not (tmp_path / "packed").exists()


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["NF4Config()", "NF4Config(nested=True)", "INT8Config()"])
def test_a_conversion_holds_one_group(
    tmp_path: Path, run_python: Callable[..., str], config: str
) -> None:
    """48 groups of 4 MiB. What is mapped of the source is the page cache's: it is not counted."""
    num_blocks, width = 48, 1024
    weight = torch.randn(width, width)
    names = [f"blocks.{index}.weight" for index in range(num_blocks)]
    save_file({name: weight.clone() for name in names}, tmp_path / "model.safetensors")
    script = f"""
import sys, threading, time
from pathlib import Path
import torch
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.quant import INT8Config, NF4Config
from nexus_ext.quant.convert import convert_checkpoint
from tests.test_quant_convert import Blocks

def own_kib():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = Blocks({num_blocks}, {width}, torch.float32, "meta")
names = [[name] for name in {names!r}]
checkpoint = Checkpoint.open(folder / "model.safetensors")
torch.ops.nexus.quantize_nf4(torch.ones(64, 64), 64)
base = peak = own_kib()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, own_kib())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
convert_checkpoint(model, checkpoint, names, folder / "packed", {config})
done = True
watcher.join()
print(peak - base)
"""
    root = Path(__file__).parents[1]
    grown = int(run_python(script, tmp_path, PYTHONPATH=str(root))) << 10
    assert grown < num_blocks * width * width * 4 / 2


# -- quantize_layer --------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Linear(128, 128)
        self.mlp = nn.Sequential(nn.Linear(128, 192, bias=False), nn.ReLU(), nn.Linear(192, 128))
        self.norm = nn.LayerNorm(128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(x + self.mlp(self.self_attn(x)))
        return y


X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))


def parts_of(module: PackedLinear) -> dict[str, torch.Tensor]:
    return dict(module.named_buffers())


def same_bytes(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.named_buffers(), theirs.named_buffers(), strict=True)
    return all(a == b and s.dtype == t.dtype and torch.equal(s, t) for (a, s), (b, t) in pairs)


@pytest.mark.parametrize("mode", PLAIN_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear_becomes_a_packed_one(mode: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(128, 64).to(dtype)
    made = nexus.quantize_layer(linear, mode)
    assert isinstance(made, PackedLinear)
    assert isinstance(linear, nn.Linear)
    assert made.bias is linear.bias
    x = X.to(dtype)
    assert torch.equal(made(x), made.packing.linear(x, parts_of(made), made.bias))
    assert made.weight.dtype == dtype
    error = (made.weight.float() - linear.weight.float()).norm() / linear.weight.float().norm()
    assert error < (0.1 if "nf4" in mode else 0.01)
    like = nn.functional.linear(x, made.weight, made.bias)
    assert torch.allclose(made(x), like, rtol=2e-2, atol=2e-2)
    assert "128, 64" in repr(made)


@pytest.mark.parametrize("mode", MODES)
def test_a_block_is_packed_in_place(mode: str) -> None:
    layer = Layer().eval()
    want = layer(X)
    assert nexus.quantize_layer(layer, mode) is layer
    assert isinstance(layer.norm, nn.LayerNorm)
    kinds = {
        name: type(module.packing).__name__
        for name, module in layer.named_modules()
        if isinstance(module, PackedLinear)
    }
    attention = "INT8" if mode in ("int8", "mixed") else None
    nibbles = "NestedNF4" if mode == "nf4-nested" else "NF4"
    assert kinds == {
        "self_attn": attention or nibbles,
        "mlp.0": "INT8" if mode == "int8" else nibbles,
        "mlp.2": "INT8" if mode == "int8" else nibbles,
    }
    assert layer.mlp[0].bias is None
    assert not layer.mlp[0].training
    assert (layer(X) - want).norm() / want.norm() < (0.02 if mode == "int8" else 0.2)


def test_a_config_counts_more_than_a_mode() -> None:
    layer = nexus.quantize_layer(Layer(), "nf4", INT8Config(skip=("mlp.*",)))
    assert isinstance(layer.self_attn, PackedLinear)
    assert isinstance(layer.mlp[0], nn.Linear)
    assert nexus.quantize_layer(nn.Linear(64, 64), config=NF4Config(128)).packing.blocksize == 128


@pytest.mark.parametrize("mode", MODES)
def test_packed_layers_are_saved_and_loaded(tmp_path: Path, mode: str) -> None:
    layer = nexus.quantize_layer(Layer(), mode)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert torch.equal(loaded(X), layer(X))
    assert same_bytes(loaded, layer)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(9)
    other = nexus.quantize_layer(Layer(), mode)
    assert not torch.equal(other(X), layer(X))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(X), layer(X))
    assert torch.equal(copy.deepcopy(layer)(X), layer(X))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "convert",
    [
        lambda layer: layer.half(),
        lambda layer: layer.to(torch.bfloat16),
        lambda layer: layer.double().float().half(),
        lambda layer: layer.to(torch.float16).to("cpu"),
    ],
)
def test_parts_keep_their_bits_when_a_layer_is_converted(mode: str, convert: Any) -> None:
    layer = nexus.quantize_layer(Layer(), mode)
    before = copy.deepcopy(layer)
    after = convert(layer)
    assert same_bytes(after, before)
    dtype = after.self_attn.bias.dtype
    assert dtype != torch.float32
    x = X.to(dtype)
    assert torch.allclose(after(x).float(), before(X), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_and_biases_get_gradients(mode: str) -> None:
    layer = nexus.quantize_layer(Layer(), mode)
    x = X.clone().requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert layer.self_attn.bias.grad.abs().sum() > 0
    assert [name for name, _ in layer.named_parameters() if "weight" in name] == ["norm.weight"]


def test_tied_modules_stay_tied() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(64, 64))})
    nexus.quantize_layer(model)
    assert isinstance(model["a"], PackedLinear)
    assert model["a"] is model["b"][0]
    assert model["a"] is not model["b"][1]


@pytest.mark.parametrize("module", [nn.LayerNorm(8), nn.Sequential(), nn.Embedding(8, 8)])
def test_a_module_without_a_linear_is_refused(module: nn.Module) -> None:
    with pytest.raises(ConfigError, match=rf"{type(module).__name__} has none to pack"):
        nexus.quantize_layer(module)


@pytest.mark.parametrize("mode", PLAIN_MODES)
def test_a_weight_that_cannot_be_packed_is_named(mode: str) -> None:
    layer = Layer().requires_grad_(False)
    layer.mlp[2].weight[1, 2] = float("nan")
    with pytest.raises(QuantizationError, match=r"mlp\.2.*NaN or infinity"):
        nexus.quantize_layer(layer, mode)


def test_a_saved_layer_is_small(tmp_path: Path) -> None:
    linear = nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16)
    sizes = []
    for module in (linear, nexus.quantize_layer(linear)):
        torch.save(module, tmp_path / "layer.pt")
        sizes.append((tmp_path / "layer.pt").stat().st_size)
    assert sizes[1] < 0.3 * sizes[0]
