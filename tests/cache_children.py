"""Children that use one cache folder, are killed in the middle, and are asked about afterwards.

A program: it imports torch once and forks each child from itself. Run by test_cache_crashes.py,
which judges what it prints: one line of JSON, {"what": count}.

    python cache_children.py kills FOLDER CYCLES SEED
    python cache_children.py kill-tiers FOLDER CYCLES SEED
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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nexus_ext.cache import DiskTier, RemoteStore, Tier, TieredStore, index_file
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


Say = Callable[[str], object]
Store = DiskTier | TieredStore


def live(open_store: Callable[[], Store], seed: int, say: Say, others: Sequence[str] = ()) -> int:
    """Put, load and evict for ever; say what is certain. The `others` are there to be loaded."""
    draw = random.Random(seed)
    names = [f"{seed}-{number}" for number in range(6)]
    with open_store() as tier:
        while True:
            if others and draw.random() < 0.4:
                other = draw.choice(others)
                say(f"{'fetched' if is_right(other, tier.load(other)) else 'torn'} {other}")
            key = draw.choice(names)
            action = draw.random()
            if action < 0.6:
                say(f"coming {key}")  # it may be there before anybody says so
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

    def __init__(self, seed: int, num_children: int, live: Callable[[int, Say], int]) -> None:
        """`live` is what each child does, with a seed of its own."""
        draw = random.Random(seed)
        reading, writing = os.pipe()

        def say(message: str) -> None:
            os.write(writing, f"{message}\n".encode())

        self.pids = [
            fork(lambda n=n: live(1000 * seed + n, say))  # type: ignore[misc]
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

    def count_into(self, counts: Counter[str]) -> dict[str, str]:
        """The last word on every key."""
        state: dict[str, str] = {}
        for message in self.messages:
            what, key = message.split(" ", 1)
            counts[what] += 1
            if what != "coming" or state.get(key) != "there":
                state[key] = what
        counts["killed"] += self.num_killed
        counts["ended"] += len(self.pids) - self.num_killed
        counts["cycles"] += 1
        return state


def kills(folder: Path, cycles: int, seed: int) -> Counter[str]:
    """Kill children in the middle of what they do; compare with what they had said."""
    counts: Counter[str] = Counter()
    for number in range(cycles):
        # With little room nothing is certain to stay, but nothing may be wrong either.
        is_roomy = number % 4 != 3
        zone = folder / ("roomy" if is_roomy else "small")
        max_bytes = "1GiB" if is_roomy else "2MiB"

        def work(seed: int, say: Say, zone: Path = zone, max_bytes: str = max_bytes) -> int:
            return live(lambda: DiskTier(zone, max_bytes), seed, say)

        state = Cycle(seed + number, 1 + number % 2, work).count_into(counts)
        counts["unfinished"] += len(temporaries(zone))
        counts.update(look(zone, state if is_roomy else {}))
    return counts


def kill_tiers(folder: Path, cycles: int, seed: int) -> Counter[str]:
    """The same with two tiers, of which the first has little room: entries go down and up all the
    time, others are fetched from a shared store, and now and then a rate is measured.
    """
    counts: Counter[str] = Counter()
    url = f"file://{folder}/shared"
    others = [f"shared-{number}" for number in range(5)]
    for key in others:
        RemoteStore(url).publish(key, [payload(key)])
    local = folder / "node"

    def open_store() -> TieredStore:
        tiers = [Tier(local / "nvme", "1MiB"), Tier(local / "hdd", "1GiB")]
        return TieredStore(tiers, remote=RemoteStore(url))

    for number in range(cycles):
        if number % 20 == 19:
            (local / "nvme" / "rate.json").unlink(missing_ok=True)
        state = Cycle(
            seed + number, 1 + number % 2, lambda s, say: live(open_store, s, say, others)
        ).count_into(counts)
        counts["unfinished"] += len(temporaries(local))
        counts.update(look_into_tiers(open_store, local, state))
    return counts


def look_into_tiers(
    open_store: Callable[[], TieredStore], folder: Path, state: dict[str, str]
) -> Counter[str]:
    """What a process finds that comes afterwards."""
    counts: Counter[str] = Counter()
    with open_store() as store:
        for key, what in state.items():
            found = store.load(key)
            counts["torn"] += not is_right(key, found)
            counts["lost"] += what in ("there", "fetched") and found is None
            counts["returned"] += what == "gone" and found is not None
            counts["checked"] += 1
        entries = store.entries()
        counts["torn"] += sum(not is_right(entry.key, store.load(entry.key)) for entry in entries)
        stats = store.stats()
        counts["dropped"] += stats.dropped
        counts["settled"] += stats.settled
        for tier in stats.tiers:
            counts["corrupt"] += tier.disk.corruptions
            counts["rebuilt"] += tier.disk.zones[0].num_rebuilds
            counts["over budget"] += tier.disk.stored_bytes > tier.disk.max_bytes
            files = {p.stem for _, p in Folder(tier.folder, shared=False).every_blob()}
            counts["unknown files"] += len(files - {e.path.stem for e in store.entries()})
        store.clear()
    counts["temporaries"] += len(temporaries(folder))
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
    run = {"kills": kills, "kill-tiers": kill_tiers, "together": together}[what]
    print(json.dumps(run(Path(folder), *map(int, numbers))))


if __name__ == "__main__":
    main()
