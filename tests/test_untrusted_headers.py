"""Headers from a stranger: what the safetensors library refuses is refused, a million times.

Our parser is judged alone: the library, which has the second word in `Checkpoint.open`, is not
behind it here. Where both accept they must find the same tensors with the same bytes; where only we
refuse, it must be by one of the rules of `hostile_headers.STRICTER`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from nexus_ext.checkpoint import Checkpoint
from nexus_ext.errors import CheckpointError
from tests.conftest import RecordCount
from tests.hostile_headers import (
    STRICTER,
    Mutator,
    corpus,
    library_finds,
    reason,
    shown,
    we_find,
    with_length,
)

CASES = corpus()
NUM_RUNS = 10
NUM_MUTANTS = 100_000  # in each run


def verdict(head: bytes, data: bytes) -> str:
    """ "legal", "illegal" or a stricter rule; fails where the judges contradict each other."""
    raw = with_length(head) + data
    theirs = library_finds(raw)
    try:
        ours = we_find(head, raw)
    except CheckpointError as error:
        if theirs is None:
            return "illegal"
        return reason(head, str(error)) or f"refused without a written rule: {head!r}: {error}"
    assert ours == theirs, f"accepted, but the library finds {theirs}: {head!r}"
    return "legal"


def test_the_corpus_is_large_and_holds_every_rule() -> None:
    assert len(CASES) >= 150
    assert {case.verdict for case in CASES.values()} == {"legal", "illegal", *STRICTER}


@pytest.mark.parametrize("name", CASES)
def test_a_named_header_is_judged_as_written(name: str) -> None:
    case = CASES[name]
    assert verdict(case.head, case.data) == case.verdict


@pytest.mark.parametrize("name", CASES)
def test_a_named_file_is_opened_or_refused_as_written(name: str, tmp_path: Path) -> None:
    """The whole way through the file system, with the library behind our parser."""
    case = CASES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(case.file)
    if case.verdict == "legal":
        found = Checkpoint.open(path)
        assert shown(list(found.entries.values()), case.file) == library_finds(case.file)
    else:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(path)
        assert len(str(caught.value)) < 2000  # whatever stands in the file


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_RUNS))
def test_mutated_headers_are_judged_like_the_library_or_by_a_written_rule(
    seed: int, record_count: RecordCount
) -> None:
    mutator = Mutator(seed, CASES)
    counts: Counter[str] = Counter()
    distinct: set[int] = set()
    for _ in range(NUM_MUTANTS):
        mutant = mutator.one()
        counts[verdict(*mutant)] += 1
        distinct.add(hash(mutant))
    outcomes = {"distinct": len(distinct), "legal": counts["legal"], "illegal": counts["illegal"]}
    outcomes["refused by a stricter rule"] = counts.total() - counts["legal"] - counts["illegal"]
    record_count("header mutations compared with safetensors", counts.total(), outcomes)
    assert counts.keys() <= {"legal", "illegal", *STRICTER}
    assert len(distinct) > NUM_MUTANTS // 2
    assert counts["legal"] > NUM_MUTANTS // 20  # the mutations do hit, and do not hit everything
    assert counts["illegal"] > NUM_MUTANTS // 20
    rare = {"long name", "long fields", "dimensions"}  # by the corpus only
    assert counts.keys() >= STRICTER.keys() - rare


def test_mutated_files_are_opened_or_refused_and_nothing_else(
    tmp_path: Path, record_count: RecordCount
) -> None:
    """With lies about the header's length, and files cut anywhere."""
    mutator = Mutator(1000, CASES)
    path = tmp_path / "model.safetensors"
    counts: Counter[str] = Counter()
    for number in range(6000):
        head, data = mutator.one()
        length = len(head) + (0, 0, 0, 1, -1, -len(head), 2**40, number % 7 - 3)[number % 8]
        raw = max(0, length).to_bytes(8, "little") + head + data
        raw = raw[: len(raw) - number % 13] if number % 5 == 0 else raw
        path.write_bytes(raw)
        try:
            found = Checkpoint.open(path)
        except CheckpointError:
            counts["refused"] += 1
            continue
        counts["opened"] += 1
        assert shown(list(found.entries.values()), raw) == library_finds(raw)
    record_count("mutated safetensors files", counts.total(), counts)
    assert counts["opened"] > 200
    assert counts["refused"] > 200
