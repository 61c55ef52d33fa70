"""What one part of the GPU benchmark found, written as it goes: a part that is ended loses nothing.

Owns the rule of errors: whatever goes wrong inside `attempt` is in the file, and the part has
failed; the others of its kind go on.
"""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any


class Report:
    """The results of a part by name, what was skipped and why, and errors.

    Attributes:
        result: By name; assigning to the report writes the file.
        skipped: Reasons, by name.
        errors: Tracebacks, by name.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        """A file to write, and how long the part should take."""
        self.result: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self._path = path
        self._deadline = time.monotonic() + seconds

    def __setitem__(self, name: str, value: Any) -> None:
        self.result[name] = value
        self.save()

    def skip(self, name: str, reason: str) -> None:
        self.skipped[name] = reason
        self.save()

    def fail(self, name: str, reason: str) -> None:
        self.errors[name] = reason
        self.save()

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What fails in here does not end the part."""
        try:
            yield
        except Exception:  # of any library; it is reported, and the exit code tells
            self.fail(name, traceback.format_exc(limit=-6))

    def has_time(self) -> bool:
        return time.monotonic() < self._deadline

    def save(self) -> None:
        """All of it, or what was there before."""
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.__dict__, default=str))
        unfinished.replace(self._path)


def spread(rounds: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and every round."""
    between = quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else [rounds[0]] * 3
    return {
        "median": median(rounds),
        "quartiles": [between[0], between[2]],
        "rounds": list(rounds),
    }
