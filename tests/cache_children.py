"""Children that use one cache folder, are killed in the middle, and are asked about afterwards.

A program: it imports torch once and forks each child from itself. Run by test_cache_crashes.py,
which judges what it prints: one line of JSON, {"what": count}.

    python cache_children.py kills FOLDER CYCLES SEED
    python cache_children.py together FOLDER PROCESSES OPERATIONS SEED [no-locks]
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from nexus_ext.cache import DiskTier, index_file
from nexus_ext.cache.folder import Folder

KIB = 1 << 10
# No two keys have the same bytes: then they would be one blob, and go together.
SIZES = (17, 4095, 4096, 70_000, 300_000, 1 << 20, (1 << 20) + 5)
LONGEST_SPIN_SECONDS = 0.02


def payload(key: str) -> torch.Tensor:
    """What every process puts under a key."""
    draw = random.Random(key)
    nbytes = draw.choice(SIZES)
    return torch.frombuffer(bytearray(draw.randbytes(nbytes)), dtype=torch.uint8)


def is_right(key: str, found: torch.Tensor | None) -> bool:
    return found is None or torch.equal(found, payload(key))


def fork(work: Callable[[], int]) -> int:
    """A child that does its work and nothing else, whatever happens; its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid != 0:
        return pid
    code = 70
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


# -- killed ----------------------------------------------------------------------------------------


def live(folder: Path, seed: int, max_bytes: str, say: Callable[[str], object]) -> int:
    """Put, load and evict for ever; say what is certain."""
    draw = random.Random(seed)
    names = [f"{seed}-{number}" for number in range(6)]
    with DiskTier(folder, max_bytes) as tier:
        while True:
            key = draw.choice(names)
            action = draw.random()
            if action < 0.6:
                if tier.put(key, [payload(key)]) is not None:
                    say(f"there {key}")
            elif action < 0.8:
                if not is_right(key, tier.load(key)):
                    say(f"torn {key}")
            else:
                say(f"going {key}")
                tier.evict(key)
                say(f"gone {key}")


class Cycle:
    """Children with one pipe, until some messages came; then nobody lives."""

    def __init__(self, folder: Path, seed: int, num_children: int, max_bytes: str) -> None:
        self.messages: list[str] = []
        draw = random.Random(seed)
        reading, writing = os.pipe()

        def say(message: str) -> None:
            os.write(writing, f"{message}\n".encode())

        self.pids = [
            fork(lambda n=n: live(folder, 1000 * seed + n, max_bytes, say))  # type: ignore[misc]
            for n in range(num_children)
        ]
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            wanted = draw.randint(0, 6)
            text = b""
            while text.count(b"\n") < wanted and (more := pipe.read(1)):
                text += more
            # Somewhere in what they do next.
            until = time.perf_counter() + draw.random() * LONGEST_SPIN_SECONDS
            while time.perf_counter() < until:
                pass
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
            self.num_killed = sum(
                os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
                for pid in self.pids
            )
            text += pipe.read()
        self.messages = text.decode().splitlines()


def kills(folder: Path, cycles: int, seed: int) -> Counter[str]:
    """Kill children in the middle of what they do; compare with what they had said."""
    counts: Counter[str] = Counter()
    for number in range(cycles):
        # With little room nothing is certain to stay, but nothing may be wrong either.
        is_roomy = number % 4 != 3
        zone = folder / ("roomy" if is_roomy else "small")
        cycle = Cycle(zone, seed + number, 1 + number % 2, "1GiB" if is_roomy else "2MiB")
        state: dict[str, str] = {}
        for message in cycle.messages:
            what, key = message.split(" ", 1)
            counts[what] += 1
            state[key] = what
        counts["torn"] += sum(what == "torn" for what in state.values())
        counts["unfinished"] += len(temporaries(zone))
        counts.update(look(zone, state if is_roomy else {}))
        counts["killed"] += cycle.num_killed
        counts["ended"] += len(cycle.pids) - cycle.num_killed
        counts["cycles"] += 1
    return counts


def look(folder: Path, state: dict[str, str]) -> Counter[str]:
    """What a process finds that comes afterwards."""
    counts: Counter[str] = Counter()
    with DiskTier(folder, "1GiB") as tier:
        counts["rebuilt"] += tier.stats().zones[0].num_rebuilds
        for key, what in state.items():
            found = tier.load(key)
            counts["torn"] += not is_right(key, found)
            counts["lost"] += what == "there" and found is None
            counts["returned"] += what == "gone" and found is not None
            counts["checked"] += 1
        entries = tier.entries()
        counts["torn"] += sum(not is_right(entry.key, tier.load(entry.key)) for entry in entries)
        counts["corrupt"] += tier.stats().corruptions
        files = {path.stem for _, path in Folder(folder, shared=False).every_blob()}
        counts["unknown files"] += len(files - {entry.digest for entry in entries})
        tier.clear()
    counts["temporaries"] += len(temporaries(folder))
    return counts


def temporaries(folder: Path) -> list[str]:
    names = [name for _, _, names in os.walk(folder) for name in names]
    return [name for name in names if name.endswith(".tmp") or name.startswith("new-index")]


# -- together --------------------------------------------------------------------------------------


def work(folder: Path, seed: int, operations: int) -> int:
    """Use keys that all the others use too; 0 if nothing was ever wrong."""
    draw = random.Random(seed)
    tier = DiskTier(folder, "3MiB")
    for _ in range(operations):
        key = f"key-{draw.randrange(12)}"
        action = draw.random()
        if action < 0.5:
            if not is_right(key, tier.load(key)):
                return 71
        elif action < 0.9:
            tier.put(key, [payload(key)])
        elif action < 0.98:
            tier.evict(key)
        else:
            tier.close()
            tier = DiskTier(folder, "3MiB")
    corruptions = tier.stats().corruptions
    tier.close()
    return 72 if corruptions else 0


def together(folder: Path, num_processes: int, operations: int, seed: int) -> Counter[str]:
    """Processes on the same keys, one of which is killed and replaced."""
    counts: Counter[str] = Counter()
    pids = [
        fork(lambda n=n: work(folder, seed + n, operations))  # type: ignore[misc]
        for n in range(num_processes)
    ]
    os.kill(pids[0], signal.SIGKILL)
    pids.append(fork(lambda: work(folder, seed + num_processes, operations)))
    for number, pid in enumerate(pids):
        status = os.waitpid(pid, 0)[1]
        if number > 0:
            counts[f"exit {os.waitstatus_to_exitcode(status)}"] += 1
    with DiskTier(folder, "3MiB") as tier:
        report = tier.verify()
        counts["bad"] += len(report.bad)
        counts["blobs"] += report.num_blobs
        counts["over budget"] += tier.stats().stored_bytes > 3 << 20
        entries = tier.entries()
        counts["wrong"] += sum(not is_right(entry.key, tier.load(entry.key)) for entry in entries)
    return counts


def main() -> None:
    torch.set_num_threads(1)
    what, folder, *numbers = sys.argv[1:]
    if numbers[-1] == "no-locks":
        # What a network file system does that grants every lock: SQLite's own word for it.
        index_file._VFS = "&vfs=unix-none"
        numbers.pop()
    run = {"kills": kills, "together": together}[what]
    print(json.dumps(run(Path(folder), *map(int, numbers))))


if __name__ == "__main__":
    main()
