"""What a user may ask for, and what the environment says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nexus_ext import config
from nexus_ext.config import StreamConfig
from nexus_ext.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEXUS_PREFAULT", "NEXUS_HOME", "NEXUS_POISON"):
        monkeypatch.delenv(name, raising=False)


def test_asking_for_nothing_is_the_default() -> None:
    assert StreamConfig.of() == StreamConfig()


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ({"budget": "1GiB"}, {"budget": 1 << 30}),
        ({"budget": 12345}, {"budget": 12345}),
        ({"budget": "auto"}, {"budget": "auto"}),
        ({"ram_budget": "300 MB"}, {"ram_budget": 300_000_000}),
        ({"chunk_bytes": "64KiB"}, {"chunk_bytes": 1 << 16}),
        ({"lookahead": 3}, {"lookahead": 3}),
        ({"lookahead": "3"}, {"lookahead": 3}),
        ({"depth": 2}, {"depth": 2}),
        ({"depth": 1024}, {"depth": 1024}),
        ({"io": "mmap"}, {"io": "mmap"}),
        ({"verify": "always"}, {"verify": "always"}),
        ({"prefault": "on"}, {"prefault": "on"}),
        ({"prefault": "1"}, {"prefault": "on"}),
        ({"prefault": "0"}, {"prefault": "off"}),
        ({"use_uring": False}, {"use_uring": False}),
    ],
)
def test_what_is_written_is_converted(asked: dict[str, Any], got: dict[str, Any]) -> None:
    assert StreamConfig.of(**asked) == StreamConfig(**got)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"io": "warp"}, "io must be one of auto, direct, buffered, mmap, gds; got 'warp'"),
        ({"io": None}, "got None"),
        ({"verify": "on"}, "verify must be one of off, first, always; got 'on'"),
        ({"verify": True}, "got True"),
        ({"prefault": "yes"}, "prefault must be one of auto, on, off; got 'yes'"),
        ({"lookahead": "two"}, "number from 1 on or 'auto', got 'two'"),
        ({"lookahead": None}, "got None"),
        ({"lookahead": []}, "got []"),
        ({"budget": "much"}, "'much'"),
        ({"budget": None}, "None"),
        ({"budget": -1}, "-1"),
        ({"ram_budget": "-1GB"}, "-1GB"),
        ({"chunk_bytes": 65535}, "at least 65536, got 65535"),
        ({"depth": 1}, "2..1024 reads in flight, got 1"),
        ({"depth": 1025}, "got 1025"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_those_that_can(
    asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        StreamConfig.of(**asked)
    assert words in str(refused.value)
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize(
    ("value", "prefault"),
    [("1", "on"), ("on", "on"), ("0", "off"), ("off", "off"), ("auto", "auto")],
)
def test_the_environment_sets_the_default_of_prefault(
    monkeypatch: pytest.MonkeyPatch, value: str, prefault: str
) -> None:
    monkeypatch.setenv("NEXUS_PREFAULT", value)
    assert StreamConfig.of().prefault == prefault


def test_an_option_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_PREFAULT", "1")
    assert StreamConfig.of(prefault="off").prefault == "off"
    monkeypatch.setenv("NEXUS_PREFAULT", "nonsense")
    assert StreamConfig.of(prefault="auto").prefault == "auto"


def test_nonsense_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_PREFAULT", "nonsense")
    with pytest.raises(ConfigError, match="got 'nonsense'"):
        StreamConfig.of()


@pytest.mark.parametrize(
    ("value", "poisons"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_only_1_poisons(monkeypatch: pytest.MonkeyPatch, value: str | None, poisons: bool) -> None:
    if value is not None:
        monkeypatch.setenv("NEXUS_POISON", value)
    assert config.poisons_freed_arenas() is poisons


def test_home_is_a_folder_that_may_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.home_folder() == Path.home() / ".cache" / "nexus"
    monkeypatch.setenv("NEXUS_HOME", "~/elsewhere")
    assert config.home_folder() == Path.home() / "elsewhere"
    monkeypatch.setenv("NEXUS_HOME", "")
    assert config.home_folder() == Path.home() / ".cache" / "nexus"


def test_asking_for_home_makes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "new"))
    assert not config.home_folder().exists()
