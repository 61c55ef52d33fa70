"""Who wrote this temporary file, and is that process still alive?

A pid alone does not tell: pids are used again, other boots and other containers have the same ones.
So an owner is named by boot, pid namespace, pid and the moment its process began.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["OWNER", "Owner"]

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
        """The calling process."""
        began = _state_and_start(os.getpid())
        assert began is not None, "a process sees itself in /proc"
        return cls(_boot(), _namespace(), os.getpid(), began[1])

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Of a name; None where it names nobody."""
        match = OWNER.fullmatch(text)
        return None if match is None else cls(match[1], *map(int, match.groups()[1:]))

    def __str__(self) -> str:
        return f"{self.boot}-{self.namespace}-{self.pid}-{self.began}"

    def is_dead(self, last_sign_seconds: float) -> bool:
        """Whether it will do nothing any more, as far as can be known here.

        A process of this boot and namespace is asked for; of others only the time tells that has
        gone by since the last sign of life (seconds since 1970).
        """
        if (self.boot, self.namespace) == (_boot(), _namespace()):
            found = _state_and_start(self.pid)
            return found is None or found[0] in _GONE_STATES or found[1] != self.began
        return time.time() - last_sign_seconds > _STRANGER_SECONDS


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")


def _namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """State and start of a process, None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name of the program may hold anything, blanks and brackets too.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])
