"""Whose a partial file is, told by its name: this process, one that is dead, or nobody can say.

Locks are not asked: on some file systems `flock` succeeds for everybody. A name holds the boot, the
pid namespace, the pid and when that process began; within one boot and namespace that tells for
certain whether the owner is gone.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Literal

__all__ = ["Fate", "fate", "free_name", "own_name"]

Fate = Literal["alive", "dead", "free", "unknown"]

_PROC = Path("/proc")
_NAME = re.compile(r"([0-9a-f]{12})-([0-9]+)-([0-9]+)-([0-9]+)")


def own_name() -> str:
    """The name of this process as an owner; after a fork the child has another."""
    try:
        state = _state(os.getpid())
        return f"{_boot()}-{_namespace()}-{os.getpid()}-{state[1] if state else 0}"
    except OSError:  # no /proc: nobody will be able to say
        return f"unknown-{secrets.token_hex(4)}"


def free_name() -> str:
    """A name that says: no process writes here any more. Unique, so it is taken once."""
    return f"free-{secrets.token_hex(4)}"


def fate(name: str) -> Fate:
    """What became of the owner. "dead" and "free": no byte will be written by it any more."""
    if name.startswith("free-"):
        return "free"
    match = _NAME.fullmatch(name)
    try:
        if match is None or (match[1], int(match[2])) != (_boot(), _namespace()):
            return "unknown"
    except OSError:
        return "unknown"
    return "alive" if _is_alive(int(match[3]), match[4]) else "dead"


def _boot() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:12]


def _namespace() -> int:
    return os.stat(_PROC / "self/ns/pid").st_ino


def _is_alive(pid: int, began: str) -> bool:
    state = _state(pid)
    if state is None:
        return _answers(pid)
    if state[1] != began:
        return False
    return state[0] not in "ZX" or _num_threads(pid) > 1


def _num_threads(pid: int) -> int:
    """The first thread of a killed process may be a zombie while another still ends a write."""
    try:
        return len(os.listdir(_PROC / str(pid) / "task"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _state(pid: int) -> tuple[str, str] | None:
    """State and start time of a process; None if its entry cannot be read."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
