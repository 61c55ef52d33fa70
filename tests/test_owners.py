"""Whose a temporary is: alive, dead, free, or nobody can say."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sleeper import name_of, sleeper

from nexus_ext import owners
from nexus_ext.owners import Owner

PATIENCE_SECONDS = 60


def test_what_became_of_an_owner() -> None:
    assert owners.fate(owners.own_name()) == "alive"
    assert owners.fate(owners.free_name()) == "free"
    assert owners.free_name() != owners.free_name()
    with sleeper() as process:
        name = name_of(process.pid)
        assert owners.fate(name) == "alive"
        process.kill()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while owners.fate(name) == "alive" and time.monotonic() < deadline:
            pass
        assert owners.fate(name) == "dead"  # though nobody has waited for it
        process.wait()
        assert owners.fate(name) == "dead"


def test_a_pid_that_was_given_to_another_process_is_not_the_owner() -> None:
    boot, namespace, pid, began = owners.own_name().split("-")
    assert owners.fate(f"{boot}-{namespace}-{pid}-{int(began) - 1}") == "dead"


@pytest.mark.parametrize(
    "name", ["", "x", "unknown-0123", "0" * 32 + "-1-1-1", "0" * 12 + "-1-1-1"]
)
def test_of_another_boot_or_namespace_nobody_can_say(name: str) -> None:
    assert owners.fate(name) == "unknown"
    boot, _, pid, began = owners.own_name().split("-")
    assert owners.fate(f"{boot}-1-{pid}-{began}") == "unknown"


def test_of_a_stranger_only_the_time_tells() -> None:
    me = Owner.current()
    inner = Owner(me.boot, me.namespace + 1, me.pid, me.began)
    reused = Owner(me.boot, me.namespace, me.pid, me.began - 1)
    day = 24 * 3600
    assert [inner.is_dead(time.time() - age) for age in (0, day - 600, day + 600)] == [0, 0, 1]
    assert not me.is_dead(0)
    assert reused.is_dead(time.time())


def test_without_proc_nobody_can_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = owners.own_name()
    monkeypatch.setattr(owners, "_PROC", tmp_path)
    assert owners.own_name().startswith("unknown-")
    assert owners.fate(name) == "unknown"
    with pytest.raises(FileNotFoundError, match="mount it"):
        Owner.current()


@pytest.mark.parametrize("pid", [0, 2**31, 9_999_999_999])
def test_a_number_that_is_no_pid_is_nobody(pid: int) -> None:
    """As a file's name may hold."""
    own = Owner.current()
    assert Owner(own.boot, own.namespace, pid, 1).fate() == "dead"


def test_an_owner_is_read_back_as_it_was_written() -> None:
    me = Owner.current()
    assert Owner.parse(str(me)) == me
    assert str(me) == owners.own_name()
    assert Owner.parse(f"{me}0x") is None


def test_a_process_is_alive_while_one_of_its_threads_is() -> None:
    """The first thread has ended, and is a zombie; another goes on."""
    code = """
import ctypes, sys, threading
def last():
    print('up', flush=True)
    sys.stdin.read()
threading.Thread(target=last).start()
ctypes.CDLL(None).pthread_exit(None)
"""
    command = [sys.executable, "-c", code]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        name = name_of(process.pid)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while owners._state_and_start(process.pid)[0] != "Z" and time.monotonic() < deadline:  # type: ignore[index]
            pass
        assert owners.fate(name) == "alive"
        process.kill()
        process.wait()
        assert owners.fate(name) == "dead"
