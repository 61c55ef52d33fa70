"""A memory limit for one process: a cgroup of its own, made and removed here (v1 or v2)."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from nexus_ext.errors import ConfigError

__all__ = ["MemoryLimit"]


class MemoryLimit:
    """A child cgroup with a limit; write a process id to `tasks` to put it inside."""

    def __init__(self, nbytes: int) -> None:
        """Make the group.

        Raises:
            ConfigError: Cgroups are not ours to make here (not root, or mounted read-only).
        """
        parent, limit_name = _own_cgroup()
        self._folder = parent / f"nexus-{uuid.uuid4().hex[:8]}"
        try:
            self._folder.mkdir()
            (self._folder / limit_name).write_text(str(nbytes))
        except OSError as error:
            raise ConfigError(
                f"A memory limit needs a cgroup that may be written; {parent} gave: {error}. "
                "Run as root, or set the limit outside (systemd-run -p MemoryMax=...)."
            ) from None
        self.tasks = self._folder / "cgroup.procs"

    def remove(self) -> None:
        """After the last process has ended."""
        self._folder.rmdir()


def _own_cgroup() -> tuple[Path, str]:
    """The memory cgroup of this process and the name of its limit file."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _existing(Path("/sys/fs/cgroup/memory"), path), "memory.limit_in_bytes"
    unified = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
    return _existing(Path("/sys/fs/cgroup"), unified), "memory.max"


def _existing(mount: Path, path: str) -> Path:
    """Inside a container the path may name what is outside: then the mount is our own group."""
    folder = mount / path.lstrip("/")
    return folder if os.path.isdir(folder) else mount
