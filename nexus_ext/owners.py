"""Whose a temporary file is, told by its name: and is that process still alive?

A pid alone does not tell: pids are used again, other boots and other containers have the same ones.
So an owner is named by boot, pid namespace, pid and the moment its process began; within one boot
and namespace that tells for certain whether it is gone. Locks are not asked: on some file systems
`flock` succeeds for everybody.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["OWNER", "Fate", "Owner", "fate", "free_name", "own_name", "unknown_name"]

Fate = Literal["alive", "dead", "free", "unknown"]

_PROC = Path("/proc")
# As `str(Owner)` writes it.
OWNER = re.compile(r"([0-9a-f]{32})-(\d{1,20})-(\d{1,10})-(\d{1,20})", re.ASCII)
# Of processes on other machines and in other containers nothing can be asked. A write that stood
# still for so long will not go on.
_STRANGER_SECONDS = 24 * 3600
_GONE_STATES = ("Z", "X")  # a process that was not yet waited for writes nothing any more


@dataclass(frozen=True)
class Owner:
    """A process, told apart from every other one.

    Attributes:
        boot: The kernel's boot id, 32 hexadecimal digits.
        namespace: Number of the pid namespace in which `pid` means something.
        pid: Of the process.
        began: When it began, in clock ticks since boot.
    """

    boot: str
    namespace: int
    pid: int
    began: int

    @classmethod
    def current(cls) -> Owner:
        """The calling process; after a fork the child is another.

        Raises:
            OSError: There is no /proc, so nobody can be told apart.
        """
        found = _state_and_start(os.getpid())
        if found is None:
            raise FileNotFoundError(f"{_PROC} must show this process, and does not; mount it")
        return cls(_boot(), _namespace(), os.getpid(), found[1])

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Of a name; None where it names nobody."""
        match = OWNER.fullmatch(text)
        return None if match is None else cls(match[1], *map(int, match.groups()[1:]))

    def __str__(self) -> str:
        return f"{self.boot}-{self.namespace}-{self.pid}-{self.began}"

    def fate(self) -> Literal["alive", "dead", "unknown"]:
        """What became of it. "dead" is certain: no byte will be written by it any more."""
        try:
            if (self.boot, self.namespace) != (_boot(), _namespace()):
                return "unknown"
        except OSError:
            return "unknown"
        return "alive" if self._is_alive() else "dead"

    def _is_alive(self) -> bool:
        found = _state_and_start(self.pid)
        if found is None:
            return _answers(self.pid)
        if found[1] != self.began:
            return False
        return found[0] not in _GONE_STATES or _num_threads(self.pid) > 1

    def is_dead(self, last_sign_seconds: float) -> bool:
        """Whether it will do nothing any more, as far as can be known here.

        A process of this boot and namespace is asked for; of others only the time tells that has
        gone by since the last sign of life (seconds since 1970).
        """
        known = self.fate()
        if known == "unknown":
            return time.time() - last_sign_seconds > _STRANGER_SECONDS
        return known == "dead"


def own_name() -> str:
    """The name of this process as an owner; one that tells nobody anything where no /proc is."""
    try:
        return str(Owner.current())
    except OSError:
        return unknown_name()


def unknown_name() -> str:
    """A name of which nobody can say what became of its owner."""
    return f"unknown-{secrets.token_hex(4)}"


def free_name() -> str:
    """A name that says: no process writes here any more. Unique, so it is taken once."""
    return f"free-{secrets.token_hex(4)}"


def fate(name: str) -> Fate:
    """What became of the owner of this name. "dead" and "free": nothing is written any more."""
    if name.startswith("free-"):
        return "free"
    owner = Owner.parse(name)
    return "unknown" if owner is None else owner.fate()


def _boot() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip().replace("-", "")


def _namespace() -> int:
    return os.stat(_PROC / "self/ns/pid").st_ino


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """State and start of a process; None if its entry cannot be read."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The name of the program may hold anything, blanks and brackets too.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _num_threads(pid: int) -> int:
    """The first thread of a killed process may be a zombie while another still ends a write."""
    try:
        return len(os.listdir(_PROC / str(pid) / "task"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _answers(pid: int) -> bool:
    if pid == 0:  # would be our own group
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
