"""An index from a stranger names files beside it, or is refused; nothing else is ever opened."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.checkpoint_files import parse_index
from nexus_ext.errors import CheckpointError, CheckpointFormatError
from tests.conftest import RecordCount
from tests.hostile_headers import Pairs, Tokens, header, tensor, with_length

NUM_RUNS = 4
NUM_MUTANTS = 80_000  # in each run


def write(path: Path, name: str = "a") -> Path:
    path.write_bytes(with_length(header(tensor(name=name)).encode()) + b"xx")
    return path


def write_index(folder: Path, weight_map: dict[str, str]) -> Path:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 2}, "weight_map": weight_map}))
    return index


# ---------------------------------------------------------------------------- names that lead out

# What a separator or a dot is somewhere: other systems, URLs, look-alikes, encodings read wrongly.
SEPARATORS = [
    *("/", "\\", "//", "\\\\", "/./", "\\/", "%2f", "%2F", "%5c", "%252f", "%c0%af", "&#47;"),
    *("\u2215", "\u2044", "\uff0f", "\u29f8", "\uff3c", "\u2216", "\ufe68", "\u00a5", "\u20a9"),
    *("\u0338", ":", "|", "\0", "\0/", "\n/", "\r\n", "\t/", "\x7f/", "\u202e/", "\u200b/"),
]
PARENTS = [
    "..",
    ".",
    "...",
    "%2e%2e",
    "\uff0e\uff0e",
    "\u2024\u2024",
    "\u2025",
    ".%2e",
    " ..",
    ".. ",
]
FRONTS = [
    *("/", "//", "///", "\\", "\\\\", "C:", "c:", "C:\\", "Z:/", "\\\\?\\C:\\", "\\\\.\\C:\\"),
    *("//server/share/", "\\\\server\\share\\", "file:", "file://", "file:///", "http://host/"),
    *("~/", "~root/", "$HOME/", "${HOME}/", "%USERPROFILE%\\", "/proc/self/cwd/../", "/dev/fd/"),
    *(
        "./",
        "./../",
        "sub/",
        "sub/../../",
        "sub\\..\\..\\",
        "\0",
        "\0../",
        "\u202e../",
        "\ufeff../",
    ),
]
WHOLE = [
    *("", ".", "..", "/", "\\", " ", "...", "~", "*", "?", "-", "--help", "|id", "$(id)", "`id`"),
    *("/etc/passwd", "/proc/self/environ", "/proc/self/mem", "/dev/zero", "/dev/stdin", "/dev/tty"),
    *(
        "CON",
        "NUL",
        "aux.safetensors",
        "COM1",
        "C:outside.safetensors",
        "outside.safetensors::$DATA",
    ),
    *("outside.safetensors\0.safetensors", "outside.safetensors\0", "../outside.safetensors\0.x"),
    *(
        "outside.safetensors/",
        "outside.safetensors/.",
        "outside.safetensors\\",
        "n" * 256,
        "n" * 5000,
    ),
    *(
        "\u00e9" * 128,
        "sub/outside.safetensors",
        "sub\\outside.safetensors",
        "inner/../x.safetensors",
    ),
]
OUTSIDE = "outside.safetensors"


def spellings(outside: Path) -> list[str]:
    """Ways to name a file that is not beside the index; some are plain names on Linux."""
    steps = itertools.product(PARENTS, SEPARATORS, (1, 3))
    names = [(parent + separator) * times + OUTSIDE for parent, separator, times in steps]
    names += [front + OUTSIDE for front in FRONTS]
    names += [front + str(outside).lstrip("/") for front in FRONTS]
    names += [f"{PureWindowsPath(outside)}", f"{PurePosixPath(outside)}", f"C:{outside}"]
    return sorted({*names, *WHOLE})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a shard in it, and shards worth stealing around it."""
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    for place in (tmp_path, inner / "sub"):
        write(place / OUTSIDE)
    write(inner / "x.safetensors")
    return inner


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every path that is opened from now on, links resolved."""
    paths: list[str] = []
    plain_open = os.open

    def told(path: str, flags: int, mode: int = 0o777) -> int:
        paths.append(os.path.realpath(path))
        return plain_open(path, flags, mode)

    monkeypatch.setattr(os, "open", told)
    return paths


def test_no_spelling_leads_out_of_the_folder(
    folder: Path, opened: list[str], record_count: RecordCount
) -> None:
    names = spellings(folder.parent / OUTSIDE)
    assert len(names) >= 200
    counts: Counter[str] = Counter()
    for name in names:
        index = write_index(folder, {"a": name})
        opened.clear()
        with pytest.raises(CheckpointFormatError) as caught:
            Checkpoint.open(index)
        assert opened == [str(index)], name
        message = str(caught.value)
        assert len(message) < 2000 + len(str(folder))
        counts["not plain" if "is the plain name of a file" in message else "not there"] += 1
    record_count("spellings of a path in an index", len(names), counts)
    assert counts["not plain"] >= 200


def test_a_plain_name_however_odd_is_a_file_beside_the_index(
    folder: Path, opened: list[str]
) -> None:
    """Percent signs, look-alikes and dots mean nothing here: the name is used as it stands."""
    odd = ["..%2foutside.safetensors", "..\u2215x", "...", " ..", "~", "$(id)", "ab:c", "CON", "-"]
    for number, name in enumerate(odd):
        write(folder / name, f"t{number}")
    index = write_index(folder, {f"t{number}": name for number, name in enumerate(odd)})
    assert len(Checkpoint.open(index).files) == len(odd)
    assert {os.path.dirname(path) for path in opened} == {str(folder)}


# ------------------------------------------------------------------------------------- mutations

WORDS = rb"""
"" "a" "b" "weight_map" "metadata" "x.safetensors" "y.safetensors" ".." "../outside.safetensors"
"/etc/passwd" "sub/x" "..\\x" "\u002e\u002e\u002fx" "\u0000" "C:x" "x.bin" "\ud800" "\uff0f" \u002f
0 1.5 -1 1e999 NaN Infinity null true [] {} [0] {"a":"x.safetensors"} , : { } [ ] ../ / \\ . %2e
"""
INDEXES = [
    b'{"metadata":{"total_size":2},"weight_map":{"a":"x.safetensors","b":"y.safetensors"}}',
    b'{"weight_map": {"a": "x.safetensors"}, "metadata": {"total_size": 1.5, "k": ["v", null]}}',
    b'{"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"'
    b',"c":"model-00001-of-00002.safetensors"}}',
    b'{"weight_map":{"\\u0061":"\\u0078.safetensors"}}',
    b'{"weight_map":{}}',
]


def lenient(raw: bytes) -> object:
    """The weight_map by Python's own parser, every pair as it stands."""
    top = json.loads(raw, object_pairs_hook=Pairs, parse_int=str, parse_float=str)
    [found] = [value for name, value in top if name == "weight_map"]
    return found


def mutant(rng: random.Random, tokens: Tokens) -> bytes:
    raw = tokens.mutated(rng)
    if rng.random() < 0.2 and raw:
        place = int(rng.random() * len(raw))
        raw = raw[:place] + bytes([int(rng.random() * 256)]) + raw[place + 1 :]
    return raw


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_RUNS))
def test_a_mutated_index_names_files_beside_it_or_is_refused(
    seed: int, record_count: RecordCount
) -> None:
    rng = random.Random(seed)
    tokens = Tokens(INDEXES, WORDS.split())
    counts: Counter[str] = Counter()
    distinct: set[int] = set()
    for _ in range(NUM_MUTANTS):
        raw = mutant(rng, tokens)
        distinct.add(hash(raw))
        try:
            shards = parse_index(raw, Path("/models/m/model.safetensors.index.json"))
        except CheckpointError:
            counts["refused"] += 1
            continue
        counts["accepted"] += 1
        for shard in shards:
            path = os.path.normpath(f"/models/m/{shard}")
            assert os.path.split(path) == ("/models/m", shard), raw
            assert PureWindowsPath(shard).name == shard, raw
            assert shard.isprintable(), raw
        pairs = [(tensor, shard) for shard, tensors in shards.items() for tensor in tensors]
        assert sorted(pairs) == sorted(lenient(raw)), raw  # type: ignore[call-overload]
    record_count("mutated indexes", counts.total(), {"distinct": len(distinct), **counts})
    assert counts["accepted"] > NUM_MUTANTS // 40
    assert counts["refused"] > NUM_MUTANTS // 20


def test_a_mutated_index_opens_nothing_outside_of_its_folder(
    folder: Path, opened: list[str], record_count: RecordCount
) -> None:
    """The whole way: real shards beside the index, others around the folder."""
    rng = random.Random(100)
    tokens = Tokens(INDEXES, WORDS.split())
    write(folder / "y.safetensors", "b")
    index = folder / "model.safetensors.index.json"
    counts: Counter[str] = Counter()
    for _ in range(5000):
        index.write_bytes(mutant(rng, tokens))
        opened.clear()
        try:
            Checkpoint.open(index)
        except CheckpointError:
            counts["refused"] += 1
        else:
            counts["opened"] += 1
        assert {os.path.dirname(path) for path in opened} == {str(folder)}
    record_count("mutated index files", counts.total(), counts)
    assert counts["opened"] > 100
    assert counts["refused"] > 100
