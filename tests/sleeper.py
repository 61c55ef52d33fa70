"""A process that owns something until it is killed."""

from __future__ import annotations

import subprocess
import sys

from nexus_ext import owners

__all__ = ["name_of", "sleeper"]


def sleeper() -> subprocess.Popen[str]:
    """A process that has begun, and waits to be killed."""
    code = "import sys; print('up', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def name_of(pid: int) -> str:
    boot, namespace, _, _ = owners.own_name().split("-")
    state = owners._state_and_start(pid)
    assert state is not None
    return f"{boot}-{namespace}-{pid}-{state[1]}"
