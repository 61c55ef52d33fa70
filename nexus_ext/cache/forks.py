"""No index is open while the process forks.

A child inherits what SQLite believes about its locks, and not the locks. An index that it opens
afterwards is one that other processes take for closed: they remove the log that it writes to, and
what it acknowledged is gone. So indexes are closed for the moment of a fork, and opened again when
they are used next.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

__all__ = ["follow"]


class Suspendable(Protocol):
    """What must not be open meanwhile."""

    def suspend(self) -> None:
        """Close, and stay closed until `resume`. Blocks until nobody uses it."""

    def resume(self) -> None:
        """It may be opened again."""


_followed: weakref.WeakSet[Suspendable] = weakref.WeakSet()
_lock = threading.Lock()
_is_registered = False
# By thread: two of them may fork at once.
_suspended: dict[int, list[Suspendable]] = {}


def follow(one: Suspendable) -> None:
    """From now on it is suspended while this process forks."""
    global _is_registered
    with _lock:
        _followed.add(one)
        if not _is_registered:
            _is_registered = True
            os.register_at_fork(before=_suspend, after_in_parent=_resume, after_in_child=_begin)


def _suspend() -> None:
    with _lock:
        found = sorted(_followed, key=id)  # in one order: two who fork do not wait for each other
    mine = _suspended.setdefault(threading.get_ident(), [])
    for one in found:
        one.suspend()
        mine.append(one)


def _resume() -> None:
    for one in reversed(_suspended.pop(threading.get_ident(), [])):
        one.resume()


def _begin() -> None:
    """A child: other threads, which may have had the lock or wanted to fork too, are not here."""
    global _lock
    _resume()
    _suspended.clear()
    _lock = threading.Lock()
